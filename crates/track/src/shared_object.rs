//! Which pages a shared memory object has, whoever maps them.
//!
//! The page table of one mapping does not tell: a page may be in the object but not mapped here, and a page that was
//! punched out of the object leaves a marker that looks like one not written. So the object itself is asked, through
//! /proc/PID/map_files and `SEEK_DATA`. That costs 8 ms a GiB, too much inside the freeze, so the answer is kept and
//! believed as long as the object's block count agrees with it.
//!
//! Nor do a mapping's bits tell of write(2) on the object's descriptor. Its modification time does, of that and of
//! much else, so an object whose time moved while somebody could reach it by a descriptor is *suspect*: its pages may
//! have changed. Writes through another process's mapping are not seen at all.
//!
//! Needs `CAP_CHECKPOINT_RESTORE` (or `CAP_SYS_ADMIN`); without it nothing is known and every page may be one.

use std::collections::{HashMap, HashSet};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use godwit_kernel::Errno;
use godwit_pages::{PAGE_SIZE, PageRange, PageSet};
use nix::unistd::{Whence, lseek};

use crate::error::{Error, Result};
use crate::vma::TrackedVma;

/// The unit of `st_blocks`.
const BLOCK: u64 = 512;

/// Modification times move in ticks of up to 10 ms: what is younger than this may change again without its time moving.
const YOUNG: Duration = Duration::from_millis(50);

/// Device and inode.
type Identity = (u64, u64);

/// The shared memory objects of one process, as last seen.
#[derive(Debug)]
pub(crate) struct SharedObjects {
    pid: i32,
    objects: HashMap<Identity, Object>,
    /// What the process has descriptors of; read when first needed in a report.
    open: Option<HashSet<Identity>>,
}

#[derive(Debug, Default)]
struct Object {
    /// The pages that have content, by offset.
    pages: PageSet,
    /// How it was when the interval began; `None` in its first interval.
    before: Option<Glance>,
    /// How it is in this report.
    now: Option<Glance>,
}

/// What tells whether an object may have been written through a descriptor.
#[derive(Clone, Copy, Debug)]
struct Glance {
    modified: (i64, i64),
    young: bool,
    reachable: bool,
}

/// What a shared mapping shows of its object.
#[derive(Debug)]
pub(crate) struct Shown {
    /// The addresses that have pages.
    pub(crate) pages: PageSet,
    /// Whether they may have been written through a descriptor since the interval began.
    pub(crate) suspect: bool,
}

impl SharedObjects {
    pub(crate) fn of(pid: i32) -> Self {
        Self { pid, objects: HashMap::new(), open: None }
    }

    /// Begins a report: what the process has open is read anew.
    pub(crate) fn begin_report(&mut self) {
        self.open = None;
        self.objects.values_mut().for_each(|object| object.now = None);
    }

    /// Begins an interval: from here on a write makes suspect.
    pub(crate) fn begin_interval(&mut self) {
        self.objects.retain(|_, object| object.now.is_some());
        self.objects.values_mut().for_each(|object| object.before = object.now);
    }

    /// Tells what `vma` shows of its object; `None` where we may not look.
    ///
    /// `touched` are addresses that may have got pages since the last time. With this hint a growing object is not read
    /// from end to end.
    pub(crate) fn look(&mut self, vma: &TrackedVma, touched: &PageSet) -> Result<Option<Shown>> {
        let range = vma.range;
        let pid = self.pid;
        let failed = |source| Error::SharedObject { pid, range, source };
        let path = format!("/proc/{pid}/map_files/{:x}-{:x}", range.start(), range.end());
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let metadata = file.metadata().map_err(failed)?;
        let identity = (metadata.dev(), metadata.ino());
        let object = self.objects.entry(identity).or_default();

        let touched: PageSet = touched.iter().filter_map(|piece| shift(piece, range.start(), vma.offset)).collect();
        object.refresh(&file, &metadata, &touched).map_err(failed)?;
        let suspect =
            object.is_suspect(&metadata, || self.open.get_or_insert_with(|| descriptors(pid)).contains(&identity));
        let mapped = PageRange::new(vma.offset, vma.offset.saturating_add(range.len()));
        let pages = mapped.into_iter().flat_map(|mapped| object.pages.iter_within(mapped));
        let pages = pages.filter_map(|piece| shift(piece, vma.offset, range.start())).collect();
        Ok(Some(Shown { pages, suspect }))
    }

