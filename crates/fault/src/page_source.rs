//! The source's side: answers requests from the frozen process, and knows nothing of what has been sent.
//!
//! Two threads, one for each link, with runtimes of their own. A link that is lost is called again: the service goes on
//! asking for what it lacks. Only the message Drained is the end. The end of a link is not, and after too long without one
//! the outcome is unknown: the copy must stay frozen.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use godwit_carry::{Channel, Connector, Credentials, Link, Party, Profile, Receiver, Sender};
use godwit_pages::{PAGE_SIZE, PageRange};
use godwit_proto::wire::{Drained, DrainedAck, Failure, FailureCode, PageRequest, Role};
use godwit_stream::{Compression, Limits, PageEncoder};
use tokio::sync::watch;

use crate::error::{Error, MigrationId, Result};
use crate::fault_side::chain;
use crate::greeting::{self, decode, say};
use crate::handle::DrainReport;
use crate::priority;

/// Reads pages of whatever is moved.
pub trait PageReader: Send + Sync + 'static {
    /// Reads whole pages at `address` of `space` (0: virtual addresses of the process) until `into` is full.
    ///
    /// # Errors
    /// When any of them cannot be read; `into` then holds nothing of use.
    fn read(&self, space: u32, address: u64, into: &mut [u8]) -> Result<()>;
}

impl<R: PageReader + ?Sized> PageReader for Arc<R> {
    fn read(&self, space: u32, address: u64, into: &mut [u8]) -> Result<()> {
        (**self).read(space, address, into)
    }
}

/// Serves a fault service.
#[derive(Clone, Debug)]
pub struct PageSource {
    /// Where it listens for faults.
    pub faults_addr: SocketAddr,
    /// Where it listens for the drain.
    pub drain_addr: SocketAddr,
    /// How this host and that of the service know each other.
    pub credentials: Credentials,
    /// Who the service must be: nobody else is given pages, or believed that it has all of them.
    pub party: Party,
    /// Which migration.
    pub id: MigrationId,
    /// How long a link may be gone.
    pub give_up_after: Duration,
    /// How pages of the drain are compressed; those under faults never are.
    pub compression: Compression,
}

/// How the two threads stand.
#[derive(Clone, Debug)]
enum Outcome {
    Open,
    Drained(DrainReport),
    GaveUp,
}

/// What the threads share.
#[derive(Clone, Debug)]
struct Shared {
    outcome: watch::Sender<Outcome>,
    begun: watch::Receiver<bool>,
    /// How many links have been made so far.
    links: watch::Sender<u32>,
    /// Why the last call came to nothing.
    trouble: Trouble,
    bytes_sent: Arc<AtomicU64>,
}

type Trouble = Arc<Mutex<Option<Error>>>;

impl Shared {
    /// Says what a link is for, as soon as the service can know of the migration.
    async fn introduce(
        &self,
        accepted: (Link, Channel),
        id: MigrationId,
        role: Role,
    ) -> Result<(Link, Sender, Receiver)> {
        self.links.send_modify(|links| *links += 1);
        // An error means that nobody will ever say so; the outcome then ends this thread.
        let _ = self.begun.clone().wait_for(|begun| *begun).await;
        greeting::introduce(accepted, id, role).await
    }
}

/// A page source at work. Dropping it ends the service.
#[derive(Debug)]
pub struct Serving {
    outcome: watch::Sender<Outcome>,
    begun: watch::Sender<bool>,
    links: watch::Sender<u32>,
    trouble: Trouble,
    bytes_sent: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<Result<()>>>,
}

impl Serving {
    fn shared(&self) -> Shared {
        Shared {
            outcome: self.outcome.clone(),
            begun: self.begun.subscribe(),
            links: self.links.clone(),
            trouble: self.trouble.clone(),
            bytes_sent: self.bytes_sent.clone(),
        }
    }

