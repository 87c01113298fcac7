//! The drain: the process runs at the destination while its pages still arrive.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Mode, PageServerOptions, RunningMigration, TwoHosts, program, wait_until};
use serde_json::Value;

fn wait_until_it_runs_there(migration: &mut RunningMigration) -> Result<()> {
    let running = |event: &Value| event.get("event").is_some_and(|name| name == "running");
    migration.wait_for_event("the process to run at the destination", running).map(drop)
}

/// A fault daemon killed in the middle of the drain stalls the program; the next one carries on. No page is ever made up.
#[test]
fn a_fault_daemon_killed_and_started_again() -> Result<()> {
    let hosts = TwoHosts::builder().rate("200mbit").build()?;
    let socket = hosts.directory().join("lazy.socket");
    let mut daemon = hosts.destination.lazy_pages(&hosts.token, &socket)?;
    let options = PageServerOptions { lazy_socket: Some(socket.clone()), ..PageServerOptions::default() };
    let server = hosts.destination.page_server_with(&hosts.token, &options)?;
    let mut victim = hosts.source.victim("memory", &["4", "64", "5"])?;
    let mut migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PostCopy).start()?;
    wait_until_it_runs_there(&mut migration)?;
    std::thread::sleep(Duration::from_millis(300));
    daemon.kill()?;
    std::thread::sleep(Duration::from_millis(700));
    let status = victim.status()?;
    ensure!(status.errors == 0, "errors while there is no daemon: {}", victim.log());
    let second = hosts.destination.lazy_pages(&hosts.token, &socket)?;
    let migration = migration.finish()?;
    let story =
        || format!("{}; page server: {}; daemon: {}{}", migration.text(), server.log(), daemon.log(), second.log());
    migration.expect_moved().with_context(story)?;
    victim.follow(&hosts.destination, &migration).with_context(story)?;
    victim.expect_beats(30).with_context(story)?;
    victim.finish().with_context(story).map(drop)
}

/// A page server and a separate fault daemon are killed in the drain, in any order, and started again: the program stalls as long as nobody
/// serves it, and no page is ever made up.
#[test]
fn a_page_server_and_a_fault_daemon_killed_and_started_again() -> Result<()> {
    // `s` and `d` are killed, `S` and `D` started again.
    for course in ["sdDS", "dsDS", "sSdD", "dDsS", "sSsS"] {
        let hosts = TwoHosts::builder().rate("200mbit").build()?;
        let socket = hosts.directory().join("lazy.socket");
        let mut daemon = hosts.destination.lazy_pages(&hosts.token, &socket)?;
        let mut options = PageServerOptions { lazy_socket: Some(socket.clone()), ..PageServerOptions::default() };
        let mut server = hosts.destination.page_server_with(&hosts.token, &options)?;
        options.port = server.port();
        let mut victim = hosts.source.victim("memory", &["4", "64", "5"])?;
        let mut migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PostCopy).start()?;
        wait_until_it_runs_there(&mut migration)?;
        std::thread::sleep(Duration::from_millis(200));
        for step in course.chars() {
            match step {
                's' => server.kill()?,
                'd' => daemon.kill()?,
                'S' => server = hosts.destination.page_server_with(&hosts.token, &options)?,
                _ => daemon = hosts.destination.lazy_pages(&hosts.token, &socket)?,
            }
            std::thread::sleep(Duration::from_millis(300));
            let status = victim.status()?;
            ensure!(status.errors == 0, "{course}: a page was made up: {}", victim.log());
        }
        let migration = migration.finish()?;
        let story =
            || format!("{course}: {}; page server: {}; daemon: {}", migration.text(), server.log(), daemon.log());
        migration.expect_moved().with_context(story)?;
        victim.follow(&hosts.destination, &migration).with_context(story)?;
        victim.expect_beats(30).with_context(story)?;
        expect_no_holder(&hosts).with_context(story)?;
        victim.finish().with_context(story)?;
    }
    Ok(())
}

