//! Failures before the commit, at every phase and of every kind: the source runs on as before, nothing is left at the destination, and a
//! second attempt succeeds.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Mode, PageServer, RunningMigration, TwoHosts, expect_untouched, wait_until};

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
enum Mishap {
    ServerKilled,
    LinkCut,
    Interrupt,
    AgentTerminated,
}

/// When it goes wrong.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// When this phase begins.
    Phase(&'static str),
    /// While the process is frozen and its memory travels: long, over a slow link.
    Freeze,
}

impl Moment {
    /// Long rounds need hybrid mode, a long freeze needs everything in it.
    fn mode(self) -> Mode {
        match self {
            Self::Phase(_) => Mode::Hybrid,
            Self::Freeze => Mode::StopAndCopy,
        }
    }

    fn wait(self, migration: &mut RunningMigration) -> Result<()> {
        match self {
            Self::Phase(name) => migration.wait_for_phase(name).map(drop),
            Self::Freeze => {
                let frozen = |event: &serde_json::Value| event.get("event").is_some_and(|name| name == "frozen");
                migration.wait_for_event("the freeze", frozen)?;
                std::thread::sleep(Duration::from_millis(250));
                Ok(())
            }
        }
    }
}

impl Mishap {
    fn happen(self, hosts: &TwoHosts, server: &mut PageServer, migration: &RunningMigration) -> Result<()> {
        match self {
            Self::ServerKilled => server.kill(),
            Self::LinkCut => hosts.cut_link(),
            Self::Interrupt => migration.interrupt(),
            Self::AgentTerminated => migration.process().signal(nix::sys::signal::Signal::SIGTERM),
        }
    }

    /// Outcomes that tell of it truly.
    fn outcomes(self) -> &'static [&'static str] {
        match self {
            Self::ServerKilled | Self::LinkCut => &["failed"],
            Self::Interrupt | Self::AgentTerminated => &["cancelled"],
        }
    }
}

/// Lets one mishap happen at one moment.
fn undo(mishap: Mishap, moment: Moment) -> Result<()> {
    undo_of("memory", &["4", "64", "4"], mishap, moment)
}

fn undo_of(victim: &str, arguments: &[&str], mishap: Mishap, moment: Moment) -> Result<()> {
    // 64 MiB take more than 2 s over this link: there is time to hit the moment.
    let hosts = TwoHosts::builder().rate("200mbit").build()?;
    let mut server = hosts.destination.page_server(&hosts.token)?;
    let there = hosts.destination.processes()?.len();
    let mut victim = hosts.source.victim(victim, arguments)?;
    victim.expect_beats(10)?;
    let before = victim.view()?;

    let mut migration = hosts.source.migrate(&server, victim.pid()).mode(moment.mode()).start()?;
    moment.wait(&mut migration)?;
    mishap.happen(&hosts, &mut server, &migration)?;
    let migration = migration.finish()?;
    let story = || format!("{mishap:?} at {moment:?}: {}; page server: {}", migration.text(), server.log());
    migration.expect(1, mishap.outcomes()).with_context(story)?;
    expect_untouched(&victim, &before).with_context(story)?;

    if matches!(mishap, Mishap::LinkCut) {
        hosts.mend_link()?;
    }
    let mut server =
        if matches!(mishap, Mishap::ServerKilled) { hosts.destination.page_server(&hosts.token)? } else { server };
    wait_until("the stub to be gone", Duration::from_secs(15), || Ok(hosts.destination.processes()?.len() == there))
        .with_context(|| format!("at the destination: {:?}", hosts.destination.processes()))?;

    hosts.limit_rate("4gbit")?;
    ensure!(server.process().ended()?.is_none(), "the page server has ended: {}", server.log());
    let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::Hybrid).run()?;
    migration.expect_moved().context("the second attempt")?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(10)?;
    victim.finish().map(drop)
}

macro_rules! mishaps {
    ($($test:ident: $mishap:ident at $moment:expr;)*) => {$(
        #[test]
        fn $test() -> Result<()> {
            undo(Mishap::$mishap, $moment)
        }
    )*};
}

mishaps! {
    server_killed_in_negotiate: ServerKilled at Moment::Phase("negotiate");
    server_killed_in_probe: ServerKilled at Moment::Phase("probe");
    server_killed_in_prepare: ServerKilled at Moment::Phase("prepare");
    server_killed_in_round: ServerKilled at Moment::Phase("round");
    server_killed_in_freeze: ServerKilled at Moment::Freeze;
    link_cut_in_prepare: LinkCut at Moment::Phase("prepare");
    link_cut_in_round: LinkCut at Moment::Phase("round");
    link_cut_in_freeze: LinkCut at Moment::Freeze;
    interrupt_in_negotiate: Interrupt at Moment::Phase("negotiate");
    interrupt_in_probe: Interrupt at Moment::Phase("probe");
    interrupt_in_prepare: Interrupt at Moment::Phase("prepare");
    interrupt_in_round: Interrupt at Moment::Phase("round");
    interrupt_in_freeze: Interrupt at Moment::Freeze;
    termination_in_round: AgentTerminated at Moment::Phase("round");
}

/// What the freeze takes from a process for good at the destination is made again here.
#[test]
fn contexts_of_asynchronous_input_and_output_come_back() -> Result<()> {
    for mishap in [Mishap::Interrupt, Mishap::ServerKilled] {
        undo_of("aio", &[], mishap, Moment::Freeze)?;
    }
    Ok(())
}

/// The phases after the last round are too short to be hit one by one: kills at many distances from the freeze hit them all. Each
/// time there is one copy at the end, and it is the one that the exit code says.
#[test]
fn server_killed_around_the_commit() -> Result<()> {
    let hosts = TwoHosts::new()?;
    for distance_us in (0..6).map(|step| step * 1200) {
        let mut server = hosts.destination.page_server(&hosts.token)?;
        let mut victim = hosts.source.victim("memory", &["4", "16", "4"])?;
        victim.expect_beats(5)?;
        let before = victim.view()?;
        let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PreCopy);
        let mut migration = migration.arguments(&["--reconnect-for", "1"]).start()?;
        let frozen = |event: &serde_json::Value| event.get("event").is_some_and(|name| name == "frozen");
        migration.wait_for_event("the freeze", frozen)?;
        std::thread::sleep(Duration::from_micros(distance_us));
        server.kill()?;
        let migration = migration.finish()?;
        let story =
            || format!("{distance_us} us after the freeze began: {}; page server: {}", migration.text(), server.log());
        match migration.code() {
            Some(0) => {
                victim.follow(&hosts.destination, &migration).with_context(story)?;
                victim.expect_beats(10).with_context(story)?;
                victim.finish().with_context(story)?;
            }
            Some(1) => {
                expect_untouched(&victim, &before).with_context(story)?;
                victim.finish().with_context(story)?;
            }
            // Unknown: the source is kept, frozen.
            Some(3) => ensure!(godwit_tests::is_alive(victim.host_pid()), "the source is gone: {}", story()),
            _ => anyhow::bail!("exit {}: {}", migration.status, story()),
        }
    }
    Ok(())
}
