//! Connections are handed to another program while their process stays.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::clients::{PATIENCE, converse, finish_upload, patterned};
use godwit_tests::{
    Host, Migration, PageServer, PageServerOptions, Running, RunningMigration, TwoHosts, Victim, expect_untouched,
    wait_for, wait_until,
};

use crate::{IPV4, PORT, Switch, is_event, tables, translate};

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
