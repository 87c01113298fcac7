//! Clients that speak HTTP/1.1 over connections that they keep, and WebSocket (RFC 6455).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::service::{ADDRESS, Duty};

/// One connection.
pub(crate) struct Http(BufReader<TcpStream>);

impl Http {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self(BufReader::new(stream))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "the connection has ended");
        Ok(line.trim_end().to_owned())
    }

    /// Sends a request and reads the head of its answer; yields the length of what follows.
    fn request(&mut self, method: &str, target: &str, body: &[u8]) -> Result<usize> {
        let mut bytes = Vec::new();
        write!(bytes, "{method} {target} HTTP/1.1\r\nHost: {ADDRESS}\r\nContent-Length: {}\r\n\r\n", body.len())?;
        bytes.extend(body);
        self.0.get_mut().write_all(&bytes)?;
        let status = self.line()?;
        ensure!(status == "HTTP/1.1 200 OK", "{method} {target}: {status}");
        let mut length = None;
        loop {
            let line = self.line()?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(number) = line.strip_prefix("content-length:") {
                length = Some(number.trim().parse()?);
            }
            ensure!(line != "connection: close", "the server closes the connection");
        }
        length.context("an answer without a length")
    }

    fn body(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// Fetches a file again and again at no more than so many bytes a second, and compares every byte of it.
pub(crate) fn download(duty: &Duty, target: &str, content: &[u8], rate: u64) -> Result<()> {
    const PIECE: usize = 32 << 10;
    let mut http = Http::new(duty.connect()?);
    while duty.goes_on() {
        let length = http.request("GET", target, b"")?;
        ensure!(length == content.len(), "{length} bytes are announced, not {}", content.len());
        let begun = Instant::now();
        let mut place = 0;
        while place < length {
            let piece = http.body(PIECE.min(length - place))?;
            ensure!(piece == content[place..place + piece.len()], "wrong bytes behind {place}");
            place += piece.len();
            duty.done(1);
            let due = begun + Duration::from_micros(place as u64 * 1_000_000 / rate);
            // The last file is fetched to its end all the same, but not at leisure.
            if duty.goes_on() {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        }
    }
    Ok(())
}

/// Fetches a file again and again at no more than so many bytes a second from a server that closes each connection behind its answer, long
/// before all of it has come.
pub(crate) fn download_and_part(duty: &Duty, target: &str, content: &[u8], rate: u64) -> Result<()> {
    const PIECE: usize = 16 << 10;
    while duty.goes_on() {
        let mut http = Http::new(duty.connect()?);
        write!(http.0.get_mut(), "GET {target} HTTP/1.0\r\n\r\n")?;
        let status = http.line()?;
        ensure!(status == "HTTP/1.0 200 OK", "{target}: {status}");
        while !http.line()?.is_empty() {}
        let begun = Instant::now();
        let mut place = 0;
        while place < content.len() {
            let piece = http.body(PIECE.min(content.len() - place)).with_context(|| format!("behind {place}"))?;
            ensure!(piece == content[place..place + piece.len()], "wrong bytes behind {place}");
            place += piece.len();
            duty.done(1);
            let due = begun + Duration::from_micros(place as u64 * 1_000_000 / rate);
            if duty.goes_on() {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        }
        ensure!(http.0.read(&mut [0])? == 0, "more than the file has come");
    }
    Ok(())
}

/// Has sums worked out and words turned round over one connection, which counts its requests.
pub(crate) fn ask_for_sums(duty: &Duty) -> Result<()> {
    let mut http = Http::new(duty.connect()?);
    let mut number = 0u64;
    while duty.goes_on() {
        number += 1;
        let (method, target, body, expected) = if number.is_multiple_of(2) {
            let words = format!("word {number} ").repeat(300);
            let turned: String = words.chars().rev().collect();
            ("POST", "/turn".to_owned(), words, format!("{number} {turned}"))
        } else {
            let (one, two) = (number * 7919, number * 104_729);
            ("GET", format!("/sum?{one}&{two}"), String::new(), format!("{number} {}", one + two))
        };
        let length = http.request(method, &target, body.as_bytes())?;
        let answer = String::from_utf8(http.body(length)?)?;
        ensure!(answer == expected, "{method} {target} number {number}: {answer}");
        duty.done(1);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A WebSocket on which the server counts by itself, and repeats what it is told.
pub(crate) fn listen_and_talk(duty: &Duty) -> Result<()> {
    // The example of RFC 6455, section 1.3.
    let (key, proof) = ("dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    let mut http = Http::new(duty.connect()?);
    let request = format!(
        "GET /talk HTTP/1.1\r\nHost: {ADDRESS}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    );
    http.0.get_mut().write_all(request.as_bytes())?;
    ensure!(http.line()?.starts_with("HTTP/1.1 101"), "the server does not change to WebSocket");
    let mut proven = false;
    loop {
        let line = http.line()?;
        if line.is_empty() {
            break;
        }
        proven |= line.strip_prefix("Sec-WebSocket-Accept: ") == Some(proof);
    }
    ensure!(proven, "the server has not understood the key");
    let (mut ticks, mut said, mut heard) = (0u64, 0u64, 0u64);
    while duty.goes_on() {
        if said == heard {
            said += 1;
            http.0.get_mut().write_all(&masked(format!("say {said}").as_bytes()))?;
        }
        let text = unmasked(&mut http.0)?;
        if let Some(number) = text.strip_prefix("tick ") {
            ticks += 1;
            ensure!(number.parse() == Ok(ticks), "tick {number} instead of {ticks}");
            duty.done(1);
        } else {
            heard += 1;
            ensure!(text == format!("say {heard}"), "{text} instead of say {heard}");
        }
    }
    ensure!(heard > 0, "nothing was said");
    Ok(())
}

/// A text frame as a client sends it.
fn masked(text: &[u8]) -> Vec<u8> {
    const MASK: [u8; 4] = [0x12, 0x34, 0x56, 0x78];
    assert!(text.len() < 126, "short ones only");
    let mut frame = vec![0x81, 0x80 | text.len() as u8];
    frame.extend(MASK);
    frame.extend(text.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// The text of a frame as a server sends it.
fn unmasked(stream: &mut impl Read) -> Result<String> {
    let mut head = [0; 2];
    stream.read_exact(&mut head)?;
    ensure!(head[0] == 0x81 && head[1] < 126, "a frame that begins with {head:?}");
    let mut text = vec![0; head[1].into()];
    stream.read_exact(&mut text)?;
    Ok(String::from_utf8(text)?)
}
