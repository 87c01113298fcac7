//! How long faults took, as a histogram of fixed size.
//!
//! Pure. Buckets are a sixteenth of a power of two wide, so a quantile is right within 7 %.

use std::time::Duration;

const SUB: u32 = 4;
const BUCKETS: usize = (64 - SUB as usize + 1) << SUB;

/// Counts durations.
#[derive(Clone)]
pub struct Latency {
    buckets: Box<[u64; BUCKETS]>,
    count: u64,
    longest: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Self { buckets: Box::new([0; BUCKETS]), count: 0, longest: 0 }
    }
}

impl std::fmt::Debug for Latency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Latency({} p50 {} p99 {} µs)", self.count, self.quantile_us(0.5), self.quantile_us(0.99))
    }
}

impl Latency {
    /// Counts one.
    pub fn record(&mut self, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanoseconds)] += 1;
        self.count += 1;
        self.longest = self.longest.max(nanoseconds);
    }

    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The longest, in microseconds.
    #[must_use]
    pub fn longest_us(&self) -> u64 {
        self.longest / 1000
    }

    /// The duration that a `share` (0 to 1) of all did not exceed, in microseconds; 0 when none was counted.
    #[must_use]
    pub fn quantile_us(&self, share: f64) -> u64 {
        let rank = (share.clamp(0.0, 1.0) * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if *count > 0 && seen >= rank {
                return upper(index).min(self.longest) / 1000;
            }
        }
        0
    }
}

fn bucket(value: u64) -> usize {
    let magnitude = (63 - (value | 1).leading_zeros()).saturating_sub(SUB);
    ((magnitude as usize) << SUB) + (value >> magnitude) as usize
}

/// The largest value that falls into a bucket.
fn upper(index: usize) -> u64 {
    let magnitude = (index >> SUB).saturating_sub(1);
    let base = (index - (magnitude << SUB)) as u64;
    ((base + 1) << magnitude).wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_near() {
        let mut latency = Latency::default();
        assert_eq!(latency.quantile_us(0.5), 0);
        for us in 1..=1000 {
            latency.record(Duration::from_micros(us));
        }
        assert!((500..=540).contains(&latency.quantile_us(0.5)), "{}", latency.quantile_us(0.5));
        assert!((990..=1000).contains(&latency.quantile_us(0.99)), "{}", latency.quantile_us(0.99));
        assert_eq!(latency.longest_us(), 1000);
    }

    #[test]
    fn every_value_has_a_bucket() {
        for value in (0..64).flat_map(|bit| [1u64 << bit, (1 << bit) - 1, (1 << bit) + 1]).chain([u64::MAX]) {
            let index = bucket(value);
            assert!(index < BUCKETS && upper(index) >= value, "{value}");
        }
    }
}
