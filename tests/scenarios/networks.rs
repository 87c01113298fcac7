//! Processes with a network namespace of their own: it is made again at the destination, and clients on a third host notice a
//! delay and nothing else.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::clients::{PATIENCE, converse};
use godwit_tests::{Asker, Host, Migration, Mode, PageServer, TwoHosts, Victim, expect_untouched, wait_until};
use nix::sys::signal::Signal;

const PORT: u16 = 6200;
/// Bytes that a server does not read: less than its buffer.
const HELD: usize = 40_000;
/// The bridge of each host.
const BRIDGE: &str = "br0";

/// What the namespace of a server has besides its loopback interface.
const FURNISH: &str = "
    ip link set lo up
    ip link add eth0 type veth peer name own0 netns 1
    nsenter -t 1 -n ip link set own0 master br0 up
    echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad
    ip link set eth0 mtu 1400 address 02:00:00:00:01:00 up
    ip addr add 10.77.0.100/24 dev eth0
    ip addr add fd77::100/64 dev eth0 nodad
    ip route add default via 10.77.0.3
    ip route add 10.66.0.0/16 dev eth0 table 66
    ip rule add from 10.77.0.100 to 10.66.0.0/16 table 66
    echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
    ip link add inner0 type bridge
    ip link add inner1 type veth peer name inner2
    ip link set inner1 master inner0 up
    ip link set inner2 up
    ip link set inner0 up
    ip addr add 192.168.5.1/24 dev inner0
    echo 1 > /proc/sys/net/ipv4/ip_forward
    echo 99 > /proc/sys/net/core/somaxconn
    nft add table inet own
    nft add chain inet own in '{ type filter hook input priority filter; policy drop; }'
    nft add rule inet own in iif lo accept
    nft add rule inet own in ct state established accept
    nft add rule inet own in tcp dport 6200 ct state new counter accept
    nft add rule inet own in meta l4proto ipv6-icmp accept
";

/// A server in a network namespace of its own, and clients on a third host.
struct Service {
    hosts: TwoHosts,
    victim: Victim,
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Result<u64>>>,
}

/// Puts the interface of a host into a bridge, which has its addresses from now on. It does not call the packet filter: packets that
/// it has shown there are not tracked in a namespace that has a bridge of its own and a macvlan of this one.
fn bridge(host: &Host) -> Result<()> {
    let address = host.address();
    let last = address.rsplit('.').next().unwrap_or_default();
    let script = format!(
        "ip link add {BRIDGE} type bridge; ip addr del {address}/24 dev godwit0; ip link set godwit0 master {BRIDGE}; \
         ip addr add {address}/24 dev {BRIDGE}; ip link set {BRIDGE} address 02:00:00:00:00:0{last}; ip link set {BRIDGE} mtu 1400 up; \
         for family in ip ip6; do f=/proc/sys/net/bridge/bridge-nf-call-${{family}}tables; test ! -e $f || echo 0 > $f; done"
    );
    host.run("sh", &["-e", "-c", &script]).map(drop)
}

impl Service {
    fn start() -> Result<Self> {
        let hosts = TwoHosts::builder().with_clients().build()?;
        bridge(&hosts.source)?;
        bridge(&hosts.destination)?;
        let victim = hosts.source.victim_in_own_network(FURNISH, "connections", &["::"])?;
        let mut service = Self { hosts, victim, stop: Arc::default(), clients: Vec::new() };
        for address in ["10.77.0.100", "fd77::100"].repeat(4) {
            let mut stream = service.connect(address)?;
            stream.write_all(b"e")?;
            let stop = Arc::clone(&service.stop);
            service.clients.push(std::thread::spawn(move || converse(stream, &stop)));
        }
        service.victim.expect_beats(10)?;
        Ok(service)
    }

