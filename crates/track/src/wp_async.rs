//! The tracker for Linux 6.7 and later: userfaultfd in `WP_ASYNC` mode, read by PAGEMAP_SCAN.
//!
//! Every mapping is registered, which alone changes nothing for the process. A page counts as written until it is
//! write-protected; the first write to a protected page is let through by the kernel itself, which takes the protection
//! away again. A report is therefore made in two passes:
//! 1. *Look*: which pages are written, with the one mask that the kernel answers at 0.2 ms a clean GiB. Holes count as
//!    written too, but cost nothing.
//! 2. *Take*: only where something was written, which pages have content; protected in the same step, one page at a
//!    time under the page table's lock. Nothing written in between is lost: it is either taken or still written next
//!    time.
//!
//! The final report looks in the second pass as well, for the process is stopped. What was reported once, counts as
//! written now and was not taken has no content any more: that is how MADV_DONTNEED on anonymous memory shows.
//!
//! Blind spots of the kernel's bits that are closed here: mappings that were born, moved or replaced (not registered:
//! the kernel refuses, and they are registered on the spot, unprotected and so written as a whole); MADV_DONTNEED on
//! a private file page (leaves a marker or the file's page, neither written: [`WpAsync::reverted`]); pages punched
//! out of shared memory (leave a marker), and shared memory written through a descriptor, as far as it can be told
//! ([`SharedObjects`]). Not closed: shared memory written through another process's mapping.
//!
//! Two facts that shape the code. A scan that protects must never meet an unregistered mapping in the middle: it fails
//! then and keeps to itself what it has protected, so everything in doubt is reported. And no scan asks for `FILE`
//! outside private file mappings: 20 times the price.

mod look_ahead;
mod registration;
mod windows;

use godwit_kernel::Errno;
use godwit_kernel::pagemap::{Categories, ScanFlags, ScanRequest};
use godwit_kernel::uffd::{Features, Userfaultfd, WP_ASYNC, WP_UNPOPULATED};
use godwit_pages::{PageRange, PageSet};

use crate::changes::Changes;
use crate::content::Abilities;
use crate::error::{Error, Result};
use crate::residency::PagemapReader;
use crate::shared_object::{SharedObjects, Shown};
use crate::tracker::{Kind, Tracker};
use crate::vma::{TrackedVma, VmaKind};

use look_ahead::LookAhead;
use registration::Registration;

/// What the userfaultfd must have been agreed on with.
pub const REQUIRED_FEATURES: Features = WP_ASYNC.union(WP_UNPOPULATED);

/// How often a mapping that changes under our hands is tried again before it is simply read whole.
const ATTEMPTS: usize = 4;

/// The question of the first pass.
const FIRST_PASS: ScanRequest = ScanRequest {
    category_mask: Categories::WRITTEN,
    category_inverted: Categories::NONE,
    category_anyof_mask: Categories::NONE,
    return_mask: Categories::WRITTEN,
    flags: ScanFlags::CHECK_WPASYNC,
};

/// Tracks by asynchronous write protection. Dropping it gives the process its memory back as it was (21-72 ms an
/// armed GiB).
#[derive(Debug)]
pub struct WpAsync {
    uffd: Userfaultfd,
    reader: PagemapReader,
    abilities: Abilities,
    look_ahead: LookAhead,
    objects: SharedObjects,
    /// Pages reported as dirty and not yet as absent.
    reported: PageSet,
    /// The next report holds everything.
    everything: bool,
}

/// Whether a report begins a new interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Take,
    Look,
}

/// What the first pass found in a mapping.
enum Written {
    /// The mapping is registered; these pages are written or holes.
    Pages(PageSet),
    /// It cannot be registered: written as a whole, every time.
    Untracked,
}

impl WpAsync {
    /// Tracks process `pid` by a userfaultfd that it created and on which [`REQUIRED_FEATURES`] were agreed.
    ///
    /// # Errors
    /// [`Error::OpenPagemap`], [`Error::ScanMissing`].
    pub fn new(pid: i32, uffd: Userfaultfd) -> Result<Self> {
        let reader = PagemapReader::open(pid)?;
        let Some(abilities) = reader.abilities else {
            return Err(Error::ScanMissing { pid });
        };
        Ok(Self {
            uffd,
            reader,
            abilities,
            look_ahead: LookAhead::new(),
            objects: SharedObjects::of(pid),
            reported: PageSet::new(),
            everything: true,
        })
    }

