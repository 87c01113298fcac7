//! What cannot be moved is refused by name, all of it at once, before the process is touched.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Mode, TwoHosts, Victim, expect_untouched, is_alive, victim_program, wait_for, wait_until};

/// Moves a victim that must be refused, and yields everything that was said about it, in lower case.
fn refusal(hosts: &TwoHosts, victim: &Victim, arguments: &[&str]) -> Result<String> {
    let server = hosts.destination.page_server(&hosts.token)?;
    let before = victim.view()?;
    let there = hosts.destination.processes()?;
    let migration = hosts.source.migrate(&server, victim.pid()).arguments(arguments).run()?;
    migration.expect(1, &["refused"])?;
    expect_untouched(victim, &before)?;
    ensure!(
        hosts.destination.processes()? == there,
        "something is left at the destination: {:?}",
        hosts.destination.processes()?
    );
    Ok(migration.text().to_lowercase())
}

/// Expects that a victim with `things` is refused and that each of `words` is in the reasons.
fn refused(things: &str, words: &[&str]) -> Result<()> {
    let hosts = TwoHosts::new()?;
    let victim = hosts.source.victim("refused", &[things])?;
    let text = refusal(&hosts, &victim, &[])?;
    for word in words {
        ensure!(text.contains(word), "the refusal does not say {word}: {text}");
    }
    victim.finish().map(drop)
}

macro_rules! refusals {
    ($($test:ident: $things:literal names $words:expr;)*) => {$(
        #[test]
        fn $test() -> Result<()> {
            refused($things, &$words)
        }
    )*};
}

refusals! {
    a_datagram_that_is_half_made: "udp" names ["udp socket 127.0.0.1:6200", "udp_cork"];
    a_datagram_of_which_more_is_to_come: "more" names ["udp", "half made"];
    a_ring_of_packets: "ring" names ["packet socket", "packet_rx_ring"];
    packets_shared_with_others: "fanout" names ["packet_fanout"];
    a_connection_of_mptcp: "mptcp" names ["mptcp connection 127.0.0.1:", "--tcp-close"];
    a_signed_connection: "signed" names ["tcp connection 127.0.0.1:", "tcp_md5sig", "--tcp-close"];
    a_signed_listener: "signed_listener" names ["tcp socket [::]:6203", "tcp_md5sig"];
    a_filter_that_nobody_can_read: "ebpf" names ["ebpf"];
    an_answer_that_waits_in_a_netlink_socket: "answer" names ["netlink", "a message waits", "try again"];
    a_child_process: "child" names ["child"];
    an_io_uring: "io_uring" names ["io_uring"];
    a_userfaultfd: "userfaultfd" names ["userfaultfd"];
    a_mount_namespace: "mount" names ["mount namespace"];
    a_netlink_socket_of_the_packet_filter: "netlink" names ["netlink", "packet filter"];
    a_pidfd: "pidfd" names ["pidfd"];
    a_fanotify_group: "fanotify" names ["fanotify"];
    a_terminal: "terminal" names ["ptmx"];
    a_connected_unix_socket: "unix" names ["unix"];
    a_pipe_to_another_process: "foreign_pipe" names ["pipe"];
    everything_at_once: "child,udp,io_uring,userfaultfd,netlink,ring,pidfd,fanotify,terminal"
        names ["udp", "child", "io_uring", "userfaultfd", "netlink", "ring", "pidfd", "fanotify", "ptmx"];
}

/// A host may make no MPTCP sockets.
#[test]
fn mptcp_where_there_is_none() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let victim = hosts.source.victim("listeners", &[])?;
    hosts.destination.run("sysctl", &["net.mptcp.enabled=0"])?;
    let text = refusal(&hosts, &victim, &[])?;
    ensure!(text.contains("mptcp:0.0.0.0:6101") && text.contains("net.mptcp.enabled"), "what is lacking: {text}");
    victim.finish().map(drop)
}

/// What a socket is bound to must be there, too.
#[test]
fn an_interface_that_the_destination_does_not_have() -> Result<()> {
    let hosts = TwoHosts::new()?;
    hosts.source.run("ip", &["link", "add", "only0", "type", "veth", "peer", "name", "only1"])?;
    let mut victim = hosts.source.victim("refused", &["interface,device"])?;
    let text = refusal(&hosts, &victim, &[])?;
    ensure!(text.contains("interface only0"), "the refusal does not name the interface: {text}");
    hosts.destination.run("ip", &["link", "add", "only0", "type", "veth", "peer", "name", "only1"])?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect_moved()?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(10)?;
    victim.finish().map(drop)
}

