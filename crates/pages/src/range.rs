//! One run of whole pages.
//!
//! Owns the two rules every range obeys, page alignment and non-emptiness, so that no caller checks them again. It does
//! not know about sets; see [`crate::PageSet`].

use std::fmt;

/// Size of a base page in bytes; the only one x86_64 has.
pub const PAGE_SIZE: u64 = 4096;

/// Tells why two numbers do not make a [`PageRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// A bound is not a multiple of [`PAGE_SIZE`].
    #[error("range {start:#x}..{end:#x} is not page aligned")]
    Unaligned {
        /// First byte asked for.
        start: u64,
        /// First byte after the range asked for.
        end: u64,
    },
    /// The range holds no page, or ends before it starts.
    #[error("range {start:#x}..{end:#x} is empty")]
    Empty {
        /// First byte asked for.
        start: u64,
        /// First byte after the range asked for.
        end: u64,
    },
    /// The end lies beyond the 64-bit address space.
    #[error("{pages} pages from {start:#x} reach beyond the address space")]
    Overflow {
        /// First byte asked for.
        start: u64,
        /// Length asked for, in pages.
        pages: u64,
    },
}

/// A run of whole pages: byte addresses, page aligned, never empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRange {
    start: u64,
    end: u64,
}

impl PageRange {
    /// Makes the range of bytes `start..end`.
    ///
    /// # Errors
    /// [`RangeError`] where a bound is unaligned or the range is empty.
    pub const fn new(start: u64, end: u64) -> Result<Self, RangeError> {
        if !start.is_multiple_of(PAGE_SIZE) || !end.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Unaligned { start, end });
        }
        if start >= end {
            return Err(RangeError::Empty { start, end });
        }
        Ok(Self { start, end })
    }

    /// Makes the range of `pages` pages that begins at byte `start`.
    ///
    /// # Errors
    /// [`RangeError`] where `start` is unaligned, `pages` is 0 or the end overflows.
    pub const fn from_pages(start: u64, pages: u64) -> Result<Self, RangeError> {
        let Some(length) = pages.checked_mul(PAGE_SIZE) else {
            return Err(RangeError::Overflow { start, pages });
        };
        match start.checked_add(length) {
            Some(end) => Self::new(start, end),
            None => Err(RangeError::Overflow { start, pages }),
        }
    }

    /// Makes the smallest range that holds every byte of `start..end`; `None` where that is empty or overflows.
    pub fn enclosing(start: u64, end: u64) -> Option<Self> {
        if start >= end {
            return None;
        }
        let start = start - start % PAGE_SIZE;
        Self::new(start, end.checked_next_multiple_of(PAGE_SIZE)?).ok()
    }

    /// Makes the one-page range that holds byte `address`; `None` for the very last page, whose end overflows.
    pub fn page_at(address: u64) -> Option<Self> {
        Self::from_pages(address - address % PAGE_SIZE, 1).ok()
    }

    /// Returns the first byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Returns the first byte after the range.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Returns the length in bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Returns the length in pages; never 0.
    pub const fn pages(self) -> u64 {
        self.len() / PAGE_SIZE
    }

    /// Tells whether byte `address` lies inside.
    pub const fn contains(self, address: u64) -> bool {
        self.start <= address && address < self.end
    }

    /// Tells whether all of `other` lies inside.
    pub const fn covers(self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Tells whether the two have a page in common.
    pub const fn overlaps(self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Returns what the two have in common.
    pub fn intersection(self, other: &Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end)).ok()
    }

    /// Cuts the range at byte `address`; both halves are `Some` only where the cut falls on a page boundary strictly
    /// inside.
    pub fn split_at(self, address: u64) -> Option<(Self, Self)> {
        Some((Self::new(self.start, address).ok()?, Self::new(address, self.end).ok()?))
    }

    /// Iterates over consecutive pieces of at most `pages` pages (at least one).
    pub fn chunks(self, pages: u64) -> impl Iterator<Item = Self> {
        let step = pages.max(1).saturating_mul(PAGE_SIZE);
        let mut next = self.start;
        std::iter::from_fn(move || {
            let piece = Self::new(next, self.end.min(next.saturating_add(step))).ok()?;
            next = piece.end;
            Some(piece)
        })
    }

    /// Iterates over the addresses of the pages.
    pub fn page_addresses(self) -> impl Iterator<Item = u64> {
        (0..self.pages()).map(move |index| self.start + index * PAGE_SIZE)
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self}")
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:#x}..{:#x}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_no_range() {
        assert!(matches!(PageRange::new(1, 4096), Err(RangeError::Unaligned { .. })));
        assert!(matches!(PageRange::new(4096, 4097), Err(RangeError::Unaligned { .. })));
        assert!(matches!(PageRange::new(4096, 4096), Err(RangeError::Empty { .. })));
        assert!(matches!(PageRange::new(8192, 4096), Err(RangeError::Empty { .. })));
        assert!(matches!(PageRange::from_pages(4096, u64::MAX), Err(RangeError::Overflow { .. })));
        assert!(matches!(PageRange::from_pages(u64::MAX - 4095, 1), Err(RangeError::Overflow { .. })));
        assert_eq!(PageRange::page_at(u64::MAX), None);
        assert_eq!(PageRange::enclosing(5, 5), None);
        assert_eq!(PageRange::enclosing(5, u64::MAX), None);
    }

    #[test]
    fn cuts_and_encloses() {
        let range = PageRange::from_pages(0x1000, 5).unwrap();
        let pieces: Vec<_> = range.chunks(2).map(PageRange::pages).collect();
        assert_eq!(pieces, [2, 2, 1]);
        assert_eq!(range.chunks(u64::MAX).count(), 1);
        assert_eq!(range.chunks(0).count(), 5);
        assert_eq!(PageRange::enclosing(0x1001, 0x1002), PageRange::new(0x1000, 0x2000).ok());
        assert_eq!(PageRange::page_at(0x1fff), PageRange::new(0x1000, 0x2000).ok());
        assert_eq!(range.split_at(0x1000), None);
        assert_eq!(range.split_at(0x2000).unwrap().1.pages(), 4);
        assert_eq!(range.page_addresses().last(), Some(0x5000));
        assert_eq!(range.to_string(), "0x1000..0x6000");
    }
}
