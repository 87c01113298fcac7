//! Connections as they were while their process still ran: their options, and what the destination was told of them.
//!
//! A connection has some 70 options, and reading them is the longest part of taking it apart. They change only when somebody sets one,
//! which is seen by counting the calls: when none was made since, what was read is what there is. Without counters, or when there
//! were calls, all are read inside the freeze.
//!
//! The destination is told of these connections as they are, so that it has sockets for them before the freeze.

use super::connection;
use super::inspect::network_number;
use super::kind;
use super::listener::{self, Inet};
use super::option_sets::OptionSets;
use super::socket_options::Options;
use super::table::{Directory, Entry};
use crate::{Error, Result};
use godwit_kernel::calls::CallCounter;
use godwit_kernel::process::{pidfd_getfd, pidfd_open};
use godwit_proto::image::{InetSkEntry, SkOptsEntry};
use godwit_proto::wire::{ExpectedConnection, Streams};
use nix::sys::stat::FileStat;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

/// Connections that are told of in one message: while they are made, the next ones are read.
const AT_ONCE: usize = 128;
/// Connections for which it pays.
const WORTH_IT: usize = 100;
/// Most threads that are watched: each takes two descriptors.
const MOST_THREADS: usize = 256;

/// Connections that were looked at, by the numbers of their sockets (`st_ino`).
#[derive(Debug, Default)]
pub struct EarlyConnections {
    watch: Option<Watch>,
    known: HashMap<u64, Known>,
    /// The process's network namespace when they were read.
    network: u64,
    /// Option sets that the destination was told of.
    sets: OptionSets,
    /// Connections that it was told of.
    told: u32,
    /// Descriptors that the process had.
    descriptors: usize,
}

/// A connection of TCP that belongs to its process's network, and on which the kernel speaks nothing (`TCP_ULP`): that, too, changes
/// only with options.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) inet: Inet,
    pub(crate) options: Options,
    status_flags: i32,
    /// The number under which the destination was told of it.
    number: u32,
}

impl Known {
    /// The number under which the destination was told of a connection, if it is still as it was then: `basic` are its options now.
    pub(crate) fn number_if_same(&self, entry: &Entry, inet: &Inet, basic: &SkOptsEntry) -> Option<u32> {
        let is_same =
            self.inet == *inet && self.status_flags == entry.info.status_flags() && self.options.basic == *basic;
        is_same.then_some(self.number)
    }
}

/// Who sets options.
#[derive(Debug)]
struct Watch {
    begun: CallCounter,
    ended: CallCounter,
    /// Calls that were over before the options were read.
    over: u64,
}

impl EarlyConnections {
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

    /// Reads the options of all connections of the process that runs, and tells of them, some at a time.
    ///
    /// # Errors
    /// When its descriptors cannot be looked at.
    pub fn read(&mut self, pid: i32, tell: &mut dyn FnMut(Streams)) -> Result<()> {
        self.known.clear();
        let Some(watch) = &mut self.watch else { return Ok(()) };
        let Ok(over) = watch.ended.count() else { return Ok(()) };
        watch.over = over;
        let pidfd = pidfd_open(pid).map_err(|source| Error::call(format!("process {pid}"), "pidfd_open", source))?;
        let numbers = Directory::open(pid)?.numbers()?;
        self.descriptors = numbers.len();
        self.network = network_number(pid)?;
        let mut message = Streams::default();
        // N.B. by this thread alone: the process runs, and its clients are not to wait for processors.
        for fd in numbers {
            let file = match pidfd_getfd(pidfd.as_fd(), fd) {
                // The process runs: it may have closed it.
                Err(_) => continue,
                Ok(file) => file,
            };
            // N.B. what cannot be looked at now is looked at later, and gets its error there.
            let Ok(Some((number, known, socket))) = self.look(fd, file) else { continue };
            let option_set = self.sets.number(&known.options.packed, &mut message.option_sets);
            message.expected.push(ExpectedConnection { socket: Some(socket), option_set });
            self.known.insert(number, known);
            if message.expected.len() == AT_ONCE {
                tell(std::mem::take(&mut message));
            }
        }
        if !message.expected.is_empty() {
            tell(message);
        }
        Ok(())
    }

