//! The destination's side as one thing: two threads, two listeners, any number of migrations.
//!
//! Faults have a thread, an endpoint and a single-threaded runtime of their own, scheduled ahead of everything else; the
//! background transfer has the same, scheduled like any other thread. What happens in them is in `fault_side` and
//! `drain_side`; here they are started, given work and ended.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use godwit_carry::{Credentials, Listener, Party, Profile};
use godwit_kernel::Errno;
use godwit_kernel::process::pidfd_open;
use godwit_kernel::uffd::Userfaultfd;
use godwit_pages::PageSet;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::sync::{mpsc, watch};

use crate::error::{Error, MigrationId, Result};
use crate::handle::DrainHandle;
use crate::ledger::{Ledger, Lineage, Subject};
use crate::migration::{Drain, Stage, initial};
use crate::orphans::{Orphan, Part};
use crate::queue::Pace;
use crate::second_holder::{ForkedHolder, Held, InheritedHolder, Left, SecondHolder};
use crate::space::Space;
use crate::{drain_side, fault_side, greeting, orphans, priority};

/// How a service is set up.
#[derive(Clone, Debug)]
pub struct FaultListenerConfig {
    /// Where sources call for faults; port 0 is any free one.
    pub faults_addr: SocketAddr,
    /// Where they call for the drain.
    pub drain_addr: SocketAddr,
    /// How this host and the sources know each other.
    pub credentials: Credentials,
    /// How much to have on its way.
    pub pace: Pace,
}

impl FaultListenerConfig {
    /// Sets a service up on two addresses.
    #[must_use]
    pub fn new(faults_addr: SocketAddr, drain_addr: SocketAddr, credentials: impl Into<Credentials>) -> Self {
        Self { faults_addr, drain_addr, credentials: credentials.into(), pace: Pace::default() }
    }
}

/// A program about to run here while pages of it are missing.
#[derive(Debug)]
pub struct Migration {
    /// Its id, as the source knows it.
    pub id: MigrationId,
    /// Who has sent it: links for its pages are taken from nobody else.
    pub party: Party,
    /// The process, as this one sees it.
    pub pid: i32,
    /// Its userfaultfd, with everything registered and the API agreed upon. No other copy may be kept.
    pub uffd: Userfaultfd,
    /// The pages that are at the source (space 0: virtual addresses).
    pub pending: PageSet,
    /// Who is to know first when none is missing any more.
    pub at_end: Option<AtEnd>,
}

/// Told when a drain is over, before the last copy of a userfaultfd is closed: afterwards nothing shows whether pages were missing then. Whether
/// the memory they were for is no more.
pub struct AtEnd(Box<dyn FnOnce(bool) + Send>);

impl AtEnd {
    /// Has `tell` told.
    pub fn new(tell: impl FnOnce(bool) + Send + 'static) -> Self {
        Self(Box::new(tell))
    }

    pub(crate) fn tell(self, departed: bool) {
        self.0(departed);
    }
}

impl std::fmt::Debug for AtEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AtEnd")
    }
}

/// Migrations by id, for both threads.
pub(crate) type Registry = Arc<Mutex<HashMap<MigrationId, Arc<Drain>>>>;

/// Finds a migration for whoever has sent it; nobody else hears whether there is one.
pub(crate) fn find(registry: &Registry, id: MigrationId, caller: Party) -> Option<Arc<Drain>> {
    let drain = registry.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()?;
    if drain.party == caller {
        return Some(drain);
    }
    tracing::warn!(migration = %id, %caller, "somebody else than its sender asks to send pages of a migration");
    None
}

/// What the threads are told.
pub(crate) struct Assignment {
    pub(crate) drain: Arc<Drain>,
    pub(crate) pidfd: OwnedFd,
}

