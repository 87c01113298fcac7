//! Accepting migrations, many at a time.

use crate::arrivals::Holds;
use crate::event::{Event, Style};
use crate::migration::{self, Ending};
use crate::policy::Policy;
use crate::registry::Registry;
use crate::standing::Standing;
use crate::workshop;
use anyhow::{Context as _, Result, anyhow};
use godwit_carry::{Answered, Complaints, Credentials, Incoming, Invitations, Listener, Profile, Service};
use godwit_fault::{AtEnd, DrainHandle, FaultListenerConfig, FaultService, LazyDaemon, Migration};
use godwit_kernel::uffd::Userfaultfd;
use godwit_rebuild::Missing;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

/// Time that a source whose link is lost has to come back once this program is to end.
pub(crate) const COMING_BACK: Duration = Duration::from_secs(10);

/// How a page server is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where it listens.
    pub listen: SocketAddr,
    /// A secret that both ends know, where they are to go by that.
    pub token_file: Option<PathBuf>,
    /// Where this host's key and the hosts that it trusts are.
    pub config_dir: PathBuf,
    /// The socket of a separate `lazy-pages daemon`; without it faults are served here.
    pub lazy_socket: Option<PathBuf>,
    /// The socket of a program that takes connections alone.
    pub hand_over_to: Option<PathBuf>,
    /// Where hand-overs are written down.
    pub state_directory: PathBuf,
    /// What others may send.
    pub policy: Policy,
    /// Whether it ends after one migration.
    pub once: bool,
    /// How long a source may take to say the next thing.
    pub patience: Duration,
    /// How it says what happens.
    pub style: Style,
}

/// A page server that listens.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
    once: bool,
}

/// What all migrations share.
#[derive(Debug)]
pub(crate) struct Shared {
    faults: FaultPlace,
    pub(crate) registry: Registry,
    pub(crate) holds: Holds,
    pub(crate) hand_over_to: Option<PathBuf>,
    pub(crate) style: Style,
    pub(crate) patience: Duration,
    pub(crate) policy: Policy,
    /// Places for migrations, where they are counted.
    places: Arc<Semaphore>,
    complaints: Complaints,
    /// Whether this program is to end as soon as it can.
    ends: watch::Sender<bool>,
}

/// Who serves the faults of processes that run before their memory is here.
#[derive(Debug)]
enum FaultPlace {
    /// This program.
    Here(FaultService),
    /// A separate daemon, which can be replaced while it serves.
    Daemon(LazyDaemon),
}

impl FaultPlace {
    /// Goes on serving processes whose page server was killed before they had all their pages.
    fn take_over(&self, registry: &Registry) -> std::io::Result<()> {
        match self {
            Self::Here(service) => {
                let at_end = |id| {
                    let standing = registry.take_over(id, false)?;
                    Some(AtEnd::new(move |departed| standing.drained(departed)))
                };
                for drain in service.take_over_orphans(at_end)? {
                    tracing::info!(migration = %drain.id(), missing = drain.missing_pages(), "going on where a page server was killed");
                }
            }
            Self::Daemon(daemon) => {
                for id in daemon.take_over_orphans()? {
                    registry.take_over(id, true);
                    tracing::info!(migration = %id, "going on where a page server was killed");
                }
            }
        }
        Ok(())
    }
}

/// The fault service as one migration uses it.
#[derive(Debug)]
pub(crate) struct MigrationFaults {
    standing: Arc<Standing>,
    shared: Arc<Shared>,
    handle: Option<DrainHandle>,
}

impl workshop::Faults for MigrationFaults {
    fn adopt(&mut self, pid: i32, missing: Missing) -> Result<()> {
        let uffd = Userfaultfd::from_fd(missing.userfaultfd);
        let standing = self.standing.clone();
        let migration = Migration {
            id: standing.id,
            party: standing.party,
            pid,
            uffd,
            pending: missing.pages,
            at_end: Some(AtEnd::new(move |departed| standing.drained(departed))),
        };
        self.handle = Some(match &self.shared.faults {
            FaultPlace::Here(service) => service.adopt(migration)?,
            FaultPlace::Daemon(daemon) => daemon.adopt(migration)?,
        });
        Ok(())
    }

    fn has_daemon(&self) -> bool {
        matches!(self.shared.faults, FaultPlace::Daemon(_))
    }
}

/// How a process has come to need no pages of this program.
#[derive(Debug)]
pub(crate) enum Drained {
    /// It has all of them.
    Complete,
    /// Its memory is no more.
    Departed,
    /// Nobody sends them, and this program is to end: they are another's to bring.
    Left { missing_pages: u64 },
}

