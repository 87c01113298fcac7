//! The source's side of a move: the command line, what is shown meanwhile, and the demo.

pub mod agent;
pub mod cancel;
pub mod cli;
pub mod demo;
pub mod display;
pub mod event;
pub mod handing;
pub mod hosts;
pub mod interrupt;
pub mod journal;
pub mod keeper;
pub mod log;
pub mod report;
pub mod request;
pub mod settling;
