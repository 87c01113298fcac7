//! Scheduling and privileges of the threads that serve faults.
//!
//! During a drain every processor is busy encrypting pages. A thread that serves a fault runs for microseconds at a time and
//! somebody waits for it, so it goes first.

/// Lets the calling thread run ahead of ordinary ones, as far as this process may.
pub(crate) fn first() {
    if let Err(errno) = godwit_kernel::sched::run_first() {
        tracing::debug!(%errno, "faults are served with ordinary priority");
    }
}

/// Has the calling thread give up all capabilities: what it does it does with descriptors that it has been given, and what it
/// reads comes from other hosts. For the moment when its priority is set.
pub(crate) fn give_up_privileges() {
    if let Err(errno) = godwit_kernel::privileges::give_up_all() {
        tracing::warn!(%errno, "a thread that serves pages keeps its capabilities");
    }
}