impl MigrationFaults {
    /// Waits until the process has all its pages or needs none any more; once this program is to end only for as long as some come.
    pub(crate) async fn drained(&self) -> Result<Drained> {
        let Some(handle) = &self.handle else { return Ok(Drained::Complete) };
        tokio::select! {
            report = handle.drained() => Ok(if report?.departed { Drained::Departed } else { Drained::Complete }),
            missing_pages = async {
                self.shared.is_to_end().await;
                handle.stalled(COMING_BACK).await
            } => Ok(Drained::Left { missing_pages }),
        }
    }

    /// Waits until the source knows that.
    pub(crate) async fn acknowledged(&mut self) -> Result<()> {
        let Some(handle) = self.handle.take() else { return Ok(()) };
        let report = handle.finished().await?;
        if report.departed {
            return Ok(());
        }
        tracing::info!(
            migration = %self.standing.id, pages = report.pages, faults = report.faults, p50_us = report.p50_us,
            p99_us = report.p99_us, "all pages are here"
        );
        Ok(())
    }
}

impl Shared {
    /// Says that a caller was turned away.
    fn turn_away(&self, from: SocketAddr, reason: &str) {
        if let Some(others) = self.complaints.one_more() {
            self.style.say(&Event::Abandoned { migration_id: None, reason: named(from, &format!("{reason}{others}")) });
        }
    }

    /// Waits until this program is to end.
    async fn is_to_end(&self) {
        // N.B. the sender is this one's own.
        let _ = self.ends.subscribe().wait_for(|ends| *ends).await;
    }

    /// Waits for what may be done without; no longer than for `parting` once this program is to end.
    pub(crate) async fn unless_it_ends<T>(&self, parting: Duration, wait: impl Future<Output = T>) -> Option<T> {
        let over = async {
            self.is_to_end().await;
            tokio::time::sleep(parting).await;
        };
        tokio::select! {
            done = wait => Some(done),
            () = over => None,
        }
    }

    /// UDP ports for faults and for the drain.
    pub(crate) fn fault_ports(&self) -> (u16, u16) {
        match &self.faults {
            FaultPlace::Here(service) => (service.faults_addr().port(), service.drain_addr().port()),
            FaultPlace::Daemon(daemon) => (daemon.faults_port(), daemon.drain_port()),
        }
    }

    /// Gives a place for one more migration, until it is dropped.
    ///
    /// # Errors
    /// Why there is none, and what can be done about it.
    pub(crate) fn admit(&self) -> std::result::Result<OwnedSemaphorePermit, [&'static str; 2]> {
        const ALL_TAKEN: &str = "as many processes are coming as this page server takes at a time (--max-migrations)";
        if *self.ends.borrow() {
            return Err(["this page server has been told to end", "try again when another one listens there"]);
        }
        self.places.clone().try_acquire_owned().map_err(|_| [ALL_TAKEN, "try again when one of them has ended"])
    }

    pub(crate) fn faults(self: &Arc<Self>, standing: Arc<Standing>) -> MigrationFaults {
        MigrationFaults { standing, shared: self.clone(), handle: None }
    }
}

