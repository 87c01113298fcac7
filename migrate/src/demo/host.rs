//! One of the demo's hosts: namespaces, and the process that keeps them.
//!
//! The keeper is the first process of the host's PID namespace. It ends when the demo does, in whatever way, because then
//! its standard input ends; and with it the kernel ends every other process of the host.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::cli::DemoHostArguments;

/// How long a host may take to come up or to go down.
const PATIENCE: Duration = Duration::from_secs(5);

/// A host of the demo. When it is dropped everything on it is killed.
#[derive(Debug)]
pub(super) struct Host {
    /// unshare(1): it is in all of the host's namespaces but the PID namespace, which is its children's.
    holder: Child,
    /// The keeper's standard input.
    lifeline: Option<ChildStdin>,
    /// Programs that were started here and are waited for when all is over.
    started: Vec<Child>,
}

impl Host {
    /// Makes a host without network. Processes get pids counted from `first_pid` on.
    pub(super) fn start(name: &str, first_pid: i32, program: &Path) -> Result<Self> {
        let mut command = Command::new("unshare");
        command
            .args(["--net", "--mount", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--"])
            .arg(program)
            .args(["demo-host", name, &first_pid.to_string()]);
        // A process group of its own: Ctrl-C is for the demo to answer.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = command.spawn().context("unshare(1) cannot be started")?;
        let lifeline = holder.stdin.take();
        let words = holder.stdout.take();
        let host = Self { holder, lifeline, started: Vec::new() };
        let mut ready = String::new();
        BufReader::new(words.context("standard output is a pipe")?).read_line(&mut ready)?;
        ensure!(ready == "ready\n", "{name} did not come up");
        Ok(host)
    }

    /// The process whose network namespace is the host's.
    pub(super) fn holder(&self) -> u32 {
        self.holder.id()
    }

    /// A command that runs on this host, with the demo's standard streams replaced by `/dev/null`.
    pub(super) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let holder = self.holder();
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &holder.to_string(), "--net", "--mount", "--ipc", "--uts"])
            .arg(format!("--pid=/proc/{holder}/ns/pid_for_children"))
            .arg("--")
            .arg(program);
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Starts a program that stays.
    pub(super) fn start_program(&mut self, mut command: Command) -> Result<()> {
        let child = command.spawn().context("nsenter(1) cannot be started")?;
        self.started.push(child);
        Ok(())
    }

    /// Runs a program to its end.
    pub(super) fn run(&self, program: &str, arguments: &[&str]) -> Result<()> {
        let mut command = self.command(program);
        let output = command.args(arguments).stderr(Stdio::piped()).output().context("nsenter(1) cannot be started")?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), words.trim());
        Ok(())
    }

    /// Waits until a UDP socket of the host is bound to `port`.
    pub(super) fn wait_for_udp(&mut self, port: u16) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        let wanted = format!(":{port:04X}");
        while Instant::now() < end {
            for table in ["udp", "udp6"] {
                let sockets = fs::read_to_string(format!("/proc/{}/net/{table}", self.holder())).unwrap_or_default();
                if sockets
                    .lines()
                    .any(|line| line.split_whitespace().nth(1).is_some_and(|local| local.ends_with(&wanted)))
                {
                    return Ok(());
                }
            }
            for child in &mut self.started {
                if let Some(status) = child.try_wait()? {
                    bail!("a program ended with {status}");
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("nothing listens on port {port}")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end && matches!(self.holder.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Killing the holder kills the keeper: unshare --kill-child. No more than a second way to the same end.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        for child in &mut self.started {
            let _ = child.wait();
        }
    }
}

/// Lays a cable between two hosts and gives them their addresses, both in a network of 24 bits.
pub(super) fn join((one, first): (&Host, &str), (other, second): (&Host, &str)) -> Result<()> {
    const INTERFACE: &str = "cable";
    const PACKET: &str = "9000";
    let output = Command::new("ip")
        .args(["link", "add", "name", INTERFACE, "mtu", PACKET, "netns", &one.holder().to_string(), "type", "veth"])
        .args(["peer", "name", INTERFACE, "mtu", PACKET, "netns", &other.holder().to_string()])
        .stdin(Stdio::null())
        .output()
        .context("ip(8) cannot be started")?;
    ensure!(output.status.success(), "no cable: {}", String::from_utf8_lossy(&output.stderr).trim());
    for (host, address) in [(one, first), (other, second)] {
        host.run("ip", &["link", "set", "lo", "up"])?;
        host.run("ip", &["address", "add", &format!("{address}/24"), "dev", INTERFACE])?;
        host.run("ip", &["link", "set", INTERFACE, "up"])?;
    }
    Ok(())
}

/// Keeps a host alive until standard input ends: what runs as the first process of its PID namespace.
///
/// # Errors
/// This is not the first process of a PID namespace, or the host cannot be named.
pub fn keep(arguments: &DemoHostArguments) -> Result<()> {
    ensure!(std::process::id() == 1, "demo-host is a part of `migrate demo`");
    let ended: SigSet = [Signal::SIGCHLD].into_iter().collect();
    ended.thread_block()?;
    std::thread::Builder::new().spawn(move || bury(&ended))?;
    nix::unistd::sethostname(&arguments.name)?;
    // Hosts that count pids alike would be in each other's way: a process that comes wants to keep its own.
    fs::write("/proc/sys/kernel/ns_last_pid", arguments.after.to_string()).context("the pids to start from")?;
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    let mut nothing = Vec::new();
    std::io::stdin().take(1).read_to_end(&mut nothing)?;
    Ok(())
}

/// Takes leave of orphans, so that their pids are free again.
fn bury(ended: &SigSet) {
    while ended.wait().is_ok() {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
    }
}
