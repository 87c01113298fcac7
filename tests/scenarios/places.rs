//! Destinations that differ: other clocks, taken pids, a namespace of its own, small packets, IPv6, a slow link.

use anyhow::{Result, ensure};
use godwit_tests::{Mode, Trip, TwoHosts};

/// Moves a victim about clocks to a destination whose clocks are off.
fn with_clocks(hosts: &TwoHosts, mode: Mode) -> Result<()> {
    for victim in ["clocks", "timers", "sleeps"] {
        Trip::of(victim, &[]).run_on(hosts, mode)?;
    }
    Ok(())
}

#[test]
fn clocks_ahead() -> Result<()> {
    with_clocks(&TwoHosts::builder().destination_clocks(100_000, 200_000).build()?, Mode::Hybrid)
}

#[test]
fn clocks_behind() -> Result<()> {
    with_clocks(&TwoHosts::builder().source_clocks(50_000, 70_000).build()?, Mode::PreCopy)
}

#[test]
fn clocks_of_a_time_namespace_that_are_equal() -> Result<()> {
    with_clocks(&TwoHosts::builder().destination_clocks(0, 0).build()?, Mode::PostCopy)
}

/// The pid that a process has in its own PID namespace, and how many namespaces there are above it.
fn own_pid(host_pid: u32) -> Result<(u32, usize)> {
    let status = std::fs::read_to_string(format!("/proc/{host_pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    let pids: Vec<u32> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    Ok((*pids.last().unwrap_or(&0), pids.len()))
}

fn in_a_namespace_of_its_own(hosts: &TwoHosts, arguments: &[&str]) -> Result<()> {
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut victim = hosts.source.victim("threads", &["16"])?;
    let (pid, depth) = own_pid(victim.host_pid())?;
    let migration = hosts.source.migrate(&server, victim.pid()).arguments(arguments).run()?;
    migration.expect_moved()?;
    victim.follow(&hosts.destination, &migration)?;
    let (pid_there, depth_there) = own_pid(victim.host_pid())?;
    ensure!(pid_there == pid, "it calls itself {pid_there} instead of {pid}");
    ensure!(depth_there == depth + 1, "it is in no PID namespace of its own: depth {depth_there}, was {depth}");
    victim.expect_beats(120)?;
    victim.finish().map(drop)
}

#[test]
fn a_new_pid_namespace_when_asked() -> Result<()> {
    in_a_namespace_of_its_own(&TwoHosts::new()?, &["--new-pidns"])
}

#[test]
fn a_new_pid_namespace_when_the_pid_is_taken() -> Result<()> {
    in_a_namespace_of_its_own(&TwoHosts::builder().shared_pids().build()?, &[])
}

#[test]
fn the_same_pids_when_they_are_free() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut victim = hosts.source.victim("threads", &["4"])?;
    let pid = victim.pid();
    let migration = hosts.source.migrate(&server, pid).run()?;
    migration.expect_moved()?;
    victim.follow(&hosts.destination, &migration)?;
    ensure!(victim.pid() == pid, "pid {} instead of {pid}", victim.pid());
    victim.expect_beats(20)?;
    victim.finish().map(drop)
}

#[test]
fn ordinary_packets() -> Result<()> {
    Trip::of("memory", &["4", "64", "20"]).run_on(&TwoHosts::builder().mtu(1500).build()?, Mode::Hybrid).map(drop)
}

#[test]
fn a_slow_link_with_a_fast_writer() -> Result<()> {
    let hosts = TwoHosts::builder().rate("400mbit").build()?;
    Trip::of("memory", &["4", "32", "-1"]).run_on(&hosts, Mode::Hybrid).map(drop)
}

#[test]
fn the_default_port_and_the_default_mode() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut victim = hosts.source.victim("memory", &["2", "8", "5"])?;
    let address = hosts.destination.address().to_owned();
    ensure!(server.address == format!("{address}:7477"), "{}", server.address);
    let migration = hosts.source.migrate_to(&address, victim.pid()).token(hosts.token.path()).run()?;
    migration.expect_moved()?;
    ensure!(migration.report()?.get("mode").is_some_and(|mode| mode == "hybrid"), "{:?}", migration.report());
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(10)?;
    victim.finish().map(drop)
}

#[test]
fn a_page_server_for_one_move() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let options = godwit_tests::PageServerOptions { arguments: vec!["--once".to_owned()], ..Default::default() };
    let mut server = hosts.destination.page_server_with(&hosts.token, &options)?;
    let mut victim = hosts.source.victim("memory", &["4", "32", "10"])?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect_moved()?;
    let status = server.process().wait(std::time::Duration::from_secs(10))?;
    ensure!(status.success(), "the page server ended with {status}: {}", server.log());
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(20)?;
    victim.finish().map(drop)
}
