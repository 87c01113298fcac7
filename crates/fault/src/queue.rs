//! What to ask the source for next.
//!
//! Two lanes. The *urgent* lane carries the page under a fault, and where faults follow one another, more and more of what
//! comes next. The *background* lane carries the rest, beginning beside the last fault, and yields: while a fault is open it
//! starts nothing, soon after one it keeps little on its way, and only when it is quiet does it fill the link. A page that is
//! on its way in the background is asked for again when somebody faults on it: waiting behind a window of pages costs
//! more than one page twice.
//!
//! Pure: time is an argument. All addresses are the source's.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use godwit_pages::{PAGE_SIZE, PageRange, PageSet};

/// One question to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Comes back with the pages.
    pub id: u64,
    /// Which pages.
    pub range: PageRange,
}

/// How much to have on its way.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Pages that are fetched behind a fault that continues a run of faults: at first, and at most.
    pub ahead: (u64, u64),
    /// Quiet time after which the background lane takes all it can.
    pub quiet: Duration,
    /// Background pages in one request, and in all open ones, soon after a fault.
    pub timid: (u64, u64),
    /// The same when quiet.
    pub bold: (u64, u64),
    /// Background requests open at most.
    pub open: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self { ahead: (4, 64), quiet: Duration::from_millis(10), timid: (32, 64), bold: (128, 1024), open: 256 }
    }
}

/// The open requests of both lanes and the place to go on.
#[derive(Debug)]
pub struct Queue {
    pace: Pace,
    next_id: u64,
    urgent: Lane,
    background: Lane,
    /// Where the background lane goes on.
    cursor: u64,
    /// The page after the last fault and what was fetched behind it, and how much to fetch when a fault hits it.
    run: Option<(u64, u64)>,
    last_fault: Option<Instant>,
}

#[derive(Debug, Default)]
struct Lane {
    open: BTreeMap<u64, PageRange>,
    pages: PageSet,
}

impl Lane {
    fn insert(&mut self, request: Request) {
        self.open.insert(request.id, request.range);
        self.pages.insert(request.range);
    }
}

impl Queue {
    /// Starts with nothing open.
    #[must_use]
    pub fn new(pace: Pace) -> Self {
        Self {
            pace,
            next_id: 1,
            urgent: Lane::default(),
            background: Lane::default(),
            cursor: 0,
            run: None,
            last_fault: None,
        }
    }

    /// Takes in a fault on the page at `source`, which is among `missing`; returns what to ask for at once, or nothing when
    /// that has been asked.
    pub fn fault(&mut self, now: Instant, source: u64, missing: &PageSet) -> Option<Request> {
        self.last_fault = Some(now);
        self.cursor = source;
        let page = PageRange::page_at(source)?;
        if self.urgent.pages.contains(source) {
            return None;
        }
        let follows = self.run.filter(|(end, _)| (*end..=end.saturating_add(PAGE_SIZE)).contains(&source));
        let ahead = follows.map_or(0, |(_, ahead)| ahead);
        let range = self.stretch(page, ahead, missing);
        self.run = Some((range.end(), (ahead * 2).clamp(self.pace.ahead.0, self.pace.ahead.1)));
        self.cursor = range.end();
        let request = self.request(range);
        self.urgent.insert(request);
        Some(request)
    }

    /// Extends `page` by at most `ahead` pages that are missing and not on their way.
    fn stretch(&self, page: PageRange, ahead: u64, missing: &PageSet) -> PageRange {
        let mut range = page;
        for _ in 0..ahead {
            let next = range.end();
            if !missing.contains(next) || self.urgent.pages.contains(next) || self.background.pages.contains(next) {
                break;
            }
            let Ok(longer) = PageRange::new(range.start(), next + PAGE_SIZE) else { break };
            range = longer;
        }
        range
    }

    /// Gives the next background request, when there is something to ask for and it is time. `waiting` says how many
    /// faults are open.
    pub fn background(&mut self, now: Instant, waiting: usize, missing: &PageSet) -> Option<Request> {
        if waiting > 0 || self.background.open.len() >= self.pace.open {
            return None;
        }
        let (each, all) = if self.is_quiet(now) { self.pace.bold } else { self.pace.timid };
        let room = all.saturating_sub(self.background.pages.pages());
        // Neither lots of crumbs while the window is nearly full, nor a stop while runs are short.
        if room < each.min(all / 4).max(1) {
            return None;
        }
        let range = self.next_gap(each.min(room), missing)?;
        self.cursor = range.end();
        let request = self.request(range);
        self.background.insert(request);
        Some(request)
    }

    /// Says whether no fault has come for a while.
    #[must_use]
    pub fn is_quiet(&self, now: Instant) -> bool {
        self.last_fault.is_none_or(|last| now.saturating_duration_since(last) >= self.pace.quiet)
    }

    /// When it will be quiet, if it is not.
    #[must_use]
    pub fn quiet_at(&self, now: Instant) -> Option<Instant> {
        self.last_fault.map(|last| last + self.pace.quiet).filter(|then| *then > now)
    }

    /// Finds the first pages from the cursor on that are missing and not on their way.
    fn next_gap(&self, most: u64, missing: &PageSet) -> Option<PageRange> {
        self.gap_from(self.cursor, most, missing).or_else(|| self.gap_from(0, most, missing))
    }

    fn gap_from(&self, mut from: u64, most: u64, missing: &PageSet) -> Option<PageRange> {
        loop {
            let run = missing.first_from(from)?;
            let mut piece = run.chunks(most).next()?;
            let mut blocked = None;
            for lane in [&self.urgent, &self.background] {
                match lane.pages.first_from(piece.start()) {
                    Some(busy) if busy.start() <= piece.start() => blocked = Some(busy.end()),
                    Some(busy) if busy.start() < piece.end() => {
                        piece = PageRange::new(piece.start(), busy.start()).ok()?
                    }
                    _ => {}
                }
            }
            match blocked {
                Some(end) => from = end,
                None => return Some(piece),
            }
        }
    }

    fn request(&mut self, range: PageRange) -> Request {
        let id = self.next_id;
        self.next_id += 1;
        Request { id, range }
    }

    /// Takes in pages that came in answer to request `id`. Answers may come in several parts.
    ///
    /// Returns whether anybody asked for them.
    pub fn arrived(&mut self, id: u64, part: PageRange) -> bool {
        for lane in [&mut self.urgent, &mut self.background] {
            if let Some(&asked) = lane.open.get(&id) {
                if !asked.covers(&part) {
                    return false;
                }
                lane.pages.remove(part);
                if !lane.pages.overlaps(asked) {
                    lane.open.remove(&id);
                }
                return true;
            }
        }
        false
    }

    /// Forgets what is on its way in the urgent lane: its link is lost.
    pub fn forget_urgent(&mut self) {
        self.urgent = Lane::default();
        self.run = None;
    }

    /// Forgets what is on its way in the background lane: its link is lost.
    pub fn forget_background(&mut self) {
        self.background = Lane::default();
    }

    /// Number of open background requests.
    #[must_use]
    pub fn background_open(&self) -> usize {
        self.background.open.len()
    }
}
