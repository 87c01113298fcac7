//! Moves that are called off before anything is decided: by the user, by a clock, or because somebody has gone.

use super::{Scene, Still, signal};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Mode, TwoHosts, expect_untouched, is_alive, program, wait_until};
use nix::sys::signal::Signal;

/// A move that is not decided is called off by another command.
#[test]
fn a_move_is_cancelled() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("round"), Mode::Hybrid, &[])?;
    let id = scene.id()?;
    let mut command = scene.hosts.source.command(program("migrate")?);
    command.args(["cancel", &id]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let cancelling = scene.hosts.source.start_command(&mut command)?;
    // The signal waits in the agent, which stands still.
    let waits =
        |host_pid| std::fs::read_to_string(format!("/proc/{host_pid}/status")).is_ok_and(|status| has_sigint(&status));
    wait_until("the agent to be told", Duration::from_secs(10), || Ok(waits(scene.stopped)))?;
    scene.go_on()?;
    let cancelled = cancelling.finish(Duration::from_secs(40))?;
    ensure!(cancelled.status.success(), "{}{}", cancelled.stdout, cancelled.stderr);
    scene.finish()?.expect(1, &["cancelled"])?;
    scene.expect_untouched_and_move()
}

/// Whether SIGINT waits in a process, by its status. proc_pid_status(5)
fn has_sigint(status: &str) -> bool {
    let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
    pending.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set & 2 != 0)
}

/// A front that is killed by mistake leaves an agent that calls the move off.
#[test]
fn a_killed_front_calls_the_move_off() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("collect"), Mode::PreCopy, &[])?;
    let agent = scene.stopped;
    let front = scene.migration.as_mut().context("it runs")?.process();
    front.signal(Signal::SIGKILL)?;
    // N.B. it is its end that the agent hears of, and a busy machine takes its time with that.
    let pid = front.host_pid();
    wait_until("the front to end", Duration::from_secs(20), || Ok(!is_alive(pid)))?;
    signal(agent, Signal::SIGCONT)?;
    wait_until("the agent to end", Duration::from_secs(20), || Ok(!is_alive(agent)))?;
    let _ = scene.finish();
    scene.expect_untouched_and_move()
}

/// A freeze that is too long is called off, unless the user wants it.
#[test]
fn a_freeze_that_is_too_long_is_called_off() -> Result<()> {
    let hosts = TwoHosts::builder().rate("100mbit").build()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut victim = hosts.source.victim("memory", &["2", "64", "4"])?;
    victim.expect_beats(5)?;
    let before = victim.view()?;
    let limits = ["--downtime-target", "200", "--downtime-limit", "300"];
    let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::StopAndCopy).arguments(&limits).run()?;
    migration.expect(1, &["failed"])?;
    ensure!(migration.text().contains("downtime limit"), "{}", migration.text());
    expect_untouched(&victim, &before)?;
    let in_time = ["--timeout", "1"];
    let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::StopAndCopy).arguments(&in_time).run()?;
    migration.expect(1, &["failed"])?;
    let freeze = migration.number("/freeze_ms")?;
    ensure!(migration.text().contains("time limit") && freeze < 3000.0, "{}", migration.text());
    expect_untouched(&victim, &before)?;
    let forced = hosts.source.migrate(&server, victim.pid()).mode(Mode::StopAndCopy).arguments(&limits);
    let migration = forced.arguments(&["--on-timeout", "force"]).run()?;
    migration.expect_moved()?;
    victim.follow(&hosts.destination, &migration)?;
    victim.finish().map(drop)
}

/// A migration can be called off as soon as its id is told.
#[test]
fn it_is_called_off_by_the_name_that_was_told() -> Result<()> {
    let hosts = TwoHosts::builder().rate("20mbit").build()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let victim = hosts.source.victim("memory", &["2", "64", "4"])?;
    victim.expect_beats(5)?;
    let before = victim.view()?;
    let mut migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PreCopy).start()?;
    let named = migration.wait_for_event("its name", |event| event["event"] == "named")?;
    let id = named["migration_id"].as_str().context("no name")?;
    Scene::expect_on(&hosts.source, &["cancel", id], 0, &["is called off"])?;
    migration.finish()?.expect(1, &["cancelled"])?;
    expect_untouched(&victim, &before)?;
    victim.finish().map(drop)
}

/// A page server that is killed while the last pages are sent is not waited for.
#[test]
fn a_page_server_that_goes_in_the_freeze_is_noticed() -> Result<()> {
    let hosts = TwoHosts::builder().rate("100mbit").build()?;
    let mut server = hosts.destination.page_server(&hosts.token)?;
    let victim = hosts.source.victim("memory", &["2", "64", "4"])?;
    victim.expect_beats(5)?;
    let before = victim.view()?;
    let mut migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::StopAndCopy).start()?;
    let is_frozen = |event: &serde_json::Value| event["event"] == "frozen";
    migration.wait_for_event("the freeze", is_frozen)?;
    std::thread::sleep(Duration::from_millis(500));
    server.kill()?;
    let migration = migration.finish()?;
    migration.expect(1, &["failed"])?;
    let freeze = migration.number("/freeze_ms")?;
    ensure!(migration.text().contains("nobody listens") && freeze < 4000.0, "{}", migration.text());
    expect_untouched(&victim, &before)?;
    victim.finish().map(drop)
}
