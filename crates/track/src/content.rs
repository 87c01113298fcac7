//! Which pages of a mapping have content of their own, put as questions to the pagemap.
//!
//! Owns the masks. Each was chosen by what it costs and by what it misses:
//! - Private memory: anything present or swapped except the page of zeros. Asking for `WRITTEN` alone would also
//!   match holes and, when protecting, fill them with markers: 2 MiB of page tables a GiB.
//! - Private file mappings: only what is not the file's. `FILE` costs 20 times as much to be told, so it is asked for
//!   here only.
//! - Shared memory: `WRITTEN` alone. A page written and then zapped (MADV_DONTNEED, reclaim) is neither present nor
//!   swapped *here*, but the object still has it.
//!
//! A *marker* is what a write-protected page of a file mapping leaves behind when it is zapped: it looks swapped and
//! not written. Only the classic entry tells it from a page in swap.

use godwit_kernel::pagemap::{Categories, Entry, PagemapFile, ScanRequest};

use crate::vma::VmaKind;

/// What this kernel and this process's pagemap can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// PAGEMAP_SCAN knows guard pages (Linux 6.15).
    pub(crate) guards: bool,
}

impl Abilities {
    /// Finds them out; `None` where there is no PAGEMAP_SCAN.
    pub(crate) fn of(pagemap: &PagemapFile) -> Option<Self> {
        let guards = ScanRequest { category_mask: Categories::GUARD, ..ScanRequest::default() };
        // Nothing is ever mapped in the first page of the search, so neither scan costs anything.
        let guards = pagemap.scan_each(0..4096, &guards, |_| ()).is_ok();
        pagemap.can_scan().then_some(Self { guards })
    }

    /// Returns the question for the pages of a `kind` of memory that have content of their own.
    pub(crate) fn content(self, kind: VmaKind) -> ScanRequest {
        let guard = if self.guards { Categories::GUARD } else { Categories::NONE };
        let without = |excluded: Categories, anyof, returned| ScanRequest {
            category_mask: excluded,
            category_inverted: excluded,
            category_anyof_mask: anyof,
            return_mask: returned,
            ..ScanRequest::default()
        };
        let somewhere = Categories::PRESENT | Categories::SWAPPED;
        match kind {
            VmaKind::PrivateAnonymous | VmaKind::PrivateHugetlb => {
                without(guard | Categories::ZERO_PAGE, somewhere, Categories::HUGE)
            }
            VmaKind::PrivateFile => {
                without(guard | Categories::FILE, somewhere, Categories::HUGE | Categories::SWAPPED)
            }
            VmaKind::SharedMemory => without(Categories::NONE, Categories::NONE, Categories::HUGE),
            VmaKind::SharedFile | VmaKind::SharedHugetlb => {
                without(Categories::NONE, Categories::NONE, Categories::HUGE | Categories::PRESENT)
            }
        }
    }
}

/// Tells, from a classic entry, whether a page of a `kind` of memory has content of its own that is visible in this
/// mapping.
pub(crate) fn has_content(kind: VmaKind, entry: Entry) -> bool {
    let swapped = entry.is_swapped() && entry.is_marker() != Some(true);
    match kind {
        VmaKind::PrivateAnonymous | VmaKind::PrivateHugetlb => entry.is_present() || swapped,
        VmaKind::PrivateFile => (entry.is_present() && !entry.is_file_or_shared()) || swapped,
        VmaKind::SharedMemory | VmaKind::SharedFile | VmaKind::SharedHugetlb => entry.is_present(),
    }
}
