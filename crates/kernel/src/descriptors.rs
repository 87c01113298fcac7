//! ioctls and options of descriptors that neither std nor nix names.

use crate::check;
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Sets the number of expirations that the next read of a timerfd returns (`TFD_IOC_SET_TICKS`, Linux 3.17).
pub fn set_timer_ticks(fd: BorrowedFd<'_>, ticks: u64) -> Result<(), Errno> {
    const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;
    // SAFETY: the request reads eight bytes.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) }.into()).map(drop)
}

/// Chooses the watch descriptor that the next inotify_add_watch(2) returns (`INOTIFY_IOC_SETNEXTWD`, Linux 4.16).
pub fn set_next_watch(fd: BorrowedFd<'_>, watch: i32) -> Result<(), Errno> {
    const INOTIFY_IOC_SETNEXTWD: u64 = 0x4004_4900;
    // SAFETY: the argument is the number itself.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), INOTIFY_IOC_SETNEXTWD, i64::from(watch)) }.into()).map(drop)
}

/// Returns the number of bytes that wait to be read (`FIONREAD`).
pub fn readable_bytes(fd: BorrowedFd<'_>) -> Result<usize, Errno> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut bytes) }.into())?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Tells whether the next byte to be read from a TCP socket is one that its peer has called urgent (`SIOCATMARK`, tcp(7)).
pub fn is_at_urgent_mark(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    const SIOCATMARK: u64 = 0x8905;
    let mut answer: libc::c_int = 0;
    // SAFETY: the request writes one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), SIOCATMARK, &raw mut answer) }.into())?;
    Ok(answer != 0)
}

/// Returns how much of a TCP socket's send queue was not acknowledged (`SIOCOUTQ`), and how much of that was not even sent
/// (`SIOCOUTQNSD`); an end of the stream counts as a byte (tcp(7)).
pub fn unacknowledged_bytes(fd: BorrowedFd<'_>) -> Result<(usize, usize), Errno> {
    const SIOCOUTQNSD: u64 = 0x894b;
    let (mut all, mut unsent): (libc::c_int, libc::c_int) = (0, 0);
    // SAFETY: the request writes one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut all) }.into())?;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), SIOCOUTQNSD, &raw mut unsent) }.into())?;
    Ok((usize::try_from(all).unwrap_or(0), usize::try_from(unsent).unwrap_or(0)))
}

/// Opens the file that a UNIX socket is bound to (`SIOCUNIXFILE`, Linux 4.20).
///
/// # Errors
/// `ENOENT` when it is not bound to a file.
pub fn unix_socket_file(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    const SIOCUNIXFILE: u64 = 0x89e0;
    // SAFETY: the request takes no argument.
    let file = check(unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE) }.into())?;
    // SAFETY: the kernel has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(file as i32) })
}

/// Reads a socket option as raw bytes (getsockopt(2)), at most 256 of them.
pub fn socket_option(fd: BorrowedFd<'_>, level: i32, name: i32, limit: usize) -> Result<Vec<u8>, Errno> {
    const MOST: usize = 256;
    let mut value = [0u8; MOST];
    let length = read_socket_option(fd, level, name, &mut value[..limit.min(MOST)])?;
    Ok(value[..length].to_vec())
}

/// As [`socket_option`], into memory that is there already; returns the length of the value.
pub fn read_socket_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> Result<usize, Errno> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes and updates it.
    let done = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut length) };
    check(done.into())?;
    Ok((length as usize).min(value.len()))
}

/// Reads a socket option that is one int.
///
/// # Errors
/// As getsockopt(2); `EBADMSG` when it is none.
pub fn socket_integer(fd: BorrowedFd<'_>, level: i32, name: i32) -> Result<i32, Errno> {
    let mut value = [0; 4];
    match read_socket_option(fd, level, name, &mut value)? {
        4 => Ok(i32::from_ne_bytes(value)),
        _ => Err(Errno::EBADMSG),
    }
}

/// Sets a socket option from raw bytes (setsockopt(2)).
pub fn set_socket_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes.
    let done = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    check(done.into()).map(drop)
}

/// Tells whether nothing more can be received from a stream socket: its peer, or its owner, has said so (`POLLRDHUP`).
pub fn is_shut_for_reading(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut poller = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one pollfd; no waiting.
    check(unsafe { libc::poll(&raw mut poller, 1, 0) }.into())?;
    Ok(poller.revents & libc::POLLRDHUP != 0)
}

/// Dissolves the association of a socket (connect(2) with `AF_UNSPEC`).
pub fn disconnect(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the kernel reads a whole sockaddr.
    check(unsafe { libc::connect(fd.as_raw_fd(), &raw const nobody, length) }.into()).map(drop)
}

/// Opens a file by its handle (open_by_handle_at(2)) on the file system that `mount` lies on.
///
/// # Errors
/// `ESTALE` when the file is gone, `EPERM` without `CAP_DAC_READ_SEARCH`.
pub fn open_by_handle(mount: BorrowedFd<'_>, kind: i32, handle: &[u8], flags: i32) -> Result<OwnedFd, Errno> {
    const MAX_HANDLE: usize = 128;
    #[repr(C)]
    struct FileHandle {
        bytes: u32,
        kind: i32,
        handle: [u8; MAX_HANDLE],
    }
    if handle.len() > MAX_HANDLE {
        return Err(Errno::EINVAL);
    }
    let mut file = FileHandle { bytes: handle.len() as u32, kind, handle: [0; MAX_HANDLE] };
    file.handle[..handle.len()].copy_from_slice(handle);
    // SAFETY: the kernel reads the header and `bytes` bytes behind it, which the array holds.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw mut file, flags) })?;
    // SAFETY: the kernel has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Returns who is signalled when a descriptor becomes ready: `F_OWNER_*` and an id, 0 when nobody is (`F_GETOWN_EX`).
pub fn owner(fd: BorrowedFd<'_>) -> Result<(i32, i32), Errno> {
    const F_GETOWN_EX: i32 = 16;
    let mut owner = [0i32; 2];
    // SAFETY: the kernel writes `struct f_owner_ex`, which is two ints.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) }.into())?;
    Ok((owner[0], owner[1]))
}

/// Returns the signal chosen for it, 0 for the default (`F_GETSIG`).
pub fn owner_signal(fd: BorrowedFd<'_>) -> Result<i32, Errno> {
    const F_GETSIG: i32 = 11;
    // SAFETY: the request takes no argument.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) }.into()).map(|signal| signal as i32)
}
