//! The daemon's end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use godwit_kernel::{Errno, holder};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket, sockopt,
};

use super::{PATIENCE, VERSION, Wire, Words};
use crate::error::{Error, MigrationId, Result};
use crate::fault_side::chain;
use crate::handle::{DrainHandle, DrainReport};
use crate::ledger::Ledger;
use crate::second_holder::{Held, Left, SecondHolder};
use crate::service::FaultService;

/// Most userfaultfds of one migration.
const MOST_SPACES: usize = 10_000;
/// Callers at once; each has a thread for as long as its migration lasts.
const MOST_CALLERS: usize = 1024;

/// Where page servers call. The socket's file is removed when it is dropped.
#[derive(Debug)]
pub struct HandoverListener {
    listener: UnixListener,
    path: PathBuf,
}

impl HandoverListener {
    /// Listens at `path`, for this user only. What a daemon that died left there is removed.
    ///
    /// # Errors
    /// When another daemon listens there, or the socket cannot be made.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed =
            |source: Errno| Error::Socket { operation: "listening at", path: path.to_owned(), source: source.into() };
        let fresh = || socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).map_err(failed);
        let address = UnixAddr::new(path).map_err(failed)?;
        let server = fresh()?;
        match bind(server.as_raw_fd(), &address) {
            Err(Errno::EADDRINUSE) => {
                if connect(fresh()?.as_raw_fd(), &address) != Err(Errno::ECONNREFUSED) {
                    return Err(failed(Errno::EADDRINUSE));
                }
                std::fs::remove_file(path).map_err(|source| Error::Socket {
                    operation: "removing what is left of",
                    path: path.to_owned(),
                    source,
                })?;
                bind(server.as_raw_fd(), &address).map_err(failed)?;
            }
            other => other.map_err(failed)?,
        }
        // Before anybody can call: it does not listen yet.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(|source| Error::Socket {
            operation: "restricting",
            path: path.to_owned(),
            source,
        })?;
        listen(&server, Backlog::new(16).map_err(failed)?).map_err(failed)?;
        // N.B. std's accept takes any kind of UNIX socket.
        Ok(Self { listener: UnixListener::from(server), path: path.to_owned() })
    }

    /// Serves page servers, each call on a thread of its own, for good. `observe` hears what happens.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn serve(&self, service: &Arc<FaultService>, observe: impl Fn(Event) + Send + Sync + 'static) -> Result<()> {
        let observe: Arc<Observe> = Arc::new(observe);
        let callers = Arc::new(());
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(Errno::ECONNABORTED as i32) => continue,
                Err(source) => {
                    return Err(Error::Socket { operation: "accepting calls at", path: self.path.clone(), source });
                }
            };
            // One more than there are callers: this function's own.
            if Arc::strong_count(&callers) > MOST_CALLERS {
                observe(Event::Trouble { text: format!("more than {MOST_CALLERS} page servers call at once") });
                continue;
            }
            let wire = Wire::new(OwnedFd::from(stream), &self.path);
            let caller = callers.clone();
            let (service, tell) = (service.clone(), observe.clone());
            let started = std::thread::Builder::new().name("godwit-handover".into()).spawn(move || {
                if let Err(error) = answer(wire, &service, &*tell) {
                    tell(Event::Trouble { text: chain(&error) });
                }
                drop(caller);
            });
            if let Err(source) = started {
                observe(Event::Trouble { text: chain(&Error::Thread { name: "godwit-handover", source }) });
            }
        }
    }
}

impl Drop for HandoverListener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What happens in a daemon.
#[derive(Clone, Debug)]
pub enum Event {
    /// A program was handed over and is served from now on.
    Serving {
        /// Its migration.
        id: MigrationId,
        /// Pages it lacks.
        missing: u64,
    },
    /// All its pages are there.
    Drained {
        /// Its migration.
        id: MigrationId,
        /// How it went.
        report: DrainReport,
    },
    /// The source has let go of its copy, or could not be told.
    Finished {
        /// Its migration.
        id: MigrationId,
        /// How it went.
        report: DrainReport,
    },
    /// Something failed between this daemon and a page server.
    Trouble {
        /// What.
        text: String,
    },
}

type Observe = dyn Fn(Event) + Send + Sync;

