//! How the hand-over of one migration stands here, whoever asks and on whichever link: the states of [`decision`], done.

use crate::workshop::{Reply, Work};
use anyhow::{Context as _, Result};
use godwit_carry::Party;
use godwit_fault::{MigrationId, lacks_pages};
use godwit_journal::{Entry, Journal, ProcessName, Reserved};
use godwit_kernel::pause;
use godwit_proto::wire;
use godwit_resources::memory::awaits_pages;
use godwit_session::decision::{
    self, Destination, DestinationEvent, DestinationRecord, DestinationStep, Found, ToDestination, ToSource, Verdict,
};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

/// What is known of a copy, as the journal keeps it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Facts {
    /// The copy.
    pub(crate) process: ProcessName,
    /// Its name.
    pub(crate) command: String,
    /// Where it came from.
    pub(crate) from: SocketAddr,
    /// Who has sent it: nobody else may ask about it, or go on with it.
    pub(crate) party: Party,
    /// Whether it was let go: from then on nobody here stops it or lets it run.
    pub(crate) released: bool,
    /// Whether it has ended before all its pages came.
    #[serde(default)]
    pub(crate) ended: bool,
    /// Whether a daemon serves its pages, which may have brought all of them when no page server was there to write that down.
    #[serde(default = "unknown")]
    pub(crate) has_daemon: bool,
    /// Whether whoever brought its pages has said that none is missing, or that it executes another program.
    #[serde(default)]
    pub(crate) needs_none: bool,
}

/// Of what was written down without that.
fn unknown() -> bool {
    true
}

/// Whose question it is how a copy stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// The source's, which still has what it was at the hand-over.
    Sources,
    /// This program's own.
    Own,
}

/// What can be done to a copy.
pub(crate) trait Hands {
    /// Does all that may fail before the copy runs, and has it outlive this program, stopped.
    fn free(&mut self) -> Result<()>;
    /// Lets it run.
    fn release(&mut self);
    /// Ends it; it has never run.
    fn kill(&mut self);
    /// What is said with `Running`.
    fn running(&self) -> Option<wire::Running>;
}

/// For events that touch no copy.
struct NoHands;

impl Hands for NoHands {
    fn free(&mut self) -> Result<()> {
        anyhow::bail!("there is no copy")
    }

    fn release(&mut self) {}

    fn kill(&mut self) {}

    fn running(&self) -> Option<wire::Running> {
        None
    }
}

/// A copy that a page server before this one has left.
struct Left<'a>(&'a Facts);

impl Left<'_> {
    fn signal(&self, signal: i32) {
        if self.0.process.is_there()
            && let Err(errno) = godwit_kernel::process::kill(self.0.process.pid, signal)
        {
            tracing::warn!(pid = self.0.process.pid, signal, %errno, "a copy that was left cannot be signalled");
        }
    }
}

impl Hands for Left<'_> {
    fn free(&mut self) -> Result<()> {
        Ok(())
    }

    fn release(&mut self) {
        if self.0.released {
            return;
        }
        // N.B. before it runs: the program must not come upon them.
        if let Err(error) = godwit_resources::descriptors::wake_connections(self.0.process.pid) {
            tracing::warn!(pid = self.0.process.pid, %error, "connections of a copy that was left may be dead");
        }
        self.signal(libc::SIGCONT);
    }

    fn kill(&mut self) {
        self.signal(libc::SIGKILL);
    }

    fn running(&self) -> Option<wire::Running> {
        None
    }
}

/// What is written down.
#[derive(Debug, Default)]
enum Book {
    /// Nothing, and nothing will be.
    #[default]
    None,
    Room(Reserved),
    Entry(Entry<DestinationRecord, Facts>),
}

#[derive(Debug)]
struct Inner {
    side: Destination,
    book: Book,
    /// Whether the copy runs before all its pages are here.
    needs_pages: bool,
    /// Found written down by a page server that is gone.
    left: bool,
    /// Whether this page server has its pages brought.
    is_served: bool,
    /// Whether it was said that none is missing any more.
    needs_none: bool,
    pid: i32,
    /// The copy has ended before all its pages came.
    ended: bool,
    reason: String,
    links: u64,
    patience: Duration,
    /// The link on which the source speaks now.
    replies: Option<mpsc::Sender<Reply>>,
    /// Whether the source has left answers unread until there was no room for more.
    unheard: bool,
    /// Where the workshop takes frames from, while there is one.
    queue: Option<mpsc::Sender<Work>>,
}

/// One migration's hand-over.
#[derive(Debug)]
pub(crate) struct Standing {
    pub(crate) id: MigrationId,
    /// Whose it is.
    pub(crate) party: Party,
    inner: Mutex<Inner>,
}

