//! A network namespace (network_namespaces(7)): entering it, and working inside it without leaving one's own.
//!
//! A thread may enter one for itself. Sockets stay in the one they were opened in, so a thread that does nothing else opens
//! them.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use godwit_kernel::Errno;
use godwit_kernel::descriptors::socket_option;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::error::{Error, Result};

/// Where ip-netns(8) keeps those that have a name.
const NAMED: &str = "/run/netns";

/// A network namespace, which exists at least as long as this.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    name: String,
}

impl Namespace {
    /// That of a process.
    ///
    /// # Errors
    /// When the process is gone or may not be looked at.
    pub fn of_process(pid: i32) -> Result<Self> {
        Self::open(format!("network namespace of process {pid}"), Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// That of the calling thread.
    ///
    /// # Errors
    /// When /proc is not there.
    pub fn current() -> Result<Self> {
        Self::open("network namespace".to_owned(), Path::new("/proc/thread-self/ns/net"))
    }

    /// The one that ip-netns(8) calls `name`.
    ///
    /// # Errors
    /// `ENOENT` when there is none.
    pub fn named(name: &str) -> Result<Self> {
        let resource = format!("network namespace {name}");
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(Error::call(resource, "finding it", Errno::EINVAL));
        }
        let namespace = Self::open(resource, &Path::new(NAMED).join(name))?;
        // A name without a namespace is an ordinary empty file.
        namespace.inside(|| ())?;
        Ok(namespace)
    }

    /// Makes a new one. Its loopback interface is down.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`, `ENOSPC` when there are too many.
    pub fn create() -> Result<Self> {
        on_another_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|source| Error::call("network namespace", "making a new one", source))?;
            Self::current()
        })
    }

    fn open(name: String, path: &Path) -> Result<Self> {
        match File::open(path) {
            Ok(file) => Ok(Self { file, name }),
            Err(error) => Err(Error::io(name, "opening it", &error)),
        }
    }

    /// Another handle of the same.
    ///
    /// # Errors
    /// `EMFILE` when there are too many open files.
    pub fn try_clone(&self) -> Result<Self> {
        let file = self.file.try_clone().map_err(|error| Error::io(self.name.clone(), "duplicating it", &error))?;
        Ok(Self { file, name: self.name.clone() })
    }

    /// Whether both are the same.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        let id = |namespace: &Self| namespace.file.metadata().map(|file| (file.dev(), file.ino())).ok();
        id(self).is_some() && id(self) == id(other)
    }

    /// Whether it is the one that a descriptor refers to.
    #[must_use]
    pub fn is_behind(&self, descriptor: BorrowedFd<'_>) -> bool {
        let other = nix::sys::stat::fstat(descriptor).map(|file| (file.st_dev, file.st_ino)).ok();
        other.is_some() && other == self.file.metadata().map(|file| (file.dev(), file.ino())).ok()
    }

    /// Whether it is that of a process.
    #[must_use]
    pub fn is_of(&self, pid: i32) -> bool {
        let theirs = std::fs::metadata(format!("/proc/{pid}/ns/net")).map(|file| (file.dev(), file.ino())).ok();
        theirs.is_some() && theirs == self.file.metadata().map(|file| (file.dev(), file.ino())).ok()
    }

    /// The number by which its sockets know it (`SO_NETNS_COOKIE`, socket(7), Linux 5.14).
    ///
    /// # Errors
    /// When no socket can be opened in it.
    pub fn cookie(&self) -> Result<u64> {
        let asked = self.inside(|| {
            let any = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
            Self::cookie_of(any.as_fd())
        })?;
        asked.map_err(|source| Error::call(self.name.clone(), "asking for its number", source))
    }

    /// The number of the namespace of a socket.
    ///
    /// # Errors
    /// `ENOPROTOOPT` from older kernels.
    pub fn cookie_of(socket: BorrowedFd<'_>) -> Result<u64, Errno> {
        const SO_NETNS_COOKIE: i32 = 71;
        let value = socket_option(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE, 8)?;
        value.try_into().map(u64::from_ne_bytes).map_err(|_| Errno::EBADMSG)
    }

    /// Puts the calling thread into it, and the processes and threads that it makes from now on.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`, `EINVAL` when it is none.
    pub fn enter(&self) -> Result<()> {
        setns(&self.file, CloneFlags::CLONE_NEWNET)
            .map_err(|source| Error::call(self.name.clone(), "entering it", source))
    }

    /// Does some work in it. The calling thread is there meanwhile, if it may come back; else another one.
    ///
    /// # Errors
    /// As [`Self::enter`].
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let Ok(here) = Self::current() else { return on_another_thread(|| self.enter().map(|()| work())) };
        if here.is(self) {
            return Ok(work());
        }
        // N.B. entering where one is takes the same privilege as coming back. A new thread has to wait for its turn, which a freeze
        // should not.
        if here.enter().is_err() {
            return on_another_thread(|| self.enter().map(|()| work()));
        }
        self.enter()?;
        let _back = Back(here);
        Ok(work())
    }
}

/// Takes the calling thread back to where it came from, also out of a panic.
struct Back(Namespace);

impl Drop for Back {
    fn drop(&mut self) {
        if let Err(error) = self.0.enter() {
            // It could a moment ago. Whatever this thread did from now on, it would do to somebody else's network.
            tracing::error!(%error, "a thread cannot come back to its network namespace");
            std::process::abort();
        }
    }
}

impl std::os::fd::AsRawFd for Namespace {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}

fn on_another_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("network".to_owned()).spawn_scoped(scope, work);
        let thread = thread.map_err(|error| Error::io("network namespace", "starting a thread", &error))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
