//! Finding pages of zeroes, and cutting a buffer of pages into runs that are zero and runs that are not.

use std::ops::Range;

use crate::header::PAGE_SIZE;

/// Bytes looked at in one go: wide enough for vector registers, small enough to leave a busy page early.
const STRIDE: usize = 128;

/// Says whether all of `bytes` are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let strides = bytes.chunks_exact(STRIDE);
    strides.remainder().iter().all(|byte| *byte == 0)
        && strides.into_iter().all(|stride| stride.iter().fold(0, |seen, byte| seen | byte) == 0)
}

/// A run of neighbouring pages, all zero or all not; `pages` counts from the start of the buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) pages: Range<usize>,
    pub(crate) zero: bool,
}

/// Cuts `bytes`, whole pages, into maximal runs in order.
pub(crate) fn runs(bytes: &[u8]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (index, page) in bytes.chunks_exact(PAGE_SIZE).enumerate() {
        let zero = is_zero(page);
        match runs.last_mut() {
            Some(run) if run.zero == zero => run.pages.end = index + 1,
            _ => runs.push(Run { pages: index..index + 1, zero }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_makes_a_page_busy() {
        assert!(is_zero(&[0; PAGE_SIZE]));
        for at in [0, 1, STRIDE - 1, STRIDE, PAGE_SIZE - 1] {
            let mut page = [0; PAGE_SIZE];
            page[at] = 0x80;
            assert!(!is_zero(&page), "byte {at}");
        }
        let mut odd = [0; 200];
        assert!(is_zero(&odd));
        odd[199] = 1;
        assert!(!is_zero(&odd));
    }

    #[test]
    fn runs_are_maximal_and_cover_everything() {
        let mut bytes = vec![0; 5 * PAGE_SIZE];
        bytes[2 * PAGE_SIZE] = 1;
        bytes[4 * PAGE_SIZE - 1] = 1;
        let expected = [(0..2, true), (2..4, false), (4..5, true)];
        assert_eq!(runs(&bytes), expected.map(|(pages, zero)| Run { pages, zero }));
        assert!(runs(&[]).is_empty());
    }
}
