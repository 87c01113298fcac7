//! When to stop sending rounds.
//!
//! A round pays as long as it leaves clearly less to send than the one before. What is left when it does not is sent inside
//! the freeze as far as that fits the downtime target; the rest is for post-copy, where the mode has it.

use std::time::Duration;

/// Bytes in a page.
const PAGE: u64 = 4096;
/// A round must shrink the rest to this share of what it was, or rounds have stopped paying.
const WORTHWHILE: f64 = 0.75;
/// Rounds in a row that may fail to pay, in the hope of a quieter one, before the freeze is as long as it is.
const PATIENCE: u32 = 3;
/// Assumed throughput before anything was measured, bytes a second.
const FIRST_GUESS: f64 = 200e6;
/// Share of the downtime target that content may take; the rest is for stopping, collecting and rebuilding.
const CONTENT_SHARE: f64 = 0.25;
/// Rounds this small are not measured: latency drowns bandwidth.
const MEASURABLE_PAGES: u64 = 256;

/// What the user allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Most rounds to send.
    pub max_rounds: u32,
    /// Longest freeze aimed at.
    pub downtime_target: Duration,
    /// Whether a longer freeze is worse than no move.
    pub insist: bool,
}

/// A round that was sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Round {
    /// Pages sent.
    pub pages: u64,
    /// Time from the first page to the destination's word that all are in place.
    pub elapsed: Duration,
}

/// What to do with a set of changed pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send them in another round.
    SendRound,
    /// Freeze now.
    Freeze,
    /// Rounds have come to their end and the freeze would still be longer than the target.
    OutOfReach,
}

/// Follows the rounds of one migration.
#[derive(Clone, Debug)]
pub struct Convergence {
    limits: Limits,
    rounds: u32,
    bytes_per_second: Option<f64>,
    last_changed: Option<u64>,
    unpaid: u32,
}

