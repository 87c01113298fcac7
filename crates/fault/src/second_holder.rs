//! Who else keeps the userfaultfds open.
//!
//! When the last copy closes, a thread that waits for a page reads zeros. So there is always a process with copies, and the ledgers with
//! them, that nothing but the end of the program ends: a holder that whoever got the program first has forked ([`ForkedHolder`]): the
//! service, or the page server beside a separate daemon. After the death of that one [`recover`] gets the descriptors back out of the
//! holder.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use godwit_kernel::Errno;
use godwit_kernel::holder::{FIRST, Holder, Keep, NAME};
use godwit_kernel::process::{pidfd_getfd, pidfd_open};
use godwit_kernel::uffd::Userfaultfd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Error, MigrationId, Result};
use crate::ledger::Ledger;
use crate::orphans;

/// Another process with copies.
pub trait SecondHolder: Send {
    /// Gives it what belongs to a forked child; returns when it has it.
    ///
    /// # Errors
    /// When it cannot be reached. The child is then served all the same.
    fn hold_child(&self, uffd: BorrowedFd<'_>, ledger: BorrowedFd<'_>) -> Result<()>;

    /// Whether it is there, or whoever answers for it.
    fn is_there(&self) -> bool;

    /// Has it close its copies: nothing is missing any more.
    ///
    /// # Errors
    /// When it cannot be reached.
    fn release(self: Box<Self>) -> Result<()>;
}

/// A userfaultfd and its ledger, as descriptors.
#[derive(Debug)]
pub struct Held {
    /// The userfaultfd.
    pub uffd: OwnedFd,
    /// Its ledger.
    pub ledger: OwnedFd,
}

/// All that a successor needs to serve a program.
#[derive(Debug)]
pub struct Left {
    /// The moved process's and its children's.
    pub held: Vec<Held>,
    /// The moved process.
    pub pidfd: OwnedFd,
}

impl Left {
    /// Which migration they are of, as far as the first ledger says.
    pub(crate) fn id(&self) -> Option<MigrationId> {
        let ledger = self.held.first()?.ledger.try_clone().ok()?;
        Some(Ledger::open(ledger).ok()?.0.subject().id)
    }
}

/// A process forked for the purpose. It leaves when told to, or when the moved process has ended (and has forked no child
/// that lacks pages), but not when the service dies.
#[derive(Debug)]
pub struct ForkedHolder(Holder);

impl ForkedHolder {
    /// Forks it and gives it its first copies.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn spawn(pidfd: BorrowedFd<'_>, uffd: &Userfaultfd, ledger: &Ledger) -> Result<Self> {
        Self::of_all(pidfd, [(uffd.as_fd(), ledger.as_fd())])
    }

    /// As [`Self::spawn`], with the userfaultfds of forked children and their ledgers behind the first ones.
    pub(crate) fn of_all<'a>(
        pidfd: BorrowedFd<'_>,
        pairs: impl IntoIterator<Item = (BorrowedFd<'a>, BorrowedFd<'a>)>,
    ) -> Result<Self> {
        let holder = Self(Holder::spawn().map_err(failed("starting"))?);
        let filled = holder.fill(pidfd, pairs);
        match filled {
            Ok(()) => Ok(holder),
            Err(error) => {
                // N.B. it would stay, with what it has.
                let _ = Box::new(holder).release();
                Err(error)
            }
        }
    }

    fn fill<'a>(
        &self,
        pidfd: BorrowedFd<'_>,
        pairs: impl IntoIterator<Item = (BorrowedFd<'a>, BorrowedFd<'a>)>,
    ) -> Result<()> {
        let mut pairs = pairs.into_iter().peekable();
        let Some((uffd, ledger)) = pairs.next() else { return Ok(()) };
        // N.B. children may outlive the process.
        let keep = if pairs.peek().is_some() { Keep::Always } else { Keep::WhileAlive };
        self.0.hold(&[uffd, ledger, pidfd], keep).map_err(failed("handing over to"))?;
        pairs.try_for_each(|(uffd, ledger)| self.hold_child(uffd, ledger))
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.0.pid()
    }

    /// What another process can end it by.
    pub(crate) fn leash(&self) -> Result<OwnedFd> {
        self.0.leash().map_err(failed("handing over"))
    }
}

impl SecondHolder for ForkedHolder {
    fn hold_child(&self, uffd: BorrowedFd<'_>, ledger: BorrowedFd<'_>) -> Result<()> {
        self.0.hold(&[uffd, ledger], Keep::Always).map_err(failed("handing over to"))?;
        self.0.stay().map_err(failed("handing over to"))
    }

