//! A page server that means no good, towards the source: whatever it answers, the process runs on as before.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_carry::Frame;
use godwit_proto::Message;
use godwit_proto::wire::{self, MessageType};
use godwit_tests::{
    GoBetween, Instead, Mode, PageServer, Said, Speaker, TwoHosts, Victim, expect_untouched, is_alive, message_frame,
};

/// What comes instead of an answer.
type Lie = (&'static str, fn(&Said) -> Instead);

fn these(frames: Vec<Frame>) -> Instead {
    Instead::These(frames)
}

const LIES: [Lie; 6] = [
    ("nonsense of the same type", |said| these(vec![message_frame(said.frame.header.space, vec![0xff; 200])])),
    ("another answer", |_| these(vec![message_frame(MessageType::Running as u32, vec![8, 1])])),
    ("a message of no type", |_| these(vec![message_frame(9999, vec![1, 2, 3])])),
    ("pages", |_| {
        let header = godwit_stream::FrameHeader::zero_pages(0, 4096, 1, 0);
        these(vec![Frame { header, payload: Default::default() }])
    }),
    ("a failure at great length", |_| {
        let text = "\u{1b}[2J\u{7}no\r\n".repeat(200_000);
        let failure = wire::Failure { text: text.clone(), phase: text.clone(), remedy: text, ..Default::default() };
        these(vec![message_frame(MessageType::Failure as u32, failure.encode_to_vec())])
    }),
    ("the end", |_| Instead::End),
];

/// The answers before the decision.
const ANSWERS: [MessageType; 6] = [
    MessageType::Welcome,
    MessageType::ClockPong,
    MessageType::ProbeReply,
    MessageType::Prepared,
    MessageType::RoundAck,
    MessageType::Ready,
];

struct Move<'a> {
    hosts: &'a TwoHosts,
    server: &'a PageServer,
    victim: &'a Victim,
}

impl Move<'_> {
    /// Tries to move the process past somebody who changes words; it must not go, and runs on.
    fn expect_failure(&self, mode: Mode, changes: impl Fn(&Said) -> Instead + Send + Sync + 'static) -> Result<()> {
        let before = self.victim.view()?;
        let (hosts, token) = (self.hosts, self.hosts.token.path());
        let between = GoBetween::stand(&hosts.source, &self.server.address, token, changes)?;
        let migrate = hosts.source.migrate_to(&between.address, self.victim.pid()).token(token).mode(mode);
        // N.B. a copy that is complete waits so long for the decision.
        let migration = migrate.arguments(&["--reconnect-for", "2"]).limit(Duration::from_secs(45)).run()?;
        let story = || format!("{}; page server: {}", migration.text(), self.server.log());
        ensure!(migration.code() == Some(1) || migration.code() == Some(2), "exit {}: {}", migration.status, story());
        ensure!(["failed", "refused"].contains(&migration.outcome()?), "{}", story());
        ensure!(!migration.text().contains("panicked"), "{}", story());
        ensure!(migration.text().len() < 200_000, "{} bytes were said", migration.text().len());
        expect_untouched(self.victim, &before).with_context(story)
    }
}

fn of_destination(said: &Said, kind: MessageType) -> bool {
    said.by == Speaker::Destination && said.port == 0 && said.kind() == Some(kind)
}

#[test]
fn lies_instead_of_answers() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let there = hosts.destination.processes()?.len();
    let mut victim = hosts.source.victim("memory", &["2", "2", "4"])?;
    victim.expect_beats(3)?;
    for answer in ANSWERS {
        for (what, lie) in LIES {
            let change = move |said: &Said| if of_destination(said, answer) { lie(said) } else { Instead::Same };
            let trying = Move { hosts: &hosts, server: &server, victim: &victim };
            trying.expect_failure(Mode::PreCopy, change).with_context(|| format!("{what} instead of {answer:?}"))?;
        }
    }
    godwit_tests::wait_until("the stubs to be gone", Duration::from_secs(15), || {
        Ok(hosts.destination.processes()?.len() == there)
    })?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect_moved().context("the truth at last")?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(5)?;
    victim.finish().map(drop)
}

