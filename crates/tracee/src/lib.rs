//! A stopped process: its threads, registers and memory, and system calls that it is made to run for us.
//!
//! [`Tracee`] is the handle. It is bound to the thread that seized the process (ptrace(2) requires it) and is not `Send`.
//! Dropping it gives an existing process back exactly as it was found, and kills a stub.
//!
//! Should this program be killed the process stops, and what was changed in it stands in a [`Ledger`], if there is one: then
//! [`ledger::mend`] gives it back.
//!
//! The same primitive serves both ends of a migration: a [`Batch`] of system calls, executed inside the tracee by a loop of
//! a few dozen bytes ([`godwit_kernel::blob`]) in one scratch mapping, costs 0.2 µs a call instead of the 20 µs of a call
//! made through registers and a single step.

mod batch;
mod error;
mod freeze;
pub mod ledger;
mod maps;
mod park;
mod program;
mod remote;
mod status;
mod tracee;

pub use batch::{Arg, Batch, Buffer, Call, Outcome};
pub use error::Error;
pub use freeze::Extent;
pub use ledger::Ledger;
pub use maps::{Vma, parse_maps, read_maps};
pub use park::is_parked;
pub use program::Program;
pub use status::{Status, parse_status, read_status};
pub use tracee::{Stop, Thread, ThreadState, Tracee};

pub use godwit_kernel::ptrace::Registers;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
