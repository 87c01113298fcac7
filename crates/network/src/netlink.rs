//! Questions to the kernel over netlink(7): one at a time, each waits for its answer.

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr};

use crate::error::{Error, Result};
use crate::nftables::Batch;
use godwit_kernel::Errno;
use godwit_kernel::descriptors::set_socket_option;
use std::os::fd::AsFd;

/// What acknowledges a message, or refuses it: `NLMSG_ERROR`, with the negated errno behind the header.
const ERROR: u16 = 2;
/// What ends a list: `NLMSG_DONE`.
const DONE: u16 = 3;
const HEADER: usize = 16;
/// Where in it the sequence number is.
const SEQUENCE: usize = 8;
/// Asks for an acknowledgement.
pub(crate) const ACKNOWLEDGE: u16 = NLM_F_ACK;
/// Bytes that any socket takes at once.
const FITS: usize = 64 << 10;

/// Opens a netlink socket of a protocol and connects it to the kernel.
pub(crate) fn open(protocol: isize) -> Result<Socket> {
    let failed = |what| move |source: std::io::Error| Error::io("netlink", what, &source);
    let mut socket = Socket::new(protocol).map_err(failed("opening a socket"))?;
    socket.bind_auto().map_err(failed("binding"))?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(failed("connecting"))?;
    Ok(socket)
}

