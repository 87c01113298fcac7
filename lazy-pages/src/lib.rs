//! The program `lazy-pages`: serves the page faults of programs that moved here before their pages.
//!
//! The work is in `godwit-fault`; here are the command line and what an operator sees.

mod cli;
mod confine;
mod daemon;
mod show;

pub use cli::{Arguments, Command, DaemonArguments};
pub use daemon::run;
