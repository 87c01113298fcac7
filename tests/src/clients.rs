//! Clients of the victim `connections` that check every byte.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrStorage, bind, connect, socket};

use crate::Host;

/// Longer than any freeze; what takes longer has been lost and forgotten.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The byte at a position of a stream.
fn pattern(position: u64) -> u8 {
    (position.wrapping_mul(31).wrapping_add((position >> 8).wrapping_mul(7)).wrapping_add(position >> 16)) as u8
}

/// Bytes of the stream from a position on.
pub fn patterned(from: u64, length: usize) -> Vec<u8> {
    (from..).take(length).map(pattern).collect()
}

/// Says something and hears it back, again and again. Returns how often.
///
/// # Errors
/// What the client saw that it should not have.
pub fn converse(mut stream: TcpStream, stop: &AtomicBool) -> Result<u64> {
    let mut said = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let words = format!("this is message {said:12}");
        stream.write_all(words.as_bytes())?;
        let mut heard = vec![0; words.len()];
        stream.read_exact(&mut heard)?;
        ensure!(heard == words.as_bytes(), "said {words}, heard {}", String::from_utf8_lossy(&heard));
        said += 1;
        std::thread::sleep(Duration::from_millis(3));
    }
    Ok(said)
}

/// Compares what comes until it is told to stop. Returns how much that was.
///
/// # Errors
/// What the client saw that it should not have.
pub fn download(mut stream: TcpStream, stop: &AtomicBool) -> Result<u64> {
    let mut buffer = vec![0; 64 << 10];
    let mut position = 0;
    while !stop.load(Ordering::Relaxed) {
        let got = stream.read(&mut buffer)?;
        ensure!(got > 0, "the stream ended after {position} bytes");
        ensure!(buffer[..got] == patterned(position, got), "wrong bytes after {position}");
        position += got as u64;
    }
    Ok(position)
}

/// Sends until it is told to stop, and hears how much arrived.
///
/// # Errors
/// What the client saw that it should not have.
pub fn upload(mut stream: TcpStream, stop: &AtomicBool) -> Result<u64> {
    let mut position = 0;
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&patterned(position, 16 << 10))?;
        position += 16 << 10;
    }
    finish_upload(stream, position)
}

/// Sends no more and hears how much has arrived.
///
/// # Errors
/// What the client saw that it should not have.
pub fn finish_upload(mut stream: TcpStream, sent: u64) -> Result<u64> {
    stream.shutdown(Shutdown::Write)?;
    let mut count = [0; 8];
    stream.read_exact(&mut count)?;
    ensure!(u64::from_ne_bytes(count) == sent, "{} bytes of {sent} arrived", u64::from_ne_bytes(count));
    expect_end(stream)?;
    Ok(sent)
}

/// Expects that nothing more comes.
///
/// # Errors
/// What the client saw that it should not have.
pub fn expect_end(mut stream: TcpStream) -> Result<()> {
    ensure!(stream.read(&mut [0])? == 0, "more came after the end");
    Ok(())
}

/// A client on `host` that calls again and again, on a thread of its own, which returns how often.
///
/// # Errors
/// The host's network namespace cannot be opened; by the thread, what the client saw that it should not have.
pub fn caller(host: &Host, address: SocketAddr, stop: Arc<AtomicBool>) -> Result<JoinHandle<Result<u64>>> {
    on_a_thread_in(host, move || Ok(call_again(address, &stop)?.0))
}

/// As [`caller`]; its thread returns the longest time that a call took.
///
/// # Errors
/// As [`caller`].
pub fn timed_caller(host: &Host, address: SocketAddr, stop: Arc<AtomicBool>) -> Result<JoinHandle<Result<Duration>>> {
    on_a_thread_in(host, move || Ok(call_again(address, &stop)?.1))
}

/// A client on `host` whose requests are answered, and who does not hear the answers, on a thread of its own: one request every 300 ms, as
/// who looks for open ports sends them.
///
/// # Errors
/// The host's network namespace or packet filter cannot be used.
pub fn deaf_caller(host: &Host, address: SocketAddr, stop: Arc<AtomicBool>) -> Result<JoinHandle<Result<u64>>> {
    const PORTS: std::ops::Range<u16> = 20_000..20_100;
    const PAUSE: Duration = Duration::from_millis(300);
    let answers = format!("tcp sport {} tcp dport {}-{} drop", address.port(), PORTS.start, PORTS.end);
    let table = format!("table inet deaf {{ chain in {{ type filter hook prerouting priority raw; {answers}; }}; }}");
    host.run("nft", &[&table])?;
    on_a_thread_in(host, move || {
        let mut requests = Vec::new();
        for port in PORTS.take_while(|_| !stop.load(Ordering::Relaxed)) {
            let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK, None)?;
            bind(socket.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port))?;
            match connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
                Err(nix::Error::EINPROGRESS) => requests.push(socket),
                other => bail!("a request that nobody answers: {other:?}"),
            }
            std::thread::sleep(PAUSE);
        }
        Ok(requests.len() as u64)
    })
}

fn on_a_thread_in<T: Send + 'static>(
    host: &Host,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<JoinHandle<Result<T>>> {
    let namespace = File::open(format!("/proc/{}/ns/net", host.init_pid()))?;
    Ok(std::thread::spawn(move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        work()
    }))
}

/// Gives the number of calls, and the longest time that one took.
fn call_again(address: SocketAddr, stop: &AtomicBool) -> Result<(u64, Duration)> {
    let (mut calls, mut longest) = (0, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"ehello")?;
        let mut heard = [0; 5];
        stream.read_exact(&mut heard).context("the answer to a new client")?;
        calls += 1;
        longest = longest.max(begun.elapsed());
    }
    Ok((calls, longest))
}