impl Server {
    /// Starts listening. To be called inside a runtime.
    ///
    /// # Errors
    /// When the token or this host's key cannot be used, or a port is taken.
    pub fn bind(settings: &Settings) -> Result<Self> {
        let credentials = Credentials::choose(&settings.config_dir, settings.token_file.as_deref())?;
        let listener = Listener::bind(settings.listen, &credentials, Profile::Bulk)?
            .with_invitations(Invitations::in_directory(&settings.config_dir));
        let base = listener.local_addr();
        let beside = |service: Service| -> Result<SocketAddr> {
            // A port that was chosen by the kernel says nothing about its neighbours.
            let base = SocketAddr::new(base.ip(), settings.listen.port());
            Ok(service.address(base)?)
        };
        let faults = match &settings.lazy_socket {
            Some(socket) => FaultPlace::Daemon(LazyDaemon::connect(socket)?),
            None => {
                let config = FaultListenerConfig::new(beside(Service::Faults)?, beside(Service::Drain)?, credentials);
                FaultPlace::Here(FaultService::start(config).context("starting the fault service")?)
            }
        };
        // N.B. behind the fault service: a port that is taken must be known before anything is done.
        let registry = Registry::open(&settings.state_directory)?;
        if let Err(error) = faults.take_over(&registry) {
            tracing::warn!(%error, "cannot look for processes that a killed page server left waiting");
        }
        Ok(Self {
            listener,
            shared: Arc::new(Shared {
                faults,
                registry,
                holds: Holds::default(),
                hand_over_to: settings.hand_over_to.clone(),
                style: settings.style,
                patience: settings.patience,
                places: Arc::new(Semaphore::new(settings.policy.max_migrations.unwrap_or(Semaphore::MAX_PERMITS))),
                complaints: Complaints::new(),
                ends: watch::Sender::new(false),
                policy: settings.policy.clone(),
            }),
            once: settings.once,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.listener.local_addr()
    }

    /// Serves until `stop` says otherwise or, with `--once`, until the first migration is over; migrations under way are
    /// waited for, and their sources answered, as long as they go on.
    ///
    /// # Errors
    /// With `--once`, when that migration failed.
    pub async fn serve(self, stop: watch::Receiver<bool>) -> Result<()> {
        let looking = tokio::spawn(look_for_pages(self.shared.clone()));
        let served = self.accept(stop).await;
        looking.abort();
        served
    }

    async fn accept(self, mut stop: watch::Receiver<bool>) -> Result<()> {
        let (ended, mut endings) = mpsc::unbounded_channel();
        let mut running = 0usize;
        let (mut listens, mut is_to_end) = (true, false);
        while !is_to_end || running > 0 {
            tokio::select! {
                incoming = self.listener.accept(), if listens => {
                    let Some(incoming) = incoming else {
                        // N.B. nobody can come any more: those that are under way are waited for.
                        (listens, is_to_end) = (false, true);
                        self.shared.ends.send_replace(true);
                        continue;
                    };
                    let (shared, ended) = (self.shared.clone(), ended.clone());
                    // Once it is to end nobody is waited for who comes later.
                    let counts = !is_to_end;
                    running += usize::from(counts);
                    tokio::spawn(async move {
                        let ending = handle(incoming, shared).await;
                        if counts {
                            let _ = ended.send(ending);
                        }
                    });
                }
                Some(ending) = endings.recv() => {
                    running -= 1;
                    if let (true, Some(ending)) = (self.once && !is_to_end, ending) {
                        self.listener.close(godwit_carry::CODE_DONE, "served once", Duration::from_secs(1)).await;
                        return match ending {
                            Ending::Abandoned(why) => Err(anyhow!("the migration failed: {why}")),
                            _ => Ok(()),
                        };
                    }
                }
                _ = stop.wait_for(|stop| *stop), if !is_to_end => {
                    tracing::info!(running, "no new migrations are accepted");
                    self.shared.ends.send_replace(true);
                    is_to_end = true;
                }
            }
        }
        Ok(())
    }
}

/// Looks again and again whether copies that a page server before this one has left have all their pages by now: another program may
/// fetch them.
async fn look_for_pages(shared: Arc<Shared>) {
    const AGAIN_AFTER: Duration = Duration::from_secs(1);
    loop {
        let shared = shared.clone();
        let _ = tokio::task::spawn_blocking(move || shared.registry.look_for_pages()).await;
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

/// Handles one call; `None` when it never became a migration.
async fn handle(incoming: Incoming, shared: Arc<Shared>) -> Option<Ending> {
    let from = incoming.remote_address();
    let style = shared.style;
    let (link, channel) = match incoming.answer().await {
        Ok(Answered::Linked(link, channel)) => (link, channel),
        Ok(Answered::Enrolled(peer)) => {
            style.say(&Event::Enrolled { host: peer.name, fingerprint: peer.fingerprint.to_string() });
            return None;
        }
        Err(error) => {
            let remedy = error.remedy().map(|remedy| format!("; {remedy}")).unwrap_or_default();
            shared.turn_away(from, &format!("{error}{remedy}"));
            return None;
        }
    };
    match migration::receive(link.clone(), channel, shared.clone()).await {
        Ok((_, None)) => None,
        Ok((id, Some(ending))) => {
            style.say(&match &ending {
                Ending::Moved { pid } => Event::Moved { migration_id: id.to_string(), pid: *pid },
                Ending::Left { pid, missing_pages } => {
                    Event::Left { migration_id: id.to_string(), pid: *pid, missing_pages: *missing_pages }
                }
                Ending::Ended { pid } => Event::Ended { migration_id: id.to_string(), pid: *pid },
                Ending::HandedOver { connections } => {
                    Event::HandedOver { migration_id: id.to_string(), connections: *connections }
                }
                Ending::Abandoned(why) => Event::Abandoned { migration_id: Some(id.to_string()), reason: why.clone() },
            });
            Some(ending)
        }
        Err(error) => {
            let reason = godwit_carry::with_causes(error.as_ref());
            link.close(godwit_carry::CODE_DONE, &reason);
            shared.turn_away(from, &reason);
            None
        }
    }
}

/// What is wrong with a caller, with its address once.
fn named(from: SocketAddr, reason: &str) -> String {
    if reason.contains(&from.to_string()) { reason.to_owned() } else { format!("{from}: {reason}") }
}
