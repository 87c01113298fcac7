//! The destination daemon: receives processes, rebuilds them and lets them run.
//!
//! Each migration has a task that reads frames ([`migration`]) and a thread that does the work ([`workshop`]): ptrace(2)
//! answers only the thread that seized a process, so everything that touches a stub happens there, in the order in which
//! the frames came.

mod addresses;
mod arrivals;
pub mod cli;
pub mod confine;
pub mod event;
mod handing;
mod invite;
mod launching;
mod migration;
mod network;
pub mod policy;
mod registry;
mod room;
mod server;
mod standing;
mod streams;
mod workshop;

pub use invite::invite;
pub use server::{Server, Settings};
