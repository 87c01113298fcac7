//! Running `migrate --to … --json` and following its events while it runs.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::agents::{PAUSE_AT, PageServer};
use crate::binaries::program;
use crate::deadline::{wait_for, wait_until};
use crate::host::Host;
use crate::outcome::Migration;
use crate::proc_view::is_alive;
use crate::process::{Running, send};

/// The way memory travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Rounds while the process runs, then post-copy for the rest.
    Hybrid,
    /// Rounds, then the rest inside the freeze.
    PreCopy,
    /// Nothing before the freeze, everything on demand after it.
    PostCopy,
    /// Everything inside the freeze.
    StopAndCopy,
}

/// A `migrate` command that has not been started.
#[derive(Debug)]
pub struct Migrate<'a> {
    host: &'a Host,
    to: String,
    token: Option<PathBuf>,
    pid: u32,
    /// Descriptors, where connections alone are handed over.
    descriptors: Option<String>,
    arguments: Vec<String>,
    pause_at: Option<&'static str>,
    limit: Duration,
}

/// A `migrate` command that runs.
#[derive(Debug)]
pub struct RunningMigration {
    running: Running,
    events: Arc<Mutex<Vec<String>>>,
    stdout: Option<JoinHandle<()>>,
    stderr: Option<JoinHandle<String>>,
    limit: Duration,
}

impl Mode {
    /// All four.
    pub const ALL: [Self; 4] = [Self::Hybrid, Self::PreCopy, Self::PostCopy, Self::StopAndCopy];

    /// The word on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Hybrid => "hybrid",
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
            Self::StopAndCopy => "stop-and-copy",
        }
    }
}

impl Host {
    /// Describes the move of process `pid` (a pid on this host) to a page server.
    pub fn migrate(&self, server: &PageServer, pid: u32) -> Migrate<'_> {
        self.migrate_to(&server.address, pid).token(server.token.path())
    }

    /// Describes the move of process `pid` to an address, without a token.
    pub fn migrate_to(&self, address: &str, pid: u32) -> Migrate<'_> {
        let limit = Duration::from_secs(60);
        let arguments = Vec::new();
        let to = address.to_owned();
        Migrate { host: self, to, token: None, pid, descriptors: None, arguments, pause_at: None, limit }
    }

    /// Describes handing connections of process `pid` over: `descriptors` in the words of the command line.
    pub fn hand_over(&self, server: &PageServer, pid: u32, descriptors: &str) -> Migrate<'_> {
        Migrate { descriptors: Some(descriptors.to_owned()), ..self.migrate(server, pid) }
    }
}

impl Migrate<'_> {
    /// Chooses the mode; without it the program's default applies.
    pub fn mode(self, mode: Mode) -> Self {
        self.arguments(&["--mode", mode.word()])
    }

    /// Uses another token file.
    pub fn token(mut self, path: impl Into<PathBuf>) -> Self {
        self.token = Some(path.into());
        self
    }

    /// Adds words to the command line.
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|word| (*word).to_owned()));
        self
    }

    /// Has it stop itself at a point, see CONTRIBUTING.md.
    pub fn pause_at(mut self, point: &'static str) -> Self {
        self.pause_at = Some(point);
        self
    }

    /// Sets how long it may take before it is killed and the test fails (60 s without this).
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// The program is not built or cannot be started.
    pub fn start(self) -> Result<RunningMigration> {
        let mut command = self.host.command(program("migrate")?);
        command.args(self.descriptors.iter().map(|_| "connection"));
        command.args(["--to", &self.to, &self.pid.to_string()]).args(&self.descriptors);
        command.arg("--json").args(&self.arguments);
        if let Some(token) = &self.token {
            command.arg("--token-file").arg(token);
        }
        command.envs(self.pause_at.map(|point| (PAUSE_AT, point)));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut running = self.host.start_command(&mut command)?;
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let stdout = running.take_stdout().context("standard output is a pipe")?;
        let stdout = std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Ok(mut lines) = sink.lock() {
                    lines.push(line);
                }
            }
        });
        let mut stderr = running.take_stderr().context("standard error is a pipe")?;
        let stderr = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = stderr.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        Ok(RunningMigration { running, events, stdout: Some(stdout), stderr: Some(stderr), limit: self.limit })
    }

    /// Starts it and waits for its end.
    ///
    /// # Errors
    /// It cannot be started, did not end in time, or wrote something else than JSON. A failed move is no error here.
    pub fn run(self) -> Result<Migration> {
        self.start()?.finish()
    }
}

impl RunningMigration {
    /// The program, to signal it.
    pub fn process(&self) -> &Running {
        &self.running
    }

    /// Tells how it ended, if it has.
    ///
    /// # Errors
    /// waitpid(2) failed.
    pub fn ended(&mut self) -> Result<Option<std::process::ExitStatus>> {
        self.running.ended()
    }

    /// Kills the program and then its agent, which stands still: an agent that is killed alone has a successor.
    ///
    /// # Errors
    /// They do not go.
    pub fn abandon(self, agent: u32) -> Result<()> {
        self.running.signal(Signal::SIGKILL)?;
        send(agent, Signal::SIGKILL)?;
        self.finish()?;
        wait_until("the agent to be gone", Duration::from_secs(5), || Ok(!is_alive(agent)))
    }

    /// Waits for the event in which the phase called `name` begins (letter case and hyphens do not matter).
    ///
    /// # Errors
    /// The program ended before, or nothing came within 30 s.
    pub fn wait_for_phase(&mut self, name: &str) -> Result<Value> {
        let wanted = plain(name);
        self.wait_for_event(&format!("phase {name}"), |event| {
            event.get("phase").and_then(Value::as_str).is_some_and(|phase| plain(phase) == wanted)
        })
    }

    /// Waits for an event.
    ///
    /// # Errors
    /// The program ended before, or nothing came within 30 s.
    pub fn wait_for_event(&mut self, what: &str, matches: impl Fn(&Value) -> bool) -> Result<Value> {
        let events = Arc::clone(&self.events);
        let running = &mut self.running;
        wait_for(what, Duration::from_secs(30), || {
            let ended = running.ended()?;
            let found = parsed(&events).into_iter().find(|event| matches(event));
            match (found, ended) {
                (Some(event), _) => Ok(Some(event)),
                (None, Some(status)) => bail!("migrate ended with {status} before {what}: {:?}", parsed(&events)),
                (None, None) => Ok(None),
            }
        })
    }

    /// Presses Ctrl-C.
    ///
    /// # Errors
    /// The program has ended.
    pub fn interrupt(&self) -> Result<()> {
        self.running.signal(Signal::SIGINT)
    }

    /// Waits for the program's end.
    ///
    /// # Errors
    /// It did not end in time, or wrote something else than JSON.
    pub fn finish(mut self) -> Result<Migration> {
        let status = self.running.wait(self.limit);
        if status.is_err() {
            let _ = self.running.signal(Signal::SIGKILL);
        }
        if let Some(reader) = self.stdout.take() {
            let _ = reader.join();
        }
        let stderr = self.stderr.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        let lines = self.events.lock().map(|lines| lines.clone()).unwrap_or_default();
        let status = status.with_context(|| format!("events: {lines:?}; stderr: {stderr}"))?;
        Migration::parse(status, &lines, stderr)
    }
}

fn parsed(lines: &Mutex<Vec<String>>) -> Vec<Value> {
    let lines = lines.lock().map(|lines| lines.clone()).unwrap_or_default();
    lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn plain(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|letter| letter.to_ascii_lowercase()).collect()
}
