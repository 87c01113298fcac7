//! Packet sockets (packet(7)). Interfaces travel by name. Packets that wait in one are lost, and are said to be: they are copies
//! of what passed the source's interfaces.

use super::filter::Gate;
use super::kind::refuse;
use super::sock_diag::{self, Listed, word};
use super::table::Entry;
use super::{datagram_queue, event, socket_options};
use crate::{Error, Result};
use godwit_kernel::descriptors::set_socket_option;
use godwit_kernel::socket::{bind, bound_address, socket};
use godwit_proto::image::{FdTypes, FileEntry, PacketMclist, PacketSockEntry};
use nix::net::if_::{if_indextoname, if_nametoindex};
use std::os::fd::{AsFd, OwnedFd};

const PACKET_ADD_MEMBERSHIP: i32 = 1;
/// Bytes of `struct sockaddr_ll`.
const LINK_ADDRESS: usize = 20;
/// Memberships that are taken from a peer.
const MAX_MEMBERSHIPS: usize = 4096;

/// `PACKET_DIAG_*` attributes, and bytes of `struct packet_diag_msg` and `struct packet_diag_mclist`.
const INFO: u16 = 0;
const MEMBERSHIPS: u16 = 1;
const RECEIVE_RING: u16 = 2;
const SEND_RING: u16 = 3;
const FANOUT: u16 = 4;
const MESSAGE: usize = 16;
const INODE: usize = 4;
const MEMBERSHIP: usize = 44;

/// What there is to know of a packet socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    kind: i32,
    /// EtherType in network order.
    protocol: u16,
    /// The interface that it is bound to; 0 for all.
    index: u32,
    listed: Listed,
}

/// Reads what there is to know.
pub(crate) fn examine(entry: &Entry, kind: i32) -> Result<Link> {
    let address = bound_address(entry.file.as_fd()).map_err(entry.error("getsockname"))?;
    let short = || Error::state(entry.name(), "no address of its family");
    let protocol =
        address.get(2..4).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(short)?;
    let index = word(&address, 4).ok_or_else(short)?;
    // Show all there is: PACKET_SHOW_INFO, _MCLIST, _RING_CFG, _FANOUT.
    let mut question = vec![libc::AF_PACKET as u8, 0, 0, 0];
    for number in [0u32, 1 | 2 | 4 | 8, 0, 0] {
        question.extend(number.to_ne_bytes());
    }
    let listed = sock_diag::list("packet sockets", &question, MESSAGE)?;
    let this = listed.into_iter().find(|socket| socket.word(INODE) == Some(entry.stat.st_ino as u32));
    let listed = this.ok_or_else(|| Error::state(entry.name(), "the kernel does not list it"))?;
    Ok(Link { kind, protocol, index, listed })
}

/// Refuses what cannot be moved.
pub(crate) fn verdict(entry: &Entry, link: &Link) -> Result<()> {
    if link.listed.attribute(RECEIVE_RING).is_some() || link.listed.attribute(SEND_RING).is_some() {
        return refuse(
            entry,
            "packet socket",
            "it has a ring of packets that is mapped (PACKET_RX_RING, PACKET_TX_RING)",
        );
    }
    if link.listed.attribute(FANOUT).is_some() {
        return refuse(entry, "packet socket", "it shares its packets with others (PACKET_FANOUT)");
    }
    Ok(())
}

fn name_of(entry: &Entry, index: u32) -> Result<String> {
    let name = if_indextoname(index).map_err(entry.error("if_indextoname"))?;
    Ok(name.to_string_lossy().into_owned())
}

fn memberships(entry: &Entry, link: &Link) -> Result<Vec<PacketMclist>> {
    const COUNT: usize = 4;
    const TYPE: usize = 8;
    const LENGTH: usize = 10;
    const ADDRESS: usize = 12;
    let list = link.listed.attribute(MEMBERSHIPS).unwrap_or_default();
    let mut found = Vec::new();
    for one in list.chunks_exact(MEMBERSHIP) {
        let half = |at: usize| u16::from_ne_bytes([one[at], one[at + 1]]);
        let index = word(one, 0).unwrap_or_default();
        let length = usize::from(half(LENGTH)).min(MEMBERSHIP - ADDRESS);
        let membership = PacketMclist {
            index,
            r#type: half(TYPE).into(),
            addr: one[ADDRESS..ADDRESS + length].to_vec(),
            interface: name_of(entry, index)?,
        };
        let times = word(one, COUNT).unwrap_or(1).clamp(1, MAX_MEMBERSHIPS as u32) as usize;
        found.extend(std::iter::repeat_n(membership, times));
    }
    Ok(found)
}

