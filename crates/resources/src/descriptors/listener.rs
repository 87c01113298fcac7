//! TCP sockets without connections: listening ones, and those that were made but not connected yet.

use super::kind::refuse;
use super::socket_options;
use super::table::Entry;
use super::unix_socket::LISTEN;
use crate::{Error, Result};
use godwit_kernel::descriptors::socket_option;
use godwit_proto::image::{FdTypes, FileEntry, InetSkEntry};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrLike, SockaddrStorage, bind, getpeername,
    getsockname, listen, socket,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

const CLOSED: u8 = 7;

/// What there is to know of a TCP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inet {
    family: i32,
    state: u8,
    /// Connections that wait to be accepted.
    waiting: u32,
    backlog: u32,
    pub(crate) address: SocketAddr,
}

fn socket_address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(address) = storage.as_sockaddr_in() {
        return Some(SocketAddr::V4(SocketAddrV4::new(address.ip(), address.port())));
    }
    let address = storage.as_sockaddr_in6()?;
    Some(SocketAddr::V6(SocketAddrV6::new(address.ip(), address.port(), address.flowinfo(), address.scope_id())))
}

/// Both ends of a socket as people write them.
pub(crate) fn ends(entry: &Entry) -> String {
    let fd = entry.file.as_raw_fd();
    let local = getsockname::<SockaddrStorage>(fd).ok().and_then(|address| socket_address(&address));
    let peer = getpeername::<SockaddrStorage>(fd).ok().and_then(|address| socket_address(&address));
    let local = local.map_or_else(|| "unbound".to_owned(), |address| address.to_string());
    peer.map_or_else(|| local.clone(), |peer| format!("{local} - {peer}"))
}

/// Reads what there is to know of a TCP socket. Of a listening one, tcp(7)'s `TCP_INFO` tells the queue and the backlog in
/// fields that otherwise count segments.
pub(crate) fn examine(entry: &Entry, family: i32) -> Result<Inet> {
    const UNACKED: usize = 24;
    const SACKED: usize = 28;
    let info =
        socket_option(entry.file.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, 256).map_err(entry.error("TCP_INFO"))?;
    let word = |at: usize| Some(u32::from_ne_bytes(info.get(at..at + 4)?.try_into().ok()?));
    let short = || Error::state(entry.name(), "TCP_INFO is too short");
    let state = *info.first().ok_or_else(short)?;
    let (waiting, backlog) = (word(UNACKED).ok_or_else(short)?, word(SACKED).ok_or_else(short)?);
    let storage: SockaddrStorage = getsockname(entry.file.as_raw_fd()).map_err(entry.error("getsockname"))?;
    let address = socket_address(&storage).ok_or_else(|| Error::state(entry.name(), "no address of its family"))?;
    Ok(Inet { family, state, waiting, backlog, address })
}

/// Refuses what cannot be moved.
pub(crate) fn verdict(entry: &Entry, inet: &Inet) -> Result<()> {
    match inet.state {
        LISTEN if inet.waiting > 0 => {
            refuse(entry, &format!("TCP listener {}", inet.address), "connections wait to be accepted")
        }
        LISTEN | CLOSED => Ok(()),
        _ => refuse(entry, &format!("TCP connection {}", ends(entry)), "connections cannot be moved"),
    }
}

impl Inet {
    /// How the destination is told which address must be free, `None` when none is needed.
    pub(crate) fn needed_address(&self) -> Option<String> {
        (self.address.port() != 0).then(|| format!("tcp:{}", self.address))
    }
}

fn words(address: IpAddr) -> Vec<u32> {
    match address {
        IpAddr::V4(address) => vec![u32::from_ne_bytes(address.octets())],
        IpAddr::V6(address) => address
            .octets()
            .chunks_exact(4)
            .map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
            .collect(),
    }
}

/// Collects a TCP socket.
pub(crate) fn collect(entry: &Entry, inet: &Inet, id: u32) -> Result<FileEntry> {
    let (options, opts) = socket_options::collect(entry, inet.family)?;
    let scope = match inet.address {
        SocketAddr::V6(address) => address.scope_id(),
        SocketAddr::V4(_) => 0,
    };
    let ifname = if scope == 0 {
        None
    } else {
        let name = nix::net::if_::if_indextoname(scope).map_err(entry.error("if_indextoname"))?;
        Some(name.to_string_lossy().into_owned())
    };
    let message = InetSkEntry {
        id,
        ino: entry.stat.st_ino as u32,
        family: inet.family as u32,
        r#type: libc::SOCK_STREAM as u32,
        proto: libc::IPPROTO_TCP as u32,
        state: inet.state.into(),
        src_port: inet.address.port().into(),
        flags: entry.info.status_flags() as u32,
        backlog: inet.backlog,
        src_addr: words(inet.address.ip()),
        opts,
        ifname,
        options,
        ..InetSkEntry::default()
    };
    Ok(FileEntry { r#type: FdTypes::Inetsk as i32, id, isk: Some(message), ..FileEntry::default() })
}

fn address_of(message: &InetSkEntry) -> Option<SocketAddr> {
    let port = u16::try_from(message.src_port).ok()?;
    match (message.family as i32, message.src_addr.as_slice()) {
        (libc::AF_INET, [word]) => Some(SocketAddr::new(Ipv4Addr::from(word.to_ne_bytes()).into(), port)),
        (libc::AF_INET6, words @ [_, _, _, _]) => {
            let mut octets = [0; 16];
            for (slot, word) in octets.chunks_exact_mut(4).zip(words) {
                slot.copy_from_slice(&word.to_ne_bytes());
            }
            let scope = match &message.ifname {
                Some(name) => nix::net::if_::if_nametoindex(name.as_str()).ok()?,
                None => 0,
            };
            Some(SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(octets), port, 0, scope)))
        }
        _ => None,
    }
}

/// Makes a TCP socket again.
///
/// # Errors
/// `EADDRINUSE` naming the address when something else has it here.
pub(crate) fn rebuild(message: &InetSkEntry) -> Result<OwnedFd> {
    let address = address_of(message)
        .ok_or_else(|| Error::state("TCP socket", format!("no usable address in {:?}", message.src_addr)))?;
    let resource = format!("TCP socket {address}");
    let failed = |what| {
        let resource = resource.clone();
        move |source| Error::call(resource, what, source)
    };
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let made = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp).map_err(failed("socket"))?;
    socket_options::apply(made.as_fd(), &message.options, &resource)?;
    if address.port() != 0 {
        let storage = SockaddrStorage::from(address);
        debug_assert!(storage.len() > 0);
        bind(made.as_raw_fd(), &storage).map_err(failed("bind"))?;
    }
    if message.state == u32::from(LISTEN) {
        let backlog = i32::try_from(message.backlog).unwrap_or(i32::MAX).min(Backlog::MAXCONN.into());
        listen(&made, Backlog::new(backlog).map_err(failed("listen"))?).map_err(failed("listen"))?;
    }
    Ok(made)
}
