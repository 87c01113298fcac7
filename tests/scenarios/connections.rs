//! Clients on a third host, whose server moves with its address: they see a delay and nothing else.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use godwit_tests::clients::{PATIENCE, converse, expect_end, finish_upload, patterned};
use godwit_tests::{Host, Mode, Path, Service, Trip, TwoHosts, expect_untouched, wait_until};

/// Bytes that a client sends to a server that does not read: more than nothing, less than its buffer.
const HELD: usize = 40_000;

/// There and back, with connections in every state that a client can bring about.
fn there_and_back(ipv6: bool, mode: Mode) -> Result<()> {
    there_and_back_behind(Path::default(), ipv6, mode)
}

fn there_and_back_behind(path: Path, ipv6: bool, mode: Mode) -> Result<()> {
    there_and_back_of(Service::start_behind(path, ipv6)?, mode)
}

fn there_and_back_of(mut service: Service, mode: Mode) -> Result<()> {
    service.employ_clients(10)?;
    // Unread at the server, with more to come; unread and ended; shut down by the server.
    let mut unread = service.connect(b'h')?;
    unread.write_all(&patterned(0, HELD))?;
    let mut ended = service.connect(b'h')?;
    ended.write_all(&patterned(0, HELD))?;
    ended.shutdown(Shutdown::Write)?;
    let mut shut = service.connect(b'w')?;
    ensure!(shut.read(&mut [0])? == 0, "the server has not shut its side down");
    service.victim.expect_beats(10)?;

    let servers = [
        service.hosts.destination.page_server(&service.hosts.token)?,
        service.hosts.source.page_server(&service.hosts.token)?,
    ];
    for (server, there) in servers.iter().zip([true, false]) {
        let migration = service.migrate(server, mode)?;
        let story = || format!("{}; page server: {}", migration.text(), server.log());
        migration.expect_moved().with_context(story)?;
        let host = if there { &service.hosts.destination } else { &service.hosts.source };
        service.victim.follow(host, &migration).with_context(story)?;
        service.victim.expect_beats(50).with_context(story)?;
        if there {
            unread.write_all(&patterned(HELD as u64, HELD))?;
            shut.write_all(&patterned(0, HELD))?;
        }
    }
    service.victim.go()?;
    shut.write_all(&patterned(HELD as u64, 10))?;
    shut.shutdown(Shutdown::Write)?;
    finish_upload(unread, 2 * HELD as u64).context("the connection that was not read")?;
    let mut count = [0; 8];
    ended.read_exact(&mut count).context("the connection that had ended")?;
    ensure!(u64::from_ne_bytes(count) == HELD as u64, "{} bytes of {HELD} arrived", u64::from_ne_bytes(count));
    expect_end(ended)?;
    service.finish()
}

macro_rules! there_and_back {
    ($($name:ident: $ipv6:literal, $mode:ident;)*) => {$(
        #[test]
        fn $name() -> Result<()> {
            there_and_back($ipv6, Mode::$mode)
        }
    )*};
}

there_and_back! {
    over_ipv4_hybrid: false, Hybrid;
    over_ipv4_pre_copy: false, PreCopy;
    over_ipv4_post_copy: false, PostCopy;
    over_ipv4_stop_and_copy: false, StopAndCopy;
    over_ipv6_hybrid: true, Hybrid;
    over_ipv6_post_copy: true, PostCopy;
}

/// Has a host use a bridge to which its link belongs, as hosts of virtual machines and containers do.
fn bridge(host: &Host, number: u8, clients: &str) -> Result<()> {
    let script = format!(
        "ip link add br0 type bridge && ip link set br0 up && ip address del 10.77.0.{number}/24 dev godwit0 && \
         ip link set godwit0 master br0 && ip address add 10.77.0.{number}/24 dev br0 && ping -c 1 -W 5 {clients} && \
         echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables"
    );
    host.run("sh", &["-c", &script]).context("this test needs the kernel module br_netfilter").map(drop)
}