impl Standing {
    fn with(id: MigrationId, party: Party, side: Destination) -> Self {
        let inner = Inner {
            side,
            book: Book::None,
            needs_pages: false,
            left: false,
            is_served: false,
            needs_none: false,
            pid: 0,
            reason: String::new(),
            ended: false,
            links: 0,
            patience: Duration::ZERO,
            replies: None,
            unheard: false,
            queue: None,
        };
        Self { id, party, inner: Mutex::new(inner) }
    }

    /// Of a copy that is to be built.
    pub(crate) fn new(id: MigrationId, party: Party) -> Self {
        Self::with(id, party, Destination::Building)
    }

    /// Of a migration that nothing is known of, or nothing that this party may know.
    pub(crate) fn unknown(id: MigrationId, party: Party) -> Self {
        Self::with(id, party, Destination::Forgotten)
    }

    /// Of what a page server before this one has written down.
    pub(crate) fn left(id: MigrationId, entry: Entry<DestinationRecord, Facts>) -> Self {
        let found = if entry.facts().process.is_there() { Found::There } else { Found::Gone };
        let lacked_pages = entry.state() == DestinationRecord::Runs { complete: false };
        let (side, steps) = Destination::restarted(Some(entry.state()), found);
        let facts = entry.facts().clone();
        let standing = Self::with(id, facts.party, side);
        {
            let mut inner = standing.lock();
            inner.pid = facts.process.pid;
            inner.left = true;
            inner.needs_pages = matches!(side, Destination::Runs { complete: false });
            inner.reason = "the page server that had the copy has ended".to_owned();
            inner.book = Book::Entry(entry);
            inner.ended = facts.ended;
            if found == Found::Gone && lacked_pages {
                inner.note_ended();
            }
            inner.perform(steps, &mut Left(&facts));
            inner.note_released();
        }
        tracing::info!(migration = %id, pid = facts.process.pid, ?side, "found what a page server before this one has left");
        standing
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers go to this link from now on; gives its number.
    pub(crate) fn attach(&self, replies: mpsc::Sender<Reply>) -> u64 {
        let mut inner = self.lock();
        inner.replies = Some(replies);
        inner.unheard = false;
        inner.links += 1;
        inner.links
    }

    /// Nothing more is said to the source.
    pub(crate) fn detach(&self) {
        self.lock().replies = None;
    }

    /// Whether the source does not read what it is told: nothing more is said to it then.
    pub(crate) fn is_unheard(&self) -> bool {
        self.lock().unheard
    }

    /// How many links there have been.
    pub(crate) fn links(&self) -> u64 {
        self.lock().links
    }

    /// Why the copy will never run.
    pub(crate) fn reason(&self) -> String {
        self.lock().reason.clone()
    }

    /// The workshop takes frames from here, and waits for the decision for as long as `patience` when no link stands.
    pub(crate) fn attach_queue(&self, queue: mpsc::Sender<Work>, patience: Duration) {
        let mut inner = self.lock();
        (inner.queue, inner.patience) = (Some(queue), patience);
    }

    /// How long a complete copy waits for the decision when no link stands.
    pub(crate) fn patience(&self) -> Duration {
        self.lock().patience
    }

    /// There is no workshop any more.
    pub(crate) fn detach_queue(&self) {
        self.lock().queue = None;
    }

    /// Where to put frames for the workshop, while there is one.
    pub(crate) fn queue(&self) -> Option<mpsc::Sender<Work>> {
        self.lock().queue.clone()
    }

    /// Says something to the source, on the link on which it speaks now.
    pub(crate) fn reply(&self, reply: Reply) {
        self.lock().reply(reply);
    }

    /// Makes room for what will be written down.
    ///
    /// # Errors
    /// When there is none: nothing can be promised then.
    pub(crate) fn reserve(&self, journal: &Journal) -> Result<()> {
        self.lock().book = Book::Room(journal.reserve(&self.id.to_string()).context("no room for the journal")?);
        Ok(())
    }

    /// The copy is complete: from here on the source may decide.
    ///
    /// # Errors
    /// When that cannot be written down.
    pub(crate) fn built(&self, facts: Facts, needs_pages: bool, ready: &wire::Ready) -> Result<()> {
        let mut inner = self.lock();
        inner.needs_pages = needs_pages;
        inner.pid = facts.process.pid;
        let facts = Facts { needs_none: inner.needs_none, ..facts };
        for step in inner.side.on(DestinationEvent::Built, needs_pages) {
            match (step, std::mem::take(&mut inner.book)) {
                (DestinationStep::Record(state), Book::Room(room)) => {
                    inner.book =
                        Book::Entry(room.publish(*state, facts.clone()).context("writing down that it is ready")?);
                }
                (DestinationStep::Send(_), book) => {
                    inner.book = book;
                    pause::at("ready");
                    inner.reply(Reply::of(ready));
                }
                (_, book) => inner.book = book,
            }
        }
        Ok(())
    }

    /// Takes in what happened to a copy that is at hand.
    pub(crate) fn on(&self, event: DestinationEvent, hands: &mut dyn Hands) -> Destination {
        let mut inner = self.lock();
        let needs_pages = inner.needs_pages;
        let steps = inner.side.on(event, needs_pages);
        inner.perform(steps, hands);
        inner.side
    }

    /// Nobody works on a copy any more. One that was not let go is gone with its workshop.
    pub(crate) fn end(&self) {
        let mut inner = self.lock();
        inner.queue = None;
        if matches!(inner.side, Destination::Building | Destination::Ready) {
            let needs_pages = inner.needs_pages;
            let steps = inner.side.on(DestinationEvent::SourceAway, needs_pages);
            inner.perform(steps, &mut NoHands);
        }
        if inner.side == Destination::Forgotten {
            inner.forget();
        }
    }

    /// Nobody will ask any more: what is written down is removed.
    pub(crate) fn forget(&self) {
        self.lock().forget();
    }

    /// Takes in what happened when there is no copy to be touched.
    pub(crate) fn note(&self, event: DestinationEvent) -> Destination {
        self.on(event, &mut NoHands)
    }

    /// Takes in a word of the source that needs no workshop. `false` when there is one that it is for.
    pub(crate) fn hear(&self, word: ToDestination) -> bool {
        if word == ToDestination::Query {
            self.look_for_pages(Whose::Sources);
        }
        let mut inner = self.lock();
        let is_at_hand = inner.queue.is_some() && matches!(inner.side, Destination::Building | Destination::Ready);
        if is_at_hand && word != ToDestination::Query {
            return false;
        }
        let needs_pages = inner.needs_pages;
        let steps = inner.side.on(DestinationEvent::Heard(word), needs_pages);
        inner.perform(steps, &mut NoHands);
        true
    }

    /// Whoever served a copy's pages may be another program by now, or gone: its memory says whether any are awaited.
    ///
    /// N.B. that nobody has written of the end of its drain is no proof that there was none: another page server, with another state directory,
    /// may have seen to it. A source that still asks was not told of any, and has the process as it was.
    pub(crate) fn look_for_pages(&self, asked: Whose) {
        let process = match &*self.lock() {
            Inner { left: true, side: Destination::Runs { complete: false }, book: Book::Entry(entry), .. } => {
                entry.facts().process.clone()
            }
            _ => return,
        };
        // N.B. this word ends what the source keeps. In doubt it is not said, and not while a child that it has forked lacks some.
        if lacks_pages(self.id).unwrap_or(true) {
            return;
        }
        if !process.is_there() {
            self.end_there();
        } else if awaits_pages(process.pid) == Some(false) {
            if self.lock().has_lost_pages() {
                if asked == Whose::Sources {
                    self.end_damaged(&process);
                }
                return;
            }
            tracing::info!(migration = %self.id, pid = process.pid, "all pages are here");
            self.note(DestinationEvent::Complete);
        }
    }

    /// Ends a copy for which nobody has held its missing pages: the kernel gives it zeros in their place.
    fn end_damaged(&self, process: &ProcessName) {
        tracing::error!(
            migration = %self.id, pid = process.pid,
            "all who held the missing pages of a copy were killed, and it may have read zeros in their place: it is ended; its source \
             has what it was at the hand-over"
        );
        let _ = godwit_kernel::process::kill(process.pid, libc::SIGKILL);
        self.end_there();
    }

    /// This page server sees to its pages: by itself, or by a daemon.
    pub(crate) fn take_over(&self, by_daemon: bool) {
        let mut inner = self.lock();
        inner.is_served = true;
        if by_daemon {
            inner.amend("is served by a daemon", |facts| facts.has_daemon = true);
        }
    }

    /// All its pages are here, or its memory is no more. It may not run yet.
    pub(crate) fn drained(&self, departed: bool) {
        let mut inner = self.lock();
        inner.needs_none = true;
        if departed || inner.side == Destination::Ready {
            inner.amend("needs no pages", |facts| facts.needs_none = true);
        }
        drop(inner);
        if !departed {
            self.note(DestinationEvent::Complete);
        }
    }

    /// The copy has ended before all its pages came: it needs none any more.
    pub(crate) fn end_there(&self) {
        self.lock().note_ended();
        self.note(DestinationEvent::Complete);
    }

    /// Why the copy will never run, for the source.
    pub(crate) fn because(&self, reason: &str) {
        reason.clone_into(&mut self.lock().reason);
    }

    /// How it stands.
    pub(crate) fn side(&self) -> Destination {
        self.lock().side
    }

    /// Writes down that the copy was let go.
    pub(crate) fn note_released(&self) {
        self.lock().note_released();
    }
}

impl Inner {
    /// Whether nobody is left who would know of the end of its drain, where nobody awaits its pages.
    fn has_lost_pages(&self) -> bool {
        let Book::Entry(entry) = &self.book else { return false };
        !self.is_served && !entry.facts().has_daemon && !entry.facts().needs_none
    }

