//! The daemon is killed in mid-drain: the program stalls, a successor goes on, and every byte is the source's.

#[path = "../../crates/fault/tests/support/gate.rs"]
mod gate;
#[path = "../../crates/fault/tests/support/program.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod program;

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use gate::{Gate, Opening};
use godwit_carry::{Party, Token};
use godwit_fault::{FrozenProcess, LazyDaemon, Migration, MigrationId, PageSource};
use godwit_kernel::uffd::Userfaultfd;
use program::{End, pages};

const ID: MigrationId = MigrationId([5; 16]);

/// A directory with a token and a socket in it.
struct Place {
    directory: tempfile::TempDir,
    token: PathBuf,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let token = directory.path().join("token");
        std::fs::File::create(&token).unwrap().write_all(&[3; 40]).unwrap();
        std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
        Self { directory, token }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("lazy.sock")
    }
}

/// The daemon. Killed with -9 when dropped.
struct Daemon {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Daemon {
    fn start(place: &Place, port: u16) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lazy-pages"));
        command.args(["daemon", "--json", "--listen", &format!("127.0.0.1:{port}"), "--socket"]).arg(place.socket());
        command.arg("--token-file").arg(&place.token).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut daemon = Self { child, output };
        assert!(daemon.line().contains("\"listening\""));
        daemon
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }

