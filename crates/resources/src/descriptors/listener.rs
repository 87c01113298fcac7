//! TCP sockets: what they all have, and those without connections, listening or made but not connected yet.
//!
//! So are those of MPTCP, which many servers listen by. What they accept of clients that do not speak it are TCP sockets like any
//! other. A connection that does speak it can only be left behind: its keys and its place in each stream cannot be set.

use super::kind::{integer_option, refuse, refuse_with};
use super::table::Entry;
use super::unix_socket::LISTEN;
use super::{connection, filter, held_port, socket_options};
use crate::{Error, LEAVE_BEHIND, Obstacle, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{is_shut_for_reading, readable_bytes, set_socket_option, socket_option};
use godwit_kernel::socket::socket;
use godwit_network::Listener;
use godwit_network::net_table;
use godwit_proto::image::{FdTypes, FileEntry, InetSkEntry, SkOptsEntry, SkShutdown, SocketOption};
use nix::sys::socket::{
    Backlog, Shutdown, SockaddrLike, SockaddrStorage, bind, getpeername, getsockname, listen, shutdown,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

const CLOSED: u8 = 7;

/// What there is to know of a TCP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inet {
    family: i32,
    /// `IPPROTO_TCP` or `IPPROTO_MPTCP`.
    protocol: i32,
    pub(crate) state: u8,
    /// Connections that wait to be accepted.
    waiting: u32,
    backlog: u32,
    pub(crate) address: SocketAddr,
    /// The other end of a connection.
    pub(crate) peer: Option<SocketAddr>,
    /// It has none any more, and says things of itself that were agreed on with it.
    had_peer: bool,
    /// It reads end of file.
    is_at_end: bool,
}

pub(crate) fn socket_address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(address) = storage.as_sockaddr_in() {
        return Some(SocketAddr::V4(SocketAddrV4::new(address.ip(), address.port())));
    }
    let address = storage.as_sockaddr_in6()?;
    Some(SocketAddr::V6(SocketAddrV6::new(address.ip(), address.port(), address.flowinfo(), address.scope_id())))
}

fn peer(entry: &Entry) -> Option<SocketAddr> {
    // N.B. of a connection that is only asked for, getpeername(2) says nothing.
    let named =
        getpeername::<SockaddrStorage>(entry.file.as_raw_fd()).ok().and_then(|address| socket_address(&address));
    named.or_else(|| asked_for(entry))
}

/// The address that a connection is asked for from.
fn asked_for(entry: &Entry) -> Option<SocketAddr> {
    let process = entry.pid.to_string();
    let line = net_table::read(&process, &["tcp", "tcp6"]).find(|line| line.inode == entry.stat.st_ino)?;
    Some(line.remote)
}

/// Both ends of a socket as people write them.
pub(crate) fn ends(entry: &Entry) -> String {
    let fd = entry.file.as_raw_fd();
    let local = getsockname::<SockaddrStorage>(fd).ok().and_then(|address| socket_address(&address));
    let peer = getpeername::<SockaddrStorage>(fd).ok().and_then(|address| socket_address(&address));
    let local = local.map_or_else(|| "unbound".to_owned(), |address| address.to_string());
    peer.map_or_else(|| local.clone(), |peer| format!("{local} - {peer}"))
}

/// Whether a socket is one that [`examine`] knows.
pub(crate) fn is_one(family: i32, kind: i32, protocol: i32) -> bool {
    matches!(family, libc::AF_INET | libc::AF_INET6)
        && kind == libc::SOCK_STREAM
        && matches!(protocol, libc::IPPROTO_TCP | libc::IPPROTO_MPTCP)
}

