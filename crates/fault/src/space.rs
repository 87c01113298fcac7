//! One address space that lacks pages: its userfaultfd, what is missing, who waits.
//!
//! All requests to the userfaultfd are made here, each together with its entry in the ledger. The kernel helps: from the
//! instant in which the address space begins to change until the event about it has been read, it refuses to fill anything
//! (`Retry`). So as long as reading events and filling exclude each other, an address is never filled by old rules.
//!
//! Rests on ioctl_userfaultfd(2).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use godwit_kernel::Errno;
use godwit_kernel::inbox::{self, MESSAGE_WORDS, Message};
use godwit_kernel::uffd::{CopyOutcome, Userfaultfd, Wake};
use godwit_pages::{PAGE_SIZE, PageRange};

use crate::error::{Error, Result};
use crate::latency::Latency;
use crate::ledger::{Ledger, follow_drop, follow_remap, follow_unmap};
use crate::pending::{ADDRESS_SPACE_END, Pending};

/// What reading events brought.
#[derive(Debug, Default)]
pub(crate) struct News {
    /// Addresses (here) of pages that threads wait for.
    pub(crate) faults: Vec<u64>,
    /// What children that were forked begin with.
    pub(crate) children: Vec<(Userfaultfd, Pending)>,
}

/// Whether something could be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// It is done, or needs not be any more.
    Done,
    /// The address space is changing: events are to be read first.
    Later,
}

/// An address space.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) uffd: Arc<Userfaultfd>,
    pub(crate) pending: Pending,
    pub(crate) ledger: Ledger,
    /// Pages (here) that threads wait for, and since when.
    pub(crate) waiting: BTreeMap<u64, Instant>,
    /// Holes that could not be filled yet.
    pub(crate) retry: Vec<u64>,
    /// Its process has ended or executed something else.
    pub(crate) departed: bool,
}

impl Space {
    pub(crate) fn new(uffd: Userfaultfd, pending: Pending, ledger: Ledger) -> Self {
        let uffd = Arc::new(uffd);
        Self { uffd, pending, ledger, waiting: BTreeMap::new(), retry: Vec::new(), departed: false }
    }

    /// Wakes everybody who waits: who still lacks a page will fault anew. A predecessor may have read faults that it did not
    /// answer, and they are not reported again.
    pub(crate) fn wake_all(&self) {
        /// First address that vm.mmap_min_addr may leave, and the end of user addresses with four levels of page tables.
        const FOUR_LEVELS: (u64, u64) = (1 << 16, (1 << 47) - PAGE_SIZE);
        for (start, end) in [FOUR_LEVELS, (1 << 16, ADDRESS_SPACE_END - PAGE_SIZE)] {
            // The longer range is refused where there are only four levels.
            let _ = self.uffd.wake(start, end - start);
        }
    }

    /// Reads all events there are and follows them.
    pub(crate) fn read_events(&mut self) -> Result<News> {
        let mut news = News::default();
        loop {
            let (first, inbox) = self.ledger.expect_events();
            let places = inbox.len() / MESSAGE_WORDS;
            let (count, children) = match inbox::read(&self.uffd, inbox) {
                Ok(read) => read,
                Err(Errno::EAGAIN) => break,
                Err(source) => return Err(self.failed("reading events", 0, source)),
            };
            self.ledger.events_came(count);
            let mut children = children.into_iter();
            for index in 0..count {
                self.follow(index, first.wrapping_add(index as u64), &mut children, &mut news);
            }
            if count < places {
                break;
            }
        }
        Ok(news)
    }

    fn follow(&mut self, index: usize, event: u64, children: &mut impl Iterator<Item = Userfaultfd>, news: &mut News) {
        match inbox::decode(self.ledger.place(index)) {
            Some(Message::Fault { address }) => news.faults.push(address),
            Some(Message::Fork) => {
                if let Some(child) = children.next() {
                    news.children.push((child, self.pending.of_child()));
                }
            }
            Some(Message::Remap { from, to, length }) => {
                follow_remap(&self.ledger, &mut self.pending, (from, to, length), event);
                self.wake_waiting(from, from.saturating_add(length));
            }
            Some(Message::Remove { start, end }) => {
                follow_drop(&self.ledger, &mut self.pending, start, end);
                self.wake_waiting(start, end);
            }
            Some(Message::Unmap { start, end }) => {
                follow_unmap(&self.ledger, &mut self.pending, start, end);
                self.wake_waiting(start, end);
            }
            Some(Message::Unknown(kind)) => tracing::warn!(kind, "unknown userfaultfd event"),
            None => {}
        }
        inbox::clear(self.ledger.place(index));
    }

    /// Has those who wait in `start..end` fault anew: where they wait means something else now.
    fn wake_waiting(&mut self, start: u64, end: u64) {
        let Some(range) = PageRange::enclosing(start, end) else { return };
        let pages: Vec<u64> = self.waiting.range(range.start()..range.end()).map(|(&page, _)| page).collect();
        for page in pages {
            self.waiting.remove(&page);
            self.wake(page);
        }
    }

