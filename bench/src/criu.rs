//! The same victims, moved by CRIU: a dump to a page server and a restore, or a dump that serves a lazy restore.
//!
//! Images lie on a tmpfs that both hosts see, so nothing but memory has to travel. CRIU has no report of its own freeze: what
//! the process sees counts, and all waiting in between is done by a program, as quickly as it can.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use godwit_tests::{Host, Running, TwoHosts, wait_until};
use tempfile::TempDir;

use crate::figures::{Engine, Figures, Metric, Run};
use crate::machine::Quiet;
use crate::passage::{Conditions, MOVE, Victim, add_own_view, megabytes_per_second};
use crate::plan::Scenario;

/// A port that nobody else uses between the two hosts.
const PORT: &str = "7400";
/// Longest time until a daemon listens.
const START: Duration = Duration::from_secs(10);

/// What CRIU is measured in.
pub const SCENARIOS: [Scenario; 2] = [Scenario::StopAndCopy, Scenario::PostCopy];

/// A move under way.
struct Journey<'a> {
    criu: &'a Path,
    hosts: &'a TwoHosts,
    images: TempDir,
    pid: String,
}

/// Makes one run.
///
/// # Errors
/// CRIU failed; its log says why.
pub fn run(criu: &Path, scenario: Scenario, size_mib: u64, conditions: &Conditions) -> Result<Run> {
    let hosts = TwoHosts::builder().mtu(conditions.mtu).build()?;
    let victim = Victim::start(&hosts, scenario, size_mib, conditions.writer)?;
    // Twice: once for the images, once for the copy.
    let quiet = victim.settle(2 * size_mib, conditions.patience)?;
    let journey = Journey::new(criu, &hosts, victim.pid)?;
    let started = Instant::now();
    let drain = match scenario {
        Scenario::PostCopy => Some(journey.lazily()?),
        Scenario::StopAndCopy => journey.at_once().map(|()| None)?,
        other => bail!("CRIU is not measured in {}", other.name()),
    };
    let total_ms = started.elapsed().as_secs_f64() * 1e3;
    let status = victim.arrival(hosts.destination.name())?;
    let mut figures = Figures::from([
        (Metric::TotalMs, total_ms),
        (Metric::MegabytesPerSecond, megabytes_per_second(size_mib, total_ms)),
    ]);
    figures.extend(drain.map(|drain| (Metric::DrainMs, drain.as_secs_f64() * 1e3)));
    add_own_view(&mut figures, &status, None);
    Ok(Run { engine: Engine::Criu, scenario, size_mib, noisy: quiet == Quiet::No, figures })
}

/// Moves process `pid` with its connections. `move_address` is called between dump and restore, when nobody has it. Returns how
/// long nobody ran.
///
/// # Errors
/// CRIU failed; its log says why.
pub fn run_with_connections(
    criu: &Path,
    hosts: &TwoHosts,
    pid: u32,
    move_address: impl FnOnce() -> Result<()>,
) -> Result<Duration> {
    let journey = Journey::new(criu, hosts, pid)?;
    let started = Instant::now();
    let dump = ["--tree", &journey.pid, "--tcp-established", "--network-lock", "nftables"];
    journey.end(journey.start(&hosts.source, "dump", &dump)?, "dump")?;
    move_address()?;
    let restore = ["--restore-detached", "--tcp-established", "--network-lock", "nftables"];
    journey.end(journey.start(&hosts.destination, "restore", &restore)?, "restore")?;
    Ok(started.elapsed())
}

impl<'a> Journey<'a> {
    fn new(criu: &'a Path, hosts: &'a TwoHosts, pid: u32) -> Result<Self> {
        let images = tempfile::Builder::new().prefix("godwit-bench-").tempdir_in("/dev/shm");
        Ok(Self { criu, hosts, images: images.context("a tmpfs for images")?, pid: pid.to_string() })
    }

