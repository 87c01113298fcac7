//! Timers that belong to a process: the three of setitimer(2), and those of timer_create(2) with their ids.
//!
//! A timer on CLOCK_MONOTONIC or CLOCK_BOOTTIME is set again to the very instant of its clock that it was set to before,
//! for the process's clocks go on where they were (time_namespaces(7)). Clocks that may differ between hosts, or that count
//! the process's own CPU time, get the time that was left.

use crate::{Error, Result};
use godwit_proto::image::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use godwit_tracee::{Arg, Batch, Buffer, Call, Outcome};

/// Bytes of `struct itimerval` and of `struct itimerspec`.
const SETTING_SIZE: usize = 32;
/// Most POSIX timers that one message may hold.
const MAX_TIMERS: usize = 1 << 16;
/// Bytes of `struct sigevent`.
const EVENT_SIZE: usize = 64;
const SIGEV_THREAD_ID: u32 = 4;
const NANOSECONDS: i64 = 1_000_000_000;
/// PR_TIMER_CREATE_RESTORE_IDS(2const), Linux 6.15: timer_create uses the id that it finds where it would put one.
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
/// Most ids passed over one by one where that is not available.
const MAX_SKIPPED: u32 = 1 << 14;
/// The same for all timers together.
const MAX_SKIPPED_IN_ALL: u32 = 1 << 16;

/// The clocks of a process in nanoseconds, as it sees them itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clocks {
    /// CLOCK_MONOTONIC.
    pub monotonic_ns: i64,
    /// CLOCK_BOOTTIME.
    pub boottime_ns: i64,
    /// CLOCK_REALTIME.
    pub realtime_ns: i64,
}

/// Questions about a process's clocks, asked in a batch.
pub(crate) struct ClockQuestions(Buffer);

impl ClockQuestions {
    const CLOCKS: [i32; 3] = [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_REALTIME];

    pub(crate) fn ask(batch: &mut Batch) -> Self {
        let buffer = batch.buffer(16 * Self::CLOCKS.len());
        for (index, clock) in Self::CLOCKS.into_iter().enumerate() {
            batch.call("clock_gettime", libc::SYS_clock_gettime, &[clock.into(), Arg::Address(buffer, index * 16)]);
        }
        Self(buffer)
    }

    pub(crate) fn answer(self, outcome: &Outcome) -> Clocks {
        let clock = |index: usize| {
            let (seconds, nanoseconds) = (outcome.word(self.0, index * 16), outcome.word(self.0, index * 16 + 8));
            (seconds as i64).saturating_mul(NANOSECONDS).saturating_add(nanoseconds as i64)
        };
        Clocks { monotonic_ns: clock(0), boottime_ns: clock(1), realtime_ns: clock(2) }
    }
}

/// What /proc/PID/timers says of the POSIX timers of a process; what is left of each must be asked inside.
///
/// # Errors
/// When the file cannot be read or made sense of.
pub fn list(pid: i32) -> Result<Vec<PosixTimerEntry>> {
    let path = format!("/proc/{pid}/timers");
    match std::fs::read_to_string(&path) {
        Ok(text) => parse(&text).ok_or_else(|| Error::state(path, "an unknown form")),
        Err(source) => Err(Error::Proc { path: path.into(), source }),
    }
}