impl Convergence {
    /// Starts before the first round.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, rounds: 0, bytes_per_second: None, last_changed: None, unpaid: 0 }
    }

    /// Takes in the figures of a round. Later rounds weigh as much as all before them.
    pub fn sent(&mut self, round: Round) {
        self.rounds += 1;
        let seconds = round.elapsed.as_secs_f64();
        if round.pages < MEASURABLE_PAGES || seconds <= 0.0 {
            return;
        }
        let measured = (round.pages * PAGE) as f64 / seconds;
        self.bytes_per_second = Some(self.bytes_per_second.map_or(measured, |before| (before + measured) / 2.0));
    }

    /// Throughput as measured, or guessed before the first round; bytes a second.
    #[must_use]
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes_per_second.unwrap_or(FIRST_GUESS)
    }

    /// Time that sending `pages` would take.
    #[must_use]
    pub fn time_for(&self, pages: u64) -> Duration {
        Duration::from_secs_f64((pages * PAGE) as f64 / self.bytes_per_second())
    }

    /// Pages whose content may be sent inside the freeze.
    #[must_use]
    pub fn freeze_budget(&self) -> u64 {
        let seconds = self.limits.downtime_target.as_secs_f64() * CONTENT_SHARE;
        (seconds * self.bytes_per_second() / PAGE as f64) as u64
    }

    /// Whether sending `pages` leaves a fifth of the target for everything else that a freeze holds.
    fn is_within_target(&self, pages: u64) -> bool {
        self.time_for(pages) <= self.limits.downtime_target.mul_f64(0.8)
    }

    /// Says that the process ran on for a while since the last decision, for other reasons than a round: what it has written
    /// meanwhile says nothing of whether rounds pay, and may take one more.
    pub fn has_waited(&mut self) {
        self.last_changed = None;
        self.unpaid = 0;
        self.limits.max_rounds = self.limits.max_rounds.saturating_add(1);
    }

    /// Decides what to do about `changed` pages found after the rounds so far, of which `deferrable` can follow after the
    /// freeze.
    pub fn next(&mut self, changed: u64, deferrable: u64) -> Decision {
        let before = self.last_changed.replace(changed);
        if self.rounds == 0 {
            return Decision::SendRound;
        }
        let firm = changed.saturating_sub(deferrable);
        let fits = changed <= self.freeze_budget();
        let pays = before.is_none_or(|before| (changed as f64) < before as f64 * WORTHWHILE);
        self.unpaid = if pays { 0 } else { self.unpaid + 1 };
        // Whoever insists on the target gets all the rounds that were allowed.
        let exhausted = self.rounds >= self.limits.max_rounds || !self.limits.insist && self.unpaid >= PATIENCE;
        match (fits, pays && !exhausted) {
            (true, _) => Decision::Freeze,
            (false, true) => Decision::SendRound,
            (false, false) if firm <= self.freeze_budget() => Decision::Freeze,
            (false, false) if exhausted && self.limits.insist && !self.is_within_target(firm) => Decision::OutOfReach,
            (false, false) if exhausted => Decision::Freeze,
            // What must be sent inside the freeze does not fit: a round that does not pay may be followed by a quieter one.
            (false, false) => Decision::SendRound,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { max_rounds: 5, downtime_target: Duration::from_millis(20), insist: true };

    /// A writer that dirties at `rate` pages a second over a link of `link` pages a second, `memory` pages at most.
    fn run(post_copy: bool, memory: u64, rate: f64, link: f64) -> (Decision, u32) {
        let mut convergence = Convergence::new(LIMITS);
        let mut changed = memory;
        for rounds in 0..100 {
            match convergence.next(changed, if post_copy { changed } else { 0 }) {
                Decision::SendRound => {
                    let elapsed = changed as f64 / link;
                    convergence.sent(Round { pages: changed, elapsed: Duration::from_secs_f64(elapsed) });
                    changed = ((rate * elapsed) as u64).min(memory);
                }
                decision => return (decision, rounds),
            }
        }
        panic!("rounds never end");
    }

    #[test]
    fn idle_memory_takes_one_round() {
        assert_eq!(run(true, 262_144, 0.0, 100_000.0), (Decision::Freeze, 1));
        assert_eq!(run(false, 262_144, 0.0, 100_000.0), (Decision::Freeze, 1));
    }

    #[test]
    fn a_wait_before_the_freeze_may_take_one_more_round() {
        let mut convergence = Convergence::new(Limits { max_rounds: 1, ..LIMITS });
        assert_eq!(convergence.next(100_000, 0), Decision::SendRound);
        convergence.sent(Round { pages: 100_000, elapsed: Duration::from_secs(1) });
        assert_eq!(convergence.next(10, 0), Decision::Freeze);
        convergence.has_waited();
        assert_eq!(convergence.next(50_000, 0), Decision::SendRound);
        convergence.sent(Round { pages: 50_000, elapsed: Duration::from_millis(500) });
        assert_eq!(convergence.next(10, 0), Decision::Freeze);
    }

    #[test]
    fn a_modest_writer_converges() {
        let (decision, rounds) = run(false, 262_144, 5_000.0, 100_000.0);
        assert_eq!(decision, Decision::Freeze);
        assert!((2..=5).contains(&rounds), "{rounds} rounds");
    }

    #[test]
    fn a_writer_faster_than_the_link_ends_in_post_copy_or_out_of_reach() {
        assert_eq!(run(true, 262_144, 200_000.0, 100_000.0).0, Decision::Freeze);
        assert_eq!(run(false, 262_144, 200_000.0, 100_000.0), (Decision::OutOfReach, 5));
    }

    #[test]
    fn what_cannot_be_deferred_must_fit() {
        let mut convergence = Convergence::new(LIMITS);
        convergence.next(100_000, 0);
        for _ in 0..4 {
            convergence.sent(Round { pages: 100_000, elapsed: Duration::from_secs(1) });
            assert_eq!(convergence.next(100_000, 50_000), Decision::SendRound);
        }
        assert_eq!(convergence.next(100_000, 99_900), Decision::Freeze);
    }

    #[test]
    fn rounds_that_never_pay_come_to_an_end_unless_the_target_is_insisted_on() {
        for (insist, rounds) in [(false, 3), (true, 30)] {
            let mut convergence = Convergence::new(Limits { max_rounds: 30, insist, ..LIMITS });
            let sent = (0..100).take_while(|_| {
                let again = convergence.next(100_000, 50_000) == Decision::SendRound;
                convergence.sent(Round { pages: 100_000, elapsed: Duration::from_secs(1) });
                again
            });
            assert_eq!(sent.count(), rounds, "insist: {insist}");
        }
    }

    #[test]
    fn small_rounds_do_not_distort_the_rate() {
        let mut convergence = Convergence::new(LIMITS);
        convergence.sent(Round { pages: 100_000, elapsed: Duration::from_secs(1) });
        let measured = convergence.bytes_per_second();
        convergence.sent(Round { pages: 3, elapsed: Duration::from_millis(5) });
        assert_eq!(convergence.bytes_per_second(), measured);
    }
}
