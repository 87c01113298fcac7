//! System calls that the stop interrupted, and how long they had still to wait (signal(7), restart_syscall(2)).
//!
//! What the kernel does with an interrupted call is in the registers at the stop. The error codes below never reach a
//! program; a thread that is resumed with one of them in `rax` and the call's number in `orig_rax` has it dealt with by the
//! kernel, at the destination as at the source, and handlers of signals that wait come first, as they should:
//!
//! - `ERESTARTSYS`, `ERESTARTNOINTR`, `ERESTARTNOHAND`: the call is made again. Nothing to do.
//! - `ERESTART_RESTARTBLOCK`: the call is continued with an end that the kernel remembers beside the registers. The source
//!   does so by itself when thawed. A destination has nothing to remember and would return `EINTR`; there the call is made
//!   again with a timeout of what was left.
//! - `EINTR`: a few calls give up on any wake-up, as for a stop that is none of the program's business. They get
//!   `ERESTARTNOHAND` instead, so that they only fail when a handler really runs.
//!
//! How much was left is known for sleeps that were given a place to store it. For others it is worked out from when the
//! thread went to sleep, which the scheduler notes (`se.exec_start` of /proc/PID/task/TID/sched, on a clock that each CPU
//! has of its own). Waking overwrites the note, hence a [`SleepWatch`]: sampled before the freeze, it is compared
//! afterwards with how often the thread has run. Where no sample is valid the whole timeout is taken: a call may last too
//! long by the time between sample and freeze, never too short.

mod call;
pub(crate) mod sample;

use crate::registers::{RSEQ_CS_AT, RSEQ_CS_SIZE, leave_sequence};
use crate::{Error, Result};
use call::{Timeout, give_up_on_wake, timeout};
use godwit_kernel::ptrace;
use godwit_tracee::{Registers, Tracee};
use sample::Sample;
use std::collections::HashMap;

const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;
const NANOSECONDS: i64 = 1_000_000_000;

/// A thread's interrupted wait that ends at a certain time.
#[derive(Clone, Copy, Debug)]
struct Wait {
    /// The call, also when the kernel has replaced its number by that of restart_syscall(2).
    number: i64,
    registers: Registers,
    /// CLOCK_MONOTONIC of this process in nanoseconds.
    expires_ns: Option<i64>,
}

impl Wait {
    /// Whether `registers` are those of the same wait, continued. One that should be over by now is another one: the same
    /// place of the program, waiting once more.
    fn continues_in(&self, registers: &Registers, now: i64) -> bool {
        const LATE_NS: i64 = 50_000_000;
        let place = |r: &Registers| [r.rip, r.rsp, r.rdi, r.rsi, r.rdx, r.r10, r.r8];
        place(&self.registers) == place(registers) && self.expires_ns.is_none_or(|expires| expires > now - LATE_NS)
    }
}

/// Knows how long the threads of a process have been waiting in their present calls.
#[derive(Debug, Default)]
pub struct SleepWatch {
    samples: HashMap<i32, Sample>,
    waits: HashMap<i32, Wait>,
}

impl SleepWatch {
    /// Creates one that has not looked yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at the threads of a running process without disturbing them. To be called shortly before a freeze; takes
    /// about 50 µs for a thread that waits with a timeout, and moves the calling thread from CPU to CPU meanwhile.
    pub fn sample(&mut self, pid: i32, tids: &[i32]) {
        self.samples = sample::sample(pid, tids);
    }

    /// Settles what the stop has done to the threads of `tracee`, right after it was frozen: no remote call may come before.
    ///
    /// Amends the registers that they will have when they are let go, so that no restartable sequence goes on where it was
    /// (the calls that follow would hide the stop from it) and no call fails because of the stop. Notes how long each
    /// timed call had left.
    ///
    /// # Errors
    /// When a thread is gone.
    pub fn settle(&mut self, tracee: &mut Tracee) -> Result<()> {
        let now = monotonic_ns();
        let threads: Vec<(i32, Registers)> =
            tracee.threads().iter().map(|thread| (thread.tid, thread.registers)).collect();
        for (tid, mut registers) in threads {
            let before = registers;
            settle_sequence(tracee, tid, &mut registers)?;
            self.settle_call(tracee, tid, &mut registers, now);
            if registers != before {
                tracee.amend_registers(tid, |saved| *saved = registers)?;
            }
        }
        Ok(())
    }