    fn is_there(&self) -> bool {
        orphans::identity(self.0.pid().cast_unsigned()) != 0
    }

    fn release(self: Box<Self>) -> Result<()> {
        self.0.release().map_err(failed("ending"))
    }
}

/// Whether the process behind a pidfd has ended.
pub(crate) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut ended = [PollFd::new(pidfd, PollFlags::POLLIN)];
    poll(&mut ended, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

/// Lists the holders that are left of services that died, by process id.
///
/// # Errors
/// When /proc cannot be read.
pub fn find_holders() -> std::io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if is_holder(pid) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Anybody may call a process so; only one of ours is believed. A name of 15 bytes or less is not cut.
fn is_holder(pid: i32) -> bool {
    let comm = std::fs::read(format!("/proc/{pid}/comm"));
    comm.is_ok_and(|comm| comm.trim_ascii_end() == NAME.as_bytes()) && same_program(pid)
}

/// Tells whether a process belongs to this user and nobody could have tampered with it.
fn same_program(pid: i32) -> bool {
    use std::os::unix::fs::MetadataExt;
    let owner = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.uid()).ok();
    owner(Path::new(&format!("/proc/{pid}"))) == Some(nix::unistd::geteuid().as_raw())
}

/// Gets copies of everything that a holder keeps. It goes on keeping it; [`dismiss`] ends it when its copies are not needed
/// any more.
///
/// # Errors
/// When it has ended, or this process may not look into it (`CAP_SYS_PTRACE`).
pub fn recover(pid: i32) -> Result<Left> {
    let holder = pidfd_open(pid).map_err(failed("finding"))?;
    let mut held = Vec::new();
    let mut program = None;
    let mut number = FIRST;
    loop {
        let fd = match pidfd_getfd(holder.as_fd(), number) {
            Ok(fd) => fd,
            Err(Errno::EBADF) => break,
            Err(source) => return Err(failed("asking")(source)),
        };
        if is_userfaultfd(&fd) {
            let ledger = pidfd_getfd(holder.as_fd(), number + 1).map_err(failed("asking"))?;
            held.push(Held { uffd: fd, ledger });
            number += 1;
        } else {
            program = Some(fd);
        }
        number += 1;
    }
    let pidfd = program.ok_or(Error::Holder { operation: "asking", source: Errno::ENOENT })?;
    Ok(Left { held, pidfd })
}

/// Ends a holder that was left behind.
///
/// # Errors
/// When it has ended before.
pub fn dismiss(pid: i32) -> Result<()> {
    // N.B. a daemon may have ended it already, and its number be another process's.
    if !is_holder(pid) {
        return Err(Error::Holder { operation: "ending", source: Errno::ESRCH });
    }
    godwit_kernel::process::kill(pid, nix::libc::SIGKILL).map_err(failed("ending"))
}

/// A holder that a predecessor forked: it is no child of this process.
#[derive(Debug)]
pub struct InheritedHolder {
    pid: i32,
    /// Holds what came later, if anything has.
    younger: Mutex<Option<Holder>>,
}

impl InheritedHolder {
    /// Takes responsibility for the holder with process id `pid`.
    #[must_use]
    pub fn new(pid: i32) -> Self {
        Self { pid, younger: Mutex::default() }
    }
}

impl SecondHolder for InheritedHolder {
    fn hold_child(&self, uffd: BorrowedFd<'_>, ledger: BorrowedFd<'_>) -> Result<()> {
        let mut younger = self.younger.lock().unwrap_or_else(PoisonError::into_inner);
        // N.B. not before it is needed: one that holds nothing would stay if this process were killed.
        let holder = match &mut *younger {
            Some(holder) => holder,
            none => none.insert(Holder::spawn().map_err(failed("starting"))?),
        };
        holder.hold(&[uffd, ledger], Keep::Always).map_err(failed("handing over to"))
    }

    fn is_there(&self) -> bool {
        let younger = self.younger.lock().unwrap_or_else(PoisonError::into_inner);
        let has_younger = younger.as_ref().is_none_or(|holder| orphans::identity(holder.pid().cast_unsigned()) != 0);
        has_younger && is_holder(self.pid)
    }

    fn release(self: Box<Self>) -> Result<()> {
        let younger = self.younger.into_inner().unwrap_or_else(PoisonError::into_inner);
        let younger = younger.map_or(Ok(()), |holder| holder.release().map_err(failed("ending")));
        dismiss(self.pid).and(younger)
    }
}

fn is_userfaultfd(fd: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd;
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
}

fn failed(operation: &'static str) -> impl Fn(Errno) -> Error {
    move |source| Error::Holder { operation, source }
}
