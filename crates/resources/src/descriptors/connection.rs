//! TCP connections, taken apart and put together again by repair mode (tcp(7), `TCP_REPAIR`).
//!
//! In repair mode a socket tells its sequence numbers and queues, sends nothing, and when it is closed nobody hears of it. A new
//! one in repair mode takes all of that and is connected without a packet. What the kernel lets nobody set comes about by
//! itself once it runs: congestion window, round-trip times, segments beyond a gap.
//!
//! A socket is put into repair mode when nothing of it can change any more: the process is stopped and its packets are held back
//! (`godwit_network`). [`Connections`] takes all of them out of it again unless the move is done.
//!
//! The end of a stream has a sequence number, too, but is in no queue. What this end has sent is shut down once more, and the
//! peer is used to hearing of it twice; what the peer has sent is delivered as the packet it was.

use super::kind::refuse;
use super::listener::{self, Inet};
use super::socket_options::{self, Packed};
use super::{event, filter, table};
use crate::{Error, Result, parallel};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{
    disconnect, is_shut_for_reading, readable_bytes, set_socket_option, socket_option, unacknowledged_bytes,
};
use godwit_kernel::rescuer::{Endangered, Rescuer};
use godwit_network::{Delivery, Flow, end_of_stream};
use godwit_proto::image::{InetSkEntry, SocketOption, TcpStreamEntry};
use godwit_proto::wire::{OptionSet, StreamContent};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, recv, send,
    shutdown, socket,
};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
const TCP_ULP: i32 = 31;

const REPAIR_ON: i32 = 1;
/// Out of repair mode, with a packet that has the peer say how it stands.
const REPAIR_OFF: i32 = 0;
/// Out of repair mode without a packet.
const REPAIR_OFF_SILENT: i32 = -1;
const RECEIVE_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;

const OPTION_TIMESTAMPS: u8 = 1;
const OPTION_SACK: u8 = 2;
const OPTION_WINDOW_SCALE: u8 = 4;

/// Bytes of `struct tcp_repair_window`.
const WINDOW_SIZE: usize = 20;
/// Bytes of `struct tcp_info` up to the time of a round trip, which are the last of them.
const INFO_SIZE: usize = 72;
/// Bytes queued at a time.
const PIECE: usize = 64 << 10;
/// What the kernel takes of a buffer for a byte of payload, at most, in the sizes that are queued here.
const OVERHEAD: i32 = 4;

/// States of `enum tcp_state` in which there is a peer.
mod state {
    pub(super) const ESTABLISHED: u8 = 1;
    pub(super) const SYN_SENT: u8 = 2;
    pub(super) const FIN_WAIT1: u8 = 4;
    pub(super) const FIN_WAIT2: u8 = 5;
    pub(super) const CLOSE_WAIT: u8 = 8;
    pub(super) const LAST_ACK: u8 = 9;
    pub(super) const CLOSING: u8 = 11;
}
use state::{CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK, SYN_SENT};

/// Whether a socket in this state has a peer.
pub(crate) fn is_connection(state: u8) -> bool {
    matches!(state, ESTABLISHED | SYN_SENT | FIN_WAIT1 | FIN_WAIT2 | CLOSE_WAIT | LAST_ACK | CLOSING)
}

/// Whether the peer has said that it will send no more.
fn end_was_received(state: u8) -> bool {
    matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING)
}

/// Whether this end has been shut down for sending.
fn end_was_sent(state: u8) -> bool {
    matches!(state, FIN_WAIT1 | FIN_WAIT2 | CLOSING | LAST_ACK)
}

