//! The page server's end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use tokio::sync::watch;

use super::{PAIRS, VERSION, Wire, Words};
use crate::error::{Error, MigrationId, Result};
use crate::handle::{DrainHandle, DrainReport};
use crate::migration::Stage;
use crate::orphans::{self, Orphan, Part};
use crate::second_holder::{ForkedHolder, Held, InheritedHolder, SecondHolder, has_ended};
use crate::service::{Migration, prepare};
use crate::space::Space;

/// Time between two calls of a daemon that is gone.
const PAUSE: Duration = Duration::from_millis(100);

/// A separate fault daemon.
#[derive(Debug)]
pub struct LazyDaemon {
    path: PathBuf,
    ports: (u16, u16),
    stop: watch::Sender<bool>,
}

impl LazyDaemon {
    /// Calls the daemon that listens at `path` and asks where it serves sources.
    ///
    /// # Errors
    /// When nobody answers there.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        let (_, ports) = call(path.as_ref())?;
        Ok(Self { path: path.as_ref().to_owned(), ports, stop: watch::Sender::new(false) })
    }

    /// Takes over the programs of page servers on this host that were killed: hands them to the daemon, which may serve them already,
    /// and again to its successors. Gives their migrations.
    ///
    /// # Errors
    /// When /proc cannot be read or there can be no thread.
    pub fn take_over_orphans(&self) -> std::io::Result<Vec<MigrationId>> {
        let orphans = orphans::claim_all(Part::Keeper)?;
        let mut taken = Vec::with_capacity(orphans.len());
        for Orphan { holder, left } in orphans {
            taken.extend(left.id());
            let kept = Kept {
                path: self.path.clone(),
                held: left.held,
                pidfd: left.pidfd,
                holder: Some(Box::new(InheritedHolder::new(holder))),
                leash: None,
                stage: watch::Sender::new(Stage::Draining),
            };
            std::thread::Builder::new().name("godwit-handover".into()).spawn(move || kept.stay_with(None))?;
        }
        Ok(taken)
    }

    /// UDP port where sources call for faults.
    #[must_use]
    pub fn faults_port(&self) -> u16 {
        self.ports.0
    }

    /// UDP port where they call for the drain.
    #[must_use]
    pub fn drain_port(&self) -> u16 {
        self.ports.1
    }

    /// Hands a program over, before it is let run. This process stays the second holder, and hands it over again when the daemon
    /// is replaced.
    ///
    /// # Errors
    /// When the daemon cannot be reached or refuses. The userfaultfd is closed then: the program must not be let run.
    pub fn adopt(&self, migration: Migration) -> Result<DrainHandle> {
        let (pidfd, Space { uffd, ledger, .. }) = prepare(migration)?;
        let copy = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned().map_err(|source| Error::Socket {
                operation: "copying descriptors for",
                path: self.path.clone(),
                source,
            })
        };
        ledger.keep(orphans::identity(std::process::id()));
        let holder = Box::new(ForkedHolder::spawn(pidfd.as_fd(), &uffd, &ledger)?);
        let leash = Some(holder.leash()?);
        let held = vec![Held { uffd: copy(uffd.as_fd())?, ledger: copy(ledger.as_fd())? }];
        drop(uffd);
        let ledger = Arc::new(ledger);
        let stage = watch::Sender::new(Stage::Draining);
        let mut kept = Kept { path: self.path.clone(), held, pidfd, holder: Some(holder), leash, stage };
        let wire = match kept.hand_over() {
            Ok(wire) => wire,
            Err(error) => {
                kept.let_go();
                return Err(error);
            }
        };
        let handle = DrainHandle::at_daemon(ledger, kept.stage.subscribe(), self.stop.subscribe());
        std::thread::Builder::new()
            .name("godwit-handover".into())
            .spawn(move || kept.stay_with(Some(wire)))
            .map_err(|source| Error::Thread { name: "godwit-handover", source })?;
        Ok(handle)
    }
}

impl Drop for LazyDaemon {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// Calls a daemon and hears its ports.
fn call(path: &Path) -> Result<(Wire, (u16, u16))> {
    let failed = |source: nix::errno::Errno| Error::Socket {
        operation: "calling the fault daemon at",
        path: path.to_owned(),
        source: source.into(),
    };
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).map_err(failed)?;
    let address = UnixAddr::new(path).map_err(failed)?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address).map_err(failed)?;
    let wire = Wire::new(socket, path);
    match wire.receive()? {
        Some((Words::Ports { version: VERSION, faults, drain }, _)) => Ok((wire, (faults, drain))),
        Some((Words::Ports { version, .. }, _)) => {
            Err(wire.unexpected(format!("the daemon speaks version {version}, this page server {VERSION}")))
        }
        _ => Err(wire.unexpected("the daemon does not say its ports")),
    }
}

/// Waits for a moment for words, or the end.
fn has_word(wire: &Wire) -> bool {
    const MOMENT: u16 = 500;
    let mut readable = [PollFd::new(wire.as_fd(), PollFlags::POLLIN)];
    // N.B. what cannot be waited for is read, which says why.
    !matches!(poll(&mut readable, PollTimeout::from(MOMENT)), Ok(0) | Err(nix::errno::Errno::EINTR))
}

/// Why a connection is over.
enum End {
    Finished,
    DaemonGone,
}

