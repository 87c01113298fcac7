//! Any number of pages, as sorted, disjoint, maximal ranges.
//!
//! Owns the invariant that two ranges of a set neither overlap nor touch. A sorted map rather than a bitmap: address
//! spaces are sparse (47 bits), and sets of dirty pages are runs more often than not. The page count is kept beside the
//! map because rounds, progress and convergence ask for it all the time.

use std::collections::BTreeMap;

use crate::range::PageRange;

/// A set of pages. Iterates in ascending order over maximal ranges.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    /// Start byte to end byte.
    ranges: BTreeMap<u64, u64>,
    pages: u64,
}

impl PageSet {
    /// Makes an empty set.
    pub const fn new() -> Self {
        Self { ranges: BTreeMap::new(), pages: 0 }
    }

    /// Adds every page of `range`.
    pub fn insert(&mut self, range: PageRange) {
        let (mut start, mut end) = (range.start(), range.end());
        if let Some((&before, &before_end)) = self.ranges.range(..=start).next_back()
            && before_end >= start
        {
            if before_end >= end {
                return;
            }
            start = before;
            end = end.max(before_end);
            self.take(before);
        }
        while let Some((&after, &after_end)) = self.ranges.range(start..=end).next() {
            end = end.max(after_end);
            self.take(after);
        }
        self.put(start, end);
    }

    /// Takes every page of `range` out.
    pub fn remove(&mut self, range: PageRange) {
        if let Some((&before, &before_end)) = self.ranges.range(..range.start()).next_back()
            && before_end > range.start()
        {
            self.take(before);
            self.put(before, range.start());
            if before_end > range.end() {
                self.put(range.end(), before_end);
                return;
            }
        }
        while let Some((&inside, &inside_end)) = self.ranges.range(range.start()..range.end()).next() {
            self.take(inside);
            if inside_end > range.end() {
                self.put(range.end(), inside_end);
            }
        }
    }

    /// Adds every page of `other`.
    pub fn insert_all(&mut self, other: &Self) {
        if self.is_empty() {
            self.clone_from(other);
        } else {
            self.extend(other.iter());
        }
    }

    /// Takes every page of `other` out.
    pub fn remove_all(&mut self, other: &Self) {
        // Walking the smaller side keeps "remove two pages from a million" and its opposite both cheap.
        if other.ranges.len() <= self.ranges.len() {
            other.iter().for_each(|range| self.remove(range));
        } else {
            *self = self.subtract(other);
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        *self = Self::new();
    }

    /// Tells whether the page that holds byte `address` is in the set.
    pub fn contains(&self, address: u64) -> bool {
        self.ranges.range(..=address).next_back().is_some_and(|(_, &end)| address < end)
    }

    /// Tells whether every page of `range` is in the set.
    pub fn covers(&self, range: PageRange) -> bool {
        self.ranges.range(..=range.start()).next_back().is_some_and(|(_, &end)| range.end() <= end)
    }

    /// Tells whether any page of `range` is in the set.
    pub fn overlaps(&self, range: PageRange) -> bool {
        self.ranges.range(..range.end()).next_back().is_some_and(|(_, &end)| end > range.start())
    }

    /// Returns the number of pages.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Returns the number of bytes.
    pub const fn bytes(&self) -> u64 {
        self.pages * crate::PAGE_SIZE
    }

    /// Returns the number of maximal ranges.
    pub fn range_count(&self) -> usize {
        self.ranges.len()
    }

    /// Tells whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Iterates over the maximal ranges, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = PageRange> + '_ {
        self.ranges.iter().map(|(&start, &end)| valid(start, end))
    }

    /// Iterates, ascending, over the pieces of the set that lie inside `range`.
    pub fn iter_within(&self, range: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        let before = self.ranges.range(..range.start()).next_back();
        before
            .into_iter()
            .chain(self.ranges.range(range.start()..range.end()))
            .filter_map(move |(&start, &end)| valid(start, end).intersection(&range))
    }

    /// Returns the first maximal range.
    pub fn first(&self) -> Option<PageRange> {
        self.ranges.first_key_value().map(|(&start, &end)| valid(start, end))
    }

    /// Returns the last maximal range.
    pub fn last(&self) -> Option<PageRange> {
        self.ranges.last_key_value().map(|(&start, &end)| valid(start, end))
    }

