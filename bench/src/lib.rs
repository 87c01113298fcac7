//! Whole migrations, measured: two hosts on one machine, a process of known size, and the time that each part takes.
//!
//! The process that is moved is this program again, as a *victim*: it fills memory with noise, works on it in a known way, and
//! notes how long it was not running, as it sees it itself. Every run has hosts, a page server and a victim of its own.
//! What is measured is written as a table, as JSON and as a chart. Nothing here is a test: a slow machine is no failure.

pub mod chart;
pub mod cli;
pub mod connections;
pub mod criu;
pub mod figures;
pub mod machine;
pub mod passage;
pub mod plan;
pub mod series;
pub mod status;
pub mod table;
pub mod targets;
pub mod victim;
