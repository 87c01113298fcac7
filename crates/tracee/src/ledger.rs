//! What must be put right in a process should its tracer be killed: written down in a small file before anything is changed.
//!
//! The file belongs to one process and one tracer, which [`Ledger::install`]s it; from then on every [`Tracee`](crate::Tracee)
//! of that process keeps it. It is best on a memory-backed file system: a host that reboots has lost the process too. A
//! process whose tracer dies is stopped; [`mend`] puts it right from outside, by what stands here.
//!
//! Every write lies within one page, or else counts only from a later one on, so the file is valid whenever the tracer is
//! killed. It is written, not mapped: a file system that is full is an error then, not a signal. Layout, in little-endian words:
//! the head in the first page ([`Head`]), threads from [`THREADS_AT`] on, each in a slot of [`SLOT`] bytes: tid, mask, registers,
//! checksum.

use crate::tracee::{Stop, Thread};
use crate::{Error, Registers, Result};
use godwit_kernel::Errno;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

mod mend;

pub use mend::{Afterwards, Mended, mend};

const MAGIC: u64 = u64::from_le_bytes(*b"godwitL1");
const THREADS_AT: u64 = 4096;
const SLOT: usize = 256;
/// Words of a thread: tid, mask, registers, checksum.
const THREAD_WORDS: usize = 2 + REGISTERS + 1;
const REGISTERS: usize = 27;
/// Most threads that a file may name.
const MAX_THREADS: u64 = 1 << 20;

const _: () = assert!(THREAD_WORDS * 8 <= SLOT && size_of::<Registers>() == REGISTERS * 8);

/// How far a tracer has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum State {
    /// The process is not held.
    Free = 0,
    /// It may be stopped, and nothing else.
    Stopped = 1,
    /// Registers, masks and mappings may be changed.
    Changed = 2,
    /// As well, and should somebody continue it, it runs nothing of its own.
    Parked = 3,
}

/// A mapping of ours in the process, or none if its length is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) base: u64,
    pub(crate) length: u64,
}

/// The first words of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    state: State,
    pid: i32,
    /// When the process started (field 22 of proc_pid_stat(5)): another one may have its pid.
    started: u64,
    /// Whether job control had stopped it already.
    was_stopped: bool,
    threads: u64,
    /// Scratch mappings; the second is about to go.
    scratch: [Region; 2],
    /// A mapping that is being made: the `syscall` instruction that makes it, and its length.
    making: Region,
}

const HEAD_WORDS: usize = 13;

impl Head {
    fn to_bytes(self) -> Vec<u8> {
        let [one, other] = self.scratch;
        let mut words = vec![
            MAGIC,
            self.state as u64,
            self.pid as u64,
            self.started,
            u64::from(self.was_stopped),
            self.threads,
            one.base,
            one.length,
            other.base,
            other.length,
            self.making.base,
            self.making.length,
        ];
        words.push(checksum(&words));
        bytes_of(&words)
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let &[MAGIC, state, pid, started, was_stopped, threads, a, b, c, d, e, f, sum] = words else { return None };
        if sum != checksum(&words[..HEAD_WORDS - 1]) || threads > MAX_THREADS {
            return None;
        }
        let state = match state {
            0 => State::Free,
            1 => State::Stopped,
            2 => State::Changed,
            3 => State::Parked,
            _ => return None,
        };
        let region = |base, length| Region { base, length };
        Some(Self {
            state,
            pid: i32::try_from(pid).ok().filter(|&pid| pid > 1)?,
            started,
            was_stopped: was_stopped != 0,
            threads,
            scratch: [region(a, b), region(c, d)],
            making: region(e, f),
        })
    }
}

/// A ledger, open for writing.
#[derive(Debug)]
pub struct Ledger {
    file: File,
    head: Head,
}

/// The one that is installed and that no tracee keeps at the moment.
static INSTALLED: Mutex<Option<Ledger>> = Mutex::new(None);

impl Ledger {
    /// Begins the ledger of a process in an empty file, open for reading and writing.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::Ledger`] when the file cannot be written.
    pub fn begin(file: File, pid: i32) -> Result<Self> {
        let started = start_time(pid).ok_or(Error::Gone(pid))?;
        let head = Head {
            state: State::Free,
            pid,
            started,
            was_stopped: false,
            threads: 0,
            scratch: [Region::default(); 2],
            making: Region::default(),
        };
        let ledger = Self { file, head };
        ledger.write_head()?;
        Ok(ledger)
    }

    /// Has every [`Tracee`](crate::Tracee) of this process that is frozen from now on keep it; the one before is dropped.
    pub fn install(self) {
        *installed() = Some(self);
    }