pub(crate) fn parse(text: &str) -> Option<Vec<PosixTimerEntry>> {
    let mut timers: Vec<PosixTimerEntry> = Vec::new();
    for line in text.lines() {
        let (field, value) = line.split_once(": ")?;
        if field == "ID" {
            timers.push(PosixTimerEntry { it_id: value.parse().ok()?, ..PosixTimerEntry::default() });
            continue;
        }
        let timer = timers.last_mut()?;
        match field {
            "signal" => {
                let (signal, value) = value.split_once('/')?;
                timer.si_signo = signal.parse().ok()?;
                timer.sival_ptr = u64::from_str_radix(value.trim_start_matches("0x"), 16).ok()?;
            }
            "notify" => {
                // `signal/pid.7`, `none/tid.7`, `thread/pid.7`
                let (how, whom) = value.split_once('/')?;
                timer.it_sigev_notify = match how {
                    "signal" => libc::SIGEV_SIGNAL as u32,
                    "none" => libc::SIGEV_NONE as u32,
                    _ => libc::SIGEV_THREAD as u32,
                };
                if let Some(tid) = whom.strip_prefix("tid.") {
                    timer.it_sigev_notify |= SIGEV_THREAD_ID;
                    timer.notify_thread_id = Some(tid.parse().ok()?);
                }
            }
            "ClockID" => timer.clock_id = value.parse::<i32>().ok()? as u32,
            _ => {}
        }
    }
    // The kernel lists the newest first; creating them needs the order of their ids.
    timers.sort_unstable_by_key(|timer| timer.it_id);
    Some(timers)
}

/// Questions about all timers, asked in a batch.
pub(crate) struct TimerQuestions {
    interval: Buffer,
    posix: Vec<PosixTimerEntry>,
    settings: Buffer,
    overruns: Vec<Call>,
}

impl TimerQuestions {
    /// `posix` is what [`list`] found in the stopped process.
    pub(crate) fn ask(batch: &mut Batch, posix: Vec<PosixTimerEntry>) -> Self {
        let interval = batch.buffer(3 * SETTING_SIZE);
        for which in [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF] {
            let slot = Arg::Address(interval, which as usize * SETTING_SIZE);
            batch.call("getitimer", libc::SYS_getitimer, &[which.into(), slot]);
        }
        let settings = batch.buffer(posix.len() * SETTING_SIZE);
        let mut overruns = Vec::new();
        for (index, timer) in posix.iter().enumerate() {
            let slot = Arg::Address(settings, index * SETTING_SIZE);
            batch.call("timer_gettime", libc::SYS_timer_gettime, &[timer.it_id.into(), slot]);
            overruns.push(batch.attempt("timer_getoverrun", libc::SYS_timer_getoverrun, &[timer.it_id.into()]));
        }
        Self { interval, posix, settings, overruns }
    }

    pub(crate) fn answer(self, outcome: &Outcome) -> TaskTimersEntry {
        let interval = |which: usize| {
            let word = |field: usize| outcome.word(self.interval, which * SETTING_SIZE + field * 8);
            ItimerEntry { isec: word(0), iusec: word(1), vsec: word(2), vusec: word(3) }
        };
        let (real, virt, prof) = (interval(0), interval(1), interval(2));
        let mut posix = self.posix;
        for (index, timer) in posix.iter_mut().enumerate() {
            let word = |field: usize| outcome.word(self.settings, index * SETTING_SIZE + field * 8);
            (timer.isec, timer.insec, timer.vsec, timer.vnsec) = (word(0), word(1), word(2), word(3));
            timer.overrun = outcome.result(self.overruns[index]).unwrap_or(0) as u32;
        }
        TaskTimersEntry { real, virt, prof, posix }
    }
}

fn words(values: [u64; 4]) -> [u8; SETTING_SIZE] {
    let mut bytes = [0; SETTING_SIZE];
    for (slot, value) in bytes.chunks_exact_mut(8).zip(values) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// How much time the process's own clocks say has passed between `then` and `now`; never less than nothing.
fn elapsed(then: Clocks, now: Clocks) -> i64 {
    now.monotonic_ns.saturating_sub(then.monotonic_ns).max(0)
}

/// Adds the calls that create the POSIX timers with their ids, without setting them.
pub(crate) fn create(batch: &mut Batch, timers: &TaskTimersEntry, ids_can_be_chosen: IdChoice) -> Result<()> {
    if timers.posix.is_empty() {
        return Ok(());
    }
    if timers.posix.len() > MAX_TIMERS {
        return Err(Error::state("timers", format!("{} of them", timers.posix.len())));
    }
    let (on, off) =
        ([PR_TIMER_CREATE_RESTORE_IDS.into(), 1u64.into()], [PR_TIMER_CREATE_RESTORE_IDS.into(), 0u64.into()]);
    if ids_can_be_chosen == IdChoice::Free {
        batch.call("choosing timer ids", libc::SYS_prctl, &on);
    }
    let (mut next, mut passed_over) = (0, 0);
    for timer in &timers.posix {
        if ids_can_be_chosen == IdChoice::Ascending {
            passed_over += skip_ids(batch, next, timer.it_id)?;
            if passed_over > MAX_SKIPPED_IN_ALL {
                return Err(Error::state(
                    format!("timer {}", timer.it_id),
                    "too many ids lie between those of the timers",
                ));
            }
            next = timer.it_id.wrapping_add(1);
        }
        create_one(batch, timer);
    }
    if ids_can_be_chosen == IdChoice::Free {
        batch.call("choosing timer ids", libc::SYS_prctl, &off);
    }
    Ok(())
}

/// Whether the kernel lets timer ids be chosen, or counts them upwards from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IdChoice {
    Free,
    Ascending,
}

