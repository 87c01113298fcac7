//! System V shared memory: shmget(2), shmctl(2), and a mapping of a shared object by this process.

use crate::check;
use nix::errno::Errno;

/// What `IPC_STAT` says of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Key it was created with; 0 for `IPC_PRIVATE` or one already marked for removal.
    pub key: i32,
    /// Permission bits with `SHM_DEST` and `SHM_LOCKED`.
    pub mode: u32,
    /// Owner's user id.
    pub uid: u32,
    /// Owner's group id.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Number of attaches.
    pub attaches: u64,
}

/// Reads the state of segment `id`.
pub fn segment(id: i32) -> Result<Segment, Errno> {
    // SAFETY: an all-zero shmid_ds is a valid value.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: IPC_STAT fills the structure.
    check(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut ds) }.into())?;
    Ok(Segment {
        key: ds.shm_perm.__key,
        mode: ds.shm_perm.mode.into(),
        uid: ds.shm_perm.uid,
        gid: ds.shm_perm.gid,
        size: ds.shm_segsz as u64,
        attaches: ds.shm_nattch,
    })
}

/// Finds the segment that has a key.
///
/// # Errors
/// `ENOENT` when there is none.
pub fn find_segment(key: i32) -> Result<i32, Errno> {
    // SAFETY: takes integers.
    check(unsafe { libc::shmget(key, 0, 0) }.into()).map(|id| id as i32)
}

/// Creates a segment (`IPC_CREAT | IPC_EXCL`) and returns its id. `/proc/sys/kernel/shm_next_id` chooses the id.
pub fn create_segment(key: i32, size: u64, flags: i32) -> Result<i32, Errno> {
    // SAFETY: takes integers.
    check(unsafe { libc::shmget(key, size as usize, libc::IPC_CREAT | libc::IPC_EXCL | flags) }.into())
        .map(|id| id as i32)
}

/// Gives a segment its owner and permission bits (`IPC_SET`).
pub fn own_segment(id: i32, uid: u32, gid: u32, mode: u32) -> Result<(), Errno> {
    // SAFETY: an all-zero shmid_ds is a valid value.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: IPC_STAT fills the structure.
    check(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut ds) }.into())?;
    ds.shm_perm.uid = uid;
    ds.shm_perm.gid = gid;
    ds.shm_perm.mode = (mode & 0o777) as _;
    // SAFETY: IPC_SET reads the structure.
    check(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut ds) }.into()).map(drop)
}

/// Marks a segment for removal at its last detach (`IPC_RMID`).
pub fn remove_segment(id: i32) -> Result<(), Errno> {
    // SAFETY: IPC_RMID ignores the pointer.
    check(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) }.into()).map(drop)
}

/// Shared memory mapped into this process; unmapped on drop. Its bytes are reached through `/proc/self/map_files`, or
/// through the descriptor they came from, never through a reference: other processes write to it.
#[derive(Debug)]
pub struct Attachment {
    address: usize,
    length: usize,
    sysv: bool,
}

impl Attachment {
    /// Creates shared anonymous memory of `length` bytes (a whole number of pages).
    pub fn anonymous(length: u64) -> Result<Self, Errno> {
        Self::map_anonymous(length, 0)
    }

    /// Creates shared anonymous memory of `length` bytes out of huge pages of `page_size` bytes (a power of two).
    pub fn anonymous_huge(length: u64, page_size: u64) -> Result<Self, Errno> {
        const MAP_HUGE_SHIFT: u32 = 26;
        Self::map_anonymous(length, libc::MAP_HUGETLB | (page_size.trailing_zeros() << MAP_HUGE_SHIFT) as i32)
    }

    fn map_anonymous(length: u64, more_flags: i32) -> Result<Self, Errno> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | more_flags,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { address: address as usize, length: length as usize, sysv: false })
    }

    /// Attaches System V segment `id` of `length` bytes.
    pub fn segment(id: i32, length: u64) -> Result<Self, Errno> {
        // SAFETY: attaches at an address of the kernel's choice.
        let address = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if address as isize == -1 {
            return Err(Errno::last());
        }
        Ok(Self { address: address as usize, length: length as usize, sysv: true })
    }

    /// Address of its first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Name under `/proc/self/map_files`.
    #[must_use]
    pub fn map_file(&self) -> String {
        let end = self.address + self.length.next_multiple_of(4096);
        format!("/proc/self/map_files/{:x}-{:x}", self.address, end)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if self.sysv {
            // SAFETY: the address came from shmat and no reference into the segment was ever made.
            unsafe { libc::shmdt(self.address as *const libc::c_void) };
        } else {
            // SAFETY: the mapping is this object's own and no reference into it was ever made.
            unsafe { libc::munmap(self.address as *mut libc::c_void, self.length) };
        }
    }
}
