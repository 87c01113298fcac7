//! Running system calls inside a stopped thread.
//!
//! The scratch mapping is one page of code (readable and executable, written through /proc/PID/mem) followed by writable
//! pages for records and buffers. It is made through a `syscall` instruction that the process already has, normally in its
//! vdso. No mapping is ever writable and executable, so a process under PR_SET_MDWE can be driven too.

use crate::freeze::wait_until;
use crate::ledger::{Entry, Region};
use crate::tracee::{CONTINUE, Tracee, own_id};
use crate::{Batch, Error, Outcome, Result, Vma, read_maps, read_status};
use godwit_kernel::blob;
use godwit_kernel::process::send_signal;
use godwit_kernel::ptrace::{self, Registers, Status};
use godwit_kernel::{Errno, memory};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// `syscall`.
const SYSTEM_CALL: [u8; 2] = [0x0f, 0x05];
/// Scratch memory for records and buffers unless a batch needs more.
const DATA_SIZE: u64 = 64 * 1024;
/// Longest time that a batch may take.
const CALL_DEADLINE: Duration = Duration::from_secs(20);
/// Longest time that a call which took too long may take to be broken off.
const INTERRUPT_DEADLINE: Duration = Duration::from_secs(2);
/// `rflags` while running for us: interrupts on, direction and trap flags clear.
pub(crate) const FLAGS: u64 = 0x202;

/// The mapping that remote calls use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scratch {
    pub(crate) base: u64,
    pub(crate) length: u64,
}

impl Scratch {
    fn data(self) -> u64 {
        self.base + PAGE
    }

    /// Where the records of a batch begin.
    fn records(self) -> u64 {
        self.data() + blob::HEADER as u64
    }

    /// Bytes for records and buffers.
    fn capacity(self) -> usize {
        (self.length - PAGE) as usize - blob::HEADER
    }
}

/// Length of a scratch mapping for batches of `size` bytes.
fn length_for(size: usize) -> u64 {
    PAGE + ((size + blob::HEADER) as u64).max(DATA_SIZE).next_multiple_of(PAGE)
}

impl Batch {
    /// Length in bytes that the scratch mapping has to have for it. Where it is shorter it is made anew, wherever the kernel has room: one that
    /// maps memory at given places is in danger of mapping it over itself.
    #[must_use]
    pub fn scratch_length(&self) -> u64 {
        length_for(self.size())
    }
}

impl Tracee {
    /// Runs a batch in thread `tid` and returns what came of it.
    ///
    /// # Errors
    /// [`Error::Remote`] for the first call that failed and had to succeed; [`Error::Gone`] when the thread died.
    pub fn run_in(&mut self, tid: i32, batch: Batch) -> Result<Outcome> {
        let size = batch.size();
        let scratch = self.scratch_for(tid, size)?;
        let base = scratch.records();
        let count = batch.len();
        if count == 0 {
            return batch.outcome(self.pid(), vec![0; size], 0);
        }
        self.write(base, &batch.image(base))?;
        let mut registers = self.thread(tid)?.registers;
        registers.rip = scratch.base;
        registers.rbx = base;
        registers.r12 = count as u64;
        registers.r13 = base;
        registers.eflags = FLAGS;
        let after = self.run_loop(tid, registers, scratch)?;
        let mut image = vec![0; blob::HEADER + size];
        self.read(scratch.data(), &mut image)?;
        let waiting: Vec<u8> = image.drain(..blob::HEADER).collect();
        self.note_waiting(u64::from_le_bytes(waiting[..8].try_into().expect("eight bytes")));
        batch.outcome(self.pid(), image, after.r12 as usize)
    }

    /// Notes the signals that waited when a thread sent itself a SIGSTOP, which has driven out a SIGCONT.
    fn note_waiting(&mut self, set: u64) {
        self.continue_taken |= self.is_found() && set & CONTINUE != 0;
    }

    /// Runs a batch in the thread group leader.
    ///
    /// # Errors
    /// As [`Tracee::run_in`].
    pub fn run(&mut self, batch: Batch) -> Result<Outcome> {
        self.run_in(self.pid(), batch)
    }

