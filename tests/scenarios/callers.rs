//! New clients: those who call while their server moves, who look for open ports, and who have not been accepted yet.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::clients::{PATIENCE, deaf_caller, timed_caller};
use godwit_tests::{Mode, Path, Service, TwoHosts, wait_until};

const PORT: u16 = 6200;
/// Clients who call while the server moves get in.
fn new_clients(path: Path, callers: u64) -> Result<()> {
    let mut service = Service::start_behind(path, false)?;
    service.employ_clients(2)?;
    for _ in 0..callers {
        service.employ_caller()?;
        // Not all at the same time.
        std::thread::sleep(2 * path.delay / 7);
    }
    service.victim.expect_beats(20)?;
    let there = service.hosts.destination.page_server(&service.hosts.token)?;
    let back = service.hosts.source.page_server(&service.hosts.token)?;
    for server in [&there, &back, &there] {
        service.move_on(server, &there)?;
    }
    service.finish()
}

#[test]
fn new_clients_get_in() -> Result<()> {
    new_clients(Path::default(), 3)
}

/// At every moment some of them have been answered and have not answered yet.
#[test]
fn new_clients_get_in_from_far_away() -> Result<()> {
    new_clients(Path { delay: Duration::from_millis(150), ..Path::default() }, 20)
}

/// What is lost of a request, its answer or its end comes again, there or here.
#[test]
fn new_clients_get_in_over_a_bad_path() -> Result<()> {
    let path = Path { delay: Duration::from_millis(25), lost_permille: 10, ..Path::default() };
    new_clients(path, 12)
}

/// Somebody looks for open ports, and never finishes a request. The others do not wait for that.
#[test]
fn requests_that_nobody_finishes_hold_nobody_up() -> Result<()> {
    /// An answer is given again after a second.
    const LONGEST: Duration = Duration::from_millis(600);
    let mut service = Service::start(false)?;
    service.employ_clients(1)?;
    let deaf = deaf_caller(service.hosts.clients()?, service.address, Arc::clone(&service.stop))?;
    service.busy.push(("deaf caller", deaf));
    let there = service.hosts.destination.page_server(&service.hosts.token)?;
    let back = service.hosts.source.page_server(&service.hosts.token)?;
    let caller = timed_caller(service.hosts.clients()?, service.address, Arc::clone(&service.stop))?;
    std::thread::sleep(Duration::from_secs(1));
    for server in [&there, &back, &there, &back] {
        service.move_on(server, &there)?;
    }
    service.stop.store(true, Ordering::Relaxed);
    let longest = caller.join().map_err(|_| anyhow::anyhow!("the caller panicked"))??;
    println!("longest call: {longest:?}");
    ensure!(longest < LONGEST, "a new client waited for {longest:?}");
    service.finish()
}

/// Whom the server has not accepted is told, and not before the server is about to leave.
#[test]
fn whom_nobody_has_accepted_is_turned_away() -> Result<()> {
    turned_away("--skip-in-flight")
}

#[test]
fn whom_nobody_has_accepted_is_closed_with_the_others() -> Result<()> {
    turned_away("--tcp-close")
}

fn turned_away(flag: &str) -> Result<()> {
    let hosts = TwoHosts::builder().with_clients().build()?;
    hosts.source.run("ip", &["address", "add", "10.77.0.100/32", "dev", "godwit0"])?;
    let victim = hosts.source.victim("listeners", &[])?;
    victim.expect_beats(5)?;
    // It does not look.
    let pid = nix::unistd::Pid::from_raw(victim.host_pid() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)?;
    let connect = || hosts.clients()?.connect_to(SocketAddr::from(([10, 77, 0, 100], 6100)));
    let clients = [connect()?, connect()?, connect()?];
    let server = hosts.destination.page_server(&hosts.token)?;
    let migrate = |flag: &[&str]| {
        let arguments = [&["--move-addr", "10.77.0.100"], flag].concat();
        hosts.source.migrate(&server, victim.pid()).arguments(&arguments).run()
    };
    let migration = migrate(&[])?;
    migration.expect(1, &["failed"])?;
    ensure!(migration.text().contains("3 connections wait to be accepted"), "{}", migration.text());
    let hears = |mut client: &TcpStream| {
        client.set_read_timeout(Some(Duration::from_millis(300)))?;
        Ok::<_, std::io::Error>(client.read(&mut [0]).map_err(|error| error.kind()))
    };
    for client in &clients {
        ensure!(hears(client)? == Err(std::io::ErrorKind::WouldBlock), "a move that failed has ended it");
    }
    let migration = migrate(&[flag])?;
    migration.expect_moved().with_context(|| server.log())?;
    for client in &clients {
        ensure!(hears(client)? == Err(std::io::ErrorKind::ConnectionReset), "it was not told");
    }
    Ok(())
}

