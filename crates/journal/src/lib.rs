//! What each side of a hand-over has written down, so that whoever comes after it goes on from there.
//!
//! One file for each migration and side under the state directory, for as long as the migration is not over:
//! `source/ID` and `destination/ID`. The state directory is meant to be in memory (`/run/godwit`): a host that begins anew has lost its
//! copy of the process, too, and nothing inside the freeze waits for a disk. What has to outlive is a process, not the host, so a
//! record is one write(2) of 64 bytes in place: it is there or it is not, and needs no room that is not there already.
//!
//! An entry is locked (flock(2)) by the process that works on it. One that can be locked has nobody.

mod entry;
mod error;
mod format;
mod people;
mod state;

pub use entry::{Entry, Journal, Reserved, Side};
pub use error::{Error, Result};
pub use format::{Format, decode};
pub use people::ProcessName;
pub use state::State;

/// Where the state directory is unless told otherwise.
pub const DEFAULT_STATE_DIRECTORY: &str = "/run/godwit";
