//! What the worker says about itself, and reading it from outside.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::cancel::Cancel;

/// Bytes of the status, which is written in place.
pub(super) const RECORD_SIZE: usize = 320;

/// How long the worker may say nothing new.
const SILENCE: Duration = Duration::from_secs(20);

/// The worker's status.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Record {
    /// Counts records.
    pub(super) number: u64,
    /// The worker's pid, as it sees it.
    pub(super) pid: i32,
    /// The name of the host that it is on.
    pub(super) host: String,
    /// Pages written since its start.
    pub(super) rewritten: u64,
    /// Pages compared with what they ought to be.
    pub(super) compared: u64,
    /// Pages that were something else.
    pub(super) failed: u64,
    /// How many times all memory has been compared.
    pub(super) passes: u64,
    /// The same as `number`: a record that is read while it is written has two different ones.
    pub(super) end: u64,
}

/// A heartbeat that came late.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Gap {
    /// When it came, in microseconds since 1970.
    pub(super) at_us: u64,
    /// Microseconds since the one before.
    pub(super) gap_us: u64,
}

/// Where the worker writes its status.
pub(super) fn record_file(directory: &Path) -> PathBuf {
    directory.join("worker.status")
}

/// Where the worker writes its late heartbeats.
pub(super) fn gaps_file(directory: &Path) -> PathBuf {
    directory.join("worker.gaps")
}

/// A worker, seen from outside.
#[derive(Debug)]
pub(super) struct Observation {
    directory: PathBuf,
}

impl Observation {
    /// Looks at the worker that writes to `directory`.
    pub(super) fn of(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Reads the worker's latest status.
    pub(super) fn record(&self) -> Result<Record> {
        let path = record_file(&self.directory);
        let mut last = None;
        for _ in 0..50 {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            match serde_json::from_str::<Record>(&text) {
                Ok(record) if record.number == record.end => return Ok(record),
                Ok(_) => {}
                Err(error) => last = Some(error),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(last.map_or_else(|| anyhow::anyhow!("it is never whole"), anyhow::Error::from))
            .context("the worker's status")
    }

    /// Waits until the worker has compared all its memory `passes` times since its start, and gives its status then.
    pub(super) fn settle(&self, passes: u64, cancel: &Cancel) -> Result<Record> {
        let (mut number, mut heard) = (0, Instant::now());
        loop {
            match self.record() {
                Ok(record) if record.passes >= passes && record.rewritten > 0 => return Ok(record),
                Ok(record) if record.number != number => (number, heard) = (record.number, Instant::now()),
                Ok(_) => {}
                // It may not have begun to write yet.
                Err(error) if heard.elapsed() > SILENCE => return Err(error),
                Err(_) => {}
            }
            ensure!(!cancel.wait(Duration::from_millis(20)), "interrupted");
            if heard.elapsed() > SILENCE {
                bail!("the worker has said nothing for {} s", SILENCE.as_secs());
            }
        }
    }

    /// Reads the late heartbeats of a time.
    pub(super) fn gaps(&self, during: Span) -> Result<Vec<Gap>> {
        let path = gaps_file(&self.directory);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        // The last line may be half written.
        let gaps = text.lines().filter_map(|line| serde_json::from_str::<Gap>(line).ok());
        Ok(gaps.filter(|gap| gap.is_during(during)).collect())
    }
}

/// A stretch of time, in microseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Gap {
    /// Tells whether a part of it is in a stretch of time.
    pub(super) fn is_during(&self, span: Span) -> bool {
        self.at_us >= span.start && self.at_us.saturating_sub(self.gap_us) <= span.end
    }

    /// Its length.
    pub(super) fn milliseconds(&self) -> f64 {
        self.gap_us as f64 / 1e3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_those_of_the_time_in_question() {
        let directory = tempfile::tempdir().unwrap();
        let lines =
            "{\"at_us\":10,\"gap_us\":9}\n{\"at_us\":20,\"gap_us\":5}\n{\"at_us\":40,\"gap_us\":7}\n{\"at_us\":50,\"ga";
        fs::write(gaps_file(directory.path()), lines).unwrap();
        let ends = |start, end| -> Vec<u64> {
            let gaps = Observation::of(directory.path()).gaps(Span { start, end }).unwrap();
            gaps.iter().map(|gap| gap.at_us).collect()
        };
        assert_eq!(ends(0, 100), [10, 20, 40]);
        assert_eq!(ends(12, 16), [20]);
        assert!(ends(21, 32).is_empty());
        assert_eq!(ends(20, 33), [20, 40]);
    }

    #[test]
    fn a_torn_record_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let observation = Observation::of(directory.path());
        assert!(observation.record().is_err());
        let mut record =
            Record { number: 2, pid: 1, host: "h".to_owned(), rewritten: 1, compared: 1, failed: 0, passes: 0, end: 1 };
        let write =
            |record: &Record| fs::write(record_file(directory.path()), serde_json::to_vec(record).unwrap()).unwrap();
        write(&record);
        assert!(observation.record().is_err());
        record.end = 2;
        write(&record);
        assert_eq!(observation.record().unwrap(), record);
    }
}
