//! Every course that a hand-over can take, walked through: both sides as they are, every message lost, late, again and out of
//! order, and either side ending between any two of its steps and beginning anew.
//!
//! The network keeps all that was ever said to a side and may deliver any of it at any time, or never: that covers loss,
//! duplication and any order, also across links. A side that ends loses what it has not written down. What is checked in every state: no two
//! copies run. What is checked of the whole: from every state an end can be reached once both sides are up and hear each other, and in
//! every end exactly one copy is left, or none because it was let go at the destination and ended there by itself.

use godwit_session::decision::{
    Destination, DestinationEvent, DestinationRecord, DestinationStep, Found, Source, SourceEvent, SourceRecord,
    SourceStep, ToDestination, ToSource, Verdict,
};
use std::collections::{BTreeSet, HashMap, VecDeque};

/// The process at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Original {
    /// It runs, or will as soon as whoever holds it lets go.
    Runs,
    /// Held by the side, which has not secured it: it runs on if that ends.
    Held,
    /// Stopped, whatever becomes of the side.
    Secured,
    Ended,
}

/// The copy at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Copy {
    None,
    /// It dies with the side that made it.
    Bound,
    /// Stopped, whatever becomes of the side.
    Freed,
    Runs,
    /// It ran, and has ended by itself.
    Ended,
}

/// Everything there is. Steps that are still to be done stand in `todo`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Option<Source>,
    source_todo: Vec<SourceStep>,
    source_record: Option<SourceRecord>,
    original: Original,
    serves: bool,
    destination: Option<Destination>,
    destination_todo: Vec<DestinationStep>,
    destination_record: Option<DestinationRecord>,
    copy: Copy,
    /// The copy has all its pages.
    has_all: bool,
    said_to_destination: BTreeSet<ToDestination>,
    said_to_source: BTreeSet<ToSource>,
    /// How often sides may still end.
    ends: (u8, u8),
}

/// What a run may hold.
#[derive(Clone, Copy)]
struct Setting {
    needs_pages: bool,
    ends: (u8, u8),
    launch_may_fail: bool,
}

impl World {
    fn new(setting: Setting) -> Self {
        Self {
            source: Some(Source::default()),
            source_todo: Vec::new(),
            source_record: Some(SourceRecord::Undecided),
            original: Original::Held,
            serves: false,
            destination: Some(Destination::default()),
            destination_todo: Vec::new(),
            destination_record: None,
            copy: Copy::Bound,
            has_all: !setting.needs_pages,
            said_to_destination: BTreeSet::new(),
            said_to_source: BTreeSet::new(),
            ends: setting.ends,
        }
    }

    fn two_run(&self) -> bool {
        self.original == Original::Runs && self.copy == Copy::Runs
    }

    /// Nothing is left to do.
    fn is_over(&self) -> bool {
        self.source_record.is_none() && self.source_todo.is_empty() && self.destination_todo.is_empty()
    }

    /// Does the source's next step.
    fn step_source(&mut self) {
        match self.source_todo.remove(0) {
            SourceStep::Record(record) => self.source_record = Some(record),
            SourceStep::Secure => self.original = Original::Secured,
            SourceStep::Send(word) => {
                self.said_to_destination.insert(word);
            }
            SourceStep::GoOn => {
                assert_ne!(self.original, Original::Ended, "what has ended cannot go on: {self:?}");
                self.original = Original::Runs;
            }
            SourceStep::Serve => self.serves = true,
            SourceStep::EndCopy => {
                assert_ne!(self.original, Original::Runs, "a copy that runs is ended: {self:?}");
                self.original = Original::Ended;
            }
            SourceStep::Forget => self.source_record = None,
            SourceStep::Hold => {}
        }
    }

