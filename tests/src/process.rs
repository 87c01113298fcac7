//! A program started on a host. Owns the launcher (`nsenter`), knows the program's own pid, and kills it when dropped.

use std::fs;
use std::io::Read;
use std::process::{Child, ExitStatus};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::deadline::wait_for;
use crate::proc_view;

/// The programs that a command line passes through before it becomes the one asked for.
const LAUNCHERS: [&str; 5] = ["setpriv", "unshare", "nsenter", "env", "launch"];

/// A running program on a host.
#[derive(Debug)]
pub struct Running {
    what: String,
    child: Child,
    host_pid: u32,
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    /// How it ended. A program killed inside a PID namespace ends its launcher by the same signal.
    pub status: ExitStatus,
    /// Everything it wrote to standard output.
    pub stdout: String,
    /// Everything it wrote to standard error.
    pub stderr: String,
}

impl Running {
    /// Waits until the launcher has become, or has started, the program itself.
    ///
    /// # Errors
    /// The launcher ended first, or nothing happened for 5 s.
    pub(crate) fn resolve(what: &str, mut child: Child) -> Result<Self> {
        let launcher = child.id();
        let found = wait_for(&format!("start of {what}"), Duration::from_secs(20), || {
            if let Some(pid) = program_below(launcher) {
                return Ok(Some(Some(pid)));
            }
            Ok(child.try_wait()?.map(|_| None))
        });
        match found {
            // A program may be over before it was seen: its exit status tells the rest.
            Ok(pid) => Ok(Self { what: what.to_owned(), host_pid: pid.unwrap_or(launcher), child }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// The program's pid as the test sees it (in the test's own PID namespace).
    pub fn host_pid(&self) -> u32 {
        self.host_pid
    }

    /// Sends a signal to the program itself, not to its launcher.
    ///
    /// # Errors
    /// kill(2) failed, for instance because the program has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        send(self.host_pid, signal).with_context(|| format!("{signal} to {}", self.what))?;
        if matches!(signal, Signal::SIGKILL | Signal::SIGCONT) {
            self.wake_launcher();
        }
        Ok(())
    }

    /// Lets the launcher see what has become of a program that was stopped: nsenter(1) stops with it.
    pub fn wake_launcher(&self) {
        let _ = send(self.child.id(), Signal::SIGCONT);
    }

    /// Tells how it ended, if it has.
    ///
    /// # Errors
    /// waitpid(2) failed.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("waiting for {}", self.what))
    }

    /// Waits for the end of the program.
    ///
    /// # Errors
    /// It was still running after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("end of {}", self.what);
        let child = &mut self.child;
        wait_for(&what, limit, || Ok(child.try_wait()?))
    }

    /// Takes the stream that reads the program's standard output.
    pub(crate) fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Takes the stream that reads the program's standard error.
    pub(crate) fn take_stderr(&mut self) -> Option<std::process::ChildStderr> {
        self.child.stderr.take()
    }

    /// Reads everything the program writes, waits for its end.
    ///
    /// # Errors
    /// It was still running after `limit`; it is killed then.
    pub fn finish(mut self, limit: Duration) -> Result<Finished> {
        let stdout = self.take_stdout().map(collect);
        let stderr = self.take_stderr().map(collect);
        let status = self.wait(limit);
        if status.is_err() {
            self.destroy();
        }
        let (stdout, stderr) = (text(stdout), text(stderr));
        match status {
            Ok(status) => Ok(Finished { status, stdout, stderr }),
            Err(error) => bail!("{error:#}; stdout: {stdout}; stderr: {stderr}"),
        }
    }

    /// Kills the program and waits for its launcher.
    fn destroy(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = send(self.host_pid, Signal::SIGKILL);
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.destroy();
    }
}

/// Sends `signal` to a process by its pid in the test's PID namespace.
pub(crate) fn send(pid: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(pid).context("a pid is a positive i32")?;
    Ok(kill(Pid::from_raw(pid), signal)?)
}

/// Follows first children from `launcher` down to the first process that is no launcher.
fn program_below(launcher: u32) -> Option<u32> {
    let own_image = fs::read_link("/proc/self/exe").ok()?;
    // The image and not the name: during an exec the new image still carries the old name for a moment.
    let image = |pid: u32| fs::read_link(format!("/proc/{pid}/exe")).ok();
    let mut pid = launcher;
    loop {
        let before = image(pid)?;
        let name = before.file_name()?.to_str()?;
        if before != own_image && !LAUNCHERS.contains(&name) {
            return Some(pid);
        }
        let child = proc_view::children(pid).into_iter().next()?;
        // N.B. it may have become the program meanwhile, and the child be one of the program's.
        if image(pid)? != before {
            return None;
        }
        pid = child;
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn text(reader: Option<JoinHandle<String>>) -> String {
    reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
}
