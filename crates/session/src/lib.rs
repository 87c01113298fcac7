//! The course of a migration, without any process or wire: which phases a mode has, when pre-copy has done its part, and
//! which message may follow which, and which copy may run. No clock, socket or randomness inside: durations and counts are arguments.

mod convergence;
pub mod decision;
mod order;
mod phase;

pub use convergence::{Convergence, Decision, Limits, Round};
pub use order::{Destination, OutOfOrder, Received};
pub use phase::{Mode, Phase};
