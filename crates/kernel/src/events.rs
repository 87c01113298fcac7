//! Making descriptors that report events, with the raw values that /proc shows of existing ones: eventfd(2),
//! timerfd_create(2), signalfd(2), inotify(7).

use crate::check;
use nix::errno::Errno;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn owned(fd: libc::c_long) -> OwnedFd {
    // SAFETY: callers pass a descriptor that the kernel has just returned; nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// Creates a counter (eventfd(2)); `flags` are `EFD_*`.
pub fn eventfd(initial: u32, flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: takes integers.
    check(unsafe { libc::eventfd(initial, flags) }.into()).map(owned)
}

/// Creates a disarmed timer on any clock that has them (timerfd_create(2)); `flags` are `TFD_*`.
pub fn timerfd(clock: i32, flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: takes integers.
    check(unsafe { libc::timerfd_create(clock, flags) }.into()).map(owned)
}

/// Has a periodic timer whose expirations were not read account for them: what it says in /proc is exact afterwards, and
/// its reader notices nothing (timerfd_gettime(2)).
pub fn account_expirations(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut value = std::mem::MaybeUninit::<libc::itimerspec>::zeroed();
    // SAFETY: the kernel writes one `itimerspec`.
    check(unsafe { libc::timerfd_gettime(fd.as_raw_fd(), value.as_mut_ptr()) }.into()).map(drop)
}

/// Creates a descriptor that reads the signals of `mask` (bit 0 is signal 1; signalfd(2)); `flags` are `SFD_*`.
pub fn signalfd(mask: u64, flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: the kernel reads a mask of the size that is passed.
    check(unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, size_of::<u64>(), flags) }).map(owned)
}

/// Creates an instance that watches files (inotify_init1(2)); `flags` are `IN_NONBLOCK` and `IN_CLOEXEC`.
pub fn inotify(flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: takes an integer.
    check(unsafe { libc::inotify_init1(flags) }.into()).map(owned)
}

/// Adds a watch and returns its number (inotify_add_watch(2)).
pub fn add_watch(fd: BorrowedFd<'_>, path: &CStr, mask: u32) -> Result<i32, Errno> {
    // SAFETY: `path` ends in a zero byte and lives across the call.
    check(unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask) }.into()).map(|watch| watch as i32)
}
