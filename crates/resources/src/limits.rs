//! Resource limits: getrlimit(2) and prlimit(2).
//!
//! They are read by a call of the process's own: reading another user's needs CAP_SYS_RESOURCE, one's own needs nothing.

use crate::{Error, Obstacle, Result};
use godwit_kernel::Errno;
use godwit_proto::image::{RlimitEntry, TaskRlimitsEntry};
use godwit_proto::wire::ResourceLimit;
use godwit_tracee::{Arg, Batch, Buffer, Outcome};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Names of the limits in the order of their numbers, which is also the order of /proc/PID/limits.
const NAMES: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];
/// How /proc/PID/limits names them, in the same order.
const TITLES: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];
const LIMIT_SIZE: usize = 16;

/// Questions about all limits, asked in a batch.
pub(crate) struct LimitQuestions(Buffer);

impl LimitQuestions {
    pub(crate) fn ask(batch: &mut Batch) -> Self {
        let buffer = batch.buffer(NAMES.len() * LIMIT_SIZE);
        for resource in 0..NAMES.len() {
            let slot = Arg::Address(buffer, resource * LIMIT_SIZE);
            batch.call("prlimit", libc::SYS_prlimit64, &[0u64.into(), resource.into(), 0u64.into(), slot]);
        }
        Self(buffer)
    }

    pub(crate) fn answer(self, outcome: &Outcome) -> TaskRlimitsEntry {
        let word = |resource: usize, field: usize| outcome.word(self.0, resource * LIMIT_SIZE + field * 8);
        let rlimits = (0..NAMES.len()).map(|resource| RlimitEntry { cur: word(resource, 0), max: word(resource, 1) });
        TaskRlimitsEntry { rlimits: rlimits.collect() }
    }
}

/// Adds the calls that set all limits. Those that cannot be reached fail with the name of the limit.
pub(crate) fn set(batch: &mut Batch, limits: &TaskRlimitsEntry) -> Result<()> {
    if limits.rlimits.len() > NAMES.len() {
        return Err(Error::state("limits", format!("{} of them", limits.rlimits.len())));
    }
    for (resource, limit) in limits.rlimits.iter().enumerate() {
        let mut bytes = [0; LIMIT_SIZE];
        bytes[..8].copy_from_slice(&limit.cur.to_le_bytes());
        bytes[8..].copy_from_slice(&limit.max.to_le_bytes());
        let new = batch.data(&bytes);
        let what = format!("setting RLIMIT_{} to {}/{}", NAMES[resource], show(limit.cur), show(limit.max));
        batch.call(what, libc::SYS_prlimit64, &[0u64.into(), resource.into(), new.into(), 0u64.into()]);
    }
    Ok(())
}

fn show(value: u64) -> String {
    if value == libc::RLIM_INFINITY { "unlimited".to_owned() } else { value.to_string() }
}

/// Reads the limits of a running process from /proc/PID/limits, which anybody may.
///
/// # Errors
/// When the process is gone.
pub fn inspect(pid: i32) -> Result<Vec<ResourceLimit>> {
    let path = format!("/proc/{pid}/limits");
    let text = std::fs::read_to_string(&path).map_err(|source| Error::Proc { path: path.into(), source })?;
    Ok(text.lines().filter_map(parse_line).collect())
}

pub(crate) fn parse_line(line: &str) -> Option<ResourceLimit> {
    let (resource, title) = TITLES.iter().enumerate().find(|(_, title)| line.starts_with(**title))?;
    let mut values = line[title.len()..].split_whitespace().map(|word| match word {
        "unlimited" => Some(libc::RLIM_INFINITY),
        number => number.parse().ok(),
    });
    Some(ResourceLimit { resource: resource as u32, cur: values.next()??, max: values.next()?? })
}

/// Lists the limits that a process made by this one cannot have. Lowering always works; raising a hard limit needs
/// CAP_SYS_RESOURCE.
///
/// # Errors
/// When this process's own limits cannot be read.
pub fn check(wanted: &[ResourceLimit]) -> Result<Vec<Obstacle>> {
    let own = inspect(std::process::id() as i32)?;
    if crate::credentials::own_capabilities()?.permitted & 1 << CAP_SYS_RESOURCE != 0 {
        return Ok(Vec::new());
    }
    let too_high =
        |limit: &&ResourceLimit| own.iter().any(|mine| mine.resource == limit.resource && mine.max < limit.max);
    Ok(wanted
        .iter()
        .filter(too_high)
        .map(|limit| {
            let name = NAMES.get(limit.resource as usize).copied().unwrap_or("?");
            let mine = own.iter().find(|mine| mine.resource == limit.resource).map_or(0, |mine| mine.max);
            Obstacle::new(
                format!("RLIMIT_{name}"),
                format!("hard limit {} is above this host's {} and cannot be raised", show(limit.max), show(mine)),
                format!(
                    "start the page server with a higher hard limit, or lower it: prlimit --pid PID --{}",
                    name.to_lowercase()
                ),
            )
        })
        .collect())
}

const CAP_SYS_RESOURCE: u32 = 24;

/// Lets this process have as many descriptors as it may, and makes its table large enough for many of them.
///
/// N.B. a table that threads share grows by doubling, and waits for an RCU grace period each time: 5 to 10 ms, which a freeze
/// had better not contain. It never shrinks.
///
/// # Errors
/// When the limit cannot be raised.
pub fn make_room_for_descriptors() -> std::result::Result<(), Errno> {
    /// Half a megabyte of pointers.
    const ENOUGH: u64 = 1 << 16;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let last = i32::try_from(most.min(ENOUGH)).unwrap_or(i32::MAX) - 1;
    let far = fcntl(std::io::stdin(), FcntlArg::F_DUPFD_CLOEXEC(last))?;
    nix::unistd::close(far)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_its_own_limits() {
        let limits = inspect(std::process::id() as i32).unwrap();
        assert_eq!(limits.len(), NAMES.len());
        let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
        let files = limits.iter().find(|limit| limit.resource == libc::RLIMIT_NOFILE).unwrap();
        assert_eq!((files.cur, files.max), (soft, hard));
        assert_eq!(check(&limits).unwrap(), []);
    }
}
