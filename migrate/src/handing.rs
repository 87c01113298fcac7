//! Connections alone: what the user wants handed over, and what it came to. The agent does it.

use crate::agent::milliseconds;
use crate::report::{Failure, Obstacle, Outcome};
use crate::request::Request;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// One hand-over.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HandOver {
    /// The process, the destination and the addresses; what a process alone has a say in is left as it is.
    pub request: Request,
    /// Numbers of the descriptors.
    pub descriptors: Vec<i32>,
    /// What the receiving program is told.
    pub label: String,
}

/// What became of the connections.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum ConnectionState {
    /// They are the process's, as before.
    #[serde(rename = "as before")]
    AsBefore,
    /// The receiving program has them.
    #[serde(rename = "handed over")]
    HandedOver,
    /// It is not known whether the receiving program has them; the process has them no more.
    #[serde(rename = "unknown")]
    Unknown,
}

/// What a hand-over came to.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "event", rename = "report")]
pub struct HandOverReport {
    /// 32 hexadecimal digits, the same in both hosts' logs; empty when it never came to that.
    pub migration_id: String,
    /// How it ended; `moved` is success.
    pub outcome: Outcome,
    /// The process.
    pub source_pid: i32,
    /// The descriptors.
    pub descriptors: Vec<i32>,
    /// What became of the connections.
    pub connections: ConnectionState,
    /// How long the process was stopped, in milliseconds.
    pub stopped_ms: f64,
    /// From the first word to the last packet, in milliseconds.
    pub total_ms: f64,
    /// Bytes sent, everything included.
    pub bytes_on_wire: u64,
    /// Everything that stood in the way.
    #[serde(default)]
    pub obstacles: Vec<Obstacle>,
    /// What went wrong.
    #[serde(default)]
    pub error: Option<Failure>,
}

impl HandOverReport {
    /// Starts the report of a hand-over that has come to nothing yet.
    pub fn new(wish: &HandOver) -> Self {
        Self {
            migration_id: String::new(),
            outcome: Outcome::Failed,
            source_pid: wish.request.pid,
            descriptors: wish.descriptors.clone(),
            connections: ConnectionState::AsBefore,
            stopped_ms: 0.0,
            total_ms: 0.0,
            bytes_on_wire: 0,
            obstacles: Vec::new(),
            error: None,
        }
    }

    /// Notes how long it took.
    pub(crate) fn took(&mut self, whole: Duration) {
        self.total_ms = milliseconds(whole);
    }

    /// Gives the program's exit code: 0 handed over, 1 not, 3 unknown.
    pub fn exit_code(&self) -> u8 {
        match self.outcome {
            Outcome::Moved | Outcome::Ended => 0,
            Outcome::Unknown => 3,
            Outcome::Refused | Outcome::Failed | Outcome::Cancelled => 1,
        }
    }
}