    /// Returns the userfaultfd and so ends the tracking, though not the protection.
    pub fn into_userfaultfd(self) -> Userfaultfd {
        self.uffd
    }

    fn pid(&self) -> i32 {
        self.reader.pid
    }

    fn report(&mut self, vmas: &[TrackedVma], pass: Pass) -> Result<Changes> {
        let mut changes = Changes::default();
        let mut complete = true;
        self.objects.begin_report();
        // A running process is not held up by a look at it, and has its processors to itself.
        let ahead = match pass {
            Pass::Look => self.look_ahead.written(&self.reader, vmas),
            Pass::Take => vec![None; vmas.len()],
        };
        for (index, written) in ahead.into_iter().enumerate() {
            complete &= self.sweep(vmas, index, written, pass, &mut changes)?;
        }
        let mapped: PageSet = vmas.iter().map(|vma| vma.range).collect();
        changes.absent.insert_all(&self.reported.subtract(&mapped));
        changes.dirty.remove_all(&changes.absent);
        changes.huge = changes.huge.intersection(&changes.dirty);
        changes.suspect.remove_all(&changes.dirty);
        changes.suspect.remove_all(&changes.absent);
        self.reported.insert_all(&changes.dirty);
        self.reported.remove_all(&changes.absent);
        if pass == Pass::Take {
            self.objects.begin_interval();
            self.everything &= !complete;
        }
        Ok(changes)
    }

    /// Adds what changed in one of `vmas` to `changes`, given its written pages if they are known already; returns false
    /// where it had to be left for the next time.
    fn sweep(
        &mut self,
        vmas: &[TrackedVma],
        index: usize,
        written: Option<PageSet>,
        pass: Pass,
        changes: &mut Changes,
    ) -> Result<bool> {
        let vma = &vmas[index];
        let (written, tracked) =
            match written.map_or_else(|| self.written(vmas, index, pass), |pages| Ok(Written::Pages(pages)))? {
                Written::Pages(pages) if !self.everything => (pages, true),
                Written::Pages(_) => (vma.range.into(), true),
                Written::Untracked => (vma.range.into(), false),
            };
        let shown = match self.shared_data(vma, &written) {
            // A running process may have changed the mapping since; nothing was taken from it, so nothing is lost.
            Err(error @ Error::SharedObject { .. }) if pass == Pass::Take => {
                tracing::debug!(range = %vma.range, %error, "shared mapping left for the next round");
                return Ok(false);
            }
            shown => shown?,
        };
        let in_data = shown.as_ref().map(|shown| written.intersection(&shown.pages));
        let request = self.request(vma.kind, tracked, pass);
        let mut dirty = PageSet::new();
        for window in windows::of(in_data.as_ref().unwrap_or(&written), &written) {
            self.take(vma.kind, window, &request, &mut dirty, &mut changes.huge)?;
        }
        let reported = self.reported.intersect_range(vma.range);
        match vma.kind {
            // A page zapped here is still in the file; nothing ever becomes absent.
            VmaKind::SharedFile | VmaKind::SharedHugetlb if self.everything => dirty.insert_all(&reported),
            VmaKind::SharedFile | VmaKind::SharedHugetlb => {}
            _ => changes.absent.insert_all(&reported.intersection(&written).subtract(&dirty)),
        }
        if let Some(shown) = &shown {
            changes.absent.insert_all(&reported.subtract(&shown.pages));
            if shown.suspect {
                changes.suspect.insert_all(&shown.pages);
            }
        }
        if vma.kind == VmaKind::PrivateFile {
            let (reverted, unclear) = self.reverted(&reported.subtract(&written))?;
            changes.absent.insert_all(&reverted);
            dirty.insert_all(&unclear);
        }
        changes.dirty.insert_all(&dirty);
        Ok(true)
    }

    /// Returns the question of the second pass.
    fn request(&self, kind: VmaKind, tracked: bool, pass: Pass) -> ScanRequest {
        let mut request = self.abilities.content(kind);
        if tracked && !self.everything {
            request.category_mask = request.category_mask | Categories::WRITTEN;
        }
        if tracked && pass == Pass::Take {
            request.flags = ScanFlags::WP_MATCHING | ScanFlags::CHECK_WPASYNC;
            if kind == VmaKind::PrivateFile {
                // The file's own pages are protected too, so that the next first pass does not find a program's whole
                // text written; what is returned of them is ignored.
                request.category_mask = request.category_mask.without(Categories::FILE);
                request.category_inverted = request.category_inverted.without(Categories::FILE);
                request.return_mask = request.return_mask | Categories::FILE;
            }
        }
        request
    }

