//! Connections that get another address on the way: a router translates a service address to that of the host that has it. And
//! connections that are handed to another program while their process stays.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::clients::{PATIENCE, caller, converse, download, finish_upload, patterned, upload};
use godwit_tests::{
    Asker, Host, Migration, Mode, PageServer, PageServerOptions, Running, RunningMigration, TwoHosts, Victim,
    expect_untouched, stand_strict_guard, wait_for, wait_until,
};

const PORT: u16 = 6200;

/// Addresses of one family: as the source has it, as the destination does, and as clients know it.
#[derive(Clone, Copy)]
struct Family {
    source: &'static str,
    destination: &'static str,
    service: &'static str,
    /// What nft(8) calls it.
    word: &'static str,
}

const IPV4: Family = Family { source: "10.78.1.2", destination: "10.78.2.2", service: "10.78.9.9", word: "ip" };
const IPV6: Family = Family { source: "fd78:1::2", destination: "fd78:2::2", service: "fd78:9::9", word: "ip6" };

/// Has the router translate the service address to one host's. What either of them sends comes from the service address.
fn translate(hosts: &TwoHosts, family: Family, to: &str) -> Result<()> {
    let Family { source, destination, service, word } = family;
    let script = format!(
        "table {word} service
         delete table {word} service
         table {word} service {{
           chain to {{
             type filter hook prerouting priority raw
             {word} daddr {service} {word} daddr set {to}
           }}
           chain from {{
             type filter hook postrouting priority raw
             {word} saddr {{ {source}, {destination} }} tcp sport {PORT} {word} saddr set {service}
             {word} saddr {{ {source}, {destination} }} meta l4proto udp {word} saddr set {service}
           }}
         }}"
    );
    hosts.router()?.run("nft", &[&script]).map(drop)
}

/// Tables of the packet filter on a host.
fn tables(host: &Host) -> Result<String> {
    Ok(host.run("nft", &["list", "tables"])?.stdout)
}

/// A server behind a router, and its clients.
struct Service {
    hosts: TwoHosts,
    family: Family,
    victim: Victim,
    stop: Arc<AtomicBool>,
    busy: Vec<(&'static str, JoinHandle<Result<u64>>)>,
}

impl Service {
    fn start(family: Family) -> Result<Self> {
        Self::start_on(TwoHosts::builder().with_router().build()?, family)
    }

    fn start_on(hosts: TwoHosts, family: Family) -> Result<Self> {
        translate(&hosts, family, family.source)?;
        let victim = hosts.source.victim("connections", &[family.source])?;
        let mut service = Self { hosts, family, victim, stop: Arc::default(), busy: Vec::new() };
        for _ in 0..5 {
            service.employ("conversation", b'e', converse)?;
        }
        service.employ("download", b'g', download)?;
        service.employ("upload", b'c', upload)?;
        service.employ_callers(2)?;
        service.victim.expect_beats(20)?;
        Ok(service)
    }

    fn address(&self) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.family.service.parse::<IpAddr>()?, PORT))
    }

    fn employ(
        &mut self,
        what: &'static str,
        purpose: u8,
        work: fn(TcpStream, &AtomicBool) -> Result<u64>,
    ) -> Result<()> {
        let mut stream = self.hosts.clients()?.connect_to(self.address()?)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(&[purpose])?;
        let stop = Arc::clone(&self.stop);
        self.busy.push((what, std::thread::spawn(move || work(stream, &stop))));
        Ok(())
    }

    /// Clients who call again and again.
    fn employ_callers(&mut self, number: usize) -> Result<()> {
        for _ in 0..number {
            let caller = caller(self.hosts.clients()?, self.address()?, Arc::clone(&self.stop))?;
            self.busy.push(("caller", caller));
        }
        Ok(())
    }

    fn start_move(&self, server: &PageServer, mode: Mode) -> Result<RunningMigration> {
        let map = format!("{}={}", self.family.source, self.family.destination);
        let migrate = self.hosts.source.migrate(server, self.victim.pid()).mode(mode);
        migrate.arguments(&["--map-addr", &map, "--forward", "2"]).start()
    }

    fn expect_arrived(&mut self, migration: &Migration, server: &PageServer) -> Result<()> {
        let story = format!("{}; page server: {}", migration.text(), server.log());
        migration.expect_moved().with_context(|| story.clone())?;
        self.victim.follow(&self.hosts.destination, migration).with_context(|| story.clone())?;
        self.victim.expect_beats(50).with_context(|| story).map(drop)
    }

    /// Ends all clients and the server; none may have seen anything wrong.
    fn finish(mut self) -> Result<()> {
        for host in [&self.hosts.source, &self.hosts.destination] {
            let left = tables(host)?;
            ensure!(!left.contains("godwit"), "{} has tables left: {left}", host.name());
        }
        self.stop.store(true, Ordering::Relaxed);
        for (what, client) in self.busy.drain(..) {
            let done = client.join().map_err(|_| anyhow::anyhow!("a {what} panicked"))?;
            let done = done.with_context(|| format!("a {what}; the server: {}", self.victim.log()))?;
            ensure!(done > 0, "a {what} got nothing done");
        }
        self.victim.finish().map(drop)
    }
}