/// Reads what there is to know of a TCP socket. Of a listening one, tcp(7)'s `TCP_INFO` tells the queue and the backlog in
/// fields that otherwise count segments.
pub(crate) fn examine(entry: &Entry, family: i32, protocol: i32) -> Result<Inet> {
    const UNACKED: usize = 24;
    const SACKED: usize = 28;
    /// `tcpi_rtt`, `tcpi_bytes_acked` and `tcpi_bytes_received` (the lower halves): all of them are 0 where a connection was asked for in vain,
    /// and where it was moved and has heard nothing since.
    const OF_A_CONNECTION: [usize; 3] = [68, 120, 128];
    /// `tcpi_options`, which both ends have agreed on.
    const AGREED: usize = 5;
    const SEGMENTS_OUT: usize = 136;
    const SEGMENTS_IN: usize = 140;
    const NEEDED: usize = SACKED + 4;
    let info = match socket_option(entry.file.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, 256) {
        // Of MPTCP the kernel tells about the first stream, which may be gone.
        Err(Errno::EINVAL) if protocol == libc::IPPROTO_MPTCP => [&[CLOSED][..], &[0; NEEDED]].concat(),
        // Before Linux 5.16 nothing is told.
        Err(Errno::EOPNOTSUPP | Errno::ENOPROTOOPT) if protocol == libc::IPPROTO_MPTCP => {
            return refuse(entry, &format!("MPTCP socket {}", ends(entry)), "this kernel tells nothing of it");
        }
        info => info.map_err(entry.error("TCP_INFO"))?,
    };
    let word = |at: usize| Some(u32::from_ne_bytes(info.get(at..at + 4)?.try_into().ok()?));
    let short = || Error::state(entry.name(), "TCP_INFO is too short");
    let state = *info.first().ok_or_else(short)?;
    let (waiting, backlog) = (word(UNACKED).ok_or_else(short)?, word(SACKED).ok_or_else(short)?);
    let storage: SockaddrStorage = getsockname(entry.file.as_raw_fd()).map_err(entry.error("getsockname"))?;
    let address = socket_address(&storage).ok_or_else(|| Error::state(entry.name(), "no address of its family"))?;
    let (state, peer) = match protocol {
        libc::IPPROTO_MPTCP if state != LISTEN => peer_of_all_streams(entry, state, address),
        _ if connection::is_connection(state) => (state, peer(entry)),
        _ => (state, None),
    };
    // A connection that has ended since is a socket without one.
    let state = if connection::is_connection(state) && peer.is_none() { CLOSED } else { state };
    let is_closed = state == CLOSED && protocol == libc::IPPROTO_TCP;
    let tells_of = |at: usize| word(at).is_some_and(|number| number > 0);
    let had_peer = is_closed && (tells_of(SEGMENTS_IN) || tells_of(SEGMENTS_OUT));
    let was_connected =
        OF_A_CONNECTION.into_iter().any(tells_of) || info.get(AGREED).is_some_and(|&agreed| agreed != 0);
    // N.B. the program has yet to hear of one that was asked for in vain, and can ask again.
    let was_in_vain = had_peer && !was_connected;
    let is_at_end =
        is_closed && !was_in_vain && is_shut_for_reading(entry.file.as_fd()).map_err(entry.error("poll"))?;
    let is_free = had_peer && address.port() != 0 && !held_port::is_held(entry, family)?;
    let address = if is_free { unspecified(address) } else { address };
    Ok(Inet { family, protocol, state, waiting, backlog, address, peer, had_peer, is_at_end })
}

/// How long an answer takes over a connection, with its usual variation (TCP_INFO of tcp(7), tcpi_rtt and tcpi_rttvar); nothing where there
/// was none yet, also since it was moved.
pub(crate) fn round_trip(entry: &Entry) -> Duration {
    const RTT: usize = 68;
    const VARIATION: usize = 72;
    let info = socket_option(entry.file.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, 256).unwrap_or_default();
    let word =
        |at: usize| info.get(at..at + 4).map_or(0, |word| u32::from_ne_bytes(word.try_into().unwrap_or_default()));
    match word(RTT) {
        0 => Duration::ZERO,
        measured => Duration::from_micros(u64::from(measured) + 4 * u64::from(word(VARIATION))),
    }
}

/// As [`examine`], of a connection over TCP alone that was looked at before. What is asked less is its state, which is read once more
/// where it counts: it may be the one of then.
pub(crate) fn examine_known(entry: &Entry, before: &Inet) -> Result<Inet> {
    let fd = entry.file.as_raw_fd();
    let named = getpeername::<SockaddrStorage>(fd).ok().as_ref().and_then(socket_address);
    let Some(peer) = named else { return examine(entry, before.family, before.protocol) };
    let storage: SockaddrStorage = getsockname(fd).map_err(entry.error("getsockname"))?;
    let address = socket_address(&storage).ok_or_else(|| Error::state(entry.name(), "no address of its family"))?;
    // N.B. one that was only asked for has a peer by now.
    let state = if connection::is_asked_for(before.state) { connection::ESTABLISHED } else { before.state };
    Ok(Inet { address, peer: Some(peer), state, ..before.clone() })
}