/// Asks whether timer ids can be chosen.
pub(crate) struct IdQuestion(Call);

impl IdQuestion {
    pub(crate) fn ask(batch: &mut Batch) -> Self {
        // 2 asks for the present setting; a kernel that does not know the option says EINVAL.
        let arguments = [PR_TIMER_CREATE_RESTORE_IDS.into(), 2u64.into()];
        Self(batch.attempt("asking for timer id restore", libc::SYS_prctl, &arguments))
    }

    pub(crate) fn answer(self, outcome: &Outcome) -> IdChoice {
        if outcome.result(self.0).is_ok() { IdChoice::Free } else { IdChoice::Ascending }
    }
}

/// Creates and deletes timers until the next one gets id `wanted`.
fn skip_ids(batch: &mut Batch, next: u32, wanted: u32) -> Result<u32> {
    let skipped = wanted
        .checked_sub(next)
        .filter(|&skipped| skipped <= MAX_SKIPPED)
        .ok_or_else(|| Error::state(format!("timer {wanted}"), "its id cannot be reached on this kernel"))?;
    let id = batch.buffer(4);
    for passed in 0..skipped {
        let arguments = [libc::CLOCK_MONOTONIC.into(), 0u64.into(), id.into()];
        batch.call("passing over a timer id", libc::SYS_timer_create, &arguments);
        batch.call("passing over a timer id", libc::SYS_timer_delete, &[(next + passed).into()]);
    }
    Ok(skipped)
}

fn create_one(batch: &mut Batch, timer: &PosixTimerEntry) {
    let mut event = [0; EVENT_SIZE];
    event[..8].copy_from_slice(&timer.sival_ptr.to_le_bytes());
    event[8..12].copy_from_slice(&timer.si_signo.to_le_bytes());
    event[12..16].copy_from_slice(&timer.it_sigev_notify.to_le_bytes());
    event[16..20].copy_from_slice(&timer.notify_thread_id.unwrap_or(0).to_le_bytes());
    let event = batch.data(&event);
    let id = batch.data(&timer.it_id.to_le_bytes());
    let clock = timer.clock_id as i32;
    let what = format!("creating timer {} on clock {clock}", timer.it_id);
    batch.call(what, libc::SYS_timer_create, &[clock.into(), event.into(), id.into()]);
}

