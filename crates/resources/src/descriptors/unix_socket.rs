//! UNIX sockets: pairs with both ends in the process or one end closed, and sockets without a peer, listening or not.
//!
//! What waits in a socket is read by peeking. A stream is peeked at in one piece; the borders of messages are found by
//! walking with `SO_PEEK_OFF`, which is put back.

use super::kind::{Context, integer_option, refuse};
use super::table::Entry;
use super::unix_diag::UnixState;
use super::{filter, socket_file, socket_options};
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{readable_bytes, set_socket_option};
use godwit_proto::image::{FdTypes, FileEntry, SkPacketEntry, UnixSkEntry};
use godwit_proto::wire::SocketContent;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, RecvMsg, Shutdown, SockFlag, SockType, UnixAddr, bind, getsockname, listen,
    recvmsg, send, shutdown, socket, socketpair,
};
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// `TCP_*` states, which UNIX sockets use too.
pub(crate) const ESTABLISHED: u8 = 1;
pub(crate) const LISTEN: u8 = 10;
/// Largest amount that may wait in one socket.
const MAX_WAITING: usize = 64 << 20;
/// Room for one message with borders.
const MAX_MESSAGE: usize = 8 << 20;
/// Room in a send buffer while what waited is put back.
const ROOM: i32 = 64 << 20;
const READING: u8 = 1;
const WRITING: u8 = 2;

/// What there is to know of a UNIX socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unix {
    kind: i32,
    pub(crate) state: UnixState,
    /// Path, or a zero byte and an abstract name, or nothing.
    pub(crate) name: Vec<u8>,
}

fn bound_name(entry: &Entry) -> Result<Vec<u8>> {
    let address: UnixAddr = getsockname(entry.file.as_raw_fd()).map_err(entry.error("getsockname"))?;
    Ok(match (address.path(), address.as_abstract()) {
        (Some(path), _) => path.as_os_str().as_encoded_bytes().to_vec(),
        (None, Some(name)) => [&[0], name].concat(),
        (None, None) => Vec::new(),
    })
}

/// Reads what there is to know of a UNIX socket.
pub(crate) fn examine(entry: &Entry, kind: i32, context: &Context) -> Result<Unix> {
    Ok(Unix { kind, state: context.diag.ask(entry.stat.st_ino as u32)?, name: bound_name(entry)? })
}

/// Refuses what cannot be moved.
pub(crate) fn verdict(entry: &Entry, unix: &Unix, context: &Context) -> Result<()> {
    let state = &unix.state;
    let what = format!("UNIX socket {}", printable(&unix.name));
    if entry.info.value("scm_fds").is_some_and(|count| count != "0") {
        return refuse(entry, &what, "descriptors are in flight in it (SCM_RIGHTS)");
    }
    if state.state == LISTEN {
        if state.waiting > 0 {
            return refuse(entry, &what, "connections wait to be accepted");
        }
        return socket_file::verdict(entry, &what, &unix.name);
    }
    if state.peer != 0 {
        return paired(entry, unix, context, &what);
    }
    if state.waiting > 0 && state.state != ESTABLISHED {
        return refuse(entry, &what, "messages from outside wait in it");
    }
    if state.state == ESTABLISHED && !unix.name.is_empty() {
        return refuse(entry, &what, "it is what is left of a connection");
    }
    socket_file::verdict(entry, &what, &unix.name)
}

fn paired(entry: &Entry, unix: &Unix, context: &Context, what: &str) -> Result<()> {
    if !context.sockets.contains_key(&unix.state.peer) {
        return refuse(entry, what, "its other end is not one of this process's sockets, so it would be cut off");
    }
    let peer = context.diag.ask(unix.state.peer)?;
    if peer.peer != entry.stat.st_ino as u32 {
        return refuse(entry, what, "it sends to a socket that does not answer to it");
    }
    if !unix.name.is_empty() {
        return refuse(entry, what, "it is a connection, not a socket pair");
    }
    if integer_option(entry, libc::SOL_SOCKET, libc::SO_PEEK_OFF)? >= 0 {
        return refuse(entry, what, "it is read with SO_PEEK_OFF");
    }
    Ok(())
}

/// A name as people write it: `@name` when abstract.
pub(crate) fn printable(name: &[u8]) -> String {
    match name.split_first() {
        None => "without name".to_owned(),
        Some((0, rest)) => format!("@{}", String::from_utf8_lossy(rest)),
        Some(_) => String::from_utf8_lossy(name).into_owned(),
    }
}