#[test]
fn standard_streams_that_lead_outside_and_both_ways_out() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let mut victim = hosts.source.victim_on_pipes("memory", &["2", "8", "5"])?;
    let text = refusal(&hosts, &victim, &[])?;
    for word in ["--external", "fd[0]=null", "fd[1]=file:"] {
        ensure!(text.contains(word), "the refusal does not say {word}: {text}");
    }
    let server = hosts.destination.page_server(&hosts.token)?;
    let output = victim.directory().join("new-output");
    let external = format!("fd[1]=file:{}", output.display());
    let arguments = ["--external", "fd[0]=null", "--external", &external];
    let migration = hosts.source.migrate(&server, victim.pid()).arguments(&arguments).run()?;
    migration.expect_moved()?;
    victim.follow(&hosts.destination, &migration)?;
    let fds = victim.view()?.fds;
    ensure!(fds.get(&0).is_some_and(|link| link == "/dev/null"), "fd 0 leads to {:?}", fds.get(&0));
    ensure!(fds.get(&1).map(String::as_str) == output.to_str(), "fd 1 leads to {:?}", fds.get(&1));
    victim.expect_beats(20)?;
    victim.finish().map(drop)
}

#[test]
fn a_program_file_that_the_destination_does_not_have() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let program = directory.path().join("victim-copy");
    std::fs::copy(victim_program(), &program)?;
    let hosts = TwoHosts::builder().private_at_destination(directory.path()).build()?;
    let victim = hosts.source.victim_from(&program, "memory", &["2", "8", "5"])?;
    let text = refusal(&hosts, &victim, &[])?;
    ensure!(text.contains("victim-copy"), "the refusal does not name the file: {text}");

    // With another file of the same name and size it is refused, too: the build-id differs.
    let other = std::fs::read(victim_program())?;
    let other: Vec<u8> = other.iter().map(|byte| byte.wrapping_add(1)).collect();
    let stash = tempfile::NamedTempFile::new()?;
    std::fs::write(stash.path(), other)?;
    hosts.destination.run("cp", &[&stash.path().display().to_string(), &program.display().to_string()])?;
    hosts.destination.run("chmod", &["755", &program.display().to_string()])?;
    let text = refusal(&hosts, &victim, &[])?;
    ensure!(text.contains("victim-copy"), "the refusal does not name the file: {text}");
    victim.finish().map(drop)
}

#[test]
fn a_system_v_segment_that_the_destination_has_too() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let victim = hosts.source.victim("sharedmem", &[])?;
    // Each host counts its segments anew.
    hosts.destination.run("ipcmk", &["--shmem", "4096"])?;
    let text = refusal(&hosts, &victim, &[])?;
    ensure!(text.contains("system v shared memory with id 0"), "the refusal does not name the segment: {text}");
    victim.finish().map(drop)
}

#[test]
fn a_wrong_token() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let victim = hosts.source.victim("memory", &["2", "8", "5"])?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let before = victim.view()?;
    let other = hosts.other_token("other-token")?;
    let migration = hosts.source.migrate(&server, victim.pid()).token(other.path()).run()?;
    migration.expect(1, &["refused", "failed"])?;
    ensure!(migration.text().to_lowercase().contains("token"), "{}", migration.text());
    expect_untouched(&victim, &before)?;
    // The server is not impressed: the next one with the right token is served.
    let mut victim = victim;
    let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PreCopy).run()?;
    migration.expect_moved()?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(10)?;
    victim.finish().map(drop)
}

#[test]
fn a_token_that_others_may_read_or_that_is_missing_or_short() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let victim = hosts.source.victim("memory", &["1", "4", "0"])?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let before = victim.view()?;
    let open = hosts.other_token("open")?;
    hosts.source.run("chmod", &["644", &open.path().display().to_string()])?;
    let short = hosts.other_token("short")?;
    std::fs::write(short.path(), "too short")?;
    for path in [open.path(), short.path(), &hosts.directory().join("nowhere")] {
        let migration = hosts.source.migrate(&server, victim.pid()).token(path).run()?;
        ensure!(
            migration.code() == Some(1) || migration.code() == Some(2),
            "exit {}: {}",
            migration.status,
            migration.text()
        );
        ensure!(
            migration.text().contains(&path.display().to_string()),
            "{} is not named: {}",
            path.display(),
            migration.text()
        );
        expect_untouched(&victim, &before)?;
    }
    victim.finish().map(drop)
}