    /// Does the destination's next step.
    fn step_destination(&mut self) {
        match self.destination_todo.remove(0) {
            DestinationStep::Record(record) => self.destination_record = Some(record),
            DestinationStep::Send(word) => {
                self.said_to_source.insert(word);
            }
            DestinationStep::Free => {
                assert_eq!(self.copy, Copy::Bound, "{self:?}");
                self.copy = Copy::Freed;
            }
            DestinationStep::Release => {
                assert_ne!(self.copy, Copy::Bound, "let go before it was freed: {self:?}");
                if self.copy == Copy::Freed {
                    self.copy = Copy::Runs;
                }
            }
            DestinationStep::Kill => {
                assert!(!matches!(self.copy, Copy::Runs | Copy::Ended), "a copy that has run is killed: {self:?}");
                self.copy = Copy::None;
            }
            DestinationStep::Forget => self.destination_record = None,
        }
    }

    fn tell_source(&mut self, event: SourceEvent) {
        if let Some(source) = &mut self.source {
            self.source_todo = source.on(event).to_vec();
        }
    }

    fn tell_destination(&mut self, event: DestinationEvent, setting: Setting) {
        if let Some(destination) = &mut self.destination {
            self.destination_todo = destination.on(event, setting.needs_pages).to_vec();
        }
    }

    /// What both sides' own course can lead to: no failure among it.
    fn willing(&self, setting: Setting) -> Vec<Self> {
        let mut next = Vec::new();
        let mut add = |change: &dyn Fn(&mut Self)| {
            let mut world = self.clone();
            change(&mut world);
            if world != *self {
                next.push(world);
            }
        };
        // N.B. a side does what is to be done before it listens again.
        if !self.source_todo.is_empty() {
            add(&|world| world.step_source());
        } else if let Some(source) = self.source {
            // Its patience ends in any case.
            if source == Source::Undecided {
                add(&|world| world.tell_source(SourceEvent::Failed));
            }
            if matches!(source, Source::Decided | Source::Given) {
                add(&|world| world.tell_source(SourceEvent::Linked));
            }
            for word in &self.said_to_source {
                let event = match *word {
                    ToSource::Ready => SourceEvent::Ready,
                    ToSource::Verdict(verdict) => SourceEvent::Answer(verdict),
                };
                add(&|world| world.tell_source(event));
            }
            if self.serves && self.has_all && self.source_record.is_some() {
                add(&|world| world.tell_source(SourceEvent::Complete));
            }
        } else if let Some(record) = self.source_record {
            add(&|world| {
                let (source, steps) = Source::restarted(record);
                (world.source, world.source_todo) = (Some(source), steps.to_vec());
            });
        }
        if !self.destination_todo.is_empty() {
            add(&|world| world.step_destination());
        } else if let Some(destination) = self.destination {
            if destination == Destination::Building && self.copy == Copy::Bound {
                add(&|world| world.tell_destination(DestinationEvent::Built, setting));
            }
            for &word in &self.said_to_destination {
                add(&|world| world.tell_destination(DestinationEvent::Heard(word), setting));
            }
            if self.has_all {
                add(&|world| world.tell_destination(DestinationEvent::Complete, setting));
            }
        } else {
            add(&|world| {
                let found = match world.copy {
                    Copy::Freed | Copy::Runs => Found::There,
                    _ => Found::Gone,
                };
                let (destination, steps) = Destination::restarted(world.destination_record, found);
                (world.destination, world.destination_todo) = (Some(destination), steps.to_vec());
            });
        }
        if self.serves && self.source_todo.is_empty() && self.copy == Copy::Runs && self.destination.is_some() {
            add(&|world| world.has_all = true);
        }
        next
    }

