//! Bringing a stub's mappings from what they are to what they shall be, and filling them.
//!
//! The difference is taken over segments: stretches between any two boundaries of the old and the new layout. A segment with
//! the same backing on both sides keeps its pages; any other is mapped anew or unmapped. The source reports every page of a
//! mapping that is new to it as changed, so what is mapped anew here is filled again.

use crate::birth::LOWEST;
use crate::objects::Objects;
use crate::{Error, Result};
use godwit_kernel::memory;
use godwit_pages::PAGE_SIZE;
use godwit_proto::image::VmaEntry;
use godwit_proto::magics;
use godwit_proto::wire::shared_object::Kind;
use godwit_tracee::{Arg, Batch, Tracee};
use std::collections::BTreeSet;

const ADDRESS_LIMIT: u64 = 0x7fff_ffff_f000;
/// What [`AddressSpace::calls_between`] looks for room for.
const SOME_ROOM: u64 = 4 << 20;
const PR_SET_VMA: u64 = 0x5356_4d41;
/// Flags that make two areas different mappings, not the same one changed.
const IDENTITY_FLAGS: i32 =
    libc::MAP_SHARED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_GROWSDOWN;

/// The mappings of a stub as they are now, kernel-provided ones left out.
#[derive(Debug, Default)]
pub(crate) struct AddressSpace {
    areas: Vec<VmaEntry>,
}

