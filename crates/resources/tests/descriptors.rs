//! Descriptor tables of a process that is stopped, collected, and rebuilt in a stub beside it. The process is this test
//! program itself, started once more with a role to play. Runs as root.

use godwit_kernel::process::{Compared, compare, pidfd_getfd, pidfd_open};
use godwit_kernel::{Errno, stub};
use godwit_resources::descriptors::{
    Ahead, Clocks, Connections, Courier, Descriptors, Destination, EarlyConnections, Externals, Numbers, Rebuilt,
    Source, Survey, Taking, check_addresses, check_files, collect, inspect, rebuild,
};
use godwit_tracee::{Batch, Extent, Tracee};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use nix::sys::stat::Mode;
use nix::unistd::{pipe2, read, write};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

const ROLE: &str = "GODWIT_TEST_ROLE";
const DIRECTORY: &str = "GODWIT_TEST_DIRECTORY";

// ---- the process that is moved ----

/// Plays a role when this program was started for that; otherwise it has nothing to do.
#[test]
fn plays_a_role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let directory = PathBuf::from(std::env::var(DIRECTORY).unwrap());
    close_inherited();
    let mut holder = Holder::default();
    match role.as_str() {
        "files" => hold_files(&directory, &mut holder),
        "pipes" => hold_pipes(&directory, &mut holder),
        "events" => hold_events(&directory, &mut holder),
        "listeners" => hold_listeners(&directory, &mut holder),
        "refused" => hold_refused(&mut holder),
        "many" => hold_many(&directory, &mut holder),
        other => panic!("no role {other}"),
    }
    let listed: Vec<String> = holder.numbers.iter().map(|(name, fd)| format!("{name}={fd}")).collect();
    std::fs::write(directory.join("ready.new"), listed.join("\n")).unwrap();
    std::fs::rename(directory.join("ready.new"), directory.join("ready")).unwrap();
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Whoever runs the tests may leave descriptors open in them.
fn close_inherited() {
    for fd in numbers_of(std::process::id() as i32).into_iter().filter(|fd| *fd > 2) {
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
        if link.to_string_lossy().contains(":[") {
            nix::unistd::close(fd).unwrap();
        }
    }
}

#[derive(Default)]
struct Holder {
    numbers: Vec<(&'static str, RawFd)>,
    held: Vec<OwnedFd>,
}

impl Holder {
    fn keep(&mut self, name: &'static str, fd: impl Into<OwnedFd>) {
        let fd = fd.into();
        self.numbers.push((name, fd.as_raw_fd()));
        self.held.push(fd);
    }

    /// Duplicates the last one.
    fn duplicate(&mut self, name: &'static str, lowest: RawFd) {
        let fd = fcntl(self.held.last().unwrap(), FcntlArg::F_DUPFD(lowest)).unwrap();
        self.numbers.push((name, fd));
    }
}

fn hold_files(directory: &Path, holder: &mut Holder) {
    let mut plain = File::create_new(directory.join("plain")).unwrap();
    plain.write_all(&[7; 10_000]).unwrap();
    plain.seek(SeekFrom::Start(4321)).unwrap();
    holder.keep("plain", plain);
    holder.duplicate("duplicate", 200);
    holder.keep("reopened", File::open(directory.join("plain")).unwrap());
    let mut appending = File::options();
    appending.append(true).custom_flags(libc::O_SYNC | libc::O_NONBLOCK).create(true);
    holder.keep("appending", appending.open(directory.join("appending")).unwrap());
    let mut deleted = File::options().read(true).write(true).create_new(true).open(directory.join("deleted")).unwrap();
    deleted.write_all(b"deleted content").unwrap();
    std::fs::remove_file(directory.join("deleted")).unwrap();
    holder.keep("deleted", deleted);
    let memfd = memfd_create("a name", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap();
    write(&memfd, b"memfd content").unwrap();
    holder.keep("memfd", memfd);
    holder.keep("directory", File::open(directory).unwrap());
    holder.keep("path", File::options().read(true).custom_flags(libc::O_PATH).open(directory).unwrap());
    holder.keep("null", File::options().read(true).write(true).open("/dev/null").unwrap());
    holder.duplicate("far", 900);
}

fn hold_pipes(directory: &Path, holder: &mut Holder) {
    let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1 << 18)).unwrap();
    write(&writer, &[5; 100_000]).unwrap();
    holder.keep("reader", reader);
    holder.keep("writer", writer);
    let (reader, writer) = pipe2(OFlag::O_DIRECT).unwrap();
    write(&writer, b"one").unwrap();
    write(&writer, b"three").unwrap();
    holder.keep("packets", reader);
    holder.keep("packet writer", writer);
    holder.keep("half", pipe2(OFlag::O_CLOEXEC).unwrap().0);
    let fifo = directory.join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::from_bits_truncate(0o600)).unwrap();
    let fifo = open(&fifo, OFlag::O_RDWR | OFlag::O_NONBLOCK, Mode::empty()).unwrap();
    write(&fifo, b"in the fifo").unwrap();
    holder.keep("fifo", fifo);
    for (kind, names) in [
        (SockType::Stream, ["stream a", "stream b"]),
        (SockType::Datagram, ["datagram a", "datagram b"]),
        (SockType::SeqPacket, ["sequenced a", "sequenced b"]),
    ] {
        let (a, b) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_NONBLOCK).unwrap();
        write(&a, b"first").unwrap();
        write(&a, &[9; 5000]).unwrap();
        write(&b, b"back").unwrap();
        holder.keep(names[0], a);
        holder.keep(names[1], b);
    }
    let (orphan, mut other) = UnixStream::pair().unwrap();
    other.write_all(b"last words").unwrap();
    drop(other);
    holder.keep("orphan", orphan);
    let (shut, other) = UnixStream::pair().unwrap();
    shut.shutdown(std::net::Shutdown::Write).unwrap();
    holder.keep("shut", shut);
    holder.keep("shut peer", other);
}