/// A bridge shows what comes in to the packet filter before its own interface sees it. A client that would have to send a packet
/// again does so too late.
fn behind_bridges(mode: Mode) -> Result<()> {
    let _ = std::process::Command::new("modprobe").arg("br_netfilter").status();
    let mut service = Service::start(false)?;
    let clients = service.hosts.clients()?;
    bridge(&service.hosts.source, 1, clients.address())?;
    bridge(&service.hosts.destination, 2, clients.address())?;
    let move_address = "ip address del 10.77.0.100/32 dev godwit0 && ip address add 10.77.0.100/32 dev br0";
    service.hosts.source.run("sh", &["-c", move_address])?;
    let slow = "echo 0 > /proc/sys/net/ipv4/tcp_early_retrans && \
                ip route change 10.77.0.0/24 dev bridge0 src 10.77.0.3 rto_min 60s";
    clients.run("sh", &["-c", slow])?;
    for _ in 0..20 {
        service.employ("conversation", b'e', converse)?;
    }
    service.victim.expect_beats(10)?;
    let there = service.hosts.destination.page_server(&service.hosts.token)?;
    let back = service.hosts.source.page_server(&service.hosts.token)?;
    for _ in 0..2 {
        for (server, host) in [(&there, &service.hosts.destination), (&back, &service.hosts.source)] {
            let migration = service.migrate(server, mode)?;
            let story = || format!("{}; page server: {}", migration.text(), server.log());
            migration.expect_moved().with_context(story)?;
            service.victim.follow(host, &migration).with_context(story)?;
            service.victim.expect_beats(50).with_context(story)?;
        }
    }
    service.victim.go()?;
    service.finish()
}

#[test]
fn behind_bridges_hybrid() -> Result<()> {
    behind_bridges(Mode::Hybrid)
}

#[test]
fn behind_bridges_post_copy() -> Result<()> {
    behind_bridges(Mode::PostCopy)
}

/// 50 ms each way, and every hundredth packet lost.
const FAR: Path =
    Path { delay: Duration::from_millis(50), lost_permille: 10, late_permille: 0, bytes_per_second: None, seed: 3 };

#[test]
fn far_away_hybrid() -> Result<()> {
    there_and_back_behind(FAR, false, Mode::Hybrid)
}

#[test]
fn far_away_over_ipv6_post_copy() -> Result<()> {
    there_and_back_behind(FAR, true, Mode::PostCopy)
}

/// Packets that overtake each other, on a line that is always full.
#[test]
fn in_disorder_on_a_narrow_line() -> Result<()> {
    let path = Path { delay: Duration::from_millis(5), late_permille: 30, bytes_per_second: Some(4 << 20), ..FAR };
    there_and_back_behind(path, false, Mode::Hybrid)
}

/// Streams in both directions at full rate, and no rest between the moves.
#[test]
fn ten_moves_in_a_row() -> Result<()> {
    let mut service = Service::start(false)?;
    service.employ_clients(5)?;
    service.victim.expect_beats(10)?;
    let servers = [
        service.hosts.destination.page_server(&service.hosts.token)?,
        service.hosts.source.page_server(&service.hosts.token)?,
    ];
    for number in 0..10 {
        let (server, mode) = (&servers[number % 2], Mode::ALL[number % 4]);
        let migration = service.migrate(server, mode)?;
        let story = || format!("move {number}: {}; page server: {}", migration.text(), server.log());
        migration.expect_moved().with_context(story)?;
        let host = if number % 2 == 0 { &service.hosts.destination } else { &service.hosts.source };
        service.victim.follow(host, &migration).with_context(story)?;
        service.victim.expect_beats(3).with_context(story)?;
    }
    service.finish()
}

/// A move that fails inside the freeze, when connections have been taken apart: clients see a delay, and the next move works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mishap {
    Interrupt,
    ServerKilled,
    AgentKilled,
}

fn called_off(mishap: Mishap) -> Result<()> {
    called_off_behind(Path::default(), mishap)
}