/// Whether an MPTCP socket whose first stream is in a state has a connection, and to whom, as far as that is told: it goes on
/// when that stream has ended, and of one that is only asked for nothing names the other end.
fn peer_of_all_streams(entry: &Entry, state: u8, own: SocketAddr) -> (u8, Option<SocketAddr>) {
    let named = getpeername::<SockaddrStorage>(entry.file.as_raw_fd()).ok().as_ref().and_then(socket_address);
    if named.is_none() && !connection::is_connection(state) {
        return (CLOSED, None);
    }
    (connection::ESTABLISHED, named.or(Some(unspecified(own))))
}

/// Any address of the same family.
fn unspecified(address: SocketAddr) -> SocketAddr {
    let any = if address.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(any, 0)
}

/// Refuses what cannot be moved.
pub(crate) fn verdict(entry: &Entry, inet: &Inet, may_have_waiting: bool) -> Result<()> {
    match inet.state {
        LISTEN if inet.waiting > 0 && !may_have_waiting => refuse_with(
            entry,
            &format!("{} listener {}", inet.name(), inet.address),
            &format!("{} connections wait to be accepted, and nothing puts them into a queue again", inet.waiting),
            "give --skip-in-flight to lose them".to_owned(),
        ),
        LISTEN | CLOSED => Ok(()),
        // That it can only be left behind is said by [`Inet::tie`].
        _ if inet.is_mptcp() => Ok(()),
        state if connection::is_connection(state) => connection::verdict(entry),
        state => refuse(entry, &format!("TCP connection {}", ends(entry)), &format!("its state {state} is unknown")),
    }
}

impl Inet {
    /// Its family.
    pub(crate) fn family(&self) -> i32 {
        self.family
    }

    /// How the destination is told which address must be free, or must be one of its own; `None` when none is needed. What
    /// shares its port (`SO_REUSEPORT`, socket(7)) gets it where others are only left of connections that have ended.
    pub(crate) fn needed_address(&self, entry: &Entry) -> Option<String> {
        let shares = integer_option(entry, libc::SOL_SOCKET, libc::SO_REUSEPORT).is_ok_and(|value| value != 0);
        let shared = if shares { "+shared" } else { "" };
        match self.peer {
            // What stays of a connection that is left behind; not every host has MPTCP.
            Some(_) if self.is_mptcp() => Some(format!("mptcp:{}", unspecified(self.address))),
            Some(_) => Some(format!("connection:{}", self.address)),
            None if self.is_mptcp() => Some(format!("mptcp{shared}:{}", self.address)),
            None if self.address.port() == 0 => None,
            None => Some(format!("tcp{shared}:{}", self.address)),
        }
    }

    /// What is lost of a connection that has ended: nothing puts bytes into a socket without one.
    pub(crate) fn loss(&self, entry: &Entry) -> Option<String> {
        let unread =
            self.had_peer.then(|| readable_bytes(entry.file.as_fd()).unwrap_or(0)).filter(|&bytes| bytes > 0)?;
        let text = "came over a connection that has ended, and nobody has read them yet: they are lost";
        Some(format!("fd {} (TCP socket): {unread} bytes {text}", entry.fd))
    }

    /// Whether it is one of MPTCP.
    pub(crate) fn is_mptcp(&self) -> bool {
        self.protocol == libc::IPPROTO_MPTCP
    }

    /// What messages call its protocol.
    pub(crate) fn name(&self) -> &'static str {
        if self.is_mptcp() { "MPTCP" } else { "TCP" }
    }

    /// What ties a connection to this host, so that it can only be left behind.
    pub(crate) fn tie(&self, entry: &Entry) -> Option<Obstacle> {
        let is_tied = self.is_mptcp() && self.peer.is_some();
        let text = "no kernel lets anybody set how far an MPTCP connection is";
        is_tied.then(|| self.obstacle(entry, text))
    }

    /// Names a connection that can only be left behind.
    pub(crate) fn obstacle(&self, entry: &Entry, text: &str) -> Obstacle {
        let what = format!("fd {} ({} connection {})", entry.fd, self.name(), ends(entry));
        Obstacle::new(what, text, LEAVE_BEHIND)
    }

    /// Which requests it takes, if it listens.
    pub(crate) fn listener(&self) -> Option<Listener> {
        let ip = self.address.ip().to_canonical();
        let address = (!ip.is_unspecified()).then_some(ip);
        (self.state == LISTEN).then_some(Listener { address, port: self.address.port() })
    }
}

/// Number of connections that wait to be accepted from a descriptor, and how many fit; one more than that is let in.
///
/// # Errors
/// When it is a TCP socket that cannot be looked at.
pub(crate) fn waiting(entry: &Entry) -> Result<(u32, u32)> {
    Ok(tcp(entry)?.filter(|inet| inet.state == LISTEN).map_or((0, 0), |inet| (inet.waiting, inet.backlog)))
}

