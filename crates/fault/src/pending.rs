//! Which pages of one address space are still at the source, and under which address they lie there.
//!
//! The program goes on living while its pages arrive: mremap(2) moves addresses that have no content yet, munmap(2) and
//! madvise(2) make content unwanted. The source knows only the addresses of the moment of the move. So a page is known by
//! its address *there*, and a short list of segments leads from addresses *here* to those. At first one segment maps
//! everything to itself; only mremap adds to it.
//!
//! Pure. What to fetch next is [`crate::queue`]'s business, surviving the death of a daemon is [`crate::ledger`]'s.

use std::collections::BTreeMap;

use godwit_pages::{PageRange, PageSet};

/// First byte behind all user addresses, with five levels of page tables.
pub const ADDRESS_SPACE_END: u64 = 1 << 56;

/// A run of addresses here, and the address of its first page at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where the pages belong now.
    pub here: PageRange,
    /// Where the first of them lies at the source.
    pub source: u64,
}

impl Segment {
    /// The addresses at the source.
    #[must_use]
    pub fn at_source(&self) -> PageRange {
        let end = self.source.saturating_add(self.here.len());
        PageRange::new(self.source, end).unwrap_or(self.here)
    }

    /// The part of the segment that lies in `range`, by addresses here.
    fn within(&self, range: PageRange) -> Option<Self> {
        let here = self.here.intersection(&range)?;
        Some(Self { here, source: self.source + (here.start() - self.here.start()) })
    }
}

/// The pages that one address space still lacks.
#[derive(Clone, Debug)]
pub struct Pending {
    /// By their addresses at the source.
    missing: PageSet,
    /// Start here to length in bytes and start at the source.
    segments: BTreeMap<u64, (u64, u64)>,
    /// Start at the source to start here, of the same segments.
    by_source: BTreeMap<u64, u64>,
    /// What was moved away, and is still to be called unmapped.
    moved_away: Vec<PageRange>,
}

impl Pending {
    /// Starts with `missing` pages, each at its own address.
    #[must_use]
    pub fn new(missing: PageSet) -> Self {
        let everything = PageRange::new(0, ADDRESS_SPACE_END).expect("a constant range");
        Self::with_segments(missing, [Segment { here: everything, source: 0 }])
    }

    /// Starts with `missing` pages (source addresses) and the segments of an earlier [`Pending`]. Segments that overlap one
    /// before them lose that part; missing pages that no segment leads to are dropped.
    #[must_use]
    pub fn with_segments(missing: PageSet, segments: impl IntoIterator<Item = Segment>) -> Self {
        let mut pending = Self {
            missing: PageSet::new(),
            segments: BTreeMap::new(),
            by_source: BTreeMap::new(),
            moved_away: Vec::new(),
        };
        let (mut here, mut source) = (PageSet::new(), PageSet::new());
        for segment in segments {
            let there = segment.at_source();
            if here.overlaps(segment.here) || source.overlaps(there) || there.len() != segment.here.len() {
                continue;
            }
            here.insert(segment.here);
            source.insert(there);
            pending.put(segment);
        }
        pending.missing = missing.intersection(&source);
        pending
    }

