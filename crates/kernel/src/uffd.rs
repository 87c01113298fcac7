//! userfaultfd(2) of *another* process: a descriptor that it created and that we hold.
//!
//! Wraps the `userfaultfd` crate's [`userfaultfd::Uffd`] and adds what that lacks: the API handshake on a descriptor
//! made by a remote system call, the newer features, POISON, and outcomes instead of errors for what is ordinary in
//! post-copy (page already there, address space changing, process gone). Which page to fill when is not decided here.
//!
//! Every method is safe. Addresses name memory of the process that created the descriptor; the kernel checks them
//! against the registered ranges and they are never followed here. Where that process is our own (probing, tests),
//! filling can only give content to pages that have none, but a caller that holds references to such pages is on its
//! own, as with /proc/self/mem.
//!
//! **If the last copy of a descriptor closes while a fault is pending, the faulting thread silently reads zeros.**
//!
//! Rests on ioctl_userfaultfd(2) and Documentation/admin-guide/mm/userfaultfd.rst.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use libc::c_void;
use linux_raw_sys::general as abi;
use nix::errno::Errno;
use userfaultfd::{Error, EventBuffer, RegisterMode, Uffd};

pub use userfaultfd::{FeatureFlags as Features, IoctlFlags as Ioctls};

use crate::check;

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_POISON: libc::c_ulong = 0xc020_aa08;
const API_VERSION: u64 = 0xaa;
const POISON_DONTWAKE: u64 = 1;

const _: () = {
    assert!(size_of::<abi::uffdio_api>() == 24);
    assert!(size_of::<abi::uffdio_poison>() == 32);
};

/// Faults of shared memory by write protection (Linux 5.19).
pub const WP_HUGETLBFS_SHMEM: Features = Features::from_bits_retain(1 << 12);
/// Write protection of anonymous pages that are not there yet (Linux 6.4).
pub const WP_UNPOPULATED: Features = Features::from_bits_retain(1 << 13);
/// [`Userfaultfd::poison`] (Linux 6.6).
pub const POISON: Features = Features::from_bits_retain(1 << 14);
/// Write protection that the kernel lifts by itself at the first write: the tracker's mode (Linux 6.7).
pub const WP_ASYNC: Features = Features::from_bits_retain(1 << 15);
/// `UFFDIO_MOVE` (Linux 6.8); works for the process's own threads only.
pub const MOVE: Features = Features::from_bits_retain(1 << 16);

/// Which accesses to a registered range matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To pages that are not there.
    Missing,
    /// Writes to protected pages.
    WriteProtect,
    /// Both.
    MissingWp,
    /// To pages that the page cache has but this mapping has not.
    Minor,
}

impl From<Mode> for RegisterMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Missing => Self::MISSING,
            Mode::WriteProtect => Self::WRITE_PROTECT,
            Mode::MissingWp => Self::MISSING | Self::WRITE_PROTECT,
            Mode::Minor => Self::MINOR,
        }
    }
}

/// What becomes of the threads that wait for the pages of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// They go on.
    Now,
    /// They sleep until [`Userfaultfd::wake`].
    Later,
}

/// What came of a request to fill pages. None of these is an error in post-copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyOutcome {
    /// All of it is done: this many bytes.
    Copied(u64),
    /// The first page was there already.
    AlreadyPresent,
    /// Only so many bytes were done, perhaps none: ask again for the rest. 0 means that the address space is changing
    /// (read the events first); otherwise the next page is the obstacle, and asking again will tell.
    Retry(u64),
    /// Nothing is registered there (any more), or the range leaves its mapping.
    NotMapped,
    /// The process is gone.
    Gone,
}

