//! A program that lacks its pages, a source that has them, a service in between: every byte arrives, whatever the program
//! does meanwhile.

#[path = "support/program.rs"]
#[allow(dead_code, reason = "each test uses a part of it")]
mod program;

#[path = "support/gate.rs"]
mod gate;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gate::{Gate, Opening};
use godwit_carry::{Connector, Credentials, PROTOCOL_VERSION, Party, Profile, Token};
use godwit_fault::{
    DrainHandle, DrainReport, Error, FaultListenerConfig, FaultService, FrozenProcess, Migration, MigrationId,
    PageReader, PageSource, Result,
};
use godwit_kernel::uffd::Userfaultfd;
use godwit_proto::wire::{Drained, Hello, Role, Welcome};
use godwit_proto::{Message, Typed};
use program::{End, pages};

fn token() -> Token {
    Token::from_bytes(&[9; 32]).unwrap()
}

const ID: MigrationId = MigrationId([1; 16]);

fn service() -> FaultService {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    FaultService::start(FaultListenerConfig::new(any, any, token())).unwrap()
}

fn source_for(service: &FaultService) -> PageSource {
    PageSource::new(service.faults_addr(), service.drain_addr(), (token(), Party::TokenHolders), ID)
}

fn adopt(service: &FaultService, end: &End, uffd: Userfaultfd, first: u64, count: u64) -> DrainHandle {
    service
        .adopt(Migration {
            id: ID,
            party: Party::TokenHolders,
            pid: end.pid(),
            uffd,
            pending: pages(first, count),
            at_end: None,
        })
        .unwrap()
}

/// Runs `act` on the program while only faults are served, then lets the rest come.
fn while_draining(count: u64, act: impl FnOnce(&mut End)) -> (End, DrainReport) {
    let source = End::source(count);
    let (mut end, uffd) = End::program(count);
    let service = service();
    let gate = Gate::new(&source);
    let handle = adopt(&service, &end, uffd, 0, count);
    let pages = source_for(&service);
    let report = std::thread::scope(|scope| {
        let reader = gate.clone();
        let served = scope.spawn(move || pages.run(reader));
        // Also where the test fails, so that it ends.
        let opening = Opening(&gate);
        act(&mut end);
        drop(opening);
        let report = handle.wait().unwrap();
        assert!(served.join().unwrap().is_ok());
        report
    });
    assert!(report.acknowledged);
    (end, report)
}

/// Another host in the service's place is given no page, and not believed that none is missing.
#[test]
fn a_service_of_another_host_gets_nothing() {
    let service = service();
    let content = End::source(4);
    let (end, uffd) = End::program(4);
    let handle = adopt(&service, &end, uffd, 0, 4);
    let host = Party::Host("5a".repeat(32).parse().unwrap());
    let mut source = PageSource::new(service.faults_addr(), service.drain_addr(), (token(), host), ID);
    source.give_up_after = Duration::from_millis(300);
    let refused = source.run(FrozenProcess::open(content.pid()).unwrap()).unwrap_err();
    let Error::GaveUp { source: why, .. } = &refused else { panic!("{refused:?}") };
    assert!(matches!(**why, Error::AnotherHost { presented: Party::TokenHolders, .. }), "{refused:?}");
    assert_eq!(handle.missing_pages(), 4);
}

#[test]
fn every_page_arrives_untouched() {
    let (mut end, report) = while_draining(4096, |_| {});
    assert_eq!(end.ask("verify 0 0 4096"), "ok 4096");
    assert_eq!(report.pages, 4096);
}

#[test]
fn pages_under_faults_come_first() {
    let (mut end, report) = while_draining(4096, |end| {
        let touched = end.ask("touch 4096 300 5 0");
        assert!(touched.starts_with("ok 0"), "{touched}");
    });
    assert!(report.faults > 200, "{report:?}");
    assert!(report.p50_us > 0 && report.p50_us <= report.p99_us, "{report:?}");
    assert_eq!(end.ask("verify 0 0 4096"), "ok 4096");
}

#[test]
fn holes_are_zeros_without_a_question() {
    let source = End::source(64);
    let (mut end, uffd) = End::program(64);
    let service = service();
    let handle = adopt(&service, &end, uffd, 0, 16);
    // No source is linked: what is not pending needs none.
    assert_eq!(end.ask("zeros 16 48"), "ok 48");
    assert_eq!(handle.missing_pages(), 16);
    let report = std::thread::scope(|scope| {
        let pages = source_for(&service);
        let reader = FrozenProcess::open(source.pid()).unwrap();
        let served = scope.spawn(move || pages.run(reader));
        let report = handle.wait().unwrap();
        assert!(served.join().unwrap().is_ok());
        report
    });
    assert_eq!(report.holes, 48);
    assert_eq!(end.ask("verify 0 0 16"), "ok 16");
}

#[test]
fn a_program_may_drop_and_unmap_what_it_lacks() {
    let (mut end, _) = while_draining(4096, |end| {
        assert_eq!(end.ask("verify 100 100 4"), "ok 4");
        assert_eq!(end.ask("discard 96 64"), "ok 0");
        assert_eq!(end.ask("zeros 96 64"), "ok 64");
        assert_eq!(end.ask("unmap 1024 512"), "ok 0");
    });
    assert_eq!(end.ask("zeros 96 64"), "ok 64");
    assert_eq!(end.ask("verify 0 0 96"), "ok 96");
    assert_eq!(end.ask("verify 160 160 864"), "ok 864");
    assert_eq!(end.ask("verify 1536 1536 2560"), "ok 2560");
}

