//! What a move came to, whatever it came to: the last line of `--json`, the exit code, and the closing words for people.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::event::{Event, Faults};
use crate::request::{Mode, Request};

/// How a move ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The process runs at the destination and has all its memory.
    Moved,
    /// It ran at the destination, and ended there before all its memory had come: by itself, or because something ended it.
    Ended,
    /// Something stood in the way, and was seen before the process was touched.
    Refused,
    /// Something went wrong on the way.
    Failed,
    /// The user called it off.
    Cancelled,
    /// The source gave the process away and never heard that it runs.
    Unknown,
}

/// What became of the source's copy.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum SourceState {
    /// It runs as if nothing had happened.
    #[serde(rename = "running as before")]
    RunningAsBefore,
    /// It is kept, stopped.
    #[serde(rename = "frozen")]
    Frozen,
    /// It is no more: moved, or ended by itself.
    #[serde(rename = "gone")]
    Gone,
}

/// Something that keeps a process from being moved.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Obstacle {
    /// What it is about, such as `fd 5` or `/usr/bin/redis-server`.
    pub resource: String,
    /// Why that is in the way.
    pub text: String,
    /// The way out, empty where there is none.
    pub remedy: String,
}

impl From<godwit_resources::Obstacle> for Obstacle {
    fn from(obstacle: godwit_resources::Obstacle) -> Self {
        Self { resource: obstacle.resource, text: obstacle.text, remedy: obstacle.remedy }
    }
}

/// What went wrong, where, and what can be done about it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Failure {
    /// The phase's name.
    pub phase: String,
    /// What it went wrong with: the process, a descriptor, a mapping, the link.
    pub resource: String,
    /// One line, the cause included.
    pub text: String,
    /// The way out, empty where there is none.
    pub remedy: String,
}

/// Where the freeze went, in milliseconds; the parts add up to about the whole.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Freeze {
    /// Stopping all threads.
    pub stop: f64,
    /// Reading the state of the process.
    pub collect: f64,
    /// Sending what was written since the last round.
    pub final_round: f64,
    /// Completing the copy at the destination.
    pub rebuild: f64,
    /// Handing over the right to run.
    pub commit: f64,
    /// From there until the last thread runs.
    pub resume: f64,
}

/// What a move came to.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "event", rename = "report")]
pub struct Report {
    /// 32 hexadecimal digits, the same in both hosts' logs; empty when it never came to that.
    pub migration_id: String,
    /// How it ended.
    pub outcome: Outcome,
    /// When memory travelled.
    pub mode: Mode,
    /// Rounds before the freeze.
    pub rounds: u32,
    /// Pages with content that the process had at the end.
    pub pages_total: u64,
    /// Pages sent, counted again when sent again.
    pub pages_sent: u64,
    /// Bytes sent, everything included.
    pub bytes_on_wire: u64,
    /// From the first word to the last page, in milliseconds.
    pub total_ms: f64,
    /// From before the first thread was stopped until the source heard that the last one runs, in milliseconds.
    pub freeze_ms: f64,
    /// Where that went.
    pub freeze: Freeze,
    /// From the end of the freeze to the last page, in milliseconds.
    pub drain_ms: f64,
    /// Pages that threads at the destination waited for.
    pub faults: Faults,
    /// The pid it had.
    pub source_pid: i32,
    /// The pid it has in the page server's PID namespace, once it runs there.
    pub dest_pid: Option<i32>,
    /// What became of the source's copy.
    pub source_state: SourceState,
    /// Everything that stood in the way, not just the first thing.
    #[serde(default)]
    pub obstacles: Vec<Obstacle>,
    /// What went wrong.
    #[serde(default)]
    pub error: Option<Failure>,
}

impl Report {
    /// Starts the report of a move that has come to nothing yet.
    pub fn new(request: &Request) -> Self {
        Self {
            migration_id: String::new(),
            outcome: Outcome::Failed,
            mode: request.mode,
            rounds: 0,
            pages_total: 0,
            pages_sent: 0,
            bytes_on_wire: 0,
            total_ms: 0.0,
            freeze_ms: 0.0,
            freeze: Freeze::default(),
            drain_ms: 0.0,
            faults: Faults::default(),
            source_pid: request.pid,
            dest_pid: None,
            source_state: SourceState::RunningAsBefore,
            obstacles: Vec::new(),
            error: None,
        }
    }