fn is_event(name: &'static str) -> impl Fn(&serde_json::Value) -> bool {
    move |event| event.get("event").is_some_and(|event| event == name)
}

/// When the router sends packets to the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Switch {
    /// Inside the freeze: they come before their connections.
    Early,
    /// When the process has run there for a while: they still come to the source.
    Late,
}

fn moved_and_translated(family: Family, mode: Mode, switch: Switch) -> Result<()> {
    move_translated(Service::start(family)?, mode, switch)
}

fn move_translated(mut service: Service, mode: Mode, switch: Switch) -> Result<()> {
    let family = service.family;
    let server = service.hosts.destination.page_server(&service.hosts.token)?;
    if switch == Switch::Early {
        // Long enough a freeze.
        service.hosts.limit_rate("30mbit")?;
    }
    let mut migration = service.start_move(&server, mode)?;
    let event = if switch == Switch::Early { "frozen" } else { "running" };
    migration.wait_for_event(event, is_event(event))?;
    std::thread::sleep(Duration::from_millis(if switch == Switch::Early { 0 } else { 300 }));
    translate(&service.hosts, family, family.destination)?;
    let migration = migration.finish()?;
    service.expect_arrived(&migration, &server)?;
    service.finish()
}

macro_rules! moved_and_translated {
    ($($name:ident: $family:ident, $mode:ident, $switch:ident;)*) => {$(
        #[test]
        fn $name() -> Result<()> {
            moved_and_translated($family, Mode::$mode, Switch::$switch)
        }
    )*};
}

moved_and_translated! {
    translated_early_over_ipv4: IPV4, StopAndCopy, Early;
    translated_early_over_ipv6: IPV6, StopAndCopy, Early;
    translated_early_hybrid: IPV4, Hybrid, Early;
    translated_late_over_ipv4: IPV4, Hybrid, Late;
    translated_late_over_ipv6: IPV6, PostCopy, Late;
}

/// Both hosts' filters only know connections by what they have seen of them, or were told: under the address that each has there.
fn translated_behind_strict_filters(family: Family) -> Result<()> {
    let hosts = TwoHosts::builder().with_router().build()?;
    for host in [&hosts.source, &hosts.destination] {
        stand_strict_guard(host, PORT, "")?;
    }
    move_translated(Service::start_on(hosts, family)?, Mode::Hybrid, Switch::Late)
}

#[test]
fn translated_behind_strict_filters_over_ipv4() -> Result<()> {
    translated_behind_strict_filters(IPV4)
}

#[test]
fn translated_behind_strict_filters_over_ipv6() -> Result<()> {
    translated_behind_strict_filters(IPV6)
}

