//! Taking connections apart: what there is to know of each, read in repair mode.

use super::{
    Connections, INFO_SIZE, OPTION_TIMESTAMPS, RECEIVE_QUEUE, REPAIR_ON, SEND_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR,
    TCP_REPAIR_QUEUE, TCP_REPAIR_WINDOW, TCP_TIMESTAMP, WINDOW_SIZE, end_was_received, end_was_sent, get,
    is_connection, set, state::SYN_SENT,
};
use crate::descriptors::kind::refuse;
use crate::descriptors::listener::{self, Inet};
use crate::descriptors::socket_options::Packed;
use crate::descriptors::table;
use crate::{Error, Result, parallel};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{
    is_shut_for_reading, readable_bytes, set_socket_option, socket_option, unacknowledged_bytes,
};
use godwit_proto::image::{InetSkEntry, TcpStreamEntry};
use godwit_proto::wire::{OptionSet, StreamContent, Streams};
use nix::sys::socket::{MsgFlags, recv};
use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// A connection that is to be taken apart.
#[derive(Debug)]
pub(crate) struct Candidate<'a> {
    pub(crate) entry: &'a table::Entry,
    pub(crate) inet: Inet,
    pub(crate) id: u32,
}

/// A connection that was taken apart.
struct Parts {
    socket: InetSkEntry,
    options: Arc<Packed>,
    stream: StreamContent,
    round_trip: Duration,
}

/// Takes connections of process `owner` apart: their sockets, and what is in them. From here on they are in repair mode.
pub(crate) fn collect(
    candidates: &[Candidate<'_>],
    connections: &mut Connections,
    owner: i32,
) -> Result<(Vec<InetSkEntry>, Streams)> {
    // N.B. all of them before the first changes.
    candidates.iter().try_for_each(|candidate| connections.note(candidate.entry))?;
    connections.protect(owner)?;
    let mut sets: HashMap<Arc<Packed>, u32> = HashMap::new();
    let mut last: Option<(Arc<Packed>, u32)> = None;
    let mut sockets = Vec::with_capacity(candidates.len());
    let mut streams = Streams { streams: Vec::with_capacity(candidates.len()), ..Streams::default() };
    for parts in parallel::map(candidates, collect_one) {
        let Parts { socket, options, mut stream, round_trip } = parts?;
        connections.round_trip = connections.round_trip.max(round_trip);
        stream.option_set = match &last {
            Some((same, set)) if Arc::ptr_eq(same, &options) => *set,
            _ => {
                let next = sets.len() as u32;
                let set = *sets.entry(Arc::clone(&options)).or_insert_with_key(|options| {
                    streams.option_sets.push(OptionSet { options: options.unpack() });
                    next
                });
                last = Some((options, set));
                set
            }
        };
        sockets.push(socket);
        streams.streams.push(stream);
    }
    Ok((sockets, streams))
}

thread_local! {
    /// The options that this thread has read last: most connections have the same.
    static LAST: RefCell<Arc<Packed>> = RefCell::default();
}

fn shared(options: Packed) -> Arc<Packed> {
    LAST.with_borrow_mut(|last| {
        if **last != options {
            *last = Arc::new(options);
        }
        Arc::clone(last)
    })
}

fn collect_one(candidate: &Candidate<'_>) -> Result<Parts> {
    let Candidate { entry, ref inet, id } = *candidate;
    // N.B. the options first: some say other things in repair mode.
    let (mut socket, options) = listener::describe(entry, inet, id)?;
    let options = shared(options);
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
