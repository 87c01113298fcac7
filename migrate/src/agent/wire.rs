//! The control connection, for a thread that blocks: the agent's own thread must be an ordinary one (ptrace(2)).

use super::presence::Presence;
use super::stop::{Result, Stop};
use crate::cancel::Cancel;
use bytes::Bytes;
use godwit_carry::{Connector, Credentials, Link, Party, Profile, resolve};
use godwit_proto::wire::verdict::Standing;
use godwit_proto::wire::{self, MessageType};
use godwit_proto::{Message, Typed, decode};
use godwit_session::decision::Verdict;
use godwit_stream::{EncodedFrame, decode_message};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

/// Time that connecting may take.
const CONNECT: Duration = Duration::from_secs(5);
/// Batches of frames that may wait to be sent; with 1 MiB each they bound the agent's memory.
const QUEUE: usize = 6;
/// Time that a full queue may stay full.
const STALLED: Duration = Duration::from_secs(10);
/// What is said of a page server whose port nobody has.
const GONE: &str = "nobody listens there any more";
/// What helps then.
const START_IT: &str = "start page-server there, and run the same command again";
/// How often a wait looks whether the user has had enough.
const GLANCE: Duration = Duration::from_millis(50);
/// Bytes of messages that may wait for the agent, each counted with [`MESSAGE`] more. A page server says nothing unasked.
const UNREAD: usize = 32 << 20;
const MESSAGE: usize = 4096;

/// What a destination says about the hand-over.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) verdict: Verdict,
    /// The process there, where there is one.
    pub(super) pid: i32,
    /// Why its copy will never run.
    pub(super) reason: String,
    /// It has ended there before all its pages came.
    pub(super) ended: bool,
}

/// The page server that a process is given to.
#[derive(Clone, Debug)]
pub(super) struct Counterpart {
    /// How both know each other.
    pub(super) credentials: Credentials,
    /// Who it has proved to be.
    pub(super) party: Party,
}

/// A connection to the page server.
#[derive(Debug)]
pub(super) struct Wire {
    link: Link,
    outgoing: Option<mpsc::Sender<Vec<EncodedFrame>>>,
    cancel: Cancel,
    incoming: Receiver<std::result::Result<godwit_carry::Frame, godwit_carry::Error>>,
    /// What waits in there, in bytes.
    unread: Arc<AtomicUsize>,
    writer: Option<tokio::task::JoinHandle<()>>,
    // N.B. last: the tasks above end before it does.
    runtime: tokio::runtime::Runtime,
}

fn size(frame: &godwit_carry::Frame) -> usize {
    frame.payload.len() + MESSAGE
}

