//! Clients on a third host whose UDP server moves with its address: every datagram is answered, once. And what waits in sockets
//! is still there when a move has failed.

use std::net::{SocketAddr, UdpSocket};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Asker, Host, Mode, TwoHosts, expect_untouched, python, wait_until};

const PORT: u16 = 6300;
/// Longest time that an answer takes.
const PATIENCE: Duration = Duration::from_secs(3);

fn with_address(ipv6: bool) -> Result<(TwoHosts, &'static str)> {
    let hosts = TwoHosts::builder().with_clients().build()?;
    let (ip, with_bits) = if ipv6 { ("fd77::100", "fd77::100/128") } else { ("10.77.0.100", "10.77.0.100/32") };
    let mut words = vec!["address", "add", with_bits, "dev", "godwit0"];
    words.extend(ipv6.then_some("nodad"));
    hosts.source.run("ip", &words)?;
    Ok((hosts, ip))
}

fn there_and_back(ipv6: bool, mode: Mode) -> Result<()> {
    let (hosts, ip) = with_address(ipv6)?;
    let mut victim = hosts.source.victim("datagrams", &[ip])?;
    let client = Asker::start(hosts.clients()?, SocketAddr::new(ip.parse()?, PORT))?;
    victim.expect_beats(10)?;
    let servers = [hosts.destination.page_server(&hosts.token)?, hosts.source.page_server(&hosts.token)?];
    for (server, there) in servers.iter().zip([true, false]) {
        let (from, to) = if there { (&hosts.source, &hosts.destination) } else { (&hosts.destination, &hosts.source) };
        let migration = from.migrate(server, victim.pid()).mode(mode).arguments(&["--move-addr", ip]).run()?;
        let story = || format!("{}; page server: {}", migration.text(), server.log());
        migration.expect_moved().with_context(story)?;
        victim.follow(to, &migration).with_context(story)?;
        victim.expect_beats(20).with_context(story)?;
    }
    client.finish()?;
    victim.finish().map(drop)
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
    answered_over_ipv4_hybrid: false, Hybrid;
    answered_over_ipv4_pre_copy: false, PreCopy;
    answered_over_ipv4_post_copy: false, PostCopy;
    answered_over_ipv4_stop_and_copy: false, StopAndCopy;
    answered_over_ipv6_hybrid: true, Hybrid;
    answered_over_ipv6_stop_and_copy: true, StopAndCopy;
}

/// A move that fails inside the freeze: clients see a delay, and the next move works.
#[test]
fn called_off_inside_the_freeze() -> Result<()> {
    let (hosts, ip) = with_address(false)?;
    // Enough for a long freeze at full rate: a slow link would lose answers by itself.
    let mut victim = hosts.source.victim("datagrams", &[ip, "128"])?;
    let client = Asker::start(hosts.clients()?, SocketAddr::new(ip.parse()?, PORT))?;
    victim.expect_beats(10)?;
    let before = victim.view()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut migration = (hosts.source.migrate(&server, victim.pid()))
        .mode(Mode::StopAndCopy)
        .arguments(&["--move-addr", ip])
        .start()?;
    migration.wait_for_event("the freeze", |event| event.get("event").is_some_and(|name| name == "frozen"))?;
    std::thread::sleep(Duration::from_millis(20));
    migration.interrupt()?;
    migration.finish()?.expect(1, &["cancelled"])?;
    expect_untouched(&victim, &before)?;
    let migration = hosts.source.migrate(&server, victim.pid()).arguments(&["--move-addr", ip]).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(20)?;
    client.finish()?;
    victim.finish().map(drop)
}

/// What waits in sockets has only been looked at.
#[test]
fn queues_are_as_they_were_after_a_failure() -> Result<()> {
    let hosts = TwoHosts::builder().rate("20mbit").build()?;
    let victim = hosts.source.victim("datagrams", &[])?;
    victim.expect_beats(10)?;
    let before = victim.view()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::StopAndCopy).start()?;
    migration.wait_for_event("the freeze", |event| event.get("event").is_some_and(|name| name == "frozen"))?;
    std::thread::sleep(Duration::from_millis(50));
    migration.interrupt()?;
    migration.finish()?.expect(1, &["cancelled"])?;
    expect_untouched(&victim, &before)?;
    victim.go()?;
    victim.expect_beats(20)?;
    victim.finish().map(drop)
}

/// An address that the destination does not have is found before anything is touched.
#[test]
fn a_missing_address_is_found_before() -> Result<()> {
    let (hosts, ip) = with_address(false)?;
    let victim = hosts.source.victim("datagrams", &[ip])?;
    victim.expect_beats(10)?;
    let before = victim.view()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect(1, &["refused"])?;
    for words in ["10.77.0.100:6300", "--move-addr"] {
        ensure!(migration.text().contains(words), "the refusal does not say {words}: {}", migration.text());
    }
    expect_untouched(&victim, &before)?;
    victim.finish().map(drop)
}

