//! Phases and modes. A mode is a list of phases, nothing else: no code asks for a mode along the way.

use std::fmt;

/// A stretch of a migration; both roles go through the same ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Version window, identity, facts of both hosts.
    Negotiate,
    /// Everything that could make the move fail is looked at; nothing is touched.
    Probe,
    /// The tracker is planted, the stub built.
    Prepare,
    /// Changed pages are sent while the process runs; repeated.
    Round,
    /// All threads are stopped. From here on no copy runs.
    Freeze,
    /// State other than memory is read.
    Collect,
    /// The last changed pages, or their addresses, are sent.
    FinalRound,
    /// The destination completes the stub.
    Rebuild,
    /// The right to run passes to the destination.
    Commit,
    /// Missing pages follow.
    Drain,
    /// Nothing is left to do.
    Done,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Negotiate => "negotiate",
            Self::Probe => "probe",
            Self::Prepare => "prepare",
            Self::Round => "round",
            Self::Freeze => "freeze",
            Self::Collect => "collect",
            Self::FinalRound => "final-round",
            Self::Rebuild => "rebuild",
            Self::Commit => "commit",
            Self::Drain => "drain",
            Self::Done => "done",
        })
    }
}

/// When memory moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Rounds until they stop paying, then post-copy for what is left.
    Hybrid,
    /// Rounds, and the rest inside the freeze.
    PreCopy,
    /// After the freeze.
    PostCopy,
    /// Inside the freeze.
    StopAndCopy,
}

impl Mode {
    /// Its phases, in order.
    #[must_use]
    pub fn phases(self) -> &'static [Phase] {
        use Phase::{Collect, Commit, Done, Drain, FinalRound, Freeze, Negotiate, Prepare, Probe, Rebuild, Round};
        match self {
            Self::Hybrid => {
                &[Negotiate, Probe, Prepare, Round, Freeze, Collect, FinalRound, Rebuild, Commit, Drain, Done]
            }
            Self::PreCopy => &[Negotiate, Probe, Prepare, Round, Freeze, Collect, FinalRound, Rebuild, Commit, Done],
            Self::PostCopy => &[Negotiate, Probe, Prepare, Freeze, Collect, FinalRound, Rebuild, Commit, Drain, Done],
            Self::StopAndCopy => &[Negotiate, Probe, Prepare, Freeze, Collect, FinalRound, Rebuild, Commit, Done],
        }
    }

    /// Whether a phase is one of its.
    #[must_use]
    pub fn has(self, phase: Phase) -> bool {
        self.phases().contains(&phase)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_stops_the_process_before_it_commits() {
        for mode in [Mode::Hybrid, Mode::PreCopy, Mode::PostCopy, Mode::StopAndCopy] {
            let at = |phase| mode.phases().iter().position(|&other| other == phase).unwrap();
            assert!(at(Phase::Freeze) < at(Phase::Commit));
            assert_eq!(mode.phases().first(), Some(&Phase::Negotiate));
            assert_eq!(mode.phases().last(), Some(&Phase::Done));
        }
    }
}
