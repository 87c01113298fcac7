//! What a page server lets others send, and what its own programs may do.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{
    MemoryGroup, Mode, PageServer, PageServerOptions, TakenOver, TwoHosts, Victim, expect_untouched, wait_until,
};
use nix::errno::Errno;
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

/// What does not fit into the control group that the page server and all it makes are in would end one of them.
#[test]
fn a_process_that_memory_does_not_suffice_for() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let mut server = hosts.destination.page_server(&hosts.token)?;
    let mut small = hosts.source.victim("memory", &["1", "8", "0"])?;
    let large = hosts.source.victim("memory", &["1", "192", "0"])?;
    let mut memory = MemoryGroup::around(server.process().host_pid())?;
    memory.leave(96 << 20)?;
    expect_refused(&hosts, &server, &large, &["memory: it has", "MiB are left in the control group"])?;
    let migration = hosts.source.migrate(&server, small.pid()).mode(Mode::PreCopy).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    small.follow(&hosts.destination, &migration)?;
    let score = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", small.host_pid()))?;
    ensure!(score.trim() == "0", "it is still the first to go: {score}");
    small.expect_beats(10)?;
    small.finish()?;
    large.finish().map(drop)
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

/// What was small enough grows under way: that is said, with the way out.
#[test]
fn processes_that_grow_too_large() -> Result<()> {
    let hosts = TwoHosts::builder().rate("100mbit").build()?;
    let server = limited(&hosts, &["--max-memory", "24M"])?;
    let victim = hosts.source.victim("many", &["growing"])?;
    let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PreCopy).run()?;
    migration.expect(1, &["failed"])?;
    for words in ["more than the 24 MiB that the page server takes", "with a larger --max-memory"] {
        ensure!(migration.text().contains(words), "{words} is not in {}", migration.text());
    }
    victim.expect_beats(5)?;
    victim.finish().map(drop)
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

/// A set of capabilities, or another field of the status of a thread.
fn field<'status>(status: &'status str, name: &str) -> Result<&'status str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {name}"))?.trim())
}

/// The threads of a process, each with its name and its status. One that ends meanwhile is none of them.
fn threads(pid: u32) -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        match std::fs::read_to_string(entry?.path().join("status")) {
            Ok(status) => all.push((field(&status, "Name")?.to_owned(), status)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => (),
            Err(error) => return Err(error.into()),
        }
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
        Ok(threads(pid)?.iter().all(|(_, status)| field(status, "CapPrm").is_ok_and(|set| set == NONE)))
    })?;
    for (name, status) in threads(pid)? {
        for set in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
            ensure!(field(&status, set)? == NONE, "{name} has {set} {}", field(&status, set)?);
        }
        ensure!(field(&status, "NoNewPrivs")? == "1", "{name} may gain privileges");
        ensure!(field(&status, "Seccomp")? == "2", "{name} may make any system call");
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