/// The page server is killed in the drain, and a separate fault daemon goes on: the program goes on, on memory that it has never touched, too, and
/// that all its pages have come is known there before and after another page server has begun.
#[test]
fn a_copy_is_known_to_be_complete_without_a_page_server() -> Result<()> {
    let hosts = TwoHosts::builder().rate("20mbit").build()?;
    let socket = hosts.directory().join("lazy.socket");
    let daemon = hosts.destination.lazy_pages(&hosts.token, &socket)?;
    let mut options = PageServerOptions { lazy_socket: Some(socket), ..PageServerOptions::default() };
    let mut server = hosts.destination.page_server_with(&hosts.token, &options)?;
    options.port = server.port();
    let mut victim = hosts.source.victim("churn", &[])?;
    let mut migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PostCopy).start()?;
    wait_until_it_runs_there(&mut migration)?;
    let migrate = program("migrate")?;
    let status = || hosts.destination.run(&migrate.to_string_lossy(), &["status"]).map(|said| said.stdout);
    let lacks = "lacks pages";
    ensure!(status()?.contains(lacks), "the drain is over too soon: {}", status()?);
    server.kill()?;
    let deadline = Duration::from_secs(20);
    wait_until("it to be known", deadline, || Ok(!status()?.contains(lacks))).with_context(|| daemon.log())?;
    let before = status()?;
    expect_no_holder(&hosts).with_context(|| daemon.log())?;
    let beats = victim.status()?.beats;
    wait_until("the program to go on", deadline, || Ok(victim.status()?.beats > beats + 30))?;
    let server = hosts.destination.page_server_with(&hosts.token, &options)?;
    let migration = migration.finish()?;
    let story = || format!("{before}{}; page server: {}; daemon: {}", migration.text(), server.log(), daemon.log());
    migration.expect_moved().with_context(story)?;
    victim.follow(&hosts.destination, &migration).with_context(story)?;
    victim.expect_beats(30).with_context(story)?;
    expect_no_holder(&hosts).with_context(story)?;
    victim.finish().with_context(story).map(drop)
}

/// The page server serves the pages itself and is killed twice.
#[test]
fn a_page_server_killed_twice() -> Result<()> {
    let hosts = TwoHosts::builder().rate("200mbit").build()?;
    let mut server = hosts.destination.page_server(&hosts.token)?;
    let options = PageServerOptions { port: server.port(), ..PageServerOptions::default() };
    let mut victim = hosts.source.victim("memory", &["4", "64", "5"])?;
    let mut migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PostCopy).start()?;
    wait_until_it_runs_there(&mut migration)?;
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(200));
        server.kill()?;
        server = hosts.destination.page_server_with(&hosts.token, &options)?;
    }
    let migration = migration.finish()?;
    let story = || format!("{}; page server: {}", migration.text(), server.log());
    migration.expect_moved().with_context(story)?;
    victim.follow(&hosts.destination, &migration).with_context(story)?;
    victim.expect_beats(30).with_context(story)?;
    expect_no_holder(&hosts).with_context(story)?;
    victim.finish().with_context(story).map(drop)
}

/// What holds userfaultfds has left the destination.
fn expect_no_holder(hosts: &TwoHosts) -> Result<()> {
    wait_until("no holder is left", Duration::from_secs(5), || {
        Ok(!hosts.destination.processes()?.iter().any(|(_, name)| name == "godwit-holder"))
    })
}

#[test]
fn a_separate_fault_daemon() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let socket = hosts.directory().join("lazy.socket");
    let daemon = hosts.destination.lazy_pages(&hosts.token, &socket)?;
    let options = PageServerOptions { lazy_socket: Some(socket), ..PageServerOptions::default() };
    let server = hosts.destination.page_server_with(&hosts.token, &options)?;
    let mut victim = hosts.source.victim("memory", &["8", "64", "20"])?;
    let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PostCopy).run()?;
    let story = || format!("{}; page server: {}; daemon: {}", migration.text(), server.log(), daemon.log());
    migration.expect_moved().with_context(story)?;
    ensure!(migration.number("/faults/count")? > 0.0, "no fault was served: {}", story());
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(30)?;
    victim.finish().with_context(story).map(drop)
}

