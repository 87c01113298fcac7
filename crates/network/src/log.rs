//! Packets that a rule of the packet filter has logged, whole (nfnetlink_log): numbers are those of
//! linux/netfilter/nfnetlink_log.h. The log belongs to our socket and goes with it.

use godwit_kernel::Errno;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::net::if_::if_indextoname;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::error::{Error, Result};
use crate::netlink;
use crate::packet::Packet;
use godwit_kernel::descriptors::set_socket_option;

const SUBSYSTEM: u16 = 4 << 8;
const PACKET: u16 = SUBSYSTEM;
const CONFIGURE: u16 = SUBSYSTEM | 1;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
/// Length of the headers of netlink and nfnetlink, together.
const HEADERS: usize = 20;

const COMMAND: u16 = 1;
const BIND: u8 = 1;
const MODE: u16 = 2;
const COPY_PACKET: u8 = 2;
const BUFFER: u16 = 3;
const THRESHOLD: u16 = 5;

const ARRIVED_BY: u16 = 4;
const PAYLOAD: u16 = 9;

/// Room for packets that nobody has fetched yet.
const BUFFER_BYTES: i32 = 32 << 20;
/// Room for one message: the longest packet and what is said of it.
const LONGEST: usize = 128 << 10;
/// Groups that are tried, from this number on: others use low ones.
const GROUPS: std::ops::Range<u16> = 0x6700..0x6800;

/// Receives what is logged to a group that nobody else listens to.
#[derive(Debug)]
pub(crate) struct Log {
    socket: Socket,
    pub(crate) group: u16,
    buffer: Vec<u8>,
}

fn failed(what: &'static str) -> impl FnOnce(Errno) -> Error {
    move |source| Error::call("packet filter's log (nfnetlink_log)", what, source)
}

impl Log {
    /// Begins to listen.
    ///
    /// # Errors
    /// When the kernel has no such log.
    pub(crate) fn begin() -> Result<Self> {
        let socket = netlink::open(NETLINK_NETFILTER)?;
        let bind = |group| netlink::transact(&socket, &configure(group, COMMAND, &[BIND]), &[1]);
        let mut groups = GROUPS.map(|group| bind(group).map(|()| group));
        // N.B. EPERM may mean that a group is another socket's, or that none is to be had.
        let is_taken = |tried: &Result<u16, Errno>| matches!(tried, Err(Errno::EBUSY | Errno::EEXIST | Errno::EPERM));
        let group = groups.find(|tried| !is_taken(tried)).unwrap_or_else(|| bind(GROUPS.start).map(|()| GROUPS.start));
        let group = group.map_err(failed("listening"))?;
        let log = Self { socket, group, buffer: vec![0; LONGEST] };
        let all = [0, 0, 0, 0, COPY_PACKET, 0];
        for (what, value) in [(MODE, &all[..]), (BUFFER, &(LONGEST as u32).to_be_bytes()), (THRESHOLD, &[0, 0, 0, 1])] {
            netlink::transact(&log.socket, &configure(group, what, value), &[1]).map_err(failed("setting it up"))?;
        }
        set_socket_option(log.fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &BUFFER_BYTES.to_ne_bytes())
            .map_err(failed("SO_RCVBUFFORCE"))?;
        Ok(log)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Fetches what was logged since the last time.
    pub(crate) fn take(&mut self) -> Result<Vec<Packet>> {
        let mut taken = Vec::new();
        loop {
            let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
            match nix::sys::socket::recv(self.socket.as_raw_fd(), &mut self.buffer, flags) {
                Ok(length) => read(&self.buffer[..length], &mut taken),
                Err(Errno::EAGAIN) => return Ok(taken),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => tracing::warn!("more packets arrived in the freeze than are kept"),
                Err(source) => return Err(failed("receiving")(source)),
            }
        }
    }
}

fn configure(group: u16, attribute: u16, value: &[u8]) -> Vec<u8> {
    let length = (4 + value.len()) as u16;
    let whole = HEADERS + usize::from(length).next_multiple_of(4);
    let mut message = Vec::with_capacity(whole);
    message.extend((whole as u32).to_ne_bytes());
    message.extend(CONFIGURE.to_ne_bytes());
    message.extend((REQUEST | ACKNOWLEDGE).to_ne_bytes());
    message.extend(1u32.to_ne_bytes());
    message.extend([0; 4]);
    // Of any family, and of this group.
    message.extend([libc::AF_UNSPEC as u8, 0]);
    message.extend(group.to_be_bytes());
    message.extend(length.to_ne_bytes());
    message.extend(attribute.to_ne_bytes());
    message.extend(value);
    message.resize(whole, 0);
    message
}

/// Reads messages, several in a row.
pub(crate) fn read(mut rest: &[u8], into: &mut Vec<Packet>) {
    while rest.len() >= HEADERS {
        let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
        let kind = u16::from_ne_bytes([rest[4], rest[5]]);
        let Some(message) = rest.get(HEADERS..length) else { return };
        if kind == PACKET {
            into.extend(packet(message));
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}

/// Reads the attributes of one packet.
fn packet(mut rest: &[u8]) -> Option<Packet> {
    let mut found = Packet::default();
    while let Some((head, _)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let value = rest.get(4..length)?;
        match u16::from_ne_bytes([head[2], head[3]]) {
            ARRIVED_BY => {
                let index = u32::from_be_bytes(value.try_into().ok()?);
                found.interface = if_indextoname(index).ok().map(|name| name.to_string_lossy().into_owned());
            }
            PAYLOAD => found.bytes = value.to_vec(),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    (!found.bytes.is_empty()).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logged_packet_is_read_and_nonsense_is_not() {
        let mut message = vec![0; HEADERS];
        message.extend([7, 0, 9, 0, 1, 2, 3, 0]);
        message.extend([8, 0, 4, 0, 0, 0, 0, 1]);
        let length = message.len() as u32;
        message[..4].copy_from_slice(&length.to_ne_bytes());
        message[4..6].copy_from_slice(&PACKET.to_ne_bytes());
        let mut taken = Vec::new();
        read(&[message.clone(), message.clone()].concat(), &mut taken);
        assert_eq!(taken, vec![Packet { bytes: vec![1, 2, 3], interface: Some("lo".into()) }; 2]);
        for end in 0..message.len() {
            read(&message[..end], &mut taken);
        }
        read(&[0xff; 64], &mut taken);
        read(&[0; 64], &mut taken);
        assert_eq!(taken.len(), 2);
    }
}
