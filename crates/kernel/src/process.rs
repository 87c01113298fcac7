//! Processes and their descriptors from outside: pidfd_open(2), pidfd_getfd(2), kcmp(2), get_robust_list(2), prlimit(2).

use crate::check;
use libc::pid_t;
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Opens a descriptor that refers to a process (pidfd_open(2), Linux 5.3).
pub fn pidfd_open(pid: pid_t) -> Result<OwnedFd, Errno> {
    // SAFETY: takes two integers.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just returned this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Duplicates descriptor `fd` of the process behind `pidfd` into this one (pidfd_getfd(2), Linux 5.6).
///
/// # Errors
/// `EBADF` when the process has no such descriptor, `EPERM` without ptrace access.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: takes integers.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
    // SAFETY: the kernel has just returned this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Kinds of object that [`same_object`] compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// Open file descriptions of two descriptors (`KCMP_FILE`).
    File(RawFd, RawFd),
    /// Address spaces (`KCMP_VM`).
    AddressSpace,
    /// Descriptor tables (`KCMP_FILES`).
    Descriptors,
    /// Working directory, root directory and umask (`KCMP_FS`).
    Filesystem,
}

/// Orders two kernel objects of two processes (kcmp(2)): `Equal` when they are the same.
///
/// # Errors
/// `EBADF`, `ESRCH`, `EPERM` as in the man page.
pub fn compare(a: pid_t, b: pid_t, what: Compared) -> Result<std::cmp::Ordering, Errno> {
    let (kind, first, second) = match what {
        Compared::File(first, second) => (0, first, second),
        Compared::AddressSpace => (1, 0, 0),
        Compared::Descriptors => (2, 0, 0),
        Compared::Filesystem => (3, 0, 0),
    };
    // SAFETY: takes integers.
    let order = check(unsafe { libc::syscall(libc::SYS_kcmp, a, b, kind, first as u64, second as u64) })?;
    Ok(match order {
        0 => std::cmp::Ordering::Equal,
        1 => std::cmp::Ordering::Less,
        _ => std::cmp::Ordering::Greater,
    })
}

/// Tells whether descriptor `fd` of a process is the file that its epoll instance `epoll` watches under the number `target`;
/// of several such watches the one numbered `which` counts, in the order of fdinfo (kcmp(2), `KCMP_EPOLL_TFD`, Linux 4.13).
///
/// # Errors
/// `ENOENT` when there is no such watch, `EBADF` when `fd` is not open.
pub fn epoll_watches(pid: pid_t, fd: RawFd, epoll: RawFd, target: u32, which: u32) -> Result<bool, Errno> {
    const KCMP_EPOLL_TFD: i32 = 7;
    let slot = [epoll as u32, target, which];
    // SAFETY: the kernel reads `struct kcmp_epoll_slot`, which is three 32-bit words.
    check(unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_EPOLL_TFD, fd as u64, slot.as_ptr()) })
        .map(|order| order == 0)
}

/// Returns `(head, length)` of a thread's robust futex list (get_robust_list(2)).
pub fn robust_list(tid: pid_t) -> Result<(u64, u64), Errno> {
    let (mut head, mut length) = (0u64, 0u64);
    // SAFETY: both pointers are valid places for the words that the kernel writes.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut length) })?;
    Ok((head, length))
}

/// Sends a signal to one thread (tgkill(2)).
pub fn send_signal(pid: pid_t, tid: pid_t, signal: i32) -> Result<(), Errno> {
    // SAFETY: takes integers.
    check(unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) }).map(drop)
}

/// Queues a signal with what goes with it to a process, or to one thread of it (rt_sigqueueinfo(2)). Of another process than the caller only
/// such with an `si_code` of who sends by sigqueue(3).
///
/// # Errors
/// `EPERM` for what only the kernel may say.
pub fn queue_signal(pid: pid_t, tid: Option<pid_t>, signal: i32, info: &[u8; 128]) -> Result<(), Errno> {
    let info = info.as_ptr();
    let queued = match tid {
        // SAFETY: `info` is as long as a siginfo_t, which the kernel only reads.
        Some(tid) => unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, info) },
        // SAFETY: as above.
        None => unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, info) },
    };
    check(queued).map(drop)
}

/// Has this program go before the processes that have moved here where memory is short, however large they are: it can be started again, and
/// goes on where it was. Copies that nobody needs yet have a score that is higher still. Whoever started it may have decided otherwise; where
/// that cannot be written things are as they were. proc_pid_oom_score_adj(5)
pub fn go_before_others() {
    const SCORE: &str = "/proc/self/oom_score_adj";
    let is_undecided = std::fs::read_to_string(SCORE).is_ok_and(|score| score.trim() == "0");
    if is_undecided {
        let _ = std::fs::write(SCORE, "999");
    }
}

/// Sends a signal to a process (kill(2)).
pub fn kill(pid: pid_t, signal: i32) -> Result<(), Errno> {
    // SAFETY: takes integers.
    check(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}