    fn wake(&self, page: u64) {
        if let Err(errno) = self.uffd.wake(page, PAGE_SIZE) {
            tracing::debug!(%errno, page = format_args!("{page:#x}"), "cannot wake");
        }
    }

    /// Fills a hole, a page that had no content at the source either.
    pub(crate) fn fill_hole(&mut self, page: u64) -> Result<Attempt> {
        match self.uffd.zeropage(page, PAGE_SIZE, Wake::Now) {
            Ok(CopyOutcome::Copied(_)) => {}
            Ok(CopyOutcome::AlreadyPresent | CopyOutcome::NotMapped) => self.wake(page),
            Ok(CopyOutcome::Retry(_)) => {
                self.retry.push(page);
                return Ok(Attempt::Later);
            }
            Ok(CopyOutcome::Gone) => self.depart(),
            Err(source) => return Err(self.failed("filling a hole", page, source)),
        }
        Ok(Attempt::Done)
    }

    /// Fills those pages of `range` (source addresses) that are missing with `content`, which is all of `range`, or with zeros
    /// where the source has zeros.
    pub(crate) fn place(&mut self, range: PageRange, content: Option<&[u8]>, latency: &mut Latency) -> Result<Attempt> {
        for segment in self.pending.wanted(range) {
            let offset = (segment.source - range.start()) as usize;
            let length = segment.here.len() as usize;
            let part = content.and_then(|content| content.get(offset..offset + length));
            if content.is_some() && part.is_none() {
                return Ok(Attempt::Done);
            }
            let attempt = self.fill(segment.here, segment.source, part, latency)?;
            if attempt == Attempt::Later || self.departed {
                return Ok(attempt);
            }
        }
        Ok(Attempt::Done)
    }

    fn fill(&mut self, here: PageRange, source: u64, content: Option<&[u8]>, latency: &mut Latency) -> Result<Attempt> {
        let mut done = 0;
        let mut most = here.len();
        while done < here.len() {
            let start = here.start() + done;
            let length = (here.len() - done).min(most);
            let outcome = match content {
                Some(content) => self.uffd.copy(start, &content[done as usize..(done + length) as usize], Wake::Now),
                None => self.uffd.zeropage(start, length, Wake::Now),
            };
            let outcome = outcome.map_err(|errno| self.failed("filling a page", start, errno))?;
            let filled = match outcome {
                CopyOutcome::Copied(bytes) => bytes,
                CopyOutcome::Retry(bytes) if bytes > 0 => bytes,
                // Zeros count for nothing when only some fitted: page by page it shows which.
                CopyOutcome::Retry(_) | CopyOutcome::NotMapped if length > PAGE_SIZE => {
                    most = (length / 2).next_multiple_of(PAGE_SIZE);
                    continue;
                }
                // N.B. not "unmapped, so not wanted": the kernel looks for the mapping before it looks whether mappings are changing,
                // so this is also what an mremap(2) gives whose event has yet to come. Whatever unmaps a page says so by an event.
                CopyOutcome::Retry(_) | CopyOutcome::NotMapped => return Ok(Attempt::Later),
                CopyOutcome::AlreadyPresent => {
                    self.wake(start);
                    self.settle(start, source + done, PAGE_SIZE, latency);
                    done += PAGE_SIZE;
                    continue;
                }
                CopyOutcome::Gone => {
                    self.depart();
                    return Ok(Attempt::Done);
                }
            };
            let filled = filled.min(length);
            self.settle(start, source + done, filled, latency);
            self.ledger.count_filled(filled / PAGE_SIZE);
            done += filled;
            most = here.len();
        }
        Ok(Attempt::Done)
    }

    /// Notes that `length` bytes at `here` are there, and who waited how long for them.
    fn settle(&mut self, here: u64, source: u64, length: u64, latency: &mut Latency) {
        if let Ok(range) = PageRange::new(source, source + length) {
            self.pending.settle(range);
            self.ledger.settle(range);
        }
        while let Some((&page, &since)) = self.waiting.range(here..here + length).next() {
            latency.record(since.elapsed());
            self.waiting.remove(&page);
        }
    }

    /// Gives everything up: nobody is there to use it.
    pub(crate) fn depart(&mut self) {
        self.departed = true;
        self.waiting.clear();
        self.retry.clear();
        let missing = self.pending.missing().clone();
        for range in missing.iter() {
            self.pending.settle(range);
            self.ledger.settle(range);
        }
    }

    /// Says whether nothing is missing and nobody waits for a hole.
    pub(crate) fn is_complete(&self) -> bool {
        self.departed || (self.pending.is_empty() && self.retry.is_empty())
    }

    fn failed(&self, operation: &'static str, address: u64, source: Errno) -> Error {
        Error::Fill { operation, pid: self.ledger.subject().pid, address, source }
    }
}
