//! Clients on a host of their own: all of a group are served by one thread.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of a message.
const LENGTH: usize = 16;

/// Clients of one server.
#[derive(Debug)]
pub(super) struct Group {
    thread: JoinHandle<Result<()>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    longest_us: AtomicU64,
}

struct Client {
    stream: TcpStream,
    said: u64,
    /// Since when it waits for an answer.
    waiting: Option<Instant>,
    heard: usize,
    next: Instant,
}

impl Group {
    /// Connects `count` clients out of a network namespace. With a pause they talk, else they are silent.
    pub(super) fn connect(namespace: File, address: SocketAddr, count: usize, pause: Option<Duration>) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (ready, wait) = std::sync::mpsc::channel();
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                let mut clients = Vec::with_capacity(count);
                let begun = Instant::now();
                for number in 0..count {
                    let stream = TcpStream::connect(address).context("connecting")?;
                    stream.set_nodelay(true)?;
                    // Spread over the pause.
                    let offset = pause.unwrap_or_default().mul_f64(number as f64 / count as f64);
                    clients.push(Client { stream, said: 0, waiting: None, heard: 0, next: begun + offset });
                }
                let _ = ready.send(());
                match pause {
                    Some(pause) => talk(&mut clients, pause, &shared),
                    None => keep_silent(clients, &shared),
                }
            }
        });
        if wait.recv_timeout(Duration::from_secs(60)).is_err() && thread.is_finished() {
            thread.join().map_err(|_| anyhow!("the clients panicked"))??;
            return Err(anyhow!("the clients did not connect"));
        }
        Ok(Self { thread, shared })
    }

    /// Begins to look for the longest stall.
    pub(super) fn forget_stalls(&self) {
        self.shared.longest_us.store(0, Ordering::Relaxed);
    }

    /// Ends all clients; the longest time that one has waited for an answer.
    pub(super) fn finish(self) -> Result<Duration> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the clients panicked"))??;
        Ok(Duration::from_micros(self.shared.longest_us.load(Ordering::Relaxed)))
    }
}

fn message(number: u64) -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    bytes
}

/// Silent until the end; then every client is heard once.
fn keep_silent(clients: Vec<Client>, shared: &Shared) -> Result<()> {
    while !shared.stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(5));
    }
    for (number, client) in (0..).zip(clients) {
        let mut stream = client.stream;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&message(number))?;
        let mut answer = [0; LENGTH];
        stream.read_exact(&mut answer).with_context(|| format!("the answer to client {number}"))?;
        ensure!(answer == message(number), "client {number} heard something else");
    }
    Ok(())
}

fn talk(clients: &mut [Client], pause: Duration, shared: &Shared) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    // Who speaks when: those who do not wait for an answer.
    let mut due = BinaryHeap::new();
    for (number, client) in clients.iter().enumerate() {
        client.stream.set_nonblocking(true)?;
        epoll.add(&client.stream, EpollEvent::new(EpollFlags::EPOLLIN, number as u64))?;
        due.push(Reverse((client.next, number)));
    }
    let mut events = vec![EpollEvent::empty(); 1024];
    let mut looked = Instant::now();
    while !shared.stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        while let Some(Reverse((_, number))) = due.peek().copied().filter(|Reverse((next, _))| *next <= now) {
            due.pop();
            let client = &mut clients[number];
            client.stream.write_all(&message(client.said))?;
            client.waiting = Some(Instant::now());
        }
        let count = epoll.wait(&mut events, EpollTimeout::from(1u8))?;
        for event in &events[..count] {
            let number = event.data() as usize;
            if clients[number].hear(pause, shared)? {
                due.push(Reverse((clients[number].next, number)));
            }
        }
        if looked.elapsed() > Duration::from_secs(1) {
            looked = Instant::now();
            let is_lost = |client: &Client| client.waiting.is_some_and(|since| since.elapsed() > PATIENCE);
            ensure!(!clients.iter().any(is_lost), "an answer did not come");
        }
    }
    Ok(())
}

impl Client {
    /// Takes in what has come; whether its answer is complete.
    fn hear(&mut self, pause: Duration, shared: &Shared) -> Result<bool> {
        let mut answer = [0; LENGTH];
        let got = match self.stream.read(&mut answer[self.heard..]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            got => got?,
        };
        ensure!(got > 0, "the server has left");
        ensure!(
            answer[self.heard..self.heard + got] == message(self.said)[self.heard..self.heard + got],
            "a client heard something else than it said"
        );
        self.heard += got;
        let is_complete = self.heard == LENGTH;
        if is_complete {
            let since = self.waiting.take().context("an answer to nothing")?;
            let waited = since.elapsed();
            shared.longest_us.fetch_max(waited.as_micros() as u64, Ordering::Relaxed);
            (self.heard, self.said, self.next) = (0, self.said + 1, Instant::now() + pause);
        }
        Ok(is_complete)
    }
}
