//! Clients of the victim `connections` that check every byte.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

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
    let namespace = File::open(format!("/proc/{}/ns/net", host.init_pid()))?;
    Ok(std::thread::spawn(move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        call_again(address, &stop)
    }))
}

fn call_again(address: SocketAddr, stop: &AtomicBool) -> Result<u64> {
    let mut calls = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"ehello")?;
        let mut heard = [0; 5];
        stream.read_exact(&mut heard).context("the answer to a new client")?;
        calls += 1;
    }
    Ok(calls)
}
