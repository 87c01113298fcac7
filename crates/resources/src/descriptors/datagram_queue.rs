//! Datagrams that wait in a UDP socket.
//!
//! They are read by peeking along the queue (`SO_PEEK_OFF`), with all that the kernel says of them. An empty datagram that was
//! looked at once is passed over by whoever peeks later, though not by who reads: that is all that is left behind here.
//!
//! At the destination each arrives once more. As long as it does the socket has a port of its own that nobody knows, and its
//! gate (`super::filter`) is closed to all else; then it is taken off that port (connect(2) with `AF_UNSPEC`), and its queue
//! stays. So it can be filled before it has its address, which is not here yet, or belongs to several sockets.

use super::kind::refuse;
use super::multicast::{address_of, bytes_of};
use super::socket_options::set_buffer;
use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{disconnect, set_socket_option, socket_option};
use godwit_kernel::socket::{Received, receive};
use godwit_network::{Datagram, Delivery};
use godwit_proto::image::SkPacketEntry;
use godwit_proto::wire::{DatagramHeader, SocketContent};
use nix::net::if_::if_indextoname;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockaddrStorage, bind, getsockname};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Longest datagram.
const LONGEST: usize = 64 << 10;
/// Bytes that may wait in one socket, and datagrams.
const MAX_WAITING: usize = 64 << 20;
const MAX_DATAGRAMS: usize = 1 << 17;
/// Room in a receive buffer while it is filled.
const ROOM: i32 = 1 << 30;
/// Time that a datagram has to get through this host.
const TO_ARRIVE: Duration = Duration::from_millis(200);
/// How often it is tried: a processor's queue of packets may be full, as any on their way. One that was only late comes twice, as datagrams may.
const ATTEMPTS: usize = 4;
/// Time that it takes usually. Where the kernel leaves it to a thread of its own (ksoftirqd), that has to have a turn.
const AT_ONCE: Duration = Duration::from_micros(100);

/// What is switched on while datagrams are looked at.
const TOLD: &[(i32, i32)] =
    &[(libc::IPPROTO_IP, libc::IP_PKTINFO), (libc::IPPROTO_IP, libc::IP_RECVTTL), (libc::IPPROTO_IP, libc::IP_RECVTOS)];
const TOLD_OF_IPV6: &[(i32, i32)] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
];

/// Whether something waits in a socket.
pub(crate) fn is_readable(entry: &Entry) -> bool {
    let mut poller = [PollFd::new(entry.file.as_fd(), PollFlags::POLLIN)];
    poll(&mut poller, PollTimeout::ZERO).is_ok()
        && poller[0].revents().unwrap_or(PollFlags::empty()).contains(PollFlags::POLLIN)
}

/// Options of a socket that have other values for a while.
struct Changed<'a> {
    socket: BorrowedFd<'a>,
    before: Vec<(i32, i32, Vec<u8>)>,
}

impl<'a> Changed<'a> {
    fn new(socket: BorrowedFd<'a>) -> Self {
        Self { socket, before: Vec::new() }
    }

    fn set(&mut self, (level, name): (i32, i32), value: i32) -> Result<(), Errno> {
        let before = socket_option(self.socket, level, name, 4)?;
        set_socket_option(self.socket, level, name, &value.to_ne_bytes())?;
        self.before.push((level, name, before));
        Ok(())
    }
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        for (level, name, value) in self.before.drain(..).rev() {
            if let Err(errno) = set_socket_option(self.socket, level, name, &value) {
                tracing::error!(%errno, level, name, "an option of a datagram socket is not as it was");
            }
        }
    }
}

