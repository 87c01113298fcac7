//! Post-copy: making pages absent, so that touching them asks for them (userfaultfd(2)).

use crate::address_space::AddressSpace;
use crate::objects::Objects;
use crate::{Error, Result};
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

/// Whether pages of an area can be fetched after the process runs.
fn can_wait(area: &VmaEntry) -> bool {
    let private_file = area.flags as i32 & (libc::MAP_ANONYMOUS | libc::MAP_SHARED) == 0;
    !private_file && area.flags as i32 & libc::MAP_LOCKED == 0
}

/// Takes the content of `pages` away from a stub (most of it was never there, some has been sent and overwritten since) and
/// opens a userfaultfd in it.
///
/// # Errors
/// When a page lies where the kernel cannot report its absence.
pub(crate) fn prepare(
    tracee: &mut Tracee,
    space: &AddressSpace,
    objects: &Objects,
    pages: PageSet,
    filled: &PageSet,
) -> Result<Missing> {
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
    for stale in pages.intersection(filled).iter() {
        for (area, start, end) in space.pieces(stale.start(), stale.end()) {
            match area.object.filter(|_| area.flags as i32 & libc::MAP_SHARED != 0) {
                Some(number) => objects.get(number)?.punch(area.pgoff + (start - area.start), end - start)?,
                None => {
                    let advice = [start.into(), (end - start).into(), libc::MADV_DONTNEED.into()];
                    batch.call("dropping stale pages", libc::SYS_madvise, &advice);
                }
            }
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
