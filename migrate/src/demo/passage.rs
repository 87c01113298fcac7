//! One move in the demo: `migrate --json` on the host that the worker is on, its events shown as they come.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::cancel::Cancel;
use crate::display::Display;
use crate::event::Event;
use crate::report::Report;

use super::observation::Span;
use super::worker::wall_clock_us;

/// How long a move may take.
const LIMIT: Duration = Duration::from_secs(300);
/// How long a move may take to let go after Ctrl-C.
const LETTING_GO: Duration = Duration::from_secs(10);

/// A finished move.
#[derive(Debug)]
pub(super) struct Passage {
    /// When it began and ended, in microseconds since 1970.
    pub(super) whole: Span,
    /// The same for the freeze, as far as its events tell; empty and at the end if they were not heard.
    pub(super) freeze: Span,
    /// What it came to.
    pub(super) report: Report,
}

/// What a command's output came to.
#[derive(Debug, Default)]
struct Heard {
    frozen: Option<u64>,
    running: Option<u64>,
    report: Option<Report>,
}

/// A line and when it came, in microseconds since 1970.
struct Line {
    at_us: u64,
    text: String,
}

/// Runs a `migrate --json` command to its end.
pub(super) fn run(mut command: Command, display: Display, cancel: &Cancel) -> Result<Passage> {
    let start = wall_clock_us();
    let mut child = command.stdout(Stdio::piped()).spawn().context("nsenter(1) cannot be started")?;
    let heard = follow(&mut child, &display, cancel);
    if heard.is_err() {
        signal(&child, Signal::SIGKILL);
    }
    let status = child.wait()?;
    let heard = heard?;
    let Some(report) = heard.report else { bail!("migrate ended with {status} and without a report") };
    display.finish(&report);
    let end = wall_clock_us();
    let freeze = Span { start: heard.frozen.unwrap_or(end), end: heard.running.unwrap_or(end) };
    Ok(Passage { whole: Span { start, end }, freeze, report })
}

/// Shows events until the command's output ends.
fn follow(child: &mut Child, display: &Display, cancel: &Cancel) -> Result<Heard> {
    let lines = lines(child)?;
    let mut end = Instant::now() + LIMIT;
    let mut asked_to_stop = false;
    let mut heard = Heard::default();
    loop {
        match lines.recv_timeout(Duration::from_millis(50)) {
            Ok(line) => heard.line(&line, display),
            Err(RecvTimeoutError::Disconnected) => return Ok(heard),
            Err(RecvTimeoutError::Timeout) if Instant::now() > end => bail!("the move took too long"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if cancel.is_cancelled() && !asked_to_stop {
            asked_to_stop = true;
            end = Instant::now() + LETTING_GO;
            signal(child, Signal::SIGINT);
        }
    }
}

impl Heard {
    fn line(&mut self, line: &Line, display: &Display) {
        if let Ok(report) = serde_json::from_str(&line.text) {
            self.report = Some(report);
        } else if let Ok(event) = serde_json::from_str(&line.text) {
            match event {
                Event::Frozen => self.frozen = Some(line.at_us),
                Event::Running { .. } => self.running = Some(line.at_us),
                _ => {}
            }
            display.show(event);
        }
    }
}

fn lines(child: &mut Child) -> Result<Receiver<Line>> {
    let output = child.stdout.take().context("standard output is a pipe")?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for text in BufReader::new(output).lines().map_while(Result::ok) {
            if sender.send(Line { at_us: wall_clock_us(), text }).is_err() {
                break;
            }
        }
    });
    Ok(receiver)
}

/// Signals the whole process group: nsenter(1) hands nothing on to the program that it started.
fn signal(child: &Child, signal: Signal) {
    if let Ok(group) = i32::try_from(child.id()) {
        let _ = killpg(Pid::from_raw(group), signal);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;

    use super::*;
    use crate::display::Audience;
    use crate::report::Outcome;
    use crate::request::Request;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).process_group(0).stdin(Stdio::null());
        command
    }

    fn display() -> Display {
        Display::start(Audience::Log, "host")
    }

    #[test]
    fn the_report_is_found_behind_events_and_noise() {
        let report = Report { outcome: Outcome::Moved, ..Report::new(&Request::new(7, "host")) };
        let line = serde_json::to_string(&report).unwrap();
        let script = format!(
            "echo noise; echo '{{\"event\":\"later\"}}'; echo '{{\"event\":\"frozen\",\"at_ms\":1}}'; echo '{line}'"
        );
        let passage = run(shell(&script), display(), &Cancel::new().unwrap()).unwrap();
        assert_eq!(passage.report, report);
        let Passage { whole, freeze, .. } = passage;
        assert!(whole.start <= freeze.start && freeze.start <= freeze.end && freeze.end <= whole.end);
    }

    #[test]
    fn a_program_without_a_report_is_an_error() {
        let error = run(shell("exit 7"), display(), &Cancel::new().unwrap()).unwrap_err();
        assert!(error.to_string().contains('7'), "{error}");
    }

    #[test]
    fn a_cancelled_move_is_asked_to_stop() {
        let cancel = Cancel::new().unwrap();
        cancel.cancel();
        let started = Instant::now();
        run(shell("exec sleep 60"), display(), &cancel).unwrap_err();
        assert!(started.elapsed() < LETTING_GO);
    }
}
