//! Putting connections together: new sockets in repair mode are given all that the old ones had, and wake up later.

use super::{
    INFO_SIZE, OPTION_SACK, OPTION_TIMESTAMPS, OPTION_WINDOW_SCALE, RECEIVE_QUEUE, REPAIR_OFF, REPAIR_OFF_SILENT,
    REPAIR_ON, SEND_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR, TCP_REPAIR_OPTIONS, TCP_REPAIR_QUEUE, TCP_TIMESTAMP, Window,
    end_was_received, end_was_sent, set,
    state::{CLOSE_WAIT, ESTABLISHED, LAST_ACK, SYN_SENT},
};
use crate::descriptors::{event, filter, listener, socket_options};
use crate::{Error, Result, parallel};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{set_socket_option, socket_option};
use godwit_network::{Delivery, Flow, end_of_stream, urgent_byte, window_update};
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
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Times to look whether a packet that was delivered has arrived, with as many milliseconds between them.
const LOOKS: u32 = 20;
/// Bytes queued at a time.
const PIECE: usize = 64 << 10;
/// So many of the longest segments a peer must have had room for, or they begin short and grow with its window.
const SEGMENTS_IN_WINDOW: u32 = 4;
/// What the kernel takes of a buffer for a byte of payload, at most, in the sizes that are queued here.
const OVERHEAD: i32 = 4;

/// A connection that is complete and still in repair mode.
#[derive(Debug)]
pub(crate) struct Restored {
    socket: Arc<OwnedFd>,
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
    /// Whether nothing needs to be said when it wakes up: the peer has all that was sent, or is asked otherwise.
    is_quiet: bool,
    /// Options that repair mode or the making of the connection has changed.
    options: Arc<Vec<SocketOption>>,
    urgent: Option<Urgent>,
    /// Whether it may not hear its peer's first word.
    is_hard_of_hearing: bool,
    clock: Option<Clock>,
}

/// How a connection that has something on its way learns how far away its peer is. As long as it does not know, it sends again what was
/// lost after a second or more, and never in a shorter time than its peer has needed for an answer when it was moved.
///
/// There is a byte more in front of what it has sent, which its peer has long acknowledged. When it wakes up that is acknowledged in its
/// peer's place, with the time stamp of as long ago as an answer takes (RFC 7323, section 4).
#[derive(Clone, Copy, Debug)]
struct Clock {
    /// Its time stamp, in milliseconds, and when it was that.
    now: u32,
    since: Instant,
    /// How long an answer takes, in milliseconds.
    round_trip: u32,
}

impl Clock {
    fn of(content: &StreamContent, stream: &TcpStreamEntry, state: u8) -> Option<Self> {
        /// Longer than any; more would be a time stamp of the future.
        const LONGEST_MS: u32 = 60_000;
        // Time may be counted in microseconds (Linux 6.7).
        let now = stream.timestamp.filter(|timestamp| timestamp & 1 == 0)?;
        let has_timestamps = stream.opt_mask as u8 & OPTION_TIMESTAMPS != 0;
        let is_usable = has_timestamps && state != SYN_SENT && !content.sent.is_empty() && content.round_trip_us > 0;
        // N.B. what is said in the peer's place says how much it takes, and an urgent byte is said before, without a time stamp.
        let is_usable = is_usable && stream.snd_wnd.is_some() && content.urgent.is_none();
        let round_trip = content.round_trip_us.div_ceil(1000).min(LONGEST_MS);
        is_usable.then(|| Self { now, since: Instant::now(), round_trip })
    }

    /// The time stamp that its peer would answer to.
    fn seen(&self) -> u32 {
        self.now.wrapping_add(self.since.elapsed().as_millis() as u32).wrapping_sub(self.round_trip)
    }
}

/// A byte that the peer has called urgent, with what comes behind it: the kernel hears of it by a packet, when the connection lives.
#[derive(Debug)]
struct Urgent {
    bytes: Vec<u8>,
    /// Its sequence number.
    sequence: u32,
    was_read: bool,
    /// Size that the receive buffer had, where more room was made for what waits in it.
    receive_buffer: Option<i32>,
    /// What the connection is told of its window (`TCP_REPAIR_WINDOW`): it makes no sense before all of that is there.
    window: Option<Window>,
}