fn called_off_behind(path: Path, mishap: Mishap) -> Result<()> {
    let mut service = Service::start_behind(path, false)?;
    service.employ_clients(5)?;
    service.victim.expect_beats(10)?;
    let before = service.victim.view()?;
    let mut server = service.hosts.destination.page_server(&service.hosts.token)?;
    service.hosts.limit_rate("2mbit")?;
    let address = service.address.ip().to_string();
    let mut migration = (service.hosts.source.migrate(&server, service.victim.pid()))
        .mode(Mode::StopAndCopy)
        .arguments(&["--move-addr", &address])
        .start()?;
    migration.wait_for_event("the freeze", |event| event.get("event").is_some_and(|name| name == "frozen"))?;
    std::thread::sleep(Duration::from_millis(100));
    match mishap {
        Mishap::Interrupt => migration.interrupt()?,
        Mishap::ServerKilled => server.kill()?,
        Mishap::AgentKilled => migration.process().signal(nix::sys::signal::Signal::SIGKILL)?,
    }
    let story = match (mishap, migration.finish()) {
        (Mishap::AgentKilled, _) => server.log(),
        (_, migration) => {
            let migration = migration?;
            let story = format!("{}; page server: {}", migration.text(), server.log());
            let outcome = if mishap == Mishap::ServerKilled { "failed" } else { "cancelled" };
            migration.expect(1, &[outcome]).with_context(|| story.clone())?;
            story
        }
    };
    expect_untouched(&service.victim, &before).with_context(|| story)?;

    service.hosts.limit_rate("4gbit")?;
    let server = if mishap == Mishap::ServerKilled {
        service.hosts.destination.page_server(&service.hosts.token)?
    } else {
        server
    };
    let migration = service.migrate(&server, Mode::Hybrid)?;
    migration.expect_moved().with_context(|| server.log())?;
    service.victim.follow(&service.hosts.destination, &migration)?;
    service.victim.expect_beats(20)?;
    service.finish()
}

#[test]
fn called_off_by_the_user() -> Result<()> {
    called_off(Mishap::Interrupt)
}

#[test]
fn called_off_far_away() -> Result<()> {
    called_off_behind(FAR, Mishap::Interrupt)
}

#[test]
fn called_off_as_the_page_server_is_killed() -> Result<()> {
    called_off(Mishap::ServerKilled)
}

#[test]
fn called_off_as_the_agent_is_killed() -> Result<()> {
    called_off(Mishap::AgentKilled)
}

/// What cannot go on is refused by name before anything is touched, with the way out.
#[test]
fn a_missing_address_is_found_before() -> Result<()> {
    let mut service = Service::start(false)?;
    service.employ("conversation", b'e', converse)?;
    service.victim.expect_beats(20)?;
    let before = service.victim.view()?;
    let server = service.hosts.destination.page_server(&service.hosts.token)?;
    let migrate = || service.hosts.source.migrate(&server, service.victim.pid());
    let migration = migrate().run()?;
    migration.expect(1, &["refused"])?;
    for words in ["10.77.0.100:6200", "--move-addr", "--tcp-close"] {
        ensure!(migration.text().contains(words), "the refusal does not say {words}: {}", migration.text());
    }
    for (wish, words) in [
        ("10.77.0.99", "does not have"),
        ("10.77.0.100/nothing0", "no interface nothing0"),
        ("10.77.0.1", "reaches the destination by it"),
    ] {
        let migration = migrate().arguments(&["--move-addr", wish]).run()?;
        migration.expect(1, &["refused"])?;
        ensure!(migration.text().contains(words), "the refusal does not say {words}: {}", migration.text());
    }
    let twice = ["--move-addr", "10.77.0.100", "--move-addr", "10.77.0.100/lo"];
    let migration = migrate().arguments(&twice).run()?;
    migration.expect(1, &["refused"])?;
    ensure!(migration.text().contains("10.77.0.100: it is to move along twice"), "{}", migration.text());
    expect_untouched(&service.victim, &before)?;
    service.finish()
}

