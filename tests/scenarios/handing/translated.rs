//! The whole process moves, and the router translates the service address to that of the host that has it.

use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::clients::{PATIENCE, caller, converse, download, upload};
use godwit_tests::{
    Asker, Migration, Mode, PageServer, RunningMigration, TwoHosts, Victim, expect_untouched, stand_strict_guard,
};

use crate::{Family, IPV4, IPV6, PORT, Switch, is_event, tables, translate};

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
