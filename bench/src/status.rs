//! What the victim says about itself, and reading it from outside.
//!
//! The status is one line of JSON of fixed size, rewritten in place: a file that never changes its size is the same at both
//! ends of a move.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// Bytes of the line.
pub const SIZE: usize = 512;

/// The victim's status.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Status {
    /// Counts statuses.
    pub number: u64,
    /// When it was written, in microseconds of CLOCK_REALTIME.
    pub at_us: u64,
    /// The name of the host that the last heartbeat was made on.
    pub host: String,
    /// The longest time between two heartbeats that it had on different hosts, in microseconds: the freeze. 0 before the move.
    pub move_gap_us: u64,
    /// The longest time between any other two heartbeats.
    pub other_gap_us: u64,
    /// Pages written.
    pub writes: u64,
    /// Processor time that the writing thread has used, in microseconds.
    pub writer_cpu_us: u64,
    /// Touches after the move that took so long that the page cannot have been there.
    pub faults: u64,
    /// Their median in microseconds.
    pub fault_p50_us: f64,
    /// Their 99th percentile.
    pub fault_p99_us: f64,
    /// The same as `number`: a line that is read while it is written has two different ones.
    pub end: u64,
}

impl Status {
    /// The line to write.
    ///
    /// # Errors
    /// It is too long.
    pub fn line(&self) -> Result<Vec<u8>> {
        let mut line = serde_json::to_vec(self)?;
        ensure!(line.len() < SIZE, "the status is too long");
        line.resize(SIZE - 1, b' ');
        line.push(b'\n');
        Ok(line)
    }

    /// Reads the status.
    ///
    /// # Errors
    /// There is none, or it is never whole.
    pub fn read(path: &Path) -> Result<Self> {
        for _ in 0..50 {
            let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
            match serde_json::from_str::<Self>(&text) {
                Ok(status) if status.number == status.end => return Ok(status),
                _ => std::thread::sleep(std::time::Duration::from_millis(1)),
            }
        }
        bail!("{}: no whole status", path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_always_has_the_same_size() {
        let least = Status::default().line().unwrap();
        let most = Status {
            number: u64::MAX,
            at_us: u64::MAX,
            host: "destination".to_owned(),
            move_gap_us: u64::MAX,
            other_gap_us: u64::MAX,
            writes: u64::MAX,
            writer_cpu_us: u64::MAX,
            faults: u64::MAX,
            fault_p50_us: 1e9 / 3.0,
            fault_p99_us: 1e9 / 7.0,
            end: u64::MAX,
        };
        assert_eq!((least.len(), most.line().unwrap().len()), (SIZE, SIZE));
        assert_eq!(serde_json::from_slice::<Status>(&most.line().unwrap()).unwrap(), most);
    }
}
