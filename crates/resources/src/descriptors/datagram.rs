//! Sockets of datagrams and packets over IP: UDP, UDP-Lite, ICMP (icmp(7)) and raw ones (raw(7)).
//!
//! What waits in a UDP socket travels along ([`super::datagram_queue`]). What waits in the others is lost, and is said to be:
//! packets of their kind are given to all sockets of the protocol, so that they cannot be given to one once more.
//!
//! Which errors wait in a socket (`SO_ERROR`, `MSG_ERRQUEUE`) cannot be read without taking them: they stay behind.

use super::filter::Gate;
use super::kind::{Context, integer_option, refuse};
use super::table::Entry;
use super::{datagram_queue, event, interface_options, listener, multicast, sock_diag, socket_options};
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{set_socket_option, socket_option};
use godwit_kernel::socket::{receive, socket, unsent_bytes};
use godwit_network::{Delivery, Flow, Listener};
use godwit_proto::image::{InetSkEntry, SkShutdown};
use godwit_proto::wire::SocketContent;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, SockaddrStorage, connect, getpeername, getsockname, shutdown};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Time that what was sent has to leave this host.
const TO_LEAVE: Duration = Duration::from_millis(20);
const UDP_ENCAP: i32 = 100;
/// States of `enum tcp_state` that these sockets have.
const ESTABLISHED: u32 = 1;
const CLOSED: u32 = 7;
const READING: u8 = 1;
const WRITING: u8 = 2;

/// What there is to know of such a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Datagram {
    family: i32,
    kind: i32,
    protocol: i32,
    /// Its own address; of a raw socket the port is the protocol, of an ICMP one the identifier.
    address: SocketAddr,
    /// Who it is connected to.
    peer: Option<SocketAddr>,
    /// Whether others may have its port, too.
    shares: bool,
    /// The interface that it is bound to, if any.
    device: Option<String>,
}

/// Whether a socket is of this kind.
pub(crate) fn is_one(family: i32, kind: i32, protocol: i32) -> bool {
    let with_ports =
        matches!(protocol, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE | libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6);
    matches!(family, libc::AF_INET | libc::AF_INET6)
        && (kind == libc::SOCK_RAW || kind == libc::SOCK_DGRAM && with_ports)
}

/// The name of an interface out of `SO_BINDTODEVICE`.
pub(crate) fn device_of(entry: &Entry) -> Option<String> {
    let name = socket_option(entry.file.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, 16).ok()?;
    let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned();
    (!name.is_empty()).then_some(name)
}

/// Reads what there is to know.
pub(crate) fn examine(entry: &Entry, family: i32, kind: i32, protocol: i32) -> Result<Datagram> {
    let fd = entry.file.as_raw_fd();
    let storage: SockaddrStorage = getsockname(fd).map_err(entry.error("getsockname"))?;
    let address =
        listener::socket_address(&storage).ok_or_else(|| Error::state(entry.name(), "no address of its family"))?;
    let peer = getpeername::<SockaddrStorage>(fd).ok().and_then(|address| listener::socket_address(&address));
    let option = |name| integer_option(entry, libc::SOL_SOCKET, name);
    let shares = option(libc::SO_REUSEADDR)? != 0 || option(libc::SO_REUSEPORT)? != 0;
    Ok(Datagram { family, kind, protocol, address, peer, shares, device: device_of(entry) })
}

/// Refuses what cannot be moved.
pub(crate) fn verdict(entry: &Entry, datagram: &Datagram, context: &Context) -> Result<()> {
    if !datagram.is_udp() {
        return Ok(());
    }
    let what = datagram.name();
    if integer_option(entry, libc::IPPROTO_UDP, UDP_ENCAP).is_ok_and(|kind| kind != 0) {
        return refuse(entry, &what, "the kernel takes packets out of its datagrams (UDP_ENCAP)");
    }
    if is_half_made(entry, context)? {
        return refuse(entry, &what, "a datagram is half made in it (UDP_CORK, MSG_MORE)");
    }
    Ok(())
}

