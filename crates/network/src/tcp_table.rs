//! The TCP sockets of a network namespace, as the kernel lists them (sock_diag(7)): only those in some states, so that a server's
//! ten thousands of connections that are over cost nothing. Offsets are those of linux/inet_diag.h.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use godwit_kernel::Errno;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use crate::error::{Error, Result};
use crate::flow::Flow;
use crate::net_table::{self, Line};
use crate::netlink;

/// Bits of all states in which a socket listens, or has another end. N.B. what is behind them are sockets that are bound and neither
/// (Linux 6.8), which are listed as if they were closed.
pub(crate) const ALL: u32 = (1 << (NEW_SYN_RECV + 1)) - 2;

/// How sockets are asked for.
pub(crate) const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// States (tcp_states.h) of a connection that was asked for: as lists tell it, and as the kernel has it.
const SYN_RECV: u8 = 3;
const NEW_SYN_RECV: u8 = 12;

/// The sockets of the calling thread's network namespace whose state has its bit set, as far as the kernel tells.
pub(crate) fn read(states: u32) -> Vec<Line> {
    listed(states).unwrap_or_else(|error| {
        tracing::debug!(%error, "reading /proc/thread-self/net/tcp instead");
        let is_wanted = |line: &Line| 1u32.checked_shl(line.state.into()).is_some_and(|bit| states & bit != 0);
        net_table::read("thread-self", &net_table::TCP).filter(is_wanted).collect()
    })
}

fn listed(states: u32) -> Result<Vec<Line>> {
    let failed = |source| Error::call("TCP sockets", "sock_diag", source);
    let also = if states & 1 << SYN_RECV != 0 { 1 << NEW_SYN_RECV } else { 0 };
    let socket = netlink::open(NETLINK_SOCK_DIAG)?;
    let mut lines = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        // A `struct inet_diag_req_v2`: no attributes, of whatever addresses.
        let mut question = vec![family as u8, libc::IPPROTO_TCP as u8, 0, 0];
        question.extend((states | also).to_ne_bytes());
        question.extend([0; 48]);
        match netlink::list(&socket, SOCK_DIAG_BY_FAMILY, &question) {
            Ok(told) => lines.extend(told.iter().filter_map(|told| parse(&told.content))),
            // A host may do without IPv6.
            Err(Errno::ENOENT) if family == libc::AF_INET6 => {}
            Err(source) => return Err(failed(source)),
        }
    }
    Ok(lines)
}

/// Reads a `struct inet_diag_msg`.
pub(crate) fn parse(message: &[u8]) -> Option<Line> {
    let word = |at: usize| Some(u32::from_ne_bytes(message.get(at..at + 4)?.try_into().ok()?));
    let end = |port: usize, address: usize| {
        let port = u16::from_be_bytes(message.get(port..port + 2)?.try_into().ok()?);
        let octets: [u8; 16] = message.get(address..address + 16)?.try_into().ok()?;
        let address = match i32::from(*message.first()?) {
            libc::AF_INET => IpAddr::from(*octets.first_chunk::<4>()?),
            _ => IpAddr::from(octets),
        };
        Some(SocketAddr::new(address, port))
    };
    Some(Line {
        local: end(4, 8)?,
        remote: end(6, 24)?,
        state: *message.get(1)?,
        expires_in: Duration::from_millis(word(52)?.into()),
        repetitions: (*message.get(3)?).into(),
        inode: word(68)?.into(),
    })
}

/// Whether the calling thread's network namespace has a socket that a connection's packets are for, and not only one that takes new
/// connections; `None` where nobody tells.
pub(crate) fn has_connection(socket: &Socket, flow: &Flow) -> Option<bool> {
    const LISTEN: u8 = 10;
    match netlink::ask_one(
        socket,
        SOCK_DIAG_BY_FAMILY,
        &question_about(libc::IPPROTO_TCP, 0, (flow.local, flow.remote)),
    ) {
        Ok(told) => parse(&told.content).map(|line| line.state != LISTEN),
        Err(Errno::ENOENT) => Some(false),
        Err(_) => None,
    }
}

/// A `struct inet_diag_req_v2` about one socket: no device, no cookie.
pub(crate) fn question_about(
    protocol: i32,
    extensions: u8,
    (source, destination): (SocketAddr, SocketAddr),
) -> Vec<u8> {
    let family = if source.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut question = vec![family as u8, protocol as u8, extensions, 0];
    question.extend(u32::MAX.to_ne_bytes());
    question.extend(source.port().to_be_bytes());
    question.extend(destination.port().to_be_bytes());
    for address in [source.ip(), destination.ip()] {
        let mut octets = [0; 16];
        match address {
            IpAddr::V4(address) => octets[..4].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => octets = address.octets(),
        }
        question.extend(octets);
    }
    question.extend([0; 4]);
    question.extend([0xff; 8]);
    question
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn both_lists_tell_the_same() {
        const ESTABLISHED: u8 = 1;
        const LISTENING: u8 = 10;
        for ip in ["127.0.0.1", "::1"] {
            let listener = TcpListener::bind((ip, 0)).unwrap();
            let here = listener.local_addr().unwrap();
            let client = TcpStream::connect(here).unwrap();
            let (server, _) = listener.accept().unwrap();
            let of_ours = |lines: Vec<Line>| {
                let ours = lines.into_iter().filter(|line| line.local == here);
                let mut ours: Vec<_> = ours.map(|line| (line.state, line.remote, line.inode)).collect();
                ours.sort();
                ours
            };
            let all = of_ours(net_table::read("thread-self", &net_table::TCP).collect());
            assert_eq!(all.len(), 2, "{ip}");
            assert_eq!(of_ours(read(ALL)), all);
            let listening: Vec<_> = all.iter().copied().filter(|(state, ..)| *state == LISTENING).collect();
            assert_eq!(of_ours(read(1 << LISTENING)), listening);
            assert_eq!(of_ours(read(1 << ESTABLISHED))[0].1, client.local_addr().unwrap());
            drop(server);
        }
    }

    #[test]
    fn a_connection_is_told_from_its_listener() {
        let socket = netlink::open(NETLINK_SOCK_DIAG).unwrap();
        for ip in ["127.0.0.1", "::1"] {
            let listener = TcpListener::bind((ip, 0)).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let flow = Flow { local: listener.local_addr().unwrap(), remote: client.local_addr().unwrap() };
            assert_eq!(has_connection(&socket, &flow), Some(true), "{ip}");
            let other = Flow { remote: SocketAddr::new(flow.remote.ip(), 1), ..flow };
            assert_eq!(has_connection(&socket, &other), Some(false), "{ip}");
            drop(listener);
            assert_eq!(has_connection(&socket, &other), Some(false), "{ip}");
        }
    }

    #[test]
    fn a_socket_that_is_only_bound_is_none() {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, getsockname, socket};
        use std::os::fd::AsRawFd;
        let bound = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        bind(bound.as_raw_fd(), &SockaddrStorage::from(any)).unwrap();
        let own: SockaddrStorage = getsockname(bound.as_raw_fd()).unwrap();
        let port = own.as_sockaddr_in().unwrap().port();
        assert!(!read(ALL).iter().any(|line| line.local.port() == port));
    }

    #[test]
    fn a_short_message_is_none() {
        let whole = [0; 72];
        assert!(parse(&whole).is_some());
        for end in 0..whole.len() {
            assert_eq!(parse(&whole[..end]), None);
        }
    }
}