    fn perform(&mut self, steps: &'static [DestinationStep], hands: &mut dyn Hands) {
        let mut todo = steps.iter();
        while let Some(step) = todo.next() {
            let done = match *step {
                DestinationStep::Record(state) => self.record(state),
                DestinationStep::Send(word) => {
                    self.say(word, hands);
                    Ok(())
                }
                DestinationStep::Free => hands.free(),
                DestinationStep::Release => {
                    hands.release();
                    Ok(())
                }
                DestinationStep::Kill => {
                    hands.kill();
                    Ok(())
                }
                DestinationStep::Forget => {
                    self.forget();
                    Ok(())
                }
            };
            let Err(error) = done else { continue };
            let is_to_run = todo.as_slice().contains(&DestinationStep::Release);
            if is_to_run {
                // N.B. it has not run yet, and never will.
                self.reason = godwit_carry::with_causes(error.as_ref());
                todo = self.side.on(DestinationEvent::LaunchFailed, self.needs_pages).iter();
            } else {
                tracing::error!(%error, side = ?self.side, "the hand-over cannot be written down");
            }
        }
    }

    fn record(&mut self, state: DestinationRecord) -> Result<()> {
        if let Book::Entry(entry) = &mut self.book {
            entry.record(state)?;
        }
        Ok(())
    }

