//! What the agent says while it works. Each event is one JSON object; the display turns the same events into words.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// Something that happened during a move. Times are in milliseconds.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The move has a name, by which it can be called off and asked after.
    Named {
        /// Its id.
        migration_id: String,
    },
    /// A phase begins.
    Phase {
        /// Its name, in lower case: `negotiate`, `probe`, `prepare`, `round`, `freeze`, `final-round`, ...
        phase: Cow<'static, str>,
        /// Which round, where the phase is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        round: Option<u32>,
    },
    /// How far a phase has come; several times a second at most.
    Progress(Progress),
    /// A round has ended: all its pages are in place at the destination.
    Round(Round),
    /// Something the user should know that does not stop the move.
    Warning {
        /// One line.
        text: Cow<'static, str>,
    },
    /// The first thread is about to be stopped: from here on nothing is drawn. After [`Self::Thawed`] it may be once more.
    Frozen,
    /// The source runs on: the move has been called off, or a connection was closed in the last moment and is seen to first.
    Thawed,
    /// The source has given the process away.
    Committed,
    /// The process runs at the destination: drawing goes on.
    Running {
        /// Its pid there.
        dest_pid: i32,
        /// How long no copy ran.
        freeze_ms: f64,
    },
    /// All pages have arrived after the freeze.
    Drained {
        /// How long that took.
        drain_ms: f64,
        /// Pages that were waited for.
        faults: Faults,
    },
    /// It ran at the destination and has ended there before all its pages came.
    Ended,
}

/// How far a phase has come.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Progress {
    /// The phase's name.
    pub phase: Cow<'static, str>,
    /// Which round, 0 outside of rounds.
    pub round: u32,
    /// Pages of this phase that are done.
    pub pages_done: u64,
    /// Pages of this phase.
    pub pages_total: u64,
    /// Bytes sent since the move began.
    pub bytes_on_wire: u64,
    /// Bytes of memory that reach the destination in a second.
    pub rate_bytes_per_s: f64,
    /// Pages that the process writes in a second.
    pub dirty_rate_pages_per_s: f64,
    /// Time that is left of this phase, where it can be guessed.
    pub eta_ms: Option<f64>,
}

/// What a round came to.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Round {
    /// Counted from 1.
    pub number: u32,
    /// Pages sent.
    pub pages: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Pages that were written meanwhile: the next round's work.
    pub dirty_pages: u64,
    /// Its duration.
    pub elapsed_ms: f64,
}

/// Pages that threads at the destination waited for.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Faults {
    /// How many there were.
    pub count: u64,
    /// Median wait in microseconds.
    pub p50_us: f64,
    /// 99th percentile in microseconds.
    pub p99_us: f64,
}

impl Event {
    /// Announces a phase.
    pub fn phase(phase: &'static str) -> Self {
        Self::Phase { phase: Cow::Borrowed(phase), round: None }
    }

    /// Announces a round.
    pub fn round(number: u32) -> Self {
        Self::Phase { phase: Cow::Borrowed("round"), round: Some(number) }
    }

    /// Makes a warning of a line.
    pub fn warning(text: impl Into<Cow<'static, str>>) -> Self {
        Self::Warning { text: text.into() }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(event: &Event) -> serde_json::Value {
        serde_json::to_value(event).unwrap()
    }

    #[test]
    fn events_are_flat_objects_with_a_name() {
        assert_eq!(value(&Event::phase("probe")), json!({"event": "phase", "phase": "probe"}));
        assert_eq!(value(&Event::round(2)), json!({"event": "phase", "phase": "round", "round": 2}));
        assert_eq!(value(&Event::Frozen), json!({"event": "frozen"}));
        assert_eq!(
            value(&Event::Running { dest_pid: 7, freeze_ms: 1.5 }),
            json!({"event": "running", "dest_pid": 7, "freeze_ms": 1.5})
        );
        let round = Round { number: 1, pages: 2, bytes: 3, dirty_pages: 4, elapsed_ms: 5.0 };
        assert_eq!(
            value(&Event::Round(round)),
            json!({"event": "round", "number": 1, "pages": 2, "bytes": 3, "dirty_pages": 4, "elapsed_ms": 5.0})
        );
        assert_eq!(value(&Event::Progress(Progress::default()))["event"], "progress");
    }

    #[test]
    fn events_are_read_back() {
        let events = [
            Event::phase("probe"),
            Event::warning("a heap was split"),
            Event::Progress(Progress { phase: "round".into(), round: 1, eta_ms: Some(2.0), ..Progress::default() }),
            Event::Drained { drain_ms: 1.0, faults: Faults { count: 1, p50_us: 2.0, p99_us: 3.0 } },
        ];
        for event in events {
            let line = serde_json::to_string(&event).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
        }
    }
}