    /// Starts the report of a move of which no more is known than what was said of it. How it ended is yet to be found out, unless that
    /// was at the destination.
    pub fn of_said<'a>(request: &Request, said: impl Iterator<Item = &'a Event>) -> Self {
        let mut report = Self::new(request);
        for event in said {
            match event {
                Event::Named { migration_id } => report.migration_id.clone_from(migration_id),
                Event::Round(round) => {
                    report.rounds = round.number;
                    report.pages_sent += round.pages;
                    report.bytes_on_wire += round.bytes;
                }
                // Who goes on with a hand-over says once more that it runs.
                Event::Running { dest_pid, freeze_ms } => {
                    (report.dest_pid, report.freeze_ms) = (Some(*dest_pid), report.freeze_ms.max(*freeze_ms));
                }
                Event::Drained { drain_ms, faults } => (report.drain_ms, report.faults) = (*drain_ms, *faults),
                Event::Ended => report.outcome = Outcome::Ended,
                _ => {}
            }
        }
        report
    }

    /// Gives the program's exit code: 0 moved, 1 not moved and the source not held, 3 unknown or the source held, 4 moved and ended
    /// there.
    pub fn exit_code(&self) -> u8 {
        match (self.outcome, self.source_state) {
            (Outcome::Moved, _) => 0,
            (Outcome::Ended, _) => 4,
            (Outcome::Unknown, _) | (_, SourceState::Frozen) => 3,
            (Outcome::Refused | Outcome::Failed | Outcome::Cancelled, _) => 1,
        }
    }
}

impl fmt::Display for SourceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RunningAsBefore => "running as before",
            Self::Frozen => "frozen",
            Self::Gone => "gone",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;

    fn report() -> Report {
        Report::new(&Request::new(42, "host"))
    }

    #[test]
    fn the_promised_members_are_there() {
        let value = serde_json::to_value(report()).unwrap();
        let members: BTreeSet<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        let promised = [
            "event",
            "migration_id",
            "outcome",
            "mode",
            "rounds",
            "pages_total",
            "pages_sent",
            "bytes_on_wire",
            "total_ms",
            "freeze_ms",
            "freeze",
            "drain_ms",
            "faults",
            "source_pid",
            "dest_pid",
            "source_state",
            "obstacles",
            "error",
        ];
        assert_eq!(members, BTreeSet::from(promised));
        assert_eq!(value["event"], "report");
        assert_eq!(value["mode"], "hybrid");
        assert_eq!(value["outcome"], "failed");
        assert_eq!(value["source_state"], "running as before");
        assert_eq!(value["source_pid"], 42);
        let zero = 0.0;
        assert_eq!(
            value["freeze"],
            json!({"stop": zero, "collect": zero, "final_round": zero, "rebuild": zero, "commit": zero, "resume": zero})
        );
        assert_eq!(value["faults"], json!({"count": 0, "p50_us": zero, "p99_us": zero}));
    }

    #[test]
    fn a_report_is_read_back() {
        let mut report = report();
        report.obstacles.push(Obstacle {
            resource: "fd 1".into(),
            text: "a terminal".into(),
            remedy: "--external".into(),
        });
        report.error = Some(Failure { phase: "probe".into(), ..Failure::default() });
        let line = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&line).unwrap(), report);
    }

    #[test]
    fn exit_codes_tell_whether_the_source_is_held() {
        let mut report = report();
        for (outcome, code) in [
            (Outcome::Moved, 0),
            (Outcome::Ended, 4),
            (Outcome::Refused, 1),
            (Outcome::Failed, 1),
            (Outcome::Cancelled, 1),
            (Outcome::Unknown, 3),
        ] {
            report.outcome = outcome;
            assert_eq!(report.exit_code(), code, "{outcome:?}");
        }
        report.outcome = Outcome::Failed;
        report.source_state = SourceState::Gone;
        assert_eq!(report.exit_code(), 1);
        report.source_state = SourceState::Frozen;
        assert_eq!(report.exit_code(), 3);
    }
}