impl Wire {
    /// Calls the page server; both prove who they are.
    ///
    /// # Errors
    /// When nobody answers there, or one side does not want the other.
    pub(super) fn connect(to: &str, credentials: &Credentials, cancel: &Cancel) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("wire")
            .enable_all()
            .build()
            .map_err(|error| Stop::failed("runtime", error.to_string()))?;
        let (link, stream) = runtime.block_on(async {
            let addresses = resolve(to, godwit_carry::DEFAULT_PORT).await?;
            Connector::new(credentials, Profile::Bulk).connect_any(&addresses, CONNECT).await
        })?;
        let (mut sender, mut receiver) = stream.split();
        let (outgoing, mut queue) = mpsc::channel::<Vec<EncodedFrame>>(QUEUE);
        let (deliver, incoming) = channel();
        let writer = runtime.spawn(async move {
            while let Some(frames) = queue.recv().await {
                if sender.send_frames(frames).await.is_err() {
                    return;
                }
            }
            let _ = sender.finish().await;
        });
        let unread = Arc::new(AtomicUsize::new(0));
        let (waiting, noisy) = (unread.clone(), link.clone());
        runtime.spawn(async move {
            loop {
                let item = match receiver.receive().await {
                    Ok(Some(frame)) => Ok(frame),
                    Ok(None) => Err(godwit_carry::Error::Closed),
                    Err(error) => Err(error),
                };
                let size = item.as_ref().map_or(0, size);
                if waiting.fetch_add(size, Ordering::Relaxed) > UNREAD {
                    noisy.close(godwit_carry::CODE_PROTOCOL, "nobody has asked for so much");
                    return;
                }
                let last = item.is_err();
                if deliver.send(item).is_err() || last {
                    return;
                }
            }
        });
        Ok(Self {
            link,
            outgoing: Some(outgoing),
            cancel: cancel.clone(),
            incoming,
            unread,
            writer: Some(writer),
            runtime,
        })
    }

    /// Who the page server has proved to be.
    pub(super) fn party(&self) -> Party {
        self.link.party()
    }

    /// The page server's address.
    pub(super) fn peer(&self) -> SocketAddr {
        self.link.remote_address()
    }

    /// Bytes sent so far, everything inside UDP.
    pub(super) fn bytes_sent(&self) -> u64 {
        self.link.bytes_sent()
    }

    /// Queues frames; waits while the queue is full, but not for ever: the process may be frozen meanwhile, and a peer that
    /// answers on the link need not take anything in.
    ///
    /// # Errors
    /// When the link is lost, the peer takes nothing in, or the user has had enough of waiting.
    pub(super) fn send_frames(&self, frames: Vec<EncodedFrame>) -> Result<()> {
        let outgoing = self.outgoing.as_ref().expect("open until dropped");
        let frames = match outgoing.try_send(frames) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Closed(_)) => return Err(self.lost()),
            Err(TrySendError::Full(frames)) => frames,
        };
        let failed = |text: String| Err(Stop::failed(format!("page server {}", self.peer()), text));
        self.runtime.block_on(async {
            let (begun, mut presence) = (Instant::now(), None);
            let mut sending = std::pin::pin!(outgoing.send(frames));
            loop {
                tokio::select! {
                    sent = &mut sending => return sent.map_err(|_| self.lost()),
                    () = self.cancel.cancelled() => return Err(Stop::Cancelled),
                    () = tokio::time::sleep(GLANCE) => {}
                }
                if self.is_gone(&mut presence) {
                    return Err(self.gone());
                }
                if begun.elapsed() >= STALLED {
                    return failed(format!("it has taken nothing in for {} s", STALLED.as_secs()));
                }
            }
        })
    }

    fn gone(&self) -> Stop {
        Stop::with_remedy(format!("page server {}", self.peer()), GONE, START_IT)
    }

    /// Whether nobody is there any more; asked again and again while something is waited for.
    fn is_gone(&self, presence: &mut Option<Presence>) -> bool {
        let received = self.link.bytes_received();
        if presence.is_none() {
            *presence = Presence::of(self.peer(), received);
        }
        presence.as_mut().is_some_and(|presence| presence.is_gone(received))
    }

    /// Queues a message.
    ///
    /// # Errors
    /// When the link is lost.
    pub(super) fn send<M: Message + Typed>(&self, message: &M) -> Result<()> {
        let payload = Bytes::from(message.encode_to_vec());
        let header = godwit_stream::FrameHeader::message(M::TYPE as u32, 0, payload.len() as u32);
        self.send_frames(vec![(header, Some(payload))])
    }

    /// Waits for a message of one kind; anything else but a failure report is a violation of the protocol.
    ///
    /// # Errors
    /// The destination's failure, the loss of the link, or the time limit.
    pub(super) fn receive<M: Message + Typed + Default>(&self, limit: Duration, cancel: Option<&Cancel>) -> Result<M> {
        self.receive_before(limit, Some(limit), cancel)
    }

    /// As [`Wire::receive`], but the time limit is counted from when the peer has taken in what was sent before; `longest`: from now.
    ///
    /// # Errors
    /// As [`Wire::receive`].
    pub(super) fn receive_before<M: Message + Typed + Default>(
        &self,
        limit: Duration,
        longest: Option<Duration>,
        cancel: Option<&Cancel>,
    ) -> Result<M> {
        let begun = Instant::now();
        let last = longest.map(|longest| begun + longest);
        let mut deadline = last.map_or(begun + limit, |last| last.min(begun + limit));
        let moved = || (self.link.stream_frames_sent(), self.link.bytes_received());
        let mut seen = moved();
        let mut presence = None;
        let frame = loop {
            if cancel.is_some_and(Cancel::is_cancelled) {
                return Err(Stop::Cancelled);
            }
            let now = Instant::now();
            let (sent, received) = moved();
            // N.B. both: on a link that is cut, things are sent again.
            if sent != seen.0 && received != seen.1 {
                seen = (sent, received);
                deadline = last.map_or(now + limit, |last| last.min(now + limit));
            }
            if now >= deadline {
                let text = format!("no {:?} came within {:.1} s", M::TYPE, begun.elapsed().as_secs_f64());
                return Err(Stop::failed(format!("page server {}", self.peer()), text));
            }
            match self.incoming.recv_timeout(GLANCE.min(deadline - now)) {
                Ok(Ok(frame)) => {
                    self.unread.fetch_sub(size(&frame), Ordering::Relaxed);
                    break frame;
                }
                Ok(Err(godwit_carry::Error::Closed)) => return Err(self.lost()),
                Ok(Err(error)) => return Err(error.into()),
                Err(RecvTimeoutError::Timeout) => {
                    if self.is_gone(&mut presence) {
                        return Err(self.gone());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.lost()),
            }
        };
        self.decode(frame)
    }

    /// Waits for what the destination says about the hand-over.
    ///
    /// # Errors
    /// As [`Wire::receive`].
    pub(super) fn receive_answer(&self, limit: Duration) -> Result<Answer> {
        let frame = match self.incoming.recv_timeout(limit) {
            Ok(Ok(frame)) => {
                self.unread.fetch_sub(size(&frame), Ordering::Relaxed);
                frame
            }
            Ok(Err(godwit_carry::Error::Closed)) => return Err(self.lost()),
            Ok(Err(error)) => return Err(error.into()),
            Err(RecvTimeoutError::Timeout) => {
                let text = format!("no word on the hand-over came within {:.1} s", limit.as_secs_f64());
                return Err(Stop::failed(format!("page server {}", self.peer()), text));
            }
            Err(RecvTimeoutError::Disconnected) => return Err(self.lost()),
        };
        if frame.message_type() == Some(MessageType::Running as u32) {
            let running: wire::Running = self.decode(frame)?;
            return Ok(Answer {
                verdict: Verdict::Runs { complete: running.complete },
                pid: running.pid as i32,
                reason: String::new(),
                ended: false,
            });
        }
        let verdict: wire::Verdict = self.decode(frame)?;
        Ok(Answer {
            verdict: match verdict.standing() {
                Standing::Unknown => Verdict::Unknown,
                Standing::Waiting => Verdict::Waiting,
                Standing::Runs => Verdict::Runs { complete: false },
                Standing::Complete => Verdict::Runs { complete: true },
                Standing::Aborted => Verdict::Aborted,
            },
            pid: verdict.pid as i32,
            reason: verdict.reason,
            ended: verdict.ended,
        })
    }

    /// Whether nothing is known against it.
    pub(super) fn is_up(&self) -> bool {
        self.link.check().is_ok()
    }

    fn decode<M: Message + Typed + Default>(&self, frame: godwit_carry::Frame) -> Result<M> {
        let violated = |text: String| Stop::failed(format!("page server {}", self.peer()), text);
        let kind = frame.message_type().and_then(|kind| MessageType::try_from(kind as i32).ok());
        let bytes = decode_message(&frame.header, frame.payload).map_err(|error| violated(error.to_string()))?;
        match kind {
            Some(kind) if kind == M::TYPE => decode(&bytes).map_err(|error| violated(error.to_string())),
            Some(MessageType::Failure) => {
                Err(Stop::by_peer(decode::<wire::Failure>(&bytes).map_err(|error| violated(error.to_string()))?))
            }
            other => Err(violated(format!("sent {other:?} where {:?} was due", M::TYPE))),
        }
    }

    /// Why the link is gone: what the destination said last, or what the transport says.
    fn lost(&self) -> Stop {
        while let Ok(item) = self.incoming.recv_timeout(Duration::from_millis(200)) {
            match item {
                Ok(frame) => {
                    if let Ok(failure) = self.decode::<wire::Failure>(frame) {
                        return Stop::by_peer(failure);
                    }
                }
                // It has said all it had to say.
                Err(godwit_carry::Error::Closed) => {}
                Err(error) => return error.into(),
            }
        }
        match self.link.check() {
            Err(error) => error.into(),
            Ok(()) => Stop::failed("link", "the page server reads no more"),
        }
    }

    /// Says the last word and gives it time to arrive.
    pub(super) fn close(&mut self, reason: &str) {
        self.outgoing = None;
        if let Some(writer) = self.writer.take() {
            let _ = self.runtime.block_on(async { tokio::time::timeout(Duration::from_secs(1), writer).await });
        }
        self.link.close(godwit_carry::CODE_DONE, reason);
        self.runtime.block_on(self.link.settle(Duration::from_millis(500)));
    }
}
