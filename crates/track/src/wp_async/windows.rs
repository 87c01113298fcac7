//! Where the second pass has to go.
//!
//! One call for every written page would cost more than walking over the clean pages between them.

use godwit_pages::{PAGE_SIZE, PageRange, PageSet};

/// Clean pages that are cheaper to walk over than a call: 512 of them take 1 to 2 µs, a call about as long.
const GAP: u64 = 512 * PAGE_SIZE;

/// Joins the ranges of `candidates` over small gaps. A gap that is itself written but no candidate (a hole in a
/// shared object) is never walked over: protecting it would put markers there, and return pages that do not exist.
pub(super) fn of<'a>(candidates: &'a PageSet, written: &'a PageSet) -> impl Iterator<Item = PageRange> + 'a {
    let mut ranges = candidates.iter().peekable();
    std::iter::from_fn(move || {
        let mut window = ranges.next()?;
        while let Some(next) =
            ranges.next_if(|next| next.start() - window.end() <= GAP && !gap_is_written(written, window, *next))
        {
            window = PageRange::new(window.start(), next.end()).unwrap_or(window);
        }
        Some(window)
    })
}

fn gap_is_written(written: &PageSet, window: PageRange, next: PageRange) -> bool {
    PageRange::new(window.end(), next.start()).is_ok_and(|gap| written.overlaps(gap))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ranges: &[(u64, u64)]) -> PageSet {
        ranges.iter().map(|&(start, end)| PageRange::new(start * PAGE_SIZE, end * PAGE_SIZE).unwrap()).collect()
    }

    #[test]
    fn joins_over_small_clean_gaps_only() {
        let candidates = set(&[(0, 1), (10, 11), (9000, 9001), (9004, 9005)]);
        let written = set(&[(0, 1), (10, 11), (9000, 9001), (9002, 9003), (9004, 9005)]);
        assert_eq!(of(&candidates, &written).collect::<PageSet>(), set(&[(0, 11), (9000, 9001), (9004, 9005)]));
        assert_eq!(of(&candidates, &candidates).collect::<PageSet>(), set(&[(0, 11), (9000, 9005)]));
        assert_eq!(of(&PageSet::new(), &written).count(), 0);
    }
}