/// Reads the datagrams that wait in a socket, which keeps them.
pub(crate) fn collect(entry: &Entry, family: i32, id: u32) -> Result<Vec<SocketContent>> {
    let socket = entry.file.as_fd();
    let counts =
        |level, name| socket_option(socket, level, name, 4).is_ok_and(|value| value.iter().any(|&byte| byte != 0));
    let mut changed = Changed::new(socket);
    let told = TOLD.iter().chain(if family == libc::AF_INET6 { TOLD_OF_IPV6 } else { &[] });
    for &option in told {
        changed.set(option, 1).map_err(entry.error("setsockopt"))?;
    }
    changed.set((libc::SOL_SOCKET, libc::SO_PEEK_OFF), 0).map_err(entry.error("SO_PEEK_OFF"))?;
    let mut buffer = vec![0; LONGEST];
    let mut contents = Vec::new();
    let mut total = 0;
    loop {
        let received = match receive(socket, &mut buffer, libc::MSG_PEEK | libc::MSG_DONTWAIT) {
            Ok(received) => received,
            Err(Errno::EAGAIN) => break,
            // An error that waited in the socket and is taken by this: datagrams are not concerned.
            Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EMSGSIZE | Errno::EPROTO) => {
                continue;
            }
            Err(source) => return Err(entry.error("peeking")(source)),
        };
        // One that is shut down for reading is at its end when nothing waits any more.
        if received.name.is_empty() {
            break;
        }
        total += received.length;
        if total > MAX_WAITING || contents.len() >= MAX_DATAGRAMS {
            return Err(Error::state(entry.name(), "too much waits in it"));
        }
        let bytes = &buffer[..received.length.min(buffer.len())];
        let header = header(&received).ok_or_else(|| Error::state(entry.name(), "a datagram without addresses"))?;
        for data in segments(bytes, &received) {
            let entry = SkPacketEntry { id_for: id, length: data.len() as u32, scm: Vec::new() };
            contents.push(SocketContent { entry: Some(entry), data, header: Some(header.clone()) });
        }
    }
    let by_port =
        counts(libc::IPPROTO_IP, libc::IP_RECVORIGDSTADDR) || counts(libc::IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR);
    if !contents.is_empty() && by_port {
        let text = "datagrams wait in it whose first destination counts (IP_RECVORIGDSTADDR)";
        return refuse(entry, "UDP socket", text);
    }
    Ok(contents)
}

/// Splits what was joined (udp(7), `UDP_GRO`).
pub(super) fn segments(bytes: &[u8], received: &Received) -> Vec<Vec<u8>> {
    let joined = received.control.iter().find(|(level, kind, _)| (*level, *kind) == (libc::IPPROTO_UDP, libc::UDP_GRO));
    let length = joined.and_then(|(.., value)| value.get(..4)?.try_into().ok()).map_or(0, u32::from_ne_bytes) as usize;
    if length == 0 || bytes.is_empty() {
        vec![bytes.to_vec()]
    } else {
        bytes.chunks(length).map(<[u8]>::to_vec).collect()
    }
}

pub(super) fn header(received: &Received) -> Option<DatagramHeader> {
    let source = sender(&received.name)?;
    let mut header = DatagramHeader {
        source: bytes_of(source.ip()),
        source_port: source.port().into(),
        hops: 64,
        ..DatagramHeader::default()
    };
    let mut interface = 0;
    for (level, kind, value) in &received.control {
        let word = |at: usize| value.get(at..at + 4).and_then(|word| word.try_into().ok()).map(u32::from_ne_bytes);
        match (*level, *kind) {
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                interface = word(0)?;
                header.destination = value.get(8..12)?.to_vec();
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                let address = Ipv6Addr::from(<[u8; 16]>::try_from(value.get(..16)?).ok()?);
                if header.destination.is_empty() {
                    header.destination = bytes_of(IpAddr::from(address).to_canonical());
                }
                interface = interface.max(word(16)?);
            }
            (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => header.hops = word(0)?,
            (libc::IPPROTO_IP, libc::IP_TOS) => header.traffic_class = (*value.first()?).into(),
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => header.traffic_class = word(0)?,
            _ => {}
        }
    }
    if interface != 0 {
        header.interface =
            if_indextoname(interface).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    }
    Some(header)
}

/// The address in a sockaddr, IPv4 as such.
fn sender(name: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(name.get(..2)?.try_into().ok()?);
    let port = u16::from_be_bytes(name.get(2..4)?.try_into().ok()?);
    let address = match i32::from(family) {
        libc::AF_INET => IpAddr::from(<[u8; 4]>::try_from(name.get(4..8)?).ok()?),
        libc::AF_INET6 => IpAddr::from(<[u8; 16]>::try_from(name.get(8..24)?).ok()?),
        _ => return None,
    };
    Some(SocketAddr::new(address.to_canonical(), port))
}

