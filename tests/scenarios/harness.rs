//! The harness itself, and every victim where it was born: what fails here says nothing about the engine.

use std::time::Duration;

use anyhow::{Result, ensure};
use godwit_tests::{ProcView, Status, TwoHosts, is_alive, wait_until};
use nix::sys::signal::Signal;

/// Every victim and arguments with which it runs for a moment and is content.
const VICTIMS: [(&str, &[&str]); 24] = [
    ("memory", &["4", "16", "20"]),
    ("registers", &[]),
    ("signals", &[]),
    ("timers", &[]),
    ("sleeps", &["500", "400"]),
    ("blocked", &[]),
    ("clocks", &[]),
    ("credentials", &[]),
    ("credentials", &["uid=1000", "seccomp=1"]),
    ("credentials", &["drop=1", "nnp=1"]),
    ("robust", &[]),
    ("threads", &["16"]),
    ("filemap", &[]),
    ("sharedmem", &[]),
    ("layout", &[]),
    ("churn", &[]),
    ("kernelwrites", &[]),
    ("sparse", &["16"]),
    ("forker", &["8"]),
    ("files", &[]),
    ("pipes", &[]),
    ("events", &[]),
    ("listeners", &[]),
    ("datagrams", &[]),
];

#[test]
fn every_victim_is_content_at_home() -> Result<()> {
    let hosts = TwoHosts::new()?;
    for (name, arguments) in VICTIMS {
        let victim = hosts.source.victim(name, arguments)?;
        victim.expect_beats(20)?;
        victim.go()?;
        victim.expect_beats(35)?;
        let status = victim.finish()?;
        ensure!(status.checks > 0, "{name} looked at nothing: {status:?}");
    }
    Ok(())
}

#[test]
fn a_view_of_a_running_victim_does_not_change() -> Result<()> {
    let hosts = TwoHosts::new()?;
    for name in
        ["memory", "registers", "signals", "timers", "credentials", "sharedmem", "files", "pipes", "listeners", "huge"]
    {
        let victim = hosts.source.victim(name, &[])?;
        let before = victim.view()?;
        victim.expect_beats(10)?;
        victim.view()?.expect_same_as(&before)?;
        victim.finish()?;
    }
    Ok(())
}

#[test]
fn hosts_reach_each_other_with_jumbo_frames() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let size = ["-c", "1", "-W", "2", "-M", "do", "-s", "8900"];
    if hosts.source.run("which", &["ping"]).is_ok() {
        hosts.source.run("ping", &[&size[..], &[hosts.destination.address()]].concat())?;
    }
    let link = hosts.source.run("ip", &["-o", "link", "show"])?.stdout;
    ensure!(link.contains("mtu 9000"), "{link}");
    hosts.cut_link()?;
    hosts.mend_link()?;
    hosts.limit_rate("400mbit")?;
    Ok(())
}

#[test]
fn pids_are_the_hosts_own() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let victim = hosts.source.victim("threads", &["2"])?;
    ensure!(victim.pid() > 10_000, "pid {}", victim.pid());
    ensure!(hosts.source.host_pid(victim.pid())? == victim.host_pid(), "pids do not translate");
    ensure!(hosts.source.is_home_of(victim.host_pid()), "the victim is not on its host");
    ensure!(!hosts.destination.is_home_of(victim.host_pid()), "the victim is on both hosts");
    ensure!(hosts.destination.host_pid(victim.pid()).is_err(), "its pid is taken on the other host");
    victim.finish()?;
    Ok(())
}

#[test]
fn a_destination_can_share_the_pids_of_the_source() -> Result<()> {
    let hosts = TwoHosts::builder().shared_pids().build()?;
    let victim = hosts.source.victim("threads", &["2"])?;
    ensure!(hosts.destination.host_pid(victim.pid())? == victim.host_pid(), "the pid is not seen by the destination");
    ensure!(!hosts.destination.is_home_of(victim.host_pid()), "the network is shared, too");
    victim.finish()?;
    Ok(())
}

#[test]
fn a_destination_can_have_other_clocks() -> Result<()> {
    let hosts = TwoHosts::builder().destination_clocks(100_000, 200_000).build()?;
    let uptime = |stdout: String| stdout.split('.').next().and_then(|seconds| seconds.parse::<i64>().ok()).unwrap_or(0);
    let source = uptime(hosts.source.run("cat", &["/proc/uptime"])?.stdout);
    let destination = uptime(hosts.destination.run("cat", &["/proc/uptime"])?.stdout);
    ensure!((destination - source - 200_000).abs() < 5, "uptimes {source} and {destination}");
    Ok(())
}