    /// Returns the first piece of the set at or after byte `address` (rounded down to its page).
    pub fn first_from(&self, address: u64) -> Option<PageRange> {
        let address = address - address % crate::PAGE_SIZE;
        let before = self.ranges.range(..address).next_back();
        match before {
            Some((_, &end)) if end > address => Some(valid(address, end)),
            _ => self.ranges.range(address..).next().map(|(&start, &end)| valid(start, end)),
        }
    }

    /// Takes out and returns at most `max_pages` pages from the front, as one range; `None` when empty or asked for 0.
    pub fn pop_front(&mut self, max_pages: u64) -> Option<PageRange> {
        let front = self.first()?.chunks(max_pages.max(1)).next().filter(|_| max_pages > 0)?;
        self.remove(front);
        Some(front)
    }

    /// Returns the pages that are in both.
    pub fn intersection(&self, other: &Self) -> Self {
        let (mut left, mut right) = (self.iter().peekable(), other.iter().peekable());
        let mut both = Ascending::default();
        while let (Some(one), Some(two)) = (left.peek().copied(), right.peek().copied()) {
            if let Some(common) = one.intersection(&two) {
                both.push(common);
            }
            if one.end() <= two.end() {
                left.next();
            } else {
                right.next();
            }
        }
        both.into_set()
    }

    /// Returns the pages that are in the set and in `range`.
    pub fn intersect_range(&self, range: PageRange) -> Self {
        self.iter_within(range).collect()
    }

    /// Returns the pages that are in either.
    pub fn union(&self, other: &Self) -> Self {
        let (larger, smaller) = if self.ranges.len() >= other.ranges.len() { (self, other) } else { (other, self) };
        let mut either = larger.clone();
        either.insert_all(smaller);
        either
    }

    /// Returns the pages of this set that are not in `other`.
    pub fn subtract(&self, other: &Self) -> Self {
        let mut rest = Ascending::default();
        let mut holes = other.iter().peekable();
        for range in self.iter() {
            let mut start = range.start();
            while holes.next_if(|hole| hole.end() <= start).is_some() {}
            while let Some(hole) = holes.peek().copied().filter(|hole| hole.start() < range.end()) {
                if let Ok(kept) = PageRange::new(start, hole.start()) {
                    rest.push(kept);
                }
                start = hole.end();
                if hole.end() > range.end() {
                    break;
                }
                holes.next();
            }
            if let Ok(kept) = PageRange::new(start, range.end()) {
                rest.push(kept);
            }
        }
        rest.into_set()
    }

    fn put(&mut self, start: u64, end: u64) {
        self.ranges.insert(start, end);
        self.pages += valid(start, end).pages();
    }

    fn take(&mut self, start: u64) {
        if let Some(end) = self.ranges.remove(&start) {
            self.pages -= valid(start, end).pages();
        }
    }
}

/// Rebuilds a range whose bounds came from one.
fn valid(start: u64, end: u64) -> PageRange {
    PageRange::new(start, end).expect("a set holds only the bounds of valid ranges")
}

/// Ranges in ascending order on their way into a set: a map built at once from sorted pairs costs a tenth of as many
/// insertions.
#[derive(Default)]
struct Ascending(Vec<(u64, u64)>);

impl Ascending {
    /// Tells whether `range` may come next: behind all others, or touching the last one.
    fn takes(&self, range: PageRange) -> bool {
        self.0.last().is_none_or(|last| last.1 <= range.start())
    }

    fn push(&mut self, range: PageRange) {
        match self.0.last_mut() {
            Some(last) if last.1 == range.start() => last.1 = range.end(),
            _ => self.0.push((range.start(), range.end())),
        }
    }

    fn into_set(self) -> PageSet {
        let pages = self.0.iter().map(|&(start, end)| valid(start, end).pages()).sum();
        PageSet { ranges: self.0.into_iter().collect(), pages }
    }
}

impl FromIterator<PageRange> for PageSet {
    fn from_iter<I: IntoIterator<Item = PageRange>>(ranges: I) -> Self {
        let mut ranges = ranges.into_iter().peekable();
        let mut ascending = Ascending::default();
        while let Some(range) = ranges.next_if(|range| ascending.takes(*range)) {
            ascending.push(range);
        }
        let mut set = ascending.into_set();
        set.extend(ranges);
        set
    }
}

impl Extend<PageRange> for PageSet {
    fn extend<I: IntoIterator<Item = PageRange>>(&mut self, ranges: I) {
        ranges.into_iter().for_each(|range| self.insert(range));
    }
}

impl From<PageRange> for PageSet {
    fn from(range: PageRange) -> Self {
        std::iter::once(range).collect()
    }
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_set().entries(self.iter()).finish()
    }
}
