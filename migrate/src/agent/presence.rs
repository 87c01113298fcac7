//! Whether anybody listens at the destination any more. When a program has gone, the kernel of its host says so to whoever writes to its
//! port (udp(7), `ECONNREFUSED`). QUIC does not listen to that, because anybody could say it, and waits for seconds, in which the process
//! may stand still. Until the decision all that comes of believing a lie is that a move is called off, so it is believed then if the link
//! is silent as well.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// A look at a port, again and again.
#[derive(Debug)]
pub(super) struct Presence {
    socket: UdpSocket,
    /// Bytes that the link had received at the last look.
    received: u64,
}

impl Presence {
    /// Prepares to look; `None` where that cannot be done.
    pub(super) fn of(peer: SocketAddr, received: u64) -> Option<Self> {
        let here: SocketAddr = match peer {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(here).ok()?;
        socket.connect(peer).ok()?;
        socket.set_nonblocking(true).ok()?;
        Some(Self { socket, received })
    }

    /// Whether nobody is there: the kernel has said so since the last look, and the link has received nothing.
    pub(super) fn is_gone(&mut self, received: u64) -> bool {
        let is_silent = std::mem::replace(&mut self.received, received) == received;
        // N.B. no packet of QUIC: whoever is there does not look at it.
        let refused = self.socket.send(&[0]).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
        refused && is_silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn one_that_has_gone_is_noticed_unless_the_link_is_alive() {
        let listener = UdpSocket::bind("127.0.0.1:0").unwrap();
        let peer = listener.local_addr().unwrap();
        let mut presence = Presence::of(peer, 7).unwrap();
        for _ in 0..3 {
            assert!(!presence.is_gone(7), "it is there");
        }
        drop(listener);
        for received in 8..12 {
            assert!(!presence.is_gone(received), "the link is alive");
        }
        let begun = Instant::now();
        while !presence.is_gone(11) {
            assert!(begun.elapsed() < Duration::from_secs(5));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