/// Collects a socket and what waits in it.
pub(crate) fn collect(entry: &Entry, unix: &Unix, id: u32) -> Result<(FileEntry, Vec<SocketContent>)> {
    let (options, opts) = socket_options::collect(entry, socket_options::Sort::Unix)?;
    let options = options.unpack();
    let message = UnixSkEntry {
        id,
        ino: entry.stat.st_ino as u32,
        r#type: unix.kind as u32,
        state: unix.state.state.into(),
        flags: entry.info.status_flags() as u32,
        backlog: unix.state.backlog,
        peer: unix.state.peer,
        opts,
        file_perms: socket_file::permissions(entry, &unix.name)?,
        name: unix.name.clone(),
        shutdown: Some(unix.state.shutdown.into()),
        options,
        ..UnixSkEntry::default()
    };
    let content = if unix.state.state == LISTEN { Vec::new() } else { peek(entry, unix, id)? };
    let file = FileEntry { r#type: FdTypes::Unixsk as i32, id, usk: Some(message.into()), ..FileEntry::default() };
    Ok((file, content))
}

fn peek(entry: &Entry, unix: &Unix, id: u32) -> Result<Vec<SocketContent>> {
    let waiting = readable_bytes(entry.file.as_fd()).map_err(entry.error("FIONREAD"))?;
    if waiting > MAX_WAITING {
        return Err(Error::state(entry.name(), format!("{waiting} bytes wait in it")));
    }
    let content = if unix.kind == libc::SOCK_STREAM {
        peek_stream(entry, waiting)?.into_iter().collect()
    } else {
        peek_messages(entry, unix.state.shutdown)?
    };
    if !content.is_empty() && integer_option(entry, libc::SOL_SOCKET, libc::SO_PASSCRED)? != 0 {
        return refuse(entry, "UNIX socket", "messages wait in it whose sender's identity counts (SO_PASSCRED)");
    }
    Ok(content
        .into_iter()
        .map(|data| SocketContent {
            entry: Some(SkPacketEntry { id_for: id, length: data.len() as u32, scm: Vec::new() }),
            data,
            header: None,
        })
        .collect())
}

/// Looks at one message of at most `limit` bytes; `None` when there is none.
fn peek_one(entry: &Entry, limit: usize) -> Result<Option<Vec<u8>>> {
    let mut data = vec![0; limit];
    let mut control = nix::cmsg_space!([i32; 253]);
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut pieces = [IoSliceMut::new(&mut data)];
    let message: RecvMsg<'_, '_, ()> = match recvmsg(entry.file.as_raw_fd(), &mut pieces, Some(&mut control), flags) {
        Ok(message) => message,
        Err(Errno::EAGAIN) => return Ok(None),
        Err(source) => return Err(entry.error("peeking")(source)),
    };
    let length = message.bytes;
    let cut = message.flags.contains(MsgFlags::MSG_TRUNC);
    let mut has_rights = false;
    for control in message.cmsgs().map_err(entry.error("peeking"))? {
        if let nix::sys::socket::ControlMessageOwned::ScmRights(lent) = control {
            has_rights = true;
            for fd in lent {
                let _ = nix::unistd::close(fd);
            }
        }
    }
    if has_rights {
        return refuse(entry, "UNIX socket", "descriptors are in flight in it (SCM_RIGHTS)");
    }
    if cut && limit == MAX_MESSAGE {
        return Err(Error::state(entry.name(), "a message of more than 8 MiB waits in it"));
    }
    data.truncate(length);
    Ok(Some(data))
}

fn peek_stream(entry: &Entry, waiting: usize) -> Result<Option<Vec<u8>>> {
    if waiting == 0 {
        return Ok(None);
    }
    let data = peek_one(entry, waiting)?.unwrap_or_default();
    if data.len() != waiting {
        return refuse(entry, "UNIX socket", "what waits in it cannot be looked at in one piece");
    }
    Ok(Some(data))
}

fn peek_messages(entry: &Entry, shutdown: u8) -> Result<Vec<Vec<u8>>> {
    let set = |offset: i32| {
        set_socket_option(entry.file.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, &offset.to_ne_bytes())
            .map_err(entry.error("SO_PEEK_OFF"))
    };
    if peek_one(entry, 1)?.is_none() {
        return Ok(Vec::new());
    }
    set(0)?;
    let mut messages = Vec::new();
    let mut total = 0;
    let outcome = loop {
        match peek_one(entry, MAX_MESSAGE) {
            Ok(Some(message)) if message.is_empty() && shutdown & READING != 0 => break Ok(()),
            Ok(Some(message)) if message.is_empty() => {
                break Err(Error::state(entry.name(), "an empty message waits in it"));
            }
            Ok(Some(message)) => {
                total += message.len();
                messages.push(message);
                if total > MAX_WAITING {
                    break Err(Error::state(entry.name(), "too much waits in it"));
                }
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    set(-1)?;
    outcome.map(|()| messages)
}

fn sock_type(message: &UnixSkEntry) -> Result<SockType> {
    SockType::try_from(message.r#type as i32)
        .map_err(|_| Error::state("UNIX socket", format!("no socket type {}", message.r#type)))
}

fn resource(message: &UnixSkEntry) -> String {
    format!("UNIX socket {}", printable(&message.name))
}

/// Makes a socket that has no peer; a path becomes a file that appears when the returned one is settled.
pub(crate) fn rebuild_single(message: &UnixSkEntry) -> Result<(OwnedFd, Option<socket_file::SocketFile>)> {
    let failed = |what| move |source| Error::call(resource(message), what, source);
    let made =
        socket(AddressFamily::Unix, sock_type(message)?, SockFlag::SOCK_CLOEXEC, None).map_err(failed("socket"))?;
    socket_options::apply(made.as_fd(), &message.options, &resource(message))?;
    filter::settle(made.as_fd(), &message.opts.so_filter, &message.options).map_err(failed("SO_ATTACH_FILTER"))?;
    let file = match message.name.split_first() {
        None => None,
        Some((0, name)) => {
            let address = UnixAddr::new_abstract(name).map_err(failed("bind"))?;
            bind(made.as_raw_fd(), &address).map_err(failed("bind"))?;
            None
        }
        Some(_) => Some(socket_file::bind_path(&made, message)?),
    };
    if message.state == u32::from(LISTEN) {
        let backlog = i32::try_from(message.backlog).unwrap_or(i32::MAX).min(Backlog::MAXCONN.into());
        listen(&made, Backlog::new(backlog).map_err(failed("listen"))?).map_err(failed("listen"))?;
    }
    Ok((made, file))
}

/// One end of a pair that is being made.
#[derive(Debug)]
pub(crate) struct End<'a> {
    pub(crate) message: &'a UnixSkEntry,
    pub(crate) content: Vec<&'a [u8]>,
}

/// Makes a pair; of one whose other end is closed, only the first is returned.
pub(crate) fn rebuild_pair(first: &End<'_>, second: Option<&End<'_>>) -> Result<(OwnedFd, Option<OwnedFd>)> {
    let failed = |what| move |source| Error::call(resource(first.message), what, source);
    let (a, b) = socketpair(AddressFamily::Unix, sock_type(first.message)?, None, SockFlag::SOCK_CLOEXEC)
        .map_err(failed("socketpair"))?;
    put_back(&b, &first.content).map_err(failed("putting back what waited"))?;
    if let Some(second) = second {
        put_back(&a, &second.content).map_err(failed("putting back what waited"))?;
    }
    let finish = |end: &OwnedFd, message: &UnixSkEntry| {
        socket_options::apply(end.as_fd(), &message.options, &resource(message))?;
        filter::settle(end.as_fd(), &message.opts.so_filter, &message.options).map_err(failed("SO_ATTACH_FILTER"))
    };
    finish(&a, first.message)?;
    let Some(second) = second else { return Ok((a, None)) };
    finish(&b, second.message)?;
    shut_down(&a, first.message).map_err(failed("shutdown"))?;
    shut_down(&b, second.message).map_err(failed("shutdown"))?;
    Ok((a, Some(b)))
}

fn put_back(sender: &OwnedFd, content: &[&[u8]]) -> Result<(), Errno> {
    if content.is_empty() {
        return Ok(());
    }
    socket_options::set_send_buffer(sender.as_fd(), ROOM)?;
    for message in content {
        let mut rest = *message;
        while !rest.is_empty() {
            let sent = send(sender.as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?;
            rest = &rest[sent..];
        }
    }
    Ok(())
}

fn shut_down(end: &OwnedFd, message: &UnixSkEntry) -> Result<(), Errno> {
    let bits = message.shutdown.unwrap_or(0) as u8;
    if bits & WRITING != 0 {
        shutdown(end.as_raw_fd(), Shutdown::Write)?;
    }
    if bits & READING != 0 {
        shutdown(end.as_raw_fd(), Shutdown::Read)?;
    }
    Ok(())
}
