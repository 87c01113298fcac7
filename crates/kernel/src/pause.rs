//! Points at which a program stops itself, for tests: whoever chose one finds the program stopped exactly there, lets something
//! happen, and sends SIGCONT.
//!
//! Chosen by the environment and not by an option, so that programs which one of ours starts stop there, too. Without the variable
//! a point costs one comparison.

use nix::sys::signal::{Signal, raise};
use std::fmt::Display;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The variable that names a point; CONTRIBUTING.md lists them.
const VARIABLE: &str = "GODWIT_PAUSE_AT";
/// Time in which what was handed to another thread has left this host.
const DEPARTURE: Duration = Duration::from_millis(100);

/// Stops this program (all its threads, signal(7)) if this is the point that was chosen and has not been come to before.
pub fn at(point: impl Display) {
    if is_chosen(point) && is_first() {
        // Not to be stopped is no trouble that this program could do anything about.
        let _ = raise(Signal::SIGSTOP);
    }
}

/// As [`at`], but what was queued for sending before is sent first.
pub fn when_sent(point: impl Display) {
    if is_chosen(&point) {
        std::thread::sleep(DEPARTURE);
        at(point);
    }
}

fn is_chosen(point: impl Display) -> bool {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| std::env::var(VARIABLE).ok());
    chosen.as_ref().is_some_and(|chosen| *chosen == point.to_string())
}

/// Whether nobody has come by here before.
fn is_first() -> bool {
    static PASSED: AtomicBool = AtomicBool::new(false);
    !PASSED.swap(true, Ordering::Relaxed)
}