    fn connect(&self, address: &str) -> Result<TcpStream> {
        let stream = self.hosts.clients()?.connect_to(SocketAddr::new(address.parse()?, PORT))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// What `ip` and `nft` say of the namespace, without what counts and ages.
    fn describe(&self) -> Result<String> {
        let script = "ip -br addr | sed 's/@[^ ]*//'; ip -br link | sed 's/@[^ ]*//'; ip route show table all; ip -6 route; ip rule; ip -6 rule; \
             nft list ruleset | sed 's/counter packets [0-9]* bytes [0-9]*/counter/'; \
             cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/core/somaxconn";
        let pid = self.victim.host_pid().to_string();
        let output = std::process::Command::new("nsenter").args(["-t", &pid, "-n", "sh", "-c", script]).output()?;
        // A macvlan does not know whether it is up.
        let text = String::from_utf8_lossy(&output.stdout).replace("UNKNOWN", "UP     ");
        ensure!(text.contains("10.77.0.100") && text.contains("table inet own"), "{text}{output:?}");
        Ok(text)
    }

    fn migrate(&self, from: &Host, server: &PageServer, mode: Mode, joint: &str) -> Result<Migration> {
        from.migrate(server, self.victim.pid()).mode(mode).arguments(&["--net", joint]).run()
    }

    fn finish(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            let said = client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            ensure!(said.with_context(|| self.victim.log())? > 0, "a client got nothing done");
        }
        self.victim.finish().map(drop)
    }
}

fn there_and_back(mode: Mode, joints: [&str; 2]) -> Result<()> {
    let mut service = Service::start()?;
    let expected = service.describe()?;
    let servers = [
        service.hosts.destination.page_server(&service.hosts.token)?,
        service.hosts.source.page_server(&service.hosts.token)?,
    ];
    for (number, (server, joint)) in servers.iter().zip(joints).enumerate() {
        let (from, to) = match number {
            0 => (&service.hosts.source, &service.hosts.destination),
            _ => (&service.hosts.destination, &service.hosts.source),
        };
        let migration = service.migrate(from, server, mode, joint)?;
        let story = || format!("{}; page server: {}", migration.text(), server.log());
        migration.expect_moved().with_context(story)?;
        service.victim.follow(to, &migration).with_context(story)?;
        service.victim.expect_beats(30).with_context(story)?;
        let found = service.describe()?;
        let differing = |one: &str, other: &str| -> Vec<String> {
            one.lines().filter(|line| !other.lines().any(|same| same == *line)).map(str::to_owned).collect()
        };
        let (gone, come) = (differing(&expected, &found), differing(&found, &expected));
        ensure!(gone.is_empty() && come.is_empty(), "gone from its network: {gone:#?}, come: {come:#?}");
        // Who comes anew gets in.
        for address in ["10.77.0.100", "fd77::100"] {
            let mut stream = service.connect(address).with_context(story)?;
            stream.write_all(b"ehello")?;
            let mut heard = [0; 5];
            stream.read_exact(&mut heard)?;
        }
    }
    service.finish()
}

#[test]
fn by_a_bridge_hybrid() -> Result<()> {
    there_and_back(Mode::Hybrid, ["veth=br0", "eth0:veth=br0"])
}

#[test]
fn by_a_bridge_post_copy() -> Result<()> {
    there_and_back(Mode::PostCopy, ["veth=br0", "veth=br0"])
}

#[test]
fn by_a_macvlan_and_back_by_a_bridge() -> Result<()> {
    there_and_back(Mode::Hybrid, ["macvlan=br0", "veth=br0"])
}

/// The init that was made for its PID namespace is in its network namespace as well, and in nobody's way.
#[test]
fn on_from_where_its_pid_was_taken() -> Result<()> {
    let mut service = Service::start()?;
    let there = service.hosts.destination.page_server(&service.hosts.token)?;
    let back = service.hosts.source.page_server(&service.hosts.token)?;
    for (server, home, arguments) in
        [(&there, false, &["--net", "veth=br0", "--new-pidns"][..]), (&back, true, &["--net", "veth=br0"])]
    {
        let hosts = &service.hosts;
        let (from, to) = if home { (&hosts.destination, &hosts.source) } else { (&hosts.source, &hosts.destination) };
        let migration = from.migrate(server, service.victim.pid()).arguments(arguments).run()?;
        migration.expect_moved().with_context(|| server.log())?;
        service.victim.follow(to, &migration)?;
        service.victim.expect_beats(20)?;
    }
    service.finish()
}

