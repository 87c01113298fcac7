//! A thread of a program under test that does what somebody else wants: system calls, by ptrace(2). What it was at is not gone on with.

use std::io::IoSlice;
use std::time::Duration;

use anyhow::{Result, ensure};
use godwit_kernel::ptrace::{self, Options, Registers, Status};
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;

use crate::deadline::wait_for;

/// A thread that waits in a system call, and has been taken over. To be used by the thread that made it.
#[derive(Debug)]
pub struct TakenOver {
    tid: i32,
    before: Registers,
}

impl TakenOver {
    /// Takes over the thread of a process (as the test sees it) that has a name, as soon as it waits for something.
    ///
    /// # Errors
    /// There is none, or it is traced.
    pub fn thread(process: u32, name: &str) -> Result<Self> {
        let tid = wait_for(&format!("a thread {name} that waits"), Duration::from_secs(5), || {
            let entries = std::fs::read_dir(format!("/proc/{process}/task"))?;
            let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
            let waits = format!("({name}) S ");
            let path =
                paths.find(|path| std::fs::read_to_string(path.join("stat")).is_ok_and(|stat| stat.contains(&waits)));
            Ok(path.and_then(|path| path.file_name()?.to_str()?.parse::<i32>().ok()))
        })?;
        ptrace::seize(tid, Options::default())?;
        ptrace::interrupt(tid)?;
        let status = ptrace::wait(tid)?;
        ensure!(matches!(status, Status::Stopped { .. }), "{status:?}");
        let before = ptrace::registers(tid)?;
        ensure!(before.orig_rax.cast_signed() >= 0, "it is in no system call");
        Ok(Self { tid, before })
    }

    /// Puts bytes where a call can find them, one place after the other; each has room for 256.
    ///
    /// # Errors
    /// They are too many, or the process is gone.
    pub fn put(&self, place: u64, bytes: &[u8]) -> Result<u64> {
        ensure!(bytes.len() <= 256 && place < 16, "too much");
        // Below what the compiler may use under the stack pointer.
        let address = (self.before.rsp & !0xff) - 8192 + 256 * place;
        let there = RemoteIoVec { base: address as usize, len: bytes.len() };
        process_vm_writev(Pid::from_raw(self.tid), &[IoSlice::new(bytes)], &[there])?;
        Ok(address)
    }

    /// Has it make a system call; gives what that returns, which is a negative errno(3) where it fails.
    ///
    /// # Errors
    /// It does not come back.
    pub fn call(&self, number: i64, arguments: &[u64]) -> Result<i64> {
        let argument = |index: usize| arguments.get(index).copied().unwrap_or_default();
        let registers = Registers {
            // It stands behind a syscall instruction, which is two bytes long.
            rip: self.before.rip - 2,
            rax: number.cast_unsigned(),
            // N.B. else the kernel would make the call again that was interrupted.
            orig_rax: u64::MAX,
            rdi: argument(0),
            rsi: argument(1),
            rdx: argument(2),
            r10: argument(3),
            r8: argument(4),
            r9: argument(5),
            ..self.before
        };
        ptrace::set_registers(self.tid, &registers)?;
        // Its entry, then its exit.
        for _ in 0..2 {
            ptrace::cont_to_syscall(self.tid)?;
            let status = ptrace::wait(self.tid)?;
            let at_call = matches!(status, Status::Stopped { signal, .. } if signal == ptrace::SYSCALL_STOP);
            ensure!(at_call, "it stopped elsewhere: {status:?}");
        }
        Ok(ptrace::registers(self.tid)?.rax.cast_signed())
    }
}
