//! Taking connections apart: what there is to know of each, read in repair mode.

use super::{
    Connections, INFO_SIZE, OPTION_TIMESTAMPS, RECEIVE_QUEUE, REPAIR_ON, SEND_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR,
    TCP_REPAIR_QUEUE, TCP_TIMESTAMP, Window, can_look_behind, end_was_received, end_was_sent, get, is_connection,
    refuse_urgent, set, state::SYN_SENT, urgent_waits,
};
use crate::descriptors::early_connections::EarlyConnections;
use crate::descriptors::kind::refuse;
use crate::descriptors::listener::{self, Inet};
use crate::descriptors::socket_options::{Options, Packed};
use crate::descriptors::table;
use crate::{Error, Result, parallel};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{
    is_at_urgent_mark, is_shut_for_reading, readable_bytes, set_socket_option, socket_option, unacknowledged_bytes,
};
use godwit_network::MARK;
use godwit_proto::image::{SkOptsEntry, TcpStreamEntry};
use godwit_proto::wire::{StreamContent, Streams};
use nix::sys::socket::{MsgFlags, recv};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// Connections that are told of in one message: while they are put together, the next ones are taken apart.
const AT_ONCE: usize = 256;

/// A connection that is to be taken apart.
#[derive(Debug)]
pub(crate) struct Candidate<'a> {
    pub(crate) entry: &'a table::Entry,
    pub(crate) inet: Inet,
    pub(crate) id: u32,
}

/// What is read before repair mode.
struct Described {
    basic: SkOptsEntry,
    options: Arc<Packed>,
    /// The number under which it is expected, if it is still like that.
    expected: Option<u32>,
}

/// What is read in repair mode.
struct Parts {
    state: u8,
    shut_for_reading: bool,
    stream: StreamContent,
    round_trip: Duration,
}

