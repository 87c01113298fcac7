//! Full lists: which pages have content of their own, whenever they were written.
//!
//! Owns the reading of whole mappings, by PAGEMAP_SCAN or by classic entries; knows nothing of rounds.

use godwit_kernel::pagemap::{Categories, Entry, PagemapFile, ScanRequest};
use godwit_pages::{PAGE_SIZE, PageRange, PageSet};

use crate::changes::Residency;
use crate::content::{Abilities, has_content};
use crate::error::{Error, Result};
use crate::shared_object::SharedObjects;
use crate::vma::{TrackedVma, VmaKind};

/// Lists the pages of process `pid` that have content of their own. For exact lists the process is stopped.
///
/// # Errors
/// [`Error`] when the pagemap cannot be read.
pub fn populated(pid: i32, vmas: &[TrackedVma]) -> Result<Residency> {
    let reader = PagemapReader::open(pid)?;
    let mut objects = SharedObjects::of(pid);
    let mut residency = Residency::default();
    for vma in vmas {
        reader.read(vma, &mut objects, &mut residency)?;
    }
    Ok(residency)
}

/// Lists the guard pages of process `pid` (`MADV_GUARD_INSTALL`); much cheaper than [`populated`]. Empty before Linux 6.15.
///
/// # Errors
/// [`Error`] when the pagemap cannot be read.
pub fn guards(pid: i32, vmas: &[TrackedVma]) -> Result<PageSet> {
    let reader = PagemapReader::open(pid)?;
    let mut found = PageSet::new();
    if reader.abilities.is_some_and(|abilities| abilities.guards) {
        for vma in vmas.iter().filter(|vma| vma.kind == VmaKind::PrivateAnonymous) {
            reader.scan_guards(vma, &mut found)?;
        }
    }
    Ok(found)
}

/// Reads whole mappings of one process.
#[derive(Debug)]
pub(crate) struct PagemapReader {
    pub(crate) pid: i32,
    pub(crate) pagemap: PagemapFile,
    /// What PAGEMAP_SCAN can do; `None` without it.
    pub(crate) abilities: Option<Abilities>,
}

impl PagemapReader {
    pub(crate) fn open(pid: i32) -> Result<Self> {
        let pagemap = PagemapFile::open(pid).map_err(|source| Error::OpenPagemap { pid, source })?;
        let abilities = Abilities::of(&pagemap);
        Ok(Self { pid, pagemap, abilities })
    }

    /// Adds the pages of `vma` that have content to `residency`.
    pub(crate) fn read(&self, vma: &TrackedVma, objects: &mut SharedObjects, residency: &mut Residency) -> Result<()> {
        let Some(abilities) = self.abilities else {
            return self.read_entries(vma, objects, residency);
        };
        // Only this kind's content can be elsewhere than in the page table; the object itself is asked.
        if vma.kind == VmaKind::SharedMemory {
            residency.populated.insert_all(&objects.data_or_all(vma)?);
        }
        let mut request = abilities.content(vma.kind);
        if vma.kind == VmaKind::SharedMemory {
            (request.category_mask, request.return_mask) =
                (Categories::PRESENT, Categories::HUGE | Categories::PRESENT);
        }
        self.scan_content(vma.kind, vma.range, &request, &mut residency.populated, &mut residency.huge)?;
        if abilities.guards && vma.kind == VmaKind::PrivateAnonymous {
            self.scan_guards(vma, &mut residency.guards)?;
        }
        Ok(())
    }

    fn scan_guards(&self, vma: &TrackedVma, guards: &mut PageSet) -> Result<()> {
        let request = ScanRequest { category_mask: Categories::GUARD, ..ScanRequest::default() };
        self.scan_into(vma.range, &request, guards)
    }

    /// Runs a content question of `kind` over `range`; adds the answer to `found`, huge pages also to `huge`.
    pub(crate) fn scan_content(
        &self,
        kind: VmaKind,
        range: PageRange,
        request: &ScanRequest,
        found: &mut PageSet,
        huge: &mut PageSet,
    ) -> Result<()> {
        let mut doubtful = PageSet::new();
        let result = self.pagemap.scan_each(range.start()..range.end(), request, |region| {
            let Ok(pages) = PageRange::new(region.start, region.end) else { return };
            match kind {
                VmaKind::PrivateFile if region.categories.intersects(Categories::FILE) => {}
                VmaKind::SharedFile | VmaKind::SharedHugetlb
                    if !region.categories.intersects(Categories::PRESENT)
                        && !request.category_mask.intersects(Categories::WRITTEN) => {}
                VmaKind::PrivateFile if region.categories.intersects(Categories::SWAPPED) => doubtful.insert(pages),
                _ => {
                    found.insert(pages);
                    if region.categories.intersects(Categories::HUGE) {
                        huge.insert(pages);
                    }
                }
            }
        });
        // What came before an error is kept: with write protection it will not be told a second time.
        for pages in doubtful.iter() {
            self.each_entry(pages, |page, entry| {
                if has_content(kind, entry) {
                    found.insert(page);
                }
            })?;
        }
        result.map_err(|source| Error::Scan { pid: self.pid, range, source })
    }

    /// Adds every page of `range` that matches to `found`.
    pub(crate) fn scan_into(&self, range: PageRange, request: &ScanRequest, found: &mut PageSet) -> Result<()> {
        self.pagemap
            .scan_each(range.start()..range.end(), request, |region| {
                found.extend(PageRange::new(region.start, region.end));
            })
            .map_err(|source| Error::Scan { pid: self.pid, range, source })
    }

    /// Hands every page of `range` with its classic entry to `each`.
    pub(crate) fn each_entry(&self, range: PageRange, mut each: impl FnMut(PageRange, Entry)) -> Result<()> {
        self.pagemap
            .entries(range.start()..range.end(), |address, entry| {
                if let Ok(page) = PageRange::new(address, address + PAGE_SIZE) {
                    each(page, entry);
                }
            })
            .map_err(|source| Error::ReadPagemap { pid: self.pid, range, source })
    }

    fn read_entries(&self, vma: &TrackedVma, objects: &mut SharedObjects, residency: &mut Residency) -> Result<()> {
        if vma.kind == VmaKind::SharedMemory {
            residency.populated.insert_all(&objects.data_or_all(vma)?);
            return Ok(());
        }
        self.each_entry(vma.range, |page, entry| {
            if has_content(vma.kind, entry) {
                residency.populated.insert(page);
            }
        })
    }
}