/// Something that happened in the process.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page.
    Pagefault {
        /// What it touched; rounded down to the page unless `EXACT_ADDRESS` was agreed on.
        address: u64,
        /// How it touched it.
        fault: Fault,
        /// Whether it touched it to write.
        access: Access,
        /// The thread, in the PID namespace of the reader, where `THREAD_ID` was agreed on; else 0.
        thread_id: libc::pid_t,
    },
    /// The process forked; the child's memory has this userfaultfd, on which the API is agreed already.
    Fork(Userfaultfd),
    /// mremap(2) moved a registered range.
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// Length in bytes.
        len: u64,
    },
    /// madvise(2) dropped pages.
    Remove {
        /// First byte.
        start: u64,
        /// First byte after.
        end: u64,
    },
    /// A registered range was unmapped.
    Unmap {
        /// First byte.
        start: u64,
        /// First byte after.
        end: u64,
    },
}

/// Why a thread faulted.
pub use userfaultfd::FaultKind as Fault;
/// Whether a thread faulted reading or writing.
pub use userfaultfd::ReadWrite as Access;

/// Room for the events of one read.
pub struct Events(EventBuffer);

impl Events {
    /// Makes room for `count` events (32 bytes each).
    pub fn with_capacity(count: usize) -> Self {
        Self(EventBuffer::new(count.max(1)))
    }
}

/// A userfaultfd, usually of another process. Closing the last copy undoes its registrations.
#[derive(Debug)]
pub struct Userfaultfd {
    uffd: Uffd,
}

