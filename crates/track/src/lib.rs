//! Which pages of a process were written since they were last sent.
//!
//! Three trackers stand behind one trait, [`Tracker`]; [`probe`] says which one this kernel allows:
//!
//! | | needs | while the process runs | blind to |
//! |---|---|---|---|
//! | [`WpAsync`] | Linux 6.7 | yes | shared memory written elsewhere |
//! | [`SoftDirty`] | `CONFIG_MEM_SOFT_DIRTY` | no | nothing, but all shared memory always counts as written |
//! | [`EveryPage`] | nothing | yes | nothing: every page always counts as written |
//!
//! "Shared memory written elsewhere" is what no tracker of one address space can see: another process's mapping, or
//! write(2) on the object's descriptor. The latter is at least suspected ([`Changes::suspect`]); the former is for
//! the caller to refuse, or to track in every process that maps the object.
//!
//! A tracker reads only the pagemap. It is told the current mappings each time, reads no memory, sends nothing and
//! never stops the process. It holds the process's userfaultfd, or its soft-dirty bits, for itself.

mod changes;
mod content;
mod error;
mod every_page;
mod residency;
mod shared_object;
mod soft_dirty;
mod tracker;
mod vma;
mod wp_async;

pub use changes::{Changes, Residency};
pub use error::{Error, Result};
pub use every_page::EveryPage;
pub use residency::{guards, populated};
pub use soft_dirty::SoftDirty;
pub use tracker::{Kind, Tracker, probe};
pub use vma::{TrackedVma, VmaKind};
pub use wp_async::{REQUIRED_FEATURES, WpAsync};