    /// Has thread `tid` make one system call through a `syscall` instruction at `instruction`. It then stands as it was found.
    /// `note` is told the result of one that succeeds.
    ///
    /// What follows that instruction is the program's own code, and the thread must not come to it should this program be killed.
    /// So what it is set off for is to stop itself, as the loop does in the end. Only at the entry of that call, with a SIGSTOP
    /// waiting behind it, the call becomes the one that is wanted:
    ///
    /// | this program is killed | the thread |
    /// |---|---|
    /// | before the thread runs | is given the SIGSTOP in whose delivery it stands |
    /// | before the entry, or there before the SIGSTOP is sent | stops itself |
    /// | there before the call is another | stops itself, or is stopped |
    /// | later | comes upon the SIGSTOP behind the call |
    pub(crate) fn lone_call(
        &mut self,
        tid: i32,
        instruction: u64,
        what: &str,
        number: i64,
        arguments: [u64; 6],
        note: impl FnOnce(&mut Self, u64) -> Result<()>,
    ) -> Result<()> {
        let failed = |request| move |source| Error::ptrace(request, tid, source);
        let found = self.thread(tid)?.registers;
        let stop = with_call(found, instruction, libc::SYS_tgkill, self.stop_itself(tid)?);
        self.set_off(tid, stop)?;
        self.run_to_syscall(tid)?;
        // N.B. not earlier: it would come upon it before the call. Not later: nothing would stop it behind another call.
        send_signal(self.pid(), tid, libc::SIGSTOP).map_err(|_| Error::Gone(tid))?;
        let mut entry = ptrace::registers(tid).map_err(failed("registers"))?;
        entry.orig_rax = number as u64;
        set_arguments(&mut entry, arguments);
        ptrace::set_registers(tid, &entry).map_err(failed("set registers"))?;
        self.run_to_syscall(tid)?;
        let after = ptrace::registers(tid).map_err(failed("registers"))?;
        let value = after.rax as i64;
        let outcome = if (-4095..0).contains(&value) {
            let source = Errno::from_raw(-value as i32);
            Err(Error::Remote { what: what.to_owned(), pid: self.pid(), source })
        } else {
            // N.B. while its registers tell of the call.
            note(self, after.rax)
        };
        self.stand_again(tid, stop)?;
        ptrace::set_registers(tid, &found).map_err(failed("set registers"))?;
        outcome
    }

    /// Has a thread at the exit of a system call come upon the SIGSTOP that waits in it. A SIGCONT from outside may have driven
    /// that out: then it makes the call in `stop`, which sends another.
    fn stand_again(&mut self, tid: i32, stop: Registers) -> Result<()> {
        loop {
            self.set_off(tid, stop)?;
            match self.next_signal(tid, Resume::ToSyscall, CALL_DEADLINE)? {
                libc::SIGSTOP => break,
                ptrace::SYSCALL_STOP => self.run_to_syscall(tid)?,
                signal => return Err(self.crashed(tid, signal)),
            }
        }
        self.set_standing(tid, true);
        Ok(())
    }

    /// Arguments of the tgkill(2) with which a thread sends itself a SIGSTOP: its ids are those that it sees itself.
    fn stop_itself(&self, tid: i32) -> Result<[u64; 6]> {
        let own_tid = if tid == self.pid() {
            self.own_pid
        } else {
            own_id(&read_status(tid).map_err(|_| Error::Gone(tid))?).unwrap_or(tid)
        };
        Ok([self.own_pid as u64, own_tid as u64, libc::SIGSTOP as u64, 0, 0, 0])
    }

    /// Gives a thread the registers with which it is to run for us.
    fn set_off(&mut self, tid: i32, mut registers: Registers) -> Result<()> {
        // N.B. -1: the kernel must not take what is in rax for an interrupted call of its own and restart it.
        registers.orig_rax = u64::MAX;
        ptrace::set_registers(tid, &registers).map_err(|source| Error::ptrace("set registers", tid, source))
    }

    /// Runs the loop in a scratch mapping to its end, where the thread stands again. Returns the registers then.
    fn run_loop(&mut self, tid: i32, registers: Registers, scratch: Scratch) -> Result<Registers> {
        self.set_off(tid, registers)?;
        loop {
            match self.next_signal(tid, Resume::Freely, CALL_DEADLINE)? {
                libc::SIGSTOP => {
                    let after = ptrace::registers(tid).map_err(|source| Error::ptrace("registers", tid, source))?;
                    if after.rip == scratch.base + blob::stop_offset() {
                        self.set_standing(tid, true);
                        return Ok(after);
                    }
                    // N.B. the one signal that cannot be blocked; it is sent again when the thread is let go.
                    self.defer(tid, libc::SIGSTOP);
                }
                signal => return Err(self.crashed(tid, signal)),
            }
        }
    }

