//! Seeing packets arrive, whatever the packet filter makes of them.

use std::os::fd::{AsRawFd, OwnedFd};

use godwit_kernel::Errno;
use godwit_kernel::packet::{Protocol, arrivals, see};
use nix::sys::socket::{MsgFlags, recv};

use crate::deliver::SPOKEN;
use crate::error::{Error, Result};
use crate::packet::{self, Arrival, Packet};

/// Room for packets that nobody has fetched yet: some hundredths of a second at full rate.
const BUFFER_BYTES: i32 = 32 << 20;
/// Longest packet: IP's own limit, and what a receiving interface joins may be somewhat longer.
const LONGEST: usize = 128 << 10;

/// Kinds of packets, one for each socket.
const KINDS: [Protocol; 2] = [Protocol::TcpOverIpv4, Protocol::TcpOverIpv6];

/// Sees every TCP packet that arrives from when it is told to on, but for what is said in a peer's place ([`crate::stand_in`]).
#[derive(Debug)]
pub(crate) struct Capture {
    sockets: [OwnedFd; 2],
    buffer: Vec<u8>,
}

impl Capture {
    /// Makes one that does not see anything yet: what is slow about it.
    pub(crate) fn prepare() -> Result<Self> {
        let open = |protocol| {
            arrivals(protocol, BUFFER_BYTES).map_err(|source| Error::call("packet socket", "opening it", source))
        };
        let [four, six] = KINDS;
        Ok(Self { sockets: [open(four)?, open(six)?], buffer: vec![0; LONGEST] })
    }

    /// Sees from now on.
    pub(crate) fn begin(&self) -> Result<()> {
        self.sockets.iter().zip(KINDS).try_for_each(|(socket, protocol)| {
            see(socket, protocol, SPOKEN).map_err(|source| Error::call("packet socket", "SO_ATTACH_FILTER", source))
        })
    }

    /// Fetches what has arrived since the last time and is `wanted`.
    pub(crate) fn take(&mut self, mut wanted: impl FnMut(&Arrival) -> bool) -> Result<Vec<Packet>> {
        let mut taken = Vec::new();
        for socket in &self.sockets {
            loop {
                match recv(socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                    Ok(length) => {
                        let bytes = &self.buffer[..length];
                        if packet::read(bytes).as_ref().is_some_and(&mut wanted) {
                            taken.push(bytes.to_vec().into());
                        }
                    }
                    Err(Errno::EAGAIN) => break,
                    Err(Errno::EINTR | Errno::ENETDOWN) => {}
                    Err(source) => return Err(Error::call("packet socket", "receiving", source)),
                }
            }
        }
        Ok(taken)
    }
}