/// Refuses connections that cannot be taken apart.
pub(crate) fn verdict(entry: &table::Entry) -> Result<()> {
    let what = || format!("TCP connection {}", listener::ends(entry));
    let protocol = socket_option(entry.file.as_fd(), libc::IPPROTO_TCP, TCP_ULP, 16).unwrap_or_default();
    if protocol.iter().any(|&byte| byte != 0) {
        let name = String::from_utf8_lossy(&protocol);
        return refuse(entry, &what(), &format!("the kernel speaks {} on it", name.trim_end_matches('\0')));
    }
    let mut byte = [0];
    let urgent =
        recv(entry.file.as_raw_fd(), &mut byte, MsgFlags::MSG_OOB | MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
    if urgent == Ok(1) {
        return refuse(entry, &what(), "urgent data waits in it");
    }
    Ok(())
}

/// Sockets of the source in repair mode. Dropped, they leave it; they also do when this program is killed.
#[derive(Debug, Default)]
pub struct Connections {
    sockets: Vec<OwnedFd>,
    /// For each of them, under which number it is here and whether its port may be shared.
    endangered: Vec<Endangered>,
    rescuer: Option<Rescuer>,
    round_trip: Duration,
}

impl Connections {
    /// Takes note of a socket that is about to enter repair mode.
    fn note(&mut self, entry: &table::Entry) -> Result<()> {
        // Leaving repair mode takes this option away.
        let reuse = socket_option(entry.file.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 4)
            .map_err(entry.error("SO_REUSEADDR"))?;
        let socket = entry.file.try_clone().map_err(|error| {
            entry.error("duplicating it")(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE)))
        })?;
        let reuse = reuse.try_into().map(i32::from_ne_bytes).unwrap_or_default();
        self.endangered.push(Endangered { socket: socket.as_raw_fd(), reuse });
        self.sockets.push(socket);
        Ok(())
    }

    /// Has the sockets rescued should this program die.
    fn protect(&mut self, owner: i32) -> Result<()> {
        if !self.endangered.is_empty() {
            let rescuer = Rescuer::spawn(&self.endangered, owner);
            self.rescuer = Some(rescuer.map_err(|source| Error::call("connections", "forking their rescuer", source))?);
        }
        Ok(())
    }

    /// Says that from now on the connections live elsewhere: they are not taken out of repair mode any more, whatever happens.
    pub fn give_away(&self) {
        if let Some(rescuer) = &self.rescuer {
            rescuer.dismiss();
        }
    }

    /// The longest time that a packet of theirs takes to the peer and back, as the kernel has measured it.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Number of connections.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sockets.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sockets.is_empty()
    }

    /// Has this host forget the connections, without a word to their peers: they live elsewhere.
    pub fn forget(mut self) {
        self.endangered.clear();
        for socket in self.sockets.drain(..) {
            // In repair mode no reset is sent.
            if let Err(errno) = disconnect(socket.as_fd()) {
                tracing::debug!(%errno, "a connection that has moved is kept until its socket is closed");
            }
        }
    }

    /// Leaves the sockets as they are, in repair mode: it is not known where their connections live.
    pub fn keep(mut self) {
        self.endangered.clear();
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        for (socket, Endangered { reuse, .. }) in self.sockets.iter().zip(&self.endangered) {
            let reuse = reuse.to_ne_bytes();
            let off = set(socket.as_fd(), TCP_REPAIR, REPAIR_OFF_SILENT)
                .and_then(|()| set_socket_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &reuse));
            if let Err(errno) = off {
                tracing::error!(%errno, "a connection could not be given back as it was");
            }
        }
    }
}

fn set(socket: BorrowedFd<'_>, name: i32, value: i32) -> Result<(), Errno> {
    set_socket_option(socket, libc::IPPROTO_TCP, name, &value.to_ne_bytes())
}

fn get(socket: BorrowedFd<'_>, name: i32) -> Result<u32, Errno> {
    let value = socket_option(socket, libc::IPPROTO_TCP, name, 4)?;
    value.try_into().map(u32::from_ne_bytes).map_err(|_| Errno::EBADMSG)
}

/// A connection that is to be taken apart.
#[derive(Debug)]
pub(crate) struct Candidate<'a> {
    pub(crate) entry: &'a table::Entry,
    pub(crate) inet: Inet,
    pub(crate) id: u32,
}

/// A connection that was taken apart.
pub(crate) struct Parts {
    pub(crate) socket: InetSkEntry,
    pub(crate) options: Packed,
    pub(crate) stream: StreamContent,
    round_trip: Duration,
}