    /// Runs a thread to the entry of a system call, or from there to its exit.
    fn run_to_syscall(&mut self, tid: i32) -> Result<()> {
        loop {
            match self.next_signal(tid, Resume::ToSyscall, CALL_DEADLINE)? {
                ptrace::SYSCALL_STOP => return Ok(()),
                libc::SIGSTOP => self.defer(tid, libc::SIGSTOP),
                signal => return Err(self.crashed(tid, signal)),
            }
        }
    }

    /// Sends a SIGSTOP to a thread whose signals are blocked, and has it come upon it before it runs an instruction: it stands.
    pub(crate) fn come_to_stand(&mut self, tid: i32) -> Result<()> {
        send_signal(self.pid(), tid, libc::SIGSTOP).map_err(|_| Error::Gone(tid))?;
        self.come_upon_stop(tid)
    }

    fn come_upon_stop(&mut self, tid: i32) -> Result<()> {
        while self.next_signal(tid, Resume::Freely, INTERRUPT_DEADLINE)? != libc::SIGSTOP {}
        self.set_standing(tid, true);
        Ok(())
    }

    fn crashed(&self, tid: i32, signal: i32) -> Error {
        let address = ptrace::registers(tid).map_or(0, |registers| registers.rip);
        Error::Crashed { tid, signal, address }
    }

    /// Resumes a thread until it is about to be given a signal, or comes to a system call.
    fn next_signal(&mut self, tid: i32, mut resume: Resume, patience: Duration) -> Result<i32> {
        let deadline = Instant::now() + patience;
        self.set_standing(tid, false);
        loop {
            let resumed = match resume {
                Resume::Freely => ptrace::cont(tid, 0),
                Resume::Given(signal) => ptrace::cont(tid, signal),
                Resume::ToSyscall => ptrace::cont_to_syscall(tid),
            };
            resumed.map_err(|source| Error::ptrace("resume", tid, source))?;
            resume = resume.without_signal();
            let status = match wait_until(tid, deadline)? {
                Some(status) => status,
                None => {
                    // It must be stopped, or it could not be given back its registers.
                    ptrace::interrupt(tid).map_err(|source| Error::ptrace("interrupt", tid, source))?;
                    match wait_until(tid, Instant::now() + INTERRUPT_DEADLINE)? {
                        Some(ended @ (Status::Exited(_) | Status::Killed(_))) => ended,
                        _ => return Err(Error::CallTimeout { tid, waited_ms: patience.as_millis() as u64 }),
                    }
                }
            };
            match status {
                Status::Exited(_) | Status::Killed(_) => {
                    self.forget(tid);
                    return Err(Error::Gone(tid));
                }
                Status::Stopped { event: ptrace::EVENT_CLONE, .. } => self.welcome(tid, deadline)?,
                // A group stop or a repeated trap: nothing that concerns the calls.
                Status::Stopped { event, .. } if event != 0 && Instant::now() < deadline => {}
                Status::Stopped { event, .. } if event != 0 => {
                    return Err(Error::CallTimeout { tid, waited_ms: patience.as_millis() as u64 });
                }
                Status::Stopped { signal, .. } => return Ok(signal),
            }
        }
    }