fn hold_events(directory: &Path, holder: &mut Holder) {
    use godwit_kernel::events;
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
    use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
    let counter = events::eventfd(0, libc::EFD_NONBLOCK).unwrap();
    write(&counter, &0x1_2345_6789u64.to_ne_bytes()).unwrap();
    let signals = events::signalfd(1 << (libc::SIGUSR2 - 1), libc::SFD_NONBLOCK).unwrap();
    let watcher = events::inotify(libc::IN_NONBLOCK).unwrap();
    std::fs::write(directory.join("watched"), "x").unwrap();
    let watched = std::ffi::CString::new(directory.join("watched").to_str().unwrap()).unwrap();
    godwit_kernel::descriptors::set_next_watch(watcher.as_fd(), 40).unwrap();
    assert_eq!(events::add_watch(watcher.as_fd(), &watched, libc::IN_MODIFY).unwrap(), 40);

    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK).unwrap();
    let setting = Expiration::IntervalDelayed(Duration::from_millis(5).into(), Duration::from_secs(1000).into());
    timer.set(setting, TimerSetTimeFlags::empty()).unwrap();
    // By then it has expired, unread.
    std::thread::sleep(Duration::from_millis(30));

    let inner = Epoll::new(EpollCreateFlags::empty()).unwrap();
    inner.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, 0x1111_2222_3333_4444)).unwrap();
    inner.add(&signals, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 2)).unwrap();
    let outer = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    outer.add(&inner.0, EpollEvent::new(EpollFlags::EPOLLIN, 3)).unwrap();
    // Watched under a number that is closed afterwards, and under one that something else has afterwards.
    let closed = fcntl(&counter, FcntlArg::F_DUPFD(100)).unwrap();
    let reused = counter.try_clone().unwrap();
    let number = reused.as_raw_fd();
    outer.add(&reused, EpollEvent::new(EpollFlags::EPOLLIN, 5)).unwrap();
    drop(reused);
    let reused = File::open("/dev/zero").unwrap();
    assert_eq!(reused.as_raw_fd(), number);
    holder.keep("reused", reused);
    let stand_in = godwit_kernel::process::pidfd_open(std::process::id() as i32).unwrap();
    let lent = pidfd_getfd(stand_in.as_fd(), closed).unwrap();
    outer.add(&lent, EpollEvent::new(EpollFlags::EPOLLIN, 4)).unwrap();
    drop((lent, stand_in));
    nix::unistd::close(closed).unwrap();
    holder.keep("counter", counter);
    holder.keep("semaphore", events::eventfd(3, libc::EFD_SEMAPHORE).unwrap());
    holder.keep("idle timer", events::timerfd(libc::CLOCK_REALTIME, libc::TFD_NONBLOCK).unwrap());
    holder.keep("signals", signals);
    holder.keep("watcher", watcher);
    holder.keep("inner", inner.0);
    holder.keep("outer", outer.0);
    holder.keep("timer", timer.as_fd().try_clone_to_owned().unwrap());
}