/// Takes connections of process `owner` apart. From here on they are in repair mode.
pub(crate) fn collect(
    candidates: &[Candidate<'_>],
    connections: &mut Connections,
    owner: i32,
) -> Result<Vec<Result<Parts>>> {
    // N.B. all of them before the first changes.
    candidates.iter().try_for_each(|candidate| connections.note(candidate.entry))?;
    connections.protect(owner)?;
    let parts = parallel::map(candidates, collect_one);
    connections.round_trip = parts.iter().flatten().map(|parts| parts.round_trip).max().unwrap_or_default();
    Ok(parts)
}

fn collect_one(candidate: &Candidate<'_>) -> Result<Parts> {
    let Candidate { entry, ref inet, id } = *candidate;
    // N.B. the options first: some say other things in repair mode.
    let (mut socket, options) = listener::describe(entry, inet, id)?;
    // N.B. the program itself may have said so (shutdown(2)).
    let shut = is_shut_for_reading(entry.file.as_fd()).map_err(entry.error("poll"))?;
    if !end_was_received(inet.state) && shut {
        socket.set_shutdown(godwit_proto::image::SkShutdown::Read);
    }
    set(entry.file.as_fd(), TCP_REPAIR, REPAIR_ON).map_err(entry.error("TCP_REPAIR"))?;
    // N.B. now: a packet may have come between the first look and the moment from which on they are held back.
    let info = socket_option(entry.file.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, INFO_SIZE)
        .map_err(entry.error("TCP_INFO"))?;
    let short = |_| Error::state(entry.name(), "TCP_INFO is too short");
    let info: &[u8; INFO_SIZE] = info.as_slice().try_into().map_err(short)?;
    let state = info[0];
    if !is_connection(state) {
        return refuse(entry, &format!("TCP connection {}", listener::ends(entry)), "it has ended in this moment");
    }
    socket.state = state.into();
    let stream = take_apart(entry, info, options.peek_offset()).map_err(|(what, source)| entry.error(what)(source))?;
    let measured = info.last_chunk().map_or(0, |word| u32::from_ne_bytes(*word));
    let round_trip = Duration::from_micros(measured.into());
    Ok(Parts { socket, options, stream: StreamContent { id, ..stream }, round_trip })
}

fn take_apart(
    entry: &table::Entry,
    info: &[u8; INFO_SIZE],
    peek_offset: Option<i32>,
) -> Result<StreamContent, (&'static str, Errno)> {
    let socket = entry.file.as_fd();
    let at = |what: &'static str| move |errno| (what, errno);
    let (state, options, scales) = (info[0], info[5], info[6]);
    let mut stream = TcpStreamEntry {
        opt_mask: options.into(),
        snd_wscale: (scales & 15).into(),
        rcv_wscale: Some((scales >> 4).into()),
        mss_clamp: get(socket, libc::TCP_MAXSEG).map_err(at("TCP_MAXSEG"))?,
        ..TcpStreamEntry::default()
    };
    if options & OPTION_TIMESTAMPS != 0 {
        stream.timestamp = Some(get(socket, TCP_TIMESTAMP).map_err(at("TCP_TIMESTAMP"))?);
    }
    set(socket, TCP_REPAIR_QUEUE, SEND_QUEUE).map_err(at("TCP_REPAIR_QUEUE"))?;
    stream.outq_seq = get(socket, TCP_QUEUE_SEQ).map_err(at("TCP_QUEUE_SEQ"))?;
    if state == SYN_SENT {
        return Ok(StreamContent { entry: Some(stream), ..StreamContent::default() });
    }
    let (unacknowledged, unsent) = unacknowledged_bytes(socket).map_err(at("SIOCOUTQ"))?;
    let sent = peek(socket, unacknowledged).map_err(at("reading what was sent"))?;
    set(socket, TCP_REPAIR_QUEUE, RECEIVE_QUEUE).map_err(at("TCP_REPAIR_QUEUE"))?;
    stream.inq_seq = get(socket, TCP_QUEUE_SEQ).map_err(at("TCP_QUEUE_SEQ"))?;
    let waiting = readable_bytes(socket).map_err(at("SIOCINQ"))?;
    let set_peek_offset =
        |offset: i32| set_socket_option(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &offset.to_ne_bytes());
    // N.B. the program may be looking further ahead; all of it has to be read, and it goes on where it was.
    peek_offset.map_or(Ok(()), |_| set_peek_offset(-1)).map_err(at("SO_PEEK_OFF"))?;
    let received = peek(socket, waiting).map_err(at("reading what was received"));
    peek_offset.map_or(Ok(()), set_peek_offset).map_err(at("SO_PEEK_OFF"))?;
    let received = received?;
    // The end of the stream is the last to be sent.
    let unsent = if end_was_sent(state) { unsent.saturating_sub(1) } else { unsent };
    (stream.inq_len, stream.outq_len) = (received.len() as u32, sent.len() as u32);
    stream.unsq_len = Some(unsent.min(sent.len()) as u32);
    // Should the process run on before the socket is put right, it had better not write into its own receive queue.
    set(socket, TCP_REPAIR_QUEUE, SEND_QUEUE).map_err(at("TCP_REPAIR_QUEUE"))?;
    let window =
        socket_option(socket, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, WINDOW_SIZE).map_err(at("TCP_REPAIR_WINDOW"))?;
    let word = |index: usize| {
        let bytes = window.get(index * 4..index * 4 + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    (stream.snd_wl1, stream.snd_wnd, stream.max_window) = (word(0), word(1), word(2));
    (stream.rcv_wnd, stream.rcv_wup) = (word(3), word(4));
    Ok(StreamContent { entry: Some(stream), received, sent, ..StreamContent::default() })
}

/// Reads the chosen queue without emptying it.
fn peek(socket: BorrowedFd<'_>, length: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; length];
    if length > 0 {
        let read = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)?;
        bytes.truncate(read);
    }
    Ok(bytes)
}

/// A connection that is complete and still in repair mode.
#[derive(Debug)]
pub(crate) struct Restored {
    socket: OwnedFd,
    name: String,
    flow: Flow,
    state: u8,
    unsent: Vec<u8>,
    /// Sequence number of the next byte that the peer sends, and of the oldest one that it has not acknowledged.
    next: u32,
    oldest: u32,
    /// How much the peer takes, as its packets say it.
    window: u16,
    shut_for_reading: bool,
    /// Size that the send buffer had, where more room was made for what waits in it.
    send_buffer: Option<i32>,
    /// Options that repair mode or the making of the connection has changed.
    options: Vec<SocketOption>,
}

/// Whether an option has to be set once more when everything else is done.
fn is_changed_on_the_way(option: &SocketOption) -> bool {
    let is_changed = matches!(
        (option.level, option.name),
        (
            libc::SOL_SOCKET,
            libc::SO_REUSEADDR | libc::SO_SNDBUF | libc::SO_RCVBUF | libc::SO_RCVLOWAT | socket_options::SO_BUF_LOCK
        ) | (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT | libc::TCP_QUICKACK)
            | (libc::IPPROTO_IP, libc::IP_TRANSPARENT)
            | (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT)
    );
    is_changed || socket_options::needs_connection(option)
}

/// Makes connections again, in repair mode, each with what it is called in errors.
///
/// # Errors
/// `EADDRINUSE` naming the connection when this host has it already.
pub(crate) fn rebuild(
    connections: &[(String, &InetSkEntry, &StreamContent)],
    option_sets: &[OptionSet],
) -> Result<Vec<(OwnedFd, Restored)>> {
    let mut unlike: HashMap<(u32, u32), Vec<SocketOption>> = HashMap::new();
    for (name, message, content) in connections {
        if let Entry::Vacant(place) = unlike.entry((message.family, content.option_set)) {
            let set = option_sets.get(content.option_set as usize);
            let set = set.ok_or_else(|| Error::state(name, "there are no such options"))?;
            let family =
                if message.family == libc::AF_INET as u32 { AddressFamily::Inet } else { AddressFamily::Inet6 };
            place.insert(unlike_fresh(family, set).map_err(|source| Error::call(name, "socket", source))?);
        }
    }
    let one = |(name, message, content): &(String, &InetSkEntry, &StreamContent)| {
        let options = &unlike[&(message.family, content.option_set)];
        let made = rebuild_one(message, content, options)?;
        filter::settle(made.0.as_fd(), &message.opts.so_filter, options)
            .map_err(|source| Error::call(name.as_str(), "SO_ATTACH_FILTER", source))?;
        event::set_status(&made.0, message.flags).map_err(|source| Error::call(name.as_str(), "F_SETFL", source))?;
        Ok(made)
    };
    parallel::map(connections, one).into_iter().collect()
}

/// The options of a set that a new socket has otherwise, and those that change on the way.
fn unlike_fresh(family: AddressFamily, set: &OptionSet) -> Result<Vec<SocketOption>, Errno> {
    let fresh = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)?;
    let differs = |option: &&SocketOption| {
        // What a connection says of this is what was agreed on with its peer, and comes about in another way.
        let agreed = (option.level, option.name) == (libc::IPPROTO_TCP, libc::TCP_MAXSEG);
        !agreed && (is_changed_on_the_way(option) || !socket_options::has(fresh.as_fd(), option))
    };
    Ok(set.options.iter().filter(differs).cloned().collect())
}

fn rebuild_one(
    message: &InetSkEntry,
    content: &StreamContent,
    options: &[SocketOption],
) -> Result<(OwnedFd, Restored)> {
    let unusable = |what: &str| Error::state("TCP connection", what);
    let local = listener::source_of(message).ok_or_else(|| unusable("no usable address of its own"))?;
    let remote = listener::peer_of(message).ok_or_else(|| unusable("no usable address of its peer"))?;
    let stream = content.entry.as_ref().ok_or_else(|| unusable("nothing about its stream"))?;
    let state = u8::try_from(message.state).map_err(|_| unusable("no such state"))?;
    let name = format!("TCP connection {local} - {remote}");
    let made = put_together((message, content, options), stream, state, (local, remote))
        .map_err(|(what, source)| Error::call(&name, what, source))?;
    let socket = made.try_clone().map_err(|error| {
        Error::call(&name, "duplicating it", Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE)))
    })?;
    let unsent = (stream.unsq_len.unwrap_or(0) as usize).min(content.sent.len());
    let restored = Restored {
        socket,
        name,
        flow: Flow::new(local, remote),
        state,
        unsent: content.sent[content.sent.len() - unsent..].to_vec(),
        next: in_end(stream, state),
        oldest: out_end(stream, state).wrapping_sub(content.sent.len() as u32),
        window: stream
            .snd_wnd
            .and_then(|window| window.checked_shr(stream.snd_wscale)?.try_into().ok())
            .unwrap_or(u16::MAX),
        shut_for_reading: message.shutdown() == godwit_proto::image::SkShutdown::Read,
        send_buffer: (room(&content.sent) > size(message.opts.so_sndbuf)).then(|| size(message.opts.so_sndbuf)),
        options: options.iter().filter(|option| is_changed_on_the_way(option)).cloned().collect(),
    };
    Ok((made, restored))
}

