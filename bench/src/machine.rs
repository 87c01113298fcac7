//! The machine that is measured on: what it is, a quiet moment on it, and memory that is warm.

use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

/// What the figures depend on.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// Processors.
    pub processors: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Largest packet between the hosts in bytes.
    pub mtu: u32,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, processors, memory_mib, mtu } = self;
        write!(f, "Linux {kernel}, {processors} processors, {memory_mib} MiB, packets of {mtu} bytes")
    }
}

/// How a wait for a quiet moment ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Quiet {
    /// Nobody else uses the processors.
    Yes,
    /// Somebody still did when patience ran out.
    No,
}

/// Processor time of others, as a share of one processor, that is still quiet.
const QUIET_SHARE: f64 = 0.2;
/// How long is looked.
const LOOK: Duration = Duration::from_millis(300);
/// Clock ticks of /proc in a second: the kernel's USER_HZ, the same on all machines.
const TICKS_PER_SECOND: f64 = 100.0;

impl Machine {
    /// Looks at this machine.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn here(mtu: u32) -> Result<Self> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("the kernel's release")?;
        Ok(Self {
            kernel: kernel.trim().to_owned(),
            processors: std::thread::available_parallelism()?.get(),
            memory_mib: memory("MemTotal")?,
            mtu,
        })
    }
}

/// Memory that can be had, in MiB.
///
/// # Errors
/// /proc cannot be read.
pub fn available_mib() -> Result<u64> {
    memory("MemAvailable")
}

/// Waits until nobody but process `own` uses the processors.
///
/// # Errors
/// /proc cannot be read, for instance because the process is gone.
pub fn wait_for_quiet(own: u32, patience: Duration) -> Result<Quiet> {
    let end = Instant::now() + patience;
    loop {
        let (busy, ours, start) = (busy_ticks()?, ticks_of(own)?, Instant::now());
        std::thread::sleep(LOOK);
        let others = (busy_ticks()? - busy) - (ticks_of(own)? - ours);
        if others / TICKS_PER_SECOND / start.elapsed().as_secs_f64() <= QUIET_SHARE {
            return Ok(Quiet::Yes);
        }
        if Instant::now() >= end {
            return Ok(Quiet::No);
        }
    }
}

/// Touches memory and gives it back. A guest returns free memory to its host, and the first touch of what has to be fetched
/// again is many times slower: what a move needs should be there.
pub fn warm(mebibytes: u64) {
    let bytes = usize::try_from(mebibytes << 20).unwrap_or(usize::MAX / 4);
    std::hint::black_box(vec![1u8; bytes]);
}

fn memory(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kibibytes.with_context(|| format!("/proc/meminfo has no {name}"))? / 1024)
}

/// Processor time spent by all, stolen time included.
fn busy_ticks() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let line = text.lines().next().unwrap_or_default();
    let fields: Vec<f64> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guests' time is part of the first two.
    const IDLE: [usize; 2] = [3, 4];
    Ok(fields.iter().take(8).enumerate().filter(|(index, _)| !IDLE.contains(index)).map(|(_, ticks)| ticks).sum())
}

/// Processor time spent by a process.
fn ticks_of(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    // The name may hold anything, parentheses too.
    let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<f64> = rest.split_whitespace().skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
    Ok(fields.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_seen() {
        let machine = Machine::here(9000).unwrap();
        assert!(machine.processors > 0 && machine.memory_mib > 0 && !machine.kernel.is_empty());
        assert!(available_mib().unwrap() <= machine.memory_mib);
        assert!(busy_ticks().unwrap() > 0.0);
        ticks_of(std::process::id()).unwrap();
        wait_for_quiet(std::process::id(), Duration::ZERO).unwrap();
    }
}
