//! What is still missing, written down where the death of a daemon does not reach it.
//!
//! One ledger belongs to one userfaultfd. It is a memfd that both holders have open: a bitmap with one bit for each page that
//! was missing at first, the segments of [`Pending`] in two banks of which one is valid, and an inbox into which the kernel
//! itself writes events ([`godwit_kernel::inbox`]). At any instant a successor can take it up:
//! - a page is struck off only after it was filled; filling it twice does nothing;
//! - removals clear bits, and clearing twice does nothing;
//! - a remap writes the idle bank and then switches, and the bank says up to which event it is true, so that the event is
//!   not followed twice when its place in the inbox had not been cleared yet.
//!
//! One writer at a time; words are atomic because the predecessor may have died at any point.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use godwit_carry::Party;
use godwit_kernel::inbox::{self, MESSAGE_WORDS, Message};
use godwit_kernel::shared::SharedWords;
use godwit_pages::{PAGE_SIZE, PageRange, PageSet};

use crate::error::{Error, MigrationId, Result};
use crate::pending::{Pending, Segment};

/// "godwitld"
const MAGIC: u64 = 0x676f_6477_6974_6c64;
const VERSION: u64 = 1;
const HEADER_WORDS: u64 = 512;
/// Events that one read can bring.
const INBOX_PLACES: u64 = 32;
/// Segments in one bank.
const BANK_SEGMENTS: u64 = 16 << 10;
const BANK_WORDS: u64 = 2 + 3 * BANK_SEGMENTS;
/// Pages that a ledger can list: 64 TiB of them.
const MOST_PAGES: u64 = 1 << 34;

/// Places in the header.
mod at {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 1;
    pub(super) const ID: usize = 2;
    pub(super) const PID: usize = 4;
    pub(super) const RUNS: usize = 5;
    pub(super) const ACTIVE_BANK: usize = 6;
    pub(super) const FIRST_EVENT: usize = 7;
    pub(super) const LINEAGE: usize = 8;
    pub(super) const OVERFLOWED: usize = 9;
    pub(super) const FILLED: usize = 10;
    pub(super) const OWNER: usize = 11;
    pub(super) const PARTY: usize = 12;
    /// Behind the words of the party.
    pub(super) const KEEPER: usize = 32;
}

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lineage {
    /// The process that was moved.
    Moved,
    /// A child that it forked before its pages were there.
    Forked,
}

/// What a ledger is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The migration.
    pub id: MigrationId,
    /// The moved process, as the page server sees it; also for its children.
    pub pid: i32,
    /// Which of them.
    pub lineage: Lineage,
    /// Who has sent it, and alone may send its pages.
    pub party: Party,
}

/// A run of pages that was missing at first.
#[derive(Clone, Copy, Debug)]
struct Run {
    range: PageRange,
    first_bit: u64,
}

/// The ledger of one userfaultfd.
#[derive(Debug)]
pub struct Ledger {
    memory: SharedWords,
    subject: Subject,
    runs: Vec<Run>,
    /// Number of the next event.
    next_event: u64,
}

/// Where the parts lie, in words.
#[derive(Clone, Copy, Debug)]
struct Layout {
    runs: u64,
    bits: u64,
}

impl Layout {
    const INBOX: u64 = HEADER_WORDS;
    const BANKS: [u64; 2] = [
        HEADER_WORDS + INBOX_PLACES * MESSAGE_WORDS as u64,
        HEADER_WORDS + INBOX_PLACES * MESSAGE_WORDS as u64 + BANK_WORDS,
    ];
    const RUNS: u64 = HEADER_WORDS + INBOX_PLACES * MESSAGE_WORDS as u64 + 2 * BANK_WORDS;

    fn bits_start(self) -> u64 {
        Self::RUNS + 2 * self.runs
    }

    fn words(self) -> u64 {
        self.bits_start() + self.bits.div_ceil(64)
    }
}

