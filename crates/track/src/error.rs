//! What can go wrong while tracking.

use std::io;

use godwit_kernel::Errno;
use godwit_kernel::pagemap::ScanError;
use godwit_pages::PageRange;

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// An operation that failed, and on what.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// /proc/PID/pagemap could not be opened.
    #[error("cannot open the pagemap of process {pid}")]
    OpenPagemap {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// PAGEMAP_SCAN failed.
    #[error("cannot scan {range} of process {pid}")]
    Scan {
        /// The process.
        pid: i32,
        /// What was scanned.
        range: PageRange,
        /// Why and how far it came.
        #[source]
        source: ScanError,
    },
    /// The kernel has no PAGEMAP_SCAN.
    #[error("this kernel cannot track process {pid} by write protection: it has no PAGEMAP_SCAN (Linux 6.7)")]
    ScanMissing {
        /// The process.
        pid: i32,
    },
    /// The classic pagemap could not be read.
    #[error("cannot read the pagemap of process {pid} for {range}")]
    ReadPagemap {
        /// The process.
        pid: i32,
        /// What was read.
        range: PageRange,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A mapping could not be registered for tracking.
    #[error("cannot track {range} of process {pid}")]
    Register {
        /// The process.
        pid: i32,
        /// The mapping.
        range: PageRange,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A mapping belongs to a userfaultfd of the process's own.
    #[error("process {pid} handles faults of {range} by a userfaultfd of its own; move it by stop-and-copy")]
    Occupied {
        /// The process.
        pid: i32,
        /// The mapping.
        range: PageRange,
    },
    /// The soft-dirty bits could not be cleared.
    #[error("cannot clear the soft-dirty bits of process {pid}")]
    ClearSoftDirty {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The object behind a shared mapping could not be looked at.
    #[error("cannot look at the shared memory mapped at {range} of process {pid}")]
    SharedObject {
        /// The process.
        pid: i32,
        /// The mapping.
        range: PageRange,
        /// Why.
        #[source]
        source: io::Error,
    },
}
