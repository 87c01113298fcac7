//! A client of the server in the victim `datagrams`: every datagram must be answered, and once.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::Host;

/// Longest time that an answer takes; what takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(3);

/// Asks again and again, without waiting for answers.
#[derive(Debug)]
pub struct Asker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

impl Asker {
    /// Begins to ask a server, on a host.
    ///
    /// # Errors
    /// When the host is gone.
    pub fn start(host: &Host, server: SocketAddr) -> Result<Self> {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", host.init_pid()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
            ask(server, &until)
        });
        Ok(Self { stop, thread })
    }

    /// Returns how many questions were asked; each was answered, once.
    ///
    /// # Errors
    /// Names answers that are missing, came twice or are wrong.
    pub fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))?
    }
}

/// A question: its number, and some more bytes; every twentieth is longer than a packet.
fn question(number: u64) -> Vec<u8> {
    let length = if number.is_multiple_of(20) { 12_000 } else { 8 + number as usize % 500 };
    let mut bytes = number.to_ne_bytes().to_vec();
    bytes.extend((0..length).map(|at| (at as u64 * 7 + number) as u8));
    bytes
}

fn ask(server: SocketAddr, stop: &AtomicBool) -> Result<u64> {
    let any: IpAddr = if server.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0))?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(8 << 20))?;
    socket.connect(server)?;
    socket.set_nonblocking(true)?;
    let mut answers: HashMap<u64, u32> = HashMap::new();
    let mut buffer = vec![0; 65536];
    let mut hear = |answers: &mut HashMap<u64, u32>| -> Result<()> {
        while let Ok(length) = socket.recv(&mut buffer) {
            let number = u64::from_ne_bytes(buffer[..8].try_into()?);
            ensure!(buffer[..length] == question(number), "the answer to {number} is wrong");
            *answers.entry(number).or_default() += 1;
        }
        Ok(())
    };
    let mut asked = 0;
    while !stop.load(Ordering::Relaxed) {
        socket.send(&question(asked)).with_context(|| format!("question {asked}"))?;
        asked += 1;
        std::thread::sleep(Duration::from_millis(1));
        hear(&mut answers)?;
    }
    let deadline = Instant::now() + PATIENCE;
    while (answers.len() as u64) < asked && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
        hear(&mut answers)?;
    }
    let lost: Vec<u64> = (0..asked).filter(|number| !answers.contains_key(number)).collect();
    let twice: Vec<_> = answers.iter().filter(|(_, times)| **times > 1).collect();
    ensure!(lost.is_empty() && twice.is_empty(), "of {asked} questions {lost:?} had no answer, {twice:?} several");
    ensure!(asked > 50, "only {asked} questions");
    Ok(asked)
}
