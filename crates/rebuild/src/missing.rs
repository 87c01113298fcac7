//! Post-copy: making pages absent, so that touching them asks for them (userfaultfd(2)).

use crate::address_space::AddressSpace;
use crate::{Error, Result};
use godwit_kernel::pagemap::{Categories, PagemapFile, ScanRequest};
use godwit_kernel::process::{pidfd_getfd, pidfd_open};
use godwit_pages::{PageRange, PageSet};
use godwit_proto::image::VmaEntry;
use godwit_tracee::{Batch, Tracee};
use std::os::fd::{AsFd, OwnedFd};

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

/// Makes sure that nothing lies where pages are missing: what is there already is never asked for. To be called when
/// the areas are registered, from where on nothing comes there by itself.
///
/// # Errors
/// [`Error::State`] naming the first page that is there.
pub(crate) fn verify(pid: i32, missing: &PageSet) -> Result<()> {
    let failed = |source: std::io::Error| Error::call(format!("process {pid}"), "reading its pagemap", source);
    let pagemap = PagemapFile::open(pid).map_err(failed)?;
    if !pagemap.can_scan() {
        return Ok(());
    }
    let request = ScanRequest {
        category_anyof_mask: Categories::PRESENT | Categories::SWAPPED,
        return_mask: Categories::PRESENT,
        ..ScanRequest::default()
    };
    for range in missing.iter() {
        let mut first = None;
        pagemap
            .scan_each(range.start()..range.end(), &request, |region| first = first.or(Some(region.start)))
            .map_err(|error| failed(error.errno.into()))?;
        if let Some(address) = first {
            return Err(Error::state(
                format!("page at {address:#x}"),
                "something is there already that the source did not send",
            ));
        }
    }
    Ok(())
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