#[test]
fn a_destination_can_have_other_files() -> Result<()> {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("file"), "source")?;
    let hosts = TwoHosts::builder().private_at_destination(directory.path()).build()?;
    let path = directory.path().join("file").display().to_string();
    ensure!(hosts.source.run("cat", &[&path])?.stdout == "source");
    ensure!(hosts.destination.run("cat", &[&path]).is_err(), "the file is there, too");
    Ok(())
}

#[test]
fn everything_dies_with_the_fixture() -> Result<()> {
    let hosts = TwoHosts::builder().destination_clocks(0, 0).build()?;
    let victims =
        [hosts.source.victim("memory", &["2", "4", "1"])?, hosts.destination.victim("memory", &["2", "4", "1"])?];
    let mut pids: Vec<u32> = victims.iter().map(godwit_tests::Victim::host_pid).collect();
    pids.extend([hosts.source.init_pid(), hosts.destination.init_pid()]);
    let directory = hosts.directory().to_owned();
    drop(hosts);
    for pid in pids {
        wait_until("the end of everything", Duration::from_secs(5), || Ok(!is_alive(pid)))?;
    }
    ensure!(!directory.exists(), "logs are left");
    Ok(())
}

/// A test that is killed leaves nothing either: the thread that made the hosts is what they live by.
#[test]
fn everything_dies_with_the_thread_that_made_it() -> Result<()> {
    let hosts = std::thread::spawn(TwoHosts::new).join().expect("no panic")?;
    for host in [&hosts.source, &hosts.destination] {
        wait_until("the end of the host", Duration::from_secs(5), || Ok(!is_alive(host.init_pid())))?;
    }
    Ok(())
}

#[test]
fn a_victim_that_finds_an_error_fails() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let victim = hosts.source.victim("files", &[])?;
    victim.expect_beats(5)?;
    std::fs::write(victim.directory().join("plain"), "something else")?;
    ensure!(victim.expect_beats(50).is_err(), "a victim did not see that its file changed");
    ensure!(victim.finish().is_err(), "a victim passes in spite of errors");
    Ok(())
}

/// Zeros over one page of a victim's memory, as a transfer that loses a page would leave them.
#[test]
fn a_lost_page_is_seen() -> Result<()> {
    let hosts = TwoHosts::new()?;
    // The third number: a page of the mapping that the victim cares for.
    for (name, arguments, page) in
        [("memory", &["2", "32", "0"][..], 70), ("kernelwrites", &[], 70), ("sparse", &["1"], 0)]
    {
        let victim = hosts.source.victim(name, arguments)?;
        victim.expect_beats(5)?;
        let address = largest_private_mapping(victim.host_pid())? + page * 4096;
        let memory = std::fs::File::options().write(true).open(format!("/proc/{}/mem", victim.host_pid()))?;
        std::os::unix::fs::FileExt::write_all_at(&memory, &[0; 4096], address)?;
        ensure!(victim.expect_beats(200).is_err() || victim.finish().is_err(), "{name} did not see a lost page");
    }
    Ok(())
}

/// The start of the largest mapping without a file, where a victim keeps what it checks.
fn largest_private_mapping(pid: u32) -> Result<u64> {
    let mut largest = (0, 0);
    for line in std::fs::read_to_string(format!("/proc/{pid}/maps"))?
        .lines()
        .filter(|line| line.contains(" rw-p 00000000 00:00 0"))
    {
        let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) else { continue };
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        largest = largest.max((end - start, start));
    }
    Ok(largest.1)
}

#[test]
fn a_view_tells_a_descriptor_and_a_mask_apart() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let one = hosts.source.victim("memory", &["2", "4", "1"])?;
    let two = hosts.source.victim("pipes", &[])?;
    let difference = ProcView::read(one.host_pid())?.expect_same_as(&two.view()?);
    let text = format!("{:#}", difference.err().unwrap_or_else(|| anyhow::anyhow!("equal")));
    ensure!(text.contains("fd 5") && text.contains("maps"), "{text}");
    one.signal(Signal::SIGKILL)?;
    two.finish()?;
    Ok(())
}

#[test]
fn a_status_line_is_parsed_in_any_order() {
    let status = Status::parse("beats=3 errors=1 checks=22 more largest_gap_us=14000");
    assert_eq!(status, Some(Status { beats: 3, checks: 22, errors: 1, largest_gap_us: 14_000 }));
    assert_eq!(Status::parse("beats=3 errors=1"), None);
    assert_eq!(Status::parse("beats=x checks=1 errors=0 largest_gap_us=1"), None);
}