/// What waits to be read in front of an urgent byte, and what begins with one.
fn parts(content: &StreamContent) -> (&[u8], &[u8]) {
    let at = content.urgent.map_or(content.received.len(), |at| at as usize);
    content.received.split_at(at.min(content.received.len()))
}

/// What a new socket must be told of an option set: before the connection is made, and when it wakes up. What it has anyway it is
/// told only where it loses it on the way.
#[derive(Clone, Debug, Default)]
struct Unlike {
    first: Arc<Vec<SocketOption>>,
    last: Arc<Vec<SocketOption>>,
    /// The last ones, with those that change when something is sent.
    last_of_sender: Arc<Vec<SocketOption>>,
    /// Where sockets are that were given the first ones.
    place: usize,
}

/// Whether an option is set only when everything else is done.
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

/// Whether an option has to be set even if a new socket has it so: it is set to something else on the way, or by the kernel.
fn is_lost_on_the_way(option: &SocketOption) -> bool {
    matches!(
        (option.level, option.name),
        (libc::SOL_SOCKET, socket_options::SO_BUF_LOCK | libc::SO_SNDBUF | libc::SO_RCVBUF)
            | (libc::IPPROTO_IP, libc::IP_TRANSPARENT)
            | (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT)
    )
}

/// Whether an option changes, or is in the way, when what waits to be sent is put into the queue.
fn is_changed_by_sending(option: &SocketOption) -> bool {
    matches!((option.level, option.name), (libc::IPPROTO_TCP, libc::TCP_QUICKACK | libc::TCP_NOTSENT_LOWAT))
}

/// The option sets that connections have, and sockets that are there before it is known what for.
#[derive(Debug, Default)]
pub(crate) struct Supply {
    sets: Vec<OptionSet>,
    /// By family and set.
    unlike: HashMap<(u32, u32), Unlike>,
    /// Where sockets of a family with certain options are.
    places: HashMap<(u32, Arc<Vec<SocketOption>>), usize>,
    /// Sockets in repair mode that nothing has come for yet.
    blanks: Vec<Vec<OwnedFd>>,
}

impl Supply {
    pub(crate) fn new(sets: Vec<OptionSet>) -> Self {
        Self { sets, ..Self::default() }
    }

    /// Adds option sets, which are numbered in the order in which they are told.
    pub(crate) fn add(&mut self, sets: Vec<OptionSet>) {
        self.sets.extend(sets);
    }