fn hold_listeners(directory: &Path, holder: &mut Holder) {
    use std::os::linux::net::SocketAddrExt;
    holder.keep("tcp", TcpListener::bind("127.0.0.1:0").unwrap());
    let six = TcpListener::bind("[::1]:0").unwrap();
    six.set_nonblocking(true).unwrap();
    holder.keep("tcp6", six);
    holder.keep("unix", UnixListener::bind(directory.join("socket")).unwrap());
    let name = format!("godwit test {}", std::process::id());
    let name = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
    holder.keep("abstract", UnixListener::bind_addr(&name).unwrap());
}

fn hold_refused(holder: &mut Holder) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    holder.keep("accepted", listener.accept().unwrap().0);
    holder.keep("client", client);
    holder.keep("pidfd", pidfd_open(std::process::id() as i32).unwrap());
    holder.keep("terminal", File::options().read(true).write(true).open("/dev/ptmx").unwrap());
    holder.keep("namespace", File::open("/proc/self/ns/net").unwrap());
    holder.keep("of a process", File::open("/proc/self/maps").unwrap());
    let protocol = nix::sys::socket::SockProtocol::NetlinkNetFilter;
    let netlink = nix::sys::socket::socket(AddressFamily::Netlink, SockType::Raw, SockFlag::empty(), protocol).unwrap();
    holder.keep("netlink", netlink);
    let waiting = TcpListener::bind("127.0.0.1:0").unwrap();
    let impatient = std::net::TcpStream::connect(waiting.local_addr().unwrap()).unwrap();
    holder.keep("waiting", waiting);
    let elsewhere = godwit_network::Namespace::create().unwrap();
    holder.keep("foreign", elsewhere.inside(|| TcpListener::bind("0.0.0.0:0").unwrap()).unwrap());
    holder.keep("impatient", impatient);
    let (sender, receiver) = UnixStream::pair().unwrap();
    let rights = [sender.as_raw_fd()];
    let rights = [nix::sys::socket::ControlMessage::ScmRights(&rights)];
    let piece = [std::io::IoSlice::new(b"x")];
    nix::sys::socket::sendmsg::<()>(sender.as_raw_fd(), &piece, &rights, MsgFlags::empty(), None).unwrap();
    holder.held.push(sender.into());
    holder.keep("in flight", receiver);
    let locked = nix::fcntl::Flock::lock(File::open("/dev/null").unwrap(), nix::fcntl::FlockArg::LockShared).unwrap();
    holder.numbers.push(("locked", locked.as_raw_fd()));
    std::mem::forget(locked);
}

fn hold_many(directory: &Path, holder: &mut Holder) {
    for i in 0..100 {
        holder.keep("file", File::create(directory.join(format!("file-{i}"))).unwrap());
        holder.keep("null", File::open("/dev/null").unwrap());
        holder.keep("counter", godwit_kernel::events::eventfd(i, 0).unwrap());
        let (reader, writer) = pipe2(OFlag::empty()).unwrap();
        holder.keep("reader", reader);
        holder.keep("writer", writer);
    }
}

// ---- the mover ----

/// The process with a role.
struct Victim {
    child: Child,
    directory: PathBuf,
    numbers: HashMap<String, RawFd>,
    /// A stub is born with copies of all descriptors of this process: one test at a time.
    _alone: MutexGuard<'static, ()>,
}

