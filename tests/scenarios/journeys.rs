//! Longer ways: back and forth, many times.

use anyhow::{Context, Result, ensure};
use godwit_tests::{Mode, TwoHosts};

/// How many moves: fifty show it, six will do while something else is changed.
fn moves() -> usize {
    std::env::var("GODWIT_MOVES").ok().and_then(|number| number.parse().ok()).unwrap_or(6)
}

fn back_and_forth(victim: &str, arguments: &[&str], modes: &[Mode]) -> Result<()> {
    let hosts = TwoHosts::new()?;
    let servers = [hosts.destination.page_server(&hosts.token)?, hosts.source.page_server(&hosts.token)?];
    let mut victim = hosts.source.victim(victim, arguments)?;
    let pid = victim.pid();
    for number in 0..moves() {
        let (from, to) =
            if number % 2 == 0 { (&hosts.source, &hosts.destination) } else { (&hosts.destination, &hosts.source) };
        let server = &servers[number % 2];
        let mode = modes[number % modes.len()];
        let migration = from.migrate(server, victim.pid()).mode(mode).run()?;
        let story = || format!("move {number} to {}, {}; page server: {}", to.name(), mode.word(), server.log());
        migration.expect_moved().with_context(story)?;
        victim.follow(to, &migration).with_context(story)?;
        ensure!(victim.pid() == pid, "{}: pid {} instead of {pid}", story(), victim.pid());
        victim.expect_beats(5).with_context(story)?;
    }
    victim.finish().map(drop)
}

#[test]
fn hammered_memory_back_and_forth() -> Result<()> {
    back_and_forth("memory", &["8", "32", "20"], &[Mode::Hybrid])
}

#[test]
fn churning_mappings_back_and_forth_in_all_modes() -> Result<()> {
    back_and_forth("churn", &[], &Mode::ALL)
}

#[test]
fn signals_back_and_forth() -> Result<()> {
    back_and_forth("signals", &[], &[Mode::PreCopy, Mode::Hybrid])
}

#[test]
fn descriptors_back_and_forth() -> Result<()> {
    back_and_forth("pipes", &[], &[Mode::Hybrid, Mode::StopAndCopy])
}

#[test]
fn what_is_left_of_connections_back_and_forth() -> Result<()> {
    back_and_forth("listeners", &[], &[Mode::Hybrid, Mode::PreCopy])
}

/// The largest process that this is shown on.
#[test]
#[ignore = "takes 9 GiB of memory and a minute: cargo nextest run --run-ignored all four_gibibytes"]
fn four_gibibytes() -> Result<()> {
    for mode in [Mode::Hybrid, Mode::PostCopy] {
        godwit_tests::Trip::of("memory", &["8", "4096", "20"]).run(mode)?;
    }
    Ok(())
}