/// Whether a datagram is half made: what was sent leaves this host at once, but for that. A running program may also send without
/// pause; then it is not always the same amount that has not left yet.
fn is_half_made(entry: &Entry, context: &Context) -> Result<bool> {
    let unsent = || unsent_bytes(entry.file.as_fd()).map_err(entry.error("SIOCOUTQ"));
    let at_first = unsent()?;
    let deadline = Instant::now() + TO_LEAVE;
    loop {
        match unsent()? {
            0 => return Ok(false),
            now if now != at_first && !context.is_stopped => return Ok(false),
            _ if Instant::now() > deadline => return Ok(true),
            _ => std::thread::sleep(Duration::from_micros(100)),
        }
    }
}

impl Datagram {
    /// How messages call it.
    pub(crate) fn name(&self) -> String {
        let ends = match self.peer {
            Some(peer) => format!("{} - {peer}", self.address),
            None => self.address.to_string(),
        };
        match (self.kind, self.protocol) {
            (libc::SOCK_RAW, protocol) => format!("raw socket, protocol {protocol}, {}", self.address.ip()),
            (_, libc::IPPROTO_UDP) => format!("UDP socket {ends}"),
            (_, libc::IPPROTO_UDPLITE) => format!("UDP-Lite socket {ends}"),
            _ => format!("ICMP socket {ends}"),
        }
    }

    /// Whether it has datagrams that can be put back.
    fn is_udp(&self) -> bool {
        self.kind == libc::SOCK_DGRAM && matches!(self.protocol, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE)
    }

    /// The address where it shares what comes with others of its kind, by who sent it (`SO_REUSEPORT`, socket(7)).
    pub(crate) fn group(&self, entry: &Entry) -> Option<SocketAddr> {
        let shares = integer_option(entry, libc::SOL_SOCKET, libc::SO_REUSEPORT).is_ok_and(|value| value != 0);
        (self.is_udp() && self.peer.is_none() && shares && self.address.port() != 0).then_some(self.address)
    }

    /// What the destination must have: a free address, interfaces.
    pub(crate) fn needs(&self, entry: &Entry) -> Result<Vec<String>> {
        let mut needs = Vec::new();
        let word = match self.protocol {
            libc::IPPROTO_UDP => "udp",
            libc::IPPROTO_UDPLITE => "udplite",
            _ => "address",
        };
        let mut bare = self.address;
        if self.kind == libc::SOCK_RAW || word == "address" {
            bare.set_port(0);
        }
        // The number of an interface means another one there.
        let scope = listener::scope_name(entry, Some(self.address))?;
        if scope.is_none() && (bare.port() != 0 || !bare.ip().is_unspecified()) {
            let word = if self.kind == libc::SOCK_RAW { "address" } else { word };
            needs.push(format!("{word}{}:{bare}", if self.shares { "+shared" } else { "" }));
        }
        let memberships = multicast::collect(entry, self.family)?;
        let options = interface_options::collect(entry)?;
        let interfaces = (scope.into_iter())
            .chain(listener::scope_name(entry, self.peer)?)
            .chain(self.device.clone())
            .chain(memberships.into_iter().map(|membership| membership.interface))
            .chain(options.into_iter().map(|option| option.interface));
        needs.extend(interfaces.map(|name| format!("interface:{name}")));
        Ok(needs)
    }

    /// Which datagrams it takes that can be held back: those of a connected socket, and those of one that has a port.
    pub(crate) fn takes(&self) -> Option<Takes> {
        if self.protocol != libc::IPPROTO_UDP || self.kind != libc::SOCK_DGRAM || self.address.port() == 0 {
            return None;
        }
        Some(match self.peer {
            Some(peer) => Takes::Flow(Flow::new(self.address, peer)),
            None => {
                let ip = self.address.ip().to_canonical();
                let address = (!ip.is_unspecified()).then_some(ip);
                Takes::Port(Listener { address, port: self.address.port() })
            }
        })
    }
}

/// Datagrams that a socket takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Takes {
    Flow(Flow),
    Port(Listener),
}