impl Victim {
    fn start(role: &str, stdin: Stdio) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("godwit-descriptors-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let log = || File::options().append(true).create(true).open(directory.join("log")).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "plays_a_role", "--nocapture"])
            .env(ROLE, role)
            .env(DIRECTORY, &directory)
            .stdin(stdin)
            .stdout(log())
            .stderr(log())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let listed = loop {
            if let Ok(listed) = std::fs::read_to_string(directory.join("ready")) {
                break listed;
            }
            let log = || std::fs::read_to_string(directory.join("log"));
            assert!(Instant::now() < deadline, "the victim does not get ready: {:?}", log());
            std::thread::sleep(Duration::from_millis(5));
        };
        let parse = |line: &str| line.split_once('=').map(|(name, fd)| (name.to_owned(), fd.parse().unwrap()));
        Self { child, directory, numbers: listed.lines().filter_map(parse).collect(), _alone: alone }
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

struct Collected {
    descriptors: Descriptors,
    clocks: Clocks,
    objects: HashMap<u32, OwnedFd>,
}

impl Collected {
    fn from(victim: &Victim, survey: &Survey, externals: &Externals) -> Self {
        let pidfd = pidfd_open(victim.pid()).unwrap();
        let clocks = clocks_now();
        let mut objects = HashMap::new();
        let numbers = Numbers::default();
        let source = Source {
            pid: victim.pid(),
            pidfd: pidfd.as_fd(),
            numbers: &numbers,
            survey,
            externals,
            early: &EarlyConnections::default(),
            at: Instant::now(),
        };
        let began = Instant::now();
        let mut connections = Connections::default();
        let taking = Taking {
            hold: None,
            close: true,
            objection: &|_| None,
            connections: &mut connections,
            closed: &[],
            skip_in_flight: false,
            tell: &mut |_| {},
        };
        let descriptors = collect(
            &source,
            &mut |object, file| {
                let copy = memfd_create(object.name.as_str(), MFdFlags::MFD_ALLOW_SEALING).unwrap();
                let mut content = vec![0; object.size as usize];
                File::from(file.try_clone_to_owned().unwrap()).read_exact_at(&mut content, 0).unwrap();
                write(&copy, &content).unwrap();
                let number = objects.len() as u32 + 1;
                objects.insert(number, copy);
                Ok(number)
            },
            taking,
        )
        .unwrap();
        println!("collected {} descriptors in {:?}", descriptors.fdinfo.len(), began.elapsed());
        Self { descriptors, clocks, objects }
    }

    /// Times left pass between two collections; all else is compared.
    fn assert_like(&self, other: &Self) {
        let mut same = self.descriptors.clone();
        for (file, theirs) in same.files.iter_mut().zip(&other.descriptors.files) {
            if let (Some(timer), Some(theirs)) = (&mut file.tfd, &theirs.tfd) {
                (timer.vsec, timer.vnsec) = (theirs.vsec, theirs.vnsec);
            }
        }
        assert_eq!(same, other.descriptors);
    }

    fn rebuild(&self) -> (Tracee, Rebuilt) {
        let (mut stub, mut courier) = spawn_stub();
        let objects = |number: u32| self.objects.get(&number).map(AsFd::as_fd);
        let destination = Destination { objects: &objects, collected: self.clocks };
        let began = Instant::now();
        let rebuilt = rebuild(&mut stub, &mut courier, &self.descriptors, Ahead::default(), &destination).unwrap();
        println!("rebuilt {} descriptors in {:?}", self.descriptors.fdinfo.len(), began.elapsed());
        courier.close(&mut stub).unwrap();
        (stub, rebuilt)
    }
}

/// A stub under a pid that nobody has.
fn spawn_stub() -> (Tracee, Courier) {
    let (courier, theirs) = Courier::pair().unwrap();
    let highest: i32 = std::fs::read_to_string("/proc/sys/kernel/pid_max").unwrap().trim().parse().unwrap();
    for pid in (highest - 2000..highest).rev() {
        match stub::spawn(pid) {
            Ok(pid) => {
                let mut stub = Tracee::adopt(pid).unwrap();
                close_all_but(&mut stub, theirs.as_raw_fd());
                return (stub, courier);
            }
            Err(Errno::EEXIST) => {}
            Err(errno) => panic!("spawning a stub: {errno}"),
        }
    }
    panic!("no free pid");
}

fn close_all_but(stub: &mut Tracee, kept: RawFd) {
    let mut batch = Batch::new();
    batch.call("close_range", libc::SYS_close_range, &[0.into(), (kept - 1).into(), 0.into()]);
    batch.call("close_range", libc::SYS_close_range, &[(kept + 1).into(), u32::MAX.into(), 0.into()]);
    stub.run(batch).unwrap();
}

fn clocks_now() -> Clocks {
    use nix::time::{ClockId, clock_gettime};
    let read = |clock| clock_gettime(clock).map(|time| time.tv_sec() * 1_000_000_000 + time.tv_nsec()).unwrap();
    Clocks {
        monotonic_ns: read(ClockId::CLOCK_MONOTONIC),
        boottime_ns: read(ClockId::CLOCK_BOOTTIME),
        realtime_ns: read(ClockId::CLOCK_REALTIME),
    }
}

fn numbers_of(pid: i32) -> Vec<RawFd> {
    let mut numbers: Vec<RawFd> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    numbers.sort_unstable();
    numbers
}

/// Everything that fdinfo says apart from what cannot be the same.
fn facts_of(pid: i32, fd: RawFd) -> BTreeMap<String, String> {
    const DIFFERS: &[&str] = &["mnt_id", "ino", "eventfd-id", "it_value", "tfd", "inotify wd"];
    let text = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap();
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    let fields = fields.map(|(field, value)| (field.trim().to_owned(), value.trim().to_owned()));
    let mut facts: BTreeMap<_, _> = fields.filter(|(field, _)| !DIFFERS.contains(&field.as_str())).collect();
    let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap().to_string_lossy().into_owned();
    let own = ["pipe:[", "socket:["].iter().any(|start| link.starts_with(start));
    if !own && !link.ends_with("(deleted)") {
        facts.insert("link".into(), link);
    }
    facts
}

fn assert_same_tables(victim: &Victim, stub: &Tracee) {
    let (a, b) = (victim.pid(), stub.pid());
    let numbers = numbers_of(a);
    assert_eq!(numbers, numbers_of(b));
    for &fd in &numbers {
        assert_eq!(facts_of(a, fd), facts_of(b, fd), "fd {fd}");
    }
    for (index, &first) in numbers.iter().enumerate() {
        for &second in &numbers[index + 1..] {
            let same = |pid| compare(pid, pid, Compared::File(first, second)).unwrap().is_eq();
            assert_eq!(same(a), same(b), "fd {first} and fd {second}");
        }
    }
}

/// Borrows descriptors of a process by the names that the victim gave them.
struct Lender<'a> {
    victim: &'a Victim,
    pidfd: OwnedFd,
}

impl<'a> Lender<'a> {
    fn new(victim: &'a Victim, process: &Tracee) -> Self {
        Self { victim, pidfd: pidfd_open(process.pid()).unwrap() }
    }

