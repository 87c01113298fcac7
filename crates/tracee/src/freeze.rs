//! Stopping a process: every thread seized, sent a SIGSTOP and waited for, until no unseized thread is left.
//!
//! A thread can create another between the listing and its own stop, so the listing is repeated to a fixed point. Stops by a
//! signal that arrive first are passed on (the handler's frame is then part of the state).
//!
//! What counts is the stop in which the thread is about to be given our SIGSTOP: it *stands*. It never gets it from us, so
//! nobody sees a stop; but it does should this program be killed, at whatever moment, and then the process stops before it runs
//! an instruction. `PTRACE_INTERRUPT` would let it run on, half changed.

use crate::tracee::{END_PATIENCE, Stop, Thread};
use crate::{Error, Result, read_status};
use godwit_kernel::Errno;
use godwit_kernel::process::send_signal;
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
    // One that ends in this moment is waited for like the others.
    let _ = send_signal(pid, tid, libc::SIGSTOP);
    Ok(true)
}

/// Waits until a thread that was seized and sent a SIGSTOP stands; `None` when it ended instead.
fn await_stop(pid: i32, tid: i32, deadline: Instant) -> Result<Option<Stop>> {
    /// A thread that runs takes no longer.
    const GLANCE: Duration = Duration::from_millis(20);
    let failed = |request| move |source| Error::ptrace(request, tid, source);
    let mut stop = Stop::Interrupted;
    let mut blocked = None;
    let mut is_sent_again = false;
    loop {
        let soon = Instant::now() + GLANCE;
        let report = match wait_until(tid, soon.min(deadline))? {
            None if soon < deadline => {
                if has_lost_stop(tid) {
                    let _ = send_signal(pid, tid, libc::SIGSTOP);
                    is_sent_again = true;
                }
                continue;
            }
            Some(report) => report,
            None => next_report(tid, deadline)?,
        };
        match report {
            Status::Exited(_) | Status::Killed(_) => return Ok(None),
            // N.B. it may have been on its way to the one before; the next comes before it runs an instruction.
            Status::Stopped { signal: libc::SIGSTOP, event: 0 } if is_sent_again && has_pending_stop(tid) => {
                ptrace::cont(tid, 0).map_err(failed("continue"))?;
            }
            Status::Stopped { signal: libc::SIGSTOP, event: 0 } => {
                if let Some(mask) = blocked {
                    ptrace::set_signal_mask(tid, mask).map_err(failed("signal mask"))?;
                }
                return Ok(Some(stop));
            }
            Status::Stopped { signal, event: 0 } => ptrace::cont(tid, signal).map_err(failed("continue"))?,
            Status::Stopped { signal, .. } => {
                if signal != libc::SIGTRAP {
                    stop = Stop::Group(signal);
                    // N.B. in a group stop signals wait until it is over; the thread must not come upon them now.
                    if blocked.is_none() && others_come_first(tid) {
                        blocked = Some(ptrace::signal_mask(tid).map_err(failed("signal mask"))?);
                        ptrace::set_signal_mask(tid, u64::MAX).map_err(failed("block signals"))?;
                    }
                }
                ptrace::cont(tid, 0).map_err(failed("continue"))?;
            }
        }
    }
}

const STOP: u64 = 1 << (libc::SIGSTOP - 1);

fn has_pending_stop(tid: i32) -> bool {
    read_status(tid).is_ok_and(|status| status.hexadecimal("SigPnd").is_some_and(|set| set & STOP != 0))
}

/// Whether the SIGSTOP that a thread was sent was taken away by a SIGCONT of somebody's: it runs on.
fn has_lost_stop(tid: i32) -> bool {
    let Ok(status) = read_status(tid) else { return false };
    matches!(status.state(), 'R' | 'S') && status.hexadecimal("SigPnd").is_some_and(|set| set & STOP == 0)
}

/// Whether signals wait for a thread that it would come upon before a SIGSTOP of its own: synchronous ones and smaller numbers.
/// That is rare, and a mask is not to be changed without need: no ledger tells yet what it was.
fn others_come_first(tid: i32) -> bool {
    const BEFORE: u64 = ((1 << (libc::SIGSTOP - 1)) - 1) | 1 << (libc::SIGSYS - 1);
    let Ok(status) = read_status(tid) else { return false };
    let set = |field| status.hexadecimal(field).unwrap_or(0);
    set("SigPnd") & !set("SigBlk") & BEFORE != 0
}

/// Waits until the new thread of a stub has stopped; `false` when it ended instead. It was not sent a SIGSTOP.
pub(crate) fn await_birth(tid: i32, deadline: Instant) -> Result<bool> {
    loop {
        match next_report(tid, deadline)? {
            Status::Exited(_) | Status::Killed(_) => return Ok(false),
            Status::Stopped { event: ptrace::EVENT_STOP, .. } => return Ok(true),
            Status::Stopped { .. } => {
                ptrace::cont(tid, 0).map_err(|source| Error::ptrace("continue", tid, source))?;
            }
        }
    }
}

fn next_report(tid: i32, deadline: Instant) -> Result<Status> {
    wait_until(tid, deadline)?.ok_or_else(|| {
        let state = read_status(tid).map_or('?', |status| status.state());
        Error::StopTimeout { tid, state, waited_ms: STOP_DEADLINE.as_millis() as u64 }
    })
}

/// Seizes and stops a process. On failure everything that was stopped is let go.
pub(crate) fn stop_threads(pid: i32, extent: Extent, options: Options) -> Result<Vec<Thread>> {
    let mut stopped = Vec::new();
    let mut stuck = Vec::new();
    let outcome = stop_to_fixed_point(pid, extent, options, &mut stopped, &mut stuck);
    if outcome.is_err() {
        for thread in &stopped {
            let _ = ptrace::detach(thread.tid, 0);
        }
        // N.B. takes away the SIGSTOP that they have not come upon; it would stop the process when this program ends.
        for tid in stuck {
            let _ = send_signal(pid, tid, libc::SIGCONT);
            let _ = ptrace::try_wait(tid);
        }
    }
    outcome.map(|()| stopped)
}

fn stop_to_fixed_point(
    pid: i32,
    extent: Extent,
    options: Options,
    stopped: &mut Vec<Thread>,
    stuck: &mut Vec<i32>,
) -> Result<()> {
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
            let outcome = await_stop(pid, tid, deadline).inspect_err(|_| stuck.push(tid));
            match outcome.and_then(|stop| stop.map(|stop| Thread::read(tid, stop, true)).transpose()) {
                Ok(Some(thread)) => stopped.push(thread),
                Ok(None) if tid == pid => {
                    refused.get_or_insert(Error::Gone(pid));
                }
                Ok(None) => {}
                Err(error) => {
                    // Should it have been killed, its end is still to be noticed.
                    let _ = wait_until(tid, Instant::now() + END_PATIENCE);
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