/// A server that listens by MPTCP, as newer ones do: clients who do not speak it stay, and new ones get in all the time.
#[test]
fn by_a_listener_of_mptcp() -> Result<()> {
    let mut service = Service::start_with(Path::default(), false, &["mptcp=1"])?;
    service.employ_caller()?;
    there_and_back_of(service, Mode::Hybrid)
}

#[test]
fn by_a_listener_of_mptcp_over_ipv6() -> Result<()> {
    let mut service = Service::start_with(Path::default(), true, &["mptcp=1"])?;
    service.employ_caller()?;
    there_and_back_of(service, Mode::StopAndCopy)
}

/// A connection that cannot be moved, and the way out.
fn can_only_stay_behind(thing: &str, words: &str) -> Result<()> {
    let hosts = TwoHosts::new()?;
    let mut victim = hosts.source.victim("refused", &[thing, "silent=1"])?;
    let before = victim.view()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect(1, &["refused"])?;
    // Alone it cannot be moved either.
    let is_socket = |link: &String| link.starts_with("socket:");
    let sockets: Vec<String> =
        before.fds.iter().filter(|(_, link)| is_socket(link)).map(|(fd, _)| fd.to_string()).collect();
    let hand_over = hosts.source.hand_over(&server, victim.pid(), &sockets.join(",")).run()?;
    hand_over.expect(1, &["refused"])?;
    ensure!(hand_over.text().contains(words), "the refusal does not say {words}: {}", hand_over.text());
    expect_untouched(&victim, &before)?;
    let migration = hosts.source.migrate(&server, victim.pid()).arguments(&["--tcp-close"]).run()?;
    migration.expect_moved().with_context(|| format!("{}; {}", migration.text(), server.log()))?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(10)?;
    victim.finish().map(drop)
}

#[test]
fn connections_of_mptcp_may_stay_behind() -> Result<()> {
    can_only_stay_behind("mptcp", "MPTCP socket 127.0.0.1")
}

#[test]
fn signed_connections_may_stay_behind() -> Result<()> {
    can_only_stay_behind("signed", "TCP_MD5SIG")
}

/// `--tcp-close`: the peers are told, and the process goes on without them.
#[test]
fn connections_may_stay_behind() -> Result<()> {
    let service = Service::start(false)?;
    let mut stream = service.connect(b'h')?;
    service.victim.expect_beats(10)?;
    let server = service.hosts.destination.page_server(&service.hosts.token)?;
    let arguments = ["--tcp-close", "--move-addr", "10.77.0.100"];
    let migration = service.hosts.source.migrate(&server, service.victim.pid()).arguments(&arguments).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    // The address has gone before the connection, and the peer hears of it all the same.
    match stream.read(&mut [0]) {
        Ok(0) => {}
        Ok(_) => bail!("the server speaks"),
        Err(error) => ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "{error}"),
    }
    wait_until("a new client to be served", Duration::from_secs(5), || {
        let mut stream = service.connect(b'e')?;
        stream.write_all(b"x")?;
        Ok(stream.read(&mut [0])? == 1)
    })
}

/// Both ends move: nobody outside has to know.
fn moves_with_itself(address: &str, mode: Mode) -> Result<()> {
    Trip::of("itself", &[address]).run(mode).map(drop)
}

#[test]
fn with_itself_hybrid() -> Result<()> {
    moves_with_itself("127.0.0.1", Mode::Hybrid)
}

#[test]
fn with_itself_post_copy() -> Result<()> {
    moves_with_itself("127.0.0.1", Mode::PostCopy)
}

#[test]
fn with_itself_over_ipv6_stop_and_copy() -> Result<()> {
    moves_with_itself("::1", Mode::StopAndCopy)
}

#[test]
fn every_option_stays_hybrid() -> Result<()> {
    Trip::of("options", &[]).run(Mode::Hybrid).map(drop)
}

#[test]
fn every_option_stays_stop_and_copy() -> Result<()> {
    Trip::of("options", &[]).run(Mode::StopAndCopy).map(drop)
}

#[test]
fn urgent_data_stays_urgent_hybrid() -> Result<()> {
    Trip::of("urgent", &[]).run(Mode::Hybrid).map(drop)
}

