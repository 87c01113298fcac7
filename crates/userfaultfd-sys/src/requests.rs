//! What a program asks of a userfaultfd: ioctl numbers, feature and mode bits, argument structs.

/// The only version of the API there is; goes into [`uffdio_api::api`].
pub const UFFD_API: u64 = 0xAA;
/// The ioctl type of all userfaultfd requests.
pub const UFFDIO: u8 = 0xAA;
/// The ioctl type of requests on `/dev/userfaultfd`.
pub const USERFAULTFD_IOC: u8 = 0xAA;
/// Flag of `userfaultfd(2)`: handle faults from user mode only, which needs no privilege.
pub const UFFD_USER_MODE_ONLY: u32 = 1;

macro_rules! documented {
    ($kind:ty: $($name:ident = $value:expr, $text:literal;)+) => {
        $(#[doc = $text] pub const $name: $kind = $value;)+
    };
}

documented! {
    u64:
    _UFFDIO_REGISTER = 0x00, "Ioctl number of UFFDIO_REGISTER.";
    _UFFDIO_UNREGISTER = 0x01, "Ioctl number of UFFDIO_UNREGISTER.";
    _UFFDIO_WAKE = 0x02, "Ioctl number of UFFDIO_WAKE.";
    _UFFDIO_COPY = 0x03, "Ioctl number of UFFDIO_COPY.";
    _UFFDIO_ZEROPAGE = 0x04, "Ioctl number of UFFDIO_ZEROPAGE.";
    _UFFDIO_MOVE = 0x05, "Ioctl number of UFFDIO_MOVE.";
    _UFFDIO_WRITEPROTECT = 0x06, "Ioctl number of UFFDIO_WRITEPROTECT.";
    _UFFDIO_CONTINUE = 0x07, "Ioctl number of UFFDIO_CONTINUE.";
    _UFFDIO_POISON = 0x08, "Ioctl number of UFFDIO_POISON.";
    _UFFDIO_API = 0x3F, "Ioctl number of UFFDIO_API.";
}

documented! {
    u32:
    UFFDIO_API = request(READ_WRITE, size_of::<uffdio_api>(), _UFFDIO_API), "Agrees on version and features.";
    UFFDIO_REGISTER = request(READ_WRITE, size_of::<uffdio_register>(), _UFFDIO_REGISTER), "Registers a range.";
    UFFDIO_UNREGISTER = request(READ, size_of::<uffdio_range>(), _UFFDIO_UNREGISTER), "Unregisters a range.";
    UFFDIO_WAKE = request(READ, size_of::<uffdio_range>(), _UFFDIO_WAKE), "Wakes the threads that wait in a range.";
    UFFDIO_COPY = request(READ_WRITE, size_of::<uffdio_copy>(), _UFFDIO_COPY), "Fills missing pages with content.";
    UFFDIO_ZEROPAGE = request(READ_WRITE, size_of::<uffdio_zeropage>(), _UFFDIO_ZEROPAGE), "Fills missing pages with zeros.";
    UFFDIO_MOVE = request(READ_WRITE, size_of::<uffdio_move>(), _UFFDIO_MOVE), "Moves pages within one address space.";
    UFFDIO_WRITEPROTECT = request(READ_WRITE, size_of::<uffdio_writeprotect>(), _UFFDIO_WRITEPROTECT), "Write-protects pages, or lets go of them.";
    UFFDIO_CONTINUE = request(READ_WRITE, size_of::<uffdio_continue>(), _UFFDIO_CONTINUE), "Maps pages that are in the page cache.";
    UFFDIO_POISON = request(READ_WRITE, size_of::<uffdio_poison>(), _UFFDIO_POISON), "Makes missing pages raise SIGBUS.";
}

documented! {
    u64:
    UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0, "Write-protect faults of anonymous memory.";
    UFFD_FEATURE_EVENT_FORK = 1 << 1, "Reports fork.";
    UFFD_FEATURE_EVENT_REMAP = 1 << 2, "Reports mremap.";
    UFFD_FEATURE_EVENT_REMOVE = 1 << 3, "Reports MADV_DONTNEED and MADV_REMOVE.";
    UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4, "Missing faults of hugetlbfs.";
    UFFD_FEATURE_MISSING_SHMEM = 1 << 5, "Missing faults of shared memory.";
    UFFD_FEATURE_EVENT_UNMAP = 1 << 6, "Reports munmap.";
    UFFD_FEATURE_SIGBUS = 1 << 7, "Raises SIGBUS instead of reporting a fault.";
    UFFD_FEATURE_THREAD_ID = 1 << 8, "Reports the faulting thread.";
    UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9, "Minor faults of hugetlbfs.";
    UFFD_FEATURE_MINOR_SHMEM = 1 << 10, "Minor faults of shared memory.";
    UFFD_FEATURE_EXACT_ADDRESS = 1 << 11, "Reports the byte, not the page, that faulted.";
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12, "Write-protect faults of hugetlbfs and shared memory.";
    UFFD_FEATURE_WP_UNPOPULATED = 1 << 13, "Write protection of anonymous pages that are not there yet.";
    UFFD_FEATURE_POISON = 1 << 14, "UFFDIO_POISON.";
    UFFD_FEATURE_WP_ASYNC = 1 << 15, "Write-protect faults resolved by the kernel, for tracking.";
    UFFD_FEATURE_MOVE = 1 << 16, "UFFDIO_MOVE.";
}

documented! {
    u64:
    UFFDIO_REGISTER_MODE_MISSING = 1 << 0, "Reports faults on missing pages.";
    UFFDIO_REGISTER_MODE_WP = 1 << 1, "Reports (or tracks) writes to protected pages.";
    UFFDIO_REGISTER_MODE_MINOR = 1 << 2, "Reports faults on pages that are in the page cache but not mapped.";
    UFFDIO_COPY_MODE_DONTWAKE = 1 << 0, "Leaves the waiting threads asleep.";
    UFFDIO_COPY_MODE_WP = 1 << 1, "Maps the page write-protected.";
    UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1 << 0, "Leaves the waiting threads asleep.";
    UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0, "Protects; without it, protection is taken away.";
    UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1, "Leaves the waiting threads asleep.";
    UFFDIO_CONTINUE_MODE_DONTWAKE = 1 << 0, "Leaves the waiting threads asleep.";
    UFFDIO_CONTINUE_MODE_WP = 1 << 1, "Maps the page write-protected.";
    UFFDIO_POISON_MODE_DONTWAKE = 1 << 0, "Leaves the waiting threads asleep.";
    UFFDIO_MOVE_MODE_DONTWAKE = 1 << 0, "Leaves the waiting threads asleep.";
    UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES = 1 << 1, "Lets the source have unmapped pages.";
}

documented! {
    u64:
    UFFD_API_IOCTLS = 1 << _UFFDIO_REGISTER | 1 << _UFFDIO_UNREGISTER | 1 << _UFFDIO_API, "Requests every userfaultfd takes.";
    UFFD_API_RANGE_IOCTLS_BASIC = 1 << _UFFDIO_WAKE | 1 << _UFFDIO_COPY, "Requests that hugetlbfs ranges take.";
    UFFD_API_RANGE_IOCTLS = UFFD_API_RANGE_IOCTLS_BASIC | 1 << _UFFDIO_ZEROPAGE | 1 << _UFFDIO_WRITEPROTECT
        | 1 << _UFFDIO_CONTINUE, "Requests that a registered range may take.";
    UFFD_API_FEATURES = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE
        | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MISSING_SHMEM
        | UFFD_FEATURE_SIGBUS | UFFD_FEATURE_THREAD_ID, "Features of the oldest kernels that matter.";
}

const READ: u32 = 2;
const READ_WRITE: u32 = 3;

/// Puts an ioctl request number together as x86_64 and most others do: direction, size, type, number.
const fn request(direction: u32, size: usize, number: u64) -> u32 {
    direction << 30 | (size as u32) << 16 | (UFFDIO as u32) << 8 | number as u32
}

/// Argument of `UFFDIO_API`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_api {
    /// [`UFFD_API`].
    pub api: u64,
    /// Asked-for features in, available features out.
    pub features: u64,
    /// Available requests out.
    pub ioctls: u64,
}