/// Adds the calls that set all timers going. `then` are the process's clocks when they were read, `now` its clocks.
pub(crate) fn arm(batch: &mut Batch, timers: &TaskTimersEntry, then: Clocks, now: Clocks) {
    for timer in &timers.posix {
        let left = nanoseconds(timer.vsec, timer.vnsec);
        if left == 0 {
            continue;
        }
        let clock = timer.clock_id as i32;
        let (flags, value) = match clock {
            // N.B. an instant that has passed meanwhile is right: the kernel counts the periods that were missed.
            libc::CLOCK_MONOTONIC => (libc::TIMER_ABSTIME, then.monotonic_ns.saturating_add(left)),
            libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => {
                (libc::TIMER_ABSTIME, then.boottime_ns.saturating_add(left))
            }
            _ if counts_cpu_time(clock) => (0, left),
            _ => (0, left.saturating_sub(elapsed(then, now)).max(1)),
        };
        let (seconds, rest) = (value / NANOSECONDS, value % NANOSECONDS);
        let setting = batch.data(&words([timer.isec, timer.insec, seconds as u64, rest as u64]));
        let what = format!("setting timer {}", timer.it_id);
        batch.call(what, libc::SYS_timer_settime, &[timer.it_id.into(), flags.into(), setting.into(), 0u64.into()]);
    }
    let all = [
        (libc::ITIMER_REAL, real_left(timers.real, elapsed(then, now))),
        (libc::ITIMER_VIRTUAL, timers.virt),
        (libc::ITIMER_PROF, timers.prof),
    ];
    for (which, timer) in all {
        let setting = batch.data(&words([timer.isec, timer.iusec, timer.vsec, timer.vusec]));
        batch.call("setting an interval timer", libc::SYS_setitimer, &[which.into(), setting.into(), 0u64.into()]);
    }
}

/// The setting of `ITIMER_REAL` when `passed` nanoseconds have gone by since it was read.
///
/// N.B. from its expiry until its signal is taken, the kernel holds a periodic timer still and says that no time is left.
/// When it expired is told nowhere; it goes on a period from now, if nobody takes the signal (which waits too) before.
fn real_left(mut timer: ItimerEntry, passed: i64) -> ItimerEntry {
    let left = match nanoseconds(timer.vsec, timer.vusec.saturating_mul(1000)) {
        0 => nanoseconds(timer.isec, timer.iusec.saturating_mul(1000)),
        left => left.saturating_sub(passed).max(1000),
    };
    (timer.vsec, timer.vusec) = ((left / NANOSECONDS) as u64, (left % NANOSECONDS / 1000) as u64);
    timer
}

/// Whether a clock is the CPU time of a process or thread: fixed ids, or a pid packed into a negative number.
fn counts_cpu_time(clock: i32) -> bool {
    clock < 0 || clock == libc::CLOCK_PROCESS_CPUTIME_ID || clock == libc::CLOCK_THREAD_CPUTIME_ID
}

fn nanoseconds(seconds: u64, rest: u64) -> i64 {
    i64::try_from(seconds)
        .unwrap_or(i64::MAX)
        .saturating_mul(NANOSECONDS)
        .saturating_add(i64::try_from(rest).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_periodic_timer_whose_signal_waits_goes_on() {
        let timer = |isec, iusec, vsec, vusec| ItimerEntry { isec, iusec, vsec, vusec };
        assert_eq!(real_left(timer(1, 500, 0, 0), 7), timer(1, 500, 1, 500));
        assert_eq!(real_left(timer(1, 500, 2, 9), 1_000_003_000), timer(1, 500, 1, 6));
        assert_eq!(real_left(timer(0, 0, 0, 5), 9_000_000), timer(0, 0, 0, 1));
        assert_eq!(real_left(timer(0, 0, 0, 0), 7), timer(0, 0, 0, 0));
    }

    #[test]
    fn parses_the_three_ways_of_notification() {
        let text = "ID: 2\nsignal: 10/00000000deadbeef\nnotify: signal/pid.77\nClockID: 1\n\
                    ID: 5\nsignal: 34/0000000000000007\nnotify: signal/tid.78\nClockID: -6\n\
                    ID: 9\nsignal: 0/0000000000000000\nnotify: none/pid.77\nClockID: 0\n";
        let timers = parse(text).unwrap();
        assert_eq!(timers.len(), 3);
        assert_eq!((timers[0].it_id, timers[0].si_signo, timers[0].sival_ptr), (2, 10, 0xdead_beef));
        assert_eq!((timers[1].it_sigev_notify, timers[1].notify_thread_id), (SIGEV_THREAD_ID, Some(78)));
        assert!(counts_cpu_time(timers[1].clock_id as i32));
        assert_eq!(timers[2].it_sigev_notify, libc::SIGEV_NONE as u32);
        assert!(parse("notify: what").is_none() && parse("rubbish").is_none());
    }
}