/// What this process holds for one migration.
struct Kept {
    path: PathBuf,
    held: Vec<Held>,
    pidfd: OwnedFd,
    /// Keeps them if this process is killed, and the daemon as well.
    holder: Option<Box<dyn SecondHolder>>,
    /// By which the daemon ends that one when all is there: as long as it has a copy, the kernel asks it for every page that the program has never
    /// touched.
    leash: Option<OwnedFd>,
    stage: watch::Sender<Stage>,
}

impl Kept {
    fn hand_over(&mut self) -> Result<Wire> {
        let (wire, _) = call(&self.path)?;
        let parts = self.held.chunks(PAIRS);
        let count = parts.len();
        for (index, part) in parts.enumerate() {
            let pidfd = (index == 0).then_some(self.pidfd.as_fd());
            let leash = self.leash.as_ref().filter(|_| index == 0).map(AsFd::as_fd);
            let pairs = part.iter().flat_map(|held| [held.uffd.as_fd(), held.ledger.as_fd()]);
            let fds: Vec<BorrowedFd<'_>> = pidfd.into_iter().chain(leash).chain(pairs).collect();
            wire.send(&Words::Adopt { last: index + 1 == count, leash: leash.is_some() }, &fds)?;
        }
        match wire.receive()? {
            Some((Words::Adopted, _)) => Ok(wire),
            Some((Words::Refused { text }, _)) => Err(wire.unexpected(format!("the daemon refuses: {text}"))),
            _ => Err(wire.unexpected("the daemon does not answer")),
        }
    }

    /// Stays with a daemon, and with its successors, until all is there.
    fn stay_with(mut self, mut wire: Option<Wire>) {
        loop {
            if let Some(wire) = wire.take() {
                match self.listen(&wire) {
                    End::Finished => return,
                    End::DaemonGone => {
                        tracing::warn!(path = %self.path.display(), "the fault daemon is gone; the program stalls until another one answers");
                    }
                }
            }
            wire = loop {
                if has_ended(self.pidfd.as_fd()) {
                    self.let_go();
                    self.stage.send_replace(Stage::Drained(DrainReport { departed: true, ..DrainReport::default() }));
                    return;
                }
                match self.hand_over() {
                    Ok(wire) => break Some(wire),
                    Err(error) => tracing::debug!(%error, "not yet"),
                }
                std::thread::sleep(PAUSE);
            };
            tracing::info!(path = %self.path.display(), "handed over to a fault daemon");
        }
    }

    fn listen(&mut self, wire: &Wire) -> End {
        loop {
            while !has_word(wire) {
                self.see_to_holder(wire);
            }
            match wire.receive() {
                Ok(Some((Words::Child, fds))) => {
                    let mut fds = fds.into_iter();
                    if let (Some(uffd), Some(ledger)) = (fds.next(), fds.next()) {
                        let held = self
                            .holder
                            .as_ref()
                            .map_or(Ok(()), |holder| holder.hold_child(uffd.as_fd(), ledger.as_fd()));
                        if let Err(error) = held {
                            tracing::warn!(%error, "a child of the program has one holder less");
                        }
                        self.held.push(Held { uffd, ledger });
                    }
                }
                Ok(Some((Words::Drained { report }, _))) => {
                    self.let_go();
                    self.stage.send_replace(Stage::Drained(report));
                }
                Ok(Some((Words::Finished { report }, _))) => {
                    self.let_go();
                    self.stage.send_replace(if report.acknowledged {
                        Stage::Acknowledged(report)
                    } else {
                        Stage::Drained(report)
                    });
                    return End::Finished;
                }
                Ok(Some((words, _))) => tracing::warn!(?words, "unexpected words of the fault daemon"),
                // N.B. the end of the connection is never the end of the drain, unless that was said.
                Ok(None) if *self.stage.borrow() == Stage::Draining => return End::DaemonGone,
                Ok(None) => return End::Finished,
                Err(error) => {
                    tracing::warn!(%error, "connection to the fault daemon");
                    return if *self.stage.borrow() == Stage::Draining { End::DaemonGone } else { End::Finished };
                }
            }
        }
    }

    /// Puts another holder in the place of one that was killed, and tells the daemon what ends it.
    fn see_to_holder(&mut self, wire: &Wire) {
        // N.B. it leaves by itself when the program has ended, unless a child that it has forked lacks pages.
        let stays = self.held.len() > 1 || !has_ended(self.pidfd.as_fd());
        if !stays || self.holder.as_ref().is_none_or(|holder| holder.is_there()) {
            return;
        }
        let pairs = self.held.iter().map(|held| (held.uffd.as_fd(), held.ledger.as_fd()));
        let holder = match ForkedHolder::of_all(self.pidfd.as_fd(), pairs) {
            Ok(holder) => holder,
            Err(error) => {
                return tracing::warn!(%error, "nobody holds userfaultfds beside this process and the daemon");
            }
        };
        tracing::warn!("the process that held userfaultfds beside this one and the daemon is gone; another one does");
        self.leash = holder.leash().ok();
        if let Some(Err(error)) = self.leash.as_ref().map(|leash| wire.send(&Words::Leash, &[leash.as_fd()])) {
            tracing::debug!(%error, "the daemon does not hear of it");
        }
        // N.B. it is a zombie until somebody waits for it.
        let _ = self.holder.replace(Box::new(holder)).map(SecondHolder::release);
    }

    /// Nothing is missing any more.
    fn let_go(&mut self) {
        self.held.clear();
        if let Some(Err(error)) = self.holder.take().map(SecondHolder::release) {
            // It leaves with the program.
            tracing::debug!(%error, "the second holder is gone already");
        }
    }
}