/// What the destination must have: interfaces.
pub(crate) fn needs(entry: &Entry, link: &Link) -> Result<Vec<String>> {
    let mut names: Vec<String> = memberships(entry, link)?.into_iter().map(|one| one.interface).collect();
    if link.index != 0 {
        names.push(name_of(entry, link.index)?);
    }
    Ok(names.into_iter().map(|name| format!("interface:{name}")).collect())
}

/// Collects a socket; also says what is lost.
pub(crate) fn collect(entry: &Entry, link: &Link, id: u32) -> Result<(FileEntry, Option<String>)> {
    let (options, opts) = socket_options::collect(entry, socket_options::Sort::Packet)?;
    let info = link.listed.attribute(INFO).unwrap_or_default();
    let number = |at: usize| word(info, at * 4).unwrap_or_default();
    let message = PacketSockEntry {
        id,
        r#type: link.kind as u32,
        protocol: link.protocol.into(),
        flags: entry.info.status_flags() as u32,
        ifindex: link.index,
        opts,
        version: number(1),
        reserve: number(2),
        copy_thresh: number(3),
        timestamp: number(4),
        mclist: memberships(entry, link)?,
        options: options.unpack(),
        interface: if link.index == 0 { None } else { Some(name_of(entry, link.index)?) },
        uid: Some(entry.stat.st_uid),
        ..PacketSockEntry::default()
    };
    let loss = datagram_queue::is_readable(entry)
        .then(|| format!("fd {} (packet socket): packets that waited in it are lost", entry.fd));
    Ok((FileEntry { r#type: FdTypes::Packetsk as i32, id, psk: Some(message.into()), ..FileEntry::default() }, loss))
}

/// Makes a socket again; it takes no packet before its gate is opened.
pub(crate) fn rebuild(message: &PacketSockEntry) -> Result<(OwnedFd, Gate)> {
    const NAME: &str = "packet socket";
    let failed = |what| move |source| Error::call(NAME, what, source);
    // N.B. without a protocol until the gate is closed.
    let made = socket(libc::AF_PACKET, message.r#type as i32, 0).map_err(failed("socket"))?;
    let gate = Gate::close(&made, NAME, &message.opts.so_filter, &message.options)?;
    if let Some(uid) = message.uid {
        nix::unistd::fchown(&made, Some(uid.into()), None).map_err(failed("fchown"))?;
    }
    socket_options::apply(made.as_fd(), &message.options, NAME)?;
    for membership in message.mclist.iter().take(MAX_MEMBERSHIPS) {
        let index = if_nametoindex(membership.interface.as_str()).map_err(|source| {
            Error::call(format!("{NAME}, interface {}", membership.interface), "looking it up", source)
        })?;
        // struct packet_mreq, or the longer one for long addresses.
        let mut request = index.to_ne_bytes().to_vec();
        request.extend((membership.r#type as u16).to_ne_bytes());
        request.extend((membership.addr.len() as u16).to_ne_bytes());
        request.extend(&membership.addr);
        request.resize(request.len().max(16), 0);
        set_socket_option(made.as_fd(), libc::SOL_PACKET, PACKET_ADD_MEMBERSHIP, &request)
            .map_err(failed("PACKET_ADD_MEMBERSHIP"))?;
    }
    let index = match &message.interface {
        Some(name) => if_nametoindex(name.as_str())
            .map_err(|source| Error::call(format!("{NAME}, interface {name}"), "looking it up", source))?,
        None => 0,
    };
    let mut address = vec![0; LINK_ADDRESS];
    address[..2].copy_from_slice(&(libc::AF_PACKET as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&(message.protocol as u16).to_ne_bytes());
    address[4..8].copy_from_slice(&index.to_ne_bytes());
    bind(made.as_fd(), &address).map_err(failed("bind"))?;
    event::set_status(&made, message.flags).map_err(failed("F_SETFL"))?;
    Ok((made, gate))
}
