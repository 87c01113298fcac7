//! Clients of a Redis server: each has keys of its own, writes them anew again and again, and knows every answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};

use crate::service::Duty;

/// Keys of one connection.
const KEYS: u64 = 10;

struct Connection {
    stream: BufReader<TcpStream>,
    number: u64,
    /// Bytes of its values.
    size: usize,
}

/// The version of a key that is written in a round.
fn version(round: u64) -> u64 {
    round / (2 * KEYS)
}

/// The value that a key has: bytes that do not compress.
fn value((number, size): (u64, usize), key: u64, version: u64) -> Vec<u8> {
    let mut state = (number * KEYS + key).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version.wrapping_mul(0xd605_0bb7) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

impl Connection {
    /// In even rounds a key is written, in odd ones it is read.
    fn ask(&mut self, round: u64) -> Result<()> {
        let key = (round / 2) % KEYS;
        let name = format!("{}-{key}", self.number);
        let mut command = Vec::new();
        if round.is_multiple_of(2) {
            write!(command, "*3\r\n$3\r\nSET\r\n${}\r\n{name}\r\n${}\r\n", name.len(), self.size)?;
            command.extend(value((self.number, self.size), key, version(round)));
            command.extend(b"\r\n");
        } else {
            write!(command, "*2\r\n$3\r\nGET\r\n${}\r\n{name}\r\n", name.len())?;
        }
        Ok(self.stream.get_mut().write_all(&command)?)
    }

    fn hear(&mut self, round: u64) -> Result<()> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        if round.is_multiple_of(2) {
            ensure!(line == "+OK\r\n", "SET: {line}");
            return Ok(());
        }
        ensure!(line == format!("${}\r\n", self.size), "GET: {line}");
        let mut bytes = vec![0; self.size + 2];
        self.stream.read_exact(&mut bytes)?;
        let key = (round / 2) % KEYS;
        ensure!(
            bytes[..self.size] == value((self.number, self.size), key, version(round)),
            "a wrong value of key {key}"
        );
        Ok(())
    }
}

/// Asks over connections of these numbers, all at once, and checks all answers, again and again. Values have `size` bytes.
pub(crate) fn work(duty: &Duty, numbers: std::ops::Range<u64>, size: usize) -> Result<()> {
    let connect = |number| Ok(Connection { stream: BufReader::new(duty.connect()?), number, size });
    let mut connections = numbers.map(connect).collect::<Result<Vec<_>>>()?;
    let mut round = 0;
    while duty.goes_on() {
        for it in &mut connections {
            it.ask(round).with_context(|| format!("asking in round {round} of connection {}", it.number))?;
        }
        for it in &mut connections {
            it.hear(round).with_context(|| format!("the answer in round {round} to connection {}", it.number))?;
        }
        duty.done(1);
        round += 1;
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(())
}
