//! What is said of callers that are turned away. Anybody can call, under any address, as often as the network carries: a log that told of each
//! would be full of nothing else.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What is told of in [`PERIOD`], at most.
const MOST: u32 = 20;
/// After this time as many may be told of again.
const PERIOD: Duration = Duration::from_secs(60);

/// Says which of many like cases are to be told of.
#[derive(Debug, Default)]
pub struct Complaints(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    since: Option<Instant>,
    told: u32,
    passed_over: u64,
}

impl Complaints {
    /// Nothing was told of yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new(State { since: None, told: 0, passed_over: 0 }))
    }

    /// Whether one more is to be told of; if so, what to say with it of those that were not (nothing where there were none).
    pub fn one_more(&self) -> Option<String> {
        self.at(Instant::now())
    }

    fn at(&self, now: Instant) -> Option<String> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.since.is_none_or(|since| now.saturating_duration_since(since) >= PERIOD) {
            (state.since, state.told) = (Some(now), 0);
        }
        if state.told >= MOST {
            state.passed_over += 1;
            return None;
        }
        state.told += 1;
        let passed_over = std::mem::take(&mut state.passed_over);
        let last = if state.told == MOST { ", of more nothing is said for a minute" } else { "" };
        Some(match passed_over {
            0 => last.to_owned(),
            number => format!(" ({number} more before it){last}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_are_told_of_and_the_rest_are_counted() {
        let (complaints, begun) = (Complaints::new(), Instant::now());
        let told: Vec<String> = (0..50).filter_map(|_| complaints.at(begun)).collect();
        assert_eq!(told.len(), MOST as usize);
        assert_eq!((told[0].as_str(), told[19].as_str()), ("", ", of more nothing is said for a minute"));
        assert_eq!(complaints.at(begun + PERIOD).as_deref(), Some(" (30 more before it)"));
        assert_eq!(complaints.at(begun + PERIOD).as_deref(), Some(""));
    }
}
