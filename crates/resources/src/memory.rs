//! The address space: what is mapped, what backs it, and the shared objects behind it.
//!
//! Contents of pages are not handled here: which pages changed is `godwit-track`'s business, moving them the programs'.

pub mod aio;
mod backing;
mod layout;
mod objects;
pub mod segments;
mod sharers;
pub(crate) mod smaps;

pub use backing::Backing;
pub use layout::{Layout, LayoutReader, Marks, inspect};
pub use objects::{Object, Objects};
pub use smaps::awaits_pages;
