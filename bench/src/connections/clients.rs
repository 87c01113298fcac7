//! Clients on a host of their own: all of a group are served by one thread.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use std::os::fd::AsFd;

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
    for client in clients.iter() {
        client.stream.set_nonblocking(true)?;
    }
    while !shared.stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        for client in clients.iter_mut().filter(|client| client.waiting.is_none() && client.next <= now) {
            client.stream.write_all(&message(client.said))?;
            client.waiting = Some(Instant::now());
        }
        let mut polled: Vec<PollFd<'_>> =
            clients.iter().map(|client| PollFd::new(client.stream.as_fd(), PollFlags::POLLIN)).collect();
        poll(&mut polled, PollTimeout::from(1u8))?;
        let readable: Vec<bool> = polled.iter().map(|one| one.any().unwrap_or(true)).collect();
        for (client, _) in clients.iter_mut().zip(readable).filter(|(_, readable)| *readable) {
            client.hear(pause, shared)?;
        }
        for client in clients.iter() {
            ensure!(client.waiting.is_none_or(|since| since.elapsed() < PATIENCE), "an answer did not come");
        }
    }
    Ok(())
}

impl Client {
    fn hear(&mut self, pause: Duration, shared: &Shared) -> Result<()> {
        let mut answer = [0; LENGTH];
        let got = match self.stream.read(&mut answer[self.heard..]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            got => got?,
        };
        ensure!(got > 0, "the server has left");
        ensure!(
            answer[self.heard..self.heard + got] == message(self.said)[self.heard..self.heard + got],
            "a client heard something else than it said"
        );
        self.heard += got;
        if self.heard == LENGTH {
            let since = self.waiting.take().context("an answer to nothing")?;
            let waited = since.elapsed();
            shared.longest_us.fetch_max(waited.as_micros() as u64, Ordering::Relaxed);
            (self.heard, self.said, self.next) = (0, self.said + 1, Instant::now() + pause);
        }
        Ok(())
    }
}
