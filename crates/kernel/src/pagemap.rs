//! /proc/PID/pagemap: what is known of the pages of a process, running or not.
//!
//! Two ways in. `PAGEMAP_SCAN` (Linux 6.7) returns ranges by category and can, in the same step, write-protect what it
//! returned: an atomic get-and-clear of "written", for memory that is registered with a userfaultfd in `WP_ASYNC` mode.
//! The classic 64-bit entries tell the rest, and everything on older kernels. What the categories *mean* for a kind of
//! memory is not decided here.
//!
//! What a request asks to be told has its price. `WRITTEN` as the only mask, returned alone, runs through a kernel path
//! of 0.2 ms a clean GiB; any other mask takes 0.5 ms, and `FILE` looks at every page's descriptor: 10 ms.
//!
//! Rests on Documentation/admin-guide/mm/pagemap.rst and soft-dirty.rst.

use std::fs::File;
use std::io;
use std::ops::{BitOr, Range};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use libc::pid_t;
use linux_raw_sys::general::{self as abi, pm_scan_arg};
use nix::errno::Errno;

use crate::check;

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_SIZE: u64 = 4096;
/// Regions one call may return: 96 KiB of buffer, enough that the call itself does not show.
const REGIONS_PER_CALL: usize = 4096;
/// Classic entries read at a time: those of 256 MiB.
const ENTRIES_PER_READ: usize = 65536;

const _: () = {
    assert!(size_of::<pm_scan_arg>() == 96);
    assert!(size_of::<Region>() == size_of::<abi::page_region>());
};

/// What PAGEMAP_SCAN says of a page; any combination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Categories(u64);

impl Categories {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// The mapping is registered for asynchronous write protection.
    pub const WP_ALLOWED: Self = Self(abi::PAGE_IS_WPALLOWED as u64);
    /// Written since it was last write-protected; also whatever was never protected, holes included.
    pub const WRITTEN: Self = Self(abi::PAGE_IS_WRITTEN as u64);
    /// Backed by a file or shared memory; off for the anonymous pages of a private file mapping.
    pub const FILE: Self = Self(abi::PAGE_IS_FILE as u64);
    /// In memory and mapped here.
    pub const PRESENT: Self = Self(abi::PAGE_IS_PRESENT as u64);
    /// Swapped out; also set for markers, which stand for no page at all (see [`Entry::is_marker`]).
    pub const SWAPPED: Self = Self(abi::PAGE_IS_SWAPPED as u64);
    /// The shared page of zeros.
    pub const ZERO_PAGE: Self = Self(abi::PAGE_IS_PFNZERO as u64);
    /// Mapped by a huge page.
    pub const HUGE: Self = Self(abi::PAGE_IS_HUGE as u64);
    /// Soft-dirty.
    pub const SOFT_DIRTY: Self = Self(abi::PAGE_IS_SOFT_DIRTY as u64);
    /// A guard page made by `MADV_GUARD_INSTALL`. Linux 6.15; asking an older kernel for it is `EINVAL`.
    pub const GUARD: Self = Self(abi::PAGE_IS_GUARD as u64);

