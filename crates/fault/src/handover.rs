//! Between a page server and a separate daemon that serves its faults: a UNIX socket, one connection for each migration.
//!
//! The page server hands over copies of the userfaultfds and ledgers and keeps its own, and so does a holder that it has forked: the
//! daemon may see nothing else of the host and could not find it. When the daemon dies the connection ends, and the page server calls its
//! socket again and again until a successor answers, and hands everything over anew. When the page server dies its successor finds what the
//! holder has, and does the same: to a daemon that serves it already it only listens then.
//!
//! The messages are packets of JSON, descriptors travel beside them:
//! ```text
//! daemon       Ports                     on accepting
//! page server  Adopt {last, leash}       userfaultfd, ledger, ...; in the first one a pidfd before all others, and what ends the holder
//! daemon       Adopted | Refused
//! daemon       Child                     userfaultfd, ledger of a forked child
//! page server  Leash                     what ends the holder that has taken the place of one that was killed; read before the end
//! daemon       Drained                   close your copies; it ends the holder itself, for the page server may be gone
//! daemon       Finished                  the source knows, or could not be told
//! ```

mod client;
mod server;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_kernel::rights;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::{Deserialize, Serialize};

pub use client::LazyDaemon;
pub use server::{Event, HandoverListener};

use crate::error::{Error, Result};
use crate::handle::DrainReport;

/// Bytes in the longest message.
const LONGEST: usize = 4096;
/// Time that the other end has for its next word while something is handed over.
const PATIENCE: Duration = Duration::from_secs(10);
/// Userfaultfds in one message, each with its ledger.
const PAIRS: usize = 24;
const VERSION: u32 = 2;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Words {
    Ports { version: u32, faults: u16, drain: u16 },
    Adopt { last: bool, leash: bool },
    Adopted,
    Refused { text: String },
    Child,
    Leash,
    Drained { report: DrainReport },
    Finished { report: DrainReport },
}

/// One connection, at either end.
#[derive(Debug)]
struct Wire {
    socket: OwnedFd,
    path: PathBuf,
}

impl Wire {
    fn new(socket: OwnedFd, path: &Path) -> Self {
        Self { socket, path: path.to_owned() }
    }

    fn send(&self, words: &Words, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let bytes = serde_json::to_vec(words).map_err(|error| self.unexpected(error.to_string()))?;
        rights::send(self.socket.as_fd(), &bytes, fds).map_err(|source| self.failed("sending to", source)).map(drop)
    }

    /// Waits for the next message; `None` at the end.
    fn receive(&self) -> Result<Option<(Words, Vec<OwnedFd>)>> {
        let mut buffer = vec![0; LONGEST];
        let received = loop {
            match rights::receive(self.socket.as_fd(), &mut buffer) {
                Err(godwit_kernel::Errno::EINTR) => {}
                // A peer that was killed with something unread.
                Err(godwit_kernel::Errno::ECONNRESET) => return Ok(None),
                other => break other.map_err(|source| self.failed("receiving from", source))?,
            }
        };
        match received {
            (0, _) => Ok(None),
            (length, fds) => {
                let words = serde_json::from_slice(&buffer[..length]);
                Ok(Some((words.map_err(|error| self.unexpected(error.to_string()))?, fds)))
            }
        }
    }

    /// Limits how long [`Self::receive`] waits, or has it wait for good.
    fn limit(&self, limit: Option<Duration>) -> Result<()> {
        let limit = limit.map_or(TimeVal::seconds(0), |limit| TimeVal::milliseconds(limit.as_millis() as i64));
        setsockopt(&self.socket, sockopt::ReceiveTimeout, &limit).map_err(|source| self.failed("setting up", source))
    }

    fn failed(&self, operation: &'static str, source: godwit_kernel::Errno) -> Error {
        Error::Socket { operation, path: self.path.clone(), source: source.into() }
    }

    fn unexpected(&self, what: impl Into<String>) -> Error {
        Error::Handover { path: self.path.clone(), what: what.into() }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_words_fit() {
        let report = DrainReport {
            bytes_sent: 11,
            faults: u64::MAX,
            p50_us: u64::MAX,
            p99_us: u64::MAX,
            longest_us: u64::MAX,
            holes: u64::MAX,
            pages: u64::MAX,
            drain_us: u64::MAX,
            departed: true,
            acknowledged: true,
        };
        assert!(serde_json::to_vec(&Words::Finished { report }).unwrap().len() <= LONGEST);
        const { assert!(2 * PAIRS + 2 <= rights::MOST) };
    }
}
