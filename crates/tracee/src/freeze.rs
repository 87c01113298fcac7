//! Stopping a process: every thread seized, interrupted and waited for, until no unseized thread is left.
//!
//! A thread can create another between the listing and its own stop, so the listing is repeated to a fixed point. Stops by a
//! signal that arrive first are passed on (the handler's frame is then part of the state); what counts is the
//! `PTRACE_EVENT_STOP`.

use crate::tracee::{Stop, Thread};
use crate::{Error, Result, read_status};
use godwit_kernel::Errno;
use godwit_kernel::ptrace::{self, Options, Status};
use std::time::{Duration, Instant};

/// Which threads of a process are stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The thread group leader only; the others run on.
    Leader,
    /// All of them.
    AllThreads,
}

/// Longest time that a thread may take to stop before the attempt is given up.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
/// Listings of the thread directory before the process is declared to never settle.
const MAX_LISTINGS: usize = 64;

/// Waits for a report, politely: spins for the first microseconds, then sleeps in growing steps up to 200 µs.
pub(crate) fn wait_until(tid: i32, deadline: Instant) -> Result<Option<Status>> {
    let mut pause = Duration::from_micros(5);
    let mut spins = 0;
    loop {
        match ptrace::try_wait(tid) {
            Ok(Some(status)) => return Ok(Some(status)),
            Ok(None) => {}
            Err(Errno::ECHILD) => return Err(Error::Gone(tid)),
            Err(source) => return Err(Error::ptrace("wait", tid, source)),
        }
        if spins < 200 {
            spins += 1;
            std::thread::yield_now();
            continue;
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_micros(200));
    }
}

fn list_threads(pid: i32) -> Result<Vec<i32>> {
    let path = format!("/proc/{pid}/task");
    let entries = std::fs::read_dir(&path).map_err(|_| Error::Gone(pid))?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Explains why a thread cannot be seized; `Ok` when it is on its way out and may be passed over.
fn explain_refusal(pid: i32, tid: i32, source: Errno) -> Result<()> {
    let Ok(status) = read_status(tid) else { return Ok(()) };
    match (status.number("TracerPid"), status.state()) {
        (Some(tracer), _) if tracer != 0 => Err(Error::AlreadyTraced { tid, tracer: tracer as i32 }),
        (_, 'Z' | 'X') if tid == pid => Err(Error::LeaderExited(pid)),
        (_, 'Z' | 'X') => Ok(()),
        _ => Err(Error::Seize { tid, source }),
    }
}

fn seize_one(pid: i32, tid: i32, options: Options) -> Result<bool> {
    match ptrace::seize(tid, options) {
        Ok(()) => {}
        Err(Errno::ESRCH) if tid != pid => return Ok(false),
        Err(Errno::ESRCH) => return Err(Error::Gone(pid)),
        Err(source) => return explain_refusal(pid, tid, source).map(|()| false),
    }
    match ptrace::interrupt(tid) {
        Ok(()) => Ok(true),
        Err(source) => Err(Error::ptrace("interrupt", tid, source)),
    }
}

/// Waits until a seized and interrupted thread has stopped; `None` when it ended instead.
pub(crate) fn await_stop(tid: i32, deadline: Instant) -> Result<Option<Stop>> {
    loop {
        match wait_until(tid, deadline)? {
            None => {
                let state = read_status(tid).map_or('?', |status| status.state());
                return Err(Error::StopTimeout { tid, state, waited_ms: STOP_DEADLINE.as_millis() as u64 });
            }
            Some(Status::Exited(_) | Status::Killed(_)) => return Ok(None),
            Some(Status::Stopped { signal, event: ptrace::EVENT_STOP }) if signal == libc::SIGTRAP => {
                return Ok(Some(Stop::Interrupted));
            }
            Some(Status::Stopped { signal, event: ptrace::EVENT_STOP }) => return Ok(Some(Stop::Group(signal))),
            Some(Status::Stopped { signal, .. }) => {
                ptrace::cont(tid, signal).map_err(|source| Error::ptrace("continue", tid, source))?;
            }
        }
    }
}

fn detach_all(threads: &[Thread]) {
    for thread in threads {
        // N.B. reading its state blocked its signals: without this it would run on deaf.
        let _ = ptrace::set_signal_mask(thread.tid, thread.mask);
        let _ = ptrace::detach(thread.tid, 0);
    }
}

/// Seizes and stops a process. On failure everything that was stopped is let go.
pub(crate) fn stop_threads(pid: i32, extent: Extent, options: Options) -> Result<Vec<Thread>> {
    let mut stopped = Vec::new();
    match stop_to_fixed_point(pid, extent, options, &mut stopped) {
        Ok(()) => Ok(stopped),
        Err(error) => {
            detach_all(&stopped);
            Err(error)
        }
    }
}

fn stop_to_fixed_point(pid: i32, extent: Extent, options: Options, stopped: &mut Vec<Thread>) -> Result<()> {
    let deadline = Instant::now() + STOP_DEADLINE;
    for _ in 0..MAX_LISTINGS {
        let listed = match extent {
            Extent::Leader => vec![pid],
            Extent::AllThreads => list_threads(pid)?,
        };
        let mut fresh = Vec::new();
        let mut refused = None;
        for tid in listed {
            if stopped.iter().any(|thread| thread.tid == tid) {
                continue;
            }
            match seize_one(pid, tid, options) {
                Ok(true) => fresh.push(tid),
                Ok(false) => {}
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        let settled = fresh.is_empty();
        for tid in fresh {
            match await_stop(tid, deadline).and_then(|stop| stop.map(|stop| Thread::read(tid, stop)).transpose()) {
                Ok(Some(thread)) => stopped.push(thread),
                Ok(None) if tid == pid => {
                    refused.get_or_insert(Error::Gone(pid));
                }
                Ok(None) => {}
                Err(error) => {
                    // N.B. the rest of `fresh` is still waited for, or it could not be let go.
                    refused.get_or_insert(error);
                }
            }
        }
        if let Some(error) = refused {
            return Err(error);
        }
        if settled {
            return Ok(());
        }
    }
    Err(Error::NeverSettles(pid))
}
