//! Which edges of the decoders' control flow an input has taken, where they were compiled so that they count them (`fuzz/run`).
//!
//! The compiler's part is LLVM's SanitizerCoverage with inline 8-bit counters: each edge has a byte, and programs register
//! their bytes before `main` by calling a function of this name. It is an LLVM pass like any other, so that a stable compiler has it,
//! too. <https://clang.llvm.org/docs/SanitizerCoverage.html#inline-8bit-counters>

#![expect(unsafe_code, reason = "the counters are known by their addresses alone")]

use std::sync::Mutex;

/// Where counters are, one past the end last.
static COUNTERS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Is called before `main` for each part of the program that has counters.
// SAFETY: nobody else defines this name, which sanitizers' runtimes have: none is linked.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, end: *mut u8) {
    let range = (start.expose_provenance(), end.expose_provenance());
    if let Ok(mut counters) = COUNTERS.lock()
        && !counters.contains(&range)
    {
        counters.push(range);
    }
}

/// What was reached so far: for each counter a bit for each order of magnitude that it has had after an input.
#[derive(Debug)]
pub(crate) struct Coverage {
    reached: Vec<Vec<u8>>,
}

impl Coverage {
    /// Begins anew; `None` where nothing is counted.
    pub(crate) fn begin() -> Option<Self> {
        let counters = COUNTERS.lock().ok()?;
        if counters.is_empty() {
            return None;
        }
        Some(Self { reached: counters.iter().map(|(start, end)| vec![0; end - start]).collect() })
    }

    /// Sets all counters to zero.
    pub(crate) fn reset() {
        each(|_, counted| counted.fill(0));
    }

    /// Takes in what was counted since the counters were reset: whether an edge was taken that never was before, or more often.
    pub(crate) fn is_new(&mut self) -> bool {
        let mut is_new = false;
        each(|part, counted| {
            let Some(reached) = self.reached.get_mut(part) else { return };
            for (counted, reached) in counted.chunks(8).zip(reached.chunks_mut(8)) {
                // Most are zero.
                if counted == [0; 8] {
                    continue;
                }
                for (&counted, reached) in counted.iter().zip(reached) {
                    let bit = magnitude(counted);
                    is_new |= *reached & bit != bit;
                    *reached |= bit;
                }
            }
        });
        is_new
    }

    /// Number of edges that were taken by any input.
    pub(crate) fn edges(&self) -> usize {
        self.reached.iter().flatten().filter(|&&bits| bits != 0).count()
    }
}

fn each(mut look: impl FnMut(usize, &mut [u8])) {
    let Ok(counters) = COUNTERS.lock() else { return };
    for (part, &(start, end)) in counters.iter().enumerate() {
        let first = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: the program has registered them, they live as long as it does, and only this thread runs what counts.
        look(part, unsafe { std::slice::from_raw_parts_mut(first, end - start) });
    }
}

/// The bit of a number's order of magnitude; none of zero.
fn magnitude(counted: u8) -> u8 {
    match counted {
        0 => 0,
        1 => 1,
        2 => 2,
        3 => 4,
        4..=7 => 8,
        8..=15 => 16,
        16..=31 => 32,
        32..=127 => 64,
        _ => 128,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_reached_before_is_new() {
        let mut counters = [0u8; 20];
        let range = counters.as_mut_ptr_range();
        assert!(Coverage::begin().is_none(), "the tests are not instrumented");
        __sanitizer_cov_8bit_counters_init(range.start, range.end);
        let mut coverage = Coverage::begin().unwrap();
        assert!(!coverage.is_new());
        let mut reach = |place: usize, times: u8| {
            Coverage::reset();
            each(|_, counted| counted[place] = times);
            coverage.is_new()
        };
        assert!(reach(3, 1) && !reach(3, 1));
        assert!(reach(3, 4) && !reach(3, 7), "the same order of magnitude");
        assert!(reach(19, 1));
        assert_eq!(coverage.edges(), 2);
        COUNTERS.lock().unwrap().clear();
    }
}
