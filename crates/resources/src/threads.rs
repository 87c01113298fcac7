//! Processes and threads apart from memory and descriptors: the front door to the modules beside this one.
//!
//! [`collect`] asks everything of a frozen process in one batch of remote calls per thread; the leader's also asks what
//! all threads share. [`rebuild`] answers with one batch per thread of a stub. What a thread runs with (registers, XSAVE
//! area, blocked signals) is composed last, by [`final_state`], because no remote call can follow it.

mod collect;
mod rebuild;

pub use collect::collect;
pub use rebuild::{Image, Rebuilt, final_state, offer_to_oom_killer, prepare, rebuild, stop_again, touched};

use crate::filesystem::Place;
use crate::timers::Clocks;
use godwit_proto::image::{CoreEntry, PstreeEntry, SeccompEntry};

/// A frozen process and its threads. Thread ids are those that the process sees itself.
#[derive(Clone, Debug)]
pub struct Collected {
    /// Pid, parent, group and session, and all thread ids, the leader's first.
    pub process: PstreeEntry,
    /// The leader, with what all threads share.
    pub leader: CoreEntry,
    /// The other threads, in the order of `process.threads`.
    pub threads: Vec<CoreEntry>,
    /// The filter programs that threads refer to.
    pub seccomp: SeccompEntry,
    /// Directories and file creation mask.
    pub place: Place,
    /// PR_GET_DUMPABLE(2const).
    pub dumpable: i32,
    /// PR_GET_THP_DISABLE(2const).
    pub thp_disabled: bool,
    /// The process's clocks when its timers were read.
    pub clocks: Clocks,
}

impl Collected {
    /// The ids of all threads but the leader.
    #[must_use]
    pub fn tids(&self) -> &[u32] {
        self.process.threads.get(1..).unwrap_or_default()
    }

    /// XSAVE components that some thread has in use; the destination's CPU must have them.
    #[must_use]
    pub fn components_in_use(&self) -> u64 {
        let areas = std::iter::once(&self.leader)
            .chain(&self.threads)
            .filter_map(|core| core.thread_core.as_ref()?.xstate.as_ref());
        areas.fold(0, |all, area| all | crate::registers::components_in_use(area))
    }

    /// Borrows it as what [`rebuild`] takes.
    #[must_use]
    pub fn image(&self) -> Image<'_> {
        Image {
            leader: &self.leader,
            threads: &self.threads,
            tids: self.tids(),
            process: &self.process,
            seccomp: &self.seccomp,
            place: &self.place,
            dumpable: self.dumpable,
            thp_disabled: self.thp_disabled,
            clocks: self.clocks,
        }
    }
}
