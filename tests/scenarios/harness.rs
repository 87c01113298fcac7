//! The harness itself, and every victim where it was born: what fails here says nothing about the engine.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_tests::{Path, ProcView, Status, TwoHosts, is_alive, wait_until};
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

/// One heartbeat of another copy is enough.
#[test]
fn another_copy_is_seen() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let victim = hosts.source.victim("memory", &["1", "1"])?;
    victim.expect_beats(5)?;
    let path = victim.directory().join("status");
    let earlier = std::fs::read_to_string(&path)?;
    victim.expect_beats(5)?;
    std::fs::write(path, earlier)?;
    ensure!(victim.expect_beats(50).is_err(), "a victim did not see that another copy of it wrote");
    ensure!(victim.finish().is_err(), "a victim passes in spite of another copy");
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

/// What two hosts make of datagrams over a path: how many of `count` arrive, and how many are overtaken.
fn datagrams(path: Path, count: u32) -> Result<(TwoHosts, usize, usize)> {
    let hosts = TwoHosts::builder().with_distant_clients(path).build()?;
    let receiver = hosts.source.udp("10.77.0.1:6000")?;
    receiver.set_read_timeout(Some(Duration::from_secs(1)))?;
    let sender = hosts.clients()?.udp("10.77.0.3:0")?;
    sender.connect("10.77.0.1:6000")?;
    // The first one waits until the neighbour has been found, and this one is no part of the count.
    let mut bytes = [0; 100];
    wait_until("a first datagram", Duration::from_secs(10), || {
        sender.send(&u32::MAX.to_ne_bytes())?;
        Ok(receiver.recv(&mut bytes).is_ok())
    })?;
    let receiving = std::thread::spawn(move || {
        let mut numbers = Vec::new();
        while let Ok(length) = receiver.recv(&mut bytes) {
            if let Some(number) = bytes[..length].first_chunk().map(|word| u32::from_ne_bytes(*word)) {
                numbers.push(number);
            }
        }
        numbers
    });
    for number in 0..count {
        let mut datagram = [7; 100];
        datagram[..4].copy_from_slice(&number.to_ne_bytes());
        sender.send(&datagram)?;
        if number % 8 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let mut numbers = receiving.join().expect("no panic");
    numbers.retain(|&number| number < count);
    let overtaken = numbers.windows(2).filter(|pair| pair[0] > pair[1]).count();
    Ok((hosts, numbers.len(), overtaken))
}

#[test]
fn a_path_loses_and_disorders_datagrams() -> Result<()> {
    const COUNT: u32 = 2000;
    let path = Path { lost_permille: 100, late_permille: 50, delay: Duration::from_millis(4), ..Path::default() };
    let (hosts, arrived, overtaken) = datagrams(path, COUNT)?;
    let there = hosts.relay.as_ref().context("a relay")?.there();
    ensure!((1600..2000).contains(&arrived), "{arrived} of {COUNT} arrived");
    ensure!(overtaken > 10, "only {overtaken} of {COUNT} were overtaken");
    ensure!((100..400).contains(&there.lost()) && there.late() > 50, "{there:?}");
    // A path that only takes time keeps all of them, and their order.
    let path = Path { delay: Duration::from_millis(4), ..Path::default() };
    let (hosts, arrived, overtaken) = datagrams(path, COUNT)?;
    let there = hosts.relay.as_ref().context("a relay")?.there();
    // A receiver that is not served in time drops some itself.
    ensure!(arrived > 1900 && overtaken == 0, "{arrived} of {COUNT} arrived, {overtaken} were overtaken");
    ensure!(there.lost() == 0 && there.carried() >= COUNT.into(), "{there:?}");
    Ok(())
}

#[test]
fn a_path_takes_time_and_limits_the_rate() -> Result<()> {
    const DELAY: Duration = Duration::from_millis(40);
    const BYTES: usize = 500_000;
    let path = Path { delay: DELAY, bytes_per_second: Some(500_000), ..Path::default() };
    let hosts = TwoHosts::builder().with_distant_clients(path).build()?;
    let listener = hosts.source.listen("10.77.0.1:6001")?;
    let serving = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut byte = [0];
        for _ in 0..5 {
            stream.read_exact(&mut byte)?;
            stream.write_all(&byte)?;
        }
        Ok(stream.write_all(&vec![9; BYTES])?)
    });
    let mut stream = hosts.clients()?.connect_to("10.77.0.1:6001".parse()?)?;
    for _ in 0..5 {
        let begun = Instant::now();
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
        ensure!(begun.elapsed() >= 2 * DELAY, "there and back in {:?}", begun.elapsed());
    }
    let begun = Instant::now();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    ensure!(bytes.len() == BYTES && bytes.iter().all(|&byte| byte == 9), "{} bytes", bytes.len());
    ensure!(begun.elapsed() >= Duration::from_millis(900), "{BYTES} bytes in {:?}", begun.elapsed());
    serving.join().expect("no panic")
}

/// What a stream sends at once is larger than any packet; on a path it is packets all the same.
#[test]
fn a_path_carries_streams_as_packets() -> Result<()> {
    const BYTES: usize = 8 << 20;
    let path = Path { delay: Duration::from_millis(1), ..Path::default() };
    let hosts = TwoHosts::builder().mtu(1500).with_distant_clients(path).build()?;
    let listener = hosts.source.listen("10.77.0.1:6001")?;
    let serving = std::thread::spawn(move || -> Result<usize> {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(&vec![5; BYTES])?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        Ok(bytes.iter().filter(|&&byte| byte == 6).count())
    });
    let mut stream = hosts.clients()?.connect_to("10.77.0.1:6001".parse()?)?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    ensure!(bytes.len() == BYTES && bytes.iter().all(|&byte| byte == 5), "{} bytes came", bytes.len());
    stream.write_all(&vec![6; BYTES])?;
    stream.shutdown(std::net::Shutdown::Write)?;
    ensure!(serving.join().expect("no panic")? == BYTES, "not all bytes came back");
    let relay = hosts.relay.as_ref().context("a relay")?;
    for traffic in [relay.there(), relay.back()] {
        ensure!(traffic.largest() <= 1514 && traffic.lost() == 0, "{traffic:?}");
        ensure!(traffic.carried() as usize > BYTES / 1500, "{traffic:?}");
    }
    Ok(())
}