/// A UDP server whose datagrams are translated: those that still come to the source are sent after it, each once.
fn datagrams_follow(family: Family, bound_to: &str, mode: Mode) -> Result<()> {
    let hosts = TwoHosts::builder().with_router().build()?;
    translate(&hosts, family, family.source)?;
    // Nobody sends a datagram again that was lost because the network did not know its way yet.
    let networks = if family.source.contains(':') { "fd78:" } else { "10.78." };
    for (number, host) in (1..).zip([&hosts.source, &hosts.destination, hosts.clients()?]) {
        let router = format!("{networks}{number}{}1", if networks.contains(':') { "::" } else { "." });
        let refused = host.connect_to(SocketAddr::new(router.parse()?, 9)).is_err();
        ensure!(refused, "the router serves port 9");
    }
    let mut victim = hosts.source.victim("datagrams", &[bound_to])?;
    let server = SocketAddr::new(family.service.parse()?, 6300);
    let clients = (0..2).map(|_| Asker::start(hosts.clients()?, server)).collect::<Result<Vec<_>>>()?;
    victim.expect_beats(20)?;
    let destination = hosts.destination.page_server(&hosts.token)?;
    let map = format!("{}={}", family.source, family.destination);
    let arguments = ["--map-addr", &map, "--forward", "2"];
    let mut migration = hosts.source.migrate(&destination, victim.pid()).mode(mode).arguments(&arguments).start()?;
    migration.wait_for_event("running", is_event("running"))?;
    std::thread::sleep(Duration::from_millis(300));
    translate(&hosts, family, family.destination)?;
    let migration = migration.finish()?;
    let story = || format!("{}; page server: {}", migration.text(), destination.log());
    migration.expect_moved().with_context(story)?;
    victim.follow(&hosts.destination, &migration).with_context(story)?;
    victim.expect_beats(30).with_context(story)?;
    for client in clients {
        let asked = client.finish().with_context(story)?;
        ensure!(asked > 300, "only {asked} questions were asked");
    }
    victim.finish().map(drop)
}

#[test]
fn datagrams_follow_over_ipv4() -> Result<()> {
    datagrams_follow(IPV4, IPV4.source, Mode::Hybrid)
}

#[test]
fn datagrams_follow_over_ipv6() -> Result<()> {
    datagrams_follow(IPV6, IPV6.source, Mode::StopAndCopy)
}

/// A socket that takes what is sent to any address has none that could be mapped, but its packets have.
#[test]
fn datagrams_follow_to_any_address() -> Result<()> {
    datagrams_follow(IPV4, "0.0.0.0", Mode::Hybrid)
}

/// There with another address, and back with the first.
#[test]
fn translated_there_and_back() -> Result<()> {
    let mut service = Service::start(IPV4)?;
    let there = service.hosts.destination.page_server(&service.hosts.token)?;
    let mut migration = service.start_move(&there, Mode::Hybrid)?;
    migration.wait_for_event("running", is_event("running"))?;
    translate(&service.hosts, IPV4, IPV4.destination)?;
    let migration = migration.finish()?;
    service.expect_arrived(&migration, &there)?;

    let back = service.hosts.source.page_server(&service.hosts.token)?;
    let map = format!("{}={}", IPV4.destination, IPV4.source);
    let migrate = service.hosts.destination.migrate(&back, service.victim.pid());
    let mut migration = migrate.arguments(&["--map-addr", &map, "--forward", "2"]).start()?;
    migration.wait_for_event("running", is_event("running"))?;
    translate(&service.hosts, IPV4, IPV4.source)?;
    let migration = migration.finish()?;
    migration.expect_moved().with_context(|| back.log())?;
    service.victim.follow(&service.hosts.source, &migration)?;
    service.victim.expect_beats(50)?;
    service.finish()
}

/// A move that fails inside the freeze, after the router had switched and had switched back.
fn called_off(kill_server: bool) -> Result<()> {
    let mut service = Service::start(IPV4)?;
    let mut server = service.hosts.destination.page_server(&service.hosts.token)?;
    service.hosts.limit_rate("2mbit")?;
    let mut migration = service.start_move(&server, Mode::StopAndCopy)?;
    migration.wait_for_event("the freeze", is_event("frozen"))?;
    translate(&service.hosts, IPV4, IPV4.destination)?;
    std::thread::sleep(Duration::from_millis(50));
    translate(&service.hosts, IPV4, IPV4.source)?;
    if kill_server {
        let prepared = tables(&service.hosts.destination)?;
        ensure!(prepared.contains("godwit"), "nothing was prepared at the destination: {prepared}");
        server.kill()?;
        let left = tables(&service.hosts.destination)?;
        ensure!(!left.contains("godwit"), "a page server that was killed leaves {left}");
    } else {
        migration.interrupt()?;
    }
    let migration = migration.finish()?;
    let story = format!("{}; page server: {}", migration.text(), server.log());
    migration.expect(1, &[if kill_server { "failed" } else { "cancelled" }]).with_context(|| story.clone())?;
    service.victim.expect_beats(20).with_context(|| story)?;

    service.hosts.limit_rate("4gbit")?;
    let server = if kill_server { service.hosts.destination.page_server(&service.hosts.token)? } else { server };
    let mut migration = service.start_move(&server, Mode::Hybrid)?;
    migration.wait_for_event("running", is_event("running"))?;
    translate(&service.hosts, IPV4, IPV4.destination)?;
    let migration = migration.finish()?;
    service.expect_arrived(&migration, &server)?;
    service.finish()
}