    fn lend(&self, name: &str) -> OwnedFd {
        pidfd_getfd(self.pidfd.as_fd(), self.victim.numbers[name]).unwrap()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        let mut buffer = vec![0; 1 << 18];
        let length = read(self.lend(name), &mut buffer).unwrap_or_else(|errno| panic!("{name}: {errno}"));
        buffer.truncate(length);
        buffer
    }
}

/// A frozen victim and a stub that holds the same.
struct Moved {
    stub: Tracee,
    frozen: Tracee,
    victim: Victim,
    _rebuilt: Rebuilt,
}

fn move_aside(role: &str, stdin: Stdio, externals: &Externals) -> Moved {
    let victim = Victim::start(role, stdin);
    let survey = inspect(victim.pid(), externals).unwrap();
    assert!(survey.obstacles.is_empty(), "{:?}", survey.obstacles);
    assert_eq!(check_files(&survey.files), []);
    let frozen = Tracee::freeze(victim.pid(), Extent::AllThreads).unwrap();
    let collected = Collected::from(&victim, &survey, externals);
    Collected::from(&victim, &survey, externals).assert_like(&collected);
    let (stub, rebuilt) = collected.rebuild();
    Moved { stub, frozen, victim, _rebuilt: rebuilt }
}

#[test]
fn files_keep_offsets_flags_and_sharing() {
    let moved = move_aside("files", Stdio::null(), &Externals::default());
    assert_same_tables(&moved.victim, &moved.stub);
    let lender = Lender::new(&moved.victim, &moved.stub);
    let mut deleted = File::from(lender.lend("deleted"));
    assert_eq!(deleted.stream_position().unwrap(), 15);
    deleted.rewind().unwrap();
    let mut content = String::new();
    deleted.read_to_string(&mut content).unwrap();
    assert_eq!(content, "deleted content");
    let mut content = [0; 13];
    File::from(lender.lend("memfd")).read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"memfd content");
}