    fn unlike(&mut self, name: &str, key: (u32, u32)) -> Result<&Unlike> {
        match self.unlike.entry(key) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(place) => {
                let (family, number) = key;
                let domain = family_of(family).ok_or_else(|| Error::state(name, "its family is none of IP"))?;
                let set = self.sets.get(number as usize);
                let set = set.ok_or_else(|| Error::state(name, "there are no such options"))?;
                let mut unlike = unlike_fresh(domain, set).map_err(|source| Error::call(name, "socket", source))?;
                let next = self.blanks.len();
                unlike.place = *self.places.entry((family, Arc::clone(&unlike.first))).or_insert(next);
                if unlike.place == next {
                    self.blanks.push(Vec::new());
                }
                Ok(place.insert(unlike))
            }
        }
    }

    /// Makes a socket for a connection of this family and with these options that is going to come.
    pub(crate) fn expect(&mut self, family: u32, set: u32) -> Result<()> {
        let name = "a TCP connection that is going to come";
        let unlike = self.unlike(name, (family, set))?.clone();
        let domain = family_of(family).unwrap_or(AddressFamily::Inet);
        let socket = blank(domain, &unlike.first).map_err(|(what, source)| Error::call(name, what, source))?;
        self.blanks[unlike.place].push(socket);
        Ok(())
    }

    /// Takes out the sockets that nothing has come for.
    pub(crate) fn take_blanks(&mut self) -> Vec<OwnedFd> {
        self.blanks.iter_mut().flat_map(std::mem::take).collect()
    }

    /// Sockets that nothing has come for yet.
    #[cfg(test)]
    pub(crate) fn in_stock(&self) -> usize {
        self.blanks.iter().map(Vec::len).sum()
    }

    /// Makes connections again, in repair mode, each with what it is called in errors.
    ///
    /// # Errors
    /// `EADDRINUSE` naming the connection when this host has it already.
    pub(crate) fn rebuild(
        &mut self,
        connections: &[(String, &InetSkEntry, &StreamContent)],
    ) -> Result<Vec<(Arc<OwnedFd>, Restored)>> {
        let mut jobs = Vec::with_capacity(connections.len());
        for (name, message, content) in connections {
            let options = self.unlike(name, (message.family, content.option_set))?.clone();
            let blank = self.blanks[options.place].pop();
            jobs.push((name.as_str(), *message, *content, options, Mutex::new(blank)));
        }
        let one = |(name, message, content, options, blank): &Job<'_>| {
            let blank = blank.lock().unwrap_or_else(PoisonError::into_inner).take();
            let made = rebuild_one(message, content, options, blank)?;
            filter::settle(made.0.as_fd(), &message.opts.so_filter, &options.first)
                .map_err(|source| Error::call(*name, "SO_ATTACH_FILTER", source))?;
            event::set_status(&made.0, message.flags).map_err(|source| Error::call(*name, "F_SETFL", source))?;
            Ok(made)
        };
        parallel::map(&jobs, one).into_iter().collect()
    }
}

/// A connection that is to be made: its name, what there is to know of it, and a socket for it if there is one already.
type Job<'a> = (&'a str, &'a InetSkEntry, &'a StreamContent, Unlike, Mutex<Option<OwnedFd>>);

fn family_of(family: u32) -> Option<AddressFamily> {
    match family as i32 {
        libc::AF_INET => Some(AddressFamily::Inet),
        libc::AF_INET6 => Some(AddressFamily::Inet6),
        _ => None,
    }
}

/// The options of a set that a new socket has otherwise, and those that change on the way.
fn unlike_fresh(family: AddressFamily, set: &OptionSet) -> Result<Unlike, Errno> {
    let fresh = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)?;
    let (last, first): (Vec<SocketOption>, Vec<_>) = set.options.iter().cloned().partition(is_changed_on_the_way);
    let differs = |option: &SocketOption| {
        // What a connection says of this is what was agreed on with its peer, and comes about in another way.
        let agreed = (option.level, option.name) == (libc::IPPROTO_TCP, libc::TCP_MAXSEG);
        !agreed && !socket_options::has(fresh.as_fd(), option)
    };
    let is_lost = |option: &&SocketOption| is_lost_on_the_way(option) || differs(option);
    let is_lost_by_sender = |option: &&SocketOption| is_changed_by_sending(option) || is_lost(option);
    Ok(Unlike {
        last: Arc::new(last.iter().filter(is_lost).cloned().collect()),
        last_of_sender: Arc::new(last.iter().filter(is_lost_by_sender).cloned().collect()),
        first: Arc::new(first.into_iter().filter(differs).collect()),
        place: 0,
    })
}