/// Fetches pages when they are touched. Dropping it ends its threads; programs that lack pages then stall until another
/// service takes them up from their second holder.
#[derive(Debug)]
pub struct FaultService {
    faults_addr: SocketAddr,
    drain_addr: SocketAddr,
    pace: Pace,
    registry: Registry,
    assignments: mpsc::UnboundedSender<Assignment>,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl FaultService {
    /// Starts a service.
    ///
    /// # Errors
    /// When a thread cannot be started or an address cannot be listened on.
    pub fn start(config: FaultListenerConfig) -> Result<Self> {
        let registry = Registry::default();
        let stop = watch::Sender::new(false);
        let (assignments, assigned) = mpsc::unbounded_channel();
        let FaultListenerConfig { faults_addr, drain_addr, credentials, pace } = config;
        let (faults_thread, faults_addr) = {
            let (registry, stop) = (registry.clone(), stop.subscribe());
            spawn("godwit-faults", (faults_addr, &credentials, Profile::Faults), move |listener| {
                priority::first();
                priority::give_up_privileges();
                fault_side::run(listener, registry, assigned, stop)
            })?
        };
        let mut service = Self {
            faults_addr,
            drain_addr,
            pace,
            registry: registry.clone(),
            assignments,
            stop: stop.clone(),
            threads: vec![faults_thread],
        };
        let stopped = stop.subscribe();
        let (drain_thread, drain_addr) =
            spawn("godwit-drain", (drain_addr, &credentials, Profile::Bulk), move |listener| {
                priority::give_up_privileges();
                drain_side::run(listener, registry, stopped)
            })?;
        service.threads.push(drain_thread);
        service.drain_addr = drain_addr;
        Ok(service)
    }

    /// Where sources call for faults.
    #[must_use]
    pub fn faults_addr(&self) -> SocketAddr {
        self.faults_addr
    }

    /// Where sources call for the drain.
    #[must_use]
    pub fn drain_addr(&self) -> SocketAddr {
        self.drain_addr
    }

    /// Takes a program over, before it is let run, with a second holder forked for it.
    ///
    /// # Errors
    /// When the ledger or the holder cannot be made. The userfaultfd is closed then: the program must not be let run.
    pub fn adopt(&self, mut migration: Migration) -> Result<DrainHandle> {
        let at_end = migration.at_end.take();
        let (pidfd, space) = prepare(migration)?;
        let holder = Box::new(ForkedHolder::spawn(pidfd.as_fd(), &space.uffd, &space.ledger)?);
        self.begin(pidfd, vec![space], holder, at_end)
    }

    /// Takes a program over that a predecessor served, from what is left of that; threads that wait are asked again.
    ///
    /// # Errors
    /// When a ledger cannot be used or none is that of the moved process.
    pub fn resume(&self, left: Left, holder: Box<dyn SecondHolder>) -> Result<DrainHandle> {
        self.resume_for(left, holder, |_| None)
    }

    fn resume_for(
        &self,
        left: Left,
        holder: Box<dyn SecondHolder>,
        at_end: impl FnOnce(MigrationId) -> Option<AtEnd>,
    ) -> Result<DrainHandle> {
        let Left { held, pidfd } = left;
        // N.B. what is read from a userfaultfd names descriptors: nothing else may be read as one.
        if !is_pidfd(pidfd.as_fd()) || held.iter().any(|held| !is_userfaultfd(held.uffd.as_fd())) {
            return Err(Error::DamagedLedger {
                what: "other descriptors came with it than a process and userfaultfds",
            });
        }
        let mut spaces = Vec::with_capacity(held.len());
        for Held { uffd, ledger } in held {
            let (ledger, pending) = Ledger::open(ledger)?;
            let uffd = Userfaultfd::from_fd(uffd);
            unblock(ledger.subject().id, &uffd)?;
            spaces.push(Space::new(uffd, pending, ledger));
        }
        // The moved process first.
        spaces.sort_by_key(|space| space.ledger.subject().lineage == Lineage::Forked);
        let Some(subject) = spaces.first().map(|space| space.ledger.subject()) else {
            return Err(Error::DamagedLedger { what: "there is none" });
        };
        let is_of_it = |other: Subject| other.id == subject.id && other.party == subject.party;
        if !spaces.iter().all(|space| is_of_it(space.ledger.subject())) {
            return Err(Error::DamagedLedger { what: "it belongs to another migration" });
        }
        let at_end = at_end(subject.id);
        self.begin(pidfd, spaces, holder, at_end)
    }

    /// Takes over the programs of services on this host that were killed. Sources call where those listened, so this one has to
    /// listen on the same ports. `at_end`: who is to know of the end of each.
    ///
    /// # Errors
    /// When /proc cannot be read. A program that cannot be taken over is logged and left as it is.
    pub fn take_over_orphans(
        &self,
        at_end: impl Fn(MigrationId) -> Option<AtEnd>,
    ) -> std::io::Result<Vec<DrainHandle>> {
        let mut handles = Vec::new();
        for Orphan { holder, left } in orphans::claim_all(Part::Owner)? {
            match self.resume_for(left, Box::new(InheritedHolder::new(holder)), &at_end) {
                Ok(handle) => {
                    tracing::info!(migration = %handle.id(), missing = handle.missing_pages(), "took over a program that lacks pages");
                    handles.push(handle);
                }
                Err(error) => tracing::error!(holder, %error, "cannot take over a program that lacks pages; it stalls"),
            }
        }
        Ok(handles)
    }

    /// One that is served already, for whoever has sent it, if there is one.
    pub(crate) fn served(&self, subject: Subject) -> Option<DrainHandle> {
        let drain = find(&self.registry, subject.id, subject.party)?;
        Some(DrainHandle::here(drain, self.stop.subscribe()))
    }

    fn begin(
        &self,
        pidfd: OwnedFd,
        spaces: Vec<Space>,
        holder: Box<dyn SecondHolder>,
        at_end: Option<AtEnd>,
    ) -> Result<DrainHandle> {
        let Some(subject) = spaces.first().map(|space| space.ledger.subject()) else {
            return Err(Error::DamagedLedger { what: "there is none" });
        };
        let drain = Arc::new(Drain::new(subject, spaces, holder, self.pace, (at_end, pidfd.try_clone().ok())));
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        if registry.get(&subject.id).is_some_and(|other| *other.stage.borrow() == Stage::Draining) {
            return Err(Error::Duplicate { id: subject.id });
        }
        registry.insert(subject.id, drain.clone());
        drop(registry);
        drain.own(orphans::identity(std::process::id()));
        drain.wake_all();
        let assignment = Assignment { drain: drain.clone(), pidfd };
        self.assignments.send(assignment).map_err(|_| Error::ServiceEnded)?;
        Ok(DrainHandle::here(drain, self.stop.subscribe()))
    }
}

impl Drop for FaultService {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Makes what a drain begins with, and a pidfd of its process.
pub(crate) fn prepare(migration: Migration) -> Result<(OwnedFd, Space)> {
    let Migration { id, party, pid, uffd, pending, .. } = migration;
    let subject = Subject { id, pid, lineage: Lineage::Moved, party };
    let pidfd = open_process(subject)?;
    unblock(id, &uffd)?;
    let pending = initial(pending);
    let ledger = Ledger::create(subject, &pending)?;
    // N.B. before anybody else holds it: what has no owner counts as left behind.
    ledger.own(orphans::identity(std::process::id()));
    Ok((pidfd, Space::new(uffd, pending, ledger)))
}

/// What a descriptor of ours is, as /proc shows it.
fn link(fd: BorrowedFd<'_>) -> std::path::PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
}

fn is_userfaultfd(fd: BorrowedFd<'_>) -> bool {
    link(fd).as_os_str() == "anon_inode:[userfaultfd]"
}

/// Since Linux 6.9 they have a file system of their own.
fn is_pidfd(fd: BorrowedFd<'_>) -> bool {
    let link = link(fd);
    link.as_os_str() == "anon_inode:[pidfd]" || link.to_string_lossy().starts_with("pidfd:[")
}

fn open_process(subject: Subject) -> Result<OwnedFd> {
    pidfd_open(subject.pid).map_err(|source| Error::Descriptor {
        operation: "finding the process",
        id: subject.id,
        source,
    })
}

/// Makes reads of a userfaultfd return when there is nothing; it cannot be polled otherwise.
pub(crate) fn unblock(id: MigrationId, uffd: &Userfaultfd) -> Result<()> {
    let failed = |source: Errno| Error::Descriptor { operation: "setting up a userfaultfd", id, source };
    let flags = OFlag::from_bits_retain(fcntl(uffd, FcntlArg::F_GETFL).map_err(failed)?);
    fcntl(uffd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop).map_err(failed)
}

/// Starts a thread with a runtime and a listener of its own, and returns when it listens.
fn spawn<F>(
    name: &'static str,
    (address, credentials, profile): (SocketAddr, &Credentials, Profile),
    body: impl FnOnce(Listener) -> F + Send + 'static,
) -> Result<(JoinHandle<()>, SocketAddr)>
where
    F: Future<Output = ()>,
{
    let failed = |source| Error::Thread { name, source };
    let (told, answer) = std::sync::mpsc::channel();
    let credentials = credentials.clone();
    let thread = std::thread::Builder::new().name(name.to_owned());
    // N.B. all of it there: whoever calls may be in a runtime already, where none can be given up again.
    let thread = thread.spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(source) => return drop(told.send(Err(Error::Thread { name, source }))),
        };
        let bound = {
            let _entered = runtime.enter();
            Listener::bind_with(address, &credentials, profile, greeting::timing())
        };
        match bound {
            Ok(listener) => {
                let _ = told.send(Ok(listener.local_addr()));
                runtime.block_on(body(listener));
            }
            Err(source) => drop(told.send(Err(Error::Listen { address, source }))),
        }
    });
    let thread = thread.map_err(failed)?;
    let gone = || Error::Thread { name, source: std::io::ErrorKind::UnexpectedEof.into() };
    let address = answer.recv().map_err(|_| gone())??;
    Ok((thread, address))
}