    /// Makes the first pass over one of `vmas`, registering it where it is not.
    fn written(&self, vmas: &[TrackedVma], index: usize, pass: Pass) -> Result<Written> {
        let registration = match pass {
            Pass::Take => Registration::running(&self.uffd, &self.reader, vmas),
            Pass::Look => Registration::stopped(&self.uffd, &self.reader, vmas),
        };
        for _ in 0..ATTEMPTS {
            if let Some(pages) = registration.written(vmas[index].range)? {
                return Ok(Written::Pages(pages));
            }
            if !registration.add(index)? {
                break;
            }
        }
        Ok(Written::Untracked)
    }

    /// Makes the second pass over one window.
    fn take(
        &self,
        kind: VmaKind,
        window: PageRange,
        request: &ScanRequest,
        dirty: &mut PageSet,
        huge: &mut PageSet,
    ) -> Result<()> {
        match self.reader.scan_content(kind, window, request, dirty, huge) {
            Err(Error::Scan { source, .. }) if source.errno == Errno::EPERM => {
                // The mapping was replaced between the passes. Pages may have been protected without being returned:
                // report all that may have content, and look again next time.
                let doubtful = PageRange::new(source.completed_to, window.end()).unwrap_or(window);
                if matches!(kind, VmaKind::SharedMemory | VmaKind::SharedFile | VmaKind::SharedHugetlb) {
                    dirty.insert(doubtful);
                    return Ok(());
                }
                self.reader.scan_content(kind, doubtful, &self.abilities.content(kind), dirty, huge)
            }
            other => other,
        }
    }

    /// Asks the object behind shared memory for its pages; `None` for other kinds and where it cannot be asked.
    fn shared_data(&mut self, vma: &TrackedVma, written: &PageSet) -> Result<Option<Shown>> {
        match vma.kind {
            // With everything "written" the hint would be the whole object, which a changed block count reads anyway.
            VmaKind::SharedMemory if self.everything => self.objects.look(vma, &PageSet::new()),
            VmaKind::SharedMemory => self.objects.look(vma, written),
            _ => Ok(None),
        }
    }

    /// Finds, among pages of private file mappings that were reported and do not count as written, those that show
    /// the file again; and those of which the kernel will not say.
    fn reverted(&self, pages: &PageSet) -> Result<(PageSet, PageSet)> {
        let request = ScanRequest {
            category_anyof_mask: Categories::FILE | Categories::SWAPPED,
            return_mask: Categories::FILE | Categories::SWAPPED,
            ..ScanRequest::default()
        };
        let (mut reverted, mut swapped, mut unclear) = (PageSet::new(), PageSet::new(), PageSet::new());
        for window in windows::of(pages, pages) {
            let (start, end) = (window.start(), window.end());
            self.reader
                .pagemap
                .scan_each(start..end, &request, |region| {
                    let is_file = region.categories.intersects(Categories::FILE);
                    let set = if is_file { &mut reverted } else { &mut swapped };
                    set.extend(PageRange::new(region.start, region.end));
                })
                .map_err(|source| Error::Scan { pid: self.pid(), range: window, source })?;
        }
        for range in swapped.intersection(pages).iter() {
            self.reader.each_entry(range, |page, entry| match entry.is_marker() {
                Some(true) => reverted.insert(page),
                Some(false) => {}
                None => unclear.insert(page),
            })?;
        }
        Ok((reverted.intersection(pages), unclear))
    }
}

impl Tracker for WpAsync {
    fn kind(&self) -> Kind {
        Kind::WpAsync
    }

    fn arm(&mut self, vmas: &[TrackedVma]) -> Result<()> {
        self.reported.clear();
        self.everything = true;
        Registration::running(&self.uffd, &self.reader, vmas).add_all()
    }

    fn collect(&mut self, vmas: &[TrackedVma]) -> Result<Changes> {
        let changes = self.report(vmas, Pass::Take);
        // What was taken before the error is told to nobody.
        self.everything |= changes.is_err();
        changes
    }

    fn collect_final(&mut self, vmas: &[TrackedVma]) -> Result<Changes> {
        self.report(vmas, Pass::Look)
    }
}
