//! A peer of the programs under test that has the token or is trusted, and keeps to nothing else: it says whatever a test wants it to.

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use godwit_carry::{Connector, Credentials, Frame, Link, Profile, Receiver, Sender, Token};
use godwit_proto::Typed;
use godwit_proto::wire::{Failure, MessageType};
use godwit_stream::FrameHeader;
use tokio::time::timeout;

use crate::host::Host;

/// Time in which the other side says something.
const PATIENCE: Duration = Duration::from_secs(20);

/// A link to a page server, with nobody's manners.
#[derive(Debug)]
pub struct Peer {
    /// The link, to close it or to hear how it ended.
    pub link: Link,
    /// What it says.
    pub sender: Sender,
    receiver: Receiver,
}

/// How the other side ended a conversation.
#[derive(Clone, Debug, Default)]
pub struct Farewell {
    /// The failure that it reported, if it did.
    pub failure: Option<String>,
    /// Messages that came before.
    pub replies: Vec<MessageType>,
    /// Why the link ended.
    pub end: String,
}

impl Host {
    /// Runs a conversation on this host's network, beside the caller. It ends with an error of its own, or when it takes longer
    /// than `limit`.
    pub fn converse_aside<T, F>(
        &self,
        limit: Duration,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> std::thread::JoinHandle<Result<T>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>>,
    {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.init_pid()));
        std::thread::spawn(move || {
            nix::sched::setns(namespace?, nix::sched::CloneFlags::CLONE_NEWNET)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { timeout(limit, work()).await.context("the conversation does not end")? })
        })
    }

    /// As [`Self::converse_aside`], and waits for it.
    ///
    /// # Errors
    /// As there.
    pub fn converse<T, F>(&self, limit: Duration, work: impl FnOnce() -> F + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>>,
    {
        self.converse_aside(limit, work).join().map_err(|_| anyhow!("a conversation panicked"))?
    }
}

impl Peer {
    /// Calls a page server at `address` with the right token.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn call(address: SocketAddr, token: &Path) -> Result<Self> {
        Self::call_for(address, token, Profile::Bulk).await
    }

    /// Calls for one of the uses of a link.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn call_for(address: SocketAddr, token: &Path, profile: Profile) -> Result<Self> {
        Self::call_as(address, Token::load(token)?, profile).await
    }

    /// Calls as a host of its own.
    ///
    /// # Errors
    /// Nobody answers, or not to this one.
    pub async fn call_as(address: SocketAddr, who: impl Into<Credentials>, profile: Profile) -> Result<Self> {
        let (link, channel) = Connector::new(who, profile).connect(address, Duration::from_secs(10)).await?;
        let (sender, receiver) = channel.split();
        Ok(Self { link, sender, receiver })
    }

    /// Says a message.
    ///
    /// # Errors
    /// The link has ended.
    pub async fn say<M: Typed>(&mut self, message: &M) -> Result<()> {
        self.say_bytes(M::TYPE as u32, message.encode_to_vec()).await
    }

    /// Says a message of any type with any content.
    ///
    /// # Errors
    /// The link has ended.
    pub async fn say_bytes(&mut self, kind: u32, bytes: Vec<u8>) -> Result<()> {
        Ok(self.sender.send_message(kind, 0, Bytes::from(bytes)).await?)
    }

    /// Says a frame as it was said once.
    ///
    /// # Errors
    /// The link has ended.
    pub async fn say_frame(&mut self, frame: &Frame) -> Result<()> {
        Ok(self.sender.send_pages(frame.header, Some(frame.payload.clone())).await?)
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// The link has ended, or nothing came.
    pub async fn hear(&mut self) -> Result<Frame> {
        let frame = timeout(PATIENCE, self.receiver.receive()).await.context("nothing was said")??;
        frame.context("the other side has left")
    }

    /// Waits for a message of one type, passing over others.
    ///
    /// # Errors
    /// The link has ended, a failure came, or nothing.
    pub async fn hear_of(&mut self, kind: MessageType) -> Result<Frame> {
        loop {
            let frame = self.hear().await?;
            match frame.message_type() {
                Some(heard) if heard == kind as u32 => return Ok(frame),
                Some(heard) if heard == MessageType::Failure as u32 => {
                    let failure: Failure = godwit_proto::decode(&frame.payload)?;
                    return Err(anyhow!("instead of {kind:?} a failure: {}", failure.text));
                }
                _ => {}
            }
        }
    }

    /// Listens until the other side ends the link.
    ///
    /// # Errors
    /// It does not.
    pub async fn farewell(mut self) -> Result<Farewell> {
        let mut farewell = Farewell::default();
        loop {
            match timeout(PATIENCE, self.receiver.receive()).await.context("the link is kept")? {
                Ok(Some(frame)) => {
                    let kind = frame.message_type().and_then(|kind| MessageType::try_from(kind as i32).ok());
                    if kind == Some(MessageType::Failure) {
                        farewell.failure = Some(godwit_proto::decode::<Failure>(&frame.payload)?.text);
                    }
                    farewell.replies.extend(kind);
                }
                Ok(None) => {
                    let closed = timeout(PATIENCE, self.link.closed()).await.context("the link is kept")?;
                    farewell.end = closed.to_string();
                    return Ok(farewell);
                }
                Err(error) => {
                    farewell.end = error.to_string();
                    return Ok(farewell);
                }
            }
        }
    }
}

/// A frame of a message.
#[must_use]
pub fn message_frame(kind: u32, bytes: Vec<u8>) -> Frame {
    let header = FrameHeader::message(kind, 0, bytes.len() as u32);
    Frame { header, payload: Bytes::from(bytes) }
}
