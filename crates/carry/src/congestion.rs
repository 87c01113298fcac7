//! Which lost packets mean that less has to be sent.
//!
//! Cubic takes each loss for a full queue. Where packets are lost by themselves (2 % on a path of 100 ms round trip), that leaves a
//! hundredth of what the path carries, and a move would never end. A full queue shows in the round trip, too: it is
//! longer than it was when nothing waited. So a loss without delay is passed over, as long as no more than a share of all is lost:
//! where there is next to no queue, or a policer, only that tells.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;

/// Share of what is sent that may be lost by itself.
const TOLERATED: f64 = 0.05;
/// Bytes of which that share is a share worth looking at.
const SAMPLE: u64 = 512 << 10;
/// A round trip so many times the shortest one has a queue in it ...
const QUEUED: f64 = 1.25;
/// ... if it is longer by this, too: less is the time that busy hosts take.
const NOTICEABLE: Duration = Duration::from_millis(4);

/// Makes [`Cubic`](CubicConfig)s that tell the two kinds of loss apart.
#[derive(Debug)]
pub(crate) struct Discerning(pub(crate) Arc<CubicConfig>);

impl ControllerFactory for Discerning {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Discerner { inner: self.0.clone().build(now, current_mtu), losses: Losses::default() })
    }
}

struct Discerner {
    inner: Box<dyn Controller>,
    losses: Losses,
}

/// What was delivered and lost of late, and how long that took.
#[derive(Clone, Debug, Default)]
struct Losses {
    delivered: u64,
    lost: u64,
    round_trip: Duration,
    shortest: Duration,
}

impl Losses {
    fn delivered(&mut self, bytes: u64, round_trip: Duration, shortest: Duration) {
        self.delivered += bytes;
        (self.round_trip, self.shortest) = (round_trip, shortest);
    }

    /// Takes in a loss; says whether it has to do with how much is sent.
    fn is_congestion(&mut self, bytes: u64, window: u64) -> bool {
        self.lost += bytes;
        let share = self.lost as f64 / (self.lost + self.delivered) as f64;
        let sample = SAMPLE.max(2 * window);
        let is_share = self.lost + self.delivered >= SAMPLE;
        while self.lost + self.delivered > sample {
            (self.lost, self.delivered) = (self.lost / 2, self.delivered / 2);
        }
        let waits = self.round_trip > self.shortest.mul_f64(QUEUED) && self.round_trip > self.shortest + NOTICEABLE;
        waits || is_share && share > TOLERATED
    }
}

impl Controller for Discerner {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.losses.delivered(bytes, rtt.get(), rtt.min());
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.inner.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        // N.B. no bytes: a router has said so itself (ECN).
        let congested = self.losses.is_congestion(lost_bytes, self.inner.window());
        if is_persistent_congestion || lost_bytes == 0 || congested {
            self.inner.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { inner: self.inner.clone_box(), losses: self.losses.clone() })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTU: u64 = 1452;
    const WINDOW: u64 = 1 << 20;

    /// Of so many packets, how many losses count; one of `each` is lost.
    fn counted(round_trip_ms: u64, shortest_ms: u64, each: u64) -> u64 {
        let mut losses = Losses::default();
        let mut counted = 0;
        for packet in 1..=10_000u64 {
            if packet.is_multiple_of(each) {
                counted += u64::from(losses.is_congestion(MTU, WINDOW));
            } else {
                losses.delivered(MTU, Duration::from_millis(round_trip_ms), Duration::from_millis(shortest_ms));
            }
        }
        counted
    }

    #[test]
    fn a_loss_without_a_queue_does_not_count() {
        assert_eq!(counted(101, 100, 50), 0);
        // Busy hosts on a short path.
        assert_eq!(counted(3, 1, 50), 0);
    }

    #[test]
    fn a_loss_with_a_queue_counts() {
        assert_eq!(counted(160, 100, 50), 200);
        assert_eq!(counted(50, 1, 1000), 10);
    }

    #[test]
    fn many_losses_count_whatever_the_queue() {
        assert!(counted(100, 100, 10) > 900);
    }

    #[test]
    fn losses_of_long_ago_are_forgotten() {
        let mut losses = Losses::default();
        for _ in 0..2000 {
            losses.is_congestion(MTU, WINDOW);
        }
        for _ in 0..50_000 {
            losses.delivered(MTU, Duration::from_millis(10), Duration::from_millis(10));
        }
        assert!(!losses.is_congestion(MTU, WINDOW));
    }
}
