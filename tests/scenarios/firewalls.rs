//! Hosts whose packet filter goes by what it has seen of a connection, as ordinary ones do.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use godwit_tests::clients::converse;
use godwit_tests::{Host, Mode, TwoHosts, Victim, python, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const ADDRESS: &str = "10.77.0.100";
const PORT: u16 = 6200;
/// Whom the moving process has called itself.
const PEER: &str = "10.77.0.3";
/// Longest time that an answer takes.
const PATIENCE: Duration = Duration::from_secs(3);

/// A strict filter that lets the moving process call its peer.
fn stand_strict_guard(host: &Host) -> Result<()> {
    let more = format!("ip saddr {ADDRESS} ip daddr {PEER} meta mark 7 accept");
    godwit_tests::stand_strict_guard(host, PORT, &more)
}

/// Only what belongs to known connections comes in, new ones to the server, and moves; what makes no sense goes neither in nor out.
fn stand_guard(host: &Host) -> Result<()> {
    let rules = format!(
        "table inet guard {{
            counter senseless {{ }}
            chain in {{
                type filter hook input priority filter; policy drop;
                ct state invalid counter name senseless drop
                ct state established,related accept
                iif lo accept
                meta l4proto icmp accept
                tcp dport {PORT} ct state new accept
                udp dport 7477-7489 accept
            }}
            chain out {{
                type filter hook output priority filter;
                ct state invalid counter name senseless drop
            }}
        }}"
    );
    host.run("nft", &[&rules]).map(drop)
}

fn there_and_back(mode: Mode, stand_guard: [fn(&Host) -> Result<()>; 2]) -> Result<()> {
    let hosts = TwoHosts::builder().with_clients().build()?;
    for (host, stand_guard) in [&hosts.source, &hosts.destination].into_iter().zip(stand_guard) {
        stand_guard(host)?;
    }
    hosts.source.run("ip", &["address", "add", &format!("{ADDRESS}/32"), "dev", "godwit0"])?;
    let mut victim = hosts.source.victim("connections", &[ADDRESS, "reuse=1"])?;
    let address = SocketAddr::new(ADDRESS.parse()?, PORT);
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = Vec::new();
    for _ in 0..8 {
        let mut stream = hosts.clients()?.connect_to(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"e")?;
        let stop = Arc::clone(&stop);
        clients.push(std::thread::spawn(move || converse(stream, &stop)));
    }
    let servers = [hosts.destination.page_server(&hosts.token)?, hosts.source.page_server(&hosts.token)?];
    let mut stories = String::new();
    for (server, there) in servers.iter().zip([true, false]) {
        std::thread::sleep(Duration::from_millis(300));
        let (from, to) = if there { (&hosts.source, &hosts.destination) } else { (&hosts.destination, &hosts.source) };
        let migration = from.migrate(server, victim.pid()).mode(mode).arguments(&["--move-addr", ADDRESS]).run()?;
        migration.expect_moved().with_context(|| server.log())?;
        victim.follow(to, &migration)?;
        stories += &migration.text();
    }
    std::thread::sleep(Duration::from_millis(300));
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        let done = client.join().map_err(|_| anyhow!("a client panicked"))?.with_context(|| stories.clone())?;
        ensure!(done > 0, "a client got nothing done");
    }
    victim.finish().map(drop)
}

#[test]
fn of_a_host_that_it_comes_back_to_hybrid() -> Result<()> {
    there_and_back(Mode::Hybrid, [stand_guard; 2])
}

#[test]
fn of_a_host_that_it_comes_back_to_stop_and_copy() -> Result<()> {
    there_and_back(Mode::StopAndCopy, [stand_guard; 2])
}

#[test]
fn strict_ones_know_what_has_come() -> Result<()> {
    there_and_back(Mode::PreCopy, [stand_strict_guard; 2])
}

#[test]
fn a_strict_one_after_a_host_that_tracks_nothing() -> Result<()> {
    let hosts = TwoHosts::builder().with_clients().build()?;
    stand_strict_guard(&hosts.destination)?;
    let (mut victim, mut stream) = served(&hosts)?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let migration = hosts.source.migrate(&server, victim.pid()).arguments(&["--move-addr", ADDRESS]).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(&hosts.destination, &migration)?;
    converse_once(&mut stream)?;
    victim.finish().map(drop)
}

/// Moves a server whose client comes by a port, from one strict host to another, both with more rules of the same kind.
fn strict_with_more_rules(rules: &str, port: u16) -> Result<()> {
    let hosts = TwoHosts::builder().with_clients().build()?;
    for host in [&hosts.source, &hosts.destination] {
        stand_strict_guard(host)?;
        host.run("nft", &[rules])?;
    }
    let (mut victim, mut stream) = served_at(&hosts, port)?;
    let servers = [hosts.destination.page_server(&hosts.token)?, hosts.source.page_server(&hosts.token)?];
    for (server, [from, to]) in
        servers.iter().zip([[&hosts.source, &hosts.destination], [&hosts.destination, &hosts.source]])
    {
        let migration = from.migrate(server, victim.pid()).arguments(&["--move-addr", ADDRESS]).run()?;
        migration.expect_moved().with_context(|| server.log())?;
        victim.follow(to, &migration)?;
        converse_once(&mut stream).with_context(|| to.name().to_owned())?;
    }
    victim.finish().map(drop)
}