fn answer(wire: Wire, service: &FaultService, observe: &Observe) -> Result<()> {
    let caller = getsockopt(&wire, sockopt::PeerCredentials)
        .map_err(|source| wire.failed("identifying the caller of", source))?;
    if caller.uid() != 0 && caller.uid() != nix::unistd::geteuid().as_raw() {
        return Err(wire.unexpected(format!("user {} may not call", caller.uid())));
    }
    let ports =
        Words::Ports { version: VERSION, faults: service.faults_addr().port(), drain: service.drain_addr().port() };
    wire.send(&ports, &[])?;
    // A page server that only wanted to know the ports leaves here.
    wire.limit(Some(PATIENCE))?;
    let Some((left, leash)) = receive(&wire)? else { return Ok(()) };
    wire.limit(None)?;
    let wire = Arc::new(wire);
    // N.B. a page server that was killed had handed it over, and its successor does once more.
    let served = left.held.first().and_then(|held| held.ledger.try_clone().ok());
    let served = served.and_then(|ledger| Some(Ledger::open(ledger).ok()?.0.subject()));
    let served = served.and_then(|subject| service.served(subject));
    let holder = Box::new(PageServer(wire.clone()));
    let handle = match served.map_or_else(|| service.resume(left, holder), Ok) {
        Ok(handle) => handle,
        Err(error) => {
            wire.send(&Words::Refused { text: chain(&error).chars().take(1000).collect() }, &[])?;
            return Err(error);
        }
    };
    observe(Event::Serving { id: handle.id(), missing: handle.missing_pages() });
    // A page server that dies now leaves the program to this daemon alone.
    let _ = wire.send(&Words::Adopted, &[]);
    follow(&wire, &handle, leash, observe)
}

/// Tells the page server how it ends.
fn follow(wire: &Wire, handle: &DrainHandle, leash: Option<OwnedFd>, observe: &Observe) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.map_err(|source| Error::Thread { name: "waiting", source })?;
    let drained = runtime.block_on(handle.drained())?;
    observe(Event::Drained { id: handle.id(), report: drained.clone() });
    let _ = wire.send(&Words::Drained { report: drained }, &[]);
    // A page server that is gone has closed its copies, but for those of its holder.
    for leash in leash.into_iter().chain(younger_leashes(wire)) {
        if let Err(errno) = holder::end(leash.as_fd()) {
            tracing::debug!(%errno, "the page server's holder is gone already");
        }
    }
    let report = runtime.block_on(handle.finished())?;
    observe(Event::Finished { id: handle.id(), report: report.clone() });
    let _ = wire.send(&Words::Finished { report }, &[]);
    Ok(())
}

/// What ends holders that have taken the place of others meanwhile.
fn younger_leashes(wire: &Wire) -> Vec<OwnedFd> {
    const AT_ONCE: Duration = Duration::from_millis(1);
    let mut leashes = Vec::new();
    if wire.limit(Some(AT_ONCE)).is_ok() {
        while let Ok(Some((Words::Leash, fds))) = wire.receive() {
            leashes.extend(fds);
        }
    }
    leashes
}

/// Takes in what a page server hands over, and what ends its holder; `None` when it leaves without.
fn receive(wire: &Wire) -> Result<Option<(Left, Option<OwnedFd>)>> {
    let (mut held, mut pidfd, mut leash) = (Vec::new(), None, None);
    loop {
        let Some((words, fds)) = wire.receive()? else {
            return if held.is_empty() { Ok(None) } else { Err(wire.unexpected("the page server left half way")) };
        };
        let Words::Adopt { last, leash: has_leash } = words else {
            return Err(wire.unexpected("not a word of a page server"));
        };
        let mut fds = fds.into_iter();
        if pidfd.is_none() {
            pidfd = fds.next();
        }
        if has_leash {
            leash = fds.next();
        }
        while let Some(uffd) = fds.next() {
            let ledger = fds.next().ok_or_else(|| wire.unexpected("a userfaultfd without a ledger"))?;
            held.push(Held { uffd, ledger });
        }
        if held.len() > MOST_SPACES {
            return Err(wire.unexpected("more userfaultfds than there can be"));
        }
        if last {
            let pidfd = pidfd.ok_or_else(|| wire.unexpected("no process"))?;
            return Ok(Some((Left { held, pidfd }, leash)));
        }
    }
}

/// The page server as the second holder.
struct PageServer(Arc<Wire>);

impl SecondHolder for PageServer {
    fn hold_child(&self, uffd: BorrowedFd<'_>, ledger: BorrowedFd<'_>) -> Result<()> {
        // On its way in the socket a descriptor is open already, so there is nothing to wait for.
        self.0.send(&Words::Child, &[uffd, ledger])
    }

    fn is_there(&self) -> bool {
        // It sees to its own, or its successor hands everything over anew.
        true
    }

    fn release(self: Box<Self>) -> Result<()> {
        // `follow` tells it, with the report.
        Ok(())
    }
}