impl Ledger {
    /// Writes a new ledger of what `pending` says.
    ///
    /// # Errors
    /// When there is no memory for it, or there are more pages or segments than it can list.
    pub fn create(subject: Subject, pending: &Pending) -> Result<Self> {
        let missing = pending.missing();
        let layout = Layout { runs: missing.range_count() as u64, bits: missing.pages() };
        let too_much = layout.bits > MOST_PAGES || pending.segment_count() as u64 > BANK_SEGMENTS;
        if too_much {
            return Err(Error::Ledger { operation: "enlarging", source: godwit_kernel::Errno::EFBIG });
        }
        let memory = SharedWords::create(c"godwit-ledger", layout.words())
            .map_err(|source| Error::Ledger { operation: "creating", source })?;
        let mut ledger = Self { memory, subject, runs: Vec::with_capacity(missing.range_count()), next_event: 1 };
        let mut bit = 0;
        for (index, range) in missing.iter().enumerate() {
            ledger.runs.push(Run { range, first_bit: bit });
            ledger.store(Layout::RUNS as usize + 2 * index, range.start());
            ledger.store(Layout::RUNS as usize + 2 * index + 1, range.pages());
            bit += range.pages();
        }
        let bits = layout.bits_start() as usize;
        for (index, word) in (bits..).zip(0..layout.bits.div_ceil(64)) {
            let used = (layout.bits - word * 64).min(64);
            ledger.store(index, u64::MAX >> (64 - used));
        }
        ledger.write_bank(0, pending, 0);
        let (low, high) = halves(subject.id);
        ledger.store(at::ID, low);
        ledger.store(at::ID + 1, high);
        ledger.store(at::PID, u64::from(subject.pid.cast_unsigned()));
        ledger.store(at::RUNS, layout.runs);
        ledger.store(at::LINEAGE, u64::from(subject.lineage == Lineage::Forked));
        for (index, word) in (at::PARTY..).zip(subject.party.to_words()) {
            ledger.store(index, word);
        }
        ledger.store(at::FIRST_EVENT, 1);
        ledger.store(at::VERSION, VERSION);
        // N.B. last: before it the ledger counts for nothing.
        ledger.store(at::MAGIC, MAGIC);
        Ok(ledger)
    }

    /// Takes up a ledger that a predecessor left, and what it says.
    ///
    /// # Errors
    /// When it is none, is damaged, or ran out of room: then the pages behind it must stay unserved.
    pub fn open(fd: OwnedFd) -> Result<(Self, Pending)> {
        let memory = SharedWords::open(fd).map_err(|source| Error::Ledger { operation: "mapping", source })?;
        let damaged = |what| Error::DamagedLedger { what };
        let words = memory.words();
        if (words.len() as u64) < Layout::RUNS {
            return Err(damaged("it is too short"));
        }
        let word = |index: usize| words[index].load(Ordering::Acquire);
        if word(at::MAGIC) != MAGIC || word(at::VERSION) != VERSION {
            return Err(damaged("its beginning is not that of a ledger"));
        }
        if word(at::OVERFLOWED) != 0 {
            return Err(damaged("it ran out of room for moved ranges"));
        }
        let count = word(at::RUNS);
        if count > words.len() as u64 {
            return Err(damaged("it lists more ranges than it has room for"));
        }
        // N.B. not as many as it says: its file may be large and empty.
        let mut runs = Vec::new();
        let mut bit = 0u64;
        for index in 0..count as usize {
            let place = Layout::RUNS as usize + 2 * index;
            let listed = words.get(place..place + 2).ok_or_else(|| damaged("a range lies outside"))?;
            let range = PageRange::from_pages(listed[0].load(Ordering::Acquire), listed[1].load(Ordering::Acquire))
                .map_err(|_| damaged("a range is none"))?;
            if runs.last().is_some_and(|last: &Run| last.range.end() > range.start()) {
                return Err(damaged("its ranges are out of order"));
            }
            runs.push(Run { range, first_bit: bit });
            bit = bit.saturating_add(range.pages());
        }
        let layout = Layout { runs: count, bits: bit };
        if bit > MOST_PAGES || layout.words() != words.len() as u64 {
            return Err(damaged("its bitmap has another length"));
        }
        let party = Party::from_words(std::array::from_fn(|index| word(at::PARTY + index)));
        let subject = Subject {
            id: joined(word(at::ID), word(at::ID + 1)),
            pid: (word(at::PID) as u32).cast_signed(),
            lineage: if word(at::LINEAGE) == 0 { Lineage::Moved } else { Lineage::Forked },
            party: party.ok_or_else(|| damaged("it does not say who has sent the process"))?,
        };
        let mut ledger = Self { memory, subject, runs, next_event: 1 };
        let mut pending = Pending::with_segments(ledger.missing(), ledger.segments()?);
        ledger.replay(&mut pending);
        Ok((ledger, pending))
    }