/// fork, mremap, munmap and MADV_DONTNEED while most pages are still on their way.
#[test]
fn forks_and_changes_of_the_layout_during_the_drain() -> Result<()> {
    let hosts = TwoHosts::builder().rate("400mbit").build()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut victim = hosts.source.victim("forker", &["48"])?;
    let mut migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PostCopy).start()?;
    wait_until_it_runs_there(&mut migration)?;
    victim.go()?;
    let migration = migration.finish()?;
    let story = || format!("{}; page server: {}", migration.text(), server.log());
    migration.expect_moved().with_context(story)?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(3).with_context(story)?;
    victim.finish().with_context(story).map(drop)
}

/// Churning mappings while the drain takes seconds.
#[test]
fn churning_mappings_during_a_slow_drain() -> Result<()> {
    let hosts = TwoHosts::builder().rate("20mbit").build()?;
    godwit_tests::Trip::of("churn", &[]).run_on(&hosts, Mode::PostCopy).map(drop)
}

/// A program that ends in mid-drain takes nothing with it: both sides notice and end, too.
#[test]
fn a_program_killed_during_the_drain() -> Result<()> {
    let hosts = TwoHosts::builder().rate("100mbit").build()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let victim = hosts.source.victim("memory", &["4", "64", "5"])?;
    let mut migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PostCopy).start()?;
    let running = |event: &Value| event.get("event").is_some_and(|name| name == "running");
    let event = migration.wait_for_event("the process to run at the destination", running)?;
    let pid = event.get("dest_pid").and_then(Value::as_u64).context("no dest_pid")?;
    hosts.destination.run("kill", &["-KILL", &pid.to_string()])?;
    let migration = migration.finish()?;
    migration.expect(4, &["ended"])?;
    ensure!(migration.text().contains("and ended there"), "{}", migration.text());
    // Whatever it is called, the source does not come back to life.
    godwit_tests::wait_until("the source's copy to be gone", Duration::from_secs(10), || {
        Ok(!godwit_tests::is_alive(victim.host_pid()))
    })
    .with_context(|| migration.text())?;
    // And the page server takes the next one.
    let mut next = hosts.source.victim("memory", &["1", "4", "0"])?;
    let migration = hosts.source.migrate(&server, next.pid()).run()?;
    migration.expect_moved()?;
    next.follow(&hosts.destination, &migration)?;
    next.finish().map(drop)
}

/// What would happen with one holder of the userfaultfds, and does not with two.
#[test]
fn the_last_holder_of_a_userfaultfd_takes_the_truth_with_it() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let victim = hosts.source.victim("holders", &[])?;
    victim.expect_beats(2)?;
    victim.finish().map(drop)
}

/// Reads what everybody may read of every process, as programs do that watch over a host.
fn watch_over_all(stop: &AtomicBool) -> usize {
    let mut read = 0;
    while !stop.load(Ordering::Relaxed) {
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        for process in processes.filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit()) {
            for name in ["cmdline", "environ"] {
                read += usize::from(std::fs::read(process.path().join(name)).is_ok_and(|text| !text.is_empty()));
            }
        }
    }
    read
}

/// Reading a process's arguments touches its memory, and where nothing is yet, zeros come of it.
#[test]
fn somebody_who_reads_the_arguments_of_all_processes() -> Result<()> {
    let stop = AtomicBool::new(false);
    let (moved, read) = std::thread::scope(|scope| {
        let watching = scope.spawn(|| watch_over_all(&stop));
        let moved = (0..4).try_for_each(|number| {
            let hosts = TwoHosts::new()?;
            let mode = if number % 2 == 0 { Mode::PostCopy } else { Mode::Hybrid };
            godwit_tests::Trip::of("memory", &["2", "32", "20"]).run_on(&hosts, mode).map(drop)
        });
        stop.store(true, Ordering::Relaxed);
        (moved, watching.join())
    });
    moved?;
    ensure!(read.is_ok_and(|read| read > 1000), "nobody's arguments were read");
    Ok(())
}
