//! The thread that touches pages at random, as a program with a large working set does, and sees how long that takes.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::heart::Heart;
use super::histogram::Histogram;
use super::random::Random;
use super::{Memory, WORDS};

/// Thinking time between two touches.
const PAUSE: Duration = Duration::from_micros(200);
/// A touch that takes longer than this found no page: others take less than a microsecond, and zero-fill faults two.
const ABSENT: Duration = Duration::from_micros(15);

/// Touches pages for ever; counts those that were not there after a move.
pub(super) fn touch(memory: Memory, heart: &Heart, absent: &Histogram) {
    let mut random = Random::new(7);
    let mut sum = 0u64;
    loop {
        std::thread::sleep(PAUSE);
        let word = random.below(memory.len() / WORDS) * WORDS;
        let start = Instant::now();
        sum = sum.wrapping_add(std::hint::black_box(memory[word].load(Ordering::Relaxed)));
        let took = start.elapsed();
        if took > ABSENT && heart.has_moved() {
            absent.add(took);
        }
        std::hint::black_box(sum);
    }
}