#[test]
fn translated_and_called_off_by_the_user() -> Result<()> {
    called_off(false)
}

#[test]
fn translated_and_called_off_as_the_page_server_is_killed() -> Result<()> {
    called_off(true)
}

/// What cannot be translated is refused by name before anything is touched.
#[test]
fn translations_are_checked_before() -> Result<()> {
    let hosts = TwoHosts::builder().with_router().build()?;
    let victim = hosts.source.victim("connections", &[IPV4.source])?;
    victim.expect_beats(10)?;
    let before = victim.view()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    for (arguments, words) in [
        (&["--map-addr", "10.78.1.7=10.78.2.2"][..], &["no socket of the process uses 10.78.1.7", IPV4.source][..]),
        (&["--map-addr", "10.78.1.2=10.78.2.7"], &["10.78.2.7:6200", "does not have"]),
        (&["--map-addr", "10.78.1.2=10.78.2.2", "--map-addr", "10.78.1.2=10.78.2.3"], &["cannot become two"]),
    ] {
        let migration = hosts.source.migrate(&server, victim.pid()).arguments(arguments).run()?;
        migration.expect(1, &["refused"])?;
        for word in words {
            ensure!(migration.text().contains(word), "the refusal does not say {word}: {}", migration.text());
        }
    }
    expect_untouched(&victim, &before)?;
    victim.finish().map(drop)
}

/// Bytes that wait unread when a connection is handed over, and as many again afterwards.
const HELD: usize = 40_000;

/// A server at the source with clients, and a program at the destination that takes connections.
struct Handing {
    hosts: TwoHosts,
    victim: Victim,
    stop: Arc<AtomicBool>,
    staying: JoinHandle<Result<u64>>,
    server: PageServer,
    receiver: Option<Running>,
    headers: PathBuf,
}

/// A client, and the descriptor that its server has for it.
struct Client {
    stream: TcpStream,
    fd: i32,
}

impl Client {
    fn port(&self) -> Result<u16> {
        Ok(self.stream.local_addr()?.port())
    }

    /// Says something and hears it back.
    fn talk(&mut self, words: &[u8]) -> Result<()> {
        self.stream.write_all(words)?;
        let mut heard = vec![0; words.len()];
        self.stream.read_exact(&mut heard)?;
        ensure!(heard == words, "said {words:?}, heard {heard:?}");
        Ok(())
    }
}

impl Handing {
    /// Starts everything; `answer` is what the receiving program will say, if there is one.
    fn start(answer: Option<&str>) -> Result<Self> {
        let hosts = TwoHosts::builder().with_router().build()?;
        translate(&hosts, IPV4, IPV4.source)?;
        let victim = hosts.source.victim("connections", &[IPV4.source])?;
        let (path, headers) = (hosts.directory().join("taker.sock"), hosts.directory().join("headers"));
        let receiver = answer.map(|answer| receive(&hosts.destination, &path, &headers, answer)).transpose()?;
        let options = PageServerOptions {
            arguments: vec!["--hand-over-to".to_owned(), path.display().to_string()],
            ..PageServerOptions::default()
        };
        let server = hosts.destination.page_server_with(&hosts.token, &options)?;
        let stop: Arc<AtomicBool> = Arc::default();
        let stream = connect(&hosts, &victim, b'e')?.stream;
        let running = Arc::clone(&stop);
        let staying = std::thread::spawn(move || converse(stream, &running));
        Ok(Self { hosts, victim, stop, staying, server, receiver, headers })
    }

    fn connect(&self, purpose: u8) -> Result<Client> {
        connect(&self.hosts, &self.victim, purpose)
    }