    /// The missing pages, by their addresses at the source.
    #[must_use]
    pub fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// Says whether nothing is missing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty()
    }

    /// Number of missing pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.missing.pages()
    }

    /// Iterates over the segments, ascending by address here.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        self.segments.iter().filter_map(|(&start, &(length, source))| {
            Some(Segment { here: PageRange::new(start, start + length).ok()?, source })
        })
    }

    /// Gives the source's address of the page at `address` here, if that page is missing.
    #[must_use]
    pub fn source_of(&self, address: u64) -> Option<u64> {
        let page = address - address % godwit_pages::PAGE_SIZE;
        let (&start, &(length, source)) = self.segments.range(..=page).next_back()?;
        let at_source = source.checked_add(page.checked_sub(start).filter(|offset| *offset < length)?)?;
        self.missing.contains(at_source).then_some(at_source)
    }

    /// Gives the missing pages among `range` at the source as segments, ascending by source address.
    #[must_use]
    pub fn wanted(&self, range: PageRange) -> Vec<Segment> {
        let mut wanted = Vec::new();
        for part in self.missing.iter_within(range) {
            self.each_by_source(part, |segment| wanted.push(segment));
        }
        wanted
    }

    /// Notes that `range` (source addresses) is not missing any more.
    pub fn settle(&mut self, range: PageRange) {
        self.missing.remove(range);
    }

    /// Notes that the content of `range` (addresses here) is not wanted any more; returns what was missing of it, by source
    /// addresses.
    pub fn drop_here(&mut self, range: PageRange) -> PageSet {
        let mut dropped = PageSet::new();
        for segment in self.pieces(range) {
            dropped.extend(self.missing.iter_within(segment.at_source()));
        }
        self.missing.remove_all(&dropped);
        dropped
    }

    /// What a child lacks that is forked now. What its parent's threads are doing is none of its business.
    #[must_use]
    pub fn of_child(&self) -> Self {
        Self { moved_away: Vec::new(), ..self.clone() }
    }

    /// Follows an munmap(2) of `range`, otherwise as [`Pending::drop_here`].
    ///
    /// The kernel tells of an mremap(2), waits until that is read, and tells then that it has unmapped the place where the pages
    /// had been. By then another thread may have moved others there: these are wanted.
    pub fn unmap_here(&mut self, range: PageRange) -> PageSet {
        if let Some(index) = self.moved_away.iter().position(|moved| *moved == range) {
            self.moved_away.remove(index);
            return PageSet::new();
        }
        // N.B. what stays mapped (MREMAP_DONTUNMAP) is not called unmapped before it is.
        self.moved_away.retain(|moved| !moved.overlaps(&range));
        self.drop_here(range)
    }

    /// Follows an mremap(2) of `from` to address `to`; returns what was missing at the target and is therefore lost (nothing,
    /// unless the kernel's events came out of order). Where `from` and its target overlap nothing is done: the kernel refuses that.
    pub fn remap(&mut self, from: PageRange, to: u64) -> PageSet {
        let target = to.checked_add(from.len()).and_then(|end| PageRange::new(to, end).ok());
        let Some(target) = target.filter(|target| target.end() <= ADDRESS_SPACE_END && !target.overlaps(&from)) else {
            return PageSet::new();
        };
        /// Threads that do so at the same time.
        const MOST_MOVED_AWAY: usize = 1024;
        if self.moved_away.len() >= MOST_MOVED_AWAY {
            // The oldest, and room for what may be called unmapped twice.
            self.moved_away.drain(..2);
        }
        self.moved_away.push(from);
        let lost = self.drop_here(target);
        // N.B. what was there was called unmapped, and that was taken for the other news, which has yet to come.
        if !lost.is_empty() {
            self.moved_away.push(target);
        }
        self.cut(target);
        for piece in self.cut(from) {
            let start = to + (piece.here.start() - from.start());
            if let Ok(here) = PageRange::from_pages(start, piece.here.pages()) {
                self.put(Segment { here, source: piece.source });
            }
        }
        lost
    }

    /// Forgets segments that lead to no missing page.
    pub fn prune(&mut self) {
        let idle: Vec<Segment> =
            self.segments().filter(|segment| !self.missing.overlaps(segment.at_source())).collect();
        for segment in idle {
            self.take(segment.here.start());
        }
    }

    /// Number of segments.
    #[must_use]
    pub fn segment_count(&self) -> usize {
        self.segments.len()
    }

    /// Calls `each` with the pieces of segments that make up `range` at the source.
    fn each_by_source(&self, range: PageRange, mut each: impl FnMut(Segment)) {
        let before = self.by_source.range(..range.start()).next_back();
        for (&source, &here) in before.into_iter().chain(self.by_source.range(range.start()..range.end())) {
            let Some(&(length, _)) = self.segments.get(&here) else { continue };
            let Some(part) = PageRange::new(source, source + length).ok().and_then(|all| all.intersection(&range))
            else {
                continue;
            };
            if let Ok(place) = PageRange::from_pages(here + (part.start() - source), part.pages()) {
                each(Segment { here: place, source: part.start() });
            }
        }
    }

    /// The pieces of segments that lie in `range`, by addresses here.
    fn pieces(&self, range: PageRange) -> Vec<Segment> {
        let before = self.segments.range(..range.start()).next_back();
        let touching = before.into_iter().chain(self.segments.range(range.start()..range.end()));
        touching
            .filter_map(|(&start, &(length, source))| {
                Segment { here: PageRange::new(start, start + length).ok()?, source }.within(range)
            })
            .collect()
    }

    /// Takes `range` (addresses here) out of all segments and returns what was taken.
    fn cut(&mut self, range: PageRange) -> Vec<Segment> {
        let pieces = self.pieces(range);
        for piece in &pieces {
            let Some((&start, &(length, source))) = self.segments.range(..=piece.here.start()).next_back() else {
                continue;
            };
            self.take(start);
            let left = PageRange::new(start, piece.here.start()).map(|here| Segment { here, source });
            let right = PageRange::new(piece.here.end(), start + length)
                .map(|here| Segment { here, source: source + (here.start() - start) });
            for rest in [left, right].into_iter().flatten() {
                self.put(rest);
            }
        }
        pieces
    }

    fn put(&mut self, segment: Segment) {
        self.segments.insert(segment.here.start(), (segment.here.len(), segment.source));
        self.by_source.insert(segment.source, segment.here.start());
    }

    fn take(&mut self, here: u64) {
        if let Some((_, source)) = self.segments.remove(&here) {
            self.by_source.remove(&source);
        }
    }
}
