//! Asynchronous I/O contexts (io_setup(2)): a ring of events in the process's memory, and requests that the kernel works on.
//!
//! Nothing tells how many requests are under way, and devices go on writing into the memory of a stopped process. Only
//! io_destroy(2) waits for all of them, so a context is *taken* inside the freeze: destroyed, its ring held by a pipe
//! (vmsplice(2)) into which the last events still fall. It costs some 30 ms a context, a grace period of the kernel. At the
//! destination, or here if the move is called off, [`rebuild`] makes it again: under its old id, which is the ring's address,
//! with the events that nobody has fetched; polls, which destroying cancels, are submitted again.
//!
//! A new ring's events are those of requests that end at once; their content is then overwritten. The positions in the ring
//! begin at 0, where a program that reads it by itself finds them in order all the same.

use super::backing::Backing;
use crate::{Error, Obstacle, Result};
use godwit_kernel::Errno;
use godwit_kernel::process::{pidfd_getfd, pidfd_open};
use godwit_pages::PAGE_SIZE;
use godwit_proto::image::AioRingEntry;
use godwit_tracee::{Batch, Tracee, Vma, read_maps};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

const MAGIC: u32 = 0xa10a_10a1;
/// Bytes of a ring's header, of an event and of a control block (linux/aio_abi.h).
const HEADER: usize = 32;
const EVENT: usize = 32;
const CONTROL_BLOCK: usize = 64;
const IOCB_CMD_POLL: u16 = 5;
/// Largest ring that is moved: what a pipe can hold.
const MAX_LENGTH: u64 = 1 << 20;
/// Most contexts of a process that are moved.
const MAX_CONTEXTS: usize = 256;
/// Highest address that user space can have.
const ADDRESS_LIMIT: u64 = 0x7fff_ffff_f000;

/// The lengths in bytes of the rings that a running process has mapped.
///
/// # Errors
/// When the process is gone.
pub fn ring_lengths(pid: i32) -> Result<Vec<u64>> {
    let rings = read_maps(pid)?.into_iter().filter(|vma| Backing::of(vma) == Backing::AioRing);
    Ok(rings.map(|vma| vma.end - vma.start).collect())
}

/// Lists why this host could not make contexts with rings of these lengths.
#[must_use]
pub fn check(lengths: &[u64]) -> Vec<Obstacle> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let number = |path: &str| read(path).and_then(|text| text.trim().parse::<u64>().ok());
    let mut obstacles = Vec::new();
    if lengths.len() > MAX_CONTEXTS || lengths.iter().any(|length| !(PAGE_SIZE..=MAX_LENGTH).contains(length)) {
        let text = format!("has more than {MAX_CONTEXTS} contexts, or one with a ring of more than {MAX_LENGTH} bytes");
        return vec![Obstacle::new("asynchronous I/O", text, "")];
    }
    // Several CPUs make small rings larger; the program may have noted how large they are.
    let possible = read("/sys/devices/system/cpu/possible").unwrap_or_default();
    let cpus =
        possible.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<u64>().ok()).map_or(1, |last| last + 1);
    if let Some(length) =
        lengths.iter().find(|&&length| length_for(u64::from(requests(length)).max(cpus * 4)) != length)
    {
        let text = format!("a ring of {length} bytes would be larger here, on {cpus} CPUs");
        let remedy = "have the program ask io_setup(2) for more events";
        obstacles.push(Obstacle::new("asynchronous I/O", text, remedy));
    }
    let wanted: u64 = lengths.iter().map(|&length| u64::from(requests(length))).sum();
    if let (Some(used), Some(limit)) = (number("/proc/sys/fs/aio-nr"), number("/proc/sys/fs/aio-max-nr"))
        && used + wanted > limit
    {
        let text = format!("{wanted} events are more than the {} that are left", limit.saturating_sub(used));
        obstacles.push(Obstacle::new("asynchronous I/O", text, "raise /proc/sys/fs/aio-max-nr"));
    }
    obstacles
}

/// How many events to ask for to get a ring of so many bytes: the kernel doubles them, adds two, and fills the last page.
fn requests(length: u64) -> u32 {
    (((length - HEADER as u64) / EVENT as u64 - 2) / 2).min(u64::from(u32::MAX)) as u32
}

fn length_for(requests: u64) -> u64 {
    (HEADER as u64 + (requests * 2 + 2) * EVENT as u64).next_multiple_of(PAGE_SIZE)
}

