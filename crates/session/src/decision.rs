//! The hand-over: which of the two copies may run, whatever is lost on the way.
//!
//! Each side is a state, what happened to it, and the [steps](SourceStep) that follow, to be done in this order. Both write down what they
//! have promised before they act on it, so that a side which begins anew goes on from its [record](SourceRecord):
//!
//! ```text
//! source                                   destination
//! Undecided                                Building
//!                            <- Ready      Ready         written down: nothing runs here yet, and may
//! Decided     written down
//!             Commit ->                    Runs          written down, then let go
//!                          <- Running
//! Given       written down, serves pages
//! Moved       ends its copy
//!             Over ->                      forgets
//! ```
//!
//! Before `Decided` is written down any failure lets the source go on. After it the source goes on only if the destination says
//! that its copy never ran and never will, which it says when it has written that down. A side that has heard nothing asks
//! ([`ToDestination::Query`]); it never guesses. A source forgets before it says that it is `Over`: the other way round it could
//! ask somebody who has forgotten.

/// What a source says about the hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ToDestination {
    /// Let it run.
    Commit,
    /// What became of it?
    Query,
    /// It goes on here; nothing was decided.
    Abort,
    /// This side needs to know nothing more.
    Over,
}

/// What a destination says about the hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ToSource {
    /// The copy is complete and stopped.
    Ready,
    /// How it stands, as an answer to `Commit` or `Query`.
    Verdict(Verdict),
}

/// How it stands at a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// Nothing is known of this migration: it never got that far, or it is over, or what was written down is lost.
    Unknown,
    /// The copy is complete and stopped, and waits for the decision.
    Waiting,
    /// The copy runs, or has run until it ended.
    Runs {
        /// Whether it needs nothing more from the source.
        complete: bool,
    },
    /// The copy never ran and never will.
    Aborted,
}

/// What a source has written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceRecord {
    /// A migration is under way; the process is this side's.
    Undecided,
    /// The decision is made: from here on only the destination can say that the process may go on here.
    Decided,
    /// It runs at the destination, which may lack pages.
    Given,
    /// The destination has said that its copy will never run: the process goes on here.
    Stayed,
}

/// What a destination has written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DestinationRecord {
    /// The copy is complete and stopped.
    Ready,
    /// The copy runs, or is about to be let go.
    Runs {
        /// Whether it needs nothing more from the source.
        complete: bool,
    },
    /// The copy never ran and never will.
    Aborted,
}

/// What happens to a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The destination's copy is complete, and nothing speaks against the hand-over.
    Ready,
    /// Something went wrong, or somebody wants it to stay.
    Failed,
    /// There is a link to the destination again.
    Linked,
    /// The destination has answered.
    Answer(Verdict),
    /// The destination has all pages.
    Complete,
}

/// What a source has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceStep {
    /// Write this down.
    Record(SourceRecord),
    /// See to it that the process stays stopped should this side end from now on.
    Secure,
    /// Say this; it may be lost.
    Send(ToDestination),
    /// Let the process go on here, as it was.
    GoOn,
    /// Serve pages until the destination has all of them.
    Serve,
    /// End this copy.
    EndCopy,
    /// Remove what was written down.
    Forget,
    /// Keep it stopped until somebody decides who knows more.
    Hold,
}

/// A source's side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Source {
    /// The process is this side's.
    #[default]
    Undecided,
    /// The process may run at the destination.
    Decided,
    /// It runs at the destination.
    Given,
    /// It runs at the destination, and nothing is left here.
    Moved,
    /// It goes on here.
    Stayed,
}

impl Source {
    /// A side that begins anew, with what it finds written down.
    #[must_use]
    pub fn restarted(record: SourceRecord) -> (Self, &'static [SourceStep]) {
        use SourceStep::{Forget, GoOn};
        match record {
            // N.B. what was written down last says that `Commit` was never said.
            SourceRecord::Undecided => (Self::Stayed, &[SourceStep::Record(SourceRecord::Stayed), GoOn, Forget]),
            SourceRecord::Stayed => (Self::Stayed, &[GoOn, Forget, SourceStep::Send(ToDestination::Over)]),
            SourceRecord::Decided => (Self::Decided, &[]),
            SourceRecord::Given => (Self::Given, &[]),
        }
    }

