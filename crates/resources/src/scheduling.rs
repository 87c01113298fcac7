//! How a thread is scheduled: policy and priority, nice value, CPUs, I/O priority, timer slack, and its name in listings.

use crate::{Error, Result};
use godwit_kernel::sched::{self, Attributes};
use godwit_proto::image::ThreadCoreEntry;
use godwit_tracee::{Batch, Buffer, Call, Outcome};
use std::collections::BTreeSet;

/// Bytes of the CPU mask that is asked for: 8192 CPUs.
const MASK_SIZE: usize = 1024;
const ATTRIBUTES_SIZE: usize = size_of::<Attributes>();
/// Bytes of a thread's name with its terminating NUL.
pub(crate) const NAME_SIZE: usize = 16;
const IOPRIO_WHO_PROCESS: i32 = 1;
const SCHED_DEADLINE: u32 = 6;
const SCHED_FLAG_RESET_ON_FORK: u64 = 0x01;
const SCHED_FLAG_UTIL_CLAMP: u64 = 0x20 | 0x40;
/// Largest utilization clamp, and what it means not to have one.
const UTIL_FULL: u32 = 1024;

/// Questions about how a thread is scheduled, asked in a batch that it runs itself.
pub(crate) struct SchedulingQuestions {
    attributes: Buffer,
    affinity: Buffer,
    affinity_length: Call,
    nice: Call,
    io_priority: Call,
    slack: Call,
    name: Buffer,
}

impl SchedulingQuestions {
    pub(crate) fn ask(batch: &mut Batch) -> Self {
        let attributes = batch.buffer(ATTRIBUTES_SIZE);
        let arguments = [0u64.into(), attributes.into(), ATTRIBUTES_SIZE.into(), 0u64.into()];
        batch.call("sched_getattr", libc::SYS_sched_getattr, &arguments);
        let affinity = batch.buffer(MASK_SIZE);
        let arguments = [0u64.into(), MASK_SIZE.into(), affinity.into()];
        let affinity_length = batch.call("sched_getaffinity", libc::SYS_sched_getaffinity, &arguments);
        let nice = batch.call("getpriority", libc::SYS_getpriority, &[libc::PRIO_PROCESS.into(), 0u64.into()]);
        let io_priority = batch.call("ioprio_get", libc::SYS_ioprio_get, &[IOPRIO_WHO_PROCESS.into(), 0u64.into()]);
        let slack = batch.call("PR_GET_TIMERSLACK", libc::SYS_prctl, &[libc::PR_GET_TIMERSLACK.into()]);
        let name = batch.buffer(NAME_SIZE);
        batch.call("PR_GET_NAME", libc::SYS_prctl, &[libc::PR_GET_NAME.into(), name.into()]);
        Self { attributes, affinity, affinity_length, nice, io_priority, slack, name }
    }

    pub(crate) fn answer(self, outcome: &Outcome, core: &mut ThreadCoreEntry) {
        let half = |at: usize| outcome.half(self.attributes, at);
        let word = |at: usize| outcome.word(self.attributes, at);
        let policy = half(4);
        core.sched_policy = Some(policy);
        core.sched_flags = Some(word(8) & SCHED_FLAG_RESET_ON_FORK);
        core.sched_prio = Some(half(20));
        if policy == SCHED_DEADLINE {
            core.sched_runtime_ns = Some(word(24));
            core.sched_deadline_ns = Some(word(32));
            core.sched_period_ns = Some(word(40));
        }
        let (low, high) = (half(48), half(52));
        if low != 0 || !matches!(high, 0 | UTIL_FULL) {
            (core.sched_util_min, core.sched_util_max) = (Some(low), Some(high));
        }
        // The system call returns 20 minus the nice value, so that it is never negative.
        core.sched_nice = outcome.result(self.nice).ok().map(|value| 20 - value as i32);
        let length = outcome.result(self.affinity_length).map_or(0, |length| length as usize).min(MASK_SIZE);
        core.cpu_affinity = Some(outcome.bytes(self.affinity)[..length].to_vec());
        core.ioprio = outcome.result(self.io_priority).ok().map(|value| value as u32);
        core.timer_slack_ns = outcome.result(self.slack).ok();
        let name = outcome.bytes(self.name);
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(NAME_SIZE);
        core.comm = Some(String::from_utf8_lossy(&name[..end]).into_owned());
    }
}

/// The CPUs of a mask in the kernel's layout.
pub fn cpus(mask: &[u8]) -> impl Iterator<Item = u32> {
    mask.iter()
        .enumerate()
        .flat_map(|(byte, bits)| (0..8).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| byte as u32 * 8 + bit))
}

/// The mask of some CPUs in the kernel's layout.
#[must_use]
pub fn mask(cpus: impl IntoIterator<Item = u32>) -> Vec<u8> {
    let mut mask = Vec::new();
    for cpu in cpus {
        let byte = cpu as usize / 8;
        if byte >= MASK_SIZE {
            continue;
        }
        if mask.len() <= byte {
            mask.resize(byte + 1, 0);
        }
        mask[byte] |= 1 << (cpu % 8);
    }
    mask
}

