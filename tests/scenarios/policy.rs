//! What a page server lets others send, and what its own programs may do.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Mode, PageServer, PageServerOptions, TwoHosts, Victim, expect_untouched, wait_until};
use nix::sys::signal::Signal;

/// A user that no machine knows.
const USER: u32 = 70_001;

fn limited(hosts: &TwoHosts, arguments: &[&str]) -> Result<PageServer> {
    let arguments = arguments.iter().map(|word| (*word).to_owned()).collect();
    hosts.destination.page_server_with(&hosts.token, &PageServerOptions { arguments, ..PageServerOptions::default() })
}

/// Expects that a victim is refused before it is touched, in these words.
fn expect_refused(hosts: &TwoHosts, server: &PageServer, victim: &Victim, words: &[&str]) -> Result<()> {
    let before = victim.view()?;
    let there = hosts.destination.processes()?;
    let migration = hosts.source.migrate(server, victim.pid()).run()?;
    migration.expect(1, &["refused"])?;
    let text = migration.text();
    for word in words {
        ensure!(text.contains(word), "the refusal does not say {word}: {text}");
    }
    expect_untouched(victim, &before)?;
    ensure!(hosts.destination.processes()? == there, "something is left at the destination");
    Ok(())
}

#[test]
fn processes_of_users_who_are_not_allowed() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = limited(&hosts, &["--allow-uid", "70001-70009"])?;
    let root = hosts.source.victim("memory", &["1", "4", "0"])?;
    expect_refused(&hosts, &server, &root, &["user 0", "capabilities", "--allow-uid"])?;
    let other = hosts.source.victim_of(80_000, &[], "memory", &["1", "4", "0"])?;
    expect_refused(&hosts, &server, &other, &["user 80000"])?;
    for mode in [Mode::Hybrid, Mode::PostCopy] {
        let mut victim = hosts.source.victim_of(USER, &[], "memory", &["4", "16", "10"])?;
        let migration = hosts.source.migrate(&server, victim.pid()).mode(mode).run()?;
        migration.expect_moved().with_context(|| server.log())?;
        victim.follow(&hosts.destination, &migration)?;
        victim.expect_beats(10)?;
        victim.finish()?;
    }
    other.finish()?;
    root.finish().map(drop)
}

#[test]
fn processes_that_could_gain_privileges() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = limited(&hosts, &["--require-no-new-privs"])?;
    let victim = hosts.source.victim_of(USER, &[], "memory", &["1", "4", "0"])?;
    expect_refused(&hosts, &server, &victim, &["no_new_privs", "setpriv --no-new-privs"])?;
    victim.finish()?;
    let mut victim = hosts.source.victim_of(USER, &["--no-new-privs"], "memory", &["1", "4", "0"])?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(&hosts.destination, &migration)?;
    victim.finish().map(drop)
}

/// A descriptor that somebody more powerful has opened would be opened by the page server, which is root.
#[test]
fn files_that_the_user_could_not_open() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = limited(&hosts, &["--allow-uid", "70001"])?;
    let victim = hosts.source.victim_of(USER, &[], "memory", &["1", "4", "0"])?;
    let errors = victim.directory().join("stderr");
    std::os::unix::fs::chown(&errors, Some(0), Some(0))?;
    std::fs::set_permissions(&errors, std::fs::Permissions::from_mode(0o600))?;
    expect_refused(&hosts, &server, &victim, &[&errors.display().to_string(), "user 70001 may not open it"])?;
    victim.finish().map(drop)
}

#[test]
fn processes_that_are_too_large() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = limited(&hosts, &["--max-memory", "16M"])?;
    let large = hosts.source.victim("memory", &["1", "64", "0"])?;
    expect_refused(&hosts, &server, &large, &["memory", "--max-memory"])?;
    large.finish()?;
    let mut small = hosts.source.victim("memory", &["1", "4", "0"])?;
    let migration = hosts.source.migrate(&server, small.pid()).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    small.follow(&hosts.destination, &migration)?;
    small.finish().map(drop)
}