    fn signal(&self, signal: &str) {
        let killed = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(killed.success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two UDP ports in a row that nobody uses, the first of them.
fn free_ports() -> u16 {
    loop {
        let first = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = first.local_addr().unwrap().port();
        if port < 65535 && std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, port + 1)).is_ok() {
            return port;
        }
    }
}

/// A program that lacks its first `count` pages.
fn migration(program: &End, uffd: Userfaultfd, count: u64) -> Migration {
    Migration { id: ID, party: Party::TokenHolders, pid: program.pid(), uffd, pending: pages(0, count), at_end: None }
}

fn source(place: &Place, daemon: &LazyDaemon) -> PageSource {
    let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let token = Token::load(&place.token).unwrap();
    let mut source =
        PageSource::new(at(daemon.faults_port()), at(daemon.drain_port()), (token, Party::TokenHolders), ID);
    source.give_up_after = Duration::from_secs(20);
    source
}

/// Ends a daemon in mid-drain by `signal`, starts another, and lets the program look at all its pages.
fn replace_daemon(signal: &str, mut meanwhile: impl FnMut(&mut End)) {
    const COUNT: u64 = 8192;
    let place = Place::new();
    let port = free_ports();
    let first = Daemon::start(&place, port);
    let lazy = LazyDaemon::connect(place.socket()).unwrap();
    let content = End::source(COUNT);
    let (mut end, uffd) = End::program(COUNT);
    let handle = lazy.adopt(migration(&end, uffd, COUNT)).unwrap();
    let gate = Gate::new(&content);
    let served = std::thread::scope(|scope| {
        let opening = Opening(&gate);
        let (reader, from) = (gate.clone(), source(&place, &lazy));
        let served = scope.spawn(move || from.run(reader));
        let touched = end.ask("touch 4000 200 3 0");
        assert!(touched.starts_with("ok 0"), "{touched}");
        meanwhile(&mut end);
        first.signal(signal);
        drop(first);
        // Threads that fault now wait, also those that the first daemon had heard of.
        end.say("wait 4096 32 50");
        assert_eq!(end.hear(), "waiting");
        assert!(handle.missing_pages() > 4000);
        let mut second = Daemon::start(&place, port);
        assert!(second.line().contains("\"serving\""));
        assert_eq!(end.hear(), "ok 32");
        meanwhile(&mut end);
        drop(opening);
        let report = handle.wait().unwrap();
        assert!(report.acknowledged && !report.departed, "{report:?}");
        assert!(second.line().contains("\"drained\""));
        served.join().unwrap()
    });
    assert!(served.is_ok(), "{served:?}");
    assert_eq!(end.ask("verify 16 16 8176"), "ok 8176");
}

#[test]
fn a_killed_daemon_is_replaced() {
    replace_daemon("-KILL", |_| {});
}

#[test]
fn a_daemon_that_was_asked_to_end_is_replaced() {
    replace_daemon("-TERM", |_| {});
}

#[test]
fn a_successor_knows_of_moves_removals_and_children() {
    let mut round = 0;
    replace_daemon("-KILL", |end| {
        round += 1;
        if round == 1 {
            assert_eq!(end.ask("discard 0 16"), "ok 0");
            // There and back, so that a successor that missed it would find nothing here.
            assert_eq!(end.ask("remap 6000 500 20000"), "ok 0");
            assert_eq!(end.ask("remap 20000 500 6000"), "ok 0");
            assert_eq!(end.ask("remap 7000 100 30000"), "ok 0");
            assert_eq!(end.ask("fork 6000 6000 40"), "ok 0");
        } else {
            assert_eq!(end.ask("zeros 0 16"), "ok 16");
            assert_eq!(end.ask("verify 30000 7000 100"), "ok 100");
            assert_eq!(end.ask("fork 30000 7000 100"), "ok 0");
            assert_eq!(end.ask("remap 30000 100 7000"), "ok 0");
            assert_eq!(end.ask("verify 6000 6000 500"), "ok 500");
        }
    });
}

/// What goes wrong without a second holder: the reason for all of it.
#[test]
fn without_a_second_holder_pages_would_be_made_up() {
    let (mut end, uffd) = End::program(16);
    end.say("wait 0 4 1");
    assert_eq!(end.hear(), "waiting");
    drop(uffd);
    assert_eq!(end.hear(), "wrong 4 of 4");
    assert_eq!(end.ask("zeros 0 16"), "ok 16");
}

/// The same, with one.
#[test]
fn with_a_second_holder_it_stalls() {
    let place = Place::new();
    let port = free_ports();
    let content = End::source(16);
    let (mut end, uffd) = End::program(16);
    let daemon = Daemon::start(&place, port);
    let lazy = LazyDaemon::connect(place.socket()).unwrap();
    let handle = lazy.adopt(migration(&end, uffd, 16)).unwrap();
    end.say("wait 0 4 1");
    assert_eq!(end.hear(), "waiting");
    drop(daemon);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(handle.missing_pages(), 16);
    let _second = Daemon::start(&place, port);
    let from = source(&place, &lazy);
    let served = from.run(FrozenProcess::open(content.pid()).unwrap());
    assert!(served.is_ok(), "{served:?}");
    assert_eq!(end.hear(), "ok 4");
    assert_eq!(end.ask("verify 0 0 16"), "ok 16");
}

/// The holder beside a daemon is killed: there is another one before the daemon is gone, too.
#[test]
fn a_killed_holder_is_replaced_beside_a_daemon() {
    let own = |pid: &i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains(&format!("PPid:\t{}\n", std::process::id())) && !status.contains("State:\tZ")
    };
    let holder = || godwit_fault::find_holders().unwrap().into_iter().find(own);
    let place = Place::new();
    let port = free_ports();
    let content = End::source(16);
    let (mut end, uffd) = End::program(16);
    let daemon = Daemon::start(&place, port);
    let lazy = LazyDaemon::connect(place.socket()).unwrap();
    let migration = migration(&end, uffd, 16);
    let handle = lazy.adopt(migration).unwrap();
    let first = holder().unwrap();
    assert!(Command::new("kill").args(["-KILL", &first.to_string()]).status().unwrap().success());
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while holder().is_none_or(|now| now == first) {
        assert!(std::time::Instant::now() < deadline, "nobody holds them");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(daemon);
    let _second = Daemon::start(&place, port);
    let from = source(&place, &lazy);
    let served = from.run(FrozenProcess::open(content.pid()).unwrap());
    assert!(served.is_ok(), "{served:?}");
    assert_eq!(end.ask("verify 0 0 16"), "ok 16");
    assert!(handle.wait().unwrap().acknowledged);
    assert_eq!(holder(), None);
}

#[test]
fn two_daemons_do_not_share_a_socket() {
    let place = Place::new();
    let _first = Daemon::start(&place, free_ports());
    let refused = try_start(&place, &place.socket(), &place.token);
    assert_eq!(refused, Some(1));
}

#[test]
fn a_missing_token_is_an_error() {
    let place = Place::new();
    assert_eq!(try_start(&place, &place.socket(), Path::new("/nonexistent")), Some(1));
    assert!(!place.socket().exists());
}

fn try_start(place: &Place, socket: &Path, token: &Path) -> Option<i32> {
    let _ = place;
    let mut command = Command::new(env!("CARGO_BIN_EXE_lazy-pages"));
    command.args(["daemon", "--listen", "127.0.0.1:0", "--socket"]).arg(socket).arg("--token-file").arg(token);
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().code()
}