/// Takes connections apart and tells of them, some at a time: their sockets, and what is in them. From here on they are in repair mode.
pub(crate) fn collect(
    candidates: &[Candidate<'_>],
    early: &EarlyConnections,
    connections: &mut Connections,
    tell: &mut dyn FnMut(Streams),
) -> Result<()> {
    for Candidate { entry, .. } in candidates {
        connections.note(entry, early.reuse(entry)?);
    }
    connections.protect()?;
    let mut sets = early.sets().clone();
    for candidates in candidates.chunks(AT_ONCE) {
        let collected = parallel::map(candidates, |candidate| {
            // N.B. the options first: some say other things in repair mode.
            let described = describe(candidate, early)?;
            collect_one(candidate, &described).map(|parts| (described, parts))
        });
        let mut message = Streams { streams: Vec::with_capacity(candidates.len()), ..Streams::default() };
        for (candidate, collected) in candidates.iter().zip(collected) {
            let (described, Parts { state, shut_for_reading, mut stream, round_trip }) = collected?;
            connections.round_trip = connections.round_trip.max(round_trip);
            stream.option_set = sets.number(&described.options, &mut message.option_sets);
            match described.expected.filter(|_| state == candidate.inet.state && !shut_for_reading) {
                Some(number) => stream.expected = number,
                None => {
                    let Candidate { entry, ref inet, id } = *candidate;
                    let mut socket = listener::describe(entry, inet, id, described.basic)?;
                    socket.state = state.into();
                    if shut_for_reading {
                        socket.set_shutdown(godwit_proto::image::SkShutdown::Read);
                    }
                    message.sockets.push(socket);
                }
            }
            message.streams.push(stream);
        }
        tell(message);
    }
    Ok(())
}

fn describe(candidate: &Candidate<'_>, early: &EarlyConnections) -> Result<Described> {
    let Candidate { entry, ref inet, .. } = *candidate;
    let options = early.of(entry)?.map_or_else(|| Options::read(entry, inet.family()), Ok)?;
    let expected = early.known(&entry.stat).and_then(|known| known.number_if_same(entry, inet, &options.basic));
    let Options { packed: options, basic, .. } = options;
    Ok(Described { basic, options, expected })
}

fn collect_one(candidate: &Candidate<'_>, described: &Described) -> Result<Parts> {
    let Candidate { entry, id, .. } = *candidate;
    // N.B. the program itself may have said so (shutdown(2)).
    let shut = is_shut_for_reading(entry.file.as_fd()).map_err(entry.error("poll"))?;
    let (waiting, urgent) =
        Urgent::find(entry.file.as_fd(), &described.options).map_err(entry.error("looking for urgent data"))?;
    if urgent.is_some_and(|urgent| urgent.before > 0) && !can_look_behind(entry.file.as_fd()) {
        return refuse_urgent(entry);
    }
    set(entry.file.as_fd(), TCP_REPAIR, REPAIR_ON).map_err(entry.error("TCP_REPAIR"))?;
    // N.B. now: a packet may have come between the first look and the moment from which on they are held back.
    let info = socket_option(entry.file.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, INFO_SIZE)
        .map_err(entry.error("TCP_INFO"))?;
    let info = Info::of(&info).ok_or_else(|| Error::state(entry.name(), "TCP_INFO is too short"))?;
    if !is_connection(info.state) {
        return refuse(entry, &format!("TCP connection {}", listener::ends(entry)), "it has ended in this moment");
    }
    let stream = take_apart(entry, &info, &described.options, (waiting, urgent))
        .map_err(|(what, source)| entry.error(what)(source))?;
    Ok(Parts {
        state: info.state,
        shut_for_reading: shut && !end_was_received(info.state),
        stream: StreamContent { id, round_trip_us: info.round_trip_us, ..stream },
        round_trip: Duration::from_micros(info.round_trip_us.into()),
    })
}

/// A byte among those that wait that the peer has called urgent.
#[derive(Clone, Copy, Debug)]
struct Urgent {
    /// How many come before it.
    before: usize,
    /// How many there are, itself among them.
    all: usize,
    /// Whether it was read already, apart from the others (`MSG_OOB`).
    was_read: bool,
}

impl Urgent {
    /// Looks for it, be it one like any other (`SO_OOBINLINE`) or not, and for how many bytes wait without it. Nothing may arrive
    /// any more.
    fn find(socket: BorrowedFd<'_>, options: &Packed) -> Result<(usize, Option<Self>), Errno> {
        if readable_bytes(socket)? == 0 && !is_at_urgent_mark(socket)? {
            return Ok((0, None));
        }
        let inline = options.integer(libc::SOL_SOCKET, libc::SO_OOBINLINE).unwrap_or(0);
        // N.B. what comes behind it is counted only if it is one like any other, and it can be read apart only if it is not.
        set_inline(socket, 0)?;
        let before = readable_bytes(socket);
        let waits = urgent_waits(socket);
        set_inline(socket, 1)?;
        let all = readable_bytes(socket);
        set_inline(socket, inline)?;
        let (before, all) = (before?, all?);
        Ok((before, (before < all).then_some(Self { before, all, was_read: !waits })))
    }

    /// Reads all that waits, in two parts: reading stops in front of such a byte.
    fn peek_all(self, socket: BorrowedFd<'_>, options: &Packed) -> Result<Vec<u8>, Errno> {
        let option = |name: i32| options.integer(libc::SOL_SOCKET, name);
        set_inline(socket, 1)?;
        let read = (|| {
            let mut bytes = peek(socket, self.before)?;
            if self.before > 0 {
                set_peek_offset(socket, i32::try_from(self.before).map_err(|_| Errno::EFBIG)?)?;
            }
            bytes.append(&mut peek(socket, self.all - self.before)?);
            Ok(bytes)
        })();
        // The program may be looking further ahead; it goes on where it was.
        if self.before > 0 {
            set_peek_offset(socket, option(libc::SO_PEEK_OFF).unwrap_or(-1))?;
        }
        set_inline(socket, option(libc::SO_OOBINLINE).unwrap_or(0))?;
        read.and_then(|bytes: Vec<u8>| if bytes.len() == self.all { Ok(bytes) } else { Err(Errno::EIO) })
    }
}

fn set_inline(socket: BorrowedFd<'_>, value: i32) -> Result<(), Errno> {
    set_socket_option(socket, libc::SOL_SOCKET, libc::SO_OOBINLINE, &value.to_ne_bytes())
}

fn set_peek_offset(socket: BorrowedFd<'_>, offset: i32) -> Result<(), Errno> {
    set_socket_option(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &offset.to_ne_bytes())
}

/// What is of use in `struct tcp_info`.
struct Info {
    state: u8,
    options: u8,
    /// Window scales: the peer's in the lower four bits, our own above.
    scales: u8,
    round_trip_us: u32,
    /// Whether the peer has acknowledged all that was ever given to be sent.
    is_settled: bool,
}

impl Info {
    fn of(bytes: &[u8]) -> Option<Self> {
        const UNACKNOWLEDGED: usize = 24;
        const ROUND_TRIP: usize = 68;
        const NOT_SENT: usize = 144;
        let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        Some(Self {
            state: *bytes.first()?,
            options: *bytes.get(5)?,
            scales: *bytes.get(6)?,
            round_trip_us: word(ROUND_TRIP)?,
            // Before Linux 4.6 nothing is said of what was not sent.
            is_settled: word(UNACKNOWLEDGED)? == 0 && word(NOT_SENT) == Some(0),
        })
    }
}

fn take_apart(
    entry: &table::Entry,
    info: &Info,
    options: &Packed,
    (waiting, urgent): (usize, Option<Urgent>),
) -> Result<StreamContent, (&'static str, Errno)> {
    let socket = entry.file.as_fd();
    let at = |what: &'static str| move |errno| (what, errno);
    let mut stream = TcpStreamEntry {
        opt_mask: info.options.into(),
        snd_wscale: (info.scales & 15).into(),
        rcv_wscale: Some((info.scales >> 4).into()),
        mss_clamp: get(socket, libc::TCP_MAXSEG).map_err(at("TCP_MAXSEG"))?,
        ..TcpStreamEntry::default()
    };
    if info.options & OPTION_TIMESTAMPS != 0 {
        stream.timestamp = Some(get(socket, TCP_TIMESTAMP).map_err(at("TCP_TIMESTAMP"))?);
    }
    let choose = |queue| set(socket, TCP_REPAIR_QUEUE, queue).map_err(at("TCP_REPAIR_QUEUE"));
    let sequence = || get(socket, TCP_QUEUE_SEQ).map_err(at("TCP_QUEUE_SEQ"));
    if info.state == SYN_SENT {
        choose(SEND_QUEUE)?;
        stream.outq_seq = sequence()?;
        return Ok(StreamContent { entry: Some(stream), ..StreamContent::default() });
    }
    choose(RECEIVE_QUEUE)?;
    stream.inq_seq = sequence()?;
    let received = match (urgent, options.peek_offset()) {
        (Some(urgent), _) => urgent.peek_all(socket, options),
        (None, None) => peek(socket, waiting),
        // N.B. the program is looking further ahead; all of it has to be read, and it goes on where it was.
        (None, Some(offset)) => set_peek_offset(socket, -1).and_then(|()| {
            let received = peek(socket, waiting);
            set_peek_offset(socket, offset)?;
            received
        }),
    };
    let received = received.map_err(at("reading what was received"))?;
    // N.B. this one last: should the process run on before the socket is put right, it had better not write into its own receive
    // queue.
    choose(SEND_QUEUE)?;
    stream.outq_seq = sequence()?;
    let (sent, unsent) = if info.is_settled {
        (Vec::new(), 0)
    } else {
        let (unacknowledged, unsent) = unacknowledged_bytes(socket).map_err(at("SIOCOUTQ"))?;
        (peek(socket, unacknowledged).map_err(at("reading what was sent"))?, unsent)
    };
    // The end of the stream is the last to be sent.
    let unsent = if end_was_sent(info.state) { unsent.saturating_sub(1) } else { unsent };
    (stream.inq_len, stream.outq_len) = (received.len() as u32, sent.len() as u32);
    stream.unsq_len = Some(unsent.min(sent.len()) as u32);
    let mut window = Window::read(socket).map_err(at("TCP_REPAIR_WINDOW"))?;
    if window.acknowledged != stream.inq_seq {
        if let Err(errno) = acknowledge(socket, window, options) {
            tracing::debug!(%errno, connection = entry.name(), "its peer hears late that all has been received");
        }
        window = Window::read(socket).map_err(at("TCP_REPAIR_WINDOW"))?;
    }
    (stream.snd_wl1, stream.snd_wnd) = (Some(window.sent_at), Some(window.to_send));
    stream.max_window = Some(window.largest);
    (stream.rcv_wnd, stream.rcv_wup) = (Some(window.offered), Some(window.acknowledged));
    Ok(StreamContent {
        entry: Some(stream),
        received,
        sent,
        urgent: urgent.map(|urgent| urgent.before as u32),
        urgent_was_read: urgent.is_some_and(|urgent| urgent.was_read),
        ..StreamContent::default()
    })
}

/// Has the kernel say at once what has been received, where it has put that off: no other kernel knows that it is owed, and a peer
/// may send nothing more until it hears (Nagle's algorithm), which takes it 200 ms to find out.
///
/// The kernel acknowledges early what is more than one segment, so that is what it is told to owe; what it has offered to the peer
/// stays the same.
fn acknowledge(socket: BorrowedFd<'_>, window: Window, options: &Packed) -> Result<(), Errno> {
    const NOW_AND_QUICKLY: i32 = 1;
    const NOW_ONLY: i32 = 2;
    /// More than there is in a segment.
    const MUCH: u32 = 1 << 17;
    let owing = Window {
        acknowledged: window.acknowledged.wrapping_sub(MUCH),
        offered: window.offered.saturating_add(MUCH),
        ..window
    };
    owing.set(socket)?;
    let is_quick = options.integer(libc::IPPROTO_TCP, libc::TCP_QUICKACK).unwrap_or(0) != 0;
    let mark = |mark: i32| set_socket_option(socket, libc::SOL_SOCKET, libc::SO_MARK, &mark.to_ne_bytes());
    // N.B. or it would be held back like everything else.
    mark(MARK as i32)?;
    let said = set(socket, libc::TCP_QUICKACK, if is_quick { NOW_AND_QUICKLY } else { NOW_ONLY });
    mark(options.integer(libc::SOL_SOCKET, libc::SO_MARK).unwrap_or(0))?;
    said?;
    if Window::read(socket)? == owing {
        // In this state it sends none.
        window.set(socket)?;
    }
    Ok(())
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