#[test]
fn a_program_may_move_what_it_lacks() {
    let (mut end, _) = while_draining(4096, |end| {
        // To a new place, back over a part of it, and a moved piece once more.
        assert_eq!(end.ask("remap 512 512 8192"), "ok 0");
        assert_eq!(end.ask("verify 8200 520 8"), "ok 8");
        assert_eq!(end.ask("remap 8192 128 10000"), "ok 0");
        assert_eq!(end.ask("remap 2048 64 8256"), "ok 0");
        assert_eq!(end.ask("verify 10003 515 2"), "ok 2");
        assert_eq!(end.ask("remap 8512 192 512"), "ok 0");
        assert_eq!(end.ask("verify 512 832 3"), "ok 3");
    });
    assert_eq!(end.ask("verify 0 0 512"), "ok 512");
    assert_eq!(end.ask("verify 10000 512 128"), "ok 128");
    assert_eq!(end.ask("verify 8256 2048 64"), "ok 64");
    assert_eq!(end.ask("verify 8320 640 192"), "ok 192");
    assert_eq!(end.ask("verify 512 832 192"), "ok 192");
    assert_eq!(end.ask("verify 2112 2112 1984"), "ok 1984");
}

#[test]
fn children_get_their_pages_too() {
    let (mut end, _) = while_draining(2048, |end| {
        assert_eq!(end.ask("verify 0 0 8"), "ok 8");
        assert_eq!(end.ask("remap 256 128 5000"), "ok 0");
        // The child waits for what both lack, at the places where it is now.
        assert_eq!(end.ask("fork 5000 256 64"), "ok 0");
        assert_eq!(end.ask("fork 0 0 200"), "ok 0");
        assert_eq!(end.ask("discard 0 16"), "ok 0");
        assert_eq!(end.ask("fork 16 16 100"), "ok 0");
    });
    assert_eq!(end.ask("zeros 0 16"), "ok 16");
    assert_eq!(end.ask("verify 16 16 240"), "ok 240");
    assert_eq!(end.ask("verify 5000 256 128"), "ok 128");
    assert_eq!(end.ask("verify 384 384 1664"), "ok 1664");
}

#[test]
fn a_lost_link_stalls_and_is_taken_up_again() {
    let source = End::source(4096);
    let (mut end, uffd) = End::program(4096);
    let service = service();
    let handle = adopt(&service, &end, uffd, 0, 4096);
    end.say("wait 10 8 400");
    assert_eq!(end.hear(), "waiting");
    // The first source gives up at once and for good: it reads nothing.
    let refusing = Arc::new(AtomicBool::new(true));
    let reader = Flaky { process: FrozenProcess::open(source.pid()).unwrap(), broken: refusing.clone() };
    let mut first = source_for(&service);
    first.give_up_after = Duration::from_millis(300);
    first.credentials = Token::from_bytes(&[8; 32]).unwrap().into();
    let reader = Arc::new(reader);
    assert!(first.run(reader.clone()).is_err());
    assert_eq!(handle.missing_pages(), 4096);
    refusing.store(false, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let served = scope.spawn(|| source_for(&service).run(reader.clone()));
        assert_eq!(end.hear(), "ok 8");
        assert_eq!(end.ask("verify 0 0 4096"), "ok 4096");
        handle.wait().unwrap();
        assert!(served.join().unwrap().is_ok());
    });
}

struct Flaky {
    process: FrozenProcess,
    broken: Arc<AtomicBool>,
}

impl PageReader for Flaky {
    fn read(&self, space: u32, address: u64, into: &mut [u8]) -> Result<()> {
        assert!(!self.broken.load(Ordering::SeqCst), "nobody may ask");
        self.process.read(space, address, into)
    }
}

#[test]
fn the_end_of_the_program_ends_the_drain() {
    let source = End::source(1024);
    let (mut end, uffd) = End::program(1024);
    let service = service();
    let gate = Gate::new(&source);
    let handle = adopt(&service, &end, uffd, 0, 1024);
    let pages = source_for(&service);
    std::thread::scope(|scope| {
        let reader = gate.clone();
        let served = scope.spawn(move || pages.run(reader));
        assert_eq!(end.ask("verify 3 3 2"), "ok 2");
        drop(end);
        let report = handle.wait().unwrap();
        assert!(report.departed);
        gate.open();
        assert!(served.join().unwrap().is_ok());
    });
}

/// On a bad path the source's last word may be lost, and the link's end arrive.
#[test]
fn the_way_in_which_a_source_leaves_says_that_it_knows() {
    /// What only this source closes with.
    const ACKNOWLEDGED: u32 = 19;
    let (end, uffd) = End::program(4);
    let service = service();
    let handle = adopt(&service, &end, uffd, 0, 4);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let connector = Connector::new(Credentials::from(token()), Profile::Faults);
        let (link, channel) = connector.connect(service.faults_addr(), Duration::from_secs(5)).await.unwrap();
        let (mut sender, mut receiver) = channel.split();
        let version = u32::from(PROTOCOL_VERSION);
        let hello = Hello {
            oldest_version: version,
            newest_version: version,
            migration_id: ID.0.to_vec(),
            role: Role::Faults.into(),
            ..Hello::default()
        };
        sender.send_message(Hello::TYPE as u32, 0, hello.encode_to_vec().into()).await.unwrap();
        let mut next = async || receiver.receive().await.unwrap().unwrap().message_type();
        assert_eq!(next().await, Some(Welcome::TYPE as u32));
        drop(end);
        assert_eq!(next().await, Some(Drained::TYPE as u32));
        link.close(ACKNOWLEDGED, "drained");
        link.settle(Duration::from_secs(5)).await;
    });
    assert!(handle.wait().unwrap().acknowledged);
}
