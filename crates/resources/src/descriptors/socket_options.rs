//! Socket options as one table: read with getsockopt(2), given to the new socket where it differs.

use super::kind::integer_option;
use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{set_socket_option, socket_option};
use godwit_proto::image::{SkOptsEntry, SocketOption};
use std::os::fd::{AsFd, BorrowedFd};

/// `SO_BUF_LOCK` (Linux 5.16): which buffer sizes the program chose itself.
pub(crate) const SO_BUF_LOCK: i32 = 72;
const SNDBUF_LOCKED: i32 = 1;
const RCVBUF_LOCKED: i32 = 2;
/// Longest value of any option in the table.
const MAX_VALUE: usize = 64;

/// Options of every socket, in the order in which they are set.
const SOCKET: &[i32] = &[
    libc::SO_REUSEADDR,
    libc::SO_REUSEPORT,
    libc::SO_KEEPALIVE,
    libc::SO_OOBINLINE,
    libc::SO_DONTROUTE,
    libc::SO_BROADCAST,
    libc::SO_LINGER,
    libc::SO_RCVLOWAT,
    libc::SO_RCVTIMEO,
    libc::SO_SNDTIMEO,
    libc::SO_PASSCRED,
    libc::SO_PASSSEC,
    libc::SO_MARK,
    libc::SO_BINDTODEVICE,
    libc::SO_TIMESTAMP,
    libc::SO_TIMESTAMPNS,
    libc::SO_BUSY_POLL,
];

const IP_LEVEL: &[(i32, i32)] = &[
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (libc::IPPROTO_IP, libc::IP_MINTTL),
];

const IPV6_LEVEL: &[(i32, i32)] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
];

const TCP_LEVEL: &[(i32, i32)] = &[
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_CORK),
    (libc::IPPROTO_TCP, libc::TCP_MAXSEG),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_SYNCNT),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (libc::IPPROTO_TCP, libc::TCP_FASTOPEN),
    (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
];

/// Options one behind the other: level, name and length as native words, then the value. Many sockets have them alike, and
/// these compare faster than lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Packed(Vec<u8>);

impl Packed {
    fn push(&mut self, level: i32, name: i32, value: &[u8]) {
        for word in [level, name, value.len() as i32] {
            self.0.extend(word.to_ne_bytes());
        }
        self.0.extend(value);
    }

    /// The options in their order.
    pub(crate) fn unpack(&self) -> Vec<SocketOption> {
        let mut options = Vec::new();
        let mut rest = self.0.as_slice();
        while let Some((head, tail)) = rest.split_first_chunk::<12>() {
            let word = |at: usize| i32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            let (value, tail) = tail.split_at(word(8) as usize);
            options.push(SocketOption { level: word(0), name: word(4), value: value.to_vec() });
            rest = tail;
        }
        options
    }
}

