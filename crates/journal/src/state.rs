//! States of the hand-over as words.

use godwit_session::decision::{DestinationRecord, SourceRecord};

/// What an entry is in, written as one word.
pub trait State: Copy + Eq {
    /// The word: short, of lower-case letters and hyphens.
    fn word(self) -> &'static str;
    /// What a word stands for.
    fn of(word: &str) -> Option<Self>;
}

impl State for SourceRecord {
    fn word(self) -> &'static str {
        match self {
            Self::Undecided => "undecided",
            Self::Decided => "decided",
            Self::Given => "given",
            Self::Stayed => "stayed",
        }
    }

    fn of(word: &str) -> Option<Self> {
        [Self::Undecided, Self::Decided, Self::Given, Self::Stayed].into_iter().find(|state| state.word() == word)
    }
}

impl State for DestinationRecord {
    fn word(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Runs { complete: false } => "runs",
            Self::Runs { complete: true } => "runs-complete",
            Self::Aborted => "aborted",
        }
    }

    fn of(word: &str) -> Option<Self> {
        [Self::Ready, Self::Runs { complete: false }, Self::Runs { complete: true }, Self::Aborted]
            .into_iter()
            .find(|state| state.word() == word)
    }
}