    /// Waits until both links stand, for at most `limit`.
    ///
    /// # Errors
    /// When they do not: what the last call came to, if it came to anything. At once where this host is turned away.
    pub fn await_links(&self, limit: Duration) -> Result<(), Option<Error>> {
        const BOTH: u32 = 2;
        let deadline = Instant::now() + limit;
        while *self.links.borrow() < BOTH {
            let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            // N.B. who is asked for links for a shorter time than this gives up before.
            let is_over = !matches!(*self.outcome.borrow(), Outcome::Open);
            if is_over || Instant::now() >= deadline || trouble.as_ref().is_some_and(Error::is_refusal) {
                return Err(trouble.take());
            }
            drop(trouble);
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Introduces itself to the service, which must have been told of the migration.
    pub fn begin(&self) {
        self.begun.send_replace(true);
    }

    /// Serves until the service has all it needs.
    ///
    /// # Errors
    /// [`Error::GaveUp`] when there was no link for too long. Then the program at the destination may lack pages: the frozen copy
    /// must be kept. [`Error::NotDrained`] when the service says for seconds that it knows nothing of it: how the hand-over stands is to be
    /// asked. [`Error::SourceGone`] when that has ended: the pages are nowhere any more.
    pub fn wait(mut self) -> Result<DrainReport> {
        self.begin();
        let worked: Vec<_> = self.threads.drain(..).map(std::thread::JoinHandle::join).collect();
        if let Outcome::Drained(report) = &*self.outcome.borrow() {
            return Ok(DrainReport { bytes_sent: self.bytes_sent.load(Ordering::Relaxed), ..report.clone() });
        }
        let failure = worked.into_iter().flatten().find_map(Result::err);
        Err(failure.unwrap_or(Error::ServiceEnded))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        outcome_unknown(&self.outcome);
    }
}

impl PageSource {
    /// Describes a source with the usual settings: no compression, links may be gone for a minute.
    #[must_use]
    pub fn new(
        faults_addr: SocketAddr,
        drain_addr: SocketAddr,
        (credentials, party): (impl Into<Credentials>, Party),
        id: MigrationId,
    ) -> Self {
        Self {
            faults_addr,
            drain_addr,
            credentials: credentials.into(),
            party,
            id,
            give_up_after: Duration::from_secs(60),
            compression: Compression::Off,
        }
    }

    /// Serves pages from `reader` until the service has all it needs. Blocks; for a plain thread.
    ///
    /// # Errors
    /// As [`Serving::wait`].
    pub fn run(&self, reader: impl PageReader) -> Result<DrainReport> {
        self.start(reader)?.wait()
    }

    /// Calls the service already, on threads of its own, and says nothing until [`Serving::begin`]: the handshakes need not
    /// be waited for by the first thread that lacks a page.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(&self, reader: impl PageReader) -> Result<Serving> {
        let reader: Arc<dyn PageReader> = Arc::new(reader);
        let mut serving = Serving {
            outcome: watch::Sender::new(Outcome::Open),
            begun: watch::Sender::new(false),
            links: watch::Sender::new(0),
            trouble: Trouble::default(),
            bytes_sent: Arc::default(),
            threads: Vec::new(),
        };
        for (role, name) in [(Role::Drain, "godwit-drain"), (Role::Faults, "godwit-faults")] {
            let (source, reader, shared) = (self.clone(), reader.clone(), serving.shared());
            let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
                if role == Role::Faults {
                    priority::first();
                }
                source.work(role, reader, &shared)
            });
            serving.threads.push(thread.map_err(|source| Error::Thread { name, source })?);
        }
        Ok(serving)
    }

    fn work(&self, role: Role, reader: Arc<dyn PageReader>, shared: &Shared) -> Result<()> {
        let outcome = &shared.outcome;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| {
            outcome_unknown(outcome);
            Error::Thread { name: "pages", source }
        })?;
        runtime.block_on(async {
            let mut ended = outcome.subscribe();
            tokio::select! {
                biased;
                worked = self.keep_serving(role, reader.as_ref(), shared) => worked,
                _ = ended.wait_for(|outcome| !matches!(outcome, Outcome::Open)) => Ok(()),
            }
        })
    }

    /// Calls, serves, and calls again.
    async fn keep_serving(&self, role: Role, reader: &dyn PageReader, shared: &Shared) -> Result<()> {
        const PAUSE: Duration = Duration::from_millis(100);
        /// A busy host may take its time. A link that is made anew may be one that was cut: calls that go unheard become rare.
        const TO_CALL: Duration = Duration::from_secs(10);
        const TO_CALL_AGAIN: Duration = Duration::from_secs(2);
        let (address, profile) = match role {
            Role::Faults => (self.faults_addr, Profile::Faults),
            _ => (self.drain_addr, Profile::Bulk),
        };
        let connector = Connector::new(&self.credentials, profile).with_timing(greeting::timing());
        /// A service that has just begun may have yet to find what its predecessor has left.
        const UNKNOWN_FOR: Duration = Duration::from_secs(3);
        let mut last_link = Instant::now();
        let mut unknown_since = None;
        let mut to_call = TO_CALL;
        loop {
            let limit = self.give_up_after.min(to_call).max(PAUSE);
            let lost = match connector.connect(address, limit).await {
                Ok((link, _)) if link.party() != self.party => {
                    link.close(greeting::CODE_STRANGER, "another host is awaited here");
                    Error::AnotherHost { address, presented: link.party() }
                }
                Ok(accepted) => {
                    to_call = TO_CALL_AGAIN;
                    match shared.introduce(accepted, self.id, role).await {
                        Ok((link, sender, receiver)) => {
                            let served = self.serve((&link, sender, receiver), (role, reader), &shared.outcome).await;
                            shared.bytes_sent.fetch_add(link.bytes_sent(), Ordering::Relaxed);
                            last_link = Instant::now();
                            match served {
                                Ok(()) => return Ok(()),
                                // N.B. no other link would help.
                                Err(gone @ Error::SourceGone { .. }) => {
                                    outcome_unknown(&shared.outcome);
                                    return Err(gone);
                                }
                                Err(error) => error,
                            }
                        }
                        Err(error) => error,
                    }
                }
                Err(error) => error.into(),
            };
            tracing::debug!(?role, %address, error = %chain(&lost), "no link for missing pages");
            if !matches!(lost, Error::NotDrained { .. }) {
                unknown_since = None;
            } else if unknown_since.get_or_insert_with(Instant::now).elapsed() >= UNKNOWN_FOR {
                outcome_unknown(&shared.outcome);
                return Err(lost);
            }
            if last_link.elapsed() < self.give_up_after {
                shared.trouble.lock().unwrap_or_else(PoisonError::into_inner).replace(lost);
            } else {
                outcome_unknown(&shared.outcome);
                let seconds = self.give_up_after.as_secs();
                return Err(Error::GaveUp { address, seconds, source: Box::new(lost) });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Answers requests on one link, until the service says that it has everything.
    async fn serve(
        &self,
        (link, mut sender, mut receiver): (&Link, Sender, Receiver),
        (role, reader): (Role, &dyn PageReader),
        outcome: &watch::Sender<Outcome>,
    ) -> Result<()> {
        let violated = |what: &str| Error::Protocol { address: link.remote_address(), what: what.to_owned() };
        let compression = if role == Role::Faults { Compression::Off } else { self.compression };
        let mut encoder = PageEncoder::new(compression);
        let mut buffer = BytesMut::new();
        loop {
            let frame = receiver.receive().await?.ok_or_else(|| violated("the service left"))?;
            if let Some(request) = decode::<PageRequest>(&frame) {
                let length = u64::from(request.pages) * PAGE_SIZE;
                if length > Limits::FRAME_BYTES as u64
                    || PageRange::from_pages(request.address, request.pages.into()).is_err()
                {
                    return Err(violated("a request for no pages, or too many"));
                }
                // Memory comes back to the buffer when what was sent from it is acknowledged.
                buffer.clear();
                buffer.resize(length as usize, 0);
                match reader.read(request.space, request.address, &mut buffer) {
                    Ok(()) => {
                        let pages = buffer.split().freeze();
                        let frames = encoder.encode_shared(request.space, request.address, &pages, request.id);
                        sender.send_frames(frames).await?;
                    }
                    Err(error) => {
                        tracing::error!(error = %chain(&error), "a page of the frozen process is lost");
                        say(&mut sender, request.id, &unreadable(&request, &error)).await?;
                        if matches!(error, Error::SourceGone { .. }) {
                            let _ = tokio::time::timeout(Duration::from_secs(2), sender.finish()).await;
                            return Err(error);
                        }
                    }
                }
            } else if let Some(drained) = decode::<Drained>(&frame) {
                say(&mut sender, 0, &DrainedAck {}).await?;
                let _ = tokio::time::timeout(Duration::from_secs(2), sender.finish()).await;
                link.close(greeting::CODE_ACKNOWLEDGED, "drained");
                link.settle(Duration::from_millis(300)).await;
                outcome.send_replace(Outcome::Drained(report(&drained)));
                return Ok(());
            } else {
                return Err(violated("a message that is no request"));
            }
        }
    }
}

fn outcome_unknown(outcome: &watch::Sender<Outcome>) {
    outcome.send_if_modified(|outcome| {
        let open = matches!(outcome, Outcome::Open);
        if open {
            *outcome = Outcome::GaveUp;
        }
        open
    });
}

fn unreadable(request: &PageRequest, error: &Error) -> Failure {
    Failure {
        phase: "drain".into(),
        resource: format!("{} pages at {:#x}", request.pages, request.address),
        text: chain(error),
        remedy: String::new(),
        code: FailureCode::System.into(),
    }
}

fn report(drained: &Drained) -> DrainReport {
    DrainReport {
        faults: drained.faults,
        p50_us: drained.p50_us,
        p99_us: drained.p99_us,
        drain_us: drained.drain_us,
        pages: drained.pages,
        departed: drained.departed,
        acknowledged: true,
        ..DrainReport::default()
    }
}