#[test]
fn pipes_and_pairs_keep_what_waits_in_them() {
    let moved = move_aside("pipes", Stdio::null(), &Externals::default());
    assert_same_tables(&moved.victim, &moved.stub);
    // The source has lost nothing: both are read to the end.
    for process in [&moved.stub, &moved.frozen] {
        let lender = Lender::new(&moved.victim, process);
        assert_eq!(fcntl(lender.lend("writer"), FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 18);
        assert_eq!(lender.read("reader"), [5; 100_000]);
        assert_eq!((lender.read("packets"), lender.read("packets")), (b"one".to_vec(), b"three".to_vec()));
        assert_eq!(lender.read("half"), b"");
        assert_eq!(lender.read("stream b"), [b"first".as_slice(), &[9; 5000]].concat());
        for borders in ["datagram", "sequenced"] {
            let (a, b) = (format!("{borders} a"), format!("{borders} b"));
            assert_eq!((lender.read(&b), lender.read(&b)), (b"first".to_vec(), vec![9; 5000]));
            assert_eq!(lender.read(&a), b"back");
            assert_eq!(recv(lender.lend(&b).as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT), Err(Errno::EAGAIN));
        }
        assert_eq!(lender.read("stream a"), b"back");
        assert_eq!((lender.read("orphan"), lender.read("orphan")), (b"last words".to_vec(), vec![]));
        assert_eq!(lender.read("shut peer"), b"");
        assert_eq!(recv(lender.lend("shut").as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT), Err(Errno::EAGAIN));
    }
    // The two processes share a named pipe here, as they do its file system.
    assert_eq!(Lender::new(&moved.victim, &moved.stub).read("fifo"), b"in the fifo");
}

#[test]
fn events_keep_their_state() {
    let Moved { stub, victim, frozen: _frozen, .. } = &move_aside("events", Stdio::null(), &Externals::default());
    assert_same_tables(victim, stub);
    let lines = |pid: i32, name: &str, start: &str| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", victim.numbers[name])).unwrap();
        let lines = text.lines().filter(|line| line.starts_with(start));
        let mut lines: Vec<String> = lines.map(|line| line.split(" ino:").next().unwrap().to_owned()).collect();
        lines.sort();
        lines
    };
    for (name, watches) in [("inner", 2), ("outer", 3)] {
        assert_eq!(lines(victim.pid(), name, "tfd"), lines(stub.pid(), name, "tfd"), "{name}");
        assert_eq!(lines(stub.pid(), name, "tfd").len(), watches);
    }
    assert_eq!(lines(stub.pid(), "watcher", "inotify"), ["inotify wd:28"]);
    let seconds = |pid: i32| -> i64 {
        let value = lines(pid, "timer", "it_value: (").remove(0);
        value["it_value: (".len()..].split_once(',').unwrap().0.parse().unwrap()
    };
    assert!((seconds(victim.pid()) - seconds(stub.pid())).abs() <= 1 && seconds(stub.pid()) > 900);
    let lender = Lender::new(victim, stub);
    assert_eq!(lender.read("counter"), 0x1_2345_6789u64.to_ne_bytes());
    assert_eq!(lender.read("semaphore"), 1u64.to_ne_bytes());
    assert_eq!(lender.read("timer"), 1u64.to_ne_bytes());
    std::fs::write(victim.directory.join("watched"), "y").unwrap();
    assert_eq!(lender.read("watcher")[..4], 40i32.to_ne_bytes());
    let next = std::ffi::CString::new(victim.directory.to_str().unwrap()).unwrap();
    assert!(godwit_kernel::events::add_watch(lender.lend("watcher").as_fd(), &next, libc::IN_MODIFY).unwrap() > 41);
}

