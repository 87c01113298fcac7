//! Connections alone, handed to a program on this host over its UNIX socket.
//!
//! The conversation, all of it text of one line each, the receiving program on the right:
//! ```text
//! (connect)                ->
//! {"version": 1, ...}      ->  with the sockets (SCM_RIGHTS, unix(7)): connected, not to be used yet
//!                          <-  accept, or: refuse REASON
//! commit                   ->  from here on they are its own
//! ```
//! An end instead of `commit` says that nothing came of it: the sockets are to be closed, of which nobody will hear.

use anyhow::{Context as _, Result, anyhow, bail};
use godwit_kernel::rights;
use godwit_proto::wire;
use godwit_resources::Obstacle;
use godwit_resources::descriptors::{Complete, put_together};
use nix::sys::socket::{MsgFlags, recv};
use serde::Serialize;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Time that the receiving program has to answer: a process at the source stands still meanwhile.
const ANSWER: Duration = Duration::from_secs(2);
/// Longest answer in bytes.
const LONGEST: usize = 1024;
/// Longest label in bytes.
const LABEL: usize = 4096;

/// What the receiving program is told.
#[derive(Debug, Serialize)]
struct Header<'a> {
    version: u32,
    /// Names the hand-over in the logs of both hosts.
    migration: &'a str,
    /// What the user wants it to know.
    label: &'a str,
    /// The process that had the connections.
    pid: u32,
    comm: &'a str,
    /// In the order of the sockets.
    connections: Vec<Connection>,
}

#[derive(Debug, Serialize)]
struct Connection {
    local: SocketAddr,
    peer: SocketAddr,
    /// The number that it had in its process.
    fd: u32,
}

/// One hand-over.
#[derive(Debug)]
pub(crate) struct Handing {
    name: String,
    /// Where the receiving program listens.
    path: Option<PathBuf>,
    receiver: Option<UnixStream>,
    offer: wire::Offer,
    complete: Option<Complete>,
}

impl Handing {
    pub(crate) fn new(name: String, path: Option<PathBuf>) -> Self {
        Self { name, path, receiver: None, offer: wire::Offer::default(), complete: None }
    }

    /// Whether connections are complete, and only the decision is missing.
    pub(crate) fn is_ready(&self) -> bool {
        self.complete.is_some()
    }

    /// Calls the receiving program, and names what stands in the way.
    pub(crate) fn offer(&mut self, offer: wire::Offer) -> Option<Obstacle> {
        let Some(path) = &self.path else {
            let remedy = "start it with --hand-over-to PATH, where the program listens that is to have them";
            return Some(Obstacle::new("page server", "it knows no program to hand connections to", remedy));
        };
        if offer.label.len() > LABEL {
            return Some(Obstacle::new("label", format!("it has more than {LABEL} bytes"), "give a shorter one"));
        }
        let called = UnixStream::connect(path).and_then(|stream| {
            stream.set_read_timeout(Some(ANSWER))?;
            stream.set_write_timeout(Some(ANSWER))?;
            Ok(stream)
        });
        match called {
            Ok(stream) => self.receiver = Some(stream),
            Err(error) => {
                let text = format!("no program takes connections there: {error}");
                return Some(Obstacle::new(path.display().to_string(), text, "start it at the destination"));
            }
        }
        self.offer = offer;
        None
    }

    /// Puts the connections together and has the receiving program say that it wants them.
    pub(crate) fn hand_over(&mut self, message: wire::HandOver, streams: wire::Streams) -> Result<()> {
        let numbers = message.descriptors;
        let complete = put_together(&wire::Connections { sockets: message.sockets, streams: Some(streams) })?;
        let fd = |at: usize| numbers.get(at).copied().unwrap_or_default();
        let connections =
            complete.ends().enumerate().map(|(at, (local, peer))| Connection { local, peer, fd: fd(at) }).collect();
        let header = Header {
            version: 1,
            migration: &self.name,
            label: &self.offer.label,
            pid: self.offer.pid,
            comm: &self.offer.comm,
            connections,
        };
        let mut line = serde_json::to_vec(&header)?;
        line.push(b'\n');
        let mut receiver = self.receiver.as_ref().ok_or_else(|| anyhow!("no receiving program was called"))?;
        let sockets: Vec<BorrowedFd<'_>> = complete.sockets().collect();
        let sent = rights::send(receiver.as_fd(), &line, &sockets).context("telling the receiving program")?;
        receiver.write_all(line.get(sent..).unwrap_or_default()).context("telling the receiving program")?;
        match answer(receiver)?.as_str() {
            "accept" => {}
            other => {
                let reason = other.strip_prefix("refuse").map_or(other, str::trim);
                bail!("the receiving program does not take them: {reason:?}");
            }
        }
        self.complete = Some(complete);
        Ok(())
    }

    /// Checks that the receiving program still waits; from then on nothing is asked any more.
    ///
    /// # Errors
    /// When it is gone: nothing lives here then, and nothing will.
    pub(crate) fn take(&mut self) -> Result<Complete> {
        let receiver = self.receiver.as_ref().ok_or_else(|| anyhow!("no receiving program was called"))?;
        if recv(receiver.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) == Ok(0) {
            bail!("the receiving program has left");
        }
        self.complete.take().ok_or_else(|| anyhow!("no connections are ready"))
    }

    /// Tells the receiving program that the sockets are its own.
    pub(crate) fn tell(&mut self) {
        if let Some(mut receiver) = self.receiver.take()
            && let Err(error) = receiver.write_all(b"commit\n")
        {
            tracing::warn!(%error, "the receiving program left in the moment of the decision, and its connections with it");
        }
    }
}

/// Waits for the receiving program's answer: a line.
fn answer(mut receiver: &UnixStream) -> Result<String> {
    let deadline = Instant::now() + ANSWER;
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        match receiver.read(&mut byte) {
            Ok(0) => bail!("the receiving program left without an answer"),
            Ok(_) if byte == *b"\n" => return Ok(String::from_utf8_lossy(&line).trim().to_owned()),
            Ok(_) => line.extend(byte),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                bail!("the receiving program did not answer within {} s", ANSWER.as_secs())
            }
            Err(error) => return Err(error).context("waiting for the receiving program's answer"),
        }
        if line.len() > LONGEST || Instant::now() > deadline {
            bail!("the receiving program's answer does not come to an end");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(bytes: &[u8]) -> Result<String> {
        let (mut one, two) = UnixStream::pair().unwrap();
        one.write_all(bytes).unwrap();
        drop(one);
        answer(&two)
    }

    #[test]
    fn answers_are_lines() {
        assert_eq!(said(b"accept\nmore").unwrap(), "accept");
        assert_eq!(said(b"refuse too many\r\n").unwrap(), "refuse too many");
        assert!(said(b"accept").is_err() && said(b"").is_err() && said(&[b'a'; 2000]).is_err());
    }

    #[test]
    fn without_a_receiving_program_nothing_is_taken() {
        let mut handing = Handing::new("test".to_owned(), None);
        assert!(handing.offer(wire::Offer::default()).unwrap().remedy.contains("--hand-over-to"));
        let mut handing = Handing::new("test".to_owned(), Some("/nowhere/at/all".into()));
        assert!(handing.offer(wire::Offer::default()).unwrap().text.contains("no program"));
        assert!(handing.hand_over(wire::HandOver::default(), wire::Streams::default()).is_err() && !handing.is_ready());
        assert!(handing.take().is_err());
    }
}