    /// What it is about.
    #[must_use]
    pub fn subject(&self) -> Subject {
        self.subject
    }

    /// Notes that `range` (source addresses) is filled or not wanted any more.
    pub fn settle(&self, range: PageRange) {
        let first = self.runs.partition_point(|run| run.range.end() <= range.start());
        for run in &self.runs[first..] {
            let Some(part) = run.range.intersection(&range) else { break };
            let start = run.first_bit + (part.start() - run.range.start()) / PAGE_SIZE;
            self.clear_bits(start, part.pages());
        }
    }

    /// Notes where everything is after event `event`.
    ///
    /// Where segments are too many the ledger becomes invalid, which stalls the program rather than misleads a successor.
    pub fn relocate(&self, pending: &Pending, event: u64) {
        if pending.segment_count() as u64 > BANK_SEGMENTS {
            self.store(at::OVERFLOWED, 1);
            return;
        }
        let idle = 1 - (self.load(at::ACTIVE_BANK) & 1);
        self.write_bank(idle as usize, pending, event);
        self.store(at::ACTIVE_BANK, idle);
    }

    /// The inbox, all places empty, ready for the kernel to write to. Returns the number of the first event that will come.
    pub fn expect_events(&mut self) -> (u64, &[AtomicU64]) {
        self.store(at::FIRST_EVENT, self.next_event);
        (self.next_event, self.inbox())
    }

    /// Notes that `count` events came.
    pub fn events_came(&mut self, count: usize) {
        self.next_event = self.next_event.wrapping_add(count as u64);
    }

    /// The places of the inbox.
    #[must_use]
    pub fn inbox(&self) -> &[AtomicU64] {
        let start = Layout::INBOX as usize;
        &self.memory.words()[start..start + INBOX_PLACES as usize * MESSAGE_WORDS]
    }

    /// One place of the inbox.
    #[must_use]
    pub fn place(&self, index: usize) -> &[AtomicU64] {
        self.inbox().get(index * MESSAGE_WORDS..(index + 1) * MESSAGE_WORDS).unwrap_or(&[])
    }

    /// Notes which process serves the pages now, by an opaque number.
    pub fn own(&self, owner: u64) {
        self.store(at::OWNER, owner);
    }

    /// Makes `successor` the owner of the ledger behind `fd`, unless the present owner lives, or who keeps it beside a daemon. Of several
    /// who try, one succeeds; returns whether it was this one.
    ///
    /// # Errors
    /// When it is no ledger.
    pub fn claim(fd: OwnedFd, successor: u64, lives: impl Fn(u64) -> bool) -> Result<bool> {
        Self::claim_as(at::OWNER, fd, successor, |owner, keeper| lives(owner) || lives(keeper))
    }

    /// Makes `successor` the one who keeps the ledger behind `fd` beside a daemon, unless the present one lives, or there was none and
    /// the owner does.
    ///
    /// # Errors
    /// When it is no ledger.
    pub fn claim_keeping(fd: OwnedFd, successor: u64, lives: impl Fn(u64) -> bool) -> Result<bool> {
        Self::claim_as(at::KEEPER, fd, successor, |owner, keeper| lives(if keeper == 0 { owner } else { keeper }))
    }

