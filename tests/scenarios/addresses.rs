//! Addresses of a host that move along: with all that belongs to them, and back with it when the move fails.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::clients::converse;
use godwit_tests::{Host, Mode, PageServerOptions, Service, TwoHosts, Victim, program, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const ADDRESSES: [&str; 3] = ["10.77.0.100", "10.77.0.101", "fd00:77::100"];
/// Lifetimes in seconds are told a little later.
const LATER: u64 = 60;

/// Gives the source addresses with whatever an address can have, and routes that go with them.
fn furnish(host: &Host) -> Result<()> {
    let commands = [
        "address add 10.77.0.100/24 brd + dev godwit0 label godwit0:svc valid_lft 3000 preferred_lft 2000",
        "address add 10.77.0.101 peer 10.77.0.3/32 dev godwit0 scope link metric 77 noprefixroute",
        "address add fd00:77::100/64 dev godwit0 preferred_lft 0 nodad",
        "route add 10.99.0.0/16 via 10.77.0.2 src 10.77.0.100 metric 5 mtu lock 1400",
        "route add 10.98.0.0/16 dev godwit0 table 77 src 10.77.0.100",
        "-6 route add fd99::/64 dev godwit0 src fd00:77::100",
    ];
    commands.iter().try_for_each(|command| host.run("ip", &command.split(' ').collect::<Vec<_>>()).map(drop))
}

/// What each of the addresses is like on a host that has it.
fn addresses(host: &Host) -> Result<BTreeMap<String, Value>> {
    let told: Value = serde_json::from_str(&host.run("ip", &["-j", "address", "show", "dev", "godwit0"])?.stdout)?;
    let all = told.as_array().into_iter().flatten().flat_map(|link| link["addr_info"].as_array()).flatten();
    let ours = all.filter_map(|one| Some((one["local"].as_str()?.to_owned(), one.clone())));
    Ok(ours.filter(|(local, _)| ADDRESSES.contains(&local.as_str())).collect())
}

/// Routes that somebody has made.
fn routes(host: &Host) -> Result<Vec<String>> {
    let mut routes = String::new();
    for family in ["-4", "-6"] {
        routes += &host.run("ip", &[family, "route", "show", "table", "all"])?.stdout;
    }
    let made = |line: &&str| !line.contains("proto kernel") && !line.contains("table local");
    Ok(routes.lines().filter(made).map(|line| line.trim().to_owned()).collect())
}

/// Expects the same, but for the time that has passed.
fn expect_same(before: &BTreeMap<String, Value>, now: &BTreeMap<String, Value>) -> Result<()> {
    ensure!(before.len() == ADDRESSES.len() && now.len() == before.len(), "{before:?}, {now:?}");
    for (name, was) in before {
        let (mut was, mut is) = (was.clone(), now[name].clone());
        for key in ["valid_life_time", "preferred_life_time"] {
            let (earlier, later) = (was[key].take(), is[key].take());
            let (earlier, later) = (earlier.as_u64().context("no time")?, later.as_u64().context("no time")?);
            ensure!(later <= earlier && later + LATER >= earlier, "{name}: {key} {earlier}, {later}");
        }
        ensure!(was == is, "{name}: {was}, {is}");
    }
    Ok(())
}

fn server(hosts: &TwoHosts) -> Result<Victim> {
    furnish(&hosts.source)?;
    hosts.source.victim("connections", &[ADDRESSES[0], "reuse=1"])
}

fn arguments() -> Vec<&'static str> {
    ADDRESSES.iter().flat_map(|address| ["--move-addr", address]).collect()
}

/// Whoever reads the routes of a host later finds nothing of those that went with an address, so they are named.
#[test]
fn all_that_an_address_has_comes_along() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let mut victim = server(&hosts)?;
    let before = addresses(&hosts.source)?;
    let there = hosts.destination.page_server(&hosts.token)?;
    let migration = hosts.source.migrate(&there, victim.pid()).arguments(&arguments()).run()?;
    migration.expect_moved().with_context(|| there.log())?;
    victim.follow(&hosts.destination, &migration)?;
    expect_same(&before, &addresses(&hosts.destination)?)?;
    for route in ["10.99.0.0/16", "10.98.0.0/16", "fd99::/64"] {
        ensure!(migration.text().contains(route), "the route {route} goes without a word: {}", migration.text());
    }
    victim.finish().map(drop)
}