/// Reads the options of a socket: all in one list, and those that have a field of their own once more.
pub(crate) fn collect(entry: &Entry, family: i32) -> Result<(Packed, SkOptsEntry)> {
    let mut wanted: Vec<(i32, i32)> = SOCKET.iter().map(|&name| (libc::SOL_SOCKET, name)).collect();
    if family != libc::AF_UNIX {
        wanted.extend(IP_LEVEL);
        wanted.extend(TCP_LEVEL);
    }
    if family == libc::AF_INET6 {
        wanted.extend(IPV6_LEVEL);
    }
    // N.B. last: IP_TOS changes it.
    wanted.push((libc::SOL_SOCKET, libc::SO_PRIORITY));
    let mut options = Packed::default();
    for (level, name) in wanted {
        // An option that this kernel or kind of socket does not have has no value to keep.
        if let Ok(value) = socket_option(entry.file.as_fd(), level, name, MAX_VALUE) {
            options.push(level, name, &value);
        }
    }
    let send_buffer = integer_option(entry, libc::SOL_SOCKET, libc::SO_SNDBUF)?;
    let receive_buffer = integer_option(entry, libc::SOL_SOCKET, libc::SO_RCVBUF)?;
    let lock = integer_option(entry, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(SNDBUF_LOCKED | RCVBUF_LOCKED);
    // The kernel sizes the buffers of connections itself unless told otherwise, by rules of the host.
    let sizes_itself = family != libc::AF_UNIX;
    let mut buffers = vec![];
    if !sizes_itself || lock & SNDBUF_LOCKED != 0 {
        buffers.push((libc::SO_SNDBUF, send_buffer));
    }
    if !sizes_itself || lock & RCVBUF_LOCKED != 0 {
        buffers.push((libc::SO_RCVBUF, receive_buffer));
    }
    buffers.push((SO_BUF_LOCK, lock));
    for (name, value) in buffers {
        options.push(libc::SOL_SOCKET, name, &value.to_ne_bytes());
    }
    let basic = SkOptsEntry {
        so_sndbuf: send_buffer as u32,
        so_rcvbuf: receive_buffer as u32,
        so_buf_lock: Some(lock as u32),
        ..SkOptsEntry::default()
    };
    Ok((options, basic))
}

/// Gives a new socket the options of the old one.
pub(crate) fn apply(socket: BorrowedFd<'_>, options: &[SocketOption], resource: &str) -> Result<()> {
    for option in options {
        apply_one(socket, option).map_err(|source| {
            Error::call(format!("{resource}, option {}:{}", option.level, option.name), "setsockopt", source)
        })?;
    }
    Ok(())
}

/// As [`apply`], for who has the better name for what went wrong.
pub(crate) fn apply_all(socket: BorrowedFd<'_>, options: &[SocketOption]) -> Result<(), Errno> {
    options.iter().try_for_each(|option| apply_one(socket, option))
}

/// Whether a socket has an option set to a value.
pub(crate) fn has(socket: BorrowedFd<'_>, option: &SocketOption) -> bool {
    socket_option(socket, option.level, option.name, MAX_VALUE).as_ref() == Ok(&option.value)
}

fn apply_one(socket: BorrowedFd<'_>, option: &SocketOption) -> Result<(), Errno> {
    let SocketOption { level, name, ref value } = *option;
    if has(socket, option) {
        return Ok(());
    }
    if level == libc::SOL_SOCKET && matches!(name, libc::SO_SNDBUF | libc::SO_RCVBUF) {
        let bytes = value.as_slice().try_into().map_err(|_| Errno::EINVAL)?;
        return set_buffer(socket, name, i32::from_ne_bytes(bytes));
    }
    match set_socket_option(socket, level, name, value) {
        // Kernels before 5.16 always keep a chosen size.
        Err(Errno::ENOPROTOOPT) if level == libc::SOL_SOCKET && name == SO_BUF_LOCK => Ok(()),
        // Any other way of avoiding congestion keeps the connection going.
        Err(Errno::ENOENT) if level == libc::IPPROTO_TCP && name == libc::TCP_CONGESTION => {
            let algorithm = String::from_utf8_lossy(value);
            tracing::warn!(algorithm = algorithm.trim_end_matches('\0'), "this host has not this congestion control");
            Ok(())
        }
        outcome => outcome,
    }
}

/// Sets a buffer to the size that getsockopt(2) shall return: twice what is asked for. The limits of the host do not apply.
pub(crate) fn set_buffer(socket: BorrowedFd<'_>, name: i32, size: i32) -> Result<(), Errno> {
    let forced = if name == libc::SO_SNDBUF { libc::SO_SNDBUFFORCE } else { libc::SO_RCVBUFFORCE };
    set_socket_option(socket, libc::SOL_SOCKET, forced, &(size / 2).to_ne_bytes())
}

/// Makes room for so many bytes in the send buffer.
pub(crate) fn set_send_buffer(socket: BorrowedFd<'_>, size: i32) -> Result<(), Errno> {
    set_buffer(socket, libc::SO_SNDBUF, size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_out_again() {
        let mut packed = Packed::default();
        packed.push(1, 2, b"value");
        packed.push(-3, 4, b"");
        let option = |level, name, value: &[u8]| SocketOption { level, name, value: value.to_vec() };
        assert_eq!(packed.unpack(), [option(1, 2, b"value"), option(-3, 4, b"")]);
        assert_eq!(Packed::default().unpack(), []);
    }
}