#[test]
fn more_processes_than_may_come_at_a_time() -> Result<()> {
    let hosts = TwoHosts::builder().rate("100mbit").build()?;
    let server = limited(&hosts, &["--max-migrations", "1"])?;
    let mut first = hosts.source.victim("memory", &["2", "48", "0"])?;
    let mut second = hosts.source.victim("memory", &["1", "4", "0"])?;
    let mut moving = hosts.source.migrate(&server, first.pid()).mode(Mode::PreCopy).start()?;
    moving.wait_for_phase("round")?;
    let before = second.view()?;
    let refused = hosts.source.migrate(&server, second.pid()).run()?;
    refused.expect(1, &["failed", "refused"])?;
    ensure!(refused.text().contains("--max-migrations"), "{}", refused.text());
    expect_untouched(&second, &before)?;
    let migration = moving.finish()?;
    migration.expect_moved().with_context(|| server.log())?;
    first.follow(&hosts.destination, &migration)?;
    let migration = hosts.source.migrate(&server, second.pid()).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    second.follow(&hosts.destination, &migration)?;
    second.finish()?;
    first.finish().map(drop)
}

/// A set of capabilities, or another field of a thread.
fn field(thread: &Path, name: &str) -> Result<String> {
    let status = std::fs::read_to_string(thread.join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {name}"))?.trim().to_owned())
}

/// The threads of a process, with their names.
fn threads(pid: u32) -> Result<Vec<(String, PathBuf)>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        all.push((std::fs::read_to_string(path.join("comm"))?.trim().to_owned(), path));
    }
    Ok(all)
}

const NONE: &str = "0000000000000000";

#[test]
fn the_fault_daemon_keeps_no_privileges() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let socket = hosts.directory().join("lazy.socket");
    let mut daemon = hosts.destination.lazy_pages(&hosts.token, &socket)?;
    let options = PageServerOptions { lazy_socket: Some(socket), ..PageServerOptions::default() };
    let server = hosts.destination.page_server_with(&hosts.token, &options)?;
    let pid = daemon.process().host_pid();
    // They give up as they start, which may be a moment after the daemon says that it listens.
    wait_until("all threads to have given up their capabilities", Duration::from_secs(5), || {
        Ok(threads(pid)?.iter().all(|(_, thread)| field(thread, "CapPrm").is_ok_and(|set| set == NONE)))
    })?;
    for (name, thread) in threads(pid)? {
        for set in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
            ensure!(field(&thread, set)? == NONE, "{name} has {set} {}", field(&thread, set)?);
        }
        ensure!(field(&thread, "NoNewPrivs")? == "1", "{name} may gain privileges");
        ensure!(field(&thread, "Seccomp")? == "2", "{name} may make any system call");
    }
    // And like that it serves a process of root and one of somebody else.
    for user in [None, Some(USER)] {
        let mut victim = match user {
            None => hosts.source.victim("memory", &["4", "32", "10"])?,
            Some(user) => hosts.source.victim_of(user, &[], "memory", &["4", "32", "10"])?,
        };
        let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PostCopy).run()?;
        let story = || format!("{}; page server: {}; daemon: {}", migration.text(), server.log(), daemon.log());
        migration.expect_moved().with_context(story)?;
        ensure!(migration.number("/faults/count")? > 0.0, "no fault was served: {}", story());
        victim.follow(&hosts.destination, &migration)?;
        victim.expect_beats(10)?;
        victim.finish()?;
    }
    Ok(())
}