/// Sends messages that are encoded already, and waits for an acknowledgement of each of `sequences`.
pub(crate) fn transact(socket: &Socket, bytes: &[u8], sequences: &[u32]) -> Result<(), Errno> {
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    if bytes.len() > FITS {
        make_room(socket, bytes.len())?;
    }
    socket.send(bytes, 0).map_err(errno)?;
    let mut waiting = sequences.len();
    while waiting > 0 {
        let (answer, _) = socket.recv_from_full().map_err(errno)?;
        let mut rest = answer.as_slice();
        while rest.len() >= HEADER {
            let Ok(message) = NetlinkBuffer::new_checked(rest) else { return Err(Errno::EBADMSG) };
            let length = (message.length() as usize).max(HEADER);
            if message.message_type() == ERROR {
                let code = rest.get(HEADER..HEADER + 4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
                match code {
                    Some(0) if sequences.contains(&message.sequence_number()) => waiting -= 1,
                    Some(0) => {}
                    Some(code) => return Err(Errno::from_raw(-code)),
                    None => return Err(Errno::EBADMSG),
                }
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
    Ok(())
}

/// Sends a batch of any length, of which only the end is acknowledged.
pub(crate) fn transact_long(socket: &Socket, mut batch: Batch) -> Result<(), Errno> {
    batch.acknowledge_last();
    let (bytes, sequences) = batch.finish();
    transact(socket, &bytes, &sequences)
}

/// Has a socket take so many bytes at once, whatever the host's limits are (`SO_SNDBUFFORCE`, socket(7)), and answers to them.
fn make_room(socket: &Socket, bytes: usize) -> Result<(), Errno> {
    let room = i32::try_from(bytes * 2).unwrap_or(i32::MAX).max(1 << 20);
    for name in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
        set_socket_option(socket.as_fd(), libc::SOL_SOCKET, name, &room.to_ne_bytes())?;
    }
    Ok(())
}

/// A message as the kernel told it: what kind it is, and everything behind its first header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) kind: u16,
    pub(crate) content: Vec<u8>,
}

pub(crate) fn encode(kind: u16, flags: u16, content: &[u8]) -> Vec<u8> {
    let mut bytes = ((HEADER + content.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend(1u32.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(content);
    bytes
}

/// Has the kernel list everything that answers to a question.
///
/// # Errors
/// What the kernel answers; `EAGAIN` when the list kept changing.
pub(crate) fn list(socket: &Socket, kind: u16, question: &[u8]) -> Result<Vec<Told>, Errno> {
    const ATTEMPTS: usize = 10;
    for _ in 0..ATTEMPTS {
        if let Some(told) = list_once(socket, kind, question)? {
            return Ok(told);
        }
    }
    Err(Errno::EAGAIN)
}

/// `None` when the list changed meanwhile and may lack something.
fn list_once(socket: &Socket, kind: u16, question: &[u8]) -> Result<Option<Vec<Told>>, Errno> {
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    socket.send(&encode(kind, NLM_F_DUMP, question), 0).map_err(errno)?;
    let (mut told, mut whole) = (Vec::new(), true);
    loop {
        let (answer, _) = socket.recv_from_full().map_err(errno)?;
        let mut rest = answer.as_slice();
        while rest.len() >= HEADER {
            let message = NetlinkBuffer::new_checked(rest).map_err(|_| Errno::EBADMSG)?;
            let length = (message.length() as usize).max(HEADER);
            let content = rest.get(HEADER..length).unwrap_or_default();
            whole &= message.flags() & NLM_F_DUMP_INTR == 0;
            match message.message_type() {
                DONE => return Ok(whole.then_some(told)),
                ERROR => {
                    let code = content.get(..4).and_then(|code| code.try_into().ok()).map_or(0, i32::from_ne_bytes);
                    return Err(Errno::from_raw(-code));
                }
                kind => told.push(Told { kind, content: content.to_vec() }),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// Asks for one thing.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn ask_one(socket: &Socket, kind: u16, question: &[u8]) -> Result<Told, Errno> {
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    socket.send(&encode(kind, 0, question), 0).map_err(errno)?;
    let (answer, _) = socket.recv_from_full().map_err(errno)?;
    let message = NetlinkBuffer::new_checked(answer.as_slice()).map_err(|_| Errno::EBADMSG)?;
    let content = answer.get(HEADER..message.length() as usize).unwrap_or_default();
    match (message.message_type(), content.get(..4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes)) {
        (ERROR, Some(code)) if code != 0 => Err(Errno::from_raw(-code)),
        (kind, _) => Ok(Told { kind, content: content.to_vec() }),
    }
}

/// Tells the kernel one thing and waits until it is done.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn tell(socket: &Socket, kind: u16, flags: u16, content: &[u8]) -> Result<(), Errno> {
    transact(socket, &encode(kind, flags | NLM_F_ACK, content), &[1])
}

/// Tells the kernel many things of one kind; gives what it answers to each.
pub(crate) fn tell_all(socket: &Socket, kind: u16, flags: u16, contents: &[Vec<u8>]) -> Vec<Result<(), Errno>> {
    /// So many answers any socket takes, with what they answer to.
    const AT_ONCE: usize = 64;
    let mut results = Vec::with_capacity(contents.len());
    for contents in contents.chunks(AT_ONCE) {
        let from = results.len();
        // What is not answered is not done.
        results.resize(from + contents.len(), Err(Errno::EIO));
        if let Err(errno) = tell_some(socket, kind, flags, contents, &mut results[from..]) {
            tracing::debug!(%errno, "the kernel is not told everything");
        }
    }
    results
}

fn tell_some(
    socket: &Socket,
    kind: u16,
    flags: u16,
    contents: &[Vec<u8>],
    results: &mut [Result<(), Errno>],
) -> Result<(), Errno> {
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    let mut bytes = Vec::new();
    for (at, content) in contents.iter().enumerate() {
        let start = bytes.len();
        bytes.extend(encode(kind, flags | NLM_F_ACK, content));
        bytes[start + SEQUENCE..start + SEQUENCE + 4].copy_from_slice(&(at as u32).to_ne_bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    if bytes.len() > FITS {
        make_room(socket, bytes.len())?;
    }
    socket.send(&bytes, 0).map_err(errno)?;
    let mut waiting = contents.len();
    while waiting > 0 {
        let (answer, _) = socket.recv_from_full().map_err(errno)?;
        let mut rest = answer.as_slice();
        while rest.len() >= HEADER {
            let message = NetlinkBuffer::new_checked(rest).map_err(|_| Errno::EBADMSG)?;
            let length = (message.length() as usize).max(HEADER);
            let code = rest.get(HEADER..HEADER + 4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
            if message.message_type() == ERROR
                && let Some(result) = results.get_mut(message.sequence_number() as usize)
            {
                *result = match code {
                    Some(0) => Ok(()),
                    Some(code) => Err(Errno::from_raw(-code)),
                    None => Err(Errno::EBADMSG),
                };
                waiting = waiting.saturating_sub(1);
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
    Ok(())
}

/// Asks routing netlink (rtnetlink(7)) something and collects the answers.
pub(crate) fn ask(
    socket: &Socket,
    message: RouteNetlinkMessage,
    flags: u16,
) -> Result<Vec<RouteNetlinkMessage>, Errno> {
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | flags;
    request.header.sequence_number = 1;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0).map_err(errno)?;
    let mut answers = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full().map_err(errno)?;
        let mut rest = answer.as_slice();
        while rest.len() >= HEADER {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(|_| Errno::EBADMSG)?;
            let length = (message.header.length as usize).max(HEADER);
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(answers),
                NetlinkPayload::Error(error) => {
                    return error.code.map_or(Ok(answers), |code| Err(Errno::from_raw(-code.get())));
                }
                NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                _ => {}
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
