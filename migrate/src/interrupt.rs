//! Ctrl-C and its relatives: they raise a [`Cancel`] flag and do nothing else, however often they come.
//!
//! A program that dies while it holds another one stopped leaves that one damaged; so the signals that would end this one
//! by default are taken by a thread instead of acting on whatever is going on.

use std::io;

use nix::sys::signal::{SigSet, Signal};

use crate::cancel::Cancel;

/// Sent to an agent when its front has ended.
pub const FRONT_ENDED: Signal = Signal::SIGUSR1;

/// Signals that ask a program to end.
pub fn signals() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect()
}

/// Turns SIGINT, SIGTERM, SIGHUP, SIGQUIT and the end of the front into a raised flag from now on. To be called before any thread is
/// started: threads inherit which signals they leave alone.
///
/// # Errors
/// The signals cannot be blocked or no thread can be started.
pub fn watch(cancel: &Cancel) -> io::Result<()> {
    let mut signals = signals();
    signals.add(FRONT_ENDED);
    signals.thread_block()?;
    let cancel = cancel.clone();
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        // N.B. the freeze may be over before an ordinary thread gets its turn on a busy host, and with it the time to call it off.
        // Without the privilege it is one.
        let _ = godwit_kernel::sched::run_first();
        while let Ok(signal) = signals.wait() {
            if signal == FRONT_ENDED {
                cancel.abandon();
            } else {
                cancel.cancel();
            }
        }
    })?;
    Ok(())
}