#[test]
fn strict_ones_with_zones() -> Result<()> {
    let rules = format!(
        "table inet zones {{
            chain in {{ type filter hook prerouting priority raw; tcp dport {PORT} ct zone set 5; }}
            chain out {{ type filter hook output priority raw; tcp sport {PORT} ct zone set 5; }}
        }}"
    );
    strict_with_more_rules(&rules, PORT)
}

#[test]
fn strict_ones_that_translate_a_port() -> Result<()> {
    let rules = format!(
        "table inet ways {{
            chain in {{ type nat hook prerouting priority dstnat; tcp dport 80 dnat ip to {ADDRESS}:{PORT}; }}
        }}"
    );
    strict_with_more_rules(&rules, 80)
}

/// Calls from two addresses all the time, and says how many calls from each got in, of how many.
const CALLERS: &str = "import errno, select, socket, sys, time\n\
    calls = {'10.77.0.66': [], '10.77.0.67': []}\n\
    end = time.time() + 1.5\n\
    while time.time() < end:\n    \
        for source, sockets in calls.items():\n        \
            call = socket.socket()\n        \
            call.setblocking(False)\n        \
            call.bind((source, 0))\n        \
            call.connect_ex(('10.77.0.100', 6200))\n        \
            sockets.append(call)\n    \
        time.sleep(0.004)\n\
    time.sleep(2)\n\
    is_in = lambda call: not call.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) and bool(select.select([], [call], [], 0)[1])\n\
    for sockets in calls.values(): print(sum(map(is_in, sockets)), len(sockets))";

/// Requests that are held back in the freeze are let in by the destination's filter, or not, as if they came there.
#[test]
fn whom_one_turns_away_it_turns_away_in_a_move() -> Result<()> {
    let hosts = TwoHosts::builder().with_clients().build()?;
    let turns_away = "table inet more { chain in { type filter hook input priority 10
        iif lo accept
        ip saddr 10.77.0.66 drop
    }
    }";
    for host in [&hosts.source, &hosts.destination] {
        stand_strict_guard(host)?;
        host.run("nft", &[turns_away])?;
    }
    let clients = hosts.clients()?;
    let listed = clients.run("ip", &["-o", "address", "show", "to", PEER])?.stdout;
    let device = listed.split_whitespace().nth(1).context("the clients have no address")?;
    for address in ["10.77.0.66/24", "10.77.0.67/24"] {
        clients.run("ip", &["address", "add", address, "dev", device])?;
    }
    let (victim, mut stream) = served(&hosts)?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let said = std::thread::scope(|scope| -> Result<String> {
        let calling = scope.spawn(|| clients.run("python3", &["-c", CALLERS]));
        // N.B. they call by then.
        std::thread::sleep(Duration::from_millis(500));
        let arguments = ["--move-addr", ADDRESS];
        let migration =
            hosts.source.migrate(&server, victim.pid()).mode(Mode::StopAndCopy).arguments(&arguments).run()?;
        let calling = calling.join().map_err(|_| anyhow!("the callers panicked"))?;
        migration.expect_moved().with_context(|| server.log())?;
        Ok(calling?.stdout)
    })?;
    let counts: Vec<Vec<u32>> = said
        .lines()
        .map(|line| Ok(line.split(' ').map(str::parse).collect::<std::result::Result<_, _>>()?))
        .collect::<Result<_>>()?;
    let [turned_away, let_in] = counts.as_slice() else { bail!("the callers said {said:?}") };
    ensure!(turned_away[0] == 0 && let_in[0] == let_in[1] && let_in[0] > 100, "they got in: {said}");
    converse_once(&mut stream)
}

/// A server at the address, and a client that it has answered.
fn served(hosts: &TwoHosts) -> Result<(Victim, TcpStream)> {
    served_at(hosts, PORT)
}