    fn settle_call(&mut self, tracee: &Tracee, tid: i32, registers: &mut Registers, now: i64) {
        let number = registers.orig_rax as i64;
        let error = -(registers.rax as i64);
        let restarts = error == ERESTART_RESTARTBLOCK;
        let gives_up = error == i64::from(libc::EINTR) && give_up_on_wake(number);
        if number < 0 || !(restarts || gives_up) {
            self.waits.remove(&tid);
            return;
        }
        let known = self.waits.remove(&tid).filter(|wait| wait.continues_in(registers, now));
        let number = match number {
            libc::SYS_restart_syscall => match known.map(|wait| wait.number).or_else(|| self.guess(tid, registers)) {
                Some(number) => number,
                None => return,
            },
            number => number,
        };
        let expires_ns = self.expiry(tracee, tid, number, registers, known, now);
        if gives_up {
            registers.rax = -ERESTARTNOHAND as u64;
            if let (Some(Timeout::Milliseconds(argument)), Some(expires)) = (timeout(number, registers), expires_ns) {
                *argument.of(registers) = milliseconds(expires - now);
            }
        }
        self.waits.insert(tid, Wait { number, registers: *registers, expires_ns });
    }

    /// What call a thread was in that says restart_syscall(2) without our having seen the beginning.
    fn guess(&self, tid: i32, registers: &Registers) -> Option<i64> {
        self.samples.get(&tid).and_then(|sample| sample.guess(registers))
    }

    /// When the wait of a thread ends; `None` when it does not end, or ends at an absolute time that is an argument.
    fn expiry(
        &self,
        tracee: &Tracee,
        tid: i32,
        number: i64,
        registers: &mut Registers,
        known: Option<Wait>,
        now: i64,
    ) -> Option<i64> {
        let continued = registers.orig_rax as i64 == libc::SYS_restart_syscall;
        let total = match timeout(number, registers)? {
            Timeout::Milliseconds(argument) => i64::from(*argument.of(registers) as i32) * 1_000_000,
            // The kernel has just stored here what is left.
            Timeout::Sleep { remaining, .. } if remaining != 0 => {
                return read_timespec(tracee, remaining).map(|left| now.saturating_add(left));
            }
            Timeout::Sleep { argument, .. } | Timeout::Timespec(argument) => {
                read_timespec(tracee, *argument.of(registers))?
            }
        };
        if let Some(wait) = known.filter(|_| continued) {
            return wait.expires_ns;
        }
        let began = self
            .samples
            .get(&tid)
            .filter(|sample| sample.is_of(registers) && sample.is_undisturbed(tracee.pid(), tid))
            .and_then(|sample| sample.began_ns);
        Some(began.unwrap_or(now).saturating_add(total))
    }

    /// The call that a thread was waiting in, and the nanoseconds it had left, if [`SleepWatch::settle`] found it in a
    /// timed one.
    pub(crate) fn wait(&self, tid: i32) -> Option<(i64, Option<i64>)> {
        let wait = self.waits.get(&tid)?;
        Some((wait.number, wait.expires_ns.map(|expires| (expires - monotonic_ns()).max(0))))
    }
}

fn monotonic_ns() -> i64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |now| now.tv_sec() * NANOSECONDS + now.tv_nsec())
}

fn read_timespec(tracee: &Tracee, address: u64) -> Option<i64> {
    let mut bytes = [0; 16];
    tracee.read(address, &mut bytes).ok()?;
    let word = |at: usize| i64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let (seconds, nanoseconds) = (word(0), word(8));
    (seconds >= 0 && (0..NANOSECONDS).contains(&nanoseconds))
        .then(|| seconds.saturating_mul(NANOSECONDS).saturating_add(nanoseconds))
}