/// Into a namespace that was prepared at the destination, and not plugged in yet.
#[test]
fn into_a_prepared_namespace() -> Result<()> {
    let mut service = Service::start()?;
    let script = "
        mkdir -p /run/netns && mount -t tmpfs none /run/netns
        ip netns add blue
        ip link add plug0 type veth peer name eth0 netns blue
        ip link set plug0 master br0
        ip -n blue link set lo up
        ip netns exec blue sh -c 'echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad'
        ip -n blue link set eth0 mtu 1400 address 02:00:00:00:01:00 up
        ip -n blue addr add 10.77.0.100/24 dev eth0
    ";
    service.hosts.destination.run("sh", &["-e", "-c", script])?;
    let server = service.hosts.destination.page_server(&service.hosts.token)?;
    let before = service.victim.view()?;
    let migration = service.migrate(&service.hosts.source, &server, Mode::Hybrid, "ns:blue")?;
    migration.expect(1, &["refused"])?;
    ensure!(migration.text().contains("fd77::100"), "the missing address is not named: {}", migration.text());
    expect_untouched(&service.victim, &before)?;

    let blue = |words: &str| {
        let words: Vec<&str> = ["-n", "blue"].into_iter().chain(words.split(' ')).collect();
        service.hosts.destination.run("ip", &words)
    };
    blue("addr add fd77::100/64 dev eth0 nodad")?;
    // As a namespace is that a process has left.
    blue("link set eth0 down")?;
    let migration = service.migrate(&service.hosts.source, &server, Mode::Hybrid, "ns:blue")?;
    migration.expect(1, &["refused"])?;
    ensure!(migration.text().contains("interface eth0: it is down"), "{}", migration.text());
    expect_untouched(&service.victim, &before)?;

    blue("link set eth0 up")?;
    blue("addr replace fd77::100/64 dev eth0 nodad")?;
    let migration = service.migrate(&service.hosts.source, &server, Mode::Hybrid, "ns:blue")?;
    let story = || format!("{}; page server: {}", migration.text(), server.log());
    migration.expect_moved().with_context(story)?;
    service.victim.follow(&service.hosts.destination, &migration).with_context(story)?;
    service.victim.expect_beats(30).with_context(story)?;
    let same = "test /proc/$1/ns/net -ef /run/netns/blue";
    service.hosts.destination.run("sh", &["-c", same, "sh", &service.victim.pid().to_string()])?;
    service.finish()
}

/// A move that fails inside the freeze: the namespace at the source goes on, nothing is left of the other, and the next move
/// works.
fn called_off(signal_to_agent: Option<Signal>) -> Result<()> {
    let mut service = Service::start()?;
    let mut server = service.hosts.destination.page_server(&service.hosts.token)?;
    // Something to send inside the freeze.
    let mut unread: Vec<TcpStream> = (0..8).map(|_| service.connect("10.77.0.100")).collect::<Result<_>>()?;
    for stream in &mut unread {
        stream.write_all(b"h")?;
        stream.write_all(&[0; HELD])?;
    }
    service.victim.expect_beats(5)?;
    let (before, network) = (service.victim.view()?, service.describe()?);
    service.hosts.limit_rate("2mbit")?;
    let mut migration = (service.hosts.source.migrate(&server, service.victim.pid()))
        .mode(Mode::StopAndCopy)
        .arguments(&["--net", "veth=br0"])
        .start()?;
    migration.wait_for_event("the freeze", |event| event.get("event").is_some_and(|name| name == "frozen"))?;
    std::thread::sleep(Duration::from_millis(100));
    match signal_to_agent {
        Some(signal) => migration.process().signal(signal)?,
        None => server.kill()?,
    }
    let finished = migration.finish();
    let story =
        || format!("{}; page server: {}", finished.as_ref().map_or(String::new(), |it| it.text()), server.log());
    expect_untouched(&service.victim, &before).with_context(story)?;
    let now = service.describe()?;
    ensure!(network == now, "the network was\n{network}\nand is\n{now}");
    service.hosts.limit_rate("4gbit")?;
    // A page server hears at once that it is over, but for an agent that was killed: then its link has to time out.
    if signal_to_agent != Some(Signal::SIGKILL) {
        wait_until("nothing to be left at the destination", Duration::from_secs(10), || {
            let links = service.hosts.destination.run("ip", &["-br", "link"])?.stdout;
            Ok(!links.contains("gw"))
        })?;
    }
    let server = match signal_to_agent {
        Some(_) => server,
        None => service.hosts.destination.page_server(&service.hosts.token)?,
    };
    let migration = service.migrate(&service.hosts.source, &server, Mode::Hybrid, "veth=br0")?;
    migration.expect_moved().with_context(|| server.log())?;
    service.victim.follow(&service.hosts.destination, &migration)?;
    service.victim.expect_beats(20)?;
    service.finish()
}