/// Whether segments of a datagram may be joined for this socket before it takes them, which nobody else can tell apart.
pub(crate) fn joins_segments(entry: &Entry) -> bool {
    integer_option(entry, libc::IPPROTO_UDP, libc::UDP_GRO).is_ok_and(|joins| joins != 0)
}

/// Which halves are shut down: a bit for each.
fn shut_halves(entry: &Entry, datagram: &Datagram) -> u8 {
    let mut poller =
        [PollFd::new(entry.file.as_fd(), PollFlags::POLLIN | PollFlags::from_bits_retain(libc::POLLRDHUP))];
    let _ = poll(&mut poller, PollTimeout::ZERO);
    let events = poller[0].revents().unwrap_or(PollFlags::empty());
    if events.contains(PollFlags::POLLHUP) {
        return READING | WRITING;
    }
    if events.bits() & libc::POLLRDHUP != 0 {
        return READING;
    }
    // That it is shut for writing alone only a list of sockets tells, which not every kernel has of every protocol.
    const MESSAGE: usize = 72;
    const INODE: usize = 68;
    const SHUTDOWN: u16 = 8;
    let mut question = vec![datagram.family as u8, datagram.protocol as u8, 0, 0];
    question.extend(u32::MAX.to_ne_bytes());
    question.extend([0; 48]);
    let Ok(listed) = sock_diag::list("IP sockets", &question, MESSAGE) else { return 0 };
    let this = listed.iter().find(|socket| socket.word(INODE) == Some(entry.stat.st_ino as u32));
    this.and_then(|socket| socket.attribute(SHUTDOWN)).and_then(|value| value.first().copied()).unwrap_or(0)
}

fn is_connected(datagram: &Datagram) -> bool {
    datagram.peer.is_some()
}

/// What became of a socket that was collected.
#[derive(Debug)]
pub(crate) struct Collected {
    pub(crate) message: InetSkEntry,
    pub(crate) content: Vec<SocketContent>,
    /// What is lost, in words.
    pub(crate) loss: Option<String>,
}

/// Collects a socket and what waits in it.
pub(crate) fn collect(entry: &Entry, datagram: &Datagram, id: u32) -> Result<Collected> {
    let name = datagram.name();
    let (options, opts) = socket_options::collect(entry, socket_options::Sort::Datagram(datagram.family))?;
    let waits = datagram_queue::is_readable(entry);
    let (content, loss) = if datagram.is_udp() {
        (if waits { datagram_queue::collect(entry, datagram.family, id)? } else { Vec::new() }, None)
    } else {
        let loss = waits.then(|| format!("fd {} ({name}): packets that waited in it are lost", entry.fd));
        (Vec::new(), loss)
    };
    let mut message = InetSkEntry {
        id,
        ino: entry.stat.st_ino as u32,
        family: datagram.family as u32,
        r#type: datagram.kind as u32,
        proto: datagram.protocol as u32,
        state: if is_connected(datagram) { ESTABLISHED } else { CLOSED },
        src_port: datagram.address.port().into(),
        dst_port: datagram.peer.map_or(0, |peer| peer.port().into()),
        src_addr: listener::words(datagram.address.ip()),
        dst_addr: datagram.peer.map_or_else(Vec::new, |peer| listener::words(peer.ip())),
        flags: entry.info.status_flags() as u32,
        opts,
        ifname: listener::scope_name(entry, Some(datagram.address))?,
        peer_ifname: listener::scope_name(entry, datagram.peer)?,
        options: options.unpack(),
        interface_options: interface_options::collect(entry)?,
        memberships: multicast::collect(entry, datagram.family)?,
        uid: Some(entry.stat.st_uid),
        ..InetSkEntry::default()
    };
    let halves = shut_halves(entry, datagram);
    if halves != 0 {
        message.set_shutdown(match halves {
            READING => SkShutdown::Read,
            WRITING => SkShutdown::Write,
            _ => SkShutdown::Both,
        });
    }
    Ok(Collected { message, content, loss })
}

