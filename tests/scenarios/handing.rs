//! Connections that get another address on the way: a router translates a service address to that of the host that has it.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::clients::{PATIENCE, call_again, converse, download, upload};
use godwit_tests::{Host, Migration, Mode, PageServer, RunningMigration, TwoHosts, Victim, expect_untouched};
use std::io::Write;

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
        let hosts = TwoHosts::builder().with_router().build()?;
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
        let (init, address) = (self.hosts.clients()?.init_pid(), self.address()?);
        let call: Arc<dyn Fn() -> Result<TcpStream> + Send + Sync> = Arc::new(move || {
            let namespace = std::fs::File::open(format!("/proc/{init}/ns/net"))?;
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
            Ok(TcpStream::connect_timeout(&address, PATIENCE)?)
        });
        for _ in 0..number {
            let (call, stop) = (Arc::clone(&call), Arc::clone(&self.stop));
            self.busy.push(("caller", std::thread::spawn(move || call_again(call, &stop))));
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
    let mut service = Service::start(family)?;
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