/// Destroys all contexts of a stopped process, after waiting for the requests that are under way. `taken` grows by one with
/// each: whatever comes of it, [`rebuild`] has to be called for those.
///
/// # Errors
/// When one cannot be taken.
pub fn take_all(tracee: &mut Tracee, taken: &mut Vec<AioRingEntry>) -> Result<()> {
    for vma in read_maps(tracee.pid())? {
        if Backing::of(&vma) == Backing::AioRing {
            take(tracee, &vma, taken)?;
        }
    }
    Ok(())
}

fn name(id: u64) -> String {
    format!("asynchronous I/O context {id:#x}")
}

fn take(tracee: &mut Tracee, vma: &Vma, taken: &mut Vec<AioRingEntry>) -> Result<()> {
    let (id, length) = (vma.start, vma.end - vma.start);
    let mut header = [0; HEADER];
    tracee.read(id, &mut header)?;
    if Ring(&header).word(16) != MAGIC || length > MAX_LENGTH {
        return Err(Error::Obstacle(Obstacle::new(name(id), "is not one that can be moved", "")));
    }
    let pipe = hold(tracee, id, length)?;
    let mut batch = Batch::new();
    let destroy = batch.attempt("io_destroy", libc::SYS_io_destroy, &[id.into()]);
    match tracee.run(batch)?.result(destroy) {
        Ok(_) => {}
        Err(Errno::EINVAL) => {
            let text = "is what a parent process has left behind";
            return Err(Error::Obstacle(Obstacle::new(name(id), text, "have the program unmap it")));
        }
        Err(source) => return Err(Error::call(name(id), "io_destroy", source)),
    }
    // N.B. it is gone now, whatever becomes of what it held.
    let at = taken.len();
    taken.push(AioRingEntry { id, nr_req: requests(length), ring_len: length as u32, ..AioRingEntry::default() });
    let mut ring = vec![0; length as usize];
    File::from(pipe).read_exact(&mut ring).map_err(|error| {
        Error::call(name(id), "reading its ring", Errno::from_raw(error.raw_os_error().unwrap_or(0)))
    })?;
    let entry = &mut taken[at];
    for event in Ring(&ring).waiting() {
        match cancelled_poll(tracee, event) {
            Some(control_block) => entry.resubmit.push(control_block),
            None => entry.events.get_or_insert_default().extend_from_slice(event),
        }
    }
    tracing::debug!(id, events = entry.events().len() / EVENT, polls = entry.resubmit.len(), "context taken");
    Ok(())
}

/// Has a pipe hold the pages of a ring; returns its reading end, the only one left.
fn hold(tracee: &mut Tracee, address: u64, length: u64) -> Result<OwnedFd> {
    let failed = |what| move |source| Error::call(name(address), what, source);
    let mut batch = Batch::new();
    let ends = batch.buffer(8);
    batch.call("pipe2", libc::SYS_pipe2, &[ends.into(), (libc::O_CLOEXEC | libc::O_NONBLOCK).into()]);
    let outcome = tracee.run(batch)?;
    let (reading, writing) = (outcome.half(ends, 0), outcome.half(ends, 4));
    let taken = pidfd_open(tracee.pid()).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), reading as i32));
    let sized = taken.as_ref().map_err(|&errno| errno).and_then(|pipe| {
        // By us, whose limits are wider.
        nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(length as i32)).map(drop)
    });
    let mut batch = Batch::new();
    let vector = batch.data(&[address.to_le_bytes(), length.to_le_bytes()].concat());
    let arguments = [writing.into(), vector.into(), 1u64.into(), libc::SPLICE_F_NONBLOCK.into()];
    let spliced = batch.attempt("vmsplice", libc::SYS_vmsplice, &arguments);
    for end in [reading, writing] {
        batch.call("close", libc::SYS_close, &[end.into()]);
    }
    let spliced = tracee.run(batch)?.result(spliced);
    let pipe = taken.map_err(failed("pidfd_getfd"))?;
    sized.map_err(failed("F_SETPIPE_SZ"))?;
    match spliced {
        Ok(bytes) if bytes == length => Ok(pipe),
        Ok(_) => Err(Error::call(name(address), "holding its ring", Errno::EAGAIN)),
        Err(source) => Err(Error::call(name(address), "vmsplice", source)),
    }
}

/// The control block of an event that is there only because its context was destroyed: a poll that has seen nothing.
fn cancelled_poll(tracee: &Tracee, event: &[u8]) -> Option<u64> {
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let (data, address, result) = (word(event, 0), word(event, 8), word(event, 16));
    let mut block = [0; CONTROL_BLOCK];
    if result != 0 || tracee.read(address, &mut block).is_err() {
        return None;
    }
    let operation = u16::from_le_bytes([block[16], block[17]]);
    (operation == IOCB_CMD_POLL && word(&block, 0) == data).then_some(address)
}

