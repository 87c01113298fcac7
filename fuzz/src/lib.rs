//! Fuzzing on stable Rust: every decoder of words that others say is fed with damaged examples of the real thing.
//!
//! A *target* is one decoder, a function of bytes that changes nothing and says how much it has understood. An *example* is
//! something that was really said: a frame of a migration, a file of /proc. Examples are mutated, and an input
//! that takes an edge of the decoder's control flow that none took before becomes an example itself. Where edges are not counted (in
//! tests; `fuzz/run` builds decoders that do) it is one that is understood in a new way: a cheap stand-in. What must not happen is a panic, more
//! memory than the input accounts for, or more than a moment's work.

mod corpus;
mod coverage;
mod journal;
mod mutation;
mod proc_text;
mod run;
mod targets;
mod wire;

pub use corpus::{crashes, examples, keep};
pub use mutation::{Chance, damaged};
pub use run::{Finding, Memory, Tally, fuzz, replay};
pub use targets::{Target, all, named};