/// Sequence number behind the last byte that was received; the end of the stream is none.
fn in_end(stream: &TcpStreamEntry, state: u8) -> u32 {
    stream.inq_seq.wrapping_sub(end_was_received(state).into())
}

/// Sequence number behind the last byte that was given to be sent; of a connection that is only asked for, that of the request.
fn out_end(stream: &TcpStreamEntry, state: u8) -> u32 {
    stream.outq_seq.wrapping_sub((end_was_sent(state) || state == SYN_SENT).into())
}

fn put_together(
    (message, content, options): (&InetSkEntry, &StreamContent, &[SocketOption]),
    stream: &TcpStreamEntry,
    state: u8,
    (local, remote): (SocketAddr, SocketAddr),
) -> Result<OwnedFd, (&'static str, Errno)> {
    let at = |what: &'static str| move |errno| (what, errno);
    let (family, level, transparent) = if local.is_ipv4() {
        (AddressFamily::Inet, libc::IPPROTO_IP, libc::IP_TRANSPARENT)
    } else {
        (AddressFamily::Inet6, libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT)
    };
    let made = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp).map_err(at("socket"))?;
    let fd = made.as_fd();
    let now = options.iter().filter(|option| !socket_options::needs_connection(option));
    socket_options::apply_all(fd, now).map_err(at("setsockopt"))?;
    // N.B. after the options: repair mode lets it share its port with a listening socket that shares with nobody.
    set(fd, TCP_REPAIR, REPAIR_ON).map_err(at("TCP_REPAIR"))?;
    // The address may be on its way here, too.
    set_socket_option(fd, level, transparent, &1i32.to_ne_bytes()).map_err(at("IP_TRANSPARENT"))?;
    let begin_out = out_end(stream, state).wrapping_sub(content.sent.len() as u32);
    let begin_in = in_end(stream, state).wrapping_sub(content.received.len() as u32);
    for (queue, begin) in [(SEND_QUEUE, begin_out), (RECEIVE_QUEUE, begin_in)] {
        set(fd, TCP_REPAIR_QUEUE, queue).map_err(at("TCP_REPAIR_QUEUE"))?;
        set(fd, TCP_QUEUE_SEQ, begin as i32).map_err(at("TCP_QUEUE_SEQ"))?;
    }
    bind(made.as_raw_fd(), &SockaddrStorage::from(local)).map_err(at("bind"))?;
    if state == SYN_SENT {
        return Ok(made);
    }
    connect(made.as_raw_fd(), &SockaddrStorage::from(remote)).map_err(at("connect"))?;
    let mut agreed = vec![(libc::TCP_MAXSEG, stream.mss_clamp)];
    let mask = stream.opt_mask as u8;
    if mask & OPTION_WINDOW_SCALE != 0 {
        agreed.push((3, stream.snd_wscale | stream.rcv_wscale.unwrap_or(0) << 16));
    }
    if mask & OPTION_SACK != 0 {
        agreed.push((4, 0));
    }
    if mask & OPTION_TIMESTAMPS != 0 {
        agreed.push((8, 0));
    }
    let bytes: Vec<u8> =
        agreed.iter().flat_map(|&(code, value)| [code as u32, value]).flat_map(u32::to_ne_bytes).collect();
    set_socket_option(fd, libc::IPPROTO_TCP, TCP_REPAIR_OPTIONS, &bytes).map_err(at("TCP_REPAIR_OPTIONS"))?;
    if let Some(timestamp) = stream.timestamp {
        set(fd, TCP_TIMESTAMP, timestamp as i32).map_err(at("TCP_TIMESTAMP"))?;
    }
    make_room(fd, message, content).map_err(at("SO_SNDBUFFORCE, SO_RCVBUFFORCE"))?;
    let unsent = (stream.unsq_len.unwrap_or(0) as usize).min(content.sent.len());
    let in_flight = &content.sent[..content.sent.len() - unsent];
    for (queue, bytes) in [(RECEIVE_QUEUE, content.received.as_slice()), (SEND_QUEUE, in_flight)] {
        set(fd, TCP_REPAIR_QUEUE, queue).map_err(at("TCP_REPAIR_QUEUE"))?;
        fill(fd, bytes).map_err(at("filling a queue"))?;
    }
    // What is left too large is offered to the peer, and filled, and larger with every move.
    if room(&content.received) > size(message.opts.so_rcvbuf) {
        let before = size(message.opts.so_rcvbuf);
        socket_options::set_buffer(fd, libc::SO_RCVBUF, before).map_err(at("SO_RCVBUFFORCE"))?;
    }
    if let (Some(wl1), Some(window), Some(largest), Some(receive), Some(updated)) =
        (stream.snd_wl1, stream.snd_wnd, stream.max_window, stream.rcv_wnd, stream.rcv_wup)
    {
        // The end of the stream comes later, and had moved both.
        let before_end = |sequence: u32| if sequence == stream.inq_seq { in_end(stream, state) } else { sequence };
        let window: Vec<u8> = [before_end(wl1), window, largest, receive, before_end(updated)]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        set_socket_option(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &window).map_err(at("TCP_REPAIR_WINDOW"))?;
    }
    Ok(made)
}