    /// Starts to hand clients' connections over, each for the purpose that the label says.
    fn start_hand_over(&self, clients: &[&Client], label: &str) -> Result<RunningMigration> {
        let descriptors: Vec<String> = clients.iter().map(|client| client.fd.to_string()).collect();
        let map = format!("{}={}", IPV4.source, IPV4.destination);
        let arguments = ["--map-addr", &map, "--forward", "2", "--label", label];
        let hand_over = self.hosts.source.hand_over(&self.server, self.victim.pid(), &descriptors.join(","));
        hand_over.arguments(&arguments).start()
    }

    /// Has the router send what clients with these ports send to the destination.
    fn redirect(&self, clients: &[&Client]) -> Result<()> {
        let ports = clients.iter().map(|client| Ok(client.port()?.to_string())).collect::<Result<Vec<_>>>()?;
        let rule = format!(
            "insert rule ip service to ip daddr {} tcp sport {{ {} }} ip daddr set {}",
            IPV4.service,
            ports.join(", "),
            IPV4.destination
        );
        self.hosts.router()?.run("nft", &[&rule]).map(drop)
    }

    /// What the receiving program was told.
    fn header(&self) -> Result<serde_json::Value> {
        wait_for("what the receiving program was told", Duration::from_secs(5), || {
            let text = std::fs::read_to_string(&self.headers).unwrap_or_default();
            Ok(text.lines().last().map(serde_json::from_str).transpose()?)
        })
    }

    /// Ends everything; neither the connection that stayed nor the server may have seen anything wrong.
    fn finish(self) -> Result<()> {
        for host in [&self.hosts.source, &self.hosts.destination] {
            let left = tables(host)?;
            ensure!(!left.contains("godwit"), "{} has tables left: {left}", host.name());
        }
        self.stop.store(true, Ordering::Relaxed);
        let said = self.staying.join().map_err(|_| anyhow::anyhow!("the client that stayed panicked"))?;
        ensure!(said.context("the connection that stayed")? > 20, "the connection that stayed got little done");
        self.victim.finish().map(drop)
    }
}

/// Starts the program that takes connections.
fn receive(host: &Host, path: &std::path::Path, headers: &std::path::Path, answer: &str) -> Result<Running> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios/programs/receiver.py");
    let mut command = host.command("python3");
    command.arg(script).arg(path).arg(headers).arg(answer);
    let running = host.start_command(&mut command)?;
    wait_until("the receiving program to listen", Duration::from_secs(10), || {
        Ok(std::os::unix::net::UnixStream::connect(path).is_ok())
    })?;
    Ok(running)
}

/// Connects a client and finds out which descriptor its server has for it.
fn connect(hosts: &TwoHosts, victim: &Victim, purpose: u8) -> Result<Client> {
    let sockets = || -> Result<BTreeSet<i32>> {
        let is_socket = |entry: &std::fs::DirEntry| {
            std::fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
        };
        let listed = std::fs::read_dir(format!("/proc/{}/fd", victim.host_pid()))?.flatten().filter(is_socket);
        Ok(listed.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
    };
    let before = sockets()?;
    let mut stream = hosts.clients()?.connect_to(SocketAddr::new(IPV4.service.parse()?, PORT))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[purpose])?;
    let fd = wait_for("the server to accept", Duration::from_secs(5), || {
        Ok(sockets()?.difference(&before).next().copied())
    })?;
    // The purpose has been read when nothing waits any more.
    victim.expect_beats(5)?;
    Ok(Client { stream, fd })
}