    /// Tells which pages of `vma` its object has; all of them where we may not look.
    pub(crate) fn data_or_all(&mut self, vma: &TrackedVma) -> Result<PageSet> {
        Ok(self.look(vma, &PageSet::new())?.map_or_else(|| vma.range.into(), |shown| shown.pages))
    }
}

impl Object {
    /// Brings `pages` up to date.
    fn refresh(&mut self, file: &File, metadata: &Metadata, touched: &PageSet) -> io::Result<()> {
        read_new_pages(file, &touched.subtract(&self.pages), &mut self.pages)?;
        if self.pages.bytes() / BLOCK != metadata.blocks() {
            self.pages.clear();
            if let Some(whole) = PageRange::enclosing(0, metadata.len()) {
                read_extents(file, whole, &mut self.pages)?;
            }
        }
        Ok(())
    }

    /// Compares with how the object was; asks `is_open` only where it matters.
    fn is_suspect(&mut self, metadata: &Metadata, is_open: impl FnOnce() -> bool) -> bool {
        let now = *self.now.get_or_insert_with(|| {
            let modified = SystemTime::UNIX_EPOCH
                + Duration::new(
                    metadata.mtime().try_into().unwrap_or(0),
                    metadata.mtime_nsec().try_into().unwrap_or(0),
                );
            Glance {
                modified: (metadata.mtime(), metadata.mtime_nsec()),
                young: SystemTime::now().duration_since(modified).is_ok_and(|age| age < YOUNG)
                    || modified > SystemTime::now(),
                // A name makes it reachable for anybody at any time.
                reachable: metadata.nlink() > 0 || is_open(),
            }
        });
        self.before.is_some_and(|before| {
            (before.young || before.modified != now.modified) && (before.reachable || now.reachable)
        })
    }
}

/// Lists what the process has descriptors of. A descriptor that closes meanwhile is of no interest.
fn descriptors(pid: i32) -> HashSet<Identity> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
    entries.filter_map(|entry| std::fs::metadata(entry.path()).ok()).map(identity).collect()
}

/// Moves a range from one origin to another.
fn shift(range: PageRange, from: u64, to: u64) -> Option<PageRange> {
    PageRange::from_pages(range.start().checked_sub(from)?.checked_add(to)?, range.pages()).ok()
}

/// Adds the pages with content among `offsets` to `found`, one by one: `SEEK_HOLE` would walk to the next hole, which
/// may be at the object's end. Gives up where that is slower than reading all extents; the block count tells.
fn read_new_pages(file: &File, offsets: &PageSet, found: &mut PageSet) -> io::Result<()> {
    const MOST: usize = 4096;
    let mut calls = 0;
    for range in offsets.iter() {
        let mut position = range.start();
        while position < range.end() && calls < MOST {
            calls += 1;
            let Some(page) = seek(file, position, Whence::SeekData)?.and_then(PageRange::page_at) else {
                return Ok(());
            };
            if page.start() < range.end() {
                found.insert(page);
            }
            position = page.end().max(position + PAGE_SIZE);
        }
    }
    Ok(())
}

/// Adds the pages with content among `offsets` to `found`.
fn read_extents(file: &File, offsets: PageRange, found: &mut PageSet) -> io::Result<()> {
    let mut position = offsets.start();
    while position < offsets.end() {
        let Some(start) = seek(file, position, Whence::SeekData)?.filter(|&start| start < offsets.end()) else { break };
        let Some(end) = seek(file, start, Whence::SeekHole)? else { break };
        found.extend(PageRange::enclosing(start, end.min(offsets.end())));
        // A hole is never before the data; a file system that says so must not hang us.
        position = end.max(start - start % PAGE_SIZE + PAGE_SIZE);
    }
    Ok(())
}

/// Seeks data or a hole; `None` where the object has no more data, or ends before `position`.
fn seek(file: &File, position: u64, whence: Whence) -> io::Result<Option<u64>> {
    match lseek(file, position.cast_signed(), whence) {
        Ok(offset) => Ok(Some(offset.cast_unsigned())),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(io::Error::from(errno)),
    }
}