#[test]
fn called_off_by_the_user() -> Result<()> {
    called_off(Some(Signal::SIGINT))
}

#[test]
fn called_off_as_the_agent_is_killed() -> Result<()> {
    called_off(Some(Signal::SIGKILL))
}

#[test]
fn called_off_as_the_page_server_is_killed() -> Result<()> {
    called_off(None)
}

/// What cannot go on is refused by name before anything is touched, with the way out.
#[test]
fn what_leads_nowhere_is_found_before() -> Result<()> {
    let service = Service::start()?;
    let (before, network) = (service.victim.view()?, service.describe()?);
    let server = service.hosts.destination.page_server(&service.hosts.token)?;
    for (wish, words) in [
        ("", "--net veth=BRIDGE"),
        ("veth=nothing0", "no interface nothing0"),
        ("veth=godwit0", "is no bridge"),
        ("macvlan=godwit0", "is a port of another one"),
        ("eth1:veth=br0", "no interface eth1"),
        ("ns:nothing", "nothing: opening it"),
    ] {
        let arguments: &[&str] = if wish.is_empty() { &[] } else { &["--net", wish] };
        let migration = service.hosts.source.migrate(&server, service.victim.pid()).arguments(arguments).run()?;
        migration.expect(1, &["refused"])?;
        ensure!(migration.text().contains(words), "the refusal does not say {words}: {}", migration.text());
    }
    // Who shares it stays behind without a network.
    let pid = service.victim.host_pid().to_string();
    let mut other =
        std::process::Command::new("nsenter").args(["-t", &pid, "-n", "-p", "-m", "sleep", "60"]).spawn()?;
    std::thread::sleep(Duration::from_millis(200));
    let migration = service.migrate(&service.hosts.source, &server, Mode::Hybrid, "veth=br0")?;
    other.kill()?;
    other.wait()?;
    migration.expect(1, &["refused"])?;
    ensure!(migration.text().contains("sleep"), "the refusal does not name who shares it: {}", migration.text());
    expect_untouched(&service.victim, &before)?;
    ensure!(service.describe()? == network);
    service.finish()
}

/// A UDP server in a namespace of its own answers every datagram, and once.
fn datagrams_in_own_network(address: &str, mode: Mode, joints: [&str; 2]) -> Result<()> {
    let hosts = TwoHosts::builder().with_clients().build()?;
    bridge(&hosts.source)?;
    bridge(&hosts.destination)?;
    // Long datagrams are cut where they are sent: a bridge does not.
    hosts.clients()?.run("ip", &["link", "set", "bridge0", "mtu", "1400"])?;
    let furnish = format!("{FURNISH}\n    nft add rule inet own in udp dport 6300 accept");
    let mut victim = hosts.source.victim_in_own_network(&furnish, "datagrams", &[address])?;
    victim.expect_beats(10)?;
    let client = Asker::start(hosts.clients()?, SocketAddr::new(address.parse()?, 6300))?;
    victim.expect_beats(20)?;
    let servers = [hosts.destination.page_server(&hosts.token)?, hosts.source.page_server(&hosts.token)?];
    let mut stories = String::new();
    for (number, (server, joint)) in servers.iter().zip(joints).enumerate() {
        let (from, to) = match number {
            0 => (&hosts.source, &hosts.destination),
            _ => (&hosts.destination, &hosts.source),
        };
        let migration = from.migrate(server, victim.pid()).mode(mode).arguments(&["--net", joint]).run()?;
        let story = || format!("{}; page server: {}", migration.text(), server.log());
        migration.expect_moved().with_context(story)?;
        victim.follow(to, &migration).with_context(story)?;
        victim.expect_beats(30).with_context(story)?;
        stories += &story();
    }
    let asked = client.finish().context(stories)?;
    ensure!(asked > 300, "only {asked} questions were asked");
    victim.finish().map(drop)
}

