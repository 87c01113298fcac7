//! Reading the descriptor table of another process: for each number what /proc says of it, and the open file description
//! itself, lent by pidfd_getfd(2).

use super::early_connections::EarlyConnections;
use super::fdinfo::FdInfo;
use crate::{Error, Result};
use godwit_kernel::descriptors::socket_integer;
use godwit_kernel::{Errno, process};
use godwit_tracee::{Batch, Tracee};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstat};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

/// Longest fdinfo that is read; an epoll instance has a line of some 70 bytes for each file that it watches.
const MAX_INFO: u64 = 64 << 20;

/// One open descriptor of the process.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Whose it is.
    pub(crate) pid: i32,
    /// Its number.
    pub(crate) fd: i32,
    /// Where /proc/PID/fd/N points.
    pub(crate) link: Vec<u8>,
    /// What fdinfo says.
    pub(crate) info: FdInfo,
    /// What fstat(2) says.
    pub(crate) stat: FileStat,
    /// The open file description, shared with the process.
    pub(crate) file: Arc<OwnedFd>,
    /// The family of a socket (`SO_DOMAIN`), where it was asked already.
    pub(crate) family: Option<i32>,
}

impl Entry {
    /// What there is to know of an IP socket without /proc.
    fn made_of(pid: i32, fd: i32, file: OwnedFd, stat: FileStat, flags: i32) -> Self {
        let link = format!("socket:[{}]", stat.st_ino).into_bytes();
        Self { pid, fd, link, info: FdInfo::of_socket(flags), stat, file: Arc::new(file), family: None }
    }

    /// A socket that somebody has lent to this program under a number of his own.
    pub(crate) fn of_socket(fd: i32, file: OwnedFd) -> Result<Self> {
        let failed = |what| move |source| Error::call(format!("fd {fd}"), what, source);
        let stat = fstat(file.as_fd()).map_err(failed("fstat"))?;
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(failed("F_GETFL"))?;
        Ok(Self::made_of(std::process::id() as i32, fd, file, stat, flags))
    }

    /// Where the link points, as text for people.
    pub(crate) fn target(&self) -> String {
        String::from_utf8_lossy(&self.link).into_owned()
    }

    /// How messages name it: `fd 5 (/var/log/out)`.
    pub(crate) fn name(&self) -> String {
        format!("fd {} ({})", self.fd, self.target())
    }

    /// File type bits of its mode.
    pub(crate) fn file_type(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }

    /// Reads what fdinfo says again.
    pub(crate) fn refresh(&mut self, directory: &Directory) -> Result<()> {
        self.info = directory.info(self.fd)?;
        Ok(())
    }

    /// Builds the error of a call on it.
    pub(crate) fn error(&self, what: &'static str) -> impl Fn(Errno) -> Error + '_ {
        move |source| Error::call(self.name(), what, source)
    }
}

/// The family of an IP socket.
fn ip_family(socket: &OwnedFd) -> Option<i32> {
    let family = socket_integer(socket.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN).ok()?;
    matches!(family, libc::AF_INET | libc::AF_INET6).then_some(family)
}

/// Which numbers a stopped process has, as it says itself: for each whether it is closed on exec.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers(BTreeMap<i32, bool>);

impl Numbers {
    /// Asks a stopped process, which had about so many a moment before.
    ///
    /// # Errors
    /// When it cannot be driven.
    pub fn of(tracee: &mut Tracee, about: usize) -> Result<Self> {
        /// Calls in one batch.
        const AT_ONCE: usize = 1000;
        // Listing them takes as long as asking for one does: where its table has few gaps, each number is asked for.
        let numbers = match table_size(tracee.pid()) {
            Some(size) if size <= about * 3 / 2 => (0..size as i32).collect(),
            _ => Directory::open(tracee.pid())?.numbers()?,
        };
        let mut known = BTreeMap::new();
        for some in numbers.chunks(AT_ONCE) {
            let mut batch = Batch::new();
            let calls: Vec<_> = (some.iter())
                .map(|&fd| batch.attempt("F_GETFD", libc::SYS_fcntl, &[fd.into(), libc::F_GETFD.into()]))
                .collect();
            let outcome = tracee.run(batch)?;
            for (&fd, call) in some.iter().zip(calls) {
                if let Ok(flags) = outcome.result(call) {
                    known.insert(fd, flags & libc::FD_CLOEXEC as u64 != 0);
                }
            }
        }
        Ok(Self(known))
    }

    /// The numbers, ascending.
    pub(crate) fn all(&self) -> Vec<i32> {
        self.0.keys().copied().collect()
    }

