//! Sockets of any family (socket(2)), messages with all that comes with them (recvmsg(2)), and filters of packets (socket(7)).

use crate::check;
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Instructions of a classic filter, at most (`BPF_MAXINSNS`).
pub const MAX_FILTER: usize = 4096;

/// Makes a socket, closed on exec.
///
/// # Errors
/// `EAFNOSUPPORT`, `EPROTONOSUPPORT` or `ESOCKTNOSUPPORT` when this host has none of the kind.
pub fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    let made = check(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) }.into())?;
    // SAFETY: the kernel has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(made as i32) })
}

/// What came with a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Its bytes in the buffer.
    pub length: usize,
    /// Whether it was longer than the buffer.
    pub was_cut: bool,
    /// Its sender: a sockaddr.
    pub name: Vec<u8>,
    /// Control messages: level, type, bytes (cmsg(3)).
    pub control: Vec<(i32, i32, Vec<u8>)>,
}

/// Receives one message (recvmsg(2)) into `buffer`.
///
/// # Errors
/// `EAGAIN` with `MSG_DONTWAIT` when there is none.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> Result<Received, Errno> {
    // Words, so that they are aligned as control messages are.
    let mut control = [0u64; 128];
    let mut name = [0u64; 16];
    let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a msghdr of zeros has no pointers that count.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = size_of_val(&name) as libc::socklen_t;
    header.msg_iov = &raw mut piece;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: name, buffer and control are as long as the header says, and outlive the call.
    let length = check(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) } as libc::c_long)?;
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    let mut name = bytes(&name);
    name.truncate(header.msg_namelen as usize);
    let mut control = bytes(&control);
    control.truncate(header.msg_controllen);
    Ok(Received {
        length: length as usize,
        was_cut: header.msg_flags & libc::MSG_TRUNC != 0,
        name,
        control: split_control(&control),
    })
}

/// Splits control messages, each a length (with these 16 bytes), a level, a type and bytes, aligned to words.
fn split_control(mut rest: &[u8]) -> Vec<(i32, i32, Vec<u8>)> {
    const HEADER: usize = 16;
    let mut messages = Vec::new();
    while let Some((head, _)) = rest.split_first_chunk::<HEADER>() {
        let word = |at: usize| i32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let length = word(0) as usize;
        let Some(bytes) = rest.get(HEADER..length) else { break };
        messages.push((word(8), word(12), bytes.to_vec()));
        rest = rest.get(length.next_multiple_of(8)..).unwrap_or_default();
    }
    messages
}

/// Reads the classic filter that is attached to a socket, one instruction a word; empty where there is none
/// (`SO_GET_FILTER`, Linux 3.8).
///
/// # Errors
/// `EACCES` when it is an eBPF program.
pub fn classic_filter(socket: BorrowedFd<'_>) -> Result<Vec<u64>, Errno> {
    // N.B. counted in instructions, not in bytes; with none the kernel only says how many there are.
    let read = |program: &mut [u64]| {
        let mut length = program.len() as libc::socklen_t;
        let (level, name) = (libc::SOL_SOCKET, libc::SO_GET_FILTER);
        // SAFETY: the kernel writes at most `length` instructions of eight bytes.
        let done =
            unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, program.as_mut_ptr().cast(), &raw mut length) };
        check(done.into()).map(|_| (length as usize).min(MAX_FILTER))
    };
    let mut program = vec![0; read(&mut [])?];
    if !program.is_empty() {
        let length = read(&mut program)?;
        program.truncate(length);
    }
    Ok(program)
}

/// Asks about a socket option whose value says what is asked (getsockopt(2)); returns the length of the answer in `value`.
///
/// # Errors
/// As getsockopt(2).
pub fn query_option(socket: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> Result<usize, Errno> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads and writes at most `length` bytes and updates it.
    let done = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut length) };
    check(done.into())?;
    Ok((length as usize).min(value.len()))
}

/// Attaches a classic filter to a socket, in the place of any other; the instructions are one a word.
///
/// # Errors
/// `EINVAL` when it is not a sound program, `EPERM` when a filter is locked.
pub fn attach_filter(socket: BorrowedFd<'_>, program: &[u64]) -> Result<(), Errno> {
    if program.is_empty() || program.len() > MAX_FILTER {
        return Err(Errno::EINVAL);
    }
    const _: () = assert!(size_of::<libc::sock_filter>() == 8);
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut().cast() };
    let length = size_of::<libc::sock_fprog>() as libc::socklen_t;
    let (level, name) = (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER);
    // SAFETY: the kernel copies the program, `len` instructions of eight bytes, and does not write to it.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const filter).cast(), length) };
    check(done.into()).map(drop)
}

/// One instruction of a classic filter as a word.
#[must_use]
pub const fn instruction(code: u32, if_true: u8, if_false: u8, k: u32) -> u64 {
    // Fields in memory order: code, two jumps, k.
    (code as u64 & 0xffff) | (if_true as u64) << 16 | (if_false as u64) << 24 | (k as u64) << 32
}

/// Binds a socket to an address that is given as a whole sockaddr.
///
/// # Errors
/// As bind(2).
pub fn bind(socket: BorrowedFd<'_>, address: &[u8]) -> Result<(), Errno> {
    let length = address.len() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes.
    check(unsafe { libc::bind(socket.as_raw_fd(), address.as_ptr().cast(), length) }.into()).map(drop)
}

/// The address that a socket is bound to, as a whole sockaddr (getsockname(2)).
///
/// # Errors
/// As getsockname(2).
pub fn bound_address(socket: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let mut address = [0u8; 128];
    let mut length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes and updates it.
    check(unsafe { libc::getsockname(socket.as_raw_fd(), address.as_mut_ptr().cast(), &raw mut length) }.into())?;
    Ok(address[..(length as usize).min(address.len())].to_vec())
}

/// Returns the bytes that a socket was given to send and that are still in its host (`SIOCOUTQ`).
///
/// # Errors
/// When sockets of this kind do not tell.
pub fn unsent_bytes(socket: BorrowedFd<'_>) -> Result<usize, Errno> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request writes one int.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) }.into())?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    #[test]
    fn a_filter_comes_out_as_it_went_in() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(classic_filter(socket.as_fd()), Ok(vec![]));
        let program = [instruction(0x06, 0, 0, 0x1234)];
        attach_filter(socket.as_fd(), &program).unwrap();
        assert_eq!(classic_filter(socket.as_fd()), Ok(program.to_vec()));
        assert_eq!(attach_filter(socket.as_fd(), &[]), Err(Errno::EINVAL));
    }

    #[test]
    fn a_message_comes_with_its_sender() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(b"four", socket.local_addr().unwrap()).unwrap();
        let mut buffer = [0; 3];
        let received = receive(socket.as_fd(), &mut buffer, libc::MSG_PEEK | libc::MSG_TRUNC).unwrap();
        assert!(received.was_cut && received.name.len() == 16, "{received:?}");
        assert_eq!(bound_address(socket.as_fd()).unwrap(), received.name);
    }

    #[test]
    fn nonsense_among_control_messages_ends_them() {
        assert_eq!(split_control(&[3; 40]), []);
        assert_eq!(split_control(&[0; 16]), []);
    }
}
