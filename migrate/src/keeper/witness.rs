//! What an agent has said, in memory that outlives it: should it be killed, its front can still tell how far the move has come.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::event::Event;

/// Events of one move, one JSON object a line. Rests on memfd_create(2).
#[derive(Debug)]
pub struct Witness {
    file: File,
    begun: Instant,
}

/// An event that was said, and when.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
pub struct Said {
    /// How long after the witness was made.
    pub after: Duration,
    /// What was said.
    pub event: Event,
}

impl Witness {
    /// Knows nothing yet. To be made before the agent is, which inherits it.
    ///
    /// # Errors
    /// What memfd_create(2) says.
    pub fn new() -> Result<Self, Errno> {
        let file = memfd_create(c"godwit-witness", MFdFlags::MFD_CLOEXEC)?.into();
        Ok(Self { file, begun: Instant::now() })
    }

    /// When it was made.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// Notes an event. Takes some microseconds, and never waits for anybody.
    pub fn note(&self, event: &Event) {
        // A report has no use for them, and there can be any number.
        if matches!(event, Event::Progress(_) | Event::Warning { .. }) {
            return;
        }
        let said = Said { after: self.begun.elapsed(), event: event.clone() };
        // Without memory for it the move goes on all the same.
        let _ = serde_json::to_string(&said).map(|line| (&self.file).write_all((line + "\n").as_bytes()));
    }

    /// What was noted, in order; up to the first line that was not finished. For when the agent has ended.
    pub fn said(&self) -> Vec<Said> {
        let mut text = String::new();
        let mut file = &self.file;
        let _ = file.rewind().and_then(|()| file.read_to_string(&mut text));
        text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_is_kept_up_to_where_it_breaks_off() {
        let witness = Witness::new().unwrap();
        witness.note(&Event::phase("probe"));
        witness.note(&Event::warning("of no interest here"));
        witness.note(&Event::Running { dest_pid: 7, freeze_ms: 1.5 });
        (&witness.file).write_all(b"{\"after\":{\"se").unwrap();
        let said: Vec<Event> = witness.said().into_iter().map(|said| said.event).collect();
        assert_eq!(said, [Event::phase("probe"), Event::Running { dest_pid: 7, freeze_ms: 1.5 }]);
    }
}
