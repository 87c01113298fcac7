//! The thread that rewrites whole pages with new noise.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use super::random::Random;
use super::{Counters, Memory, WORDS};

/// How often a paced writer goes to work.
const TICK: Duration = Duration::from_millis(2);
/// Time that it makes up for at most; a freeze is not.
const ARREARS: Duration = Duration::from_millis(20);
/// How often a busy writer tells how far it is.
const TELL: u64 = 16;

/// What a writer does between its writes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pace {
    /// It sleeps, and writes at a given rate.
    Paced,
    /// It computes; the rate is reached when it has a processor for itself.
    Busy,
}

/// A writer.
#[derive(Debug)]
pub(super) struct Writer {
    memory: Memory,
    pages_per_second: f64,
    pace: Pace,
    random: Random,
}

impl Writer {
    /// Makes one that writes `rate` MiB/s.
    pub(super) fn new(memory: Memory, rate: u64, pace: Pace) -> Self {
        Self { memory, pages_per_second: rate as f64 * 256.0, pace, random: Random::new(rate) }
    }

    /// Writes for ever.
    pub(super) fn write(mut self, counters: &Counters) {
        match self.pace {
            Pace::Paced => self.write_paced(counters),
            Pace::Busy => self.write_busy(counters),
        }
    }

    fn write_paced(&mut self, counters: &Counters) {
        let mut credit = 0.0;
        let mut last = Instant::now();
        loop {
            std::thread::sleep(TICK);
            let now = Instant::now();
            credit += (now - last).min(ARREARS).as_secs_f64() * self.pages_per_second;
            last = now;
            let pages = credit as u64;
            credit -= pages as f64;
            for _ in 0..pages {
                self.write_page();
            }
            tell(counters, pages);
        }
    }

    fn write_busy(&mut self, counters: &Counters) {
        let steps = (self.steps_per_second() / self.pages_per_second) as u64;
        loop {
            for _ in 0..TELL {
                self.compute(steps);
                self.write_page();
            }
            tell(counters, TELL);
        }
    }

    fn write_page(&mut self) {
        let page = self.random.below(self.memory.len() / WORDS);
        for word in &self.memory[page * WORDS..][..WORDS] {
            word.store(self.random.next(), Ordering::Relaxed);
        }
    }

    fn compute(&mut self, steps: u64) {
        for _ in 0..steps {
            std::hint::black_box(self.random.next());
        }
    }

    /// How fast this processor computes.
    fn steps_per_second(&mut self) -> f64 {
        const STEPS: u64 = 1_000_000;
        let mut best = f64::INFINITY;
        for _ in 0..20 {
            let start = Instant::now();
            self.compute(STEPS);
            best = best.min(start.elapsed().as_secs_f64());
        }
        STEPS as f64 / best
    }
}

/// Counts pages, and the processor time of this thread.
fn tell(counters: &Counters, pages: u64) {
    counters.writes.fetch_add(pages, Ordering::Relaxed);
    if let Ok(time) = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID) {
        let microseconds = Duration::from(time).as_micros();
        counters.writer_cpu_us.store(microseconds as u64, Ordering::Relaxed);
    }
}