/// Three connections go to another program, one stays; before the router knows of it, or after.
fn handed_over(switch: Switch) -> Result<()> {
    let handing = Handing::start(Some("accept"))?;
    let mut talker = handing.connect(b'e')?;
    talker.talk(b"before")?;
    let mut unread = handing.connect(b'h')?;
    unread.stream.write_all(&patterned(0, HELD))?;
    // Not read by its client: the server's queue is full.
    let mut full = handing.connect(b'g')?;
    handing.victim.expect_beats(30)?;
    let clients = [&talker, &unread, &full];
    let mut migration = handing.start_hand_over(&clients, "ehg")?;
    if switch == Switch::Early {
        migration.wait_for_event("probe", |event| event.get("phase").is_some_and(|phase| phase == "probe"))?;
    } else {
        migration.wait_for_event("committed", is_event("committed"))?;
        std::thread::sleep(Duration::from_millis(200));
    }
    handing.redirect(&clients)?;
    let migration = migration.finish()?;
    let story = format!("{}; page server: {}", migration.text(), handing.server.log());
    migration.expect(0, &["moved"]).with_context(|| story.clone())?;
    let stopped = migration.number("/stopped_ms")?;
    ensure!(stopped > 0.0, "stopped for {stopped} ms");
    println!("stopped for {stopped} ms");

    let header = handing.header()?;
    let port = talker.port()?;
    for (member, expected) in [
        ("/version", serde_json::json!(1)),
        ("/label", "ehg".into()),
        ("/pid", handing.victim.pid().into()),
        ("/committed", true.into()),
        ("/sockets", 3.into()),
        ("/connections/0/local", format!("{}:{PORT}", IPV4.destination).into()),
        ("/connections/0/peer", format!("10.78.3.2:{port}").into()),
        ("/connections/0/fd", talker.fd.into()),
    ] {
        ensure!(header.pointer(member) == Some(&expected), "{member} is not {expected} in {header}");
    }
    for number in 0..20 {
        talker.talk(format!("after {number}").as_bytes()).with_context(|| story.clone())?;
    }
    unread.stream.write_all(&patterned(HELD as u64, HELD))?;
    finish_upload(unread.stream, 2 * HELD as u64).context("the connection that was not read")?;
    let mut all = Vec::new();
    full.stream.read_to_end(&mut all).context("the connection whose queue was full")?;
    let own = all.len().checked_sub(4).context("nothing came")?;
    ensure!(own > 100_000 && all[..own] == patterned(0, own) && all[own..] == *b"done", "{own} bytes are wrong");
    talker.stream.shutdown(Shutdown::Write)?;
    handing.victim.expect_beats(20)?;
    handing.finish()
}

#[test]
fn handed_over_early() -> Result<()> {
    handed_over(Switch::Early)
}

#[test]
fn handed_over_late() -> Result<()> {
    handed_over(Switch::Late)
}

/// What goes wrong while the process is stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mishap {
    ServerKilled,
    AgentKilled,
    Interrupt,
}

/// Two clients whose connections are to be handed over, and are not.
struct Staying {
    handing: Handing,
    talker: Client,
    unread: Client,
}

impl Staying {
    fn start(answer: Option<&str>) -> Result<(Self, RunningMigration)> {
        let handing = Handing::start(answer)?;
        let mut talker = handing.connect(b'e')?;
        talker.talk(b"before")?;
        let mut unread = handing.connect(b'h')?;
        unread.stream.write_all(&patterned(0, HELD))?;
        let migration = handing.start_hand_over(&[&talker, &unread], "eh")?;
        Ok((Self { handing, talker, unread }, migration))
    }

    fn story(&self, migration: &Migration) -> String {
        format!("{}; page server: {}", migration.text(), self.handing.server.log())
    }

    /// The connections go on where they were.
    fn finish(mut self) -> Result<()> {
        for number in 0..20 {
            self.talker.talk(format!("after {number}").as_bytes())?;
        }
        self.unread.stream.write_all(&patterned(HELD as u64, HELD))?;
        self.handing.victim.go()?;
        finish_upload(self.unread.stream, 2 * HELD as u64).context("the connection that was not read")?;
        drop(self.handing.receiver.take());
        self.handing.finish()
    }
}

/// Whatever fails before the decision: the connections go on where they were.
fn not_handed_over(answer: Option<&str>, outcome: &str, words: &str) -> Result<()> {
    let (staying, migration) = Staying::start(answer)?;
    let migration = migration.finish()?;
    migration.expect(1, &[outcome]).with_context(|| staying.story(&migration))?;
    ensure!(migration.text().contains(words), "{words} is not said: {}", staying.story(&migration));
    let story = staying.story(&migration);
    staying.finish().with_context(|| story)
}

