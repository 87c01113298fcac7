//! What a tracker needs to know of a mapping.

use godwit_pages::PageRange;

/// A mapping whose content is to be tracked.
///
/// Leave out what has no content of its own: vdso, vvar, vsyscall, and shared file mappings that cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackedVma {
    /// Where it lies.
    pub range: PageRange,
    /// What backs it.
    pub kind: VmaKind,
    /// The same with the unmapped places before and after it, never less: what has come to lie there since is tracked with it.
    pub room: PageRange,
    /// Offset of its first byte in the object it maps; 0 for [`VmaKind::PrivateAnonymous`].
    pub offset: u64,
}

/// What backs a mapping, and so which of its pages have content that only this process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VmaKind {
    /// Private memory without a file: heap, stacks, `MAP_ANONYMOUS | MAP_PRIVATE`, private mappings of /dev/zero.
    PrivateAnonymous,
    /// A private file mapping: only the pages that were written (copied on write) have content of their own.
    PrivateFile,
    /// Shared anonymous memory, a memfd, a System V segment or a file on tmpfs.
    SharedMemory,
    /// A writable shared mapping of a file on a real file system.
    SharedFile,
    /// Private memory of hugetlb pages.
    PrivateHugetlb,
    /// Shared memory of hugetlb pages.
    SharedHugetlb,
}