    fn note_released(&mut self) {
        if matches!(self.side, Destination::Runs { .. }) {
            self.amend("was let go", |facts| facts.released = true);
        }
    }

    /// N.B. before it is written down that it needs no pages: what is left at the source is all that is left of it.
    fn note_ended(&mut self) {
        self.ended = true;
        self.amend("has ended before all its pages came", |facts| facts.ended = true);
    }

    /// Writes down something that has happened to the copy.
    fn amend(&mut self, what: &str, change: impl FnOnce(&mut Facts)) {
        let Book::Entry(entry) = &mut self.book else { return };
        let mut facts = entry.facts().clone();
        change(&mut facts);
        if let Err(error) = entry.amend(facts) {
            tracing::warn!(%error, "it is not written down that the copy {what}");
        }
    }

    fn forget(&mut self) {
        if let Book::Entry(entry) = std::mem::take(&mut self.book)
            && let Err(error) = entry.remove()
        {
            tracing::warn!(%error, "a migration that is over stays in the journal");
        }
    }

    fn reply(&mut self, reply: Reply) {
        // A source that is gone is noticed by the reading side; one that is there and does not read is not waited for.
        if let Some(Err(TrySendError::Full(_))) = self.replies.as_ref().map(|replies| replies.try_send(reply)) {
            self.unheard = true;
            self.replies = None;
        }
    }

    fn say(&mut self, word: ToSource, hands: &dyn Hands) {
        if let (ToSource::Verdict(Verdict::Runs { complete }), Some(running)) = (word, hands.running()) {
            return self.reply(Reply::of(&wire::Running { pid: self.pid.unsigned_abs(), complete, ..running }));
        }
        let ToSource::Verdict(verdict) = word else { return };
        self.reply(Reply::of(&self.verdict(verdict)));
    }

    fn verdict(&self, verdict: Verdict) -> wire::Verdict {
        use wire::verdict::Standing;
        let standing = match verdict {
            Verdict::Unknown => Standing::Unknown,
            Verdict::Waiting => Standing::Waiting,
            Verdict::Runs { complete: false } => Standing::Runs,
            Verdict::Runs { complete: true } => Standing::Complete,
            Verdict::Aborted => Standing::Aborted,
        };
        let reason = if verdict == decision::Verdict::Aborted { self.reason.clone() } else { String::new() };
        wire::Verdict {
            standing: standing.into(),
            pid: self.pid.unsigned_abs(),
            reason,
            ended: self.ended,
            boot_id: ProcessName::of(std::process::id() as i32).map(|own| own.boot_id).unwrap_or_default(),
        }
    }
}