/// Answers of the right kind with values that cannot be.
#[test]
fn answers_that_cannot_be() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let victim = hosts.source.victim("memory", &["2", "2", "4"])?;
    victim.expect_beats(3)?;
    let trying = Move { hosts: &hosts, server: &server, victim: &victim };
    for time in [i64::MIN, i64::MAX] {
        let pong = wire::ClockPong { sent_ns: time, monotonic_ns: time.wrapping_neg(), boottime_ns: i64::MIN };
        let frame = message_frame(MessageType::ClockPong as u32, pong.encode_to_vec());
        let change = move |said: &Said| {
            if of_destination(said, MessageType::ClockPong) { these(vec![frame.clone()]) } else { Instead::Same }
        };
        trying.expect_failure(Mode::PreCopy, change).with_context(|| format!("clocks at {time}"))?;
    }
    for (faults, drain) in [(0, 0), (u32::MAX, 70_000), (9, 9)] {
        let change = move |said: &Said| {
            if !of_destination(said, MessageType::Welcome) {
                return Instead::Same;
            }
            let mut welcome: wire::Welcome = godwit_proto::decode(&said.frame.payload).unwrap_or_default();
            (welcome.fault_port, welcome.drain_port) = (faults, drain);
            these(vec![message_frame(MessageType::Welcome as u32, welcome.encode_to_vec())])
        };
        let ports = format!("ports {faults} and {drain}");
        trying.expect_failure(Mode::PostCopy, change).context(ports)?;
    }
    // Far more than anybody has asked for.
    let begun = AtomicUsize::new(0);
    let flood = move |said: &Said| {
        if !of_destination(said, MessageType::Prepared) || begun.fetch_add(1, Ordering::Relaxed) > 0 {
            return Instead::Same;
        }
        let chatter = message_frame(MessageType::ClockPong as u32, vec![0; 1 << 20]);
        these(vec![chatter; 96])
    };
    trying.expect_failure(Mode::PreCopy, flood).context("a flood of answers")?;
    victim.finish().map(drop)
}

/// Whoever lies in answer to the decision has the process, or not: the source asks again, and keeps its copy stopped until it knows.
#[test]
fn a_lie_about_the_decision() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut victim = hosts.source.victim("memory", &["2", "2", "4"])?;
    victim.expect_beats(3)?;
    let lie = |said: &Said| {
        let nonsense = message_frame(MessageType::Running as u32, vec![0xff; 9]);
        if of_destination(said, MessageType::Running) { these(vec![nonsense]) } else { Instead::Same }
    };
    let between = GoBetween::stand(&hosts.source, &server.address, hosts.token.path(), lie)?;
    let migrate = hosts.source.migrate_to(&between.address, victim.pid()).token(hosts.token.path());
    let migration = migrate.mode(Mode::PreCopy).limit(Duration::from_secs(100)).run()?;
    if migration.code() == Some(0) {
        victim.follow(&hosts.destination, &migration)?;
        victim.expect_beats(5)?;
        return victim.finish().map(drop);
    }
    migration.expect(3, &["unknown"])?;
    ensure!(is_alive(victim.host_pid()), "the source's copy is gone");
    let state = std::fs::read_to_string(format!("/proc/{}/status", victim.host_pid()))?;
    ensure!(state.lines().any(|line| line.starts_with("State:\tT")), "it is not stopped: {state}");
    Ok(())
}

/// A fault service that asks for what no process has is refused each time, and the rest goes on.
#[test]
fn requests_for_pages_that_cannot_be() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut victim = hosts.source.victim("memory", &["2", "16", "4"])?;
    victim.expect_beats(3)?;
    let asked = AtomicUsize::new(0);
    let change = move |said: &Said| {
        if said.by != Speaker::Destination || said.port == 0 || said.kind() != Some(MessageType::PageRequest) {
            return Instead::Same;
        }
        let request = |space, address, pages| {
            let request = wire::PageRequest { id: u64::MAX, space, address, pages };
            message_frame(MessageType::PageRequest as u32, request.encode_to_vec())
        };
        let lie = match asked.fetch_add(1, Ordering::Relaxed) {
            1 => request(0, 0, 0),
            3 => request(0, u64::MAX - 4095, 512),
            5 => request(0, 4096, u32::MAX),
            7 => request(7, 17, 1),
            9 => request(0, 0xffff_8000_0000_0000, 1),
            11 => message_frame(MessageType::PageRequest as u32, vec![0xff; 33]),
            13 => message_frame(MessageType::Commit as u32, Vec::new()),
            _ => return Instead::Same,
        };
        these(vec![lie, said.frame.clone()])
    };
    let between = GoBetween::stand(&hosts.source, &server.address, hosts.token.path(), change)?;
    let migrate = hosts.source.migrate_to(&between.address, victim.pid()).token(hosts.token.path());
    let migration = migrate.mode(Mode::PostCopy).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(10)?;
    victim.finish().map(drop)
}
