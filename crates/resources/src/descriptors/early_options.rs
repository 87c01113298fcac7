//! Options of connections that were read while their process still ran.
//!
//! A connection has some 70 options, and reading them is the longest part of taking it apart. They change only when somebody sets one,
//! which is seen by counting the calls: when none was made since, what was read is what there is. Without counters, or when there
//! were calls, all are read inside the freeze.

use super::connection;
use super::inspect::network_number;
use super::kind;
use super::socket_options::Options;
use super::table::{Directory, Entry};
use crate::{Error, Result};
use godwit_kernel::calls::CallCounter;
use godwit_kernel::process::{pidfd_getfd, pidfd_open};
use nix::errno::Errno;
use nix::sys::stat::FileStat;
use std::collections::HashMap;
use std::os::fd::AsFd;

/// Connections for which it pays.
const WORTH_IT: usize = 100;
/// Most threads that are watched: each takes two descriptors.
const MOST_THREADS: usize = 256;

/// Options of connections, by the numbers of their sockets (`st_ino`).
#[derive(Debug, Default)]
pub struct EarlyOptions {
    watch: Option<Watch>,
    known: HashMap<u64, Known>,
    /// The process's network namespace when they were read.
    network: u64,
}

/// A connection of TCP that belongs to its process's network, and on which the kernel speaks nothing (`TCP_ULP`): that, too, changes
/// only with options.
#[derive(Debug)]
struct Known {
    family: i32,
    options: Options,
}

/// Who sets options.
#[derive(Debug)]
struct Watch {
    begun: CallCounter,
    ended: CallCounter,
    /// Calls that were over before the options were read.
    over: u64,
}

impl EarlyOptions {
    /// Begins to watch who sets options, if there are so many connections that it pays and the kernel can tell. The calls of the whole
    /// host take some 15 ns longer from now on.
    #[must_use]
    pub fn prepare(pid: i32, connections: usize) -> Self {
        if connections < WORTH_IT {
            return Self::default();
        }
        let count = |point| CallCounter::begin(pid, point, MOST_THREADS);
        // N.B. in this order: a call that is under way now ends without having begun, and is not taken for one that never ends.
        let watch = count("sys_enter_setsockopt").and_then(|begun| {
            let ended = count("sys_exit_setsockopt")?;
            Ok(Watch { begun, ended, over: 0 })
        });
        match watch {
            Ok(watch) => Self { watch: Some(watch), ..Self::default() },
            Err(errno) => {
                tracing::debug!(%errno, "options of connections are all read inside the freeze");
                Self::default()
            }
        }
    }

    /// Reads the options of all connections of the process that runs.
    ///
    /// # Errors
    /// When its descriptors cannot be looked at.
    pub fn read(&mut self, pid: i32) -> Result<()> {
        self.known.clear();
        let Some(watch) = &mut self.watch else { return Ok(()) };
        let Ok(over) = watch.ended.count() else { return Ok(()) };
        watch.over = over;
        let pidfd = pidfd_open(pid).map_err(|source| Error::call(format!("process {pid}"), "pidfd_open", source))?;
        let numbers = Directory::open(pid)?.numbers()?;
        self.network = network_number(pid)?;
        // N.B. by this thread alone: the process runs, and its clients are not to wait for processors.
        let read = numbers.iter().map(|&fd| match pidfd_getfd(pidfd.as_fd(), fd) {
            Ok(file) => {
                let entry = Entry::of_socket(fd, file)?;
                let connection = kind::examine_tcp(&entry, self.network, None)?
                    .filter(|inet| connection::is_connection(inet.state) && !inet.is_mptcp());
                let Some(inet) = connection else { return Ok(None) };
                let (family, options) = (inet.family(), Options::read(&entry, inet.family())?);
                Ok(Some((entry.stat.st_ino, Known { family, options })))
            }
            // The process runs: it may have closed it.
            Err(Errno::EBADF) => Ok(None),
            Err(source) => Err(Error::call(format!("fd {fd}"), "pidfd_getfd", source)),
        });
        // N.B. what cannot be looked at now is looked at later, and gets its error there.
        self.known = read.filter_map(|read: Result<_>| read.ok().flatten()).collect();
        Ok(())
    }

    /// Forgets all of them if an option was set since they were read. The process is stopped.
    pub fn settle(&mut self) {
        let Some(watch) = self.watch.take() else { return };
        if watch.begun.count() != Ok(watch.over) {
            tracing::debug!("options were set in the last moment");
            self.known.clear();
        }
        // N.B. the kernel takes its time, and nobody waits for it.
        let _ = std::thread::Builder::new().spawn(move || drop(watch));
    }