/// Whoever had taken the fault daemon over would have the descriptors that it has, and little else.
#[test]
fn a_fault_daemon_that_was_taken_over() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let socket = hosts.directory().join("lazy.socket");
    let config = hosts.directory().join("config");
    let mut daemon = hosts.destination.lazy_pages_of(&config, &socket)?;
    let pid = daemon.process().host_pid();
    wait_until("the daemon to be confined", Duration::from_secs(5), || {
        Ok(threads(pid)?.iter().all(|(_, status)| field(status, "Seccomp").is_ok_and(|mode| mode == "2")))
    })?;
    let own = hosts.destination.pid_here(pid)?;
    let taken = TakenOver::thread(pid, "godwit-drain")?;
    let text = |place, text: &str| taken.put(place, format!("{text}\0").as_bytes());
    let here = libc::AT_FDCWD as u64;
    let (passwd, shell, target) =
        (text(0, "/etc/passwd")?, text(1, "/bin/sh")?, text(2, &socket.display().to_string())?);
    let (peers, stat, environment) =
        (text(3, &config.display().to_string())?, text(4, "/proc/self/stat")?, text(5, "/proc/1/environ")?);
    let write = (libc::O_WRONLY | libc::O_CREAT) as u64;
    let executable = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let (stream, datagram) = (libc::SOCK_STREAM as u64, libc::SOCK_DGRAM as u64);
    let (inet, unix, packet) = (libc::AF_INET as u64, libc::AF_UNIX as u64, libc::AF_PACKET as u64);
    let (denied, absent) = (Some(Errno::EPERM), Some(Errno::ENOSYS));
    let cases: [(&str, i64, &[u64], Option<Errno>); 30] = [
        ("its id", libc::SYS_gettid, &[], None),
        ("the list of trusted hosts", libc::SYS_openat, &[here, peers, libc::O_DIRECTORY as u64], None),
        ("what it is itself", libc::SYS_openat, &[here, stat], None),
        ("another socket for datagrams", libc::SYS_socket, &[inet, datagram], None),
        ("plain memory", libc::SYS_mmap, &[0, 4096, 3, anonymous, u64::MAX], None),
        ("a file to be written", libc::SYS_openat, &[here, target, write, 0o600], denied),
        ("another program", libc::SYS_execve, &[shell, 0, 0], denied),
        ("a child", libc::SYS_clone, &[libc::SIGCHLD as u64, 0, 0, 0, 0], denied),
        ("a child of another kind", libc::SYS_fork, &[], denied),
        ("a child by clone3", libc::SYS_clone3, &[target, 88], absent),
        ("code", libc::SYS_mmap, &[0, 4096, executable, anonymous, u64::MAX], denied),
        ("memory that becomes code", libc::SYS_mprotect, &[target & !0xfff, 4096, executable], denied),
        ("a stream", libc::SYS_socket, &[inet, stream], denied),
        ("a UNIX socket", libc::SYS_socket, &[unix, datagram], denied),
        ("a packet socket", libc::SYS_socket, &[packet, datagram], denied),
        ("a listening socket", libc::SYS_listen, &[3, 1], denied),
        ("a file removed", libc::SYS_unlink, &[target], denied),
        ("a file renamed", libc::SYS_rename, &[target, passwd], denied),
        ("a mode changed", libc::SYS_chmod, &[target, 0o777], denied),
        ("a signal", libc::SYS_kill, &[1, 0], denied),
        ("a signal to a thread", libc::SYS_tgkill, &[1, 1, 0], denied),
        ("tracing", libc::SYS_ptrace, &[libc::PTRACE_SEIZE as u64, 1], denied),
        ("memory of others", libc::SYS_process_vm_readv, &[1, 0, 0, 0, 0, 0], denied),
        ("a descriptor of others", libc::SYS_pidfd_getfd, &[3, 0, 0], denied),
        ("a namespace", libc::SYS_unshare, &[libc::CLONE_NEWUSER as u64], denied),
        ("a mount", libc::SYS_mount, &[0, target, 0, 0, 0], denied),
        ("a program for the kernel", libc::SYS_bpf, &[0, 0, 0], denied),
        ("a ring", libc::SYS_io_uring_setup, &[8, target], denied),
        ("words put into a terminal", libc::SYS_ioctl, &[0, libc::TIOCSTI, target], denied),
        ("what may be dumped", libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as u64, 1], denied),
    ];
    let failed = |result: i64| (result < 0).then(|| Errno::from_raw(-result as i32));
    for (what, call, arguments, expected) in cases {
        let result = taken.call(call, arguments)?;
        ensure!(failed(result) == expected, "{what}: {result} instead of {expected:?}; daemon: {}", daemon.log());
    }
    ensure!(hosts.destination.pid_here(pid)? == own && socket.exists(), "it has done something after all");
    if daemon.log().contains("Landlock") {
        eprintln!("this kernel has no Landlock, or an old one: what files are read is not limited: {}", daemon.log());
        return Ok(());
    }
    for (what, path) in [("a file", passwd), ("the programs", shell), ("the environment of another", environment)] {
        let result = taken.call(libc::SYS_openat, &[here, path])?;
        ensure!(failed(result) == Some(Errno::EACCES), "{what}: {result}");
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
        for (name, status) in threads(pid)? {
            let set = |name| Ok::<_, anyhow::Error>(u64::from_str_radix(field(&status, name)?, 16)?);
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
