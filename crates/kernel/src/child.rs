//! A child that goes on with this program's own code.

use libc::pid_t;
use nix::errno::Errno;

use crate::check;

/// Forks a child that runs `work` and ends with its exit code. It gets `death` when the thread that called this ends.
///
/// # Errors
/// `EBUSY` when this process has more than one thread: a child would have locks that nobody opens. What fork(2) says.
pub fn fork(name: &std::ffi::CStr, death: i32, work: impl FnOnce() -> u8) -> Result<pid_t, Errno> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads != 1 {
        return Err(Errno::EBUSY);
    }
    let parent = std::process::id();
    // SAFETY: there is one thread, so the child has all that this program has, in a state that no other thread has left; it does not
    // return from here but ends by exit.
    match check(unsafe { libc::fork() }.into())? {
        0 => {
            // SAFETY: raw system calls on integers and a static string, here and below.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, death) };
            // SAFETY: as above.
            unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
            // It may have died before it was to say so.
            if nix::unistd::getppid().as_raw() != parent as pid_t {
                // SAFETY: as above.
                unsafe { libc::raise(death) };
            }
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            std::process::exit(code.unwrap_or(1).into())
        }
        pid => Ok(pid as pid_t),
    }
}

/// Looks whether a child has ended; gives its exit code, or the signal that ended it.
///
/// # Errors
/// `ECHILD` when it is no child of this process.
pub fn try_wait(pid: pid_t) -> Result<Option<Result<u8, i32>>, Errno> {
    let mut status = 0;
    // SAFETY: `status` is valid for writing.
    match check(unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL | libc::WNOHANG) }.into()) {
        Ok(0) => Ok(None),
        Ok(_) if libc::WIFEXITED(status) => Ok(Some(Ok(libc::WEXITSTATUS(status) as u8))),
        Ok(_) if libc::WIFSIGNALED(status) => Ok(Some(Err(libc::WTERMSIG(status)))),
        Ok(_) | Err(Errno::EINTR) => Ok(None),
        Err(errno) => Err(errno),
    }
}
