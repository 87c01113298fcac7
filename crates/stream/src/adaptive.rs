//! Choosing whether to compress, and how hard.
//!
//! A second core spent on zstd is worth it only where the link is slower than the compressor, and only for
//! memory that shrinks. The first is arithmetic on what the caller observes; the second is found out by trying
//! a little, and trying more and more seldom while it fails. There is no clock here: rates come from outside.

/// Says how pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Never.
    Off,
    /// Always, at this zstd level.
    Level(i32),
    /// As link, processor and data make it worth; nothing is compressed before the first observation.
    #[default]
    Adaptive,
}

/// What one thread reaches at a level, on heaps: bytes in per second, and how its ratio compares to level 1's.
struct Grade {
    level: i32,
    bytes_per_second: f64,
    relative_ratio: f64,
}

const GRADES: [Grade; 3] = [
    Grade { level: -5, bytes_per_second: 600e6, relative_ratio: 0.65 },
    Grade { level: 1, bytes_per_second: 420e6, relative_ratio: 1.0 },
    Grade { level: 3, bytes_per_second: 230e6, relative_ratio: 1.1 },
];

/// The ratio believed in before anything was compressed, and drifted back to since memory changes.
const EXPECTED_RATIO: f64 = 2.5;
/// Weight of the newest ratio in the running one.
const RATIO_WEIGHT: f64 = 0.2;
/// How far one observation moves the running ratio back to the expected one.
const FORGETTING: f64 = 0.05;
/// The longest pause between two tries, in runs of pages.
const LONGEST_PAUSE: u32 = 64;

/// The running judgement behind [`Compression::Adaptive`].
#[derive(Debug)]
pub(crate) struct Judgement {
    link_bytes_per_second: Option<f64>,
    cpu_idle: f64,
    ratio: f64,
    pause: u32,
    skip: u32,
}

impl Judgement {
    pub(crate) fn new() -> Self {
        Self { link_bytes_per_second: None, cpu_idle: 1.0, ratio: EXPECTED_RATIO, pause: 0, skip: 0 }
    }

    /// Takes in what the link carries and which share of a core (0 to 1) compression can have.
    pub(crate) fn observe(&mut self, link_bytes_per_second: f64, cpu_idle: f64) {
        if link_bytes_per_second.is_finite() && link_bytes_per_second > 0.0 {
            self.link_bytes_per_second = Some(link_bytes_per_second);
        }
        if cpu_idle.is_finite() {
            self.cpu_idle = cpu_idle.clamp(0.0, 1.0);
        }
        self.ratio += FORGETTING * (EXPECTED_RATIO - self.ratio);
    }

    /// Picks the level that gets a byte across soonest, or `None` where that is sending it as it is.
    ///
    /// Compressing and sending are added up, not overlapped: the same cores seal the packets.
    pub(crate) fn level(&self) -> Option<i32> {
        let link = self.link_bytes_per_second?;
        let mut best = (1.0 / link, None);
        for grade in &GRADES {
            let compressing = 1.0 / (grade.bytes_per_second * self.cpu_idle);
            let sending = 1.0 / (link * (self.ratio * grade.relative_ratio).max(1.0));
            if compressing + sending < best.0 {
                best = (compressing + sending, Some(grade.level));
            }
        }
        best.1
    }

    /// Says whether the next run may be tried, and counts it as passed over when not.
    pub(crate) fn may_try(&mut self) -> bool {
        let may = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        may
    }

    /// Takes in that pages shrank to a `ratio`th at `level`.
    pub(crate) fn shrank(&mut self, level: i32, ratio: f64) {
        let relative = GRADES.iter().find(|grade| grade.level == level).map_or(1.0, |grade| grade.relative_ratio);
        self.ratio += RATIO_WEIGHT * ((ratio / relative).min(100.0) - self.ratio);
        self.pause = 0;
    }

    /// Takes in that pages did not shrink: the next runs are sent as they are, each time twice as many.
    pub(crate) fn stayed(&mut self) {
        self.pause = (self.pause * 2).clamp(1, LONGEST_PAUSE);
        self.skip = self.pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level_at(link: f64, idle: f64) -> Option<i32> {
        let mut judgement = Judgement::new();
        judgement.observe(link, idle);
        judgement.level()
    }

    #[test]
    fn slow_links_compress_and_fast_ones_do_not() {
        assert_eq!(Judgement::new().level(), None);
        assert_eq!(level_at(1e9, 1.0), None);
        assert_eq!(level_at(117e6, 1.0), Some(1));
        assert_eq!(level_at(1e6, 1.0), Some(3));
        assert_eq!(level_at(117e6, 0.05), None, "no core to spare");
        assert_eq!(level_at(f64::NAN, f64::NAN), None);
        assert_eq!(level_at(117e6, 0.0), None);
    }

    #[test]
    fn failures_are_retried_ever_more_seldom_until_one_works() {
        let mut judgement = Judgement::new();
        let mut tries = 0;
        for _ in 0..1000 {
            if judgement.may_try() {
                tries += 1;
                judgement.stayed();
            }
        }
        assert!((15..30).contains(&tries), "{tries} tries");
        while !judgement.may_try() {}
        judgement.shrank(1, 4.0);
        assert!(judgement.may_try() && judgement.may_try());
    }

    #[test]
    fn a_bad_ratio_is_forgotten() {
        let mut judgement = Judgement::new();
        judgement.observe(250e6, 1.0);
        for _ in 0..50 {
            judgement.shrank(1, 1.01);
        }
        assert_eq!(judgement.level(), None);
        for _ in 0..100 {
            judgement.observe(250e6, 1.0);
        }
        assert!(judgement.level().is_some());
    }
}
