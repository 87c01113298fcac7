//! Sockets between virtual machines and their host (vsock(7)): those without a connection, listening or not.

use super::kind::{integer_option, refuse};
use super::table::Entry;
use super::{datagram_queue, event, filter, socket_options};
use crate::{Error, Result};
use godwit_kernel::socket::socket;
use godwit_proto::image::{FdTypes, FileEntry, VsockSkEntry};
use nix::sys::socket::{Backlog, VsockAddr, bind, getpeername, getsockname, listen};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// `VMADDR_CID_ANY`, `VMADDR_CID_LOCAL`.
const ANY: u32 = u32::MAX;
const LOCAL: u32 = 1;
/// `VMADDR_PORT_ANY`.
const NO_PORT: u32 = u32::MAX;

/// What there is to know of such a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vsock {
    kind: i32,
    cid: u32,
    port: u32,
    listening: bool,
}

/// Reads what there is to know.
pub(crate) fn examine(entry: &Entry, kind: i32) -> Result<Vsock> {
    let own: VsockAddr = getsockname(entry.file.as_raw_fd()).map_err(entry.error("getsockname"))?;
    let listening = integer_option(entry, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)? != 0;
    Ok(Vsock { kind, cid: own.cid(), port: own.port(), listening })
}

/// Refuses what cannot be moved.
pub(crate) fn verdict(entry: &Entry, vsock: &Vsock, may_have_waiting: bool) -> Result<()> {
    let what = format!("vsock socket {}:{}", vsock.cid, vsock.port);
    if getpeername::<VsockAddr>(entry.file.as_raw_fd()).is_ok() {
        return refuse(entry, &what, "its connection leads to the virtual machine's host, or to one of its machines");
    }
    if vsock.port != NO_PORT && !matches!(vsock.cid, ANY | LOCAL) {
        return refuse(entry, &what, "it is bound to the number of this machine (CID)");
    }
    if vsock.listening && !may_have_waiting && datagram_queue::is_readable(entry) {
        return refuse(entry, &what, "connections wait to be accepted");
    }
    Ok(())
}

impl Vsock {
    /// What the destination must have: a free port.
    pub(crate) fn needs(&self) -> Option<String> {
        (self.port != NO_PORT).then(|| format!("vsock:{}:{}", self.cid, self.port))
    }
}

/// Collects a socket.
pub(crate) fn collect(entry: &Entry, vsock: &Vsock, id: u32) -> Result<FileEntry> {
    let (options, _) = socket_options::collect(entry, socket_options::Sort::Vsock)?;
    let message = VsockSkEntry {
        id,
        r#type: vsock.kind as u32,
        flags: entry.info.status_flags() as u32,
        cid: vsock.cid,
        port: vsock.port,
        listening: vsock.listening,
        options: options.unpack(),
    };
    Ok(FileEntry { r#type: FdTypes::Vsocksk as i32, id, vsk: Some(message.into()), ..FileEntry::default() })
}

/// Makes a socket again. How many connections may wait in it nobody can ask: as many as the host allows.
///
/// # Errors
/// `EADDRINUSE` when its port is taken here, `EAFNOSUPPORT` where there are no such sockets.
pub(crate) fn rebuild(message: &VsockSkEntry) -> Result<OwnedFd> {
    let name = format!("vsock socket {}:{}", message.cid, message.port);
    let failed = |what| {
        let name = name.clone();
        move |source| Error::call(name, what, source)
    };
    let made = socket(libc::AF_VSOCK, message.r#type as i32, 0).map_err(failed("socket"))?;
    socket_options::apply(made.as_fd(), &message.options, &name)?;
    filter::settle(made.as_fd(), &[], &message.options).map_err(failed("SO_LOCK_FILTER"))?;
    if message.port != NO_PORT {
        bind(made.as_raw_fd(), &VsockAddr::new(message.cid, message.port)).map_err(failed("bind"))?;
    }
    if message.listening {
        listen(&made, Backlog::MAXCONN).map_err(failed("listen"))?;
    }
    event::set_status(&made, message.flags).map_err(failed("F_SETFL"))?;
    Ok(made)
}

/// Whether a port is free here, for the probe; the errno says why not.
pub(crate) fn try_port(cid: u32, port: u32) -> nix::Result<()> {
    let probe = socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?;
    bind(probe.as_raw_fd(), &VsockAddr::new(cid, port))
}