    /// Takes in what happened; what follows is to be done in this order.
    pub fn on(&mut self, event: SourceEvent) -> &'static [SourceStep] {
        use SourceEvent::{Answer, Complete, Failed, Linked, Ready};
        use SourceStep::{EndCopy, Forget, GoOn, Hold, Record, Secure, Send, Serve};
        let (next, steps): (Self, &'static [SourceStep]) = match (*self, event) {
            (Self::Undecided, Ready) => {
                (Self::Decided, &[Secure, Record(SourceRecord::Decided), Send(ToDestination::Commit)])
            }
            (Self::Undecided, Failed) => (Self::Stayed, &[GoOn, Forget, Send(ToDestination::Abort)]),
            (Self::Decided | Self::Given, Linked) => (*self, &[Send(ToDestination::Query)]),
            (Self::Decided, Answer(Verdict::Waiting)) => (*self, &[Send(ToDestination::Commit)]),
            (Self::Decided, Answer(Verdict::Aborted)) => {
                (Self::Stayed, &[Record(SourceRecord::Stayed), GoOn, Forget, Send(ToDestination::Over)])
            }
            (Self::Decided, Answer(Verdict::Runs { complete: false })) => {
                (Self::Given, &[Record(SourceRecord::Given), Serve])
            }
            (Self::Given, Answer(Verdict::Runs { complete: false })) => (*self, &[Serve]),
            (Self::Decided | Self::Given, Answer(Verdict::Runs { complete: true })) => {
                (Self::Moved, &[Record(SourceRecord::Given), EndCopy, Forget, Send(ToDestination::Over)])
            }
            (Self::Given, Complete) => (Self::Moved, &[EndCopy, Forget, Send(ToDestination::Over)]),
            // What it needs is known nowhere, or contradicts what was known.
            (Self::Decided | Self::Given, Answer(Verdict::Unknown)) | (Self::Given, Answer(Verdict::Aborted)) => {
                (*self, &[Hold])
            }
            // Old answers, and what comes too late.
            _ => (*self, &[]),
        };
        *self = next;
        steps
    }

    /// Whether the process may run at the destination: then it must not here.
    #[must_use]
    pub fn is_decided(self) -> bool {
        matches!(self, Self::Decided | Self::Given | Self::Moved)
    }
}

/// What happens to a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// The copy is complete.
    Built,
    /// The source has said something.
    Heard(ToDestination),
    /// The source has not been heard of for too long.
    SourceAway,
    /// The copy could not be let go; it has not run.
    LaunchFailed,
    /// It needs nothing more from the source.
    Complete,
}

/// What a destination has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationStep {
    /// Write this down.
    Record(DestinationRecord),
    /// Say this; it may be lost.
    Send(ToSource),
    /// See to it that the copy outlives this side, stopped until it is released. If that fails, [`DestinationEvent::LaunchFailed`] happens instead of all that
    /// follows.
    Free,
    /// Let the copy run.
    Release,
    /// End the copy, which has never run.
    Kill,
    /// Remove what was written down.
    Forget,
}

/// What a destination that begins anew finds of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Found {
    /// It is not there.
    Gone,
    /// It is there.
    There,
}

/// A destination's side, once the copy is being built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Destination {
    /// The copy is not complete.
    #[default]
    Building,
    /// It is complete and stopped; only the decision is missing.
    Ready,
    /// It runs.
    Runs {
        /// Whether it needs nothing more from the source.
        complete: bool,
    },
    /// It never ran and never will.
    Aborted,
    /// Nothing is known of it any more, or was ever.
    Forgotten,
}