    /// Looks at a connection; `None` for what is none that could move.
    fn look(&mut self, fd: i32, file: OwnedFd) -> Result<Option<(u64, Known, InetSkEntry)>> {
        let entry = Entry::of_socket(fd, file)?;
        // Several numbers may lead to one socket.
        if self.known(&entry.stat).is_some() {
            return Ok(None);
        }
        let connection = kind::examine_tcp(&entry, self.network, None)?
            .filter(|inet| connection::is_connection(inet.state) && !inet.is_mptcp());
        let Some(inet) = connection else { return Ok(None) };
        let options = Options::read(&entry, inet.family())?;
        self.told += 1;
        let socket = listener::describe(&entry, &inet, self.told, options.basic.clone())?;
        let known = Known { inet, options, status_flags: entry.info.status_flags(), number: self.told };
        Ok(Some((entry.stat.st_ino, known, socket)))
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

    /// The options of a connection that is known, up to date.
    pub(crate) fn of(&self, entry: &Entry) -> Result<Option<Options>> {
        self.known(&entry.stat).map_or(Ok(None), |known| known.options.renewed(entry))
    }

    /// `SO_REUSEADDR` of a connection: nobody but a program sets it.
    pub(crate) fn reuse(&self, entry: &Entry) -> Result<i32> {
        let options = self.known(&entry.stat).map(|known| &known.options);
        match options.and_then(|options| options.packed.integer(libc::SOL_SOCKET, libc::SO_REUSEADDR)) {
            Some(known) => Ok(known),
            None => kind::integer_option(entry, libc::SOL_SOCKET, libc::SO_REUSEADDR),
        }
    }

    /// The option sets that were told of.
    pub(crate) fn sets(&self) -> &OptionSets {
        &self.sets
    }

    /// How many descriptors the process had; 0 if nobody has looked.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// The network that known connections belong to.
    pub(crate) fn network(&self) -> u64 {
        self.network
    }

    /// What is known of a connection. N.B. files of other kinds have numbers of their own, which may be the same.
    pub(crate) fn known(&self, stat: &FileStat) -> Option<&Known> {
        let is_socket = stat.st_mode & libc::S_IFMT == libc::S_IFSOCK;
        is_socket.then(|| self.known.get(&stat.st_ino)).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_kernel::descriptors::set_socket_option;
    use std::net::{TcpListener, TcpStream};
    /// A connection of this process.
    struct Subject {
        stream: TcpStream,
        _peer: TcpStream,
        early: EarlyConnections,
    }

    impl Subject {
        /// `None` where this kernel does not count calls.
        fn prepare() -> Option<Self> {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let _peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (stream, _) = listener.accept().unwrap();
            let early = EarlyConnections::prepare(std::process::id() as i32, WORTH_IT);
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
            self.early.read(std::process::id() as i32, &mut |_| ()).unwrap();
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
    fn a_connection_is_as_it_was_told_of_or_told_of_anew() {
        let Some(mut subject) = Subject::prepare() else { return };
        let _another_number = subject.stream.try_clone().unwrap();
        let mut told = Streams::default();
        subject.early.read(std::process::id() as i32, &mut |some| told = some).unwrap();
        let local = subject.stream.local_addr().unwrap();
        let expected = told.expected.iter().filter_map(|one| one.socket.as_ref());
        let of_it = expected.filter(|socket| listener::source_of(socket) == Some(local) && socket.dst_port != 0);
        let numbers: Vec<u32> = of_it.map(|socket| socket.id).collect();
        let &[number] = numbers.as_slice() else { panic!("it was told of {} times", numbers.len()) };
        let now = |subject: &Subject| {
            let entry = Entry::of_socket(3, subject.stream.try_clone().unwrap().into()).unwrap();
            let known = subject.early.known(&entry.stat).unwrap();
            let inet = listener::examine_known(&entry, &known.inet).unwrap();
            let options = known.options.renewed(&entry).unwrap().unwrap();
            known.number_if_same(&entry, &inet, &options.basic)
        };
        assert_eq!(now(&subject), Some(number));
        subject.stream.set_nonblocking(true).unwrap();
        assert_eq!(now(&subject), None, "its status flags are others");
        subject.stream.set_nonblocking(false).unwrap();
        subject.set(libc::SOL_SOCKET, libc::SO_SNDBUF, 50_000);
        assert_eq!(now(&subject), None, "its buffer is another");
    }

    #[test]
    fn a_file_of_another_kind_may_have_the_same_number() {
        let Some(mut subject) = Subject::prepare() else { return };
        subject.early.read(std::process::id() as i32, &mut |_| ()).unwrap();
        let file = Entry::of_socket(3, std::fs::File::open("/dev/null").unwrap().into()).unwrap();
        let known = subject.early.known.values().next().unwrap().clone();
        subject.early.known.insert(file.stat.st_ino, known);
        assert!(subject.early.known(&file.stat).is_none());
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
        subject.early.read(std::process::id() as i32, &mut |_| ()).unwrap();
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
