//! Somebody between a source and a page server who has the token: passes frames on, and writes down, changes, leaves out or adds
//! what a test wants.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use godwit_carry::{Connector, Frame, Listener, Profile, Receiver, Sender, Token};
use godwit_proto::wire::MessageType;
use tokio::sync::oneshot;

use crate::host::Host;

/// Who says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    /// `migrate`.
    Source,
    /// The page server, or its fault service.
    Destination,
}

/// Something that was said.
#[derive(Clone, Debug)]
pub struct Said {
    /// By whom.
    pub by: Speaker,
    /// On which of the three ports, counted from the control connection's.
    pub port: u16,
    /// As which of this speaker's words on this port, counted from 0.
    pub number: usize,
    /// What.
    pub frame: Frame,
}

impl Said {
    /// The type of message, or `None` for pages.
    pub fn kind(&self) -> Option<MessageType> {
        self.frame.message_type().and_then(|kind| MessageType::try_from(kind as i32).ok())
    }
}

/// What is said instead.
#[derive(Clone, Debug)]
pub enum Instead {
    /// The same.
    Same,
    /// These frames, or nothing.
    These(Vec<Frame>),
    /// Nothing any more: the link is closed.
    End,
}

type Changes = dyn Fn(&Said) -> Instead + Send + Sync;

/// Somebody in the middle. Dropping it ends all links.
#[derive(Debug)]
pub struct GoBetween {
    /// Where a source calls instead.
    pub address: String,
    said: Arc<Mutex<Vec<Said>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl GoBetween {
    /// Stands between the host's `migrate` and the page server at `to`; `changes` says what becomes of every word.
    ///
    /// # Errors
    /// It cannot listen on the host's address with the page server's ports.
    pub fn stand(
        host: &Host,
        to: &str,
        token: &Path,
        changes: impl Fn(&Said) -> Instead + Send + Sync + 'static,
    ) -> Result<Self> {
        let to: SocketAddr = to.parse()?;
        let own = SocketAddr::new(host.address().parse()?, to.port());
        let token = Token::load(token)?;
        let said: Arc<Mutex<Vec<Said>>> = Arc::default();
        let (stop, stopped) = oneshot::channel();
        let (ready, listening) = std::sync::mpsc::channel();
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", host.init_pid()))?;
        let (record, changes): (_, Arc<Changes>) = (said.clone(), Arc::new(changes));
        let thread = std::thread::spawn(move || {
            let work = || -> Result<()> {
                nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    for port in 0..3 {
                        let at = |address: SocketAddr| SocketAddr::new(address.ip(), address.port() + port);
                        let profile = if port == 1 { Profile::Faults } else { Profile::Bulk };
                        let listener = Listener::bind(at(own), &token, profile)?;
                        let between = Between {
                            token: token.clone(),
                            to: at(to),
                            port,
                            profile,
                            record: record.clone(),
                            changes: changes.clone(),
                        };
                        tokio::spawn(async move {
                            while let Some(incoming) = listener.accept().await {
                                let between = between.clone();
                                tokio::spawn(async move {
                                    // A call that comes to nothing is the test's to notice.
                                    let _ = between.pass_on(incoming).await;
                                });
                            }
                        });
                    }
                    let _ = ready.send(Ok(()));
                    let _ = stopped.await;
                    Ok(())
                })
            };
            if let Err(error) = work() {
                let _ = ready.send(Err(error));
            }
        });
        listening.recv_timeout(Duration::from_secs(10)).context("the one in the middle does not listen")??;
        Ok(Self { address: own.to_string(), said, stop: Some(stop), thread: Some(thread) })
    }

    /// All that was said so far, before changes.
    pub fn said(&self) -> Vec<Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for GoBetween {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Clone)]
struct Between {
    token: Token,
    to: SocketAddr,
    port: u16,
    profile: Profile,
    record: Arc<Mutex<Vec<Said>>>,
    changes: Arc<Changes>,
}

impl Between {
    async fn pass_on(self, incoming: godwit_carry::Incoming) -> Result<()> {
        let (source, channel) = incoming.authenticate().await?;
        let (to_source, from_source) = channel.split();
        let connector = Connector::new(&self.token, self.profile);
        let (destination, channel) = connector.connect(self.to, Duration::from_secs(5)).await?;
        let (to_destination, from_destination) = channel.split();
        let there = self.clone().one_way(Speaker::Source, from_source, to_destination);
        let back = self.one_way(Speaker::Destination, from_destination, to_source);
        // N.B. one direction may end in order long before the other.
        let (there, back) = (tokio::spawn(there), tokio::spawn(back));
        let reason = tokio::select! {
            error = source.closed() => error.to_string(),
            error = destination.closed() => error.to_string(),
            Ok(Err(_)) = there => "ended in the middle".to_owned(),
            Ok(Err(_)) = back => "ended in the middle".to_owned(),
        };
        source.close(godwit_carry::CODE_DONE, &reason);
        destination.close(godwit_carry::CODE_DONE, &reason);
        Ok(())
    }

    async fn one_way(self, by: Speaker, mut from: Receiver, mut to: Sender) -> Result<()> {
        let mut number = 0;
        while let Some(frame) = from.receive().await? {
            let said = Said { by, port: self.port, number, frame };
            number += 1;
            self.record.lock().unwrap_or_else(PoisonError::into_inner).push(said.clone());
            match (self.changes)(&said) {
                Instead::Same => send(&mut to, said.frame).await?,
                Instead::These(frames) => {
                    for frame in frames {
                        send(&mut to, frame).await?;
                    }
                }
                Instead::End => anyhow::bail!("the end"),
            }
        }
        to.finish().await?;
        Ok(())
    }
}

async fn send(to: &mut Sender, frame: Frame) -> Result<()> {
    let payload = (!frame.payload.is_empty()).then_some(frame.payload);
    Ok(to.send_pages(frame.header, payload).await?)
}

/// Where the recorded words of migrations are kept, if a run is to keep them.
#[must_use]
pub fn corpus_folder() -> Option<PathBuf> {
    std::env::var_os("GODWIT_CORPUS").map(PathBuf::from)
}