#[test]
fn a_process_that_is_not_there_and_a_server_that_is_not_there() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let victim = hosts.source.victim("memory", &["1", "4", "0"])?;
    let before = victim.view()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let migration = hosts.source.migrate(&server, 9_999_999).run()?;
    ensure!(migration.code() == Some(1), "exit {}: {}", migration.status, migration.text());
    ensure!(migration.text().contains("9999999: there is no such process"), "{}", migration.text());
    let note = hosts.directory().join("zombie");
    // It does not ask how its child ended.
    let program = "import os, time\n\
        child = os.fork() or os._exit(0)\n\
        open('zombie', 'w').write(f'{child}\\n')\n\
        time.sleep(60)\n";
    let _parent = hosts.source.start_command(hosts.source.command("python3").args(["-c", program]))?;
    let zombie: u32 = wait_for("a zombie", Duration::from_secs(5), || {
        Ok(std::fs::read_to_string(&note).ok().and_then(|pid| pid.strip_suffix('\n')?.parse().ok()))
    })?;
    // N.B. of a zombie nobody can say in which namespaces it was.
    let status = format!("/proc/{zombie}/status");
    let is_over = || Ok(hosts.source.run("grep", &["-q", "^State:.*Z", &status]).is_ok());
    wait_until("it to end", Duration::from_secs(5), is_over)?;
    let migration = hosts.source.migrate(&server, zombie).run()?;
    migration.expect(1, &["failed"])?;
    ensure!(migration.text().contains("it has ended (zombie)"), "{}", migration.text());
    let nobody = format!("{}:9", hosts.destination.address());
    let migration = hosts.source.migrate_to(&nobody, victim.pid()).token(hosts.token.path()).run()?;
    migration.expect(1, &["failed", "refused"])?;
    ensure!(migration.text().contains(&nobody), "the address is not named: {}", migration.text());
    expect_untouched(&victim, &before)?;
    victim.finish().map(drop)
}

/// A thread is no process, though it can be looked at by its number as if it were.
#[test]
fn a_thread_is_named_as_one() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let victim = hosts.source.victim("memory", &["2", "8", "4"])?;
    victim.expect_beats(5)?;
    let before = victim.view()?;
    let tasks = std::fs::read_dir(format!("/proc/{}/task", victim.host_pid()))?;
    let tids = tasks.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let thread = tids.filter(|tid| *tid != victim.host_pid()).max().context("it has threads")?;
    let migration = hosts.source.migrate(&server, hosts.source.pid_here(thread)?).run()?;
    migration.expect(1, &["refused"])?;
    let words = format!("is a thread of process {}", victim.pid());
    ensure!(migration.text().contains(&words), "{}", migration.text());
    expect_untouched(&victim, &before)?;
    victim.finish().map(drop)
}

/// It has no descriptor that would tell.
#[test]
fn memory_that_is_shared_with_another_process() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let program = "import mmap, os, time\n\
        memory = mmap.mmap(-1, 4096)\n\
        child = os.fork()\n\
        if child: open('child', 'w').write(f'{child}\\n')\n\
        else: os.setsid()\n\
        time.sleep(60)\n";
    let _parent = hosts.source.start_command(hosts.source.command("python3").args(["-c", program]))?;
    let note = hosts.directory().join("child");
    let written = || Ok(std::fs::read_to_string(&note).ok().and_then(|pid| pid.strip_suffix('\n')?.parse().ok()));
    let child = wait_for("a child", Duration::from_secs(10), written)?;
    let migration = hosts.source.migrate(&server, child).run()?;
    migration.expect(1, &["refused"])?;
    let text = migration.text();
    ensure!(text.contains("/dev/zero (deleted)") && text.contains("python3, shares this memory"), "{text}");
    ensure!(is_alive(hosts.source.host_pid(child)?), "it is no more");
    Ok(())
}

/// As after the upgrade of a package: the destination could not open what the process was started from.
#[test]
fn an_executable_that_is_gone() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let program = hosts.directory().join("gone");
    std::fs::copy(victim_program(), &program)?;
    let victim = hosts.source.victim_from(&program, "memory", &["1", "1", "0"])?;
    std::fs::remove_file(&program)?;
    let text = refusal(&hosts, &victim, &[])?;
    ensure!(text.contains("has been removed or replaced") && text.contains("/gone"), "{text}");
    victim.finish().map(drop)
}