/// The bytes of a ring, or of its header alone.
struct Ring<'a>(&'a [u8]);

impl<'a> Ring<'a> {
    fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }

    /// The events that nobody has fetched, in order. The program can write what it likes into the header.
    fn waiting(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let ring = self.0;
        let room = ((ring.len() - HEADER) / EVENT) as u32;
        let size = self.word(4).clamp(1, room.max(1));
        let (head, tail) = (self.word(8) % size, self.word(12) % size);
        let count = (tail + size - head) % size;
        (0..count).map(move |index| {
            let at = HEADER + ((head + index) % size) as usize * EVENT;
            &ring[at..at + EVENT]
        })
    }
}

/// Makes contexts again in a stopped process that has nothing mapped at their addresses but maybe our scratch memory. After
/// its descriptors, which polls lead to, and while the memory of their control blocks is there.
///
/// # Errors
/// When the message makes no sense or a context cannot be made here; the others are made all the same.
pub fn rebuild(tracee: &mut Tracee, contexts: &[AioRingEntry]) -> Result<()> {
    if contexts.len() > MAX_CONTEXTS {
        return Err(Error::state("asynchronous I/O", format!("{} contexts are too many", contexts.len())));
    }
    let mut outcome = Ok(());
    for context in contexts {
        outcome = outcome.and(rebuild_one(tracee, context));
    }
    outcome
}

fn rebuild_one(tracee: &mut Tracee, context: &AioRingEntry) -> Result<()> {
    let (id, length) = (context.id, u64::from(context.ring_len));
    validate(context)?;
    clear_scratch_away(tracee, id, length)?;
    let mut batch = Batch::new();
    let made = batch.buffer(8);
    batch.call("io_setup", libc::SYS_io_setup, &[context.nr_req.into(), made.into()]);
    let at = tracee.run(batch)?.word(made, 0);
    let mapped = read_maps(tracee.pid())?.into_iter().find(|vma| vma.start == at).map_or(0, |vma| vma.end - vma.start);
    if mapped != length {
        return Err(Error::state(name(id), format!("its ring has {length} bytes and would have {mapped} here")));
    }
    let mut batch = Batch::new();
    let moves = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    let mut step = |from: u64, to: u64| {
        let arguments = [from.into(), length.into(), length.into(), moves.into(), to.into()];
        batch.call("moving its ring", libc::SYS_mremap, &arguments);
    };
    match at.abs_diff(id) {
        0 => {}
        distance if distance >= length => step(at, id),
        // The kernel does not move a mapping onto a part of itself.
        _ => {
            let aside = free_range(tracee, length, (id.min(at), id.max(at) + length))?;
            step(at, aside);
            step(aside, id);
        }
    }
    if !batch.is_empty() {
        tracee.run(batch)?;
    }
    put_events(tracee, context)?;
    submit_again(tracee, context)
}

pub(crate) fn validate(context: &AioRingEntry) -> Result<()> {
    let length = u64::from(context.ring_len);
    let fits = (PAGE_SIZE..=MAX_LENGTH).contains(&length)
        && length.is_multiple_of(PAGE_SIZE)
        && context.id.is_multiple_of(PAGE_SIZE)
        && context.id.checked_add(length).is_some_and(|end| end <= ADDRESS_LIMIT)
        && context.events().len().is_multiple_of(EVENT)
        && context.events().len() + context.resubmit.len() * EVENT + HEADER + EVENT <= length as usize;
    if fits { Ok(()) } else { Err(Error::state(name(context.id), "its ring makes no sense")) }
}

