//! The source's memory: its layout, what changed in it, and getting pages onto the wire.
//!
//! Content lives in two kinds of place. What only mappings lead to is found by the dirty tracker and addressed by virtual
//! address (space 0). Shared objects that a descriptor leads to can change behind every tracker's back (write(2)), so they
//! are compared page by page, by hash, and addressed by their own number.

use super::freeze;
use super::objects::ObjectPass;
use super::stop::{Result, Stop};
use super::wire::Wire;
use bytes::{Bytes, BytesMut};
use godwit_kernel::{Errno, memory};
use godwit_pages::{PAGE_SIZE, PageRange, PageSet};
use godwit_proto::wire::shared_object::Kind as ObjectKind;
use godwit_proto::wire::{self, Range};
use godwit_resources::descriptors;
use godwit_resources::memory::{Backing, Layout, LayoutReader, aio};
use godwit_resources::restart::SleepWatch;
use godwit_stream::{Compression, PageEncoder};
use godwit_tracee::Tracee;
use godwit_track::{Changes, EveryPage, Kind, TrackedVma, Tracker, VmaKind, populated};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Pages read at once.
const CHUNK_PAGES: u64 = 256;

/// The memory of the process that is moved.
pub(super) struct Memory {
    pid: i32,
    mem: File,
    pub(super) reader: LayoutReader,
    pub(super) layout: Layout,
    objects: ObjectPass,
    tracker: Option<Box<dyn Tracker>>,
    encoder: PageEncoder,
    buffer: BytesMut,
    /// Pages that could not be read while the process ran: tried again with the next set.
    unread: PageSet,
    /// Whether the next set of changes is the first one: everything that has content.
    arming: bool,
    sent_layout: Option<(wire::Layout, usize)>,
    /// Pages of writable shared file mappings written since tracking began. They are the file's: sent once, at the end, in
    /// case the destination's file is a copy.
    file_pages: PageSet,
    huge: PageSet,
    guards: PageSet,
    pub(super) pages_sent: u64,
}

impl Memory {
    /// Opens the memory of a process and reads its layout.
    ///
    /// # Errors
    /// When the process is gone or has mapped what cannot be moved.
    pub(super) fn open(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/mem");
        let mem = File::open(&path).map_err(|error| Stop::failed(path, error.to_string()))?;
        let mut reader = LayoutReader::new(pid);
        reader.refresh()?;
        let layout = reader.read()?;
        let objects = ObjectPass::default();
        objects.find_descriptors(pid, &mut reader.objects)?;
        Ok(Self {
            pid,
            mem,
            reader,
            layout,
            objects,
            tracker: None,
            encoder: PageEncoder::new(Compression::Adaptive),
            buffer: BytesMut::new(),
            unread: PageSet::new(),
            arming: true,
            sent_layout: None,
            file_pages: PageSet::new(),
            huge: PageSet::new(),
            guards: PageSet::new(),
            pages_sent: 0,
        })
    }

    /// Starts tracking with a tracker made for this process.
    ///
    /// # Errors
    /// When it cannot be armed.
    pub(super) fn track(&mut self, mut tracker: Box<dyn Tracker>) -> Result<()> {
        tracker.arm(&self.tracked())?;
        self.tracker = Some(tracker);
        Ok(())
    }

    /// Ends tracking: the process has its memory back as it was.
    pub(super) fn untrack(&mut self) {
        self.tracker = None;
    }

    /// Reads the layout again; with `slowly`, also what only smaps tells. Returns it if the destination must hear of it.
    ///
    /// # Errors
    /// As [`Memory::open`].
    pub(super) fn follow_layout(&mut self, slowly: Slowly) -> Result<()> {
        if slowly == Slowly::Yes {
            self.reader.refresh()?;
            self.objects.find_descriptors(self.pid, &mut self.reader.objects)?;
        }
        self.layout = self.reader.read()?;
        Ok(())
    }

    /// Describes the layout and the shared objects.
    ///
    /// # Errors
    /// When an object cannot be looked at.
    pub(super) fn describe(&mut self) -> Result<wire::Layout> {
        Ok(wire::Layout { mm: Some(self.layout.mm.clone()), objects: self.reader.objects.describe()? })
    }

    /// Remembers that the destination knows this layout.
    pub(super) fn layout_known(&mut self, layout: &wire::Layout) {
        self.sent_layout = Some((layout.clone(), layout.objects.len()));
    }