    /// What else can happen.
    fn unwilling(&self, setting: Setting) -> Vec<Self> {
        let mut next = Vec::new();
        let mut add = |change: &dyn Fn(&mut Self)| {
            let mut world = self.clone();
            change(&mut world);
            if world != *self {
                next.push(world);
            }
        };
        if self.destination.is_some() && self.destination_todo.is_empty() {
            add(&|world| world.tell_destination(DestinationEvent::SourceAway, setting));
        }
        if setting.launch_may_fail && self.destination_todo.first() == Some(&DestinationStep::Free) {
            add(&|world| world.tell_destination(DestinationEvent::LaunchFailed, setting));
        }
        // A source ends: the process runs on unless it was secured.
        if self.source.is_some() && self.ends.0 > 0 {
            add(&|world| {
                world.ends.0 -= 1;
                (world.source, world.serves) = (None, false);
                world.source_todo.clear();
                // What was said to it reaches no other.
                world.said_to_source.clear();
                if world.original == Original::Held {
                    world.original = Original::Runs;
                }
            });
        }
        // A destination ends: the copy dies unless it was freed.
        if self.destination.is_some() && self.ends.1 > 0 {
            add(&|world| {
                world.ends.1 -= 1;
                world.destination = None;
                world.destination_todo.clear();
                world.said_to_destination.clear();
                if world.copy == Copy::Bound {
                    world.copy = Copy::None;
                }
            });
        }
        // The program ends by itself.
        if self.copy == Copy::Runs {
            add(&|world| (world.copy, world.has_all) = (Copy::Ended, true));
        }
        next
    }
}

/// Walks through everything; gives the number of states and of ends.
fn explore(setting: Setting) -> (usize, usize) {
    let first = World::new(setting);
    let mut numbers = HashMap::from([(first.clone(), 0usize)]);
    let mut worlds = vec![first];
    // Who leads to whom without any failure.
    let mut willing_before: Vec<Vec<usize>> = vec![Vec::new()];
    let mut todo = VecDeque::from([0]);
    while let Some(number) = todo.pop_front() {
        let world = worlds[number].clone();
        assert!(!world.two_run(), "two copies run: {world:#?}");
        let willing = world.willing(setting);
        let count = willing.len();
        for (index, next) in willing.into_iter().chain(world.unwilling(setting)).enumerate() {
            let known = numbers.len();
            let at = *numbers.entry(next.clone()).or_insert(known);
            if at == known {
                worlds.push(next);
                willing_before.push(Vec::new());
                todo.push_back(at);
            }
            if index < count {
                willing_before[at].push(number);
            }
        }
    }
    let ends: Vec<usize> = (0..worlds.len()).filter(|&number| worlds[number].is_over()).collect();
    for &end in &ends {
        let world = &worlds[end];
        let original = world.original == Original::Runs;
        let copy = matches!(world.copy, Copy::Runs | Copy::Ended);
        assert!(original != copy, "exactly one copy should be left: {world:#?}");
        assert!(!copy || world.has_all, "the copy lacks pages that are nowhere any more: {world:#?}");
    }
    // Backwards from the ends: nothing is stuck.
    let mut reaches = vec![false; worlds.len()];
    let mut todo = ends.clone();
    while let Some(number) = todo.pop() {
        if !std::mem::replace(&mut reaches[number], true) {
            todo.extend(&willing_before[number]);
        }
    }
    if let Some(stuck) = reaches.iter().position(|reaches| !reaches) {
        panic!("from here no end can be reached: {:#?}", worlds[stuck]);
    }
    (worlds.len(), ends.len())
}

#[test]
fn exactly_one_copy_is_left_whatever_is_lost_and_whoever_ends() {
    for needs_pages in [false, true] {
        for launch_may_fail in [false, true] {
            for ends in [(0, 0), (1, 0), (0, 1), (2, 2)] {
                let (worlds, over) = explore(Setting { needs_pages, ends, launch_may_fail });
                println!("pages missing: {needs_pages}, ends: {ends:?}: {worlds} states, {over} ends");
                assert!(worlds > 10 && over > 1);
            }
        }
    }
}

#[test]
fn a_destination_that_has_lost_its_records_keeps_the_source_frozen() {
    let (mut source, _) = Source::restarted(SourceRecord::Decided);
    let (mut destination, _) = Destination::restarted(None, Found::Gone);
    let answer = destination.on(DestinationEvent::Heard(ToDestination::Query), false);
    assert_eq!(answer, [DestinationStep::Send(ToSource::Verdict(Verdict::Unknown))]);
    assert_eq!(source.on(SourceEvent::Answer(Verdict::Unknown)), [SourceStep::Hold]);
    assert_eq!(source, Source::Decided);
}