/// Whether a message describes such a socket.
pub(crate) fn is_described(message: &InetSkEntry) -> bool {
    is_one(message.family as i32, message.r#type as i32, message.proto as i32)
}

/// Makes a socket again, with what waited in it. It takes nothing else before its gate is opened.
///
/// # Errors
/// `EADDRINUSE` naming the address when something else has it here.
pub(crate) fn rebuild(
    message: &InetSkEntry,
    content: &[&SocketContent],
    delivery: Option<&Delivery>,
) -> Result<(OwnedFd, Gate)> {
    let (family, kind, protocol) = (message.family as i32, message.r#type as i32, message.proto as i32);
    let address = listener::source_of(message)
        .ok_or_else(|| Error::state("datagram socket", format!("no usable address in {:?}", message.src_addr)))?;
    let peer = match message.state {
        ESTABLISHED => Some(listener::peer_of(message))
            .map(|peer| peer.ok_or_else(|| Error::state("datagram socket", "no usable address of its peer")))
            .transpose()?,
        _ => None,
    };
    let name = Datagram { family, kind, protocol, address, peer, shares: false, device: None }.name();
    let failed = |what| {
        let name = name.clone();
        move |source| Error::call(name, what, source)
    };
    let made = socket(family, kind, protocol).map_err(failed("socket"))?;
    let gate = Gate::close(&made, &name, &message.opts.so_filter, &message.options)?;
    if !content.is_empty() {
        let delivery = delivery.ok_or_else(|| Error::state(&name, "nothing to deliver its datagrams by"))?;
        datagram_queue::rebuild(&made, (family, protocol), content, delivery, &name)?;
    }
    if kind == libc::SOCK_RAW {
        // It takes packets from its first moment on.
        while receive(made.as_fd(), &mut [0], libc::MSG_DONTWAIT).is_ok() {}
    }
    if let Some(uid) = message.uid {
        nix::unistd::fchown(&made, Some(uid.into()), None).map_err(failed("fchown"))?;
    }
    socket_options::apply(made.as_fd(), &message.options, &name)?;
    interface_options::rebuild(made.as_fd(), &message.interface_options, &name)?;
    let has_port = kind == libc::SOCK_DGRAM && address.port() != 0;
    if has_port || !address.ip().is_unspecified() {
        listener::bind_ahead(&made, address).map_err(failed("bind"))?;
    }
    multicast::rebuild(made.as_fd(), &message.memberships, &name)?;
    if let Some(peer) = peer {
        connect_ahead(&made, peer).map_err(failed("connect"))?;
    }
    if let Some(how) = message.shutdown.map(|_| message.shutdown()) {
        let how = match how {
            SkShutdown::None => None,
            SkShutdown::Read => Some(Shutdown::Read),
            SkShutdown::Write => Some(Shutdown::Write),
            SkShutdown::Both => Some(Shutdown::Both),
        };
        // One without a peer is shut down all the same, and the call says that it has none.
        match how.map(|how| shutdown(made.as_raw_fd(), how)) {
            None | Some(Ok(()) | Err(Errno::ENOTCONN)) => {}
            Some(Err(source)) => return Err(failed("shutdown")(source)),
        }
    }
    event::set_status(&made, message.flags).map_err(failed("F_SETFL"))?;
    Ok((made, gate))
}

/// Connects, also from an address that this host does not have yet (`IP_TRANSPARENT`).
fn connect_ahead(socket: &OwnedFd, peer: SocketAddr) -> Result<(), Errno> {
    let storage = SockaddrStorage::from(peer);
    let first = match connect(socket.as_raw_fd(), &storage) {
        Ok(()) => return Ok(()),
        Err(errno) => errno,
    };
    let (level, name) = match peer {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
    };
    let transparent = |value: &[u8]| set_socket_option(socket.as_fd(), level, name, value);
    let before = socket_option(socket.as_fd(), level, name, 4).map_err(|_| first)?;
    transparent(&1i32.to_ne_bytes())?;
    connect(socket.as_raw_fd(), &storage)?;
    transparent(&before)
}