/// A process of root may have every capability, so the page server has to have them, too; one that takes no such processes gives up
/// what it needs for nothing else.
#[test]
fn the_page_server_keeps_what_it_needs() -> Result<()> {
    let hosts = TwoHosts::builder().rate("400mbit").build()?;
    let mut server = limited(&hosts, &["--allow-uid", "70001", "--require-no-new-privs"])?;
    let pid = server.process().host_pid();
    let serves_pages = |name: &str| name == "godwit-faults" || name == "godwit-drain";
    // CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_BOOT, CAP_MKNOD, CAP_MAC_ADMIN, CAP_BPF
    let gone: u64 = [16, 17, 22, 27, 33, 39].iter().map(|capability| 1 << capability).sum();
    wait_until("threads to have given up capabilities", Duration::from_secs(5), || {
        for (name, thread) in threads(pid)? {
            let set = |name| Ok::<_, anyhow::Error>(u64::from_str_radix(&field(&thread, name)?, 16)?);
            let is_good = match serves_pages(&name) {
                true => set("CapPrm")? == 0 && set("CapBnd")? == 0,
                false => set("CapPrm")? & gone == 0 && set("CapPrm")? != 0 && set("CapBnd")? & gone == 0,
            };
            if !is_good {
                return Ok(false);
            }
        }
        Ok(threads(pid)?.iter().any(|(name, _)| serves_pages(name)))
    })?;
    for (victim, arguments) in
        [("memory", &["4", "32", "10"][..]), ("threads", &["8"]), ("listeners", &[]), ("timers", &[])]
    {
        let mut victim = hosts.source.victim_of(USER, &["--no-new-privs"], victim, arguments)?;
        let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PostCopy).run()?;
        migration.expect_moved().with_context(|| server.log())?;
        victim.follow(&hosts.destination, &migration)?;
        victim.expect_beats(5)?;
        victim.finish()?;
    }
    Ok(())
}

/// Every fourth one is killed or called off on its way; the others do not notice.
#[test]
fn thirty_two_at_once_some_of_which_fail() -> Result<()> {
    const COUNT: usize = 32;
    let hosts = TwoHosts::new()?;
    let mut server = hosts.destination.page_server(&hosts.token)?;
    let fails = |number: usize| number % 4 == 3;
    let mut victims = Vec::new();
    for number in 0..COUNT {
        // Those that are to fail must not be over before they are told to.
        victims.push(hosts.source.victim("memory", &["1", if fails(number) { "64" } else { "4" }, "1"])?);
    }
    let there = hosts.destination.processes()?.len();
    let mut moves = Vec::new();
    for (number, victim) in victims.iter().enumerate() {
        let migrate = hosts.source.migrate(&server, victim.pid()).limit(Duration::from_secs(150));
        let mut moving = if fails(number) { migrate.mode(Mode::PreCopy).start()? } else { migrate.start()? };
        if fails(number) {
            moving.wait_for_phase("prepare")?;
            moving.process().signal(if number % 8 == 3 { Signal::SIGKILL } else { Signal::SIGINT })?;
        }
        moves.push(moving);
    }
    let mut failed = Vec::new();
    let mut moved = 0;
    for (number, (mut victim, moving)) in victims.into_iter().zip(moves).enumerate() {
        let ended = moving.finish();
        let is_moved =
            ended.as_ref().is_ok_and(|migration| migration.outcome().is_ok_and(|outcome| outcome == "moved"));
        if is_moved {
            let migration = ended?;
            migration.expect_moved()?;
            victim.follow(&hosts.destination, &migration).with_context(|| server.log())?;
            victim.expect_beats(3)?;
            victim.finish()?;
            moved += 1;
        } else {
            ensure!(fails(number), "number {number}: {ended:?}; page server: {}", server.log());
            failed.push(victim);
        }
    }
    ensure!(moved == COUNT * 3 / 4, "{moved} of {COUNT} moved");
    ensure!(server.process().ended()?.is_none(), "the page server has ended: {}", server.log());
    wait_until("nothing to be left of those that failed", Duration::from_secs(30), || {
        Ok(hosts.destination.processes()?.len() <= there)
    })
    .with_context(|| format!("{:?}: {}", hosts.destination.processes(), server.log()))?;
    for victim in failed {
        victim.expect_beats(3)?;
        victim.finish()?;
    }
    Ok(())
}