    /// Takes the installed ledger back, unless a tracee keeps it.
    pub fn uninstall() -> Option<Self> {
        installed().take()
    }

    /// The installed ledger, if it is that of `pid`.
    pub(crate) fn take(pid: i32) -> Option<Self> {
        installed().take_if(|ledger| ledger.head.pid == pid)
    }

    /// Notes that the process will be stopped.
    pub(crate) fn note_stop(&mut self, was_stopped: bool) -> Result<()> {
        self.head = Head { state: State::Stopped, was_stopped, threads: 0, ..self.head };
        self.head.scratch = [Region::default(); 2];
        self.head.making = Region::default();
        self.write_head()
    }

    /// Notes how the threads are, before anything is changed.
    pub(crate) fn note_threads(&mut self, threads: &[Thread]) -> Result<()> {
        let mut slots = Vec::with_capacity(threads.len() * SLOT);
        for thread in threads {
            slots.extend_from_slice(&slot(thread));
        }
        self.write(&slots, THREADS_AT)?;
        self.head.was_stopped |= threads.iter().any(|thread| matches!(thread.stop, Stop::Group(_)));
        self.head.state = State::Changed;
        self.head.threads = threads.len() as u64;
        self.write_head()
    }

    /// Notes other registers that thread number `index` shall have.
    pub(crate) fn amend(&self, index: usize, thread: &Thread) -> Result<()> {
        self.write(&slot(thread), THREADS_AT + (index * SLOT) as u64)
    }

    /// Notes which mappings are there, and which one is being made.
    pub(crate) fn note_scratch(&mut self, scratch: [Region; 2], making: Region) -> Result<()> {
        self.head.scratch = scratch;
        self.head.making = making;
        self.write_head()
    }

    /// Notes that the process is about to be parked.
    pub(crate) fn note_parked(&mut self) -> Result<()> {
        self.head.state = State::Parked;
        self.write_head()
    }

    /// Notes that nothing is changed any more; the process may still be stopped.
    pub(crate) fn note_put_back(&mut self) -> Result<()> {
        self.head.state = State::Stopped;
        self.write_head()
    }

    /// Notes that the process is not held any more, and makes room for the next tracee.
    pub(crate) fn close(mut self) {
        self.head.state = State::Free;
        if let Err(error) = self.write_head() {
            tracing::error!(%error, "the ledger of a process that was let go cannot be closed");
        }
        *installed() = Some(self);
    }

    fn write_head(&self) -> Result<()> {
        self.write(&self.head.to_bytes(), 0)
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        let pid = self.head.pid;
        self.file
            .write_all_at(bytes, at)
            .map_err(|source| Error::Ledger { pid, source: source.raw_os_error().map_or(Errno::EIO, Errno::from_raw) })
    }
}

fn installed() -> std::sync::MutexGuard<'static, Option<Ledger>> {
    INSTALLED.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// When a process started, in ticks since the host did.
fn start_time(pid: i32) -> Option<u64> {
    let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, also parentheses.
    let behind = text.iter().rposition(|&byte| byte == b')')? + 1;
    String::from_utf8_lossy(&text[behind..]).split_whitespace().nth(19)?.parse().ok()
}

fn slot(thread: &Thread) -> [u8; SLOT] {
    let mut words = vec![thread.tid as u64, thread.mask];
    words.extend_from_slice(&to_words(&thread.registers));
    words.push(checksum(&words));
    let mut slot = [0; SLOT];
    slot[..THREAD_WORDS * 8].copy_from_slice(&bytes_of(&words));
    slot
}

/// A thread as it is written down.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) tid: i32,
    pub(crate) mask: u64,
    pub(crate) registers: Registers,
}

impl Entry {
    fn from_slot(slot: &[u8]) -> Option<Self> {
        let words = words_of(&slot[..THREAD_WORDS * 8]);
        if words[THREAD_WORDS - 1] != checksum(&words[..THREAD_WORDS - 1]) {
            return None;
        }
        let tid = i32::try_from(words[0]).ok().filter(|&tid| tid > 1)?;
        Some(Self { tid, mask: words[1], registers: from_words(words[2..2 + REGISTERS].try_into().ok()?) })
    }
}

/// Tells damage, not malice (FNV-1a over words).
fn checksum(words: &[u64]) -> u64 {
    words.iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| (sum ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(29))
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn words_of(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect()
}

macro_rules! registers_as_words {
    ($($name:ident)*) => {
        fn to_words(registers: &Registers) -> [u64; REGISTERS] {
            [$(registers.$name),*]
        }

        fn from_words(words: [u64; REGISTERS]) -> Registers {
            let [$($name),*] = words;
            Registers { $($name),* }
        }
    };
}
registers_as_words!(
    r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs
);
