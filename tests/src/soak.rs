//! A program with connected clients that goes back and forth between two hosts while things go wrong.
//!
//! The victim `store` rewrites and checks its memory, and keeps pages for clients who compare each answer with what they know. It moves
//! again and again, in all modes; during some of the moves something fails. What is held then is gone on with by `migrate resume`, what runs
//! on is moved again. All that is random comes from a seed, which is printed.

mod client;

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::agents::{PageServer, PageServerOptions};
use crate::binaries::program;
use crate::faults::{copies, family};
use crate::host::Host;
use crate::migration::{Mode, RunningMigration};
use crate::two_hosts::{INTERFACE, TwoHosts};
use crate::victim::Victim;

const ADDRESS: &str = "10.77.0.100";
const PORT: u16 = 6300;
const CLIENTS: u64 = 4;
/// Most milliseconds from the start of a move to what goes wrong in it.
const LATEST_FAULT_MS: u64 = 700;
/// The packet filter's table that loses what the programs say to each other, and nothing of the clients'.
const TABLE: &str = "soak";

/// What goes wrong in a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mishap {
    Nothing,
    Interrupt,
    MigrateKilled,
    AgentKilled,
    PageServerKilled,
    LinkCut,
}

/// How long it goes on.
#[derive(Debug, Clone, Copy)]
pub struct Course {
    /// Moves, at most.
    pub moves: u32,
    /// Time, at most.
    pub time: Duration,
    /// Where everything random comes from.
    pub seed: u64,
}

/// What happened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Moves that were begun.
    pub begun: u32,
    /// The process has changed hosts.
    pub moved: u32,
    /// In which something went wrong.
    pub mishaps: u32,
    /// It ran on where it was.
    pub ran_on: u32,
    /// Outcomes that were unknown and were gone on with.
    pub resumed: u32,
    /// Questions of clients that were answered, each as it had to be.
    pub answers: u64,
    /// Connections that broke; only where an outcome was unknown.
    pub broken: u64,
}

/// Numbers that look random, the same from the same seed (xorshift).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % end
    }
}

struct Soak {
    victim: Victim,
    servers: [PageServer; 2],
    /// The host where the victim is: 0 or 1.
    at: usize,
    random: Random,
    tally: Tally,
    hosts: TwoHosts,
}

/// Runs a course, and shows each move.
///
/// # Errors
/// The first thing that is wrong: with the victim, with a client, or more or less than one copy.
pub fn soak(course: Course, show: &mut dyn FnMut(&str)) -> Result<Tally> {
    show(&format!("seed {}", course.seed));
    let hosts = TwoHosts::builder().with_clients().build()?;
    hosts.source.run("ip", &["address", "add", &format!("{ADDRESS}/32"), "dev", INTERFACE])?;
    let victim = hosts.source.victim("store", &[ADDRESS, "2", "8", "2"])?;
    let servers = [hosts.source.page_server(&hosts.token)?, hosts.destination.page_server(&hosts.token)?];
    let (stop, answers, broken) = (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::default());
    let address: SocketAddr = format!("{ADDRESS}:{PORT}").parse()?;
    let clients = (0..CLIENTS)
        .map(|number| {
            let figures = client::Figures { answers: Arc::clone(&answers), broken: Arc::clone(&broken) };
            client::start(hosts.clients()?, address, (number, course.seed), Arc::clone(&stop), figures)
        })
        .collect::<Result<Vec<_>>>()?;
    let random = Random::new(course.seed);
    let mut soak = Soak { victim, servers, at: 0, random, tally: Tally::default(), hosts };
    let started = Instant::now();
    while soak.tally.begun < course.moves && started.elapsed() < course.time {
        soak.pass(show, &broken).with_context(|| format!("seed {}, move {}", course.seed, soak.tally.begun))?;
        if let Some(client) = clients.iter().position(|client| client.is_finished()) {
            show(&format!("client {client} has ended"));
            break;
        }
    }
    stop.store(true, Ordering::Relaxed);
    for (number, client) in clients.into_iter().enumerate() {
        let heard = client.join().map_err(|_| anyhow::anyhow!("client {number} panicked"))?;
        heard.with_context(|| format!("client {number}, seed {}; {}", course.seed, soak.victim.log()))?;
    }
    soak.victim.finish()?;
    (soak.tally.answers, soak.tally.broken) = (answers.load(Ordering::Relaxed), broken.load(Ordering::Relaxed));
    Ok(soak.tally)
}

impl Soak {
    fn host(&self, number: usize) -> &Host {
        [&self.hosts.source, &self.hosts.destination][number]
    }

