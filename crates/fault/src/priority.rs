//! Scheduling of the threads that serve faults.
//!
//! During a drain every processor is busy encrypting pages. A thread that serves a fault runs for microseconds at a time and
//! somebody waits for it, so it goes first.

use godwit_kernel::sched::{Attributes, set_attributes};

/// Lets the calling thread run ahead of ordinary ones, as far as this process may (`CAP_SYS_NICE`). What it starts is
/// scheduled as usual.
pub(crate) fn first() {
    const SCHED_FIFO: u32 = 1;
    const SCHED_FLAG_RESET_ON_FORK: u64 = 1;
    let size = size_of::<Attributes>() as u32;
    let fixed = Attributes {
        size,
        policy: SCHED_FIFO,
        flags: SCHED_FLAG_RESET_ON_FORK,
        priority: 1,
        util_max: 1024,
        ..Attributes::default()
    };
    let nice = Attributes { policy: 0, nice: -20, priority: 0, ..fixed };
    if let Err(errno) = set_attributes(0, &fixed).or_else(|_| set_attributes(0, &nice)) {
        tracing::debug!(%errno, "faults are served with ordinary priority");
    }
}
