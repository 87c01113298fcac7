//! Putting a process right whose tracer was killed, by what its ledger says.

use super::{Entry, HEAD_WORDS, Head, Ledger, Region, SLOT, State, THREADS_AT, start_time, words_of};
use crate::{Error, Result, Status, Stop, Tracee, read_status};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Longest wait until a process whose tracer is dead is stopped.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// What a process that was put right is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It goes on, unless job control had stopped it before.
    GoesOn,
    /// It stays stopped until it is continued.
    StaysStopped,
}

/// What [`mend`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mended {
    /// The process was not held.
    NothingToDo,
    /// It has ended; another may have its pid by now.
    Gone,
    /// It is as it was, and goes on.
    GivenBack,
    /// It is as it was, and stopped.
    Stopped,
}

/// Puts the process of a ledger right after its tracer was killed. `file` must be open for reading and writing. May be
/// called again, also after it was broken off.
///
/// # Errors
/// [`Error::BadLedger`] for a file that is damaged or none; [`Error::StillTraced`] when the process is still traced; otherwise when it
/// cannot be traced. Nothing was changed then, and the ledger stays as it is.
pub fn mend(file: &File, afterwards: Afterwards) -> Result<Mended> {
    let (head, entries) = read(file).ok_or(Error::BadLedger)?;
    let mut ledger = Ledger { file: file.try_clone().map_err(|_| Error::BadLedger)?, head };
    let pid = head.pid;
    if head.state == State::Free {
        return Ok(Mended::NothingToDo);
    }
    if start_time(pid) != Some(head.started) {
        return Ok(Mended::Gone);
    }
    let has_ended = |pid| read_status(pid).is_ok_and(|status| matches!(status.state(), 'Z' | 'X'));
    if has_ended(pid) {
        return Ok(Mended::Gone);
    }
    let settled = |status: &Status| status.number("TracerPid") == Some(0);
    let stopped = |status: &Status| settled(status) && matches!(status.state(), 'T' | 'Z' | 'X');
    let waited = match head.state {
        State::Changed | State::Parked => await_threads(pid, stopped),
        // It may be on its way to a stop or have been let go: that shows when it is frozen.
        State::Stopped | State::Free => await_threads(pid, settled),
    };
    let waited = waited?;
    let is_changed = matches!(head.state, State::Changed | State::Parked);
    // N.B. a SIGCONT from outside has it go on as it was left. If it has survived that, it runs its own code or still ours.
    let was_continued = !waited && is_changed && await_threads(pid, settled)?;
    if !waited && !was_continued {
        return Err(Error::StillTraced(pid));
    }
    let mut tracee = match Tracee::freeze_unrecorded(pid) {
        Ok(tracee) => tracee,
        Err(Error::LeaderExited(_) | Error::Gone(_)) => return Ok(Mended::Gone),
        Err(error) => return Err(error),
    };
    // N.B. again: by now it cannot end and leave its pid to another.
    if start_time(pid) != Some(head.started) {
        return Ok(Mended::Gone);
    }
    let is_stopped = tracee.threads().iter().any(|thread| matches!(thread.stop, Stop::Group(_)));
    if is_changed {
        let [one, other] = head.scratch;
        if let Some(made) = tracee.just_made(head.making) {
            // N.B. before registers are changed. While one is made the first place is free.
            ledger.note_scratch([made, other], Region::default())?;
        }
        let [made, _] = ledger.head.scratch;
        let scratch = [one, other, made];
        let entries: Vec<Entry> = if was_continued && head.state == State::Changed {
            entries.iter().filter_map(|entry| tracee.still_to_correct(entry, &scratch)).collect()
        } else {
            entries
        };
        tracee.restore(&entries, &scratch)?;
        ledger.note_put_back()?;
    } else if !is_stopped {
        tracee.release()?;
        ledger.close_for_good()?;
        return Ok(Mended::NothingToDo);
    }
    let goes_on = afterwards == Afterwards::GoesOn && (was_continued || !head.was_stopped);
    match (goes_on, was_continued) {
        (true, false) => {
            tracee.take_out_group_stop()?;
            tracee.release()?;
        }
        // N.B. it may live somewhere else.
        (false, true) => {
            tracee.stop_if_abandoned()?;
            tracee.release_stopped()?;
        }
        _ => tracee.release()?,
    }
    ledger.close_for_good()?;
    Ok(if goes_on { Mended::GivenBack } else { Mended::Stopped })
}

impl Ledger {
    fn close_for_good(&mut self) -> Result<()> {
        self.head.state = State::Free;
        self.write_head()
    }
}

fn read(file: &File) -> Option<(Head, Vec<Entry>)> {
    let mut bytes = [0; HEAD_WORDS * 8];
    file.read_exact_at(&mut bytes, 0).ok()?;
    let head = Head::from_words(&words_of(&bytes))?;
    let mut entries = Vec::new();
    if matches!(head.state, State::Changed | State::Parked) {
        let length = head.threads * SLOT as u64;
        // N.B. before anything is allocated.
        if file.metadata().ok()?.len() < THREADS_AT + length {
            return None;
        }
        let mut slots = vec![0; length as usize];
        file.read_exact_at(&mut slots, THREADS_AT).ok()?;
        entries = slots.chunks_exact(SLOT).map(Entry::from_slot).collect::<Option<_>>()?;
    }
    Some((head, entries))
}

/// Waits until all threads of a process are as `wanted`; `false` when that takes too long.
fn await_threads(pid: i32, wanted: impl Fn(&Status) -> bool) -> Result<bool> {
    let deadline = Instant::now() + STOP_DEADLINE;
    loop {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).map_err(|_| Error::Gone(pid))?;
        let tids = tasks.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        // One whose status cannot be read has ended.
        if tids.filter_map(|tid| read_status(tid).ok()).all(|status| wanted(&status)) {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

impl Region {
    /// Where a mapping is that was just made, if it was: a thread stands behind the instruction that made it.
    pub(crate) fn just_made(self, registers: &crate::Registers) -> Option<Self> {
        let made = self.length != 0
            && registers.rip == self.base.wrapping_add(2)
            && registers.orig_rax == libc::SYS_mmap as u64
            && registers.rax.is_multiple_of(4096);
        made.then_some(Self { base: registers.rax, length: self.length })
    }
}
