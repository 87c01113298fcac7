//! The trait, and the choice of what implements it.

use godwit_kernel::pagemap::PagemapFile;
use godwit_kernel::uffd::Userfaultfd;

use crate::changes::Changes;
use crate::content::Abilities;
use crate::error::{Error, Result};
use crate::vma::TrackedVma;
use crate::wp_async::REQUIRED_FEATURES;

/// Finds the pages of one process that were written since they were last reported.
///
/// The order of a migration is [`arm`](Self::arm), any number of [`collect`](Self::collect), and
/// [`collect_final`](Self::collect_final) once the process is stopped for good. The mappings are handed in anew each
/// time, read from /proc/PID/maps just before.
pub trait Tracker: Send {
    /// Says how this tracker works.
    fn kind(&self) -> Kind;

    /// Begins: whatever was reported before is forgotten, and the next report holds all pages that have content.
    ///
    /// # Errors
    /// [`Error`]; nothing is tracked then.
    fn arm(&mut self, vmas: &[TrackedVma]) -> Result<()>;

    /// Reports the changes since the last report and begins the next interval, without losing a write in between.
    ///
    /// The process may run, unless [`Kind::needs_stop`]. Read the pages that are reported only after this returns.
    ///
    /// # Errors
    /// [`Error`]; the next report then holds all pages again.
    fn collect(&mut self, vmas: &[TrackedVma]) -> Result<Changes>;

    /// Reports the changes since the last report and leaves the tracking state alone: cheaper than
    /// [`collect`](Self::collect), and repeatable. The process must be stopped.
    ///
    /// # Errors
    /// [`Error`].
    fn collect_final(&mut self, vmas: &[TrackedVma]) -> Result<Changes>;
}

/// The ways to track.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Asynchronous write protection by userfaultfd and PAGEMAP_SCAN.
    WpAsync,
    /// Soft-dirty bits.
    SoftDirty,
    /// None: every page counts as written every time.
    EveryPage,
}

impl Kind {
    /// Tells whether the process must be stopped while changes are collected. Soft-dirty bits are read and cleared in
    /// two steps; a write between them would be lost.
    pub const fn needs_stop(self) -> bool {
        matches!(self, Self::SoftDirty)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::WpAsync => "asynchronous write protection",
            Self::SoftDirty => "soft-dirty bits",
            Self::EveryPage => "none",
        })
    }
}

/// Finds out which tracker works here on process `pid`, best first, by trying; nothing is done to the process.
///
/// # Errors
/// [`Error::OpenPagemap`] when the process is gone or may not be looked at.
pub fn probe(pid: i32) -> Result<Kind> {
    let pagemap = PagemapFile::open(pid).map_err(|source| Error::OpenPagemap { pid, source })?;
    if Abilities::of(&pagemap).is_some() && has_wp_async() {
        return Ok(Kind::WpAsync);
    }
    Ok(if has_soft_dirty() { Kind::SoftDirty } else { Kind::EveryPage })
}

/// Asks a userfaultfd of our own for the features.
fn has_wp_async() -> bool {
    Userfaultfd::of_self().is_ok_and(|uffd| uffd.api(REQUIRED_FEATURES).is_ok())
}

/// Writes a page of our own and looks at its bit. The files in /proc are there with or without the bits, and clearing
/// them succeeds with or without; only a bit that is set proves them.
pub(crate) fn has_soft_dirty() -> bool {
    let own = std::process::id().cast_signed();
    let page = std::hint::black_box(vec![1u8; 8192]);
    let address = (page.as_ptr() as u64).next_multiple_of(godwit_pages::PAGE_SIZE);
    let entry = PagemapFile::open(own).and_then(|pagemap| pagemap.entry(address));
    std::hint::black_box(page);
    entry.is_ok_and(|entry| entry.is_some_and(|entry| entry.is_soft_dirty()))
}
