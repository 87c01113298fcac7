//! The process that serves faults is killed: its holder keeps the userfaultfds, and a successor gets them from there.

#[path = "support/program.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod program;

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use godwit_carry::{Party, Token};
use godwit_fault::{
    FaultListenerConfig, FaultService, FrozenProcess, Migration, MigrationId, PageSource, find_holders,
};
use godwit_kernel::process::{pidfd_getfd, pidfd_open};
use godwit_kernel::uffd::Userfaultfd;
use program::{End, pages};

const PAGES: u64 = 4096;
const ID: MigrationId = MigrationId([8; 16]);

fn token() -> Token {
    Token::from_bytes(&[4; 32]).unwrap()
}

fn at(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Not a test of its own: the service of the test below, in a process that can be killed.
#[test]
#[ignore = "a part of another test"]
fn service_to_be_killed() {
    let Ok(arguments) = std::env::var("GODWIT_TEST_SERVICE") else { return };
    let numbers: Vec<i32> = arguments.split(',').map(|number| number.parse().unwrap()).collect();
    let (pid, fd, port) = (numbers[0], numbers[1], numbers[2] as u16);
    let pidfd = pidfd_open(pid).unwrap();
    let uffd = Userfaultfd::from_fd(pidfd_getfd(pidfd.as_fd(), fd).unwrap());
    let service = FaultService::start(FaultListenerConfig::new(at(port), at(port + 1), token())).unwrap();
    let handle = service
        .adopt(Migration { id: ID, party: Party::TokenHolders, pid, uffd, pending: pages(0, PAGES), at_end: None })
        .unwrap();
    println!("\nadopted");
    let _ = handle.wait();
}

/// Starts the process above and waits until it serves.
fn start(end: &End, fd: i32, port: u16) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "service_to_be_killed", "--ignored", "--nocapture"]);
    command.env("GODWIT_TEST_SERVICE", format!("{},{fd},{port}", end.pid())).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    assert!(output.lines().map_while(Result::ok).any(|line| line == "adopted"));
    child
}

#[test]
fn a_killed_service_is_replaced() {
    let port = loop {
        let first = UdpSocket::bind(at(0)).unwrap().local_addr().unwrap().port();
        if first < 65535 && UdpSocket::bind(at(first + 1)).is_ok() {
            break first;
        }
    };
    let content = End::source(PAGES);
    let (mut end, fd) = End::program_with_its_userfaultfd(PAGES);
    let mut first = start(&end, fd, port);
    assert_eq!(end.ask("close"), "ok 0");
    end.say("wait 0 8 3");
    assert_eq!(end.hear(), "waiting");
    first.kill().unwrap();
    first.wait().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let holders = find_holders().unwrap();
    assert!(!holders.is_empty());

    let service = FaultService::start(FaultListenerConfig::new(at(port), at(port + 1), token())).unwrap();
    let handles = service.take_over_orphans(|_| None).unwrap();
    let handle = handles.iter().find(|handle| handle.id() == ID).unwrap();
    assert_eq!(handle.missing_pages(), PAGES);
    // What is served already is not taken over a second time.
    assert!(service.take_over_orphans(|_| None).unwrap().iter().all(|handle| handle.id() != ID));
    let source = PageSource::new(service.faults_addr(), service.drain_addr(), (token(), Party::TokenHolders), ID);
    source.run(FrozenProcess::open(content.pid()).unwrap()).unwrap();
    assert_eq!(end.hear(), "ok 8");
    assert_eq!(end.ask("verify 0 0 4096"), "ok 4096");
    assert!(handle.wait().unwrap().acknowledged);
    let gone = |holder: &i32| {
        !std::path::Path::new(&format!("/proc/{holder}/cmdline")).exists() || !find_holders().unwrap().contains(holder)
    };
    let deadline = Instant::now() + Duration::from_secs(5);
    while !holders.iter().any(gone) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(holders.iter().any(gone), "the holder stays");
}

/// A holder leaves by itself when the process it holds for has ended.
#[test]
fn a_holder_does_not_outlive_the_program() {
    let (end, uffd) = End::program(16);
    let any = at(0);
    let service = FaultService::start(FaultListenerConfig::new(any, any, token())).unwrap();
    let before = find_holders().unwrap();
    let id = MigrationId([9; 16]);
    let handle = service
        .adopt(Migration { id, party: Party::TokenHolders, pid: end.pid(), uffd, pending: pages(0, 16), at_end: None })
        .unwrap();
    let ours = find_holders().unwrap().into_iter().find(|holder| !before.contains(holder)).unwrap();
    drop(end);
    assert!(handle.progress().faults == 0);
    let deadline = Instant::now() + Duration::from_secs(5);
    while find_holders().unwrap().contains(&ours) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!find_holders().unwrap().contains(&ours));
}
