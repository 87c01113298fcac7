//! Victims: starting them, reading what they think of themselves, following them to another host, hearing the verdict.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::binaries::victim_program;
use crate::deadline::{wait_for, wait_until};
use crate::host::{Host, log};
use crate::outcome::Migration;
use crate::proc_view::{ProcView, is_alive};
use crate::process::{Running, send};

/// Numbers the victims of one test.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// The exit status of a victim whose subject does not exist on this machine.
const NOT_HERE: i32 = 77;

/// A self-checking program on one of the hosts.
#[derive(Debug)]
pub struct Victim {
    name: String,
    directory: PathBuf,
    /// The process as it was started; `None` for what a test started in its own way.
    origin: Running,
    host_pid: u32,
    pid: u32,
}

/// The line that a victim writes after every check of itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Status {
    /// Heartbeats since it was ready.
    pub beats: u64,
    /// Things that it looked at.
    pub checks: u64,
    /// Things that were wrong.
    pub errors: u64,
    /// The largest CLOCK_REALTIME gap between two heartbeats, in microseconds.
    pub largest_gap_us: u64,
}

impl Host {
    /// Starts the victim called `name` and waits until it is ready.
    ///
    /// # Errors
    /// It ended, or was not ready within 20 s.
    pub fn victim(&self, name: &str, arguments: &[&str]) -> Result<Victim> {
        self.victim_from(victim_program(), name, arguments)
    }

    /// Starts a victim from another copy of the program.
    ///
    /// # Errors
    /// It ended, or was not ready within 20 s.
    pub fn victim_from(&self, program: &Path, name: &str, arguments: &[&str]) -> Result<Victim> {
        let (command, directory) = self.victim_command(program, name, arguments)?;
        Victim::start(self, name, directory, command, files)
    }

    /// Starts a victim whose standard input and output are pipes to the test, which move nowhere.
    ///
    /// # Errors
    /// It ended, or was not ready within 20 s.
    pub fn victim_on_pipes(&self, name: &str, arguments: &[&str]) -> Result<Victim> {
        let (command, directory) = self.victim_command(victim_program(), name, arguments)?;
        Victim::start(self, name, directory, command, |command, directory| {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log(directory, "stderr")?);
            Ok(())
        })
    }

    fn victim_command(&self, program: &Path, name: &str, arguments: &[&str]) -> Result<(Command, PathBuf)> {
        let directory = self.victim_directory(name)?;
        let mut words = vec![OsStr::new(name), directory.as_os_str()];
        words.extend(arguments.iter().map(OsStr::new));
        let mut command = self.command(program);
        command.args(words);
        Ok((command, directory))
    }

    /// Starts any program as a victim. It gets its directory in `$VICTIM_DIR` and keeps the protocol: a line `ready` in the file
    /// `log`, the file `status` rewritten again and again, and at SIGTERM a line that begins with `verdict pass`.
    ///
    /// # Errors
    /// It ended, or was not ready within 20 s.
    pub fn program_victim(&self, name: &str, program: &str, arguments: &[&str]) -> Result<Victim> {
        let directory = self.victim_directory(name)?;
        let mut command = self.command(program);
        command.args(arguments).env("VICTIM_DIR", &directory);
        Victim::start(self, name, directory, command, files)
    }

    /// Starts a victim as another user, in the group of the same number alone, by setpriv(1) with further `options`. The victim's
    /// directory and files are that user's.
    ///
    /// # Errors
    /// It ended, or was not ready within 20 s.
    pub fn victim_of(&self, user: u32, options: &[&str], name: &str, arguments: &[&str]) -> Result<Victim> {
        let directory = self.victim_directory(name)?;
        let id = user.to_string();
        let mut command = self.command("setpriv");
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]).args(options).arg("--");
        command.arg(victim_program()).arg(name).arg(&directory).args(arguments);
        std::os::unix::fs::chown(&directory, Some(user), Some(user))?;
        Victim::start(self, name, directory, command, |command, directory| {
            files(command, directory)?;
            for stream in ["stdout", "stderr"] {
                std::os::unix::fs::chown(directory.join(stream), Some(user), Some(user))?;
            }
            Ok(())
        })
    }

    /// Starts a victim in a network namespace of its own, which `script` furnishes from inside (process 1 is the host's init).
    ///
    /// # Errors
    /// The script failed, or the victim ended, or was not ready within 20 s.
    pub fn victim_in_own_network(&self, script: &str, name: &str, arguments: &[&str]) -> Result<Victim> {
        let program = victim_program().display().to_string();
        let script = format!("set -e\n{script}\nexec '{program}' {name} \"$VICTIM_DIR\" \"$@\"");
        let words = [&["--net", "sh", "-c", &script, "sh"], arguments].concat();
        self.program_victim(name, "unshare", &words)
    }

    fn victim_directory(&self, name: &str) -> Result<PathBuf> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = self.directory().join(format!("{name}-{number}"));
        fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
        Ok(directory)
    }
}

impl Victim {
    fn start(
        host: &Host,
        name: &str,
        directory: PathBuf,
        mut command: Command,
        streams: impl FnOnce(&mut Command, &Path) -> Result<()>,
    ) -> Result<Self> {
        streams(&mut command, &directory)?;
        let mut origin = host.start_command(&mut command)?;
        let said = || read(&directory.join("log")) + &read(&directory.join("stderr"));
        wait_until(&format!("victim {name} to be ready"), Duration::from_secs(20), || {
            if read(&directory.join("log")).lines().any(|line| line == "ready") {
                return Ok(true);
            }
            match origin.ended()? {
                Some(status) if status.code() == Some(NOT_HERE) => bail!("not possible on this machine: {}", said()),
                Some(status) => bail!("victim {name} ended with {status}: {}", said()),
                None => Ok(false),
            }
        })
        .with_context(said)?;
        let host_pid = origin.host_pid();
        let pid = host.pid_here(host_pid)?;
        Ok(Self { name: name.to_owned(), directory, origin, host_pid, pid })
    }

