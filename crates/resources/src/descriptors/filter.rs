//! Filters of packets on sockets (socket(7), `SO_ATTACH_FILTER`). A classic one can be read; an eBPF program cannot.
//!
//! A socket that is made again before its process may run has a filter of ours until then, the *gate*: what is sent to it is
//! still delivered where the process was, and forwarded, so it must not be taken here, too.

use super::kind::refuse;
use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{set_socket_option, socket_option};
use godwit_kernel::socket::{attach_filter, classic_filter, instruction};
use godwit_network::MARK;
use godwit_proto::image::SocketOption;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// `SO_LOCK_FILTER`: the filter stays for good.
pub(crate) const SO_LOCK_FILTER: i32 = 44;

/// Reads the filter of a socket; empty where there is none.
pub(crate) fn collect(entry: &Entry) -> Result<Vec<u64>> {
    match classic_filter(entry.file.as_fd()) {
        Ok(program) => Ok(program),
        Err(Errno::EACCES) => refuse(entry, &entry.target(), "an eBPF program filters its packets, and cannot be read"),
        Err(source) => Err(entry.error("SO_GET_FILTER")(source)),
    }
}

/// Gives a new socket the filter of the old one, locked if that was.
pub(crate) fn settle(socket: BorrowedFd<'_>, program: &[u64], options: &[SocketOption]) -> Result<(), Errno> {
    if !program.is_empty() {
        attach_filter(socket, program)?;
    }
    let lock = options.iter().find(|option| (option.level, option.name) == (libc::SOL_SOCKET, SO_LOCK_FILTER));
    match lock {
        Some(lock) if lock.value.iter().any(|&byte| byte != 0) => {
            set_socket_option(socket, libc::SOL_SOCKET, SO_LOCK_FILTER, &lock.value)
        }
        _ => Ok(()),
    }
}

/// A socket that takes nothing yet but what is put into it here.
#[derive(Debug)]
pub(crate) struct Gate {
    socket: OwnedFd,
    name: String,
    program: Vec<u64>,
    options: Vec<SocketOption>,
}

impl Gate {
    /// Closes the gate of a new socket. It takes what `godwit_network` delivers, and nothing else.
    pub(crate) fn close(socket: &OwnedFd, name: &str, program: &[u64], options: &[SocketOption]) -> Result<Self> {
        const OF_A_MARK: u32 = 0xffff_f000 + 20;
        let gate = [
            // A = mark of the packet; all of it if that is ours, else nothing
            instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, OF_A_MARK),
            instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, MARK),
            instruction(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
            instruction(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        ];
        let failed = |what| move |source| Error::call(name, what, source);
        attach_filter(socket.as_fd(), &gate).map_err(failed("SO_ATTACH_FILTER"))?;
        let lent = socket
            .try_clone()
            .map_err(|error| failed("duplicating it")(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE))))?;
        Ok(Self { socket: lent, name: name.to_owned(), program: program.to_vec(), options: options.to_vec() })
    }

    /// Has the socket take what it is sent.
    pub(crate) fn open(&self) -> Result<()> {
        let socket = self.socket.as_fd();
        let failed = |what| move |source| Error::call(&self.name, what, source);
        if self.program.is_empty() {
            let nothing = 0i32.to_ne_bytes();
            set_socket_option(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &nothing)
                .map_err(failed("SO_DETACH_FILTER"))?;
        }
        settle(socket, &self.program, &self.options).map_err(failed("SO_ATTACH_FILTER"))
    }
}

/// Whether the filter of a socket is locked, if that is worth being told.
pub(crate) fn lock(socket: BorrowedFd<'_>) -> Option<Vec<u8>> {
    socket_option(socket, libc::SOL_SOCKET, SO_LOCK_FILTER, 4).ok().filter(|value| value.iter().any(|&byte| byte != 0))
}