/// What there is to know of a TCP socket; `None` for what is none.
///
/// # Errors
/// When it cannot be looked at.
pub(crate) fn tcp(entry: &Entry) -> Result<Option<Inet>> {
    if !entry.link.starts_with(b"socket:[") {
        return Ok(None);
    }
    let option = |name| integer_option(entry, libc::SOL_SOCKET, name);
    let family = entry.family.map_or_else(|| option(libc::SO_DOMAIN), Ok)?;
    let protocol = option(libc::SO_PROTOCOL)?;
    if !is_one(family, option(libc::SO_TYPE)?, protocol) {
        return Ok(None);
    }
    examine(entry, family, protocol).map(Some)
}

/// Collects what is left of a connection that stays behind: a socket without one.
pub(crate) fn collect_closed(entry: &Entry, inet: &Inet, id: u32) -> Result<FileEntry> {
    let address = unspecified(inet.address);
    // N.B. one that has yet to be made is asked for anew by whoever waits for it.
    let is_at_end = !connection::is_asked_for(inet.state);
    collect(entry, &Inet { state: CLOSED, address, peer: None, had_peer: true, is_at_end, ..inet.clone() }, id)
}

pub(crate) fn words(address: IpAddr) -> Vec<u32> {
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
    let (mut options, basic) = socket_options::collect(entry, socket_options::Sort::Tcp(inet.family))?;
    socket_options::collect_unconnected(entry, &mut options);
    let mut message = describe(entry, inet, id, basic)?;
    let mut options = options.unpack();
    if inet.is_at_end {
        message.set_shutdown(SkShutdown::Both);
    }
    if inet.had_peer {
        // What the connection has of this was agreed on with its peer, and may be more than a program may ask for.
        let agreed = |option: &SocketOption| (option.level, option.name) == (libc::IPPROTO_TCP, libc::TCP_MAXSEG);
        options.retain(|option| !agreed(option) && !socket_options::needs_connection(option));
    }
    Ok(file(InetSkEntry { options, ..message }))
}