impl Userfaultfd {
    /// Takes over a descriptor fetched with pidfd_getfd(2) or received over a socket.
    pub fn from_fd(fd: OwnedFd) -> Self {
        // SAFETY: the descriptor is owned and open, and ownership passes on.
        Self { uffd: unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) } }
    }

    /// Creates a non-blocking userfaultfd of our own process, for finding out what the kernel offers.
    ///
    /// # Errors
    /// `ENOSYS` where the kernel has none, `EPERM` where a filter forbids it.
    pub fn of_self() -> Result<Self, Errno> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: userfaultfd(2) takes flags and returns a descriptor.
        let whole = check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) });
        let fd = match whole {
            // Without privilege only faults from user mode may be handled.
            Err(Errno::EPERM) => {
                // SAFETY: as above.
                check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags | abi::UFFD_USER_MODE_ONLY as i32) })?
            }
            other => other?,
        };
        // SAFETY: the kernel has just returned this descriptor.
        Ok(Self::from_fd(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }

    /// Agrees on `features`, once, before anything else; returns all features the kernel has.
    ///
    /// # Errors
    /// `EINVAL` when the kernel lacks one or the agreement was made before, `ENOTTY` when this is no userfaultfd,
    /// `EPERM` for fork events without `CAP_SYS_PTRACE`.
    pub fn api(&self, features: Features) -> Result<Features, Errno> {
        let mut api = abi::uffdio_api { api: API_VERSION, features: features.bits(), ioctls: 0 };
        // SAFETY: the request reads and writes the one struct.
        check(unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_API, &raw mut api) }.into())?;
        Ok(Features::from_bits_retain(api.features))
    }

    /// Registers `length` bytes at `start`; returns the requests that the range takes.
    ///
    /// # Errors
    /// `EINVAL` where nothing is mapped or it cannot be registered (vdso, AIO and io_uring rings), `EBUSY` when another
    /// userfaultfd has it, `ENOMEM` when the process is gone.
    pub fn register(&self, start: u64, length: u64, mode: Mode) -> Result<Ioctls, Errno> {
        self.uffd.register_with_mode(pointer(start), length as usize, mode.into()).map_err(errno)
    }

    /// Takes the registration of a range back and wakes who waits in it.
    ///
    /// # Errors
    /// `EINVAL` where nothing is mapped, `ENOMEM` when the process is gone.
    pub fn unregister(&self, start: u64, length: u64) -> Result<(), Errno> {
        self.uffd.unregister(pointer(start), length as usize).map_err(errno)
    }

    /// Fills missing pages at `destination` with `pages`, atomically page by page.
    ///
    /// # Errors
    /// What is not a [`CopyOutcome`]: `EINVAL` for unaligned ranges, `ENOMEM`, `ENOSPC`.
    pub fn copy(&self, destination: u64, pages: &[u8], wake: Wake) -> Result<CopyOutcome, Errno> {
        let length = pages.len();
        let source = pages.as_ptr().cast();
        // SAFETY: the source is a slice, so readable for its whole length while the kernel copies from it; the kernel
        // only ever reads it. The destination lies in the other address space and is checked there.
        let result = unsafe { self.uffd.copy(source, pointer(destination), length, wake == Wake::Now) };
        match result {
            Ok(copied) => Ok(CopyOutcome::Copied(copied as u64)),
            // Where nothing was done, the crate casts a negated errno or an old zero to a huge length.
            Err(Error::PartiallyCopied(copied)) if copied < length => Ok(CopyOutcome::Retry(copied as u64)),
            Err(Error::PartiallyCopied(_)) => Ok(CopyOutcome::Retry(0)),
            Err(error) => outcome(errno(error)),
        }
    }

    /// Fills missing pages with zeros. Not for hugetlb memory.
    ///
    /// # Errors
    /// As [`Self::copy`]. A partial success is `Retry(0)`: the pages done count as present the next time.
    pub fn zeropage(&self, start: u64, length: u64, wake: Wake) -> Result<CopyOutcome, Errno> {
        // SAFETY: the range lies in the other address space and is checked there.
        let result = unsafe { self.uffd.zeropage(pointer(start), length as usize, wake == Wake::Now) };
        match result {
            Ok(filled) => Ok(CopyOutcome::Copied(filled as u64)),
            Err(error) => outcome(errno(error)),
        }
    }

    /// Maps pages that the page cache has (for [`Mode::Minor`]).
    ///
    /// # Errors
    /// As [`Self::copy`]; `EFAULT` where the page cache has no such page.
    pub fn r#continue(&self, start: u64, length: u64, wake: Wake) -> Result<CopyOutcome, Errno> {
        match self.uffd.r#continue(pointer(start), length as usize, wake == Wake::Now) {
            Ok(mapped) if mapped == length => Ok(CopyOutcome::Copied(mapped)),
            Ok(mapped) => Ok(CopyOutcome::Retry(if mapped < length { mapped } else { 0 })),
            Err(error) => outcome(errno(error)),
        }
    }

    /// Makes missing pages raise SIGBUS when touched, as lost memory does ([`POISON`], Linux 6.6).
    ///
    /// # Errors
    /// As [`Self::copy`].
    pub fn poison(&self, start: u64, length: u64, wake: Wake) -> Result<CopyOutcome, Errno> {
        let mut poison = abi::uffdio_poison {
            range: abi::uffdio_range { start, len: length },
            mode: if wake == Wake::Now { 0 } else { POISON_DONTWAKE },
            updated: 0,
        };
        // SAFETY: the request reads and writes the one struct; the range is checked in the other address space.
        let result = check(unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_POISON, &raw mut poison) }.into());
        match result {
            Ok(_) => Ok(CopyOutcome::Copied(length)),
            Err(Errno::EAGAIN) => Ok(CopyOutcome::Retry(u64::try_from(poison.updated).unwrap_or(0))),
            Err(errno) => outcome(errno),
        }
    }

    /// Lets the threads that wait in a range go on (and fault again where a page is still missing).
    ///
    /// # Errors
    /// `EINVAL` for unaligned ranges.
    pub fn wake(&self, start: u64, length: u64) -> Result<(), Errno> {
        self.uffd.wake(pointer(start), length as usize).map_err(errno)
    }

    /// Write-protects a range that is registered for it.
    ///
    /// # Errors
    /// `ENOENT` where it is not, `EAGAIN` while the address space is changing, `ESRCH` when the process is gone.
    pub fn write_protect(&self, start: u64, length: u64) -> Result<(), Errno> {
        self.uffd.write_protect(pointer(start), length as usize).map_err(errno)
    }

    /// Takes write protection away.
    ///
    /// # Errors
    /// As [`Self::write_protect`].
    pub fn remove_write_protection(&self, start: u64, length: u64, wake: Wake) -> Result<(), Errno> {
        self.uffd.remove_write_protection(pointer(start), length as usize, wake == Wake::Now).map_err(errno)
    }

    /// Reads what happened: as many events as there are and `buffer` holds. Waits for the first one unless the
    /// descriptor is non-blocking; then there may be none.
    ///
    /// # Errors
    /// `EINVAL` before the API is agreed on, `EBADMSG` for an event this code does not know; events read with it are
    /// lost, their descriptors closed.
    pub fn read_events(&self, buffer: &mut Events) -> Result<Vec<Event>, Errno> {
        loop {
            match self.uffd.read_events(&mut buffer.0) {
                Ok(events) => {
                    // All are converted before an error shows, so that the descriptor in a fork event never leaks.
                    let converted: Vec<_> = events.map(|event| event.map(Event::from).map_err(errno)).collect();
                    return converted.into_iter().collect();
                }
                Err(error) => match errno(error) {
                    Errno::EINTR => {}
                    errno => return Err(errno),
                },
            }
        }
    }

    /// Makes a second descriptor of the same userfaultfd.
    ///
    /// # Errors
    /// `EMFILE` when we have too many.
    pub fn try_clone(&self) -> Result<Self, Errno> {
        let copy = self.as_fd().try_clone_to_owned();
        copy.map(Self::from_fd).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
    }

    /// Gives the descriptor away.
    ///
    /// # Errors
    /// `EMFILE`: the crate underneath closes its own on the way out, so a copy is made.
    pub fn into_fd(self) -> Result<OwnedFd, Errno> {
        self.as_fd().try_clone_to_owned().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
    }

    /// Registers, as [`Self::register`] does, a range given by its bounds.
    ///
    /// # Errors
    /// As [`Self::register`].
    pub fn register_range(&self, range: Range<u64>, mode: Mode) -> Result<Ioctls, Errno> {
        self.register(range.start, range.end.saturating_sub(range.start), mode)
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

impl From<OwnedFd> for Userfaultfd {
    fn from(fd: OwnedFd) -> Self {
        Self::from_fd(fd)
    }
}

impl From<userfaultfd::Event> for Event {
    fn from(event: userfaultfd::Event) -> Self {
        use userfaultfd::Event as Read;
        match event {
            Read::Pagefault { kind, rw, addr, thread_id } => {
                Self::Pagefault { address: addr as u64, fault: kind, access: rw, thread_id: thread_id.as_raw() }
            }
            Read::Fork { uffd } => Self::Fork(Userfaultfd { uffd }),
            Read::Remap { from, to, len } => Self::Remap { from: from as u64, to: to as u64, len: len as u64 },
            Read::Remove { start, end } => Self::Remove { start: start as u64, end: end as u64 },
            Read::Unmap { start, end } => Self::Unmap { start: start as u64, end: end as u64 },
        }
    }
}

/// Gives an address of the other process the shape that the crate wants; it is never followed.
fn pointer(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
}

/// Sorts what is ordinary from what is an error.
fn outcome(errno: Errno) -> Result<CopyOutcome, Errno> {
    match errno {
        Errno::EEXIST => Ok(CopyOutcome::AlreadyPresent),
        Errno::EAGAIN => Ok(CopyOutcome::Retry(0)),
        Errno::ENOENT => Ok(CopyOutcome::NotMapped),
        Errno::ESRCH => Ok(CopyOutcome::Gone),
        other => Err(other),
    }
}

/// Takes the crate's error down to what the kernel said.
fn errno(error: Error) -> Errno {
    match error {
        // The crate links an older `nix`, whose Errno is another type of the same numbers.
        Error::CopyFailed(errno) | Error::SystemError(errno) | Error::ZeropageFailed(errno) => {
            Errno::from_raw(errno as i32)
        }
        Error::PartiallyCopied(_) => Errno::EAGAIN,
        _ => Errno::EBADMSG,
    }
}

#[cfg(test)]
mod tests;
