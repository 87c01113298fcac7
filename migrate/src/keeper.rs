//! The front of `migrate`: what the user started, and may end by mistake. The work is done by a child, the *agent*.
//!
//! Whoever holds another program stopped must not be killed on the way. So the agent is told when its front has ended, and calls the
//! move off, or brings it to its end where the hand-over is decided; and the front sees when the agent has ended without a word, lets a
//! process go on that was left behind undecided, and otherwise has another agent go on.

pub mod aftermath;
mod witness;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::cancel::Cancel;
use crate::interrupt;
pub use witness::{Said, Witness};

/// How an agent ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// With this exit code.
    Code(u8),
    /// By this signal.
    Killed(i32),
}

/// Runs `work` in a child and waits for it; signals that ask this program to end are passed on. To be called while there is only one
/// thread.
///
/// # Errors
/// When there can be no child.
pub fn run(work: impl FnOnce(&Cancel) -> u8) -> anyhow::Result<Ended> {
    let mut signals = interrupt::signals();
    signals.add(Signal::SIGCHLD);
    signals.thread_block()?;
    let child = godwit_kernel::child::fork(c"godwit-agent", interrupt::FRONT_ENDED as i32, || {
        // N.B. while there is only one thread, and here: a child gets a table of the size that is in use. A copy of each descriptor of
        // the process is held for a moment.
        if let Err(errno) = godwit_resources::limits::make_room_for_descriptors() {
            tracing::warn!(%errno, "a process with many descriptors may not be moved");
        }
        let watched =
            SigSet::from_iter([Signal::SIGCHLD]).thread_unblock().map_err(anyhow::Error::from).and_then(|()| {
                let cancel = Cancel::new()?;
                interrupt::watch(&cancel)?;
                Ok(cancel)
            });
        match watched {
            Ok(cancel) => work(&cancel),
            Err(error) => {
                eprintln!("migrate: {}", godwit_carry::with_causes(error.as_ref()));
                1
            }
        }
    })?;
    loop {
        match signals.wait()? {
            Signal::SIGCHLD => {
                if let Some(ended) = godwit_kernel::child::try_wait(child)? {
                    return Ok(ended.map_or_else(Ended::Killed, Ended::Code));
                }
            }
            other => {
                let _ = kill(Pid::from_raw(child), other);
            }
        }
    }
}