fn served_at(hosts: &TwoHosts, port: u16) -> Result<(Victim, TcpStream)> {
    hosts.source.run("ip", &["address", "add", &format!("{ADDRESS}/32"), "dev", "godwit0"])?;
    let victim = hosts.source.victim("connections", &[ADDRESS, "reuse=1"])?;
    let mut stream = hosts.clients()?.connect_to(SocketAddr::new(ADDRESS.parse()?, port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"e")?;
    converse_once(&mut stream)?;
    Ok((victim, stream))
}

/// Calls a peer by TCP and twice by UDP, by a connected socket and by one that is not, and from then on only answers.
const CALLER: &str = r#"
import os, select, signal, socket, sys
address, peer = sys.argv[1:]
directory = os.environ["VICTIM_DIR"]
ending = []
signal.signal(signal.SIGTERM, lambda *_: ending.append(True))
def marked(kind, port):
    s = socket.socket(socket.AF_INET, kind)
    s.setsockopt(socket.SOL_SOCKET, 36, 7)
    s.bind((address, port))
    return s
stream, connected, alone = marked(socket.SOCK_STREAM, 0), marked(socket.SOCK_DGRAM, 0), marked(socket.SOCK_DGRAM, 6201)
stream.connect((peer, 6300))
connected.connect((peer, 6301))
connected.send(b"hello")
alone.sendto(b"hello", (peer, 6302))
log = open(directory + "/log", "w")
print("ready", file=log, flush=True)
beats = 0
while not ending:
    for s in select.select([stream, connected, alone], [], [], 0.05)[0]:
        data, sender = s.recvfrom(4096)
        if s is alone:
            s.sendto(data, sender)
        else:
            s.sendall(data)
    beats += 1
    with open(directory + "/status.new", "w") as status:
        print(f"beats={beats} checks={beats} errors=0 largest_gap_us=0", file=status)
    os.rename(directory + "/status.new", directory + "/status")
print("verdict pass", file=log, flush=True)
"#;

#[test]
fn strict_ones_know_what_was_called() -> Result<()> {
    let hosts = TwoHosts::builder().with_clients().build()?;
    let clients = hosts.clients()?;
    let (listener, sockets) =
        (clients.listen("10.77.0.3:6300")?, [clients.udp("10.77.0.3:6301")?, clients.udp("10.77.0.3:6302")?]);
    for host in [&hosts.source, &hosts.destination] {
        stand_strict_guard(host)?;
    }
    hosts.source.run("ip", &["address", "add", &format!("{ADDRESS}/32"), "dev", "godwit0"])?;
    let mut victim = hosts.source.program_victim("caller", &python()?, &["-c", CALLER, ADDRESS, PEER])?;
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    for socket in &sockets {
        socket.set_read_timeout(Some(PATIENCE))?;
        let (_, sender) = socket.recv_from(&mut [0; 64])?;
        socket.connect(sender)?;
    }
    let mut ask = |round: usize| -> Result<()> {
        let mut heard = [0; 8];
        stream.write_all(&round.to_ne_bytes())?;
        stream.read_exact(&mut heard)?;
        ensure!(heard == round.to_ne_bytes(), "something else was heard");
        for (at, socket) in sockets.iter().enumerate() {
            socket.send(&round.to_ne_bytes())?;
            let length = socket.recv(&mut heard).with_context(|| format!("UDP socket {at} in round {round}"))?;
            ensure!(heard[..length] == round.to_ne_bytes(), "something else was heard");
        }
        Ok(())
    };
    // N.B. twice: to the filter they are real conversations then.
    ask(0)?;
    ask(1)?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let migration = hosts.source.migrate(&server, victim.pid()).arguments(&["--move-addr", ADDRESS]).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(&hosts.destination, &migration)?;
    ask(2).with_context(|| migration.text())?;
    victim.finish().map(drop)
}

/// A move that fails leaves nothing tracked at the destination.
#[test]
fn nothing_is_tracked_of_what_has_not_come() -> Result<()> {
    let hosts = TwoHosts::builder().with_clients().build()?;
    for host in [&hosts.source, &hosts.destination] {
        stand_strict_guard(host)?;
    }
    let (victim, mut stream) = served(&hosts)?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let arguments = ["--move-addr", ADDRESS, "--reconnect-for", "1"];
    let moving = hosts.source.migrate(&server, victim.pid()).arguments(&arguments).pause_at("collect").start()?;
    let tracked = || -> Result<bool> {
        let table = hosts.destination.run("cat", &["/proc/net/nf_conntrack"])?.stdout;
        Ok(table.lines().any(|line| line.contains(&format!("dst={ADDRESS}")) && line.contains("ESTABLISHED")))
    };
    wait_until("it is known there in advance", PATIENCE, tracked)?;
    let agent = hosts.source.processes()?.into_iter().find(|(_, name)| name == "godwit-agent");
    let (agent, _) = agent.context("nobody is at work")?;
    kill(Pid::from_raw(agent as i32), Signal::SIGKILL)?;
    wait_until("it is not known there any more", Duration::from_secs(20), || Ok(!tracked()?))?;
    moving.finish()?;
    // It goes on where it was.
    converse_once(&mut stream)?;
    victim.finish().map(drop)
}

fn converse_once(stream: &mut TcpStream) -> Result<()> {
    let mut heard = [0; 5];
    stream.write_all(b"still")?;
    stream.read_exact(&mut heard)?;
    ensure!(&heard == b"still", "something else was heard");
    Ok(())
}