    /// Everything inside the freeze: memory to the page server, then the restore.
    fn at_once(&self) -> Result<()> {
        let (source, destination) = (&self.hosts.source, &self.hosts.destination);
        let there = ["--address", destination.address(), "--port", PORT];
        let mut server = self.start(destination, "page-server", &there)?;
        wait_for_listener(destination)?;
        let dump = [&["--tree", &self.pid, "--page-server"][..], &there].concat();
        self.end(self.start(source, "dump", &dump)?, "dump")?;
        self.end_of(&mut server, "page-server")?;
        self.end(self.start(destination, "restore", &["--restore-detached"])?, "restore")
    }

    /// Everything but memory inside the freeze; yields the time from the restore to the last page.
    fn lazily(&self) -> Result<Duration> {
        let (source, destination) = (&self.hosts.source, &self.hosts.destination);
        let there = ["--address", source.address(), "--port", PORT];
        // One byte says that it serves. The only descriptor that gets through to it is a standard stream.
        let dump = [&["--tree", &self.pid, "--lazy-pages", "--status-fd", "1"][..], &there].concat();
        let mut dump = self.start(source, "dump", &dump)?;
        self.wait_while_running(&mut dump, "dump", || {
            fs::metadata(self.output("dump")).is_ok_and(|file| file.len() > 0)
        })?;
        let mut daemon = self.start(destination, "lazy-pages", &[&["--page-server"][..], &there].concat())?;
        let socket = self.images.path().join("lazy-pages.socket");
        self.wait_while_running(&mut daemon, "lazy-pages", || socket.exists())?;
        let restore = self.start(destination, "restore", &["--lazy-pages", "--restore-detached"])?;
        self.end(restore, "restore").with_context(|| {
            format!("dump: {}\nlazy-pages: {}", self.last_words("dump"), self.last_words("lazy-pages"))
        })?;
        let restored = Instant::now();
        self.end_of(&mut daemon, "lazy-pages")?;
        let drain = restored.elapsed();
        self.end_of(&mut dump, "dump")?;
        Ok(drain)
    }

    fn start(&self, host: &Host, verb: &str, arguments: &[&str]) -> Result<Running> {
        let output = fs::File::create(self.output(verb))?;
        let mut command: Command = host.command(self.criu);
        command.args([verb, "--images-dir"]).arg(self.images.path()).args([
            "--log-file",
            &format!("{verb}.log"),
            "-v2",
        ]);
        command.args(["--manage-cgroups=ignore"]).args(arguments).stdout(output.try_clone()?).stderr(output);
        host.start_command(&mut command)
    }

    /// Waits for the end of a command, which must be a good one.
    fn end(&self, mut running: Running, verb: &str) -> Result<()> {
        self.end_of(&mut running, verb)
    }

    fn end_of(&self, running: &mut Running, verb: &str) -> Result<()> {
        let status = running.wait(MOVE).with_context(|| self.last_words(verb))?;
        ensure!(status.success(), "criu {verb} ended with {status}: {}", self.last_words(verb));
        Ok(())
    }

    fn wait_while_running(&self, running: &mut Running, verb: &str, mut ready: impl FnMut() -> bool) -> Result<()> {
        wait_until(&format!("criu {verb}"), MOVE, || {
            if ready() {
                return Ok(true);
            }
            match running.ended()? {
                Some(status) => bail!("criu {verb} ended with {status}: {}", self.last_words(verb)),
                None => Ok(false),
            }
        })
    }

    fn output(&self, verb: &str) -> PathBuf {
        self.images.path().join(verb).with_extension("output")
    }

    fn last_words(&self, verb: &str) -> String {
        let log = self.images.path().join(verb).with_extension("log");
        let text = [log, self.output(verb)].map(|path| fs::read(path).unwrap_or_default()).concat();
        let text = String::from_utf8_lossy(&text).replace('\0', "");
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }
}

/// Waits until a TCP socket of a host listens on our port; it is not connected to, for a page server takes one caller only.
fn wait_for_listener(host: &Host) -> Result<()> {
    let port: u16 = PORT.parse()?;
    let local = format!(":{port:04X}");
    let table = format!("/proc/{}/net/tcp", host.init_pid());
    wait_until("the page server to listen", START, || {
        let sockets = fs::read_to_string(&table).with_context(|| table.clone())?;
        Ok(sockets.lines().any(|line| line.split_whitespace().nth(1).is_some_and(|address| address.ends_with(&local))))
    })
}
