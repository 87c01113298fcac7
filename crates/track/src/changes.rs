//! What a tracker reports.

use godwit_pages::PageSet;

/// What became of the tracked pages since the last report. `dirty`, `absent` and `suspect` have no page in
/// common.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Pages whose content has to be sent (again).
    pub dirty: PageSet,
    /// Pages that were once reported dirty and have no content of their own any more. Anonymous and shared memory: they
    /// become holes. Private file mappings: they show the file again. Unmapped addresses are among them.
    pub absent: PageSet,
    /// The part of `dirty` that huge pages map, whole huge pages each.
    pub huge: PageSet,
    /// Pages of shared memory, none of them dirty, that may have been written all the same: not through this process's
    /// mappings, but by write(2) and the like on a descriptor. Whether they were, only their content tells: compare
    /// it with what was sent, or send them again.
    pub suspect: PageSet,
}

/// Which pages have content of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// Pages with content: in memory or swapped out.
    pub populated: PageSet,
    /// The part of `populated` that huge pages map. Empty where the kernel has no PAGEMAP_SCAN.
    pub huge: PageSet,
    /// Guard pages made by `MADV_GUARD_INSTALL`; never in `populated`. Empty before Linux 6.15.
    pub guards: PageSet,
}