#[test]
fn listeners_listen_again() {
    let victim = Victim::start("listeners", Stdio::null());
    let externals = Externals::default();
    let survey = inspect(victim.pid(), &externals).unwrap();
    assert!(survey.obstacles.is_empty(), "{:?}", survey.obstacles);
    assert_eq!(survey.listening.len(), 4);
    // In this one network namespace the victim itself is in the way.
    assert_eq!(check_addresses(&survey.listening, &[]).len(), 4);
    let frozen = Tracee::freeze(victim.pid(), Extent::AllThreads).unwrap();
    let collected = Collected::from(&victim, &survey, &externals);
    let facts: BTreeMap<RawFd, _> =
        numbers_of(victim.pid()).iter().map(|&fd| (fd, facts_of(victim.pid(), fd))).collect();
    let path = victim.directory.join("socket");
    let inode = || std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&path).unwrap());
    let original = inode();

    let (mut second, mut courier) = spawn_stub();
    let destination = Destination { objects: &|_| None, collected: collected.clocks };
    let error = rebuild(&mut second, &mut courier, &collected.descriptors, Ahead::default(), &destination).unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:") && error.to_string().contains("EADDRINUSE"), "{error}");
    second.kill();
    assert_eq!(inode(), original);

    frozen.kill();
    assert_eq!(check_addresses(&survey.listening, &[]), []);
    let (stub, mut rebuilt) = collected.rebuild();
    for (fd, facts) in facts {
        assert_eq!(facts, facts_of(stub.pid(), fd), "fd {fd}");
    }
    assert_eq!(inode(), original);
    assert!(UnixStream::connect(&path).is_err());
    rebuilt.settle().unwrap();
    assert_ne!(inode(), original);
    let lender = Lender::new(&victim, &stub);
    let unix = UnixListener::from(lender.lend("unix"));
    assert_eq!(unix.local_addr().unwrap().as_pathname(), Some(path.as_path()));
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"hello").unwrap();
    let mut word = [0; 5];
    unix.accept().unwrap().0.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"hello");
    let tcp = TcpListener::from(lender.lend("tcp"));
    let _client = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    tcp.accept().unwrap();
    stub.kill();
}

#[test]
fn everything_else_is_refused_by_name_and_at_once() {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let victim = Victim::start("refused", Stdio::from(ours));
    let survey = inspect(victim.pid(), &Externals::default()).unwrap();
    let about = |fd: RawFd| survey.obstacles.iter().find(|found| found.resource.starts_with(&format!("fd {fd} ")));
    // A connection moves, and one that waits to be accepted may be accepted before the freeze.
    let movable = ["impatient", "client", "waiting", "accepted"];
    assert!(movable.iter().all(|name| about(victim.numbers[*name]).is_none()));
    for (name, fd) in victim.numbers.iter().filter(|(name, _)| !movable.contains(&name.as_str())) {
        assert!(about(*fd).is_some(), "{name} is not refused: {:#?}", survey.obstacles);
    }
    assert!(about(victim.numbers["foreign"]).unwrap().text.contains("another network namespace"));
    let stdin = about(0).unwrap();
    assert!(
        stdin.resource.contains("pipe shared with process") && stdin.remedy.contains("--external 'fd[0]=null'"),
        "{stdin}"
    );
    let externals = Externals::parse(&["fd[0]=null".into()]).unwrap();
    let survey = inspect(victim.pid(), &externals).unwrap();
    assert!(!survey.obstacles.iter().any(|found| found.resource.starts_with("fd 0 ")));
    drop(theirs);
}

#[test]
fn external_files_take_the_place_of_streams() {
    let (ours, _theirs) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let out = std::env::temp_dir().join(format!("godwit-descriptors-out-{}", std::process::id()));
    let externals = ["fd[0]=null".to_owned(), format!("fd[1]=file:{}", out.display())];
    let moved = move_aside("files", Stdio::from(ours), &Externals::parse(&externals).unwrap());
    let link = |fd: RawFd| std::fs::read_link(format!("/proc/{}/fd/{fd}", moved.stub.pid())).unwrap();
    assert_eq!((link(0).as_path(), link(1).as_path()), (Path::new("/dev/null"), out.as_path()));
    let lent = pidfd_getfd(pidfd_open(moved.stub.pid()).unwrap().as_fd(), 1).unwrap();
    let flags = fcntl(lent, FcntlArg::F_GETFL).unwrap();
    assert_eq!(flags & (libc::O_ACCMODE | libc::O_APPEND), libc::O_WRONLY | libc::O_APPEND);
    std::fs::remove_file(out).unwrap();
}

#[test]
fn numbers_are_found_whether_they_are_listed_or_asked_for() {
    let victim = Victim::start("listeners", Stdio::null());
    let mut frozen = Tracee::freeze(victim.pid(), Extent::AllThreads).unwrap();
    let listed = Numbers::of(&mut frozen, 0).unwrap();
    assert_eq!(Numbers::of(&mut frozen, 1 << 20).unwrap(), listed);
    assert_ne!(listed, Numbers::default());
    frozen.release().unwrap();
}

#[test]
fn hundreds_of_descriptors_move() {
    let moved = move_aside("many", Stdio::null(), &Externals::default());
    assert_eq!(numbers_of(moved.victim.pid()), numbers_of(moved.stub.pid()));
}