    /// One move, with what goes wrong in it and what is done about that.
    fn pass(&mut self, show: &mut dyn FnMut(&str), broken: &AtomicU64) -> Result<()> {
        use Mishap::{AgentKilled, Interrupt, LinkCut, MigrateKilled, Nothing, PageServerKilled};
        const MISHAPS: [Mishap; 8] =
            [Nothing, Nothing, Nothing, Interrupt, MigrateKilled, AgentKilled, PageServerKilled, LinkCut];
        let mode = Mode::ALL[self.random.below(3) as usize];
        let mishap = MISHAPS[self.random.below(MISHAPS.len() as u64) as usize];
        let delay = Duration::from_millis(self.random.below(LATEST_FAULT_MS));
        let there = 1 - self.at;
        let broken_before = broken.load(Ordering::Relaxed);
        self.tally.begun += 1;
        self.tally.mishaps += u32::from(mishap != Nothing);
        let migrate = self.host(self.at).migrate(&self.servers[there], self.victim.pid()).mode(mode);
        let words = ["--move-addr", ADDRESS, "--reconnect-for", "10"];
        let mut migration = migrate.arguments(&words).limit(Duration::from_secs(120)).start()?;
        if mishap != Nothing {
            std::thread::sleep(delay);
            self.happen(mishap, there, &mut migration)?;
        }
        let ended = migration.finish()?;
        let story = format!("{} in mode {} after {delay:?}: {}", name(mishap), mode.word(), ended.text());
        let became = self.settle(there).with_context(|| format!("{story}; {}", self.servers[there].log()))?;
        self.victim.expect_beats(3).with_context(|| story.clone())?;
        // A decision whose outcome is unknown for long may cost connections; nothing else may.
        let newly = broken.load(Ordering::Relaxed) - broken_before;
        ensure!(newly == 0 || became == "resumed", "{newly} connections broke; {story}");
        show(&format!(
            "{:4} {:13} {:20} {became}{}",
            self.tally.begun,
            mode.word(),
            if mishap == Nothing { String::new() } else { format!("{} {} ms", name(mishap), delay.as_millis()) },
            if newly > 0 { format!(", {newly} connections broke") } else { String::new() }
        ));
        Ok(())
    }

    fn happen(&mut self, mishap: Mishap, there: usize, migration: &mut RunningMigration) -> Result<()> {
        let front = migration.process().host_pid();
        // What has ended already takes no harm.
        let send = |pid, signal| crate::process::send(pid, signal).unwrap_or(());
        match mishap {
            Mishap::Nothing => {}
            Mishap::Interrupt => send(front, Signal::SIGINT),
            Mishap::MigrateKilled => send(front, Signal::SIGKILL),
            Mishap::AgentKilled => send(family(front).pop().unwrap_or(front), Signal::SIGKILL),
            Mishap::PageServerKilled => {
                let port = self.servers[there].port();
                self.servers[there].kill()?;
                let options = PageServerOptions { port, ..PageServerOptions::default() };
                self.servers[there] = self.host(there).page_server_with(&self.hosts.token, &options)?;
            }
            Mishap::LinkCut => {
                let rule = format!("type filter hook ingress device {INTERFACE} priority 0;");
                let table = format!("table netdev {TABLE} {{ chain lost {{ {rule} meta l4proto udp drop; }}; }}");
                for host in [0, 1] {
                    self.host(host).run("nft", &[&table])?;
                }
                std::thread::sleep(Duration::from_millis(100 + self.random.below(3000)));
                for host in [0, 1] {
                    self.host(host).run("nft", &["delete", "table", "netdev", TABLE])?;
                }
            }
        }
        Ok(())
    }

    /// Waits until it stands how it ended, and goes on with what is held. There is one copy then, and it runs.
    fn settle(&mut self, there: usize) -> Result<&'static str> {
        let mut resumed = false;
        let mut said = String::new();
        loop {
            let copies = copies::settle(self.host(self.at), self.host(there), self.victim.directory())?;
            match copies[..] {
                [copies::Copy { home, doing: copies::Doing::Runs, host_pid }] => {
                    let moved = home == copies::Home::Destination;
                    self.tally.moved += u32::from(moved);
                    self.tally.ran_on += u32::from(!moved);
                    self.tally.resumed += u32::from(resumed);
                    if moved {
                        self.at = there;
                        let host = [&self.hosts.source, &self.hosts.destination][there];
                        self.victim.found_at(host, host_pid)?;
                    }
                    return Ok(match (resumed, moved) {
                        (true, _) => "resumed",
                        (false, true) => "moved",
                        (false, false) => "ran on",
                    });
                }
                _ if !resumed => {
                    resumed = true;
                    said = self.resume()?;
                }
                _ => bail!("not one copy that runs: {copies:?}; migrate resume said: {said}"),
            }
        }
    }

    fn resume(&self) -> Result<String> {
        let host = self.host(self.at);
        let find = ["/run/godwit/source", "-type", "f", "-not", "-name", "*.*", "-printf", "%f "];
        let ids = host.run("find", &find)?.stdout;
        ensure!(!ids.is_empty(), "it is held, and nothing is written down");
        let mut said = String::new();
        // Of a process that is gone something may be written down, too.
        for id in ids.split_whitespace() {
            let mut command = host.command(program("migrate")?);
            command.args(["resume", id, "--reconnect-for", "20", "--json"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            let ended = host.start_command(&mut command)?.finish(Duration::from_secs(60))?;
            said += &format!("{id} {}: {}{}\n", ended.status, ended.stdout, ended.stderr);
            ensure!(matches!(ended.status.code(), Some(0 | 1)), "migrate resume: {said}");
        }
        Ok(said)
    }
}

fn name(mishap: Mishap) -> &'static str {
    match mishap {
        Mishap::Nothing => "nothing",
        Mishap::Interrupt => "interrupt",
        Mishap::MigrateKilled => "kill -9 migrate",
        Mishap::AgentKilled => "kill -9 its agent",
        Mishap::PageServerKilled => "kill -9 page-server",
        Mishap::LinkCut => "link cut",
    }
}
