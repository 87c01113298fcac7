//! Planting a dirty tracker in a running process, which is stopped for it: for a fraction of a millisecond where it has few threads.

use super::freeze;
use super::stop::{Result, Stop};
use godwit_kernel::Errno;
use godwit_kernel::process::{pidfd_getfd, pidfd_open};
use godwit_kernel::uffd::Userfaultfd;
use godwit_resources::restart::SleepWatch;
use godwit_tracee::Batch;
use godwit_track::{EveryPage, Kind, REQUIRED_FEATURES, SoftDirty, Tracker, WpAsync};
use std::os::fd::{AsFd, OwnedFd};

/// userfaultfd(2): faults of the kernel itself are not reported. All that an unprivileged process may ask for, and all that
/// write tracking needs.
const UFFD_USER_MODE_ONLY: i32 = 1;

/// Plants the best tracker that works here.
///
/// # Errors
/// When the process cannot be stopped, or uses userfaultfd itself on all of its memory.
pub(super) fn plant(pid: i32, watch: &mut SleepWatch) -> Result<Box<dyn Tracker>> {
    match godwit_track::probe(pid)? {
        Kind::WpAsync => match open_userfaultfd(pid, watch)? {
            Some(fd) => {
                let userfaultfd = Userfaultfd::from_fd(fd);
                userfaultfd
                    .api(REQUIRED_FEATURES)
                    .map_err(|errno| Stop::failed("dirty-page tracking", format!("UFFDIO_API: {errno}")))?;
                Ok(Box::new(WpAsync::new(pid, userfaultfd)?))
            }
            None => Ok(Box::new(EveryPage::new(pid)?)),
        },
        Kind::SoftDirty => Ok(Box::new(SoftDirty::new(pid)?)),
        Kind::EveryPage => Ok(Box::new(EveryPage::new(pid)?)),
    }
}

/// Has the process open a userfaultfd, takes it, and closes it there. `None` when it may open no further descriptor.
fn open_userfaultfd(pid: i32, watch: &mut SleepWatch) -> Result<Option<OwnedFd>> {
    // N.B. all of its threads: one that forked now would give its child the descriptor and our scratch mapping.
    let mut tracee = freeze::pause(pid, watch)?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    for flags in [flags, flags | UFFD_USER_MODE_ONLY] {
        let mut batch = Batch::new();
        let call = batch.attempt("userfaultfd", libc::SYS_userfaultfd, &[flags.into()]);
        let number = match tracee.run(batch)?.result(call) {
            Ok(number) => number as i32,
            Err(Errno::EPERM) => continue,
            Err(_) => break,
        };
        let taken = pidfd_open(pid).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), number));
        let mut batch = Batch::new();
        batch.call("close", libc::SYS_close, &[number.into()]);
        tracee.run(batch)?;
        tracee.release()?;
        return taken.map(Some).map_err(|errno| Stop::failed("dirty-page tracking", format!("pidfd_getfd: {errno}")));
    }
    tracee.release()?;
    Ok(None)
}
