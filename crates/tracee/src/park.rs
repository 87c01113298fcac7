//! Parking a process that was given away: should somebody continue it (SIGCONT, which nothing can block), it does not run an
//! instruction of its program.
//!
//! Every thread that goes on comes upon pause(2), with all signals blocked, and stays there. Where a filter (seccomp(2)) might end it
//! for that call, or have it return, it comes upon a jump to itself instead, which most code has somewhere inside its instructions: it
//! uses time until it is stopped again, and does nothing else. The registers and masks that it had stand in the ledger.

use crate::freeze::wait_until;
use crate::ledger::Ledger;
use crate::remote::FLAGS;
use crate::tracee::Tracee;
use crate::{Error, Registers, Result, read_status};
use godwit_kernel::ptrace::{self, Options, Status};
use std::time::{Duration, Instant};

/// Stack pointer of a parked thread, by which it is known: nobody else has one that is not even.
const MARK: u64 = u64::from_be_bytes(*b"\0\0godwit") | 1;
/// All signals that can be blocked.
const ALL_SIGNALS: u64 = !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1));
/// `jmp .`
const STAND_STILL: [u8; 2] = [0xeb, 0xfe];

impl Tracee {
    /// Parks a found process: from now on, until it is given back, letting it go or continuing it has it run nothing of its own.
    /// Without a ledger nothing is done, for nobody could put it right if this program were killed. `filtered`: whether a thread may
    /// have a seccomp filter. No remote call may follow before it is given back.
    ///
    /// # Errors
    /// When a thread is gone; it is stopped then, and the ledger tells how it was.
    pub fn park(&mut self, filtered: bool) -> Result<()> {
        if self.ledger.is_none() {
            return Ok(());
        }
        let standing = if filtered { self.find_code(STAND_STILL)? } else { None };
        let place = match standing {
            Some(place) => place,
            None => self.syscall_instruction()?,
        };
        self.ledger.as_mut().map_or(Ok(()), Ledger::note_parked)?;
        for thread in self.threads() {
            let failed = |source| Error::ptrace("park", thread.tid, source);
            // N.B. in this order: nothing runs in between, but a handler would be set up as soon as it can be.
            self.block_signals(thread.tid)?;
            ptrace::set_registers(thread.tid, &parked(thread.registers, place)).map_err(failed)?;
        }
        self.parked = true;
        Ok(())
    }
}

/// Registers of a thread that is about to pause, or to stand still, at `place`.
fn parked(found: Registers, place: u64) -> Registers {
    // N.B. -1: nothing is taken for an interrupted call and restarted.
    Registers { rip: place, rsp: MARK, rax: libc::SYS_pause as u64, orig_rax: u64::MAX, eflags: FLAGS, ..found }
}

/// Whether a process is parked, whoever did it. proc_pid_syscall(5) tells while it is stopped or pauses; one that stands still otherwise, which
/// has all signals blocked as hardly another one has, is interrupted for the moment that it takes to read its stack pointer.
#[must_use]
pub fn is_parked(pid: i32) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    if text.trim_end() == "running" {
        let status = read_status(pid).ok();
        let blocked = status.and_then(|status| status.hexadecimal("SigBlk"));
        return blocked == Some(ALL_SIGNALS) && stack_pointer_of_running(pid) == Some(MARK);
    }
    let stack_pointer = text.split_whitespace().rev().nth(1).and_then(|word| word.strip_prefix("0x"));
    stack_pointer.and_then(|word| u64::from_str_radix(word, 16).ok()) == Some(MARK)
}

/// Interrupts a thread and lets it go on at once, with the signal that it was about to take if there was one.
fn stack_pointer_of_running(tid: i32) -> Option<u64> {
    /// It runs: this takes microseconds, unless it has gone into the kernel for long in this moment.
    const PATIENCE: Duration = Duration::from_secs(1);
    ptrace::seize(tid, Options::default()).ok()?;
    ptrace::interrupt(tid).ok()?;
    let Ok(Some(Status::Stopped { signal, event })) = wait_until(tid, Instant::now() + PATIENCE) else { return None };
    let registers = ptrace::registers(tid);
    let _ = ptrace::detach(tid, if event == 0 { signal } else { 0 });
    registers.ok().map(|registers| registers.rsp)
}
