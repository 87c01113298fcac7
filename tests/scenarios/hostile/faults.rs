//! Callers that mean no good, towards the ports for missing pages and towards the socket of the daemon that serves them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use godwit_carry::{Frame, Profile};
use godwit_proto::wire::{self, MessageType, Role};
use godwit_stream::FrameHeader;
use godwit_tests::{Footprint, Mode, PageServerOptions, Peer, TwoHosts, wait_until};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::Stage;

#[test]
fn callers_for_pages_that_are_nobodys() -> Result<()> {
    let stage = Stage::set(&[])?;
    let (address, token) = (stage.address()?, stage.token());
    stage.hosts.source.converse(Duration::from_secs(60), move || async move {
        for (port, role, profile) in [(1, Role::Faults, Profile::Faults), (2, Role::Drain, Profile::Bulk)] {
            let mut there = address;
            there.set_port(address.port() + port);
            let hello = |version, id: usize, role: Role| wire::Hello {
                oldest_version: version,
                newest_version: version,
                migration_id: vec![7; id],
                role: role.into(),
                ..wire::Hello::default()
            };
            let greetings = [
                ("an unknown migration", hello(1, 16, role)),
                ("a short id", hello(1, 3, role)),
                ("another role", hello(1, 16, Role::Control)),
                ("another version", hello(9, 16, role)),
            ];
            for (what, hello) in greetings {
                let mut peer = Peer::call_for(there, &token, profile).await?;
                peer.say(&hello).await?;
                let heard = peer.farewell().await.context(what)?;
                ensure!(heard.failure.is_some(), "{what} on port {port}: {heard:?}");
            }
            let pages = Frame { header: FrameHeader::zero_pages(0, 0x1000, 1, 0), payload: Bytes::new() };
            let drained = godwit_tests::message_frame(MessageType::DrainedAck as u32, Vec::new());
            let nonsense = godwit_tests::message_frame(MessageType::Hello as u32, vec![0xff; 99]);
            for frame in [pages, drained, nonsense] {
                let mut peer = Peer::call_for(there, &token, profile).await?;
                peer.say_frame(&frame).await?;
                let heard = peer.farewell().await?;
                ensure!(heard.replies.iter().all(|reply| *reply == MessageType::Failure), "port {port}: {heard:?}");
            }
        }
        Ok(())
    })?;
    stage.expect_unharmed()
}

/// What a local caller says, and the descriptors that come with it.
fn call(path: &std::path::Path, words: &[u8], fds: &[BorrowedFd<'_>]) -> Result<OwnedFd> {
    let caller = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&caller), &UnixAddr::new(path)?)?;
    // N.B. it may have hung up already.
    let _ = godwit_kernel::rights::send(caller.as_fd(), words, fds);
    Ok(caller)
}

#[test]
fn callers_at_the_daemons_socket() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let socket = hosts.directory().join("lazy.sock");
    let mut daemon = hosts.destination.lazy_pages(&hosts.token, &socket)?;
    let program = daemon.process().host_pid();
    let before = Footprint::of(&hosts.destination, program)?;

    // Events of a pipe: children with descriptors that are the daemon's own.
    let (events, writer) = nix::unistd::pipe()?;
    for fd in 0..16u64 {
        let event: Vec<u8> = [0x13, fd, 0, 0].iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        nix::unistd::write(&writer, &event)?;
    }
    let file = memfd_create(c"ledger", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&file, 1 << 20)?;
    let pidfd = godwit_kernel::process::pidfd_open(std::process::id() as i32)?;
    let (events, file, pidfd) = (events.as_fd(), file.as_fd(), pidfd.as_fd());
    let last = br#"{"Adopt":{"last":true}}"#;
    let cases: [(&[u8], Vec<BorrowedFd<'_>>); 9] = [
        (b"{}", vec![]),
        (b"\xff\xff\xff", vec![]),
        (br#"{"Adopt":{"last":"perhaps"}}"#, vec![]),
        (br#""Adopted""#, vec![file]),
        (br#"{"Finished":{"report":{}}}"#, vec![]),
        (last, vec![]),
        (last, vec![pidfd, events, file]),
        (last, vec![file, file, file]),
        (last, vec![pidfd, events]),
    ];
    let mut callers = Vec::new();
    for (words, fds) in &cases {
        callers.push(call(&socket, words, fds)?);
    }
    // Those who say nothing, and those who leave at once.
    for _ in 0..40 {
        callers.push(call(&socket, b"", &[])?);
        drop(call(&socket, br#"{"Adopt":{"last":false}}"#, &[pidfd])?);
    }
    wait_until("the daemon to hang up", Duration::from_secs(20), || {
        let now = Footprint::of(&hosts.destination, program)?;
        Ok(now.descriptors == before.descriptors)
    })
    .with_context(|| daemon.log())?;
    drop(callers);
    ensure!(!daemon.log().contains("panicked"), "{}", daemon.log());
    before.expect_again(&hosts.destination, program)?;

    let options = PageServerOptions { lazy_socket: Some(socket), ..PageServerOptions::default() };
    let server = hosts.destination.page_server_with(&hosts.token, &options)?;
    let mut victim = hosts.source.victim("memory", &["2", "8", "4"])?;
    victim.expect_beats(3)?;
    let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PostCopy).run()?;
    migration.expect_moved().with_context(|| daemon.log())?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(5)?;
    victim.finish().map(drop)
}