/// Has the kernel count as many events as wait, by requests for nothing, and gives them their content.
fn put_events(tracee: &mut Tracee, context: &AioRingEntry) -> Result<()> {
    let events = context.events();
    let count = events.len() / EVENT;
    if count == 0 {
        return Ok(());
    }
    let mut batch = Batch::new();
    let file_name = batch.string(b"nothing");
    let file = batch.call("memfd_create", libc::SYS_memfd_create, &[file_name.into(), libc::MFD_CLOEXEC.into()]);
    let file = tracee.run(batch)?.result(file).unwrap_or(0) as u32;
    let mut batch = Batch::new();
    // A read (operation 0) of no bytes.
    let mut block = [0; CONTROL_BLOCK];
    block[20..24].copy_from_slice(&file.to_le_bytes());
    let block = batch.data(&block);
    let blocks = batch.buffer(8 * count);
    for index in 0..count {
        batch.pointer(blocks, 8 * index, block);
    }
    let submitted = batch.attempt("io_submit", libc::SYS_io_submit, &[context.id.into(), count.into(), blocks.into()]);
    batch.call("close", libc::SYS_close, &[file.into()]);
    let submitted = tracee.run(batch)?.result(submitted);
    let mut header = [0; HEADER];
    tracee.read(context.id, &mut header)?;
    let counted = Ring(&header).word(12) as usize;
    match submitted {
        Ok(number) if number as usize == count && counted == count => {}
        Ok(_) => return Err(Error::call(name(context.id), "putting back its events", Errno::EAGAIN)),
        Err(source) => return Err(Error::call(name(context.id), "io_submit", source)),
    }
    tracee.write(context.id + HEADER as u64, events)?;
    Ok(())
}

fn submit_again(tracee: &mut Tracee, context: &AioRingEntry) -> Result<()> {
    if context.resubmit.is_empty() {
        return Ok(());
    }
    let mut batch = Batch::new();
    let blocks: Vec<u8> = context.resubmit.iter().flat_map(|block| block.to_le_bytes()).collect();
    let blocks = batch.data(&blocks);
    let count = context.resubmit.len();
    let submitted = batch.call("io_submit", libc::SYS_io_submit, &[context.id.into(), count.into(), blocks.into()]);
    match tracee.run(batch)?.result(submitted) {
        Ok(number) if number as usize == count => Ok(()),
        _ => Err(Error::call(name(context.id), "submitting its polls again", Errno::EINVAL)),
    }
}

fn clear_scratch_away(tracee: &mut Tracee, id: u64, length: u64) -> Result<()> {
    match tracee.scratch_range() {
        Some((start, end)) if start < id + length && end > id => {
            let base = free_range(tracee, end - start, (id, id + length))?;
            Ok(tracee.move_scratch(base, 0)?)
        }
        _ => Ok(()),
    }
}

/// An address where `length` bytes are free and stay clear of `avoid`.
fn free_range(tracee: &Tracee, length: u64, avoid: (u64, u64)) -> Result<u64> {
    const DISTANCE: u64 = 1 << 20;
    let mut used: Vec<(u64, u64)> = read_maps(tracee.pid())?.iter().map(|vma| (vma.start, vma.end)).collect();
    used.push(avoid);
    used.sort_unstable();
    let mut candidate = DISTANCE;
    for (start, end) in used {
        if start >= candidate + length + DISTANCE {
            break;
        }
        candidate = candidate.max(end + DISTANCE);
    }
    Ok(candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_come_out_as_long_as_they_were() {
        for length in (1..=256).map(|pages| pages * PAGE_SIZE) {
            assert_eq!(length_for(requests(length).into()), length);
        }
    }

    #[test]
    fn lengths_that_a_peer_made_up_are_obstacles() {
        for lengths in [vec![0], vec![95], vec![u64::MAX], vec![PAGE_SIZE; MAX_CONTEXTS + 1]] {
            assert_eq!(check(&lengths).len(), 1, "{lengths:?}");
        }
    }

    #[test]
    fn waiting_events_are_read_around_the_end() {
        let mut ring = vec![0; PAGE_SIZE as usize];
        for (at, value) in [(4, 127u32), (8, 126), (12, 1)] {
            ring[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        ring[HEADER + 126 * EVENT] = 1;
        ring[HEADER] = 2;
        assert_eq!(Ring(&ring).waiting().map(|event| event[0]).collect::<Vec<_>>(), [1, 2]);
        ring[4..16].fill(0xff);
        assert!(Ring(&ring).waiting().count() < 127);
    }

    #[test]
    fn nonsense_is_refused() {
        let good = AioRingEntry { id: 0x7000_0000, nr_req: 62, ring_len: 4096, ..AioRingEntry::default() };
        assert!(validate(&good).is_ok());
        for bad in [
            AioRingEntry { id: 1, ..good.clone() },
            AioRingEntry { id: ADDRESS_LIMIT, ..good.clone() },
            AioRingEntry { ring_len: 0, ..good.clone() },
            AioRingEntry { ring_len: u32::MAX, ..good.clone() },
            AioRingEntry { events: Some(vec![0; 33]), ..good.clone() },
            AioRingEntry { events: Some(vec![0; 4096]), ..good },
        ] {
            assert!(validate(&bad).is_err(), "{bad:?}");
        }
    }
}
