//! What a page server says on standard output: for scripts that wait for it, one line each.

use serde::Serialize;
use std::fmt;
use std::io::Write;
use std::net::SocketAddr;

/// Something that scripts wait for.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// It listens.
    Listening {
        /// Where.
        address: SocketAddr,
    },
    /// A source has proved who it is and begins.
    Begun {
        /// 32 hexadecimal digits, the same in the source's report.
        migration_id: String,
        /// The source.
        from: SocketAddr,
        /// What it is called in the list of trusted hosts; none where it has proved a token.
        #[serde(skip_serializing_if = "Option::is_none")]
        host: Option<String>,
    },
    /// A host that was invited is trusted from now on.
    Enrolled {
        /// What it is called in the list.
        host: String,
        /// What its key is known by.
        fingerprint: String,
    },
    /// A process runs here and has all its memory.
    Moved {
        /// The migration.
        migration_id: String,
        /// Its pid as this program sees it.
        pid: i32,
    },
    /// A process runs here and waits for memory whose source is not there, and this page server has been told to end.
    Left {
        /// The migration.
        migration_id: String,
        /// Its pid as this program sees it.
        pid: i32,
        /// Pages that are missing.
        missing_pages: u64,
    },
    /// A process has run here and ended before all its memory came.
    Ended {
        /// The migration.
        migration_id: String,
        /// Its pid as this program saw it.
        pid: i32,
    },
    /// A program of this host has connections that came alone.
    HandedOver {
        /// The migration.
        migration_id: String,
        /// How many.
        connections: usize,
    },
    /// A migration came to nothing, and nothing of it is left here.
    Abandoned {
        /// The migration, where it came that far.
        migration_id: Option<String>,
        /// Why.
        reason: String,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listening { address } => write!(f, "listening on {address}"),
            Self::Begun { migration_id, from, host: None } => write!(f, "migration {migration_id} from {from} begins"),
            Self::Begun { migration_id, from, host: Some(host) } => {
                write!(f, "migration {migration_id} from {host} ({from}) begins")
            }
            Self::Enrolled { host, fingerprint } => write!(f, "{host} ({fingerprint}) is trusted from now on"),
            Self::Moved { migration_id, pid } => write!(f, "migration {migration_id}: process {pid} runs here"),
            Self::Left { migration_id, pid, missing_pages } => write!(
                f,
                "migration {migration_id}: process {pid} runs here and waits for {missing_pages} pages: start a page server again, and \
                 its source can go on"
            ),
            Self::Ended { migration_id, pid } => {
                write!(f, "migration {migration_id}: process {pid} has ended here before all its memory came")
            }
            Self::HandedOver { migration_id, connections } => {
                write!(f, "migration {migration_id}: connections handed over: {connections}")
            }
            Self::Abandoned { migration_id: Some(id), reason } => write!(f, "migration {id} abandoned: {reason}"),
            Self::Abandoned { migration_id: None, reason } => write!(f, "a caller was turned away: {reason}"),
        }
    }
}

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// A sentence a line.
    Lines,
    /// A JSON object a line.
    Json,
}

impl Style {
    /// Writes an event to standard output. Nobody may be reading any more, which is no reason to stop.
    pub fn say(self, event: &Event) {
        let line = match self {
            Self::Lines => event.to_string(),
            Self::Json => serde_json::to_string(event).unwrap_or_default(),
        };
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_flat_objects_with_a_name() {
        let event = Event::Moved { migration_id: "ab".to_owned(), pid: 7 };
        let value = serde_json::to_value(&event).unwrap();
        assert_eq!(value, serde_json::json!({"event": "moved", "migration_id": "ab", "pid": 7}));
        let listening = Event::Listening { address: "127.0.0.1:1".parse().unwrap() };
        assert_eq!(listening.to_string(), "listening on 127.0.0.1:1");
    }
}
