//! Scheduling of another thread: sched_getattr(2), sched_setattr(2), ioprio_get(2), CPU affinity.

use crate::check;
use libc::pid_t;
use nix::errno::Errno;

/// Scheduling attributes (`struct sched_attr` of sched_setattr(2), the second version with utilization clamps).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Size of this structure in bytes.
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// Nice value, for `SCHED_OTHER` and `SCHED_BATCH`.
    pub nice: i32,
    /// Static priority, for `SCHED_FIFO` and `SCHED_RR`.
    pub priority: u32,
    /// `SCHED_DEADLINE`: nanoseconds.
    pub runtime: u64,
    /// `SCHED_DEADLINE`: nanoseconds.
    pub deadline: u64,
    /// `SCHED_DEADLINE`: nanoseconds.
    pub period: u64,
    /// Lower utilization clamp.
    pub util_min: u32,
    /// Upper utilization clamp.
    pub util_max: u32,
}

const _: () = assert!(size_of::<Attributes>() == 56);

impl Attributes {
    /// Its bytes, to be placed in a tracee that makes the call.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 56] {
        let mut bytes = [0; 56];
        bytes[..4].copy_from_slice(&self.size.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.policy.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.flags.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.nice.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.priority.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.runtime.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.deadline.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.period.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.util_min.to_le_bytes());
        bytes[52..].copy_from_slice(&self.util_max.to_le_bytes());
        bytes
    }
}

/// Reads a thread's scheduling attributes.
pub fn attributes(tid: pid_t) -> Result<Attributes, Errno> {
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes at most the size that is passed.
    check(unsafe {
        libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attributes, size_of::<Attributes>() as u32, 0)
    })?;
    Ok(attributes)
}

/// Sets a thread's scheduling attributes.
///
/// # Errors
/// `EPERM` for a priority that this process may not give.
pub fn set_attributes(tid: pid_t, attributes: &Attributes) -> Result<(), Errno> {
    let mut copy = *attributes;
    copy.size = size_of::<Attributes>() as u32;
    // SAFETY: the kernel reads `size` bytes of the structure.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw mut copy, 0) }).map(drop)
}

const SCHED_FIFO: u32 = 1;

/// Whether the calling thread runs ahead of ordinary ones.
#[must_use]
pub fn runs_first() -> bool {
    attributes(0).is_ok_and(|attributes| attributes.policy == SCHED_FIFO)
}

/// Lets the calling thread run ahead of ordinary ones, as far as this process may (`CAP_SYS_NICE`), and returns what it ran
/// with before. For threads that run for microseconds while somebody waits. What it starts is scheduled as usual.
///
/// # Errors
/// `EPERM` without the capability; nothing changes then.
pub fn run_first() -> Result<Attributes, Errno> {
    const SCHED_FLAG_RESET_ON_FORK: u64 = 1;
    let before = attributes(0)?;
    let fixed = Attributes {
        policy: SCHED_FIFO,
        flags: SCHED_FLAG_RESET_ON_FORK,
        priority: 1,
        util_max: 1024,
        ..Attributes::default()
    };
    let nice = Attributes { policy: 0, nice: -20, priority: 0, ..fixed };
    set_attributes(0, &fixed).or_else(|_| set_attributes(0, &nice))?;
    Ok(before)
}

/// Reads a thread's I/O priority (ioprio_get(2)).
pub fn io_priority(tid: pid_t) -> Result<u32, Errno> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: takes integers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) }).map(|value| value as u32)
}

/// Reads a thread's CPU mask as the kernel's little-endian bitmap.
pub fn affinity(tid: pid_t) -> Result<Vec<u8>, Errno> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: the kernel writes at most `mask.len()` bytes.
    let length = check(unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, mask.len(), mask.as_mut_ptr()) })?;
    mask.truncate(length as usize);
    Ok(mask)
}

/// Sets a thread's CPU mask from the kernel's little-endian bitmap.
///
/// # Errors
/// `EINVAL` when no CPU of the mask is online.
pub fn set_affinity(tid: pid_t, mask: &[u8]) -> Result<(), Errno> {
    // SAFETY: the kernel reads `mask.len()` bytes.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, mask.len(), mask.as_ptr()) }).map(drop)
}