    fn claim_as(part: usize, fd: OwnedFd, successor: u64, is_taken: impl Fn(u64, u64) -> bool) -> Result<bool> {
        let memory = SharedWords::open(fd).map_err(|source| Error::Ledger { operation: "mapping", source })?;
        let words = memory.words();
        if words.get(at::MAGIC).map(|word| word.load(Ordering::Acquire)) != Some(MAGIC) || words.len() <= at::KEEPER {
            return Err(Error::DamagedLedger { what: "its beginning is not that of a ledger" });
        }
        let [owner, keeper] = [at::OWNER, at::KEEPER].map(|word| words[word].load(Ordering::Acquire));
        if is_taken(owner, keeper) {
            return Ok(false);
        }
        let present = if part == at::OWNER { owner } else { keeper };
        Ok(words[part].compare_exchange(present, successor, Ordering::AcqRel, Ordering::Acquire).is_ok())
    }

    /// Notes which page server keeps the program's userfaultfd beside a daemon, by the same kind of number.
    pub fn keep(&self, keeper: u64) {
        self.store(at::KEEPER, keeper);
    }

    /// Counts pages that were filled, for reports that outlive a daemon.
    pub fn count_filled(&self, pages: u64) {
        self.store(at::FILLED, self.load(at::FILLED).wrapping_add(pages));
    }

    /// Pages filled so far, by this daemon and its predecessors.
    #[must_use]
    pub fn filled(&self) -> u64 {
        self.load(at::FILLED)
    }