fn timespec(nanoseconds: i64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(nanoseconds / NANOSECONDS).to_le_bytes());
    bytes[8..].copy_from_slice(&(nanoseconds % NANOSECONDS).to_le_bytes());
    bytes
}

/// Whole milliseconds, rounded up as the kernel does: a wait never ends early.
fn milliseconds(nanoseconds: i64) -> u64 {
    let rounded = nanoseconds.max(0).saturating_add(999_999) / 1_000_000;
    rounded.min(i64::from(i32::MAX)) as u64
}

/// Takes a thread out of the restartable sequence that the stop interrupted.
fn settle_sequence(tracee: &Tracee, tid: i32, registers: &mut Registers) -> Result<()> {
    // The error means a kernel without the request (before 5.13), where nothing can be done.
    let Ok(configuration) = ptrace::rseq_configuration(tid) else { return Ok(()) };
    if configuration.pointer == 0 {
        return Ok(());
    }
    let mut pointer = [0; 8];
    if tracee.read(configuration.pointer.wrapping_add(RSEQ_CS_AT), &mut pointer).is_err() {
        return Ok(());
    }
    let mut sequence = [0; RSEQ_CS_SIZE];
    match u64::from_le_bytes(pointer) {
        0 => return Ok(()),
        address if tracee.read(address, &mut sequence).is_err() => return Ok(()),
        _ => {}
    }
    if leave_sequence(registers, &sequence) {
        tracing::debug!(tid, "taken out of a restartable sequence");
    }
    Ok(())
}

/// Distance from the stack pointer to a timeout placed below it: the red zone of 128 bytes, and the structure itself.
const BELOW_STACK: u64 = 128 + 16;

/// Where the timeout of an interrupted call is put in memory, if that is needed.
pub(crate) fn timeout_place(registers: &Registers) -> Option<u64> {
    let mut registers = *registers;
    match timeout(registers.orig_rax as i64, &registers)? {
        Timeout::Milliseconds(_) => None,
        Timeout::Sleep { remaining, .. } if remaining != 0 => Some(remaining),
        Timeout::Sleep { argument, .. } | Timeout::Timespec(argument) => {
            // A null timeout waits for ever.
            (*argument.of(&mut registers) != 0).then(|| registers.rsp.wrapping_sub(BELOW_STACK) & !15)
        }
    }
}

/// Prepares a thread of a stub, whose memory is in place, to make its interrupted call again with `left` nanoseconds.
///
/// A timeout that is passed by pointer is written where the program expects the rest of a sleep to be stored, or else below
/// its stack, where only a signal handler could overwrite it, and the call is not made again after one.
pub(crate) fn resume(stub: &Tracee, registers: &mut Registers, left: Option<i64>) -> Result<()> {
    let error = -(registers.rax as i64);
    let number = registers.orig_rax as i64;
    if number < 0 || !matches!(error, ERESTART_RESTARTBLOCK | ERESTARTNOHAND) {
        return Ok(());
    }
    if error == ERESTART_RESTARTBLOCK {
        if number == libc::SYS_restart_syscall {
            tracing::warn!("a thread continues an unknown call, which will return EINTR");
            registers.rax = -i64::from(libc::EINTR) as u64;
            return Ok(());
        }
        registers.rax = -ERESTARTNOHAND as u64;
    }
    let Some(left) = left else { return Ok(()) };
    let place = timeout_place(registers);
    let argument = match timeout(number, registers) {
        None => return Ok(()),
        Some(Timeout::Milliseconds(argument)) => {
            *argument.of(registers) = milliseconds(left);
            return Ok(());
        }
        Some(Timeout::Sleep { argument, .. } | Timeout::Timespec(argument)) => argument,
    };
    let Some(address) = place else { return Ok(()) };
    match stub.write(address, &timespec(left)) {
        Ok(()) => *argument.of(registers) = address,
        Err(error @ godwit_tracee::Error::Gone(_)) => return Err(Error::Tracee(error)),
        Err(error) => tracing::warn!(%error, "an interrupted call waits its whole time again"),
    }
    Ok(())
}
