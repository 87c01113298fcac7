//! Two hosts on one machine, and programs to move between them.
//!
//! A host is a set of namespaces (network, PID, mount, IPC, UTS, perhaps time) kept alive by an `init` that dies with
//! the test, whatever ends the test. Two of them are joined by a virtual Ethernet pair and share the file system, so
//! that every path means the same file on both. A *victim* (see `tests/victims`) is a tiny program that checks one
//! kernel behaviour in itself without end and says at SIGTERM whether it ever saw anything wrong.
//!
//! ```no_run
//! use godwit_tests::{Mode, TwoHosts};
//! # fn main() -> anyhow::Result<()> {
//! let hosts = TwoHosts::new()?;
//! let mut victim = hosts.source.victim("memory", &["4", "32", "20"])?;
//! let server = hosts.destination.page_server(&hosts.token)?;
//! let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::Hybrid).run()?;
//! migration.expect_moved()?;
//! victim.follow(&hosts.destination, &migration)?;
//! victim.expect_beats(20)?;
//! victim.finish()?;
//! # Ok(())
//! # }
//! ```
//!
//! Needs root, and the programs `setpriv`, `unshare`, `nsenter` (util-linux), `ip` and `tc` (iproute2).

mod agents;
mod asker;
mod binaries;
pub mod clients;
mod deadline;
pub mod faults;
mod firewall;
mod footprint;
mod go_between;
mod host;
mod memory_group;
mod migration;
mod outcome;
mod path;
mod peer;
mod proc_view;
mod process;
mod refusal;
mod relay;
mod service;
mod soak;
mod taken_over;
mod trip;
mod two_hosts;
mod victim;

pub use agents::{LazyPages, PageServer, PageServerOptions};
pub use asker::Asker;
pub use binaries::{program, python, victim_program};
pub use deadline::{wait_for, wait_until};
pub use firewall::stand_strict_guard;
pub use footprint::Footprint;
pub use go_between::{GoBetween, Instead, Said, Speaker, corpus_folder};
pub use host::{Host, HostOptions, PidSpace};
pub use memory_group::MemoryGroup;
pub use migration::{Migrate, Mode, RunningMigration};
pub use outcome::Migration;
pub use path::Path;
pub use peer::{Farewell, Peer, message_frame};
pub use proc_view::{ProcView, is_alive, pid_inside};
pub use process::{Finished, Running};
pub use refusal::expect_untouched;
pub use relay::{Relay, Traffic};
pub use service::Service;
pub use soak::{Course, Tally, soak};
pub use taken_over::TakenOver;
pub use trip::Trip;
pub use two_hosts::{Token, TwoHosts, TwoHostsBuilder};
pub use victim::{Status, Victim};