impl Destination {
    /// A side that begins anew, with what it finds written down and of the copy.
    #[must_use]
    pub fn restarted(record: Option<DestinationRecord>, found: Found) -> (Self, &'static [DestinationStep]) {
        use DestinationStep::{Kill, Record, Release};
        match (record, found) {
            (None, _) => (Self::Forgotten, &[]),
            // N.B. a freed copy is stopped until it is written down that it runs: it has never run.
            (Some(DestinationRecord::Ready), _) => (Self::Aborted, &[Kill, Record(DestinationRecord::Aborted)]),
            (Some(DestinationRecord::Runs { complete }), Found::There) => (Self::Runs { complete }, &[Release]),
            // It has ended by itself.
            (Some(DestinationRecord::Runs { .. }), Found::Gone) => {
                (Self::Runs { complete: true }, &[Record(DestinationRecord::Runs { complete: true })])
            }
            (Some(DestinationRecord::Aborted), _) => (Self::Aborted, &[]),
        }
    }

    /// Takes in what happened; what follows is to be done in this order. `needs_pages`: whether the copy runs before all of its
    /// pages are there.
    pub fn on(&mut self, event: DestinationEvent, needs_pages: bool) -> &'static [DestinationStep] {
        use DestinationEvent::{Built, Complete, Heard, LaunchFailed, SourceAway};
        use DestinationStep::{Forget, Free, Kill, Record, Release, Send};
        use ToDestination::{Abort, Commit, Over, Query};
        const COMPLETE: DestinationRecord = DestinationRecord::Runs { complete: true };
        const INCOMPLETE: DestinationRecord = DestinationRecord::Runs { complete: false };
        const IS_COMPLETE: ToSource = ToSource::Verdict(Verdict::Runs { complete: true });
        const IS_INCOMPLETE: ToSource = ToSource::Verdict(Verdict::Runs { complete: false });
        let (next, steps): (Self, &'static [DestinationStep]) = match (*self, event) {
            (Self::Building, Built) => (Self::Ready, &[Record(DestinationRecord::Ready), Send(ToSource::Ready)]),
            (Self::Building, Heard(Abort) | SourceAway) => (Self::Forgotten, &[Kill]),
            (Self::Ready, Heard(Commit)) if needs_pages => {
                (Self::Runs { complete: false }, &[Free, Record(INCOMPLETE), Release, Send(IS_INCOMPLETE)])
            }
            (Self::Ready, Heard(Commit)) => {
                (Self::Runs { complete: true }, &[Free, Record(COMPLETE), Release, Send(IS_COMPLETE)])
            }
            (Self::Ready, Heard(Query)) => (*self, &[Send(ToSource::Verdict(Verdict::Waiting))]),
            (Self::Ready, Heard(Abort)) => (Self::Forgotten, &[Kill, Forget]),
            (Self::Ready, SourceAway) => (Self::Aborted, &[Kill, Record(DestinationRecord::Aborted)]),
            (Self::Runs { .. }, LaunchFailed) => {
                (Self::Aborted, &[Kill, Record(DestinationRecord::Aborted), Send(ToSource::Verdict(Verdict::Aborted))])
            }
            (Self::Runs { complete: true }, Heard(Commit | Query)) => (*self, &[Send(IS_COMPLETE)]),
            (Self::Runs { complete: false }, Heard(Commit | Query)) => (*self, &[Send(IS_INCOMPLETE)]),
            (Self::Runs { complete: false }, Complete) => (Self::Runs { complete: true }, &[Record(COMPLETE)]),
            (Self::Runs { .. } | Self::Aborted, Heard(Over)) => (Self::Forgotten, &[Forget]),
            (Self::Aborted, Heard(Commit | Query)) => (*self, &[Send(ToSource::Verdict(Verdict::Aborted))]),
            (Self::Forgotten, Heard(Commit | Query)) => (*self, &[Send(ToSource::Verdict(Verdict::Unknown))]),
            _ => (*self, &[]),
        };
        *self = next;
        steps
    }

    /// How it stands, as an answer to a question.
    #[must_use]
    pub fn verdict(self) -> Verdict {
        match self {
            Self::Building | Self::Forgotten => Verdict::Unknown,
            Self::Ready => Verdict::Waiting,
            Self::Runs { complete } => Verdict::Runs { complete },
            Self::Aborted => Verdict::Aborted,
        }
    }
}
