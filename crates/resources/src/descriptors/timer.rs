//! Timers with a descriptor (timerfd_create(2)).
//!
//! A message holds the time left at the moment that the process's [`Clocks`] were read. At the destination the stub sets the timer itself,
//! by its own clocks: time that passed meanwhile has passed for the timer too.

use super::Clocks;
use super::event::set_status;
use super::table::{Directory, Entry};
use crate::{Error, Result};
use godwit_kernel::events;
use godwit_proto::image::{FdTypes, FileEntry, TimerfdEntry};
use godwit_tracee::Batch;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

const SECOND: i128 = 1_000_000_000;

/// Seconds and nanoseconds of a field of the form `(3, 500)`.
fn pair(entry: &Entry, field: &str) -> Result<(u64, u64)> {
    entry
        .info
        .value(field)
        .and_then(|value| {
            let (seconds, nanoseconds) = value.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
            Some((seconds.trim().parse().ok()?, nanoseconds.trim().parse().ok()?))
        })
        .ok_or_else(|| Error::state(entry.name(), format!("fdinfo has no {field}")))
}

/// Collects a timer; the time left counts from `at`.
pub(crate) fn collect(entry: &mut Entry, directory: &Directory, at: Instant, id: u32) -> Result<FileEntry> {
    let (mut value, interval) = (pair(entry, "it_value")?, pair(entry, "it_interval")?);
    if value == (0, 0) && interval != (0, 0) {
        // It has expired unread, and the kernel counts further expirations only when asked.
        events::account_expirations(entry.file.as_fd()).map_err(entry.error("timerfd_gettime"))?;
        entry.refresh(directory)?;
        value = pair(entry, "it_value")?;
    }
    let number = |field: &str, radix| entry.info.value(field).and_then(|value| u64::from_str_radix(value, radix).ok());
    let missing = |field: &str| Error::state(entry.name(), format!("fdinfo has no {field}"));
    let clock = number("clockid", 10).ok_or_else(|| missing("clockid"))? as u32;
    let left = i128::from(value.0) * SECOND + i128::from(value.1);
    if left != 0 {
        let left = left + at.elapsed().as_nanos() as i128;
        value = ((left / SECOND) as u64, (left % SECOND) as u64);
    }
    let message = TimerfdEntry {
        id,
        flags: entry.info.status_flags() as u32,
        clockid: clock,
        ticks: number("ticks", 10).ok_or_else(|| missing("ticks"))?,
        settime_flags: number("settime flags", 8).ok_or_else(|| missing("settime flags"))? as u32,
        vsec: value.0,
        vnsec: value.1,
        isec: interval.0,
        insec: interval.1,
        ..TimerfdEntry::default()
    };
    Ok(FileEntry { r#type: FdTypes::Timerfd as i32, id, tfd: Some(message.into()), ..FileEntry::default() })
}

/// The reading of clock `id`; alarm clocks read as the clock they belong to.
fn reading(clocks: &Clocks, id: u32) -> Option<i64> {
    match id as i32 {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM => Some(clocks.realtime_ns),
        libc::CLOCK_MONOTONIC => Some(clocks.monotonic_ns),
        libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => Some(clocks.boottime_ns),
        _ => None,
    }
}

/// Makes a timer that is not set yet.
pub(crate) fn rebuild(message: &TimerfdEntry) -> Result<OwnedFd> {
    let failed = |source| Error::call("timerfd", "timerfd_create", source);
    let file = events::timerfd(message.clockid as i32, libc::TFD_CLOEXEC).map_err(failed)?;
    set_status(&file, message.flags).map_err(failed)?;
    Ok(file)
}

/// Adds the calls by which the stub sets its descriptor `fd`. `collected` are the process's clocks when the timer was
/// collected, `now` the same clocks as the stub reads them.
pub(crate) fn set(batch: &mut Batch, fd: i32, message: &TimerfdEntry, collected: &Clocks, now: &Clocks) -> Result<()> {
    const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;
    const NANOSECOND_LIMIT: u64 = 1_000_000_000;
    if message.vnsec >= NANOSECOND_LIMIT || message.insec >= NANOSECOND_LIMIT {
        return Err(Error::state(format!("fd {fd} (timerfd)"), "nanoseconds of a second or more"));
    }
    let missing = || Error::state(format!("fd {fd} (timerfd)"), format!("no clock {}", message.clockid));
    let left = i128::from(message.vsec) * SECOND + i128::from(message.vnsec);
    let mut ticks = message.ticks;
    if left != 0 || message.isec != 0 || message.insec != 0 {
        let absolute = message.settime_flags & libc::TFD_TIMER_ABSTIME as u32 != 0;
        // A relative timer runs by the monotonic clock even if it is made on the real-time clock.
        let measure = if absolute || message.clockid != libc::CLOCK_REALTIME as u32 {
            message.clockid
        } else {
            libc::CLOCK_MONOTONIC as u32
        };
        let then = i128::from(reading(collected, measure).ok_or_else(missing)?);
        let now = i128::from(reading(now, measure).ok_or_else(missing)?);
        let expiry = then + left;
        if left != 0 && expiry <= now && ticks > 0 {
            // Setting the count below overwrites the expiration that has come due on the way.
            ticks = ticks.saturating_add(1);
        }
        let value = match (left, absolute) {
            (0, _) => 0,
            (_, true) => expiry.max(1),
            (_, false) => (expiry - now).max(1),
        };
        let words = [message.isec, message.insec, (value / SECOND) as u64, (value % SECOND) as u64];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let setting = batch.data(&bytes);
        let flags = i64::from(message.settime_flags);
        let arguments = [fd.into(), flags.into(), setting.into(), 0u64.into()];
        batch.call(format!("setting timer fd {fd}"), libc::SYS_timerfd_settime, &arguments);
    }
    if ticks > 0 {
        let count = batch.data(&ticks.to_le_bytes());
        let arguments = [fd.into(), TFD_IOC_SET_TICKS.into(), count.into()];
        batch.call(format!("setting expirations of timer fd {fd}"), libc::SYS_ioctl, &arguments);
    }
    Ok(())
}
