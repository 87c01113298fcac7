//! Post-copy: making pages absent, so that touching them asks for them (userfaultfd(2)).

use crate::address_space::AddressSpace;
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::pagemap::{Categories, PagemapFile, ScanRequest};
use godwit_kernel::process::{pidfd_getfd, pidfd_open};
use godwit_kernel::uffd::{Events, Features, Mode, Userfaultfd};
use godwit_pages::{PageRange, PageSet};
use godwit_proto::image::VmaEntry;
use godwit_tracee::{Batch, Tracee};
use nix::poll::{PollFd, PollFlags, poll};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Memory that the process has been told to wait for.
#[derive(Debug)]
pub struct Missing {
    /// The process's userfaultfd, not yet set up: whoever serves faults chooses its features and registers `areas`.
    pub userfaultfd: OwnedFd,
    /// Pages that only the source has, by virtual address.
    pub pages: PageSet,
    /// The areas that have such pages.
    pub areas: PageSet,
}

impl Missing {
    /// Registers the areas: from here on touching a missing page asks for it, and nothing comes there by itself. What came before
    /// is dropped: whoever reads the process's arguments (/proc/PID/cmdline), as many a monitor does, has the kernel put zeros there.
    ///
    /// N.B. after the last remote call that may touch memory, because nobody answers yet.
    ///
    /// # Errors
    /// [`Error::State`] naming the first page that is there and cannot be dropped.
    pub(crate) fn register(self, tracee: &mut Tracee) -> Result<Self> {
        let Self { userfaultfd, pages, areas } = self;
        let userfaultfd = Userfaultfd::from_fd(userfaultfd);
        let failed = |what, errno: Errno| Error::call("userfaultfd", what, errno);
        let features = Features::EVENT_FORK
            | Features::EVENT_REMAP
            | Features::EVENT_REMOVE
            | Features::EVENT_UNMAP
            | Features::THREAD_ID;
        userfaultfd.api(features).map_err(|errno| failed("UFFDIO_API", errno))?;
        for area in areas.iter() {
            userfaultfd
                .register(area.start(), area.len(), Mode::Missing)
                .map_err(|errno| failed("UFFDIO_REGISTER", errno))?;
        }
        let strays = present(tracee.pid(), &pages)?;
        if !strays.is_empty() {
            tracing::debug!(?strays, "somebody has looked at missing pages");
            drop_strays(tracee, &userfaultfd, &strays)?;
            if let Some(stray) = present(tracee.pid(), &pages)?.first() {
                let text = "something is there already that the source did not send";
                return Err(Error::state(format!("page at {:#x}", stray.start), text));
            }
        }
        let userfaultfd = userfaultfd.into_fd().map_err(|errno| failed("keeping its descriptor", errno))?;
        Ok(Self { userfaultfd, pages, areas })
    }
}

/// What lies where pages are missing: it would never be asked for.
fn present(pid: i32, missing: &PageSet) -> Result<Vec<Range<u64>>> {
    let failed = |source: std::io::Error| Error::call(format!("process {pid}"), "reading its pagemap", source);
    let pagemap = PagemapFile::open(pid).map_err(failed)?;
    let mut present = Vec::new();
    if !pagemap.can_scan() {
        return Ok(present);
    }
    let request = ScanRequest {
        category_anyof_mask: Categories::PRESENT | Categories::SWAPPED,
        return_mask: Categories::PRESENT,
        ..ScanRequest::default()
    };
    for range in missing.iter() {
        pagemap
            .scan_each(range.start()..range.end(), &request, |region| present.push(region.start..region.end))
            .map_err(|error| failed(error.errno.into()))?;
    }
    Ok(present)
}

/// Drops pages of registered areas. Whoever does that waits until somebody has read of it.
fn drop_strays(tracee: &mut Tracee, userfaultfd: &Userfaultfd, strays: &[Range<u64>]) -> Result<()> {
    /// Milliseconds between two looks at whether it is done.
    const PATIENCE: u16 = 1;
    let mut batch = Batch::new();
    for stray in strays {
        let advice = [stray.start.into(), (stray.end - stray.start).into(), libc::MADV_DONTNEED.into()];
        batch.call("dropping what came instead of missing pages", libc::SYS_madvise, &advice);
    }
    let is_done = AtomicBool::new(false);
    let read = || {
        let mut room = Events::with_capacity(16);
        while !is_done.load(Ordering::Relaxed) {
            let mut waiting = [PollFd::new(userfaultfd.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut waiting, PATIENCE);
            // N.B. who faults meanwhile waits for the page, which wakes him when it comes.
            let _ = userfaultfd.read_events(&mut room);
        }
    };
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .spawn_scoped(scope, read)
            .map_err(|error| Error::call("userfaultfd", "starting a thread", error))?;
        let dropped = tracee.run(batch);
        is_done.store(true, Ordering::Relaxed);
        dropped?;
        Ok(())
    })
}

/// Whether pages of an area can be fetched after the process runs: private anonymous memory that is not locked.
fn can_wait(area: &VmaEntry) -> bool {
    let of_interest = libc::MAP_ANONYMOUS | libc::MAP_SHARED | libc::MAP_LOCKED | libc::MAP_HUGETLB;
    area.flags as i32 & of_interest == libc::MAP_ANONYMOUS
}

/// Takes the content of `pages` away from a stub (most of it was never there, some has been sent and overwritten since) and
/// opens a userfaultfd in it.
///
/// # Errors
/// When a page lies where the kernel cannot report its absence.
pub(crate) fn prepare(tracee: &mut Tracee, space: &AddressSpace, pages: PageSet) -> Result<Missing> {
    let mut areas = PageSet::new();
    let mut batch = Batch::new();
    for range in pages.iter() {
        let mut covered = 0;
        for (area, start, end) in space.pieces(range.start(), range.end()) {
            if !can_wait(area) {
                return Err(Error::state(format!("mapping at {:#x}", area.start), "its pages cannot be sent later"));
            }
            covered += end - start;
            areas.insert(PageRange::new(area.start, area.end).expect("areas are page aligned"));
        }
        if covered != range.len() {
            return Err(Error::Unmapped { space: 0, address: range.start() });
        }
    }
    // N.B. all of them, not only what was sent before: where the kernel made a huge page of a neighbour, zeros lie already.
    for range in pages.iter() {
        for (_, start, end) in space.pieces(range.start(), range.end()) {
            let advice = [start.into(), (end - start).into(), libc::MADV_DONTNEED.into()];
            batch.call("dropping what is there instead of missing pages", libc::SYS_madvise, &advice);
        }
    }
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = batch.call("userfaultfd", libc::SYS_userfaultfd, &[flags.into()]);
    let outcome = tracee.run(batch)?;
    let number = outcome.result(fd).unwrap_or_default() as i32;
    let taken = pidfd_open(tracee.pid()).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), number));
    let mut batch = Batch::new();
    batch.call("close", libc::SYS_close, &[number.into()]);
    tracee.run(batch)?;
    let userfaultfd = taken.map_err(|source| Error::call("userfaultfd", "pidfd_getfd", source))?;
    Ok(Missing { userfaultfd, pages, areas })
}