/// A server that nobody wrote for this, moved between two hosts and back.
fn program_moves(program: &str, arguments: &[&str], check: fn(&Host, SocketAddr) -> Result<()>) -> Result<()> {
    let (hosts, ip) = with_address(false)?;
    let address = SocketAddr::new(ip.parse()?, PORT);
    let output = std::fs::File::create(hosts.directory().join("output"))?;
    let mut command = hosts.source.command(program);
    command.args(arguments).stdout(Stdio::from(output.try_clone()?)).stderr(output);
    let running = hosts.source.start_command(&mut command).with_context(|| format!("{program} is needed"))?;
    std::thread::sleep(Duration::from_millis(500));
    check(hosts.clients()?, address).context("at home")?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let pid = hosts.source.pid_here(running.host_pid())?;
    let migration = hosts.source.migrate(&server, pid).arguments(&["--move-addr", ip]).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    check(hosts.clients()?, address).context("after the move")
}

#[test]
fn an_echo_server_in_python_answers_all_the_time() -> Result<()> {
    const ECHO: &str = "import asyncio\nclass Echo(asyncio.DatagramProtocol):\n    \
        def connection_made(self, transport): self.transport = transport\n    \
        def datagram_received(self, data, address): self.transport.sendto(data, address)\n\
        async def main():\n    \
        await asyncio.get_running_loop().create_datagram_endpoint(Echo, local_addr=('10.77.0.100', 6300))\n    \
        await asyncio.sleep(1000)\n\
        asyncio.run(main())\n";
    let (hosts, ip) = with_address(false)?;
    let output = std::fs::File::create(hosts.directory().join("output"))?;
    let mut command = hosts.source.command(&python()?);
    command.args(["-c", ECHO]).stdout(Stdio::from(output.try_clone()?)).stderr(output);
    let running = hosts.source.start_command(&mut command)?;
    std::thread::sleep(Duration::from_millis(700));
    let client = Asker::start(hosts.clients()?, SocketAddr::new(ip.parse()?, PORT))?;
    std::thread::sleep(Duration::from_millis(300));
    let server = hosts.destination.page_server(&hosts.token)?;
    let pid = hosts.source.pid_here(running.host_pid())?;
    let migration = hosts.source.migrate(&server, pid).arguments(&["--move-addr", ip]).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    std::thread::sleep(Duration::from_millis(300));
    client.finish().with_context(|| migration.text()).map(drop)
}

/// A question for the address of `a.test`, and whether it is answered with 192.0.2.7.
fn resolve(host: &Host, server: SocketAddr) -> Result<()> {
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", host.init_pid()))?;
    let asking = std::thread::spawn(move || -> Result<Vec<u8>> {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(PATIENCE))?;
        // Connected: an answer from another address is none.
        socket.connect(server)?;
        socket.send(b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x04test\x00\x00\x01\x00\x01")?;
        let mut answer = vec![0; 512];
        let length = socket.recv(&mut answer).context("the name server's answer")?;
        answer.truncate(length);
        Ok(answer)
    });
    let answer = asking.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
    ensure!(answer.ends_with(&[192, 0, 2, 7]), "the name server answers {answer:?}");
    Ok(())
}

#[test]
fn a_name_server() -> Result<()> {
    let port = format!("--port={PORT}");
    let arguments = ["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"];
    let more = ["--address=/a.test/192.0.2.7", "--pid-file=", port.as_str(), "--log-facility=-"];
    program_moves("dnsmasq", &[&arguments[..], &more[..]].concat(), resolve)
}

/// Which of several sockets gets what a peer sends is up to the kernel's own secret: that is said.
#[test]
fn sockets_that_share_a_port_are_warned_of() -> Result<()> {
    const PROGRAM: &str = "
import signal, socket
sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
for number, one in enumerate(sockets):
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(('127.0.0.1', 4000 + number // 2))
print('ready', flush=True)
signal.pause()";
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut command = hosts.source.command(&python()?);
    command.args(["-c", PROGRAM]).stdout(Stdio::null()).stderr(Stdio::null());
    let running = hosts.source.start_command(&mut command)?;
    let pid = hosts.source.pid_here(running.host_pid())?;
    wait_until("its sockets", Duration::from_secs(10), || {
        let sockets = hosts.source.run("ss", &["-Hlun", "sport = :4001"])?;
        Ok(!sockets.stdout.trim().is_empty())
    })?;
    let migration = hosts.source.migrate(&server, pid).run()?;
    migration.expect_moved()?;
    let text = migration.text();
    ensure!(text.contains("2 UDP sockets share 127.0.0.1:4000 (SO_REUSEPORT)"), "{text}");
    ensure!(!text.contains("127.0.0.1:4001"), "{text}");
    Ok(())
}
