//! All copies of a victim, wherever they are: its own files are open in each of them, and in nothing else of its name.
//!
//! N.B. its memory is not looked at, not even its command line: a page that is missing would have us wait for it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::host::Host;
use crate::proc_view;

/// Longest time until both ends have noticed what is to be noticed.
const SETTLED: Duration = Duration::from_secs(60);
/// Two looks so far apart are to show the same.
const BETWEEN_LOOKS: Duration = Duration::from_millis(300);

/// Where a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Home {
    Source,
    Destination,
}

/// What a copy does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    /// It runs, or waits for something.
    Runs,
    /// It is stopped as by job control: SIGCONT wakes it up.
    Held,
    /// It is stopped by its tracer.
    Traced,
}

/// A copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Copy {
    pub(crate) host_pid: u32,
    pub(crate) home: Home,
    pub(crate) doing: Doing,
}

/// Finds all copies of the victim whose files are in `directory`.
pub(crate) fn find(source: &Host, destination: &Host, directory: &Path) -> Result<Vec<Copy>> {
    let mut copies = Vec::new();
    for host_pid in proc_view::processes()? {
        if !fs::read_to_string(format!("/proc/{host_pid}/comm")).is_ok_and(|name| name == "victim\n")
            || !has_file_in(host_pid, directory)
        {
            continue;
        }
        let Some(doing) = doing(host_pid) else { continue };
        let home = match (source.is_home_of(host_pid), destination.is_home_of(host_pid)) {
            (true, _) => Home::Source,
            (_, true) => Home::Destination,
            _ => continue,
        };
        copies.push(Copy { host_pid, home, doing });
    }
    Ok(copies)
}

/// Waits until all that is at the destination runs or is gone, nobody holds a process there by ptrace(2) any more, and no two copies
/// run. Yields all copies.
///
/// N.B. one that is about to die, or on its way into a stop, does not run any more and does not look so: a victim itself notices another
/// copy that does run (see victim.h).
pub(crate) fn settle(source: &Host, destination: &Host, directory: &Path) -> Result<Vec<Copy>> {
    let deadline = Instant::now() + SETTLED;
    let mut before = None;
    loop {
        let copies = find(source, destination, directory)?;
        let traced = destination.processes()?.into_iter().filter(|&(pid, _)| proc_view::is_traced(pid));
        let traced: Vec<(u32, String)> = traced.collect();
        let is_settled = |copy: &Copy| match copy.home {
            Home::Source => copy.doing != Doing::Traced,
            Home::Destination => copy.doing == Doing::Runs,
        };
        let run = copies.iter().filter(|copy| copy.doing == Doing::Runs).count();
        let is_settled = traced.is_empty() && run < 2 && copies.iter().all(is_settled);
        if is_settled && before.as_ref() == Some(&copies) {
            return Ok(copies);
        }
        ensure!(Instant::now() < deadline, "after {SETTLED:?} something is not settled: {traced:?}, {copies:?}");
        before = is_settled.then_some(copies);
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

fn has_file_in(host_pid: u32, directory: &Path) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{host_pid}/fd")) else { return false };
    descriptors.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|path| path.starts_with(directory)))
}

/// `None` when it is gone, a zombie included.
fn doing(host_pid: u32) -> Option<Doing> {
    match state(host_pid).ok()? {
        'Z' | 'X' => None,
        't' => Some(Doing::Traced),
        'T' => Some(Doing::Held),
        _ => Some(Doing::Runs),
    }
}

/// The state of a process: the third word of proc_pid_stat(5).
pub(crate) fn state(host_pid: u32) -> Result<char> {
    let stat = fs::read_to_string(format!("/proc/{host_pid}/stat"))?;
    stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next()).context("a line of /proc/PID/stat")
}
