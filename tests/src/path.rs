//! What a long way does to packets: time, losses, disorder and a narrow line. A model without clock or socket; the relay feeds it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Longest time that a frame waits for a narrow line before it is dropped, as the buffer of a router would.
const QUEUE: Duration = Duration::from_millis(200);

/// The way between two interfaces; the same in both directions. By default it does nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Path {
    /// Time that a frame is under way.
    pub delay: Duration,
    /// How many of a thousand frames are lost.
    pub lost_permille: u32,
    /// How many of a thousand frames take half as long again and one millisecond: others overtake them.
    pub late_permille: u32,
    /// Bytes a second that the line takes, without a limit if there is none.
    pub bytes_per_second: Option<u64>,
    /// Another seed loses other frames.
    pub seed: u64,
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Carried,
    Late,
    Lost,
}

/// One direction of a path, with what is under way on it.
#[derive(Debug)]
pub(crate) struct Lane<T> {
    path: Path,
    random: u64,
    line_is_free: Option<Instant>,
    /// By the time of arrival; equal ones in their order.
    under_way: BTreeMap<(Instant, u64), T>,
    number: u64,
}

impl<T> Lane<T> {
    pub(crate) fn new(path: Path) -> Self {
        // Zero is the one state that this kind of generator does not leave.
        let random = path.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self { path, random, line_is_free: None, under_way: BTreeMap::new(), number: 0 }
    }

    /// Whether something happens that happens to so many of a thousand.
    fn happens(&mut self, permille: u32) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 32) % 1000 < permille.into()
    }

    /// Sends a frame of so many bytes on its way.
    pub(crate) fn put(&mut self, now: Instant, bytes: usize, frame: T) -> Fate {
        // N.B. both are drawn for each frame: what is lost does not depend on what is late.
        let (lost, late) = (self.happens(self.path.lost_permille), self.happens(self.path.late_permille));
        if lost {
            return Fate::Lost;
        }
        let mut arrival = now;
        if let Some(rate) = self.path.bytes_per_second {
            let begun = self.line_is_free.map_or(now, |free| free.max(now));
            if begun - now > QUEUE {
                return Fate::Lost;
            }
            arrival = begun + Duration::from_nanos(bytes as u64 * 1_000_000_000 / rate.max(1));
            self.line_is_free = Some(arrival);
        }
        arrival += self.path.delay;
        if late {
            arrival += self.path.delay / 2 + Duration::from_millis(1);
        }
        self.number += 1;
        self.under_way.insert((arrival, self.number), frame);
        if late { Fate::Late } else { Fate::Carried }
    }

    /// When the next frame arrives.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.under_way.keys().next().map(|&(arrival, _)| arrival)
    }

    /// Takes a frame that has arrived.
    pub(crate) fn take(&mut self, now: Instant) -> Option<T> {
        let first = self.under_way.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Puts so many frames of a thousand bytes, one a millisecond, and yields when which arrived.
    fn send(path: Path, count: u32) -> Vec<(Duration, u32)> {
        let start = Instant::now();
        let mut lane = Lane::new(path);
        for number in 0..count {
            lane.put(start + Duration::from_millis(number.into()), 1000, number);
        }
        let mut arrived = Vec::new();
        while let Some(next) = lane.next() {
            let frame = lane.take(next).expect("the next one arrives when it says");
            arrived.push((next - start, frame));
        }
        arrived
    }

    fn milliseconds(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    #[test]
    fn a_path_that_does_nothing_changes_nothing() {
        let expected: Vec<_> = (0..50).map(|number| (milliseconds(number), number as u32)).collect();
        assert_eq!(send(Path::default(), 50), expected);
    }

    #[test]
    fn every_frame_is_delayed() {
        let path = Path { delay: milliseconds(50), ..Path::default() };
        assert!(send(path, 50).iter().all(|&(at, number)| at == milliseconds(u64::from(number) + 50)));
        let mut lane = Lane::new(path);
        let now = Instant::now();
        lane.put(now, 1, ());
        assert_eq!(lane.take(now + milliseconds(49)), None);
        assert_eq!(lane.take(now + milliseconds(50)), Some(()));
        assert_eq!(lane.next(), None);
    }

    #[test]
    fn as_many_are_lost_as_shall_be_and_the_same_ones_again() {
        let path = Path { lost_permille: 100, seed: 7, ..Path::default() };
        let arrived = send(path, 10_000);
        assert!((8800..9200).contains(&arrived.len()), "{}", arrived.len());
        assert_eq!(send(path, 10_000), arrived);
        assert_ne!(send(Path { seed: 8, ..path }, 10_000), arrived);
    }

    #[test]
    fn late_frames_are_overtaken() {
        let arrived = send(Path { delay: milliseconds(4), late_permille: 50, ..Path::default() }, 2000);
        let overtaken = arrived.windows(2).filter(|pair| pair[0].1 > pair[1].1).count();
        assert_eq!(arrived.len(), 2000);
        assert!((50..150).contains(&overtaken), "{overtaken}");
    }

    #[test]
    fn a_narrow_line_takes_its_time_and_drops_what_would_wait_too_long() {
        // Half of what is sent.
        let arrived = send(Path { bytes_per_second: Some(500_000), ..Path::default() }, 2000);
        assert!(arrived.windows(2).all(|pair| pair[1].0 - pair[0].0 >= milliseconds(2)));
        assert!((1000..1150).contains(&arrived.len()), "{}", arrived.len());
    }
}