/// Makes the buffers large enough for the queues, and as large as they were: the peer was told how much fits.
fn make_room(fd: BorrowedFd<'_>, message: &InetSkEntry, content: &StreamContent) -> Result<(), Errno> {
    socket_options::set_buffer(fd, libc::SO_SNDBUF, room(&content.sent).max(size(message.opts.so_sndbuf)))?;
    socket_options::set_buffer(fd, libc::SO_RCVBUF, room(&content.received).max(size(message.opts.so_rcvbuf)))
}

/// Size of a buffer that takes a queue in, whatever the kernel makes of it.
fn room(queue: &[u8]) -> i32 {
    i32::try_from(queue.len()).unwrap_or(i32::MAX / OVERHEAD).saturating_mul(OVERHEAD)
}

fn size(bytes: u32) -> i32 {
    i32::try_from(bytes).unwrap_or(i32::MAX)
}

fn fill(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let piece = &bytes[..bytes.len().min(PIECE)];
        let taken = send(fd.as_raw_fd(), piece, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?;
        bytes = &bytes[taken..];
    }
    Ok(())
}

impl Restored {
    /// Lets the connection live.
    ///
    /// # Errors
    /// When the kernel does not take it out of repair mode, or what was not sent yet does not fit.
    pub(crate) fn wake(&self, delivery: &Delivery) -> Result<()> {
        self.set_going(delivery).map_err(|(what, source)| Error::call(&self.name, what, source))
    }