    /// What is known of a connection, up to date.
    pub(crate) fn of(&self, entry: &Entry) -> Result<Option<Options>> {
        self.known(&entry.stat).map_or(Ok(None), |known| known.options.renewed(entry))
    }

    /// The family of a connection that is known.
    pub(crate) fn family(&self, stat: &FileStat) -> Option<i32> {
        self.known(stat).map(|known| known.family)
    }

    /// The network that known connections belong to.
    pub(crate) fn network(&self) -> u64 {
        self.network
    }

    /// N.B. files of other kinds have numbers of their own, which may be the same.
    fn known(&self, stat: &FileStat) -> Option<&Known> {
        let is_socket = stat.st_mode & libc::S_IFMT == libc::S_IFSOCK;
        is_socket.then(|| self.known.get(&stat.st_ino)).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_kernel::descriptors::set_socket_option;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;

    /// A connection of this process.
    struct Subject {
        stream: TcpStream,
        _peer: TcpStream,
        early: EarlyOptions,
    }

    impl Subject {
        /// `None` where this kernel does not count calls.
        fn prepare() -> Option<Self> {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let _peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (stream, _) = listener.accept().unwrap();
            let early = EarlyOptions::prepare(std::process::id() as i32, WORTH_IT);
            if early.watch.is_none() {
                eprintln!("not on this machine: tracepoints at system calls");
                return None;
            }
            Some(Self { stream, _peer, early })
        }

        fn set(&self, level: i32, name: i32, value: i32) {
            set_socket_option(self.stream.as_fd(), level, name, &value.to_ne_bytes()).unwrap();
        }

        fn read_and_settle(&mut self, meanwhile: impl FnOnce(&Self)) -> (Option<Options>, Options) {
            self.early.read(std::process::id() as i32).unwrap();
            meanwhile(self);
            self.early.settle();
            let lent: OwnedFd = self.stream.try_clone().unwrap().into();
            let entry = Entry::of_socket(3, lent).unwrap();
            (self.early.of(&entry).unwrap(), Options::read(&entry, libc::AF_INET).unwrap())
        }
    }

    #[test]
    fn what_was_read_is_what_there_is() {
        let Some(mut subject) = Subject::prepare() else { return };
        subject.set(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
        let (early, now) = subject.read_and_settle(|_| {});
        let early = early.expect("nothing was set since");
        assert_eq!((early.packed.unpack(), early.basic), (now.packed.unpack(), now.basic));
        assert_eq!(now.packed.integer(libc::SOL_SOCKET, libc::SO_KEEPALIVE), Some(1));
    }

    #[test]
    fn a_file_of_another_kind_may_have_the_same_number() {
        let Some(mut subject) = Subject::prepare() else { return };
        subject.early.read(std::process::id() as i32).unwrap();
        let file = Entry::of_socket(3, std::fs::File::open("/dev/null").unwrap().into()).unwrap();
        let options = subject.early.known.values().next().unwrap().options.clone();
        subject.early.known.insert(file.stat.st_ino, Known { family: libc::AF_INET, options });
        assert_eq!(subject.early.family(&file.stat), None);
        assert!(subject.early.of(&file).unwrap().is_none());
    }

    #[test]
    fn what_was_set_since_is_noticed() {
        let Some(mut subject) = Subject::prepare() else { return };
        let (early, now) = subject.read_and_settle(|subject| subject.set(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 123));
        assert!(early.is_none(), "an option was set since");
        assert_eq!(now.packed.integer(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE), Some(123));
        // Nothing is watched any more.
        let (early, _) = subject.read_and_settle(|_| {});
        assert!(early.is_none());
    }

    #[test]
    fn what_the_kernel_changes_is_read_again() {
        let Some(mut subject) = Subject::prepare() else { return };
        subject.early.read(std::process::id() as i32).unwrap();
        let entry = Entry::of_socket(3, subject.stream.try_clone().unwrap().into()).unwrap();
        let options = &mut subject.early.known.get_mut(&entry.stat.st_ino).unwrap().options;
        let place = options.packed.place(libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP).unwrap();
        std::sync::Arc::make_mut(&mut options.packed).overwrite(place, &7i32.to_ne_bytes());
        options.basic.so_rcvbuf = 7;
        let now = Options::read(&entry, libc::AF_INET).unwrap();
        let renewed = subject.early.of(&entry).unwrap().unwrap();
        assert_eq!((renewed.packed.unpack(), renewed.basic), (now.packed.unpack(), now.basic));
    }
}
