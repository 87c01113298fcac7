//! A program that serves at an address that moves with it, and clients on a third host who do not stop asking.

use std::cell::Cell;
use std::fs::File;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use godwit_tests::{Migration, Mode, PageServer, Path, Running, TwoHosts, is_alive, wait_for, wait_until};

/// The address that moves.
pub(crate) const ADDRESS: &str = "10.77.0.100";
/// Longer than any freeze; what takes longer has been lost and forgotten.
const PATIENCE: Duration = Duration::from_secs(20);

/// Three hosts, a program on one of the first two, and clients on the third.
pub(crate) struct Service {
    pub(crate) hosts: TwoHosts,
    pub(crate) port: u16,
    /// At the destination and at the source.
    servers: [PageServer; 2],
    /// The program as it was started.
    _origin: Running,
    host_pid: u32,
    moves: usize,
    stop: Arc<AtomicBool>,
    clients: Vec<Client>,
}

struct Client {
    what: String,
    done: Arc<AtomicU64>,
    longest: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

/// What a client knows of its service.
pub(crate) struct Duty {
    port: u16,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    /// The last answer, and the longest time between two in microseconds.
    last: Cell<Option<Instant>>,
    longest: Arc<AtomicU64>,
}

impl Duty {
    /// Whether to go on.
    pub(crate) fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Says that so many answers were right.
    pub(crate) fn done(&self, answers: u64) {
        self.done.fetch_add(answers, Ordering::Relaxed);
        let now = Instant::now();
        if let Some(last) = self.last.replace(Some(now)) {
            self.longest.fetch_max((now - last).as_micros() as u64, Ordering::Relaxed);
        }
    }

