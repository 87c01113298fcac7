//! The tracker for kernels before 6.7 that have soft-dirty bits.
//!
//! Reads the classic pagemap entries of all memory (34 ms a GiB) and then clears the bits. That is two steps, so **the
//! process must be stopped in between**. Shared memory is not trusted to the bits: they are in the page table, and
//! zapping a page (reclaim, MADV_DONTNEED) takes them away while the object keeps the content. All of it counts as
//! written every time.
//!
//! New, moved and grown mappings need no care: the kernel marks them soft-dirty as a whole.

use godwit_kernel::pagemap::clear_soft_dirty;
use godwit_pages::PageSet;

use crate::changes::{Changes, Residency};
use crate::content::has_content;
use crate::error::{Error, Result};
use crate::residency::PagemapReader;
use crate::shared_object::SharedObjects;
use crate::tracker::{Kind, Tracker};
use crate::vma::{TrackedVma, VmaKind};

/// Tracks by soft-dirty bits, which it clears: nobody else can use them on this process meanwhile.
#[derive(Debug)]
pub struct SoftDirty {
    reader: PagemapReader,
    objects: SharedObjects,
    /// Pages reported as dirty and not yet as absent.
    reported: PageSet,
    /// The next report holds everything.
    everything: bool,
}

impl SoftDirty {
    /// Opens the pagemap of process `pid`.
    ///
    /// # Errors
    /// [`Error::OpenPagemap`].
    pub fn new(pid: i32) -> Result<Self> {
        let (reader, objects) = (PagemapReader::open(pid)?, SharedObjects::of(pid));
        Ok(Self { reader, objects, reported: PageSet::new(), everything: true })
    }

    fn read(&mut self, vmas: &[TrackedVma]) -> Result<Changes> {
        let (mut populated, mut dirty) = (PageSet::new(), PageSet::new());
        let mut always = Residency::default();
        for vma in vmas {
            match vma.kind {
                VmaKind::SharedMemory | VmaKind::SharedFile | VmaKind::SharedHugetlb => {
                    self.reader.read(vma, &mut self.objects, &mut always)?;
                }
                private => self.reader.each_entry(vma.range, |page, entry| {
                    if has_content(private, entry) {
                        populated.insert(page);
                        if entry.is_soft_dirty() || self.everything {
                            dirty.insert(page);
                        }
                    }
                })?,
            }
        }
        dirty.insert_all(&always.populated);
        populated.insert_all(&always.populated);
        // A page that was never reported is sent whatever its bit says: nobody has it.
        dirty.insert_all(&populated.subtract(&self.reported));
        let absent = self.reported.subtract(&populated);
        self.reported = populated;
        Ok(Changes { dirty, absent, huge: always.huge, suspect: PageSet::new() })
    }
}

impl Tracker for SoftDirty {
    fn kind(&self) -> Kind {
        Kind::SoftDirty
    }

    fn arm(&mut self, _vmas: &[TrackedVma]) -> Result<()> {
        self.reported.clear();
        self.everything = true;
        Ok(())
    }

    fn collect(&mut self, vmas: &[TrackedVma]) -> Result<Changes> {
        let before = self.reported.clone();
        let changes = self.read(vmas)?;
        let pid = self.reader.pid;
        if let Err(source) = clear_soft_dirty(pid) {
            self.reported = before;
            return Err(Error::ClearSoftDirty { pid, source });
        }
        self.everything = false;
        Ok(changes)
    }

    fn collect_final(&mut self, vmas: &[TrackedVma]) -> Result<Changes> {
        self.read(vmas)
    }
}
