//! Heartbeats: the largest gap between two of them, apart for those on the same host and those across a move.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::wall_clock_us;

/// The pause between two beats. With the kernel's timer slack and the wake-up they are less than 0.2 ms apart.
const PAUSE: Duration = Duration::from_micros(100);

/// A heart; one thread beats, others look.
#[derive(Debug, Default)]
pub(super) struct Heart {
    host: Mutex<String>,
    moved: AtomicBool,
    move_gap_us: AtomicU64,
    other_gap_us: AtomicU64,
}

impl Heart {
    /// Beats for ever.
    pub(super) fn beat(&self) {
        let mut name = host_name();
        self.set_host(&name);
        let mut last = wall_clock_us();
        let mut moving = false;
        loop {
            std::thread::sleep(PAUSE);
            let now = wall_clock_us();
            let gap = now.saturating_sub(last);
            last = now;
            let here = host_name();
            let arrived = here != name;
            // N.B. a freeze between the two looks above gives the name too early: the gap comes with the next beat.
            if arrived || moving {
                self.move_gap_us.fetch_max(gap, Ordering::Relaxed);
            } else {
                self.other_gap_us.fetch_max(gap, Ordering::Relaxed);
            }
            moving = arrived;
            if arrived {
                self.moved.store(true, Ordering::Relaxed);
                self.set_host(&here);
                name = here;
            }
        }
    }

    /// The host of the last beat.
    pub(super) fn host(&self) -> String {
        self.host.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether there has been a move.
    pub(super) fn has_moved(&self) -> bool {
        self.moved.load(Ordering::Relaxed)
    }

    /// The largest gap across a move.
    pub(super) fn move_gap_us(&self) -> u64 {
        self.move_gap_us.load(Ordering::Relaxed)
    }

    /// The largest of all other gaps.
    pub(super) fn other_gap_us(&self) -> u64 {
        self.other_gap_us.load(Ordering::Relaxed)
    }

    fn set_host(&self, name: &nix::sys::utsname::UtsName) {
        let mut host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        *host = name.nodename().to_string_lossy().into_owned();
    }
}

/// The kernel's answer as a whole: nothing is allocated in a beat.
fn host_name() -> nix::sys::utsname::UtsName {
    nix::sys::utsname::uname().expect("uname(2) fails for bad addresses only")
}