fn rebuild_one(
    message: &InetSkEntry,
    content: &StreamContent,
    options: &Unlike,
    blank: Option<OwnedFd>,
) -> Result<(Arc<OwnedFd>, Restored)> {
    let unusable = |what: &str| Error::state("TCP connection", what);
    let local = listener::source_of(message).ok_or_else(|| unusable("no usable address of its own"))?;
    let remote = listener::peer_of(message).ok_or_else(|| unusable("no usable address of its peer"))?;
    let stream = content.entry.as_ref().ok_or_else(|| unusable("nothing about its stream"))?;
    let state = u8::try_from(message.state).map_err(|_| unusable("no such state"))?;
    if content.urgent.is_some_and(|at| at as usize >= content.received.len()) {
        return Err(unusable("an urgent byte behind all that was received"));
    }
    let flow = Flow::new(local, remote);
    let mut clock = Clock::of(content, stream, state);
    let made =
        put_together((message, content, &options.first), blank, (stream, state), (local, remote), clock.is_some())
            .map_err(|(what, source)| Error::call(name(&flow), what, source))?;
    // N.B. now: it may seem a little farther away, but not nearer than at no distance.
    if let Some(clock) = &mut clock {
        clock.since = Instant::now();
    }
    let made = Arc::new(made);
    let unsent = (stream.unsq_len.unwrap_or(0) as usize).min(content.sent.len());
    let (_, urgent) = parts(content);
    let urgent = content.urgent.map(|_| Urgent {
        bytes: urgent.to_vec(),
        sequence: in_end(stream, state).wrapping_sub(urgent.len() as u32),
        was_read: content.urgent_was_read,
        receive_buffer: too_large(message, content),
        window: window_of(stream, state),
    });
    let restored = Restored {
        socket: Arc::clone(&made),
        flow,
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
        is_quiet: state == ESTABLISHED && content.sent.is_empty(),
        options: Arc::clone(if content.sent.is_empty() { &options.last } else { &options.last_of_sender }),
        urgent,
        is_hard_of_hearing: is_hard_of_hearing(stream),
        clock,
    };
    Ok((made, restored))
}

/// What a connection is called in errors.
fn name(flow: &Flow) -> String {
    format!("TCP connection {} - {}", flow.local, flow.remote)
}

/// Sequence number behind the last byte that was received; the end of the stream is none.
fn in_end(stream: &TcpStreamEntry, state: u8) -> u32 {
    stream.inq_seq.wrapping_sub(end_was_received(state).into())
}

/// Sequence number behind the last byte that was given to be sent; of a connection that is only asked for, that of the request.
fn out_end(stream: &TcpStreamEntry, state: u8) -> u32 {
    stream.outq_seq.wrapping_sub((end_was_sent(state) || state == SYN_SENT).into())
}