/// The file of a socket.
pub(crate) fn file(message: InetSkEntry) -> FileEntry {
    FileEntry { r#type: FdTypes::Inetsk as i32, id: message.id, isk: Some(message.into()), ..FileEntry::default() }
}

/// Describes a TCP socket; its options apart.
pub(crate) fn describe(entry: &Entry, inet: &Inet, id: u32, opts: SkOptsEntry) -> Result<InetSkEntry> {
    let ifname = scope_name(entry, Some(inet.address))?;
    Ok(InetSkEntry {
        id,
        ino: entry.stat.st_ino as u32,
        family: inet.family as u32,
        r#type: libc::SOCK_STREAM as u32,
        proto: inet.protocol as u32,
        state: inet.state.into(),
        src_port: inet.address.port().into(),
        dst_port: inet.peer.map_or(0, |peer| peer.port().into()),
        dst_addr: inet.peer.map_or_else(Vec::new, |peer| words(peer.ip())),
        flags: entry.info.status_flags() as u32,
        backlog: inet.backlog,
        src_addr: words(inet.address.ip()),
        opts,
        ifname,
        ..InetSkEntry::default()
    })
}

/// The interface that a link-local address belongs to.
pub(crate) fn scope_name(entry: &Entry, address: Option<SocketAddr>) -> Result<Option<String>> {
    match address {
        Some(SocketAddr::V6(address)) if address.scope_id() != 0 => {
            let name = nix::net::if_::if_indextoname(address.scope_id()).map_err(entry.error("if_indextoname"))?;
            Ok(Some(name.to_string_lossy().into_owned()))
        }
        _ => Ok(None),
    }
}

/// The address that a socket is bound to.
pub(crate) fn source_of(message: &InetSkEntry) -> Option<SocketAddr> {
    address_of(message.family, &message.src_addr, message.src_port, message.ifname.as_deref())
}

/// The address that a socket is connected to.
pub(crate) fn peer_of(message: &InetSkEntry) -> Option<SocketAddr> {
    let scope = message.peer_ifname.as_deref().or(message.ifname.as_deref());
    address_of(message.family, &message.dst_addr, message.dst_port, scope)
}

/// Whether a message describes a TCP socket, with a connection or without.
pub(crate) fn is_described(message: &InetSkEntry) -> bool {
    is_one(message.family as i32, message.r#type as i32, message.proto as i32)
}

/// Whether a message describes a connection.
pub(crate) fn is_connection(message: &InetSkEntry) -> bool {
    u8::try_from(message.state).is_ok_and(connection::is_connection)
}

/// Which requests a socket in a message takes, if it listens.
pub(crate) fn listener_of(message: &InetSkEntry) -> Option<Listener> {
    let source = source_of(message).filter(|_| message.state == u32::from(LISTEN))?;
    let ip = source.ip().to_canonical();
    Some(Listener { address: (!ip.is_unspecified()).then_some(ip), port: source.port() })
}

/// The address in a message.
pub(crate) fn ip_of(family: u32, words: &[u32]) -> Option<IpAddr> {
    match (family as i32, words) {
        (libc::AF_INET, [word]) => Some(Ipv4Addr::from(word.to_ne_bytes()).into()),
        (libc::AF_INET6, words @ [_, _, _, _]) => {
            let mut octets = [0; 16];
            for (slot, word) in octets.chunks_exact_mut(4).zip(words) {
                slot.copy_from_slice(&word.to_ne_bytes());
            }
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

fn address_of(family: u32, words: &[u32], port: u32, scope: Option<&str>) -> Option<SocketAddr> {
    let port = u16::try_from(port).ok()?;
    match ip_of(family, words)? {
        IpAddr::V4(address) => Some(SocketAddr::new(address.into(), port)),
        IpAddr::V6(address) => {
            let scope = match scope {
                Some(name) => nix::net::if_::if_nametoindex(name).ok()?,
                None => 0,
            };
            Some(SocketAddr::V6(SocketAddrV6::new(address, port, 0, scope)))
        }
    }
}

/// Binds to an address, also if this host does not have it yet (`IP_FREEBIND`, ip(7)): it was looked for before, and if it is
/// not here now, it is on its way.
pub(crate) fn bind_ahead(socket: &OwnedFd, address: SocketAddr) -> Result<(), Errno> {
    let storage = SockaddrStorage::from(address);
    debug_assert!(storage.len() > 0);
    match bind(socket.as_raw_fd(), &storage) {
        Err(Errno::EADDRNOTAVAIL) => {}
        bound => return bound,
    }
    let (level, name) = match address {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_FREEBIND),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, socket_options::IPV6_FREEBIND),
    };
    let free = |value: &[u8]| set_socket_option(socket.as_fd(), level, name, value);
    let before = socket_option(socket.as_fd(), level, name, 4)?;
    free(&1i32.to_ne_bytes())?;
    bind(socket.as_raw_fd(), &storage)?;
    free(&before)
}

/// Makes a TCP socket without a connection again.
///
/// # Errors
/// `EADDRINUSE` naming the address when something else has it here.
pub(crate) fn rebuild(message: &InetSkEntry) -> Result<OwnedFd> {
    let address = source_of(message)
        .ok_or_else(|| Error::state("TCP socket", format!("no usable address in {:?}", message.src_addr)))?;
    let resource = format!("TCP socket {address}");
    let failed = |what| {
        let resource = resource.clone();
        move |source| Error::call(resource, what, source)
    };
    let (family, kind, protocol) = (message.family as i32, message.r#type as i32, message.proto as i32);
    if !is_one(family, kind, protocol) {
        return Err(Error::state(resource, format!("its protocol {protocol} is none of TCP")));
    }
    let made = socket(family, kind, protocol).map_err(failed("socket"))?;
    socket_options::apply(made.as_fd(), &message.options, &resource)?;
    if address.port() != 0 {
        bind_ahead(&made, address).map_err(failed("bind"))?;
    }
    filter::settle(made.as_fd(), &message.opts.so_filter, &message.options).map_err(failed("SO_ATTACH_FILTER"))?;
    if message.shutdown.is_some() {
        // What is left of a connection is at its end; one that never was would be ENOTCONN. That it is no connection the kernel says also here.
        match shutdown(made.as_raw_fd(), Shutdown::Both) {
            Ok(()) | Err(Errno::ENOTCONN) => {}
            Err(source) => return Err(failed("shutdown")(source)),
        }
    }
    if message.state == u32::from(LISTEN) {
        let backlog = i32::try_from(message.backlog).unwrap_or(i32::MAX).min(Backlog::MAXCONN.into());
        listen(&made, Backlog::new(backlog).map_err(failed("listen"))?).map_err(failed("listen"))?;
    }
    Ok(made)
}