    /// Connects to the program.
    pub(crate) fn connect(&self) -> Result<TcpStream> {
        let stream = TcpStream::connect((ADDRESS, self.port))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Hosts whose clients are at the end of a path, and the address on one of them.
pub(crate) fn hosts(path: Path) -> Result<TwoHosts> {
    let hosts = TwoHosts::builder().with_distant_clients(path).build()?;
    hosts.source.run("ip", &["address", "add", &format!("{ADDRESS}/32"), "dev", "godwit0"])?;
    Ok(hosts)
}

impl Service {
    /// Starts a program on such hosts and waits until it takes connections.
    pub(crate) fn start(hosts: TwoHosts, program: &str, arguments: &[&str], port: u16) -> Result<Self> {
        let log = File::options().create(true).append(true).open(hosts.directory().join("program"))?;
        let mut command = hosts.source.command(program);
        command.args(arguments).stdout(log.try_clone()?).stderr(log);
        let mut origin = hosts.source.start_command(&mut command).with_context(|| format!("{program} is needed"))?;
        let words = || std::fs::read_to_string(hosts.directory().join("program")).unwrap_or_default();
        wait_for(&format!("{program} to listen"), Duration::from_secs(10), || {
            if let Some(status) = origin.ended()? {
                bail!("{program} ended with {status}: {}", words());
            }
            let attempt = hosts.source.on_its_network(move || Ok(TcpStream::connect((ADDRESS, port))?));
            Ok(attempt.ok())
        })
        .with_context(words)?;
        let servers = [hosts.destination.page_server(&hosts.token)?, hosts.source.page_server(&hosts.token)?];
        let host_pid = origin.host_pid();
        let (stop, clients) = (Arc::default(), Vec::new());
        Ok(Self { hosts, port, servers, _origin: origin, host_pid, moves: 0, stop, clients })
    }

    /// Has a client work on the third host until the end.
    pub(crate) fn employ(
        &mut self,
        what: impl Into<String>,
        work: impl FnOnce(&Duty) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let namespace = File::open(format!("/proc/{}/ns/net", self.hosts.clients()?.init_pid()))?;
        let (done, longest) = (Arc::default(), Arc::default());
        let duty = Duty {
            port: self.port,
            stop: Arc::clone(&self.stop),
            done: Arc::clone(&done),
            last: Cell::default(),
            longest: Arc::clone(&longest),
        };
        let thread = std::thread::spawn(move || {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
            work(&duty)
        });
        self.clients.push(Client { what: what.into(), done, longest, thread });
        Ok(())
    }

    /// Waits until every client has had so many more right answers.
    pub(crate) fn expect_answers(&mut self, count: u64) -> Result<()> {
        let answers = |client: &Client| client.done.load(Ordering::Relaxed);
        let before: Vec<u64> = self.clients.iter().map(answers).collect();
        let clients = &self.clients;
        let outcome = wait_until(&format!("{count} answers for each client"), Duration::from_secs(40), || {
            if let Some(client) = clients.iter().find(|client| client.thread.is_finished()) {
                bail!("the client {} has given up", client.what);
            }
            Ok(clients.iter().zip(&before).all(|(client, before)| answers(client) >= before + count))
        });
        outcome.map_err(|error| self.complaints(error))
    }

    /// The errors of clients that have ended, in front of one that came of it.
    fn complaints(&mut self, error: anyhow::Error) -> anyhow::Error {
        let ended = self.clients.extract_if(.., |client| client.thread.is_finished());
        let words: Vec<String> = ended
            .filter_map(|client| match client.thread.join() {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(format!("{}: {error:#}", client.what)),
                Err(_) => Some(format!("{} panicked", client.what)),
            })
            .collect();
        let log = std::fs::read_to_string(self.hosts.directory().join("program")).unwrap_or_default();
        error.context(format!("clients: {}; the program: {log}", words.join("; ")))
    }

    /// The longest time between two answers to a client since the last time this was asked.
    fn longest_wait(&self) -> Duration {
        let longest = self.clients.iter().map(|client| client.longest.swap(0, Ordering::Relaxed)).max();
        Duration::from_micros(longest.unwrap_or(0))
    }

    /// Moves the program to the other host. Clients go on before and after it.
    pub(crate) fn travel(&mut self, mode: Mode) -> Result<Migration> {
        let server = &self.servers[self.moves % 2];
        let (from, to) = if self.moves.is_multiple_of(2) {
            (&self.hosts.source, &self.hosts.destination)
        } else {
            (&self.hosts.destination, &self.hosts.source)
        };
        let migration = from
            .migrate(server, from.pid_here(self.host_pid)?)
            .mode(mode)
            .arguments(&["--move-addr", ADDRESS])
            .run()?;
        let story = || format!("move {} ({}); page server: {}", self.moves + 1, mode.word(), server.log());
        migration.expect_moved().with_context(story)?;
        let old = self.host_pid;
        wait_until("the copy left behind to be gone", Duration::from_secs(30), || Ok(!is_alive(old)))?;
        self.host_pid = to.host_pid(migration.dest_pid()?)?;
        ensure!(to.is_home_of(self.host_pid), "the program is not on the network of {}", to.name());
        self.moves += 1;
        Ok(migration)
    }

    /// There and back, in each of these modes; every client gets answers before, between and after.
    pub(crate) fn there_and_back(&mut self, modes: &[Mode], answers: u64) -> Result<()> {
        self.expect_answers(answers)?;
        for &mode in modes {
            for _ in 0..2 {
                self.longest_wait();
                let migration = self.travel(mode).map_err(|error| self.complaints(error))?;
                self.expect_answers(answers).with_context(|| migration.text())?;
                let (freeze, total) = (migration.number("/freeze_ms")?, migration.number("/total_ms")?);
                let wait = self.longest_wait();
                println!("{}: {total:.0} ms, frozen for {freeze:.1}; longest wait for an answer {wait:?}", mode.word());
            }
        }
        Ok(())
    }

    /// Ends the clients: none may have seen anything wrong.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        ensure!(!self.clients.is_empty(), "there are no clients");
        for client in std::mem::take(&mut self.clients) {
            let outcome = client.thread.join().map_err(|_| anyhow!("{} panicked", client.what)).flatten();
            outcome.map_err(|error| self.complaints(error.context(client.what)))?;
        }
        ensure!(is_alive(self.host_pid), "the program has ended");
        Ok(())
    }
}
