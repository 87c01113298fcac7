//! Which mappings the userfaultfd looks after, in a process that changes them meanwhile.
//!
//! UFFDIO_REGISTER splits a mapping that is larger than what it is told, and mremap(2) of the whole is EFAULT then, in a
//! program that has done nothing wrong. What is registered here may have been unmapped since the mappings were listed,
//! and something larger mapped in its place; so the ends of what is registered are put where little changes: small
//! neighbours go along, and the unmapped places between them, which the kernel passes over. A mapping that was split all
//! the same is joined by the kernel as soon as its other part is registered too, which is seen to at once.

use std::ops::Range;

use godwit_kernel::Errno;
use godwit_kernel::uffd::{Mode, Userfaultfd, Wake};
use godwit_pages::{PAGE_SIZE, PageRange, PageSet};

use super::{ATTEMPTS, FIRST_PASS};
use crate::error::{Error, Result};
use crate::residency::PagemapReader;
use crate::vma::{TrackedVma, VmaKind};

/// Pages from which protection is taken in one go (0.1 to 2 ms): the process cannot change its mappings meanwhile.
const UNPROTECTED_AT_ONCE: u64 = 64 << 10;

/// Pages of neighbours, before and after, that go along with a mapping of a running process; they are reported as written.
const SMALL_PAGES: u64 = 64;

/// The mappings of a process as they were listed, and what registers them. They are named by their place in the list.
pub(super) struct Registration<'a> {
    uffd: &'a Userfaultfd,
    reader: &'a PagemapReader,
    vmas: &'a [TrackedVma],
    /// Pages of neighbours on each side.
    reach: u64,
}

impl<'a> Registration<'a> {
    /// Of a process that runs.
    pub(super) const fn running(uffd: &'a Userfaultfd, reader: &'a PagemapReader, vmas: &'a [TrackedVma]) -> Self {
        Self { uffd, reader, vmas, reach: SMALL_PAGES }
    }

    /// Of a process that is stopped: its mappings are as they were listed.
    pub(super) const fn stopped(uffd: &'a Userfaultfd, reader: &'a PagemapReader, vmas: &'a [TrackedVma]) -> Self {
        Self { uffd, reader, vmas, reach: 0 }
    }