/// A new socket in repair mode that has no address yet.
fn blank(family: AddressFamily, options: &[SocketOption]) -> Result<OwnedFd, (&'static str, Errno)> {
    let at = |what: &'static str| move |errno| (what, errno);
    let (level, transparent) = match family {
        AddressFamily::Inet => (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        _ => (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
    };
    let made = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp).map_err(at("socket"))?;
    let fd = made.as_fd();
    socket_options::set_all(fd, options).map_err(at("setsockopt"))?;
    // N.B. after the options: repair mode lets it share its port with a listening socket that shares with nobody.
    set(fd, TCP_REPAIR, REPAIR_ON).map_err(at("TCP_REPAIR"))?;
    // The address may be on its way here, too.
    set_socket_option(fd, level, transparent, &1i32.to_ne_bytes()).map_err(at("IP_TRANSPARENT"))?;
    Ok(made)
}

fn put_together(
    (message, content, options): (&InetSkEntry, &StreamContent, &[SocketOption]),
    blank_one: Option<OwnedFd>,
    (stream, state): (&TcpStreamEntry, u8),
    (local, remote): (SocketAddr, SocketAddr),
    has_clock: bool,
) -> Result<OwnedFd, (&'static str, Errno)> {
    let at = |what: &'static str| move |errno| (what, errno);
    let family = if local.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let made = blank_one.map_or_else(|| blank(family, options), Ok)?;
    let fd = made.as_fd();
    /// What its peer has acknowledged.
    const KNOWN: &[u8] = &[0];
    let known = if has_clock { KNOWN } else { &[] };
    let begin_out = out_end(stream, state).wrapping_sub((known.len() + content.sent.len()) as u32);
    let begin_in = in_end(stream, state).wrapping_sub(content.received.len() as u32);
    for (queue, begin) in [(SEND_QUEUE, begin_out), (RECEIVE_QUEUE, begin_in)] {
        set(fd, TCP_REPAIR_QUEUE, queue).map_err(at("TCP_REPAIR_QUEUE"))?;
        set(fd, TCP_QUEUE_SEQ, begin as i32).map_err(at("TCP_QUEUE_SEQ"))?;
    }
    bind(made.as_raw_fd(), &SockaddrStorage::from(local)).map_err(at("bind"))?;
    if state == SYN_SENT {
        return Ok(made);
    }
    connect(made.as_raw_fd(), &SockaddrStorage::from(remote)).map_err(|errno| match errno {
        Errno::EADDRNOTAVAIL => ("making a connection that a program here has already", errno),
        _ => ("connect", errno),
    })?;
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
    let (ordinary, urgent) = parts(content);
    // N.B. a segment that is longer than what the peer makes room for at once waits for a timer of seconds.
    let is_sized = stream.max_window.is_some_and(|window| window / SEGMENTS_IN_WINDOW >= stream.mss_clamp);
    if is_sized && !(in_flight.is_empty() && urgent.is_empty()) {
        size_segments(fd, &local, options).map_err(at("sizing segments"))?;
    }
    // N.B. in a segment of its own: there is no time stamp for a part of one.
    let queues = [(RECEIVE_QUEUE, ordinary), (SEND_QUEUE, known), (SEND_QUEUE, in_flight)];
    for (queue, bytes) in queues.into_iter().filter(|(_, bytes)| !bytes.is_empty()) {
        set(fd, TCP_REPAIR_QUEUE, queue).map_err(at("TCP_REPAIR_QUEUE"))?;
        fill(fd, bytes).map_err(at("filling a queue"))?;
    }
    if urgent.is_empty() {
        settle_receiver(fd, too_large(message, content), window_of(stream, state))?;
        if is_sized {
            size_segments(fd, &local, options).map_err(at("sizing segments"))?;
        }
    }
    Ok(made)
}

/// Has the kernel work out again how long a segment may be: it did so when the connection was made, knowing nothing of the peer, and does
/// not do it again until the peer's window is larger than ever. Changed IP options are another reason to; they are set to what they are.
fn size_segments(fd: BorrowedFd<'_>, local: &SocketAddr, options: &[SocketOption]) -> Result<(), Errno> {
    /// Too short for an option.
    const NONE: [u8; 4] = [0; 4];
    if local.ip().to_canonical().is_ipv4() {
        let own = options.iter().find(|option| (option.level, option.name) == (libc::IPPROTO_IP, libc::IP_OPTIONS));
        return set_socket_option(fd, libc::IPPROTO_IP, libc::IP_OPTIONS, own.map_or(&[], |own| own.value.as_slice()));
    }
    let is_one = |option: &SocketOption| {
        let names = [libc::IPV6_HOPOPTS, libc::IPV6_RTHDRDSTOPTS, libc::IPV6_RTHDR, libc::IPV6_DSTOPTS];
        option.level == libc::IPPROTO_IPV6 && names.contains(&option.name)
    };
    // N.B. this sets all of them at once.
    if options.iter().any(is_one) {
        return Ok(());
    }
    let set = |value: &[u8]| set_socket_option(fd, libc::IPPROTO_IPV6, libc::IPV6_2292PKTOPTIONS, value);
    set(&NONE)?;
    set(&[])
}

/// Says how much is offered to the peer from now on, when all that waits is in the queue.
fn settle_receiver(
    fd: BorrowedFd<'_>,
    buffer: Option<i32>,
    window: Option<Window>,
) -> Result<(), (&'static str, Errno)> {
    // What is left too large is offered to the peer, and filled, and larger with every move.
    if let Some(buffer) = buffer {
        socket_options::set_buffer(fd, libc::SO_RCVBUF, buffer).map_err(|errno| ("SO_RCVBUFFORCE", errno))?;
    }
    window.map_or(Ok(()), |window| window.set(fd).map_err(|errno| ("TCP_REPAIR_WINDOW", errno)))
}

/// Size that the receive buffer had, if more room was made for what waits in it.
fn too_large(message: &InetSkEntry, content: &StreamContent) -> Option<i32> {
    (room(&content.received) > size(message.opts.so_rcvbuf)).then(|| size(message.opts.so_rcvbuf))
}

/// How much each end takes, as far as all of it is known.
fn window_of(stream: &TcpStreamEntry, state: u8) -> Option<Window> {
    // N.B. less by the least that can be told: what it is when it is woken is news, then.
    let less = if is_hard_of_hearing(stream) { 1u32.checked_shl(stream.snd_wscale).unwrap_or(0) } else { 0 };
    // The end of the stream comes later, and had moved both.
    let before_end = |sequence: u32| if sequence == stream.inq_seq { in_end(stream, state) } else { sequence };
    Some(Window {
        sent_at: before_end(stream.snd_wl1?),
        to_send: stream.snd_wnd?.saturating_sub(less),
        largest: stream.max_window?,
        offered: stream.rcv_wnd?,
        acknowledged: before_end(stream.rcv_wup?),
    })
}

/// Whether the first word of the peer may be that it takes nothing any more, and is not heard: the kernel compares packets with one
/// that it expects (`pred_flags`, net/ipv4/tcp_input.c), and of a connection that was made in repair mode that is one with time stamps
/// and a window of 0, whatever it is told of the window (`TCP_REPAIR_WINDOW`). What it sends then is lost, and sent again after a second.
fn is_hard_of_hearing(stream: &TcpStreamEntry) -> bool {
    /// Segments that it sends before it hears of the first (RFC 6928).
    const AT_FIRST: u32 = 10;
    let window = stream.snd_wnd.unwrap_or(0);
    let is_open = window.checked_shr(stream.snd_wscale).is_some_and(|window| window > 0);
    let may_be_filled = stream.outq_len > 0 || window <= stream.mss_clamp.saturating_mul(AT_FIRST);
    stream.opt_mask as u8 & OPTION_TIMESTAMPS != 0 && is_open && may_be_filled
}

/// Makes the buffers large enough for the queues, and as large as they were: the peer was told how much fits.
fn make_room(fd: BorrowedFd<'_>, message: &InetSkEntry, content: &StreamContent) -> Result<(), Errno> {
    socket_options::set_buffer(fd, libc::SO_SNDBUF, room(&content.sent).max(size(message.opts.so_sndbuf)))?;
    socket_options::set_buffer(fd, libc::SO_RCVBUF, room(&content.received).max(size(message.opts.so_rcvbuf)))
}

/// Size of a buffer that takes a queue in, whatever the kernel makes of it.
fn room(queue: &[u8]) -> i32 {
    /// For a byte that has a segment of its own.
    const MORE: i32 = 4096;
    let more = if queue.is_empty() { 0 } else { MORE };
    i32::try_from(queue.len()).unwrap_or(i32::MAX / OVERHEAD).saturating_mul(OVERHEAD).saturating_add(more)
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
    /// Its ends.
    pub(crate) fn flow(&self) -> Flow {
        self.flow
    }

    /// Has it ask nothing of its peer when it is woken.
    pub(crate) fn be_quiet(&mut self) {
        self.is_quiet = true;
    }

    /// Lets the connection live.
    ///
    /// # Errors
    /// When the kernel does not take it out of repair mode, or what was not sent yet does not fit.
    pub(crate) fn wake(&self, delivery: &Delivery) -> Result<()> {
        self.set_going(delivery).map_err(|(what, source)| Error::call(name(&self.flow), what, source))
    }

    /// Tells a connection, in its peer's place, what no option tells it. It may live by then, and its program go on meanwhile; what its peer has
    /// sent may not come before.
    pub(crate) fn inform(&self, delivery: &Delivery) {
        // N.B. a peer that has said its end is one number further on: then it is told before.
        if self.state != SYN_SENT && !end_was_received(self.state) {
            self.tell(delivery);
        }
    }

    fn tell(&self, delivery: &Delivery) {
        if self.is_hard_of_hearing || self.clock.is_some() {
            let seen = self.clock.map(|clock| clock.seen());
            delivery.say(window_update(&self.flow, self.next, self.oldest, self.window, seen));
        }
    }

    fn set_going(&self, delivery: &Delivery) -> Result<(), (&'static str, Errno)> {
        let at = |what: &'static str| move |errno| (what, errno);
        let fd = self.socket.as_fd();
        if self.state == SYN_SENT {
            set(fd, TCP_REPAIR, REPAIR_OFF_SILENT).map_err(at("TCP_REPAIR"))?;
            socket_options::set_all(fd, &self.options).map_err(at("setsockopt"))?;
            return self.ask_again().map_err(at("connect"));
        }
        if let Some(urgent) = &self.urgent {
            self.have_urgent(urgent, delivery)?;
        }
        if end_was_received(self.state) {
            self.tell(delivery);
        }
        // What the peer has not acknowledged it may have by now, and says so if it is asked.
        let off = if self.is_quiet { REPAIR_OFF_SILENT } else { REPAIR_OFF };
        set(fd, TCP_REPAIR, off).map_err(at("TCP_REPAIR"))?;
        if !self.unsent.is_empty() {
            // All of it was taken in before, so all of it has to fit now.
            set(fd, libc::TCP_NOTSENT_LOWAT, -1).map_err(at("TCP_NOTSENT_LOWAT"))?;
            fill(fd, &self.unsent).map_err(at("sending what waited"))?;
        }
        // N.B. before the options say again who chooses this size.
        if let Some(size) = self.send_buffer {
            socket_options::set_buffer(fd, libc::SO_SNDBUF, size).map_err(at("SO_SNDBUFFORCE"))?;
        }
        socket_options::set_all(fd, &self.options).map_err(at("setsockopt"))?;
        if self.state == LAST_ACK {
            self.have_end(delivery).map_err(at("TCP_INFO"))?;
        }
        if end_was_sent(self.state) {
            shutdown(fd.as_raw_fd(), Shutdown::Write).map_err(at("shutdown"))?;
        }
        if self.shut_for_reading {
            shutdown(fd.as_raw_fd(), Shutdown::Read).map_err(at("shutdown"))?;
        }
        if end_was_received(self.state) && self.state != LAST_ACK {
            delivery.say(end_of_stream(&self.flow, self.next, self.oldest, self.window));
        }
        Ok(())
    }

    /// Lets the end of what the peer sends arrive before this end says its own.
    fn have_end(&self, delivery: &Delivery) -> Result<(), Errno> {
        delivery.say(end_of_stream(&self.flow, self.next, self.oldest, self.window));
        for _ in 0..LOOKS {
            let state = socket_option(self.socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, INFO_SIZE)?;
            if state.first() == Some(&CLOSE_WAIT) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // What the peer hears is the same.
        tracing::warn!(connection = name(&self.flow), "both ends close it at the same time, where its peer was first");
        Ok(())
    }

    /// Lets the urgent byte arrive, still in repair mode, and puts what comes behind it into the queue.
    fn have_urgent(&self, urgent: &Urgent, delivery: &Delivery) -> Result<(), (&'static str, Errno)> {
        let at = |what: &'static str| move |errno| (what, errno);
        let fd = self.socket.as_fd();
        let (&first, behind) = urgent.bytes.split_first().ok_or(("its urgent byte", Errno::EINVAL))?;
        set(fd, TCP_REPAIR_QUEUE, RECEIVE_QUEUE).map_err(at("TCP_REPAIR_QUEUE"))?;
        let next = || super::get(fd, TCP_QUEUE_SEQ).map_err(at("TCP_QUEUE_SEQ"));
        delivery.say(urgent_byte(&self.flow, urgent.sequence, self.oldest, self.window, first));
        let mut looks = 0;
        while next()? == urgent.sequence && looks < LOOKS {
            std::thread::sleep(Duration::from_millis(1));
            looks += 1;
        }
        let is_there = next()? != urgent.sequence;
        if !is_there {
            tracing::warn!(connection = name(&self.flow), "an urgent byte is read as an ordinary one");
        }
        fill(fd, if is_there { behind } else { &urgent.bytes }).map_err(at("filling a queue"))?;
        if is_there && urgent.was_read {
            recv(fd.as_raw_fd(), &mut [0], MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT).map_err(at("MSG_OOB"))?;
        }
        settle_receiver(fd, urgent.receive_buffer, urgent.window)
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