/// The CPUs that processes made by this one may run on.
///
/// # Errors
/// When the kernel does not say.
pub fn available_cpus() -> Result<Vec<u32>> {
    // Asked of process 1's cpuset would be wrong: a stub lives in this process's own.
    let status = godwit_tracee::read_status(std::process::id() as i32)?;
    Ok(parse_list(status.text("Cpus_allowed_list")))
}

/// Parses a list of CPUs such as `0-3,8`.
pub(crate) fn parse_list(text: &str) -> Vec<u32> {
    const MOST: u32 = 8 * MASK_SIZE as u32;
    let mut cpus = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<u32>(), last.trim().parse::<u32>()) {
            cpus.extend(first..=last.min(MOST - 1));
        }
    }
    cpus.into_iter().collect()
}

/// Adds the calls that schedule the running thread as it was. `available` is what [`available_cpus`] said.
pub(crate) fn set(batch: &mut Batch, core: &ThreadCoreEntry, available: &[u32]) -> Result<()> {
    let policy = core.sched_policy.unwrap_or(0);
    let clamped = core.sched_util_min.is_some() || core.sched_util_max.is_some();
    if let Some(wanted) = &core.cpu_affinity {
        set_affinity(batch, wanted, available)?;
    }
    if let Some(nice) = core.sched_nice {
        let arguments = [libc::PRIO_PROCESS.into(), 0u64.into(), nice.into()];
        batch.call(format!("setting nice value {nice}"), libc::SYS_setpriority, &arguments);
    }
    let attributes = Attributes {
        size: ATTRIBUTES_SIZE as u32,
        policy,
        flags: core.sched_flags.unwrap_or(0) & SCHED_FLAG_RESET_ON_FORK
            | if clamped { SCHED_FLAG_UTIL_CLAMP } else { 0 },
        nice: core.sched_nice.unwrap_or(0),
        priority: core.sched_prio.unwrap_or(0),
        runtime: core.sched_runtime_ns.unwrap_or(0),
        deadline: core.sched_deadline_ns.unwrap_or(0),
        period: core.sched_period_ns.unwrap_or(0),
        util_min: core.sched_util_min.unwrap_or(0),
        util_max: core.sched_util_max.unwrap_or(UTIL_FULL),
    };
    let buffer = batch.data(&attributes.to_bytes());
    let what = format!("setting scheduling policy {policy}");
    batch.call(what, libc::SYS_sched_setattr, &[0u64.into(), buffer.into(), 0u64.into()]);
    if let Some(priority) = core.ioprio {
        let arguments = [IOPRIO_WHO_PROCESS.into(), 0u64.into(), priority.into()];
        batch.call(format!("setting I/O priority {priority:#x}"), libc::SYS_ioprio_set, &arguments);
    }
    if let Some(slack) = core.timer_slack_ns {
        batch.call("PR_SET_TIMERSLACK", libc::SYS_prctl, &[libc::PR_SET_TIMERSLACK.into(), slack.into()]);
    }
    if let Some(comm) = &core.comm {
        let name = batch.string(&comm.as_bytes()[..comm.len().min(NAME_SIZE - 1)]);
        batch.call("PR_SET_NAME", libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name.into()]);
    }
    Ok(())
}

/// Keeps to the CPUs that this host has; a thread that may use none of them may use all.
fn set_affinity(batch: &mut Batch, wanted: &[u8], available: &[u32]) -> Result<()> {
    if wanted.len() > MASK_SIZE {
        return Err(Error::state("CPU mask", format!("{} bytes", wanted.len())));
    }
    let mut kept: Vec<u32> = cpus(wanted).filter(|cpu| available.contains(cpu)).collect();
    if kept.is_empty() {
        tracing::warn!("none of a thread's CPUs exists here; it may use all");
        kept = available.to_vec();
    }
    let mask = mask(kept);
    let length = mask.len();
    let mask = batch.data(&mask);
    let arguments = [0u64.into(), length.into(), mask.into()];
    batch.call("setting CPU affinity", libc::SYS_sched_setaffinity, &arguments);
    Ok(())
}

/// Reads which CPUs the threads of a running process may use, all together.
#[must_use]
pub fn inspect(tids: &[i32]) -> Vec<u32> {
    let mut all: Vec<u32> = tids
        .iter()
        .filter_map(|&tid| sched::affinity(tid).ok())
        .flat_map(|mask| cpus(&mask).collect::<Vec<_>>())
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_lists_agree() {
        assert_eq!(cpus(&mask([0, 3, 9, 64])).collect::<Vec<_>>(), [0, 3, 9, 64]);
        assert_eq!(parse_list("0-2,5"), [0, 1, 2, 5]);
        assert_eq!(parse_list(""), []);
        assert!(!available_cpus().unwrap().is_empty());
    }
}
