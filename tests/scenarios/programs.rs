//! Programs that nobody wrote for this: an interpreter with threads, a database with 200 MB in it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Host, Mode, Running, TwoHosts, python, wait_for, wait_until};

/// What fails here says nothing about the engine.
#[test]
fn python_at_home() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios/programs/threads.py");
    let victim = hosts.source.program_victim("python", &python()?, &[script])?;
    victim.expect_beats(50)?;
    victim.finish().map(drop)
}

fn python_moves(mode: Mode) -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios/programs/threads.py");
    let mut victim = hosts.source.program_victim("python", &python()?, &[script])?;
    victim.expect_beats(20)?;
    let migration =
        hosts.source.migrate(&server, victim.pid()).mode(mode).arguments(&["--downtime-target", "2000"]).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(50)?;
    victim.finish().map(drop)
}

#[test]
fn python_hybrid() -> Result<()> {
    python_moves(Mode::Hybrid)
}

#[test]
fn python_pre_copy() -> Result<()> {
    python_moves(Mode::PreCopy)
}

#[test]
fn python_post_copy() -> Result<()> {
    python_moves(Mode::PostCopy)
}

const PORT: u16 = 6379;
const KEYS: u64 = 20_000;
const VALUE: usize = 10_000;

/// The value of a key: its number, then bytes that do not compress.
fn value(key: u64) -> Vec<u8> {
    let mut state = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(VALUE + 8);
    while bytes.len() < VALUE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(VALUE);
    bytes
}

/// A connection to a Redis server that speaks just enough of its protocol.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(host: &Host) -> Result<Self> {
        let stream = wait_for("redis-server to listen", Duration::from_secs(10), || Ok(host.connect(PORT).ok()))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    fn send(&mut self, words: &[&[u8]]) -> Result<()> {
        let mut command = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            command.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            command.extend_from_slice(word);
            command.extend_from_slice(b"\r\n");
        }
        self.0.get_mut().write_all(&command).context("writing to redis-server")
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line).context("reading from redis-server")?;
        Ok(line.trim_end().to_owned())
    }

    fn bulk(&mut self) -> Result<Vec<u8>> {
        let line = self.line()?;
        let length: usize =
            line.strip_prefix('$').and_then(|text| text.parse().ok()).with_context(|| format!("answer {line}"))?;
        let mut bytes = vec![0; length + 2];
        self.0.read_exact(&mut bytes)?;
        bytes.truncate(length);
        Ok(bytes)
    }

    /// Writes all keys, a batch at a time.
    fn fill(&mut self) -> Result<()> {
        for first in (0..KEYS).step_by(50) {
            for key in first..first + 50 {
                self.send(&[b"SET", format!("key-{key}").as_bytes(), &value(key)])?;
            }
            for _ in 0..50 {
                let answer = self.line()?;
                ensure!(answer == "+OK", "SET: {answer}");
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<()> {
        for first in (0..KEYS).step_by(20) {
            for key in first..first + 20 {
                self.send(&[b"GET", format!("key-{key}").as_bytes()])?;
            }
            for key in first..first + 20 {
                ensure!(self.bulk()? == value(key), "the value of key-{key} has changed");
            }
        }
        self.send(&[b"DBSIZE"])?;
        let size = self.line()?;
        ensure!(size == format!(":{KEYS}"), "keys: {size}");
        Ok(())
    }
}

fn start_redis(hosts: &TwoHosts) -> Result<Running> {
    let directory = hosts.directory().join("redis");
    std::fs::create_dir(&directory)?;
    let mut command = hosts.source.command("redis-server");
    command.args([
        "--port",
        &PORT.to_string(),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--daemonize",
        "no",
    ]);
    command.arg("--dir").arg(&directory).args(["--logfile", "redis.log"]);
    let output = std::fs::File::create(directory.join("output"))?;
    command.stdout(Stdio::from(output.try_clone()?)).stderr(output);
    hosts.source.start_command(&mut command).context("redis-server is needed: apt-get install redis-server")
}

/// How many sockets a process holds.
fn sockets(host_pid: u32) -> Result<usize> {
    Ok(godwit_tests::ProcView::read(host_pid)?.fds.values().filter(|link| link.starts_with("socket:")).count())
}

/// What fails here says nothing about the engine.
#[test]
fn redis_at_home() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let _redis = start_redis(&hosts)?;
    let mut client = Client::connect(&hosts.source)?;
    client.fill()?;
    client.verify()
}

fn redis_moves(mode: Mode) -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let redis = start_redis(&hosts)?;
    let mut client = Client::connect(&hosts.source)?;
    client.fill()?;
    let with_client = sockets(redis.host_pid())?;
    drop(client);
    wait_until("redis-server to see its client go", Duration::from_secs(5), || {
        Ok(sockets(redis.host_pid())? < with_client)
    })?;
    let migration = hosts.source.migrate(&server, hosts.source.pid_here(redis.host_pid())?).mode(mode).run()?;
    migration.expect_moved().with_context(|| server.log())?;
    let moved = hosts.destination.host_pid(migration.dest_pid()?)?;
    ensure!(hosts.destination.is_home_of(moved), "redis-server is not at the destination");
    ensure!(hosts.source.connect(PORT).is_err(), "somebody still listens at the source");
    let mut client = Client::connect(&hosts.destination)?;
    client.verify().with_context(|| migration.text())?;
    client.send(&[b"SET", b"another", b"value"])?;
    ensure!(client.line()? == "+OK", "redis-server takes no more");
    Ok(())
}

#[test]
fn redis_hybrid() -> Result<()> {
    redis_moves(Mode::Hybrid)
}

#[test]
fn redis_post_copy() -> Result<()> {
    redis_moves(Mode::PostCopy)
}

#[test]
fn redis_pre_copy() -> Result<()> {
    redis_moves(Mode::PreCopy)
}