/// A byte range of the registered address space; argument of `UFFDIO_UNREGISTER` and `UFFDIO_WAKE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_range {
    /// First byte, page aligned.
    pub start: u64,
    /// Length in bytes, page aligned.
    pub len: u64,
}

/// Argument of `UFFDIO_REGISTER`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_register {
    /// What to register.
    pub range: uffdio_range,
    /// `UFFDIO_REGISTER_MODE_*`.
    pub mode: u64,
    /// Requests the range takes, out.
    pub ioctls: u64,
}

/// Argument of `UFFDIO_COPY`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_copy {
    /// Address to fill.
    pub dst: u64,
    /// Address in the caller to copy from.
    pub src: u64,
    /// Length in bytes.
    pub len: u64,
    /// `UFFDIO_COPY_MODE_*`.
    pub mode: u64,
    /// Bytes copied or a negated errno, out.
    pub copy: i64,
}

/// Argument of `UFFDIO_ZEROPAGE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_zeropage {
    /// What to fill.
    pub range: uffdio_range,
    /// `UFFDIO_ZEROPAGE_MODE_*`.
    pub mode: u64,
    /// Bytes filled or a negated errno, out.
    pub zeropage: i64,
}

/// Argument of `UFFDIO_WRITEPROTECT`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_writeprotect {
    /// What to protect or let go of.
    pub range: uffdio_range,
    /// `UFFDIO_WRITEPROTECT_MODE_*`.
    pub mode: u64,
}

/// Argument of `UFFDIO_CONTINUE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_continue {
    /// What to map.
    pub range: uffdio_range,
    /// `UFFDIO_CONTINUE_MODE_*`.
    pub mode: u64,
    /// Bytes mapped or a negated errno, out.
    pub mapped: i64,
}

/// Argument of `UFFDIO_POISON`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_poison {
    /// What to poison.
    pub range: uffdio_range,
    /// `UFFDIO_POISON_MODE_*`.
    pub mode: u64,
    /// Bytes poisoned or a negated errno, out.
    pub updated: i64,
}

/// Argument of `UFFDIO_MOVE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_move {
    /// Address to move to.
    pub dst: u64,
    /// Address to move from.
    pub src: u64,
    /// Length in bytes.
    pub len: u64,
    /// `UFFDIO_MOVE_MODE_*`.
    pub mode: u64,
    /// Bytes moved or a negated errno, out.
    pub r#move: i64,
}

const _: () = {
    assert!(UFFDIO_API == 0xc018_aa3f);
    assert!(UFFDIO_REGISTER == 0xc020_aa00);
    assert!(UFFDIO_UNREGISTER == 0x8010_aa01);
    assert!(UFFDIO_WAKE == 0x8010_aa02);
    assert!(UFFDIO_COPY == 0xc028_aa03);
    assert!(UFFDIO_ZEROPAGE == 0xc020_aa04);
    assert!(UFFDIO_MOVE == 0xc028_aa05);
    assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06);
    assert!(UFFDIO_CONTINUE == 0xc020_aa07);
    assert!(UFFDIO_POISON == 0xc020_aa08);
};