    /// Whether a number is closed on exec, if that is known.
    pub(crate) fn is_closed_on_exec(&self, fd: i32) -> Option<bool> {
        self.0.get(&fd).copied()
    }
}

/// How many numbers the descriptor table of a process has room for (`FDSize` in proc_pid_status(5)): none that is open lies beyond.
fn table_size(pid: i32) -> Option<usize> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("FDSize:"))?.trim().parse().ok()
}

/// The two directories under /proc/PID that tell of descriptors.
#[derive(Debug)]
pub(crate) struct Directory {
    pid: i32,
    links: OwnedFd,
    infos: OwnedFd,
}

impl Directory {
    /// Opens the directories of process `pid`.
    pub(crate) fn open(pid: i32) -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            open(path.as_str(), flags, Mode::empty())
                .map_err(|source| Error::Proc { path: path.into(), source: source.into() })
        };
        Ok(Self { pid, links: directory("fd")?, infos: directory("fdinfo")? })
    }

    /// The open numbers, ascending.
    pub(crate) fn numbers(&self) -> Result<Vec<i32>> {
        let path = format!("/proc/{}/fd", self.pid);
        let listed = std::fs::read_dir(&path).map_err(|source| Error::Proc { path: path.into(), source })?;
        let mut numbers: Vec<i32> =
            listed.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Where a number leads; `None` when it is not open (any more).
    pub(crate) fn link(&self, fd: i32) -> Result<Option<Vec<u8>>> {
        match readlinkat(&self.links, fd.to_string().as_str()) {
            Ok(link) => Ok(Some(link.into_vec())),
            Err(Errno::ENOENT) => Ok(None),
            Err(source) => Err(Error::call(format!("fd {fd}"), "readlink", source)),
        }
    }

    /// Reads what fdinfo says of a number.
    pub(crate) fn info(&self, fd: i32) -> Result<FdInfo> {
        let failed = |source: Errno| Error::call(format!("fd {fd}"), "reading fdinfo", source);
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = openat(&self.infos, fd.to_string().as_str(), flags, Mode::empty()).map_err(failed)?;
        let mut text = String::with_capacity(1024);
        File::from(file)
            .take(MAX_INFO)
            .read_to_string(&mut text)
            .map_err(|source| failed(source.raw_os_error().map_or(Errno::EIO, Errno::from_raw)))?;
        FdInfo::parse(text)
    }

    /// As [`Directory::entry`], for a number of which it is known whether it is closed on exec. Of an IP socket that is all that
    /// only /proc tells, and looking there takes longer than all the rest.
    pub(crate) fn entry_knowing(
        &self,
        pidfd: BorrowedFd<'_>,
        fd: i32,
        close_on_exec: bool,
        early: &EarlyConnections,
    ) -> Result<Option<Entry>> {
        let failed = |what| move |source| Error::call(format!("fd {fd}"), what, source);
        let file = match process::pidfd_getfd(pidfd, fd) {
            Ok(file) => file,
            Err(Errno::EBADF) => return Ok(None),
            Err(source) => return Err(Error::call(format!("fd {fd}"), "pidfd_getfd", source)),
        };
        let stat = fstat(file.as_fd()).map_err(failed("fstat"))?;
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(failed("F_GETFL"))?;
        let is_socket = stat.st_mode & libc::S_IFMT == libc::S_IFSOCK && flags & libc::O_PATH == 0;
        let family = || early.known(&stat).map(|known| known.inet.family()).or_else(|| ip_family(&file));
        let Some(family) = is_socket.then(family).flatten() else { return self.entry_of(fd, file) };
        let flags = if close_on_exec { flags | libc::O_CLOEXEC } else { flags & !libc::O_CLOEXEC };
        Ok(Some(Entry { family: Some(family), ..Entry::made_of(self.pid, fd, file, stat, flags) }))
    }

    /// Reads all there is to know of a number; `None` when it is not open (any more).
    pub(crate) fn entry(&self, pidfd: BorrowedFd<'_>, fd: i32) -> Result<Option<Entry>> {
        match process::pidfd_getfd(pidfd, fd) {
            Ok(file) => self.entry_of(fd, file),
            Err(Errno::EBADF) => Ok(None),
            Err(source) => Err(Error::call(format!("fd {fd}"), "pidfd_getfd", source)),
        }
    }

    fn entry_of(&self, fd: i32, file: OwnedFd) -> Result<Option<Entry>> {
        let Some(link) = self.link(fd)? else { return Ok(None) };
        let info = match self.info(fd) {
            Err(Error::Call { source: Errno::ENOENT, .. }) => return Ok(None),
            info => info?,
        };
        let stat = fstat(file.as_fd()).map_err(|source| Error::call(format!("fd {fd}"), "fstat", source))?;
        Ok(Some(Entry { pid: self.pid, fd, link, info, stat, file: Arc::new(file), family: None }))
    }
}
