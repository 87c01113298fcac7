//! Building a process at the destination while the original still runs.
//!
//! A [`Builder`] owns one stub and brings it, by differences, from whatever it is to whatever a state message says:
//! [`Builder::prepare`] makes it, [`Builder::layout`] and [`Builder::write_pages`] follow the running source,
//! [`Builder::finish`] adds what is collected inside the freeze, and [`Launch`] lets it run. Until then dropping the builder
//! leaves nothing behind.
//!
//! Nothing here knows of a network. A builder is bound to the thread that made it (ptrace(2)).

mod address_space;
mod birth;
mod builder;
mod check;
#[doc(hidden)]
pub mod decoders;
mod error;
mod huge;
mod marks;
mod missing;
mod objects;

pub use birth::Clocks;
pub use builder::{Builder, Launch, Plan};
pub use check::check;
pub use error::Error;
pub use huge::make_huge;
pub use missing::Missing;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