/// What is done to one segment.
enum Step<'a> {
    Map(&'a VmaEntry),
    Protect(&'a VmaEntry),
    Advise(&'a VmaEntry, u64),
    Unmap,
}

/// Whether the kernel alone can make it. Rings of asynchronous I/O are made last of all.
fn is_kernel_provided(area: &VmaEntry) -> bool {
    const SPECIAL: u32 =
        magics::VMA_AREA_VDSO | magics::VMA_AREA_VVAR | magics::VMA_AREA_VSYSCALL | magics::VMA_AREA_AIORING;
    area.status & SPECIAL != 0
}

fn is_shared(area: &VmaEntry) -> bool {
    area.flags as i32 & libc::MAP_SHARED != 0
}

/// Checks what a peer says of a layout: order, alignment, bounds.
fn validate(areas: &[VmaEntry]) -> Result<()> {
    let mut floor = 0;
    for area in areas {
        let aligned = area.start % PAGE_SIZE == 0 && area.end % PAGE_SIZE == 0 && area.pgoff % PAGE_SIZE == 0;
        // Offsets inside the area can then be added up without care.
        let offset_fits = area.pgoff.checked_add(ADDRESS_LIMIT).is_some_and(|end| i64::try_from(end).is_ok());
        if !aligned
            || !offset_fits
            || area.start < floor
            || area.end <= area.start
            || area.end > ADDRESS_LIMIT
            || area.start < LOWEST
        {
            return Err(Error::state(format!("mapping at {:#x}", area.start), "it is misplaced or out of order"));
        }
        floor = area.end;
    }
    Ok(())
}

/// Whether two areas show the same content at `address`.
fn same_backing(old: &VmaEntry, new: &VmaEntry, address: u64) -> bool {
    let flags = |area: &VmaEntry| area.flags as i32 & IDENTITY_FLAGS;
    if flags(old) != flags(new) || old.object != new.object || old.kernel_page_size != new.kernel_page_size {
        return false;
    }
    let anonymous = old.flags as i32 & libc::MAP_ANONYMOUS != 0;
    anonymous
        || (old.name == new.name
            && (old.device, old.inode) == (new.device, new.inode)
            && old.pgoff + (address - old.start) == new.pgoff + (address - new.start))
}

fn find(areas: &[VmaEntry], address: u64) -> Option<&VmaEntry> {
    let at = areas.partition_point(|area| area.end <= address);
    areas.get(at).filter(|area| area.start <= address)
}

impl AddressSpace {
    /// Looks at a layout before anything is made of it, what the kernel alone can make included.
    ///
    /// # Errors
    /// When no process can have it.
    pub(crate) fn check(areas: &[VmaEntry]) -> Result<()> {
        let ordinary: Vec<VmaEntry> = areas.iter().filter(|area| !is_kernel_provided(area)).cloned().collect();
        validate(&ordinary)?;
        // N.B. vsyscall lies beyond the end, where nobody looks for room.
        let below = areas.iter().filter(|area| area.status & magics::VMA_AREA_VSYSCALL == 0);
        match below.into_iter().find(|area| area.start > area.end || area.end > ADDRESS_LIMIT) {
            Some(area) => Err(Error::state(format!("mapping at {:#x}", area.start), "it is misplaced")),
            None => Ok(()),
        }
    }

    /// A page-aligned address where `length` bytes are free in `areas`, low ones first.
    pub(crate) fn gap(areas: &[VmaEntry], length: u64) -> Option<u64> {
        let mut candidate = 2 * LOWEST;
        for area in areas.iter().filter(|area| area.status & magics::VMA_AREA_VSYSCALL == 0) {
            // One page of distance keeps clear of stack guards.
            if area.start >= candidate + length + (1 << 20) {
                return Some(candidate);
            }
            candidate = candidate.max(area.end + (1 << 20));
        }
        (candidate + length <= ADDRESS_LIMIT).then_some(candidate)
    }

    /// Number of calls that lead from one layout to another, both a peer's: for [`crate::decoders`].
    pub(crate) fn calls_between(old: &[VmaEntry], new: &[VmaEntry]) -> Result<usize> {
        let mut space = Self::default();
        let mut batch = Batch::new();
        for areas in [old, new] {
            Self::check(areas)?;
            let ordinary: Vec<VmaEntry> = areas.iter().filter(|area| !is_kernel_provided(area)).cloned().collect();
            for (start, end, step) in space.steps(&ordinary) {
                plan(&mut batch, start, end, &step, &Objects::default())?;
            }
            space.areas = ordinary;
        }
        let room = Self::gap(new, SOME_ROOM);
        Ok(batch.len() + usize::from(room.is_some()))
    }

    /// Makes the stub's mappings those of `wanted`.
    ///
    /// # Errors
    /// When the layout is not one that a process can have, or a file is not here.
    pub(crate) fn reconcile(&mut self, tracee: &mut Tracee, wanted: &[VmaEntry], objects: &Objects) -> Result<()> {
        let ordinary: Vec<VmaEntry> = wanted.iter().filter(|area| !is_kernel_provided(area)).cloned().collect();
        validate(&ordinary)?;
        if self.areas == ordinary {
            return Ok(());
        }
        let mut batch = Batch::new();
        for (start, end, step) in self.steps(&ordinary) {
            plan(&mut batch, start, end, &step, objects)?;
        }
        if !batch.is_empty() {
            self.clear_scratch_away(tracee, wanted, batch.scratch_length())?;
            tracee.run(batch)?;
        }
        self.areas = ordinary;
        Ok(())
    }

    /// Sees to it that the scratch mapping has a length and lies nowhere where `wanted` has anything.
    fn clear_scratch_away(&self, tracee: &mut Tracee, wanted: &[VmaEntry], length: u64) -> Result<()> {
        let (start, end) = tracee.scratch_range().unwrap_or_default();
        let is_clear = !wanted.iter().any(|area| area.start < end && area.end > start);
        if is_clear && end - start >= length {
            return Ok(());
        }
        // N.B. nor where it is now: it is left for the new one.
        let own = VmaEntry { start, end, ..VmaEntry::default() };
        let mut all: Vec<VmaEntry> = self.areas.iter().chain(wanted).chain([&own]).cloned().collect();
        all.sort_by_key(|area| area.start);
        let gap = Self::gap(&all, length.max(end - start))
            .ok_or_else(|| Error::state("address space", "it has no room for a scratch mapping"))?;
        Ok(tracee.move_scratch(gap, length)?)
    }

    /// The steps that lead to `wanted`, neighbours that need the same one joined.
    fn steps<'a>(&self, wanted: &'a [VmaEntry]) -> Vec<(u64, u64, Step<'a>)> {
        let boundaries: BTreeSet<u64> =
            self.areas.iter().chain(wanted).flat_map(|area| [area.start, area.end]).collect();
        let boundaries: Vec<u64> = boundaries.into_iter().collect();
        let mut steps: Vec<(u64, u64, Step<'a>)> = Vec::new();
        for pair in boundaries.windows(2) {
            let [start, end] = [pair[0], pair[1]];
            let step = match (find(&self.areas, start), find(wanted, start)) {
                (None, None) => continue,
                (Some(_), None) => Step::Unmap,
                (None, Some(new)) => Step::Map(new),
                (Some(old), Some(new)) if !same_backing(old, new, start) => Step::Map(new),
                (Some(old), Some(new)) => {
                    if old.prot != new.prot {
                        steps.push((start, end, Step::Protect(new)));
                    }
                    if old.madv == new.madv && anonymous_name(old) == anonymous_name(new) {
                        continue;
                    }
                    Step::Advise(new, old.madv.unwrap_or(0))
                }
            };
            if let (Some((_, last_end, Step::Map(last))), Step::Map(new)) = (steps.last_mut(), &step)
                && *last_end == start
                && std::ptr::eq(*last, *new)
            {
                *last_end = end;
                continue;
            }
            steps.push((start, end, step));
        }
        steps
    }

    /// Writes pages of the address space.
    ///
    /// # Errors
    /// [`Error::Unmapped`] where nothing is mapped.
    pub(crate) fn write(&self, tracee: &Tracee, objects: &Objects, address: u64, bytes: &[u8]) -> Result<()> {
        let mut address = address;
        let mut rest = bytes;
        while !rest.is_empty() {
            let area = find(&self.areas, address).ok_or(Error::Unmapped { space: 0, address })?;
            let length = rest.len().min((area.end - address) as usize);
            let (now, later) = rest.split_at(length);
            write_into(tracee, objects, area, address, now)?;
            address += length as u64;
            rest = later;
        }
        Ok(())
    }

    /// Pieces `(area, start, end)` of a range, mapped parts only.
    pub(crate) fn pieces(&self, start: u64, end: u64) -> impl Iterator<Item = (&VmaEntry, u64, u64)> {
        let first = self.areas.partition_point(|area| area.end <= start);
        self.areas[first..]
            .iter()
            .take_while(move |area| area.start < end)
            .map(move |area| (area, area.start.max(start), area.end.min(end)))
    }

    /// Locks in memory what was locked at the source (mlock2(2)). After filling, so that nothing is faulted in twice.
    pub(crate) fn lock(&self, tracee: &mut Tracee) -> Result<()> {
        let mut batch = Batch::new();
        for area in self.areas.iter().filter(|area| area.flags as i32 & libc::MAP_LOCKED != 0) {
            let on_fault = has_flag(area, "lf");
            let flags = if on_fault { libc::MLOCK_ONFAULT as u64 } else { 0 };
            let what = format!("mlock at {:#x}", area.start);
            let range = [area.start.into(), (area.end - area.start).into(), flags.into()];
            if area.prot == 0 {
                // What nobody may touch cannot be faulted in; the lock itself holds all the same.
                batch.attempt(what, libc::SYS_mlock2, &range);
            } else {
                batch.call(what, libc::SYS_mlock2, &range);
            }
        }
        if !batch.is_empty() {
            tracee.run(batch)?;
        }
        Ok(())
    }
}

/// Whether the source's kernel showed a two-letter flag for this area.
pub(crate) fn has_flag(area: &VmaEntry, code: &str) -> bool {
    area.vm_flags().split_whitespace().any(|flag| flag == code)
}

fn anonymous_name(area: &VmaEntry) -> Option<&str> {
    area.name().strip_prefix("[anon:")?.strip_suffix(']')
}

fn write_into(tracee: &Tracee, objects: &Objects, area: &VmaEntry, address: u64, bytes: &[u8]) -> Result<()> {
    let writable = area.prot as i32 & libc::PROT_WRITE != 0;
    match area.object.filter(|_| is_shared(area)) {
        Some(number) if objects.get(number)?.description.kind() != Kind::Hugetlb => {
            objects.get(number)?.write(area.pgoff + (address - area.start), bytes)
        }
        _ if writable => {
            let mut done = 0;
            while done < bytes.len() {
                let at = address + done as u64;
                let failed = |source| godwit_tracee::Error::memory(tracee.pid(), at, source);
                done += memory::write(tracee.pid(), at, &bytes[done..]).map_err(failed)?;
            }
            Ok(())
        }
        _ => Ok(tracee.write_protected(address, bytes)?),
    }
}

/// Adds the calls of one step to a batch.
fn plan(batch: &mut Batch, start: u64, end: u64, step: &Step<'_>, objects: &Objects) -> Result<()> {
    let range: [Arg; 2] = [start.into(), (end - start).into()];
    match step {
        Step::Unmap => {
            batch.call(format!("munmap at {start:#x}"), libc::SYS_munmap, &range);
        }
        Step::Protect(area) => {
            batch.call(format!("mprotect at {start:#x}"), libc::SYS_mprotect, &[range[0], range[1], area.prot.into()]);
        }
        Step::Advise(area, before) => plan_advice(batch, start, end, area, *before),
        Step::Map(area) => {
            plan_map(batch, start, end, area, objects)?;
            plan_advice(batch, start, end, area, 0);
        }
    }
    Ok(())
}

fn plan_map(batch: &mut Batch, start: u64, end: u64, area: &VmaEntry, objects: &Objects) -> Result<()> {
    let what = format!("mapping {} at {start:#x}", area.name());
    let object = area.object.map(|number| objects.get(number)).transpose()?;
    if let Some(object) = object.filter(|object| object.description.kind() == Kind::Sysv) {
        return plan_attach(batch, area, &object.description);
    }
    let keep = IDENTITY_FLAGS | libc::MAP_NORESERVE;
    let mut flags = area.flags as i32 & keep | libc::MAP_FIXED;
    if flags & libc::MAP_HUGETLB != 0 {
        flags |= (area.kernel_page_size().trailing_zeros() as i32) << 26;
    }
    let offset = area.pgoff + (start - area.start);
    let length = end - start;
    let arguments = |fd: Arg| -> [Arg; 6] {
        let offset = if flags & libc::MAP_ANONYMOUS != 0 { 0 } else { offset };
        [start.into(), length.into(), area.prot.into(), flags.into(), fd, offset.into()]
    };
    if flags & libc::MAP_ANONYMOUS != 0 {
        batch.call(what, libc::SYS_mmap, &arguments((-1i64).into()));
        return Ok(());
    }
    let path = object.map_or_else(|| area.name().to_owned(), crate::objects::Object::path);
    let mode = if object.is_some() && is_shared(area) { libc::O_RDWR as u32 } else { area.fdflags() };
    let mode = mode as i32 & libc::O_ACCMODE;
    let name = batch.string(path.as_bytes());
    let opening = format!("opening {}", area.name());
    let fd = batch.call(opening, libc::SYS_openat, &[libc::AT_FDCWD.into(), name.into(), mode.into()]);
    batch.call(what, libc::SYS_mmap, &arguments(fd.into()));
    batch.call("close", libc::SYS_close, &[fd.into()]);
    Ok(())
}

/// A System V segment is attached whole; what the process has since unmapped of it is taken away again.
fn plan_attach(batch: &mut Batch, area: &VmaEntry, segment: &godwit_proto::wire::SharedObject) -> Result<()> {
    let length = segment.size.next_multiple_of(PAGE_SIZE);
    let base = area.start.checked_sub(area.pgoff).filter(|&base| area.end <= base + length);
    let base =
        base.ok_or_else(|| Error::state(format!("mapping at {:#x}", area.start), "it lies outside its segment"))?;
    let what = format!("shmat at {base:#x}");
    batch.call(what, libc::SYS_shmat, &[segment.sysv_id.into(), base.into(), libc::SHM_REMAP.into()]);
    for (start, end) in [(base, area.start), (area.end, base + length)] {
        if end > start {
            batch.call("munmap", libc::SYS_munmap, &[start.into(), (end - start).into()]);
        }
    }
    let protection = [area.start.into(), (area.end - area.start).into(), area.prot.into()];
    batch.call("mprotect", libc::SYS_mprotect, &protection);
    Ok(())
}

fn plan_advice(batch: &mut Batch, start: u64, end: u64, area: &VmaEntry, before: u64) {
    let wanted = area.madv();
    let undone = [
        (libc::MADV_DONTFORK, libc::MADV_DOFORK),
        (libc::MADV_DONTDUMP, libc::MADV_DODUMP),
        (libc::MADV_WIPEONFORK, libc::MADV_KEEPONFORK),
        (libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE),
        (libc::MADV_SEQUENTIAL, libc::MADV_NORMAL),
        (libc::MADV_RANDOM, libc::MADV_NORMAL),
    ];
    let gone = undone.into_iter().filter(|&(advice, _)| before & !wanted & (1 << advice) != 0).map(|(_, undo)| undo);
    let fresh = (0..64).filter(|&advice| wanted & !before & (1u64 << advice) != 0);
    for advice in gone.chain(fresh) {
        let what = format!("madvise({advice}) at {start:#x}");
        // N.B. an attempt: advice that this kernel does not know changes nothing a program could see.
        batch.attempt(what, libc::SYS_madvise, &[start.into(), (end - start).into(), advice.into()]);
    }
    if let Some(name) = anonymous_name(area) {
        let name = batch.string(name.as_bytes());
        let arguments = [PR_SET_VMA.into(), 0.into(), start.into(), (end - start).into(), name.into()];
        batch.attempt("naming a mapping", libc::SYS_prctl, &arguments);
    }
}
