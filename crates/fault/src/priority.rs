//! Scheduling of the threads that serve faults.
//!
//! During a drain every processor is busy encrypting pages. A thread that serves a fault runs for microseconds at a time and
//! somebody waits for it, so it goes first.

/// Lets the calling thread run ahead of ordinary ones, as far as this process may.
pub(crate) fn first() {
    if let Err(errno) = godwit_kernel::sched::run_first() {
        tracing::debug!(%errno, "faults are served with ordinary priority");
    }
}