#[test]
fn urgent_data_stays_urgent_stop_and_copy() -> Result<()> {
    Trip::of("urgent", &[]).run(Mode::StopAndCopy).map(drop)
}

/// Of so many connections the options are read before the freeze.
#[test]
fn every_option_of_many_connections_stays() -> Result<()> {
    Trip::of("options", &["100"]).run(Mode::Hybrid).map(drop)
}

/// And what is set in the last moment is not lost.
#[test]
fn options_that_are_being_set_stay() -> Result<()> {
    Trip::of("options", &["100", "turn=1", "beat_us=1000"]).run(Mode::PreCopy).map(drop)
}

/// A service on the loopback address of the source stays there, and so does a connection to it.
#[test]
fn a_service_on_loopback_stays_behind() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let listener = hosts.source.listen("127.0.0.1:6300")?;
    let victim = hosts.source.victim("caller", &["127.0.0.1", "127.0.0.1", "6300"])?;
    let (mut stream, peer) = listener.accept()?;
    victim.expect_beats(10)?;
    let before = victim.view()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect(1, &["refused"])?;
    for words in [peer.to_string().as_str(), "127.0.0.1:6300", "on this host, too", "--tcp-close"] {
        ensure!(migration.text().contains(words), "the refusal does not say {words}: {}", migration.text());
    }
    expect_untouched(&victim, &before)?;
    // The way out: the service hears the end of it.
    let migration = hosts.source.migrate(&server, victim.pid()).arguments(&["--tcp-close"]).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut heard = Vec::new();
    match stream.read_to_end(&mut heard) {
        Ok(_) => {}
        Err(error) => ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "{error}"),
    }
    ensure!(heard == b"hello", "heard {heard:?}");
    Ok(())
}

/// A move that is called off inside the freeze gives a process its connections with itself back.
#[test]
fn with_itself_called_off() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let mut victim = hosts.source.victim("itself", &["127.0.0.1", "silent=1"])?;
    victim.expect_beats(10)?;
    let before = victim.view()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    hosts.limit_rate("2mbit")?;
    let mut migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::StopAndCopy).start()?;
    migration.wait_for_event("the freeze", |event| event.get("event").is_some_and(|name| name == "frozen"))?;
    std::thread::sleep(Duration::from_millis(100));
    migration.interrupt()?;
    let migration = migration.finish()?;
    migration.expect(1, &["cancelled"]).with_context(|| server.log())?;
    expect_untouched(&victim, &before).with_context(|| migration.text())?;
    hosts.limit_rate("4gbit")?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(&hosts.destination, &migration)?;
    victim.go()?;
    victim.expect_beats(20)?;
    victim.finish().map(drop)
}

/// What a program has sent before it closed a connection arrives: the move waits for it, and says so when it cannot.
#[test]
fn what_was_sent_before_the_end_arrives() -> Result<()> {
    let path = Path { delay: Duration::from_millis(100), ..Path::default() };
    let service = Service::start_behind(path, false)?;
    let server = service.hosts.destination.page_server(&service.hosts.token)?;
    let mut readers = Vec::new();
    for _ in 0..5 {
        let mut stream = service.connect(b'x')?;
        readers.push(std::thread::spawn(move || -> Result<usize> {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes)?;
            ensure!(bytes == patterned(0, bytes.len()), "wrong bytes");
            Ok(bytes.len())
        }));
    }
    // Nobody reads this one for now, and it is more than fits into what the client takes unread.
    let mut unread = service.connect(b'x')?;
    let migration = service.migrate(&server, Mode::Hybrid)?;
    migration.expect_moved().with_context(|| server.log())?;
    for reader in readers {
        let length = reader.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        ensure!(length > 0, "nothing came");
    }
    let said = migration.text().contains("closed before all was sent");
    unread.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut bytes = Vec::new();
    let whole = unread.read_to_end(&mut bytes).is_ok();
    ensure!(whole != said, "all of it came: {whole}; it was said that not: {said}: {}", migration.text());
    Ok(())
}