#[test]
fn datagrams_by_a_bridge_hybrid() -> Result<()> {
    datagrams_in_own_network("10.77.0.100", Mode::Hybrid, ["veth=br0", "veth=br0"])
}

#[test]
fn datagrams_by_a_bridge_over_ipv6() -> Result<()> {
    datagrams_in_own_network("fd77::100", Mode::StopAndCopy, ["veth=br0", "macvlan=br0"])
}

/// A process without any network but a loopback interface needs no word about it.
#[test]
fn a_namespace_that_leads_nowhere() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let mut victim = hosts.source.victim_in_own_network("ip link set lo up", "listeners", &[])?;
    victim.expect_beats(10)?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let migration = hosts.source.migrate(&server, victim.pid()).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(10)?;
    victim.finish().map(drop)
}

/// Says something and hears it back, again and again. Returns the longest wait.
fn converse_timed(mut stream: TcpStream, stop: &AtomicBool) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let begun = std::time::Instant::now();
        stream.write_all(b"hello")?;
        stream.read_exact(&mut [0; 5])?;
        longest = longest.max(begun.elapsed());
        std::thread::sleep(Duration::from_millis(4));
    }
    Ok(longest)
}

/// A filter that drops what makes no sense to it finds sense in what comes after the move, whatever was under way in the freeze.
#[test]
fn a_filter_that_drops_what_is_invalid() -> Result<()> {
    /// A peer's shortest timer, and some more: whoever waits longer has had something dropped.
    const SHORT: Duration = Duration::from_millis(600);
    const MOVES: usize = 4;
    let mut service = Service::start()?;
    let rule = "insert rule inet own in ct state invalid counter drop";
    let nft = |service: &Service, rule: &str| -> Result<String> {
        let pid = service.victim.host_pid().to_string();
        let output = std::process::Command::new("nsenter").args(["-t", &pid, "-n", "nft", rule]).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    nft(&service, rule)?;
    let servers = [
        service.hosts.destination.page_server(&service.hosts.token)?,
        service.hosts.source.page_server(&service.hosts.token)?,
    ];
    for number in 0..MOVES {
        let there = number % 2 == 0;
        let (from, to) = match there {
            true => (&service.hosts.source, &service.hosts.destination),
            false => (&service.hosts.destination, &service.hosts.source),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let mut clients = Vec::new();
        for address in ["10.77.0.100", "fd77::100"].repeat(6) {
            let mut stream = service.connect(address)?;
            stream.write_all(b"e")?;
            let stop = Arc::clone(&stop);
            clients.push(std::thread::spawn(move || converse_timed(stream, &stop)));
        }
        std::thread::sleep(Duration::from_millis(100));
        let migration = service.migrate(from, &servers[usize::from(!there)], Mode::Hybrid, "veth=br0")?;
        migration.expect_moved()?;
        service.victim.follow(to, &migration)?;
        std::thread::sleep(SHORT);
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            let longest = client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
            ensure!(longest < SHORT, "move {number}: a client waited for {longest:?}");
        }
        let rules = nft(&service, "list ruleset")?;
        let dropped = rules.lines().find(|line| line.contains("ct state invalid")).context("the rule is gone")?;
        ensure!(dropped.contains("packets 0 "), "move {number}: {dropped}");
    }
    service.finish()
}