    fn set_going(&self, delivery: &Delivery) -> Result<(), (&'static str, Errno)> {
        let at = |what: &'static str| move |errno| (what, errno);
        let fd = self.socket.as_fd();
        if self.state == SYN_SENT {
            set(fd, TCP_REPAIR, REPAIR_OFF_SILENT).map_err(at("TCP_REPAIR"))?;
            socket_options::apply_all(fd, &self.options).map_err(at("setsockopt"))?;
            return self.ask_again().map_err(at("connect"));
        }
        set(fd, TCP_REPAIR, REPAIR_OFF).map_err(at("TCP_REPAIR"))?;
        if !self.unsent.is_empty() {
            // All of it was taken in before, so all of it has to fit now.
            set(fd, libc::TCP_NOTSENT_LOWAT, -1).map_err(at("TCP_NOTSENT_LOWAT"))?;
            fill(fd, &self.unsent).map_err(at("sending what waited"))?;
        }
        // N.B. before the options say again who chooses this size.
        if let Some(size) = self.send_buffer {
            socket_options::set_buffer(fd, libc::SO_SNDBUF, size).map_err(at("SO_SNDBUFFORCE"))?;
        }
        socket_options::apply_all(fd, &self.options).map_err(at("setsockopt"))?;
        if end_was_sent(self.state) {
            shutdown(fd.as_raw_fd(), Shutdown::Write).map_err(at("shutdown"))?;
        }
        if self.shut_for_reading {
            shutdown(fd.as_raw_fd(), Shutdown::Read).map_err(at("shutdown"))?;
        }
        if end_was_received(self.state) {
            delivery.deliver(end_of_stream(&self.flow, self.next, self.oldest, self.window));
        }
        Ok(())
    }

    /// Asks for the connection once more, under the same sequence number.
    fn ask_again(&self) -> Result<(), Errno> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let flags = OFlag::from_bits_retain(fcntl(&self.socket, FcntlArg::F_GETFL)?);
        fcntl(&self.socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let asked = connect(self.socket.as_raw_fd(), &SockaddrStorage::from(self.flow.remote));
        fcntl(&self.socket, FcntlArg::F_SETFL(flags))?;
        match asked {
            Ok(()) | Err(Errno::EINPROGRESS) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}
