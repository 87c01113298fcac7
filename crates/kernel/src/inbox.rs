//! Reading userfaultfd events so that none is lost when the reader is killed.
//!
//! The kernel lets the thread behind an event (mremap, munmap, madvise, fork) go on as soon as the event is read. A reader
//! that dies between reading and noting it down would leave its successor ignorant of it. Here the kernel writes the
//! messages straight into shared memory: read(2) is over for a killed process only when that is done.
//!
//! A message is four words; a zero first word is an empty place. Rests on userfaultfd(2).

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;

use crate::check;
use crate::uffd::Userfaultfd;

/// Words in one message.
pub const MESSAGE_WORDS: usize = 4;

const PAGEFAULT: u8 = 0x12;
const FORK: u8 = 0x13;
const REMAP: u8 = 0x14;
const REMOVE: u8 = 0x15;
const UNMAP: u8 = 0x16;

/// What a message in the inbox says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A thread waits for the page at this address.
    Fault {
        /// What it touched.
        address: u64,
    },
    /// The process forked.
    Fork,
    /// mremap(2) moved a range.
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// Bytes.
        length: u64,
    },
    /// madvise(2) dropped pages.
    Remove {
        /// First byte.
        start: u64,
        /// First byte after.
        end: u64,
    },
    /// A range was unmapped.
    Unmap {
        /// First byte.
        start: u64,
        /// First byte after.
        end: u64,
    },
    /// Something this code does not know.
    Unknown(u8),
}

/// Says what stands in one place of an inbox; `None` when it is empty.
#[must_use]
pub fn decode(place: &[AtomicU64]) -> Option<Message> {
    let word = |index: usize| place.get(index).map_or(0, |word| word.load(Ordering::Acquire));
    Some(match word(0) as u8 {
        0 => return None,
        PAGEFAULT => Message::Fault { address: word(2) },
        FORK => Message::Fork,
        REMAP => Message::Remap { from: word(1), to: word(2), length: word(3) },
        REMOVE => Message::Remove { start: word(1), end: word(2) },
        UNMAP => Message::Unmap { start: word(1), end: word(2) },
        unknown => Message::Unknown(unknown),
    })
}

/// Empties one place.
pub fn clear(place: &[AtomicU64]) {
    if let Some(first) = place.first() {
        first.store(0, Ordering::Release);
    }
}

/// Reads as many messages as there are and `inbox` (whose places are all empty) holds, in order from its beginning, and
/// the userfaultfds of forked children, in the order of their messages.
///
/// # Errors
/// `EAGAIN` when there is none and the descriptor does not wait.
pub fn read(uffd: &Userfaultfd, inbox: &[AtomicU64]) -> Result<(usize, Vec<Userfaultfd>), Errno> {
    let length = inbox.len() / MESSAGE_WORDS * MESSAGE_WORDS * size_of::<AtomicU64>();
    let read = loop {
        // SAFETY: the words are writable for `length` bytes through shared references, being atomics.
        let read =
            check(unsafe { libc::read(uffd.as_fd().as_raw_fd(), inbox.as_ptr().cast_mut().cast(), length) } as _);
        match read {
            Err(Errno::EINTR) => {}
            other => break other? as usize,
        }
    };
    let count = read / (MESSAGE_WORDS * size_of::<AtomicU64>());
    let mut children = Vec::new();
    for place in inbox.chunks_exact(MESSAGE_WORDS).take(count) {
        if decode(place) == Some(Message::Fork) {
            let fd = place[1].load(Ordering::Acquire) as u32 as RawFd;
            // SAFETY: the kernel has just opened this descriptor for us in this read, and no one else knows of it.
            children.push(Userfaultfd::from_fd(unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((count, children))
}
