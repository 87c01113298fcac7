//! Creating stubs: empty processes with chosen pids, made to be filled from outside (clone3(2) with `set_tid`, Linux 5.5).
//!
//! A stub is a fork that never returns to Rust: it pauses. It still holds a copy of every descriptor of its maker, which the
//! tracer closes as its first act: the stub may be stopped before it could do so itself. It needs
//! `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN` over the PID namespace. In a new PID namespace process 1 is a minimal init,
//! which creates the stub, reaps what is orphaned, and leaves when its last child has.

use crate::check;
use libc::pid_t;
use nix::errno::Errno;
use std::ffi::CStr;

/// What the first process of a new PID namespace is called.
pub const INIT_NAME: &CStr = c"godwit-init";

/// `struct clone_args` of clone3(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CloneArguments {
    /// `CLONE_*`.
    pub flags: u64,
    /// Where the pidfd is stored.
    pub pidfd: u64,
    /// Where the child's tid is stored in the child.
    pub child_tid: u64,
    /// Where the child's tid is stored in the parent.
    pub parent_tid: u64,
    /// Signal sent to the parent when the child ends.
    pub exit_signal: u64,
    /// Lowest byte of the stack.
    pub stack: u64,
    /// Its size in bytes.
    pub stack_size: u64,
    /// New thread-local storage pointer.
    pub tls: u64,
    /// Address of the array of wanted tids, innermost PID namespace first.
    pub set_tid: u64,
    /// Number of its elements.
    pub set_tid_size: u64,
    /// Target cgroup.
    pub cgroup: u64,
}

const _: () = assert!(size_of::<CloneArguments>() == 88);

impl CloneArguments {
    /// Its bytes, to be placed in a tracee that makes the call.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 88] {
        let words = [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
            self.cgroup,
        ];
        let mut bytes = [0; 88];
        for (slot, word) in bytes.chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Blocks every signal of the calling thread while it lives, so that a child is born with all of them blocked and no
/// handler of this program ever runs in it.
pub(crate) struct SignalsBlocked(nix::sys::signal::SigSet);

impl SignalsBlocked {
    pub(crate) fn new() -> Result<Self, Errno> {
        use nix::sys::signal::{SigSet, SigmaskHow};
        SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK).map(Self)
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        let _ = self.0.thread_set_mask();
    }
}

/// clone3 in the manner of fork: returns 0 in the child.
///
/// # Safety
/// The child must call nothing but async-signal-safe functions and must not return.
pub(crate) unsafe fn clone_with_pid(flags: u64, wanted: Option<pid_t>) -> Result<pid_t, Errno> {
    let arguments = CloneArguments {
        flags,
        exit_signal: libc::SIGCHLD as u64,
        set_tid: wanted.as_ref().map_or(0, |pid| std::ptr::from_ref(pid) as u64),
        set_tid_size: u64::from(wanted.is_some()),
        ..CloneArguments::default()
    };
    // SAFETY: without CLONE_VM and a stack of its own this is fork; the caller answers for the child.
    check(unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArguments>()) })
        .map(|pid| pid as pid_t)
}

/// What a stub does: it waits to be taken over. Dies with the thread that made it.
fn stub_main() -> ! {
    // SAFETY: raw system calls on integers only; nothing of the parent's Rust state is touched.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    loop {
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_pause) };
    }
}

/// What process 1 of a new PID namespace does: creates the stub, then reaps until nobody is left.
fn init_main(wanted: pid_t) -> ! {
    // SAFETY: the child goes straight to `stub_main`.
    match unsafe { clone_with_pid(0, Some(wanted)) } {
        Ok(0) => stub_main(),
        // SAFETY: ends this process without running anything of the parent's.
        Err(errno) => unsafe { libc::_exit(errno as i32) },
        Ok(_) => {}
    }
    // SAFETY: raw system calls on integers and a static string.
    unsafe { libc::prctl(libc::PR_SET_NAME, INIT_NAME.as_ptr()) };
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
    loop {
        // SAFETY: waits for any child; a null status is allowed.
        let pid = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::__WALL) };
        if pid == -1 && Errno::last() == Errno::ECHILD {
            // SAFETY: ends this process without running anything of the parent's.
            unsafe { libc::_exit(0) };
        }
    }
}

/// Creates a stub with process id `wanted` in the PID namespace that this thread's children enter.
///
/// # Errors
/// `EEXIST` when the pid is taken, `EPERM` without the capability, `EINVAL` for a pid the namespace cannot have.
pub fn spawn(wanted: pid_t) -> Result<pid_t, Errno> {
    let _blocked = SignalsBlocked::new()?;
    // SAFETY: the child goes straight to `stub_main`, which is async-signal-safe and never returns.
    match unsafe { clone_with_pid(0, Some(wanted)) }? {
        0 => stub_main(),
        pid => Ok(pid),
    }
}

/// Creates a new PID namespace whose process 1 creates a stub with process id `wanted` (greater than 1) in it. Returns the
/// init's pid as this process sees it; the stub is its only child. An init that could not create the stub exits with the
/// errno as its code.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`, `ENOSPC` when namespaces are nested too deeply.
pub fn spawn_in_new_namespace(wanted: pid_t) -> Result<pid_t, Errno> {
    let _blocked = SignalsBlocked::new()?;
    // SAFETY: the child goes straight to `init_main`, which is async-signal-safe and never returns.
    match unsafe { clone_with_pid(libc::CLONE_NEWPID as u64, None) }? {
        0 => init_main(wanted),
        pid => Ok(pid),
    }
}