/// A connection that is asked for while its server does not answer comes about at the destination.
#[test]
fn a_request_that_nobody_has_answered() -> Result<()> {
    const FROM: &str = "10.77.0.100";
    let hosts = TwoHosts::builder().with_clients().build()?;
    let clients = hosts.clients()?;
    hosts.source.run("ip", &["address", "add", "10.77.0.100/32", "dev", "godwit0"])?;
    // Nothing that is sent to the caller leaves the host of its server.
    clients.run("ip", &["route", "add", "blackhole", FROM])?;
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", clients.init_pid()))?;
    let server = std::thread::spawn(move || -> Result<()> {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        let (mut stream, _) = std::net::TcpListener::bind(("10.77.0.3", PORT))?.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut word = [0; 5];
        stream.read_exact(&mut word)?;
        stream.write_all(&word)?;
        // Not closed before the other end has heard it.
        let _ = stream.read(&mut word);
        Ok(())
    });
    std::thread::sleep(Duration::from_millis(100));
    let mut victim = hosts.source.victim("caller", &[FROM, "10.77.0.3", &PORT.to_string()])?;
    victim.expect_beats(10)?;
    let destination = hosts.destination.page_server(&hosts.token)?;
    let migration = hosts.source.migrate(&destination, victim.pid()).arguments(&["--move-addr", FROM]).run()?;
    migration.expect_moved().with_context(|| destination.log())?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(10)?;
    clients.run("ip", &["route", "del", "blackhole", FROM])?;
    // Asked again after one, two and four seconds.
    std::thread::sleep(Duration::from_secs(5));
    victim.expect_beats(10)?;
    victim.finish()?;
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))?
}

/// Several sockets that listen at one port: clients reach each of them, before, during and after.
#[test]
fn a_group_of_listening_sockets() -> Result<()> {
    const MEMBERS: usize = 4;
    let hosts = TwoHosts::builder().with_clients().build()?;
    hosts.source.run("ip", &["address", "add", "10.77.0.100/32", "dev", "godwit0"])?;
    let victim = hosts.source.victim("group", &["10.77.0.100", &MEMBERS.to_string()])?;
    let address = SocketAddr::from(([10, 77, 0, 100], PORT));
    let mut service = Service { hosts, victim, address, stop: Arc::default(), busy: Vec::new() };
    for _ in 0..3 {
        service.employ_caller()?;
    }
    let servers = [
        service.hosts.destination.page_server(&service.hosts.token)?,
        service.hosts.source.page_server(&service.hosts.token)?,
    ];
    let accepted = |service: &Service| -> Result<Vec<u64>> {
        let line = std::fs::read_to_string(service.victim.directory().join("accepted")).unwrap_or_default();
        Ok(line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
    };
    for (number, mode) in [Mode::Hybrid, Mode::PostCopy, Mode::StopAndCopy, Mode::Hybrid].into_iter().enumerate() {
        let before = accepted(&service)?;
        wait_until("each member to get a client", Duration::from_secs(10), || {
            let now = accepted(&service)?;
            Ok(now.len() == MEMBERS
                && before.len() == MEMBERS
                && now.iter().zip(&before).all(|(now, before)| now > before))
        })
        .with_context(|| format!("before move {number}: {before:?}, {:?}", accepted(&service)))?;
        let server = &servers[number % 2];
        let migration = service.migrate(server, mode)?;
        migration.expect_moved().with_context(|| server.log())?;
        let host = if number % 2 == 0 { &service.hosts.destination } else { &service.hosts.source };
        service.victim.follow(host, &migration)?;
        service.victim.expect_beats(20)?;
    }
    service.finish()
}
