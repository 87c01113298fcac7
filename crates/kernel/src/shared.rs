//! Memory that several processes share through a memfd and that outlives any one of them.
//!
//! It is reached as atomic words only: another process may write at any time, so there are no references to plain bytes.
//! The file is sealed against changing its size, so an access never raises SIGBUS.
//!
//! Rests on memfd_create(2), mmap(2) and F_ADD_SEALS of fcntl(2).

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

const WORD: u64 = size_of::<AtomicU64>() as u64;
/// Largest size that is mapped, in bytes.
const LARGEST: u64 = 1 << 36;

/// A mapped memfd, as words.
#[derive(Debug)]
pub struct SharedWords {
    fd: OwnedFd,
    address: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping belongs to this value alone and is reached only through atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Creates a memfd of `words` zero words. Memory is taken as words are first written.
    ///
    /// # Errors
    /// `EINVAL` for no words, `EFBIG` for more than 64 GiB, or what the system says.
    pub fn create(name: &CStr, words: u64) -> Result<Self, Errno> {
        let bytes = words.checked_mul(WORD).filter(|bytes| *bytes <= LARGEST).ok_or(Errno::EFBIG)?;
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&fd, bytes as i64)?;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
        Self::open(fd)
    }

    /// Maps what [`Self::create`] made in another process.
    ///
    /// # Errors
    /// `EINVAL` when it is empty or could change its size, `EFBIG` when it is larger than 64 GiB.
    pub fn open(fd: OwnedFd) -> Result<Self, Errno> {
        let seals = SealFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GET_SEALS)?);
        let bytes = u64::try_from(nix::sys::stat::fstat(&fd)?.st_size).unwrap_or(0);
        if bytes < WORD || !seals.contains(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW) {
            return Err(Errno::EINVAL);
        }
        if bytes > LARGEST {
            return Err(Errno::EFBIG);
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(address.cast()) {
            Some(start) if address != libc::MAP_FAILED => {
                Ok(Self { fd, address: start, words: (bytes / WORD) as usize })
            }
            _ => Err(Errno::last()),
        }
    }

    /// The words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is that long, page aligned, lives as long as `self`, and its file cannot shrink.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.words) }
    }
}

impl AsFd for SharedWords {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: this value made the mapping, and no reference into it outlives it.
        let _ = unsafe { libc::munmap(self.address.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn two_mappings_are_one_memory() {
        let one = SharedWords::create(c"test", 1024).unwrap();
        let two = SharedWords::open(one.as_fd().try_clone_to_owned().unwrap()).unwrap();
        one.words()[1023].store(7, Ordering::Release);
        assert_eq!(two.words()[1023].load(Ordering::Acquire), 7);
        assert_eq!(two.words().len(), 1024);
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let fd = memfd_create(c"loose", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&fd, 4096).unwrap();
        assert_eq!(SharedWords::open(fd).unwrap_err(), Errno::EINVAL);
        assert!(SharedWords::create(c"test", 0).is_err());
        assert!(SharedWords::create(c"test", u64::MAX).is_err());
    }
}