/// The hand-over fails when the source has given its addresses away, and goes on here; or another command puts things right.
fn given_back(agent_dies: bool) -> Result<()> {
    let hosts = TwoHosts::new()?;
    let victim = server(&hosts)?;
    let (before, routes_before) = (addresses(&hosts.source)?, routes(&hosts.source)?);
    let mut there = hosts.destination.page_server(&hosts.token)?;
    let mut migration =
        hosts.source.migrate(&there, victim.pid()).arguments(&arguments()).pause_at("decided").start()?;
    let named = migration.wait_for_event("its name", |event| event.get("migration_id").is_some())?;
    let id = named["migration_id"].as_str().context("no name")?.to_owned();
    let agent = wait_for("an agent that stands still", Duration::from_secs(20), || {
        let state = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let processes = hosts.source.processes()?;
        let still = processes.iter().find(|(pid, name)| name == "godwit-agent" && state(*pid).contains("State:\tT"));
        Ok(still.map(|(pid, _)| *pid))
    })?;
    ensure!(addresses(&hosts.source)?.is_empty(), "they are still here");
    let port = there.port();
    there.kill()?;
    let _again = hosts.destination.page_server_with(&hosts.token, &PageServerOptions { port, ..Default::default() })?;
    if agent_dies {
        migration.abandon(agent)?;
        let mut command = hosts.source.command(program("migrate")?);
        command.args(["resume", &id]).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let finished = hosts.source.start_command(&mut command)?.finish(Duration::from_secs(30))?;
        ensure!(finished.stderr.contains("running as before"), "{}{}", finished.stdout, finished.stderr);
    } else {
        kill(Pid::from_raw(agent as i32), Signal::SIGCONT)?;
        migration.process().wake_launcher();
        migration.finish()?.expect(1, &["failed"])?;
    }
    expect_same(&before, &addresses(&hosts.source)?)?;
    let now = routes(&hosts.source)?;
    ensure!(now == routes_before, "{routes_before:#?}, {now:#?}");
    victim.finish().map(drop)
}

#[test]
fn a_move_that_fails_gives_all_of_it_back() -> Result<()> {
    given_back(false)
}

#[test]
fn what_is_written_down_gives_all_of_it_back() -> Result<()> {
    given_back(true)
}

/// Another program's connection breaks when its address goes, and that is said before.
#[test]
fn whose_address_goes_is_told() -> Result<()> {
    const OTHER: &str = "import socket, time
kept = socket.create_connection(('10.77.0.3', 6300), source_address=('10.77.0.100', 0))
time.sleep(60)";
    let mut service = Service::start(false)?;
    service.employ("conversation", b'e', converse)?;
    let listener = service.hosts.clients()?.listen("10.77.0.3:6300")?;
    let mut command = service.hosts.source.command("python3");
    let _other = service.hosts.source.start_command(command.args(["-c", OTHER]))?;
    let (_stream, peer) = listener.accept()?;
    service.victim.expect_beats(10)?;
    let server = service.hosts.destination.page_server(&service.hosts.token)?;
    let migration = service.migrate(&server, Mode::Hybrid)?;
    migration.expect_moved()?;
    for words in [format!("{peer} - 10.77.0.3:6300"), "stays here with another program".to_owned()] {
        ensure!(migration.text().contains(&words), "it is not said that {words}: {}", migration.text());
    }
    ensure!(!migration.text().contains("more)"), "its own connections are counted: {}", migration.text());
    service.victim.follow(&service.hosts.destination, &migration)?;
    service.victim.go()?;
    service.finish()
}

/// Who has sent an address on says so no more: its neighbours believe the last word.
#[test]
fn neighbours_are_told_the_truth() -> Result<()> {
    let mut service = Service::start(false)?;
    service.employ("conversation", b'e', converse)?;
    service.victim.expect_beats(10)?;
    let servers = [
        service.hosts.destination.page_server(&service.hosts.token)?,
        service.hosts.source.page_server(&service.hosts.token)?,
    ];
    for (server, there) in servers.iter().zip([true, false]) {
        let migration = service.migrate(server, Mode::Hybrid)?;
        migration.expect_moved().with_context(|| server.log())?;
        let host = if there { &service.hosts.destination } else { &service.hosts.source };
        service.victim.follow(host, &migration)?;
    }
    let link = service.hosts.source.run("ip", &["-o", "link", "show", "godwit0"])?.stdout;
    let hardware = link.split(' ').skip_while(|&word| word != "link/ether").nth(1).context("no link-layer address")?;
    let clients = service.hosts.clients()?;
    let neighbour = || -> Result<String> { Ok(clients.run("ip", &["neighbour", "show", "10.77.0.100"])?.stdout) };
    let is_right = |line: &str| line.contains(hardware);
    wait_until("the clients to know where the address is", Duration::from_secs(2), || Ok(is_right(&neighbour()?)))?;
    // Longer than a host repeats that it has an address.
    let end = std::time::Instant::now() + Duration::from_millis(1600);
    while std::time::Instant::now() < end {
        let line = neighbour()?;
        ensure!(is_right(&line), "the address is back at {hardware}, but clients know: {line}");
        std::thread::sleep(Duration::from_millis(20));
    }
    service.finish()
}
