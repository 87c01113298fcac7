//! What would come of each choice: what could make two copies run, or lose the only one, does harm.

use anyhow::{Result, bail, ensure};
use godwit_session::decision::{SourceRecord, Verdict};

use crate::agent::Answered;

/// What does it all the same.
pub(super) const ALLOW_TWO_COPIES: &str = "--allow-two-copies";
pub(super) const ALLOW_LOSS: &str = "--allow-loss";

/// What would come of a choice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Choice {
    Harmless(&'static str),
    Harmful(&'static str),
    /// There is nothing to do it with.
    Void(&'static str),
}

impl Choice {
    /// What it comes to; `flag`: with which it is done although it does harm.
    pub(super) fn text(&self, flag: &str) -> String {
        match self {
            Self::Harmless(text) => (*text).to_owned(),
            Self::Harmful(why) => format!("refused: {why}; {flag} does it all the same"),
            Self::Void(why) => format!("refused: {why}"),
        }
    }

    /// Says no where it would do harm, unless the user has said by a flag that this is wanted.
    pub(super) fn permit(&self, is_wanted: bool, flag: &str) -> Result<()> {
        match self {
            Self::Harmless(_) => Ok(()),
            Self::Harmful(why) => {
                ensure!(is_wanted, "{why}; {flag} does it all the same");
                Ok(())
            }
            Self::Void(why) => bail!("{why}"),
        }
    }
}

/// What can be done about a hand-over.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Outlook {
    pub(super) resume: bool,
    pub(super) thaw: Choice,
    pub(super) end: Choice,
}

impl Outlook {
    /// `answer`: what the destination says, where it could be asked; `is_here`: whether the process that was given away is still there.
    pub(super) fn of(state: SourceRecord, answer: Option<&Answered>, is_here: bool) -> Self {
        use Choice::{Harmful, Harmless};
        const ONLY_ONE: Choice = Harmful("it is the only copy there is");
        let new = |resume, thaw, end| Self { resume, thaw, end };
        if !is_here {
            return Self::of_gone(answer);
        }
        if matches!(state, SourceRecord::Undecided | SourceRecord::Stayed) {
            return new(true, Harmless("it goes on here; nothing was decided"), ONLY_ONE);
        }
        match answer.map(|answer| answer.verdict) {
            Some(Verdict::Aborted) => {
                new(true, Harmless("it goes on here; the copy at the destination never ran and never will"), ONLY_ONE)
            }
            Some(Verdict::Runs { .. }) if answer.is_some_and(|answer| answer.ended) => new(
                false,
                Harmful("it has run at the destination: what it did there would be done once more"),
                Harmful("it has ended at the destination before all its pages came: this is all that is left of it"),
            ),
            Some(Verdict::Runs { complete: true }) => new(
                true,
                Harmful("it runs at the destination: two copies would run"),
                Harmless("it is ended here; the one at the destination has all it needs"),
            ),
            Some(Verdict::Runs { complete: false }) => new(
                true,
                Harmful("it runs at the destination: two copies would run"),
                Harmful("the one at the destination still needs pages that only this one has"),
            ),
            Some(Verdict::Waiting) => new(
                true,
                Harmful("a complete copy at the destination may be told to run at any moment"),
                Harmful("the copy at the destination has not been told to run"),
            ),
            Some(Verdict::Unknown) => new(
                false,
                Harmful("the destination knows nothing of it: the copy there may have run, or run still"),
                Harmful("the destination knows nothing of it: this may be the only copy"),
            ),
            None => new(
                true,
                Harmful("the destination cannot be asked: the copy there may run"),
                Harmful("the destination cannot be asked: this may be the only copy"),
            ),
        }
    }

    /// What can be done about a hand-over whose process is gone here.
    fn of_gone(answer: Option<&Answered>) -> Self {
        use Choice::{Harmful, Harmless, Void};
        let (resume, end) = match answer.map(|answer| answer.verdict) {
            Some(Verdict::Runs { .. }) if answer.is_some_and(|answer| answer.ended) => {
                (true, Harmless("it has ended at the destination, too; this forgets the migration"))
            }
            Some(Verdict::Runs { complete: true }) => {
                (true, Harmless("it runs at the destination, with all it needs; this forgets the migration"))
            }
            Some(Verdict::Runs { complete: false }) => (
                false,
                Harmful(
                    "the one at the destination needs pages that nobody has any more: it is to be ended there; this forgets the migration",
                ),
            ),
            Some(Verdict::Waiting) => {
                (true, Harmful("a complete copy at the destination waits to be let run; this forgets the migration"))
            }
            Some(Verdict::Aborted) => (false, Harmless("there is no copy of it any more; this forgets the migration")),
            Some(Verdict::Unknown) => {
                (false, Harmful("the destination knows nothing of it; this forgets the migration"))
            }
            None => (true, Harmful("the destination cannot be asked; this forgets the migration")),
        };
        Self { resume, thaw: Void("the process is gone here: there is nothing to let go on"), end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_that_could_make_two_copies_run_is_refused() {
        let answered = |verdict| Answered { verdict, pid: 1, reason: String::new(), ended: false };
        for verdict in
            [Verdict::Waiting, Verdict::Unknown, Verdict::Runs { complete: false }, Verdict::Runs { complete: true }]
        {
            for state in [SourceRecord::Decided, SourceRecord::Given] {
                let outlook = Outlook::of(state, Some(&answered(verdict)), true);
                assert!(matches!(outlook.thaw, Choice::Harmful(_)), "{state:?} {verdict:?}");
            }
        }
        assert!(matches!(Outlook::of(SourceRecord::Decided, None, true).thaw, Choice::Harmful(_)));
        let aborted = Outlook::of(SourceRecord::Decided, Some(&answered(Verdict::Aborted)), true);
        assert!(matches!(aborted.thaw, Choice::Harmless(_)) && matches!(aborted.end, Choice::Harmful(_)));
        let complete = Outlook::of(SourceRecord::Given, Some(&answered(Verdict::Runs { complete: true })), true);
        assert!(matches!(complete.end, Choice::Harmless(_)));
        assert!(matches!(Outlook::of(SourceRecord::Undecided, None, true).thaw, Choice::Harmless(_)));
        let ended = Answered { ended: true, ..answered(Verdict::Runs { complete: true }) };
        let outlook = Outlook::of(SourceRecord::Given, Some(&ended), true);
        assert!(!outlook.resume && matches!(outlook.end, Choice::Harmful(_)), "it is all that is left");
    }

    #[test]
    fn nothing_is_let_go_on_that_is_gone() {
        let answered = |verdict| Answered { verdict, pid: 1, reason: String::new(), ended: false };
        for verdict in [
            Verdict::Waiting,
            Verdict::Unknown,
            Verdict::Aborted,
            Verdict::Runs { complete: false },
            Verdict::Runs { complete: true },
        ] {
            let outlook = Outlook::of(SourceRecord::Given, Some(&answered(verdict)), false);
            assert!(outlook.thaw.permit(true, "--allow-two-copies").is_err(), "{verdict:?}");
            assert!(outlook.end.permit(true, "--allow-loss").is_ok(), "{verdict:?}");
        }
    }
}