    /// Sends the layout if it has changed since the destination last heard of it.
    ///
    /// # Errors
    /// When the link is lost.
    pub(super) fn send_layout(&mut self, wire: &Wire) -> Result<()> {
        let layout = self.describe()?;
        if self.sent_layout.as_ref().is_some_and(|(known, _)| *known == layout) {
            return Ok(());
        }
        wire.send(&layout)?;
        self.layout_known(&layout);
        Ok(())
    }

    /// The pages of a set that belong to writable shared file mappings.
    fn of_shared_files(&self, pages: &PageSet) -> PageSet {
        pages.intersection(&self.of_shared_files_now())
    }

    fn of_shared_files_now(&self) -> PageSet {
        let of_files = self.tracked().into_iter().filter(|vma| vma.kind == VmaKind::SharedFile);
        of_files.map(|vma| vma.range).collect()
    }

    /// Has the file systems write down what was written through shared mappings, for a destination that shares the storage.
    fn sync_shared_files(&self) -> Result<()> {
        let written = self.of_shared_files_now();
        for vma in self.layout.vmas.iter().filter(|vma| written.contains(vma.start)) {
            let path = format!("/proc/{}/map_files/{:x}-{:x}", self.pid, vma.start, vma.end);
            let synced = File::open(path).and_then(|file| file.sync_data());
            synced.map_err(|error| Stop::failed(vma.name_text(), format!("writing it back: {error}")))?;
        }
        Ok(())
    }

    /// Looks for guard pages, which the trackers pass over. For the time just before a freeze.
    ///
    /// # Errors
    /// When the pagemap cannot be read.
    pub(super) fn look_for_guards(&mut self) -> Result<()> {
        self.guards = godwit_track::guards(self.pid, &self.tracked())?;
        Ok(())
    }

    /// What huge pages map, and which pages are guards.
    pub(super) fn peculiar(&self) -> (Vec<Range>, Vec<Range>) {
        (ranges(&self.huge), ranges(&self.guards))
    }

    /// Number of pages that have content.
    ///
    /// # Errors
    /// When the pagemap cannot be read.
    pub(super) fn populated_pages(&self) -> Result<u64> {
        let tracked = populated(self.pid, &self.tracked())?.populated.pages();
        Ok(tracked + self.objects.compared_pages())
    }

    /// The mappings whose pages are tracked by address.
    fn tracked(&self) -> Vec<TrackedVma> {
        let vmas = &self.layout.vmas;
        let before = std::iter::once(None).chain(vmas.iter().map(|vma| Some(vma.end)));
        let after = vmas.iter().skip(1).map(|vma| Some(vma.start)).chain(std::iter::once(None));
        let areas = vmas.iter().zip(&self.layout.mm.vmas);
        areas
            .zip(before.zip(after))
            .filter_map(|((vma, entry), (before, after))| {
                let compared = || {
                    let object = self.reader.objects.by_number(entry.object?)?;
                    Some(ObjectPass::compares(object))
                };
                let kind = match Backing::of(vma) {
                    Backing::Anonymous => VmaKind::PrivateAnonymous,
                    Backing::HugePages => VmaKind::PrivateHugetlb,
                    Backing::File if !vma.shared => VmaKind::PrivateFile,
                    Backing::Object(_) if !vma.shared => VmaKind::PrivateFile,
                    Backing::File if entry.fdflags() as i32 & libc::O_ACCMODE == libc::O_RDWR => VmaKind::SharedFile,
                    Backing::Object(ObjectKind::Hugetlb) => VmaKind::SharedHugetlb,
                    Backing::Object(_) if compared() == Some(false) => VmaKind::SharedMemory,
                    // The file itself, or compared content, holds what such a mapping shows.
                    Backing::File
                    | Backing::Object(_)
                    | Backing::AioRing
                    | Backing::Kernel
                    | Backing::Unsupported(_) => return None,
                };
                let range = PageRange::new(vma.start, vma.end).ok()?;
                // N.B. a list of mappings that change is not always in order.
                let (before, after) = (before.unwrap_or(vma.start), after.unwrap_or(vma.end));
                let room = PageRange::new(before.min(vma.start), after.max(vma.end)).unwrap_or(range);
                Some(TrackedVma { range, room, kind, offset: vma.offset })
            })
            .collect()
    }

