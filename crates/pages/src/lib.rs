//! Addresses, page ranges and page sets that are valid by construction.
//!
//! Everything in the engine that says *which* memory (what was written, what was sent, what is still missing) says it
//! with these types. They hold no memory and know no process: a [`PageRange`] is as good for a virtual address space
//! as for byte offsets in a shared object.
//!
//! Pure: no clock, no system call, no randomness.

mod range;
mod set;

pub use range::{PAGE_SIZE, PageRange, RangeError};
pub use set::PageSet;