    /// Returns what is written in `range`; `None` if part of it is not registered.
    pub(super) fn written(&self, range: PageRange) -> Result<Option<PageSet>> {
        let mut pages = PageSet::new();
        match self.reader.scan_into(range, &FIRST_PASS, &mut pages) {
            Ok(()) => Ok(Some(pages)),
            Err(Error::Scan { source, .. }) if source.errno == Errno::EPERM => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Registers all mappings that can be.
    pub(super) fn add_all(&self) -> Result<()> {
        let mut next = 0;
        while next < self.vmas.len() {
            let added = self.add_around(next)?;
            if let Some(added) = &added {
                self.add_before(added.start)?;
            }
            next = added.map_or(next + 1, |added| added.end);
        }
        Ok(())
    }

    /// Registers a mapping, and those beside it that were replaced together with it, maybe by a single one; returns whether
    /// it could be registered.
    pub(super) fn add(&self, index: usize) -> Result<bool> {
        let Some(Range { start, end: mut next }) = self.add_around(index)? else { return Ok(false) };
        self.add_before(start)?;
        while self.vmas.get(next).is_some_and(|after| self.has_lost(after.range.start())) {
            let Some(added) = self.add_around(next)? else { break };
            next = added.end;
        }
        Ok(true)
    }

    /// Registers mappings from the one before `index` downwards, as long as they are not.
    fn add_before(&self, mut index: usize) -> Result<()> {
        while let Some(before) = index.checked_sub(1)
            && self.has_lost(self.vmas[before].range.end() - PAGE_SIZE)
            && let Some(added) = self.add_around(before)?
        {
            index = added.start;
        }
        Ok(())
    }

    /// Whether a page is mapped and not registered.
    fn has_lost(&self, page: u64) -> bool {
        let page = PageRange::page_at(page);
        page.is_some_and(|page| matches!(self.written(page), Ok(None)))
    }

    /// Registers a mapping with its small neighbours and what has come to lie between them, all of it written. Returns which
    /// of the list these are; `None` where it cannot be registered.
    ///
    /// N.B. pages can be protected without being registered: when mremap(2) joins a mapping with another one, the kernel
    /// drops the registration of the whole and leaves the marks of protection, which the next write does not take away.
    /// Whoever believed them would take the page for unwritten from then on.
    fn add_around(&self, index: usize) -> Result<Option<Range<usize>>> {
        let own = self.vmas[index].range;
        let (mut added, mut whole) = self.with_neighbours(index);
        // What is registered and may have kept its marks.
        let mut doubtful = None;
        for _ in 0..ATTEMPTS {
            let registered = self.register(whole).inspect(|()| doubtful = Some(added.clone()));
            match registered.and_then(|()| self.remove_protection(own, whole)) {
                Ok(()) => return Ok(Some(added)),
                // Part of it was unmapped or replaced since it was registered.
                Err(Errno::ENOENT) => {}
                // What has come to lie beside it is the kernel's, of huge pages, a file that may not be written, or looked after by the
                // program itself.
                Err(Errno::EINVAL | Errno::EPERM | Errno::EBUSY) if whole != own => {
                    self.leave(doubtful.take());
                    (added, whole) = (index..index + 1, own);
                }
                // AIO and io_uring rings, files that may not be written; and where nothing is mapped any more.
                Err(Errno::EINVAL | Errno::EPERM) => break,
                Err(Errno::EBUSY) => return Err(Error::Occupied { pid: self.reader.pid, range: own }),
                Err(source) => return Err(Error::Register { pid: self.reader.pid, range: whole, source }),
            }
        }
        self.leave(doubtful);
        Ok(None)
    }

    /// Ends the registration of mappings whose marks of protection may have stayed: without it they are looked at anew.
    fn leave(&self, doubtful: Option<Range<usize>>) {
        for vma in &self.vmas[doubtful.unwrap_or_default()] {
            // N.B. refused as a whole where something lies beside it that cannot be registered.
            let whole = self.uffd.unregister(vma.room.start(), vma.room.len());
            if whole.is_err() {
                let _ = self.uffd.unregister(vma.range.start(), vma.range.len());
            }
        }
    }

    /// A mapping with what goes along with it, and where all that lies; no further than to what is not listed.
    fn with_neighbours(&self, index: usize) -> (Range<usize>, PageRange) {
        // The kernel wants ranges with huge pages in them aligned to those.
        let has_huge_pages = |vma: &TrackedVma| matches!(vma.kind, VmaKind::PrivateHugetlb | VmaKind::SharedHugetlb);
        let own = &self.vmas[index];
        if self.reach == 0 || has_huge_pages(own) {
            return (index..index + 1, own.range);
        }
        let (mut first, mut last) = (index, index);
        let mut rest = self.reach;
        while let Some(before) = first.checked_sub(1)
            && !has_huge_pages(&self.vmas[before])
            && self.vmas[before].range.end() == self.vmas[first].room.start()
            && let Some(left) = rest.checked_sub(self.vmas[before].range.pages())
        {
            (first, rest) = (before, left);
        }
        rest = self.reach;
        while let Some(after) = self.vmas.get(last + 1)
            && !has_huge_pages(after)
            && after.range.start() == self.vmas[last].room.end()
            && let Some(left) = rest.checked_sub(after.range.pages())
        {
            (last, rest) = (last + 1, left);
        }
        let whole = PageRange::new(self.vmas[first].room.start(), self.vmas[last].room.end());
        (first..last + 1, whole.unwrap_or(own.range))
    }

    fn register(&self, range: PageRange) -> std::result::Result<(), Errno> {
        self.uffd.register_range(range.start()..range.end(), Mode::WriteProtect).map(drop)
    }

    /// Takes the protection from `whole`, of which `own` was mapped when the mappings were listed.
    fn remove_protection(&self, own: PageRange, whole: PageRange) -> std::result::Result<(), Errno> {
        own.chunks(UNPROTECTED_AT_ONCE).try_for_each(|part| {
            // What lies around it goes with the first and the last part: places that are empty would look unmapped.
            let start = if part.start() == own.start() { whole.start() } else { part.start() };
            let end = if part.end() == own.end() { whole.end() } else { part.end() };
            self.uffd.remove_write_protection(start, end - start, Wake::Later)
        })
    }
}