    /// Pages written since the last call, or since tracking began, and what was left `unsent` of earlier ones; without a
    /// tracker, all that have content. What the destination must forget is sent on the way.
    ///
    /// # Errors
    /// When the pagemap cannot be read or the link is lost.
    pub(super) fn changed(
        &mut self,
        wire: &Wire,
        stopped: Stopped,
        unsent: &mut PageSet,
        watch: &mut SleepWatch,
    ) -> Result<PageSet> {
        let tracked = self.tracked();
        // Where bits are read and cleared in two steps, a write in between would be lost.
        let pause = self.tracker.as_ref().is_some_and(|tracker| tracker.kind().needs_stop()) && stopped == Stopped::No;
        let held = if pause { Some(Paused::stop(self.pid, watch)?) } else { None };
        let changes = match (&mut self.tracker, stopped) {
            (Some(tracker), Stopped::Yes) => tracker.collect_final(&tracked)?,
            (Some(tracker), Stopped::No) => tracker.collect(&tracked)?,
            (None, _) => {
                let residency = populated(self.pid, &tracked)?;
                Changes { dirty: residency.populated, huge: residency.huge, ..Changes::default() }
            }
        };
        // N.B. after the pages were asked for and before they are read.
        let direct = stopped == Stopped::No && self.tracker.is_some() && descriptors::may_read_directly(self.pid)?;
        match held {
            Some(held) => held.go_on()?,
            None if direct => Paused::stop(self.pid, watch)?.go_on()?,
            None => {}
        }
        if direct && !aio::ring_lengths(self.pid)?.is_empty() {
            self.give_up_tracking(&tracked)?;
        }
        if !changes.absent.is_empty() {
            wire.send(&wire::Drop { space: 0, ranges: ranges(&changes.absent) })?;
        }
        let mut dirty = changes.dirty;
        self.huge = self.huge.subtract(&dirty).subtract(&changes.absent).union(&changes.huge);
        let of_files = self.of_shared_files(&dirty);
        dirty.remove_all(&of_files);
        match (self.arming, stopped) {
            // What a file had before is in the file already.
            (true, _) => self.sync_shared_files()?,
            (false, Stopped::No) => self.file_pages.insert_all(&of_files),
            (false, Stopped::Yes) => {
                dirty.insert_all(&of_files);
                dirty.insert_all(&self.file_pages.intersection(&self.of_shared_files_now()));
            }
        }
        self.arming = false;
        dirty.insert_all(&changes.suspect);
        let mut left = std::mem::take(&mut self.unread).union(&std::mem::take(unsent));
        // N.B. should one of these have content again, the tracker has yet to say so; sent now, it would not be told to forget it.
        left.remove_all(&changes.absent);
        dirty.insert_all(&left);
        // Part of what was found before may have been unmapped since.
        let mapped: PageSet = tracked.iter().map(|vma| vma.range).collect();
        Ok(dirty.intersection(&mapped))
    }

    /// From now on takes every page for written: devices write into some on behalf of asynchronous requests. Such a write is
    /// seen when the request is made, may come after any number of rounds, and nothing tells whether there are any.
    fn give_up_tracking(&mut self, tracked: &[TrackedVma]) -> Result<()> {
        if self.tracker.as_ref().is_some_and(|tracker| tracker.kind() != Kind::EveryPage) {
            tracing::info!("asynchronous reads past the page cache: no page can be taken for unchanged");
            let mapped = tracked.iter().map(|vma| vma.range).collect();
            self.tracker = Some(Box::new(EveryPage::following(self.pid, mapped)?));
        }
        Ok(())
    }

    /// Sends pages of the address space. Those that cannot be read are tried again with the next set, unless the process is
    /// stopped.
    ///
    /// # Errors
    /// When the link is lost, a stopped process's page cannot be read, or `between` says so; it is called between chunks.
    pub(super) fn send_pages(
        &mut self,
        wire: &Wire,
        pages: &PageSet,
        stopped: Stopped,
        between: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let mut chunk: Vec<PageRange> = Vec::new();
        let mut size = 0;
        for range in pages.iter() {
            let mut rest = Some(range);
            while let Some(range) = rest.take() {
                let room = CHUNK_PAGES - size;
                let (now, later) =
                    range.split_at(range.start() + room * PAGE_SIZE).map_or((range, None), |(a, b)| (a, Some(b)));
                chunk.push(now);
                size += now.pages();
                rest = later;
                if size == CHUNK_PAGES || chunk.len() == memory::MAX_PIECES {
                    self.send_chunk(wire, &chunk, stopped)?;
                    between(size)?;
                    chunk.clear();
                    size = 0;
                }
            }
        }
        if size > 0 {
            self.send_chunk(wire, &chunk, stopped)?;
            between(size)?;
        }
        Ok(())
    }

