//! Another process's memory: process_vm_readv(2), process_vm_writev(2), process_madvise(2).
//!
//! /proc/PID/mem, which also reaches pages that the process itself may not touch, needs no unsafe code and is used
//! through `std::fs::File`.

use crate::check;
use libc::{iovec, pid_t};
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Largest number of pieces one call takes (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

fn local(buffer: &[u8]) -> iovec {
    iovec { iov_base: buffer.as_ptr().cast_mut().cast(), iov_len: buffer.len() }
}

fn remote(address: u64, length: usize) -> iovec {
    iovec { iov_base: address as *mut libc::c_void, iov_len: length }
}

/// Reads from `address` into `buffer`; returns the number of bytes read, which is short where the mapping ends.
///
/// # Errors
/// `EFAULT` when the first page cannot be read, `ESRCH` when the process is gone.
pub fn read(pid: pid_t, address: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
    let local = iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = remote(address, buffer.len());
    // SAFETY: `local` describes `buffer`, borrowed exclusively for the call; the remote side is checked by the kernel.
    check(unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) } as _).map(|n| n as usize)
}

/// Reads pieces `(address, length)` one after the other into `buffer`; returns the bytes read. At most [`MAX_PIECES`].
///
/// # Errors
/// As [`read`]; `EINVAL` for too many pieces or pieces longer than the buffer.
pub fn read_pieces(pid: pid_t, pieces: &[(u64, usize)], buffer: &mut [u8]) -> Result<usize, Errno> {
    if pieces.iter().map(|piece| piece.1).sum::<usize>() > buffer.len() {
        return Err(Errno::EINVAL);
    }
    let local = iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote: Vec<iovec> = pieces.iter().map(|&(address, length)| remote(address, length)).collect();
    // SAFETY: as in `read`; the pieces were just checked to fit the buffer.
    check(unsafe { libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), remote.len() as _, 0) } as _)
        .map(|n| n as usize)
}

/// Writes `bytes` at `address`; returns the number of bytes written, which is short where the mapping ends.
///
/// # Errors
/// `EFAULT` when the first page cannot be written, `ESRCH` when the process is gone.
pub fn write(pid: pid_t, address: u64, bytes: &[u8]) -> Result<usize, Errno> {
    let local = local(bytes);
    let remote = remote(address, bytes.len());
    // SAFETY: the kernel only reads the local side; the remote side belongs to another process and is checked by the kernel.
    check(unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) } as _)
        .map(|n| n as usize)
}

/// Gives advice on ranges `(address, length)` of the process behind `pidfd` (process_madvise(2)).
///
/// # Errors
/// `EINVAL` where the advice is not allowed from outside or cannot be followed.
pub fn advise(pidfd: BorrowedFd<'_>, ranges: &[(u64, usize)], advice: i32) -> Result<usize, Errno> {
    let remote: Vec<iovec> = ranges.iter().map(|&(address, length)| remote(address, length)).collect();
    // SAFETY: the vector lives across the call; the addresses are another process's.
    check(unsafe {
        libc::syscall(libc::SYS_process_madvise, pidfd.as_raw_fd(), remote.as_ptr(), remote.len(), advice, 0)
    })
    .map(|n| n as usize)
}
