//! The tracker for where there is nothing to track with.
//!
//! Every page that has content counts as written every time. Right for one full copy, for stop-and-copy and
//! post-copy; rounds do not pay with it.

use godwit_pages::PageSet;

use crate::changes::{Changes, Residency};
use crate::error::Result;
use crate::residency::PagemapReader;
use crate::shared_object::SharedObjects;
use crate::tracker::{Kind, Tracker};
use crate::vma::TrackedVma;

/// Reports everything, always.
#[derive(Debug)]
pub struct EveryPage {
    reader: PagemapReader,
    objects: SharedObjects,
    reported: PageSet,
}

impl EveryPage {
    /// Opens the pagemap of process `pid`.
    ///
    /// # Errors
    /// [`crate::Error::OpenPagemap`].
    pub fn new(pid: i32) -> Result<Self> {
        Self::following(pid, PageSet::new())
    }

    /// Takes over from another tracker, which has `reported` these pages or a part of them.
    ///
    /// # Errors
    /// As [`EveryPage::new`].
    pub fn following(pid: i32, reported: PageSet) -> Result<Self> {
        Ok(Self { reader: PagemapReader::open(pid)?, objects: SharedObjects::of(pid), reported })
    }
}

impl Tracker for EveryPage {
    fn kind(&self) -> Kind {
        Kind::EveryPage
    }

    fn arm(&mut self, _vmas: &[TrackedVma]) -> Result<()> {
        self.reported.clear();
        Ok(())
    }

    fn collect(&mut self, vmas: &[TrackedVma]) -> Result<Changes> {
        let mut residency = Residency::default();
        for vma in vmas {
            self.reader.read(vma, &mut self.objects, &mut residency)?;
        }
        let absent = self.reported.subtract(&residency.populated);
        self.reported = residency.populated.clone();
        Ok(Changes { dirty: residency.populated, absent, huge: residency.huge, suspect: PageSet::new() })
    }

    fn collect_final(&mut self, vmas: &[TrackedVma]) -> Result<Changes> {
        self.collect(vmas)
    }
}