    fn send_chunk(&mut self, wire: &Wire, chunk: &[PageRange], stopped: Stopped) -> Result<()> {
        let total = chunk.iter().map(|range| range.len() as usize).sum::<usize>();
        self.buffer.resize(total, 0);
        let pieces: Vec<(u64, usize)> = chunk.iter().map(|range| (range.start(), range.len() as usize)).collect();
        let whole = memory::read_pieces(self.pid, &pieces, &mut self.buffer) == Ok(total);
        let readable = if whole { chunk.to_vec() } else { self.read_one_by_one(chunk, stopped)? };
        let bytes = self.buffer.split().freeze();
        let mut frames = Vec::new();
        let mut at = 0;
        for range in readable {
            let length = range.len() as usize;
            let piece: Bytes = bytes.slice(at..at + length);
            frames.extend(self.encoder.encode_shared(0, range.start(), &piece, 0));
            self.pages_sent += range.pages();
            at += length;
        }
        wire.send_frames(frames)
    }

    /// Reads pieces through /proc/PID/mem, which also reaches what the process itself may not touch. Returns those that
    /// were read; they lie in the buffer one behind the other.
    fn read_one_by_one(&mut self, chunk: &[PageRange], stopped: Stopped) -> Result<Vec<PageRange>> {
        let mut readable = Vec::new();
        let mut at = 0;
        for page in chunk.iter().flat_map(|range| range.chunks(1)) {
            let end = at + PAGE_SIZE as usize;
            match self.mem.read_exact_at(&mut self.buffer[at..end], page.start()) {
                Ok(()) => {
                    readable.push(page);
                    at = end;
                }
                Err(_) if stopped == Stopped::No => self.unread.insert(page),
                Err(error) => {
                    let code = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
                    return Err(Stop::failed(format!("page at {:#x}", page.start()), format!("reading it: {code}")));
                }
            }
        }
        self.buffer.truncate(at);
        Ok(readable)
    }

    /// Sends what differs in shared objects that are compared by content. Returns the pages sent.
    ///
    /// # Errors
    /// When an object cannot be read or the link is lost.
    pub(super) fn send_objects(&mut self, wire: &Wire) -> Result<u64> {
        let sent = self.objects.send_changed(&self.reader.objects, &mut self.encoder, wire)?;
        self.pages_sent += sent;
        Ok(sent)
    }

    /// Pages with content that post-copy may bring later: private memory that is not locked. Not shared memory: one view that
    /// was not told, or a MADV_DONTNEED that userfaultfd reports like a MADV_REMOVE, would make pages up.
    pub(super) fn can_follow_later(&self, pages: &PageSet) -> PageSet {
        let mut later = PageSet::new();
        for (vma, entry) in self.layout.vmas.iter().zip(&self.layout.mm.vmas) {
            let locked = entry.flags as i32 & libc::MAP_LOCKED != 0;
            if let (Backing::Anonymous, false, Ok(area)) =
                (Backing::of(vma), locked, PageRange::new(vma.start, vma.end))
            {
                later.insert_all(&pages.intersect_range(area));
            }
        }
        later
    }
}

/// A process that is stopped for a moment between rounds.
struct Paused(Tracee);

impl Paused {
    fn stop(pid: i32, watch: &mut SleepWatch) -> Result<Self> {
        freeze::pause(pid, watch).map(Self)
    }

    fn go_on(self) -> Result<()> {
        Ok(self.0.release()?)
    }
}

/// Whether the slow sources of information are read too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slowly {
    Yes,
    No,
}

/// Whether the process is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    Yes,
    No,
}

/// A page set as a message has it.
pub(super) fn ranges(pages: &PageSet) -> Vec<Range> {
    pages.iter().map(|range| Range { start: range.start(), pages: range.pages() }).collect()
}