    /// Its pid on the host where it runs.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its pid as the test sees it.
    pub fn host_pid(&self) -> u32 {
        self.host_pid
    }

    /// The directory of its log and other files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What `/proc` tells about it now.
    ///
    /// # Errors
    /// It is gone.
    pub fn view(&self) -> Result<ProcView> {
        ProcView::read(self.host_pid)
    }

    /// Everything it wrote.
    pub fn log(&self) -> String {
        read(&self.directory.join("log")) + &read(&self.directory.join("stderr"))
    }

    /// Reads its last status line.
    ///
    /// # Errors
    /// There is none.
    pub fn status(&self) -> Result<Status> {
        let path = self.directory.join("status");
        wait_for("a status line", Duration::from_secs(5), || Ok(Status::parse(&read(&path))))
    }

    /// Waits until it has made `count` more heartbeats and as many checks, all of them good.
    ///
    /// # Errors
    /// It stands still for 20 s, it died, or it found an error.
    pub fn expect_beats(&self, count: u64) -> Result<Status> {
        self.expect_beats_within(count, Duration::from_secs(20))
    }

    /// The same with another limit.
    ///
    /// # Errors
    /// It stands still for so long, it died, or it found an error.
    pub fn expect_beats_within(&self, count: u64, limit: Duration) -> Result<Status> {
        let before = self.status()?;
        wait_for(&format!("{count} heartbeats of {}", self.name), limit, || {
            let now = self.status()?;
            ensure!(now.errors == 0, "victim {} found errors: {}", self.name, self.log());
            ensure!(is_alive(self.host_pid), "victim {} is dead: {}", self.name, self.log());
            Ok((now.beats >= before.beats + count && now.checks > before.checks).then_some(now))
        })
        .with_context(|| format!("last {before:?}; log: {}", self.log()))
    }

    /// Lets it do the things that it does only when asked; see the victim's own file.
    ///
    /// # Errors
    /// The file `go` cannot be written.
    pub fn go(&self) -> Result<()> {
        Ok(fs::write(self.directory.join("go"), "go")?)
    }

    /// Goes on with the copy at `host`, after `migration` moved it there. Expects the copy to run there and the one it
    /// was moved from to be gone.
    ///
    /// # Errors
    /// One of the two is not so.
    pub fn follow(&mut self, host: &Host, migration: &Migration) -> Result<()> {
        let old = self.host_pid;
        wait_until("the source's copy to be gone", Duration::from_secs(30), || Ok(!is_alive(old)))?;
        self.pid = migration.dest_pid()?;
        self.host_pid = host.host_pid(self.pid).with_context(|| migration.text())?;
        ensure!(host.is_home_of(self.host_pid), "the moved process is not at home on {}", host.name());
        Ok(())
    }

    /// Goes on with the copy that the test sees as `host_pid`, at `host`.
    ///
    /// # Errors
    /// There is no such process.
    pub fn found_at(&mut self, host: &Host, host_pid: u32) -> Result<()> {
        self.pid = host.pid_here(host_pid)?;
        self.host_pid = host_pid;
        Ok(())
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        send(self.host_pid, signal).with_context(|| format!("{signal} to victim {}", self.name))
    }

    /// Ends it by SIGTERM and expects the verdict that nothing was ever wrong.
    ///
    /// # Errors
    /// It did not end within 20 s, or its verdict is another one.
    pub fn finish(self) -> Result<Status> {
        self.signal(Signal::SIGTERM)?;
        self.expect_verdict()
    }

    /// Expects it to end, after SIGTERM, with the verdict that nothing was ever wrong.
    ///
    /// # Errors
    /// It did not end within 20 s, or its verdict is another one.
    pub(crate) fn expect_verdict(&self) -> Result<Status> {
        let mut told = Instant::now();
        wait_until(&format!("end of victim {}", self.name), Duration::from_secs(20), || {
            // One that has just executed itself anew does not know of it.
            if told.elapsed() > Duration::from_secs(2) && is_alive(self.host_pid) {
                self.signal(Signal::SIGTERM)?;
                told = Instant::now();
            }
            Ok(!is_alive(self.host_pid))
        })
        .with_context(|| self.log())?;
        let log = self.log();
        let verdict = log.lines().rev().find(|line| line.starts_with("verdict "));
        ensure!(verdict.is_some_and(|line| line.starts_with("verdict pass")), "victim {}: {log}", self.name);
        let status = self.status()?;
        // N.B. a line of the log may be another copy's.
        let is_clean = status.errors == 0 && !log.lines().any(|line| line.starts_with("error: "));
        ensure!(is_clean, "victim {} passes with errors: {log}", self.name);
        Ok(status)
    }

    /// The process that was started first, to look at its exit status.
    pub fn origin(&mut self) -> &mut Running {
        &mut self.origin
    }
}

impl Status {
    /// Parses `beats=N checks=M errors=E largest_gap_us=G`, in any order, other words ignored.
    pub fn parse(line: &str) -> Option<Self> {
        let number = |key: &str| {
            line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse::<u64>().ok())
        };
        Some(Self {
            beats: number("beats")?,
            checks: number("checks")?,
            errors: number("errors")?,
            largest_gap_us: number("largest_gap_us")?,
        })
    }
}

/// Standard streams that lead to other programs would be refused; these lead to files.
fn files(command: &mut Command, directory: &Path) -> Result<()> {
    command.stdin(Stdio::null()).stdout(log(directory, "stdout")?).stderr(log(directory, "stderr")?);
    Ok(())
}

fn read(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}
