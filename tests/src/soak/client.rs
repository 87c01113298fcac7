//! A client of the victim `store`: it knows every page that it has set.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Random;
use crate::host::Host;

/// Keys of one client.
const KEYS: u64 = 256;
/// Longest time without an answer, or without a server.
const PATIENCE: Duration = Duration::from_secs(90);

/// What all clients count.
pub(super) struct Figures {
    pub(super) answers: Arc<AtomicU64>,
    pub(super) broken: Arc<AtomicU64>,
}

/// Starts a client on a host; it ends with an error when an answer is wrong.
pub(super) fn start(
    host: &Host,
    server: SocketAddr,
    (number, seed): (u64, u64),
    stop: Arc<AtomicBool>,
    figures: Figures,
) -> Result<JoinHandle<Result<()>>> {
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", host.init_pid()))?;
    Ok(std::thread::spawn(move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        let mut known = Known {
            first: number * KEYS,
            versions: vec![0; KEYS as usize],
            random: Random::new(seed ^ (number + 1)),
            doubtful: None,
        };
        while !stop.load(Ordering::Relaxed) {
            let stream = connect(server)?;
            match known.converse(stream, &stop, &figures.answers) {
                Ok(()) => {}
                Err(error) if error.downcast_ref::<std::io::Error>().is_some() => {
                    figures.broken.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }))
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    let started = Instant::now();
    loop {
        match TcpStream::connect_timeout(&server, Duration::from_secs(20)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) if started.elapsed() > PATIENCE => return Err(error).context("the server is gone"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// What a client knows.
struct Known {
    first: u64,
    versions: Vec<u64>,
    random: Random,
    /// A key that was set to this version when the connection broke: it may have been heard or not.
    doubtful: Option<(u64, u64)>,
}

impl Known {
    fn converse(&mut self, mut stream: TcpStream, stop: &AtomicBool, answers: &AtomicU64) -> Result<()> {
        if let Some((key, version)) = self.doubtful {
            let has = ask(&mut stream, self.first + key, 0)?;
            let before = self.versions[key as usize];
            ensure!(has == version || has == before, "key {key} has version {has}: neither {before} nor {version}");
            self.versions[key as usize] = has;
            self.doubtful = None;
        }
        while !stop.load(Ordering::Relaxed) {
            let key = self.random.below(KEYS);
            let version = self.versions[key as usize];
            if self.random.below(2) == 0 {
                self.doubtful = Some((key, version + 1));
                let has = ask(&mut stream, self.first + key, version + 1)?;
                ensure!(has == version + 1, "key {key} was set to version {}, and has {has}", version + 1);
                self.versions[key as usize] = has;
                self.doubtful = None;
            } else {
                let has = ask(&mut stream, self.first + key, 0)?;
                ensure!(has == version, "key {key} has version {has} instead of {version}");
            }
            answers.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Says two words and hears two.
fn ask(stream: &mut TcpStream, key: u64, version: u64) -> Result<u64> {
    let question = [key.to_ne_bytes(), version.to_ne_bytes()].concat();
    stream.write_all(&question)?;
    let (mut heard, mut has) = ([0; 8], [0; 8]);
    stream.read_exact(&mut heard)?;
    stream.read_exact(&mut has)?;
    ensure!(heard == key.to_ne_bytes(), "an answer to another question");
    Ok(u64::from_ne_bytes(has))
}
