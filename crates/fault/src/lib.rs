//! Post-copy: pages that are fetched when they are touched.
//!
//! At the destination the program already runs while some of its pages are still at the source. [`FaultService`] holds its
//! userfaultfd, answers faults, fetches the rest in the background, and lets go when nothing is missing. At the source
//! [`PageSource`] answers requests from the frozen process. The source calls; the destination asks; a lost link stalls
//! threads that fault and is taken up again from what is still missing. **Nothing is ever made up**: an address that waits for
//! content of the source is filled with that and nothing else.
//!
//! [`pending`], [`queue`] and [`latency`] are pure.

mod arrival;
#[doc(hidden)]
pub mod decoders;
mod drain_side;
mod error;
mod fault_side;
mod frozen;
mod greeting;
mod handle;
mod handover;
pub mod latency;
pub mod ledger;
mod migration;
mod orphans;
mod page_source;
pub mod pending;
mod priority;
pub mod queue;
mod second_holder;
mod service;
mod space;

pub use error::{Error, MigrationId, Result};
pub use frozen::FrozenProcess;
pub use handle::{DrainHandle, DrainReport};
pub use handover::{Event, HandoverListener, LazyDaemon};
pub use orphans::lacks_pages;
pub use page_source::{PageReader, PageSource, Serving};
pub use second_holder::{ForkedHolder, Held, InheritedHolder, Left, SecondHolder, dismiss, find_holders, recover};
pub use service::{AtEnd, FaultListenerConfig, FaultService, Migration};
