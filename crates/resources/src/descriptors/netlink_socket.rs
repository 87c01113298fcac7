//! Netlink sockets (netlink(7)) that talk to a part of the kernel which has nothing of the host's own behind them.
//!
//! What waits in one is an answer that cannot be given again: such a socket is not moved at that moment. What its groups are
//! told from the freeze on it does not hear; from then on it hears of the destination.

use super::kind::{Context, refuse, refuse_with};
use super::table::Entry;
use super::{datagram_queue, event, socket_options};
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{set_socket_option, socket_option};
use godwit_kernel::socket::socket;
use godwit_proto::image::{FdTypes, FileEntry, NetlinkSkEntry};
use nix::sys::socket::{NetlinkAddr, bind, connect, getpeername, getsockname};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

const ESTABLISHED: u32 = 1;
const CLOSED: u32 = 7;
/// Time that a program has to read its answers.
const TO_READ: Duration = Duration::from_millis(100);
/// Words of groups that are taken from a peer.
const MAX_WORDS: usize = 2048;

/// What there is to know of a netlink socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Netlink {
    kind: i32,
    protocol: i32,
    port: u32,
    groups: Vec<u32>,
    /// Port and groups of who it is connected to.
    peer: (u32, u32),
}

/// Reads what there is to know.
pub(crate) fn examine(entry: &Entry, kind: i32, protocol: i32) -> Result<Netlink> {
    let fd = entry.file.as_raw_fd();
    let own: NetlinkAddr = getsockname(fd).map_err(entry.error("getsockname"))?;
    let peer: NetlinkAddr = getpeername(fd).map_err(entry.error("getpeername"))?;
    let name = libc::NETLINK_LIST_MEMBERSHIPS;
    let groups = socket_option(entry.file.as_fd(), libc::SOL_NETLINK, name, 256).map_err(entry.error("its groups"))?;
    let words = groups.chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    Ok(Netlink { kind, protocol, port: own.pid(), groups: words.collect(), peer: (peer.pid(), peer.groups()) })
}

/// Refuses what cannot be moved.
pub(crate) fn verdict(entry: &Entry, netlink: &Netlink, context: &Context) -> Result<()> {
    let what = format!("netlink socket, protocol {}", netlink.protocol);
    let has_groups = netlink.groups.iter().any(|&word| word != 0);
    match netlink.protocol {
        libc::NETLINK_ROUTE
        | libc::NETLINK_USERSOCK
        | libc::NETLINK_SOCK_DIAG
        | libc::NETLINK_XFRM
        | libc::NETLINK_KOBJECT_UEVENT
        | libc::NETLINK_CRYPTO => {}
        libc::NETLINK_GENERIC if has_groups => {
            return refuse(entry, &what, "it listens to groups whose numbers are the host's own (generic netlink)");
        }
        libc::NETLINK_GENERIC => {}
        libc::NETLINK_NETFILTER => {
            return refuse(entry, &what, "what the packet filter has for it (tables, queues, logs) stays behind");
        }
        _ => return refuse(entry, &what, "netlink sockets of this protocol cannot be moved"),
    }
    if netlink.peer.0 != 0 {
        return refuse(entry, &what, "it is connected to another process");
    }
    if datagram_queue::is_readable(entry) && (context.is_stopped || is_left_unread(entry)) {
        let remedy = "try again when the program has read it".to_owned();
        let text = "a message waits in it that the program has not read, and cannot be given again";
        return refuse_with(entry, &what, text, remedy);
    }
    Ok(())
}

/// Whether a running program does not read what waits in it.
fn is_left_unread(entry: &Entry) -> bool {
    let deadline = Instant::now() + TO_READ;
    while datagram_queue::is_readable(entry) {
        if Instant::now() > deadline {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

impl Netlink {
    /// What the destination must have: a free port.
    pub(crate) fn needs(&self) -> Option<String> {
        (self.port != 0).then(|| format!("netlink:{}:{}", self.protocol, self.port))
    }
}

/// Collects a socket.
pub(crate) fn collect(entry: &Entry, netlink: &Netlink, id: u32) -> Result<FileEntry> {
    let (options, opts) = socket_options::collect(entry, socket_options::Sort::Netlink)?;
    let message = NetlinkSkEntry {
        id,
        ino: entry.stat.st_ino as u32,
        protocol: netlink.protocol as u32,
        state: if netlink.peer == (0, 0) { CLOSED } else { ESTABLISHED },
        flags: entry.info.status_flags() as u32,
        portid: netlink.port,
        groups: netlink.groups.clone(),
        dst_portid: netlink.peer.0,
        dst_group: netlink.peer.1,
        opts,
        options: options.unpack(),
        r#type: Some(netlink.kind as u32),
        uid: Some(entry.stat.st_uid),
        ..NetlinkSkEntry::default()
    };
    Ok(FileEntry { r#type: FdTypes::Netlinksk as i32, id, nlsk: Some(message.into()), ..FileEntry::default() })
}

/// Makes a socket again.
///
/// # Errors
/// `EADDRINUSE` when its port is taken here.
pub(crate) fn rebuild(message: &NetlinkSkEntry) -> Result<OwnedFd> {
    let name = format!("netlink socket, protocol {}, port {}", message.protocol, message.portid);
    let failed = |what| {
        let name = name.clone();
        move |source| Error::call(name, what, source)
    };
    let kind = message.r#type.map_or(libc::SOCK_RAW, |kind| kind as i32);
    let made = socket(libc::AF_NETLINK, kind, message.protocol as i32).map_err(failed("socket"))?;
    if let Some(uid) = message.uid {
        nix::unistd::fchown(&made, Some(uid.into()), None).map_err(failed("fchown"))?;
    }
    socket_options::apply(made.as_fd(), &message.options, &name)?;
    super::filter::settle(made.as_fd(), &message.opts.so_filter, &message.options)
        .map_err(failed("SO_ATTACH_FILTER"))?;
    if message.portid != 0 {
        bind(made.as_raw_fd(), &NetlinkAddr::new(message.portid, 0)).map_err(failed("bind"))?;
    }
    for (at, word) in message.groups.iter().take(MAX_WORDS).enumerate() {
        for bit in (0..32).filter(|bit| word >> bit & 1 != 0) {
            let group = at as u32 * 32 + bit + 1;
            let join = libc::NETLINK_ADD_MEMBERSHIP;
            set_socket_option(made.as_fd(), libc::SOL_NETLINK, join, &group.to_ne_bytes())
                .map_err(failed("NETLINK_ADD_MEMBERSHIP"))?;
        }
    }
    if message.state == ESTABLISHED {
        let peer = NetlinkAddr::new(message.dst_portid, message.dst_group);
        connect(made.as_raw_fd(), &peer).map_err(failed("connect"))?;
    }
    event::set_status(&made, message.flags).map_err(failed("F_SETFL"))?;
    Ok(made)
}

/// Whether a port is free here, for the probe; the errno says why not.
pub(crate) fn try_port(protocol: i32, port: u32) -> Result<(), Errno> {
    let probe = socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol)?;
    bind(probe.as_raw_fd(), &NetlinkAddr::new(port, 0))
}