    /// Takes the stop of [`Tracee::stop_if_abandoned`] out of the process again: the leader comes upon it before it runs a single
    /// instruction, and is not given it.
    ///
    /// # Errors
    /// When the process is gone, or does not come upon it.
    pub fn go_on(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.stop_waits) {
            return Ok(());
        }
        let tid = self.pid();
        // N.B. nothing else must come first, and a SIGCONT from outside may have taken it away.
        self.block_signals(tid)?;
        godwit_kernel::process::kill(tid, libc::SIGSTOP).map_err(|_| Error::Gone(tid))?;
        self.come_upon_stop(tid)
    }

    /// Gives the threads of a found process their registers and masks back, without letting them run: it is as it was, only stopped.
    /// Should this program be killed, it stays so until it is continued.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn put_back(&mut self) -> Result<()> {
        if !self.is_found() {
            return Ok(());
        }
        for thread in self.threads() {
            ptrace::set_registers(thread.tid, &thread.registers)
                .and_then(|()| ptrace::set_signal_mask(thread.tid, thread.mask))
                .map_err(|source| Error::ptrace("give back", thread.tid, source))?;
        }
        Ok(())
    }

    /// The scratch mapping, made or enlarged as needed.
    fn scratch_for(&mut self, tid: i32, size: usize) -> Result<Scratch> {
        if let Some(scratch) = self.scratch
            && scratch.capacity() >= size
        {
            return Ok(scratch);
        }
        let old = self.scratch.take();
        let scratch = self.make_scratch(tid, None, length_for(size), old).inspect_err(|_| {
            // N.B. whichever there is stays known, so that it is removed when the process is given back.
            self.scratch = self.scratch.or(old);
        })?;
        if let Some(old) = old {
            let inside = |address: u64| (old.base..old.base + old.length).contains(&address);
            if self.instruction.is_some_and(inside) {
                self.instruction = Some(base_instruction(scratch));
            }
            let mut batch = Batch::new();
            batch.call("munmap", libc::SYS_munmap, &[old.base.into(), old.length.into()]);
            self.run_in(tid, batch)?;
            self.note_scratch(None, Region::default())?;
        }
        Ok(scratch)
    }

    /// Writes down the scratch mapping, one that is about to go, and one that is being made.
    fn note_scratch(&mut self, former: Option<Scratch>, making: Region) -> Result<()> {
        let there = [self.scratch, former].map(|scratch| {
            scratch.map_or(Region::default(), |scratch| Region { base: scratch.base, length: scratch.length })
        });
        self.ledger.as_mut().map_or(Ok(()), |ledger| ledger.note_scratch(there, making))
    }

    fn make_scratch(&mut self, tid: i32, wanted: Option<u64>, length: u64, former: Option<Scratch>) -> Result<Scratch> {
        let instruction = self.syscall_instruction()?;
        self.block_signals(tid)?;
        let fixed = if wanted.is_some() { libc::MAP_FIXED_NOREPLACE } else { 0 };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let arguments = [wanted.unwrap_or(0), length, protection as u64, flags as u64, u64::MAX, 0];
        self.note_scratch(former, Region { base: instruction, length })?;
        let mut scratch = Scratch { base: 0, length };
        self.lone_call(tid, instruction, "mapping scratch memory", libc::SYS_mmap, arguments, |tracee, base| {
            scratch.base = base;
            // N.B. recorded before anything else can fail, so that it is removed in every outcome.
            tracee.scratch = Some(scratch);
            tracee.note_scratch(former, Region::default())
        })?;
        self.write_protected(scratch.base, blob::code())?;
        // The loop can do the rest, from its system call on: where the result of a record is stored is writable by then.
        let writable = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let arguments = [scratch.data(), length - PAGE, writable, 0, 0, 0];
        let found = self.thread(tid)?.registers;
        let mut registers = with_call(found, base_instruction(scratch), libc::SYS_mprotect, arguments);
        registers.rbx = scratch.records();
        registers.r12 = 1;
        registers.r13 = scratch.records();
        self.run_loop(tid, registers, scratch)?;
        Ok(scratch)
    }

    /// Moves the scratch mapping to `base`, which must be free, and enlarges it to `length` where it is shorter.
    ///
    /// # Errors
    /// `EEXIST` when something is mapped there.
    pub fn move_scratch(&mut self, base: u64, length: u64) -> Result<()> {
        let tid = self.pid();
        let old = self.scratch_for(tid, 0)?;
        self.instruction = Some(base_instruction(old));
        let length = old.length.max(length);
        self.scratch = None;
        let made = self.make_scratch(tid, Some(base), length, Some(old));
        if made.is_err() {
            self.scratch = self.scratch.or(Some(old));
            return made.map(drop);
        }
        self.instruction = Some(base_instruction(Scratch { base, length }));
        let mut batch = Batch::new();
        batch.call("munmap", libc::SYS_munmap, &[old.base.into(), old.length.into()]);
        self.run(batch)?;
        self.note_scratch(None, Region::default())
    }

    /// First and one-past-last address of the scratch mapping, if there is one.
    #[must_use]
    pub fn scratch_range(&self) -> Option<(u64, u64)> {
        self.scratch.map(|scratch| (scratch.base, scratch.base + scratch.length))
    }

    /// Removes the scratch mapping. The last call cannot come from inside it, so it goes through an instruction of the
    /// process's own. A found process then is as it was, only stopped.
    ///
    /// # Errors
    /// When the process has no system call instruction, or is gone.
    pub fn drop_scratch(&mut self) -> Result<()> {
        let Some(scratch) = self.scratch else { return Ok(()) };
        let inside = |address: u64| (scratch.base..scratch.base + scratch.length).contains(&address);
        if self.instruction.is_some_and(inside) {
            self.instruction = None;
        }
        let instruction = self.syscall_instruction()?;
        let tid = self.pid();
        self.lone_call(
            tid,
            instruction,
            "unmapping scratch memory",
            libc::SYS_munmap,
            [scratch.base, scratch.length, 0, 0, 0, 0],
            |tracee, _| {
                tracee.scratch = None;
                tracee.note_scratch(None, Region::default())
            },
        )?;
        self.put_back()
    }

    /// Which mapping a tracer that was killed had made and not written down, if any.
    pub(crate) fn just_made(&self, making: Region) -> Option<Region> {
        self.threads().iter().find_map(|thread| making.just_made(&thread.registers))
    }

    /// Puts right what a tracer that was killed has left behind: registers, masks and mappings are as its ledger has them.
    pub(crate) fn restore(&mut self, entries: &[Entry], scratch: &[Region]) -> Result<()> {
        for entry in entries {
            self.correct(entry.tid, entry.registers, entry.mask);
        }
        for &region in scratch {
            if self.holds_scratch(region)? {
                self.scratch = Some(Scratch { base: region.base, length: region.length });
                self.block_signals(self.pid())?;
                self.drop_scratch()?;
            }
        }
        self.put_back()
    }

    /// What is still to be put right in a thread that went on as a tracer had left it: all of it if it runs our code, else a mask that lets
    /// nothing through.
    pub(crate) fn still_to_correct(&self, entry: &Entry, scratch: &[Region]) -> Option<Entry> {
        const NEVER_BLOCKED: u64 = 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);
        let thread = self.thread(entry.tid).ok()?;
        let inside = |region: &Region| thread.registers.rip.wrapping_sub(region.base) < region.length;
        if scratch.iter().any(inside) {
            return Some(*entry);
        }
        let is_ours = thread.mask | NEVER_BLOCKED == u64::MAX;
        is_ours.then_some(Entry { registers: thread.registers, ..*entry })
    }

    /// Has every thread of a found process stand that a call has left elsewhere, because it took too long or crashed.
    pub(crate) fn stand_everywhere(&mut self) -> Result<()> {
        let restless: Vec<(i32, Registers)> = (self.threads().iter())
            .filter(|thread| self.is_found() && !thread.stands)
            .map(|thread| (thread.tid, thread.registers))
            .collect();
        for (tid, registers) in restless {
            self.block_signals(tid)?;
            ptrace::set_registers(tid, &registers).map_err(|source| Error::ptrace("set registers", tid, source))?;
            self.come_to_stand(tid)?;
        }
        Ok(())
    }

    /// Whether a scratch mapping is still where a ledger says that one is.
    fn holds_scratch(&self, region: Region) -> Result<bool> {
        let Some(end) = region.base.checked_add(region.length).filter(|_| region.length > PAGE) else {
            return Ok(false);
        };
        let executable = |vma: &Vma| vma.protection & libc::PROT_EXEC != 0 && vma.name.is_empty();
        let maps = read_maps(self.pid())?;
        let inside = maps.iter().filter(|vma| vma.start < end && vma.end > region.base);
        let covered: u64 = inside.clone().map(|vma| vma.end.min(end) - vma.start.max(region.base)).sum();
        let first = inside.min_by_key(|vma| vma.start);
        let mut code = vec![0; blob::code().len()];
        if covered != region.length || !first.is_some_and(executable) || self.read(region.base, &mut code).is_err() {
            return Ok(false);
        }
        Ok(code == blob::code() || code.iter().all(|&byte| byte == 0))
    }

    /// Takes a process out of a group stop. It gets to see no SIGCONT: that ends the stop when it is sent, and a SIGSTOP to the leader
    /// drives it out again. The leader comes upon that before it runs an instruction.
    ///
    /// N.B. everything must be put back: should this program be killed, the process goes on or is stopped again, as it is.
    pub(crate) fn take_out_group_stop(&mut self) -> Result<()> {
        let tid = self.pid();
        for signal in [libc::SIGCONT, libc::SIGSTOP] {
            send_signal(tid, tid, signal).map_err(|_| Error::Gone(tid))?;
        }
        let mut resume = Resume::Freely;
        loop {
            match self.next_signal(tid, resume, INTERRUPT_DEADLINE)? {
                libc::SIGSTOP => break,
                // Its turn has come before: what it leaves on the stack is part of the state.
                signal => resume = Resume::Given(signal),
            }
        }
        self.set_standing(tid, true);
        let registers = ptrace::registers(tid).map_err(|source| Error::ptrace("registers", tid, source))?;
        let mask = ptrace::signal_mask(tid).map_err(|source| Error::ptrace("signal mask", tid, source))?;
        self.correct(tid, registers, mask);
        self.note_continued();
        Ok(())
    }

    /// Address of a `syscall` instruction of the process: in its vdso, or else in any code it has mapped.
    pub(crate) fn syscall_instruction(&mut self) -> Result<u64> {
        if let Some(address) = self.instruction {
            return Ok(address);
        }
        let address = self.find_code(SYSTEM_CALL)?.ok_or(Error::NoSyscallInstruction(self.pid()))?;
        self.instruction = Some(address);
        Ok(address)
    }

    /// Address of some bytes in the process's own code: in its vdso, or else in any code it has mapped.
    pub(crate) fn find_code(&self, bytes: [u8; 2]) -> Result<Option<u64>> {
        let scratch = self.scratch;
        let mut candidates: Vec<Vma> = read_maps(self.pid())?
            .into_iter()
            .filter(|vma| vma.protection & libc::PROT_EXEC != 0 && !vma.name.starts_with(b"[vsyscall"))
            .filter(|vma| scratch.is_none_or(|scratch| vma.start != scratch.base))
            .collect();
        candidates.sort_by_key(|vma| !vma.name.starts_with(b"[vdso"));
        for vma in candidates {
            let mut code = vec![0; vma.length().min(16 << 20) as usize];
            let length = self.mem().read_at(&mut code, vma.start).unwrap_or(0);
            if let Some(offset) = code[..length].windows(2).position(|at| at == bytes) {
                return Ok(Some(vma.start + offset as u64));
            }
        }
        Ok(None)
    }

    /// Reads memory that the process itself may read.
    ///
    /// # Errors
    /// `EFAULT` where nothing is mapped.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Result<()> {
        let wanted = buffer.len();
        self.whole(address, wanted, memory::read(self.pid(), address, buffer))
    }

    /// Writes memory that the process itself may write.
    ///
    /// # Errors
    /// `EFAULT` where nothing is mapped or writing is not allowed.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.whole(address, bytes.len(), memory::write(self.pid(), address, bytes))
    }

    /// Writes private memory whatever its protection, through /proc/PID/mem.
    ///
    /// # Errors
    /// `EIO` where nothing is mapped or the mapping is shared and not writable.
    pub fn write_protected(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let errno = |source: std::io::Error| source.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        self.mem().write_all_at(bytes, address).map_err(|source| Error::memory(self.pid(), address, errno(source)))
    }

    fn whole(&self, address: u64, wanted: usize, done: std::result::Result<usize, Errno>) -> Result<()> {
        let pid = self.pid();
        match done {
            Ok(done) if done == wanted => Ok(()),
            Ok(done) => Err(Error::memory(pid, address + done as u64, Errno::EFAULT)),
            Err(source) => Err(Error::memory(pid, address, source)),
        }
    }
}

#[derive(Clone, Copy)]
enum Resume {
    Freely,
    /// With a signal to come upon.
    Given(i32),
    ToSyscall,
}

impl Resume {
    /// How it goes on after other stops.
    fn without_signal(self) -> Self {
        match self {
            Resume::Given(_) => Resume::Freely,
            other => other,
        }
    }
}

/// Registers with which a thread makes a system call through the instruction at `instruction`.
fn with_call(mut registers: Registers, instruction: u64, number: i64, arguments: [u64; 6]) -> Registers {
    registers.rip = instruction;
    registers.rax = number as u64;
    set_arguments(&mut registers, arguments);
    registers.eflags = FLAGS;
    registers
}

fn set_arguments(registers: &mut Registers, arguments: [u64; 6]) {
    [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = arguments;
}

/// The system call instruction of the loop in a scratch mapping.
fn base_instruction(scratch: Scratch) -> u64 {
    let offset = blob::code().windows(2).position(|bytes| bytes == SYSTEM_CALL);
    scratch.base + offset.expect("the loop makes system calls") as u64
}
