//! Durations, counted in buckets whose limits are 5 % apart: threads add, another one asks for percentiles.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Buckets from one doubling to the next.
const PER_DOUBLING: f64 = 14.0;
/// Enough for 2^32 ns.
const BUCKETS: usize = 32 * PER_DOUBLING as usize;

/// A histogram of durations up to four seconds.
#[derive(Debug)]
pub(super) struct Histogram(Vec<AtomicU32>);

impl Default for Histogram {
    fn default() -> Self {
        Self((0..BUCKETS).map(|_| AtomicU32::new(0)).collect())
    }
}

impl Histogram {
    /// Adds a duration.
    pub(super) fn add(&self, duration: Duration) {
        let doublings = (duration.as_nanos().max(1) as f64).log2();
        let bucket = ((doublings * PER_DOUBLING) as usize).min(BUCKETS - 1);
        self.0[bucket].fetch_add(1, Ordering::Relaxed);
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.0.iter().map(|bucket| u64::from(bucket.load(Ordering::Relaxed))).sum()
    }

    /// The duration that `percent` of all do not exceed, in microseconds; 0 without any.
    pub(super) fn percentile_us(&self, percent: u64) -> f64 {
        let wanted = (self.count() * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (bucket, count) in self.0.iter().enumerate() {
            seen += u64::from(count.load(Ordering::Relaxed));
            if seen >= wanted {
                return ((bucket as f64 + 0.5) / PER_DOUBLING).exp2() / 1e3;
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_close() {
        let histogram = Histogram::default();
        assert_eq!(histogram.percentile_us(50), 0.0);
        for microseconds in 1..=1000 {
            histogram.add(Duration::from_micros(microseconds));
        }
        histogram.add(Duration::ZERO);
        assert_eq!(histogram.count(), 1001);
        for (percent, expected) in [(50, 500.0), (99, 990.0)] {
            let found = histogram.percentile_us(percent);
            assert!((found / expected - 1.0).abs() < 0.05, "{percent} %: {found}");
        }
        histogram.add(Duration::from_secs(3600));
        assert_eq!(histogram.count(), 1002);
    }
}
