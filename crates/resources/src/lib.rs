//! What a process holds: one file per kind of kernel resource, with how it is inspected, collected and rebuilt side by side.
//!
//! *Inspecting* looks at a running process from outside and names what cannot be moved. *Collecting* runs while it is
//! frozen and yields the state messages of [`godwit_proto::image`]. *Rebuilding* makes a stub hold the same again.
//! Nothing here knows of a network or decides when any of it happens.

pub mod credentials;
#[doc(hidden)]
pub mod decoders;
pub mod descriptors;
mod error;
pub mod files;
pub mod filesystem;
pub mod host;
pub mod identity;
pub mod limits;
pub mod memory;
mod obstacle;
mod parallel;
pub mod registers;
pub mod restart;
pub mod scheduling;
pub mod seccomp;
pub mod signals;
pub mod threads;
pub mod timers;

pub use error::Error;
pub use obstacle::{LEAVE_BEHIND, Obstacle};

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