/// The receiving program does not answer, so the process is stopped and everything is there when something goes wrong.
fn stopped_and_not_handed_over(mishap: Mishap) -> Result<()> {
    let (mut staying, mut migration) = Staying::start(Some("silent"))?;
    migration.wait_for_event("the stop", is_event("frozen"))?;
    std::thread::sleep(Duration::from_millis(200));
    let destination = &staying.handing.hosts.destination;
    let prepared = tables(destination)?;
    ensure!(prepared.contains("godwit"), "nothing was held back at the destination: {prepared}");
    match mishap {
        Mishap::ServerKilled => {
            staying.handing.server.kill()?;
            let left = tables(destination)?;
            ensure!(!left.contains("godwit"), "a page server that was killed leaves {left}");
        }
        Mishap::AgentKilled => migration.process().signal(nix::sys::signal::Signal::SIGKILL)?,
        Mishap::Interrupt => migration.interrupt()?,
    }
    let ended = migration.finish();
    if mishap == Mishap::AgentKilled {
        // It notices in a while that its source is gone.
        wait_until("the page server to let go", Duration::from_secs(60), || {
            Ok(!tables(&staying.handing.hosts.destination)?.contains("godwit"))
        })?;
        return staying.finish();
    }
    let migration = ended?;
    let outcome = if mishap == Mishap::ServerKilled { "failed" } else { "cancelled" };
    migration.expect(1, &[outcome]).with_context(|| staying.story(&migration))?;
    let story = staying.story(&migration);
    staying.finish().with_context(|| story)
}

#[test]
fn nobody_takes_them() -> Result<()> {
    not_handed_over(None, "refused", "no program takes connections there")
}

#[test]
fn the_receiver_refuses() -> Result<()> {
    not_handed_over(Some("refuse"), "failed", "not today")
}

#[test]
fn the_receiver_is_silent() -> Result<()> {
    not_handed_over(Some("silent"), "failed", "answer")
}

#[test]
fn the_receiver_leaves() -> Result<()> {
    not_handed_over(Some("leave"), "failed", "the receiving program has left")
}

#[test]
fn stopped_as_the_page_server_is_killed() -> Result<()> {
    stopped_and_not_handed_over(Mishap::ServerKilled)
}

#[test]
fn stopped_as_the_agent_is_killed() -> Result<()> {
    stopped_and_not_handed_over(Mishap::AgentKilled)
}

#[test]
fn stopped_as_the_user_calls_it_off() -> Result<()> {
    stopped_and_not_handed_over(Mishap::Interrupt)
}

/// What cannot be handed over is refused by name, and the process is not touched.
#[test]
fn what_is_no_connection_is_refused() -> Result<()> {
    let hosts = TwoHosts::builder().with_router().build()?;
    let victim = hosts.source.victim("connections", &[IPV4.source])?;
    victim.expect_beats(5)?;
    let before = victim.view()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let migration = hosts.source.hand_over(&server, victim.pid(), "0,1,777").run()?;
    migration.expect(1, &["refused"])?;
    for words in ["fd 0", "fd 777", "no such descriptor", "no TCP socket", "--hand-over-to"] {
        ensure!(migration.text().contains(words), "the refusal does not say {words}: {}", migration.text());
    }
    expect_untouched(&victim, &before)?;

    // An address does not leave while others need it.
    translate(&hosts, IPV4, IPV4.source)?;
    let (mut named, mut other) = (connect(&hosts, &victim, b'e')?, connect(&hosts, &victim, b'e')?);
    let migration = hosts.source.hand_over(&server, victim.pid(), &named.fd.to_string());
    let migration = migration.arguments(&["--move-addr", IPV4.source]).run()?;
    migration.expect(1, &["refused"])?;
    let words = "stays here and uses an address that is to move along";
    ensure!(migration.text().contains(words), "the refusal does not say {words}: {}", migration.text());
    // The remedies are those that this command has.
    let migration = hosts.source.hand_over(&server, victim.pid(), &named.fd.to_string()).run()?;
    migration.expect(1, &["refused"])?;
    ensure!(migration.text().contains("--map-addr"), "the refusal does not say --map-addr: {}", migration.text());
    ensure!(!migration.text().contains("--tcp-close"), "the refusal says --tcp-close: {}", migration.text());
    named.talk(b"named")?;
    other.talk(b"other")?;
    drop((named, other));
    victim.go()?;
    victim.finish().map(drop)
}