    /// Pages that are missing still.
    #[must_use]
    pub fn missing_pages(&self) -> u64 {
        let bits = self.memory.words().get(self.bits_start()..).unwrap_or(&[]);
        bits.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// Follows what the predecessor had read but perhaps not noted.
    fn replay(&mut self, pending: &mut Pending) {
        let first = self.load(at::FIRST_EVENT);
        let known = self.load(Layout::BANKS[self.active()] as usize + 1);
        for index in 0..INBOX_PLACES as usize {
            let event = first.wrapping_add(index as u64);
            match inbox::decode(self.place(index)) {
                Some(Message::Remap { from, to, length }) if event > known => {
                    follow_remap(self, pending, (from, to, length), event);
                }
                Some(Message::Remove { start, end }) => follow_drop(self, pending, start, end),
                Some(Message::Unmap { start, end }) => follow_unmap(self, pending, start, end),
                Some(Message::Fork) => {
                    tracing::error!(
                        migration = %self.subject.id,
                        pid = self.subject.pid,
                        "the fault service died in the instant of a fork; the child lacks pages"
                    );
                }
                _ => {}
            }
            inbox::clear(self.place(index));
        }
        self.next_event = first.wrapping_add(INBOX_PLACES);
    }

    /// The pages whose bits are set.
    fn missing(&self) -> PageSet {
        let mut missing = PageSet::new();
        for run in &self.runs {
            let mut bit = 0;
            while bit < run.range.pages() {
                let (set, length) = self.same_bits(run.first_bit + bit, run.range.pages() - bit);
                if set && let Ok(range) = PageRange::from_pages(run.range.start() + bit * PAGE_SIZE, length) {
                    missing.insert(range);
                }
                bit += length;
            }
        }
        missing
    }

    /// Tells whether bit `start` is set, and how many (at most `most`, at least 1) of those from it on are like it.
    fn same_bits(&self, start: u64, most: u64) -> (bool, u64) {
        let set = self.bit_word(start) >> (start % 64) & 1 == 1;
        let mut length = 0;
        while length < most {
            let position = start + length;
            let word = self.bit_word(position) >> (position % 64);
            let alike = if set { word.trailing_ones() } else { word.trailing_zeros() };
            let in_word = 64 - position % 64;
            let run = u64::from(alike).min(in_word);
            length += run;
            if run < in_word {
                break;
            }
        }
        (set, length.clamp(1, most))
    }

    fn segments(&self) -> Result<Vec<Segment>> {
        let bank = Layout::BANKS[self.active()] as usize;
        let count = self.load(bank);
        if count > BANK_SEGMENTS {
            return Err(Error::DamagedLedger { what: "a bank of segments is longer than it can be" });
        }
        (0..count as usize)
            .map(|index| {
                let place = bank + 2 + 3 * index;
                let here = PageRange::from_pages(self.load(place), self.load(place + 1))
                    .map_err(|_| Error::DamagedLedger { what: "a segment is no range" })?;
                Ok(Segment { here, source: self.load(place + 2) })
            })
            .collect()
    }

    fn active(&self) -> usize {
        (self.load(at::ACTIVE_BANK) & 1) as usize
    }

    fn write_bank(&self, bank: usize, pending: &Pending, event: u64) {
        let bank = Layout::BANKS[bank] as usize;
        let mut count = 0;
        for (index, segment) in pending.segments().enumerate() {
            let place = bank + 2 + 3 * index;
            self.store(place, segment.here.start());
            self.store(place + 1, segment.here.pages());
            self.store(place + 2, segment.source);
            count += 1;
        }
        self.store(bank, count);
        self.store(bank + 1, event);
    }

    fn clear_bits(&self, start: u64, count: u64) {
        let words = self.memory.words();
        let base = self.bits_start();
        let mut bit = start;
        while bit < start + count {
            let length = (64 - bit % 64).min(start + count - bit);
            let mask = (u64::MAX >> (64 - length)) << (bit % 64);
            words[base + (bit / 64) as usize].fetch_and(!mask, Ordering::Release);
            bit += length;
        }
    }

    fn bit_word(&self, bit: u64) -> u64 {
        self.load(self.bits_start() + (bit / 64) as usize)
    }

    fn bits_start(&self) -> usize {
        Layout::RUNS as usize + 2 * self.runs.len()
    }

    fn load(&self, index: usize) -> u64 {
        self.memory.words()[index].load(Ordering::Acquire)
    }

    fn store(&self, index: usize, value: u64) {
        self.memory.words()[index].store(value, Ordering::Release);
    }
}

impl AsFd for Ledger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

/// Follows a removal of the bytes `start..end` (addresses here).
pub(crate) fn follow_drop(ledger: &Ledger, pending: &mut Pending, start: u64, end: u64) {
    let Some(range) = PageRange::enclosing(start, end) else { return };
    pending.drop_here(range).iter().for_each(|dropped| ledger.settle(dropped));
}

/// Follows an unmapping of the bytes `start..end` (addresses here).
pub(crate) fn follow_unmap(ledger: &Ledger, pending: &mut Pending, start: u64, end: u64) {
    let Some(range) = PageRange::enclosing(start, end) else { return };
    pending.unmap_here(range).iter().for_each(|dropped| ledger.settle(dropped));
}

/// Follows an mremap(2) of `length` bytes from `from` to `to`, which was event number `event`.
pub(crate) fn follow_remap(ledger: &Ledger, pending: &mut Pending, (from, to, length): (u64, u64, u64), event: u64) {
    let Some(range) = from.checked_add(length).and_then(|end| PageRange::enclosing(from, end)) else { return };
    for lost in pending.remap(range, to).iter() {
        ledger.settle(lost);
    }
    if pending.segment_count() as u64 > BANK_SEGMENTS / 2 {
        pending.prune();
    }
    ledger.relocate(pending, event);
}

fn halves(id: MigrationId) -> (u64, u64) {
    let number = u128::from_le_bytes(id.0);
    (number as u64, (number >> 64) as u64)
}

fn joined(low: u64, high: u64) -> MigrationId {
    MigrationId((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
}