    /// Tells whether any category of `other` is set.
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Returns these categories without those of `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Returns both sets of categories together.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOr for Categories {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.and(other)
    }
}

/// What a scan does besides looking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanFlags(u64);

impl ScanFlags {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Write-protects every page that matches, which takes its `WRITTEN` away.
    pub const WP_MATCHING: Self = Self(abi::PM_SCAN_WP_MATCHING as u64);
    /// Fails with `EPERM` at memory that is not registered, which without this flag just looks written for ever.
    pub const CHECK_WPASYNC: Self = Self(abi::PM_SCAN_CHECK_WPASYNC as u64);
}

impl BitOr for ScanFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Which pages a scan returns, what it tells of them and what it does to them.
///
/// A page matches when, after `category_inverted` has been flipped, it has all of `category_mask` and any of
/// `category_anyof_mask` (where that is not empty). Consecutive pages alike in `return_mask` make one region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanRequest {
    /// Categories that a page must have.
    pub category_mask: Categories,
    /// Categories whose meaning is turned round first.
    pub category_inverted: Categories,
    /// Categories of which a page must have one, unless empty.
    pub category_anyof_mask: Categories,
    /// Categories to be told.
    pub return_mask: Categories,
    /// What else to do.
    pub flags: ScanFlags,
}

/// A run of pages that matched.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// First byte after.
    pub end: u64,
    /// What the request asked to be told.
    pub categories: Categories,
}

/// A scan that stopped early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PAGEMAP_SCAN stopped after {completed_to:#x}: {errno}")]
pub struct ScanError {
    /// Why: `EPERM` at unregistered memory (with `CHECK_WPASYNC`), `ENOTTY` without PAGEMAP_SCAN.
    pub errno: Errno,
    /// Everything below this address was scanned and returned. **From here on, with `WP_MATCHING`, pages may have been
    /// protected without being returned**: the kernel does not say how far it came.
    pub completed_to: u64,
}

/// One classic pagemap entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    const FRAME: u64 = (1 << 55) - 1;
    /// Markers and other special entries use the swap type behind all real ones.
    const MARKER_TYPE: u64 = 31;

    /// Tells whether the page is in memory and mapped.
    pub const fn is_present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    /// Tells whether the page is swapped out, or only a marker.
    pub const fn is_swapped(self) -> bool {
        self.0 >> 62 & 1 == 1
    }

    /// Tells whether the page belongs to a file or to shared memory.
    pub const fn is_file_or_shared(self) -> bool {
        self.0 >> 61 & 1 == 1
    }

    /// Tells whether the page was written since the bits were last cleared (needs `CONFIG_MEM_SOFT_DIRTY`).
    pub const fn is_soft_dirty(self) -> bool {
        self.0 >> 55 & 1 == 1
    }

    /// Tells whether the entry stands for no page: it only remembers that one, when it comes, is to be write-protected.
    ///
    /// `None` where the kernel hides the number that tells (needs `CAP_SYS_ADMIN`).
    pub const fn is_marker(self) -> Option<bool> {
        match self.0 & Self::FRAME {
            _ if !self.is_swapped() => Some(false),
            0 => None,
            frame => Some(frame & 31 == Self::MARKER_TYPE),
        }
    }
}

/// An open /proc/PID/pagemap. Stays with the address space it was opened on, also across execve(2) and exit.
#[derive(Debug)]
pub struct PagemapFile {
    file: File,
}

impl PagemapFile {
    /// Opens the pagemap of process `pid`.
    ///
    /// # Errors
    /// `ENOENT` when there is no such process, `EACCES` when it may not be traced.
    pub fn open(pid: pid_t) -> io::Result<Self> {
        Ok(Self { file: File::open(format!("/proc/{pid}/pagemap"))? })
    }

    /// Tells whether the kernel has PAGEMAP_SCAN (Linux 6.7).
    pub fn can_scan(&self) -> bool {
        self.scan_each(0..PAGE_SIZE, &ScanRequest::default(), |_| ()).is_ok()
    }

    /// Scans `range` (page-aligned bytes) and appends the regions that match, ascending, to `out`.
    ///
    /// # Errors
    /// [`ScanError`]; what had been found below its `completed_to` is in `out`.
    pub fn scan(&self, range: Range<u64>, request: &ScanRequest, out: &mut Vec<Region>) -> Result<(), ScanError> {
        self.scan_each(range, request, |region| out.push(region))
    }

    /// Scans `range` (page-aligned bytes) and hands every region that matches to `each`, ascending.
    ///
    /// # Errors
    /// [`ScanError`]; what had been found below its `completed_to` was handed over.
    pub fn scan_each(
        &self,
        range: Range<u64>,
        request: &ScanRequest,
        mut each: impl FnMut(Region),
    ) -> Result<(), ScanError> {
        let pages = (range.end.saturating_sub(range.start) / PAGE_SIZE) as usize;
        let mut buffer = Vec::with_capacity(pages.clamp(1, REGIONS_PER_CALL));
        let mut position = range.start;
        while position < range.end {
            let walked = self
                .scan_once(position..range.end, request, &mut buffer)
                .map_err(|errno| ScanError { errno, completed_to: position })?;
            buffer.iter().copied().for_each(&mut each);
            // A kernel that stands still (it does so at part of a hugetlb page) must not hang us.
            if walked <= position {
                return Err(ScanError { errno: Errno::EINVAL, completed_to: position });
            }
            position = walked;
        }
        Ok(())
    }

    /// Makes one call; replaces the content of `regions` and returns the address where the walk ended.
    fn scan_once(&self, range: Range<u64>, request: &ScanRequest, regions: &mut Vec<Region>) -> Result<u64, Errno> {
        regions.clear();
        let mut argument = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: request.flags.0,
            start: range.start,
            end: range.end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.capacity() as u64,
            max_pages: 0,
            category_inverted: request.category_inverted.0,
            category_mask: request.category_mask.0,
            category_anyof_mask: request.category_anyof_mask.0,
            return_mask: request.return_mask.0,
        };
        // SAFETY: the argument has the size it states; `vec` points to room for `vec_len` regions, borrowed
        // exclusively. The range is of another process (or of ours, whose content is only looked at or
        // write-protected, not changed).
        let found = check(unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) }.into())?;
        // SAFETY: the kernel has written `found` regions, at most the capacity it was given.
        unsafe { regions.set_len((found as usize).min(regions.capacity())) };
        Ok(argument.walk_end)
    }

    /// Reads the classic entries of `range` (page-aligned bytes) and hands each, with its page's address, to `each`.
    ///
    /// # Errors
    /// The error of the read; the end of the address space simply ends the iteration.
    pub fn entries(&self, range: Range<u64>, mut each: impl FnMut(u64, Entry)) -> io::Result<()> {
        let pages = (range.end.saturating_sub(range.start) / PAGE_SIZE) as usize;
        let mut buffer = vec![0u8; pages.min(ENTRIES_PER_READ) * 8];
        let mut address = range.start;
        while address < range.end {
            let left = ((range.end - address) / PAGE_SIZE) as usize;
            let wanted = left.min(ENTRIES_PER_READ) * 8;
            let read = self.file.read_at(&mut buffer[..wanted], address / PAGE_SIZE * 8)?;
            let (entries, _) = buffer[..read].as_chunks::<8>();
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                each(address, Entry(u64::from_ne_bytes(*entry)));
                address += PAGE_SIZE;
            }
        }
        Ok(())
    }

    /// Reads the classic entry of the page that holds byte `address`; `None` beyond the address space.
    ///
    /// # Errors
    /// The error of the read.
    pub fn entry(&self, address: u64) -> io::Result<Option<Entry>> {
        let page = address - address % PAGE_SIZE;
        let mut found = None;
        self.entries(page..page.saturating_add(PAGE_SIZE), |_, entry| found = Some(entry))?;
        Ok(found)
    }
}

/// Clears the soft-dirty bits of a whole process (`4` into /proc/PID/clear_refs).
///
/// # Errors
/// `EINVAL` or nothing at all where the kernel has no soft-dirty bits, `EACCES` when the process may not be traced.
pub fn clear_soft_dirty(pid: pid_t) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "4")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A buffer of which at least one whole page is written, and that page's address.
    fn written_page() -> (Vec<u8>, u64) {
        let buffer = std::hint::black_box(vec![7u8; 2 * PAGE_SIZE as usize]);
        let page = (buffer.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        (buffer, page)
    }

    #[test]
    fn sees_an_own_page_both_ways() {
        let (_buffer, page) = written_page();
        let pagemap = PagemapFile::open(std::process::id() as pid_t).unwrap();
        assert!(pagemap.entry(page).unwrap().unwrap().is_present());
        if !pagemap.can_scan() {
            eprintln!("not checked: this kernel has no PAGEMAP_SCAN");
            return;
        }
        let request = ScanRequest { return_mask: Categories::PRESENT, ..ScanRequest::default() };
        let mut regions = Vec::new();
        pagemap.scan(page..page + PAGE_SIZE, &request, &mut regions).unwrap();
        assert_eq!(regions, [Region { start: page, end: page + PAGE_SIZE, categories: Categories::PRESENT }]);
    }

    #[test]
    fn unregistered_memory_is_refused_when_asked_to_check() {
        let (_buffer, page) = written_page();
        let pagemap = PagemapFile::open(std::process::id() as pid_t).unwrap();
        let request = ScanRequest { flags: ScanFlags::CHECK_WPASYNC, ..ScanRequest::default() };
        if pagemap.can_scan() {
            let error = pagemap.scan(page..page + PAGE_SIZE, &request, &mut Vec::new()).unwrap_err();
            assert_eq!(error, ScanError { errno: Errno::EPERM, completed_to: page });
        }
    }

    #[test]
    fn a_missing_process_is_an_error() {
        assert!(PagemapFile::open(0x7fff_ffff).is_err());
        assert!(clear_soft_dirty(0x7fff_ffff).is_err());
    }
}
