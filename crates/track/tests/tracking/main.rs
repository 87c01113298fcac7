//! Trackers against real processes: every behaviour of memory that could make a report wrong, one test each.
//!
//! Each test keeps a copy of a victim's memory by a tracker's reports alone and compares in the end.

mod private;
mod shared;
mod stress;
mod victim;