/// Has datagrams arrive at a new socket of a family and protocol, which is without address before and after.
pub(crate) fn rebuild(
    socket: &OwnedFd,
    (family, protocol): (i32, i32),
    contents: &[&SocketContent],
    delivery: &Delivery,
    name: &str,
) -> Result<()> {
    let failed = |what| move |source| Error::call(name, what, source);
    set_buffer(socket.as_fd(), libc::SO_RCVBUF, ROOM).map_err(failed("SO_RCVBUFFORCE"))?;
    // N.B. by which interface a datagram came is noted as it arrives, or never; the options of the old socket come later.
    let _ = set_socket_option(socket.as_fd(), libc::IPPROTO_IP, libc::IP_PKTINFO, &1i32.to_ne_bytes());
    let any = if family == libc::AF_INET { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any, 0))).map_err(failed("bind"))?;
    let own: SockaddrStorage = getsockname(socket.as_raw_fd()).map_err(failed("getsockname"))?;
    let port = super::listener::socket_address(&own).map_or(0, |own| own.port());
    for content in contents {
        let header = content.header.as_ref();
        let unusable = || Error::state(name, "a datagram that waited says nothing usable of its addresses");
        let header = header.ok_or_else(unusable)?;
        let source = address_of(&header.source).ok_or_else(unusable)?;
        let destination = address_of(&header.destination).ok_or_else(unusable)?;
        let datagram = Datagram {
            protocol: protocol as u8,
            source: SocketAddr::new(source, u16::try_from(header.source_port).map_err(|_| unusable())?),
            destination: SocketAddr::new(destination, port),
            hops: header.hops.min(255) as u8,
            traffic_class: header.traffic_class.min(255) as u8,
            payload: &content.data,
        };
        let packet = datagram.packet().ok_or_else(unusable)?;
        let interface = (!header.interface.is_empty()).then_some(header.interface.as_str());
        let before = used(socket).map_err(failed("SO_MEMINFO"))?;
        let has_arrived = || used(socket).map(|now| now != before);
        let mut arrived = false;
        for _ in 0..ATTEMPTS {
            match delivery.arrive(&packet, destination, interface) {
                Ok(()) => {}
                Err(godwit_kernel::Errno::EPERM) => {
                    let text = "what waited comes by the loopback device (lo), and the packet filter of this host does not let it out or in";
                    return Err(Error::state(name, text));
                }
                Err(source) => return Err(failed("putting back what waited")(source)),
            }
            // N.B. one after the other: they could overtake each other on their way through several CPUs.
            arrived = wait_until(has_arrived).map_err(failed("SO_MEMINFO"))?;
            if arrived {
                break;
            }
        }
        if !arrived {
            let text = format!("a datagram from {source} that waited does not get through this host");
            return Err(Error::state(name, text));
        }
    }
    disconnect(socket.as_fd()).map_err(failed("taking its port away"))
}

/// Waits for a datagram to get through this host, for a while; returns whether it has.
fn wait_until(has_arrived: impl Fn() -> Result<bool, Errno>) -> Result<bool, Errno> {
    let begun = Instant::now();
    while !has_arrived()? {
        let waited = begun.elapsed();
        if waited > TO_ARRIVE {
            return Ok(false);
        }
        if waited > AT_ONCE {
            std::thread::sleep(AT_ONCE);
        } else {
            std::hint::spin_loop();
        }
    }
    Ok(true)
}

/// Memory that what waits in a socket takes.
fn used(socket: &OwnedFd) -> Result<u32, Errno> {
    const SO_MEMINFO: i32 = 55;
    let value = socket_option(socket.as_fd(), libc::SOL_SOCKET, SO_MEMINFO, 64)?;
    let first = value.get(..4).and_then(|word| word.try_into().ok()).map(u32::from_ne_bytes);
    first.ok_or(Errno::EBADMSG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_datagrams_are_split() {
        let gro = |length: i32| Received {
            control: vec![(libc::IPPROTO_UDP, libc::UDP_GRO, length.to_ne_bytes().to_vec())],
            ..Received::default()
        };
        assert_eq!(segments(b"abcde", &gro(2)), [&b"ab"[..], b"cd", b"e"]);
        assert_eq!(segments(b"abcde", &Received::default()), [b"abcde"]);
        assert_eq!(segments(b"", &gro(2)), [b""]);
    }

    #[test]
    fn senders_are_read() {
        let mut name = vec![2, 0, 0, 53, 10, 0, 0, 1];
        assert_eq!(sender(&name), Some("10.0.0.1:53".parse().unwrap()));
        name[0] = 10;
        assert_eq!(sender(&name), None);
        assert_eq!(sender(&[2]), None);
    }
}
