//! What a userfaultfd says: the 32-byte messages that `read(2)` returns.

/// A fault in a registered range.
pub const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// The process forked; the child has a userfaultfd of its own.
pub const UFFD_EVENT_FORK: u8 = 0x13;
/// A registered range was moved by mremap(2).
pub const UFFD_EVENT_REMAP: u8 = 0x14;
/// Pages of a registered range were dropped by madvise(2).
pub const UFFD_EVENT_REMOVE: u8 = 0x15;
/// A registered range was unmapped.
pub const UFFD_EVENT_UNMAP: u8 = 0x16;

/// The fault was a write.
pub const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
/// The fault hit write protection.
pub const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;
/// The page is in the page cache and only its mapping is missing.
pub const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

/// One message.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg {
    /// `UFFD_EVENT_*`.
    pub event: u8,
    /// Zero.
    pub reserved1: u8,
    /// Zero.
    pub reserved2: u16,
    /// Zero.
    pub reserved3: u32,
    /// What happened, by `event`.
    pub arg: uffd_msg_arg,
}

/// The part of a message that depends on the event.
#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg_arg {
    /// Of [`UFFD_EVENT_PAGEFAULT`].
    pub pagefault: uffd_msg_pagefault,
    /// Of [`UFFD_EVENT_FORK`].
    pub fork: uffd_msg_fork,
    /// Of [`UFFD_EVENT_REMAP`].
    pub remap: uffd_msg_remap,
    /// Of [`UFFD_EVENT_REMOVE`] and [`UFFD_EVENT_UNMAP`].
    pub remove: uffd_msg_remove,
    /// Keeps the size fixed.
    pub reserved: [u64; 3],
}

/// Argument of a page fault.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg_pagefault {
    /// `UFFD_PAGEFAULT_FLAG_*`.
    pub flags: u64,
    /// What was touched.
    pub address: u64,
    /// What a feature adds.
    pub feat: uffd_msg_pagefault_feat,
}

/// The part of a page fault that depends on a feature.
#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg_pagefault_feat {
    /// The thread, where `UFFD_FEATURE_THREAD_ID` was asked for.
    pub ptid: u32,
}

/// Argument of a fork.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg_fork {
    /// The child's userfaultfd, a descriptor of the reader.
    pub ufd: u32,
}

/// Argument of an mremap.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg_remap {
    /// Where the range was.
    pub from: u64,
    /// Where it is now.
    pub to: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Argument of a removal or an unmapping.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg_remove {
    /// First byte.
    pub start: u64,
    /// First byte after.
    pub end: u64,
}

const _: () = {
    assert!(size_of::<uffd_msg>() == 32);
    assert!(core::mem::offset_of!(uffd_msg, arg) == 8);
};
