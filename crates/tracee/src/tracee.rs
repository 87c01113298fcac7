//! The handle of a stopped process.

use crate::freeze::{Extent, await_birth, stop_threads};
use crate::ledger::Ledger;
use crate::remote::Scratch;
use crate::{Batch, Error, Result, Status, read_status};
use godwit_kernel::ptrace::{self, Options, Registers};
use godwit_kernel::stub::CloneArguments;
use std::fs::File;
use std::marker::PhantomData;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// SIGCONT in a set of signals.
pub(crate) const CONTINUE: u64 = 1 << (libc::SIGCONT - 1);

/// Longest wait for the end of a thread that was killed while it was held.
pub(crate) const END_PATIENCE: Duration = Duration::from_millis(100);

/// How a thread came to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It ran, and was interrupted.
    Interrupted,
    /// It was in a group stop by this signal (job control) already.
    Group(i32),
}

/// A stopped thread as it was found.
#[derive(Clone, Debug)]
pub struct Thread {
    /// Thread id as this process sees it.
    pub tid: i32,
    /// Registers at the stop.
    pub registers: Registers,
    /// Blocked signals at the stop.
    pub mask: u64,
    /// How it stopped.
    pub stop: Stop,
    /// Signals held back while it ran for us.
    deferred: Vec<i32>,
    /// Whether it stands in the delivery of a SIGSTOP of ours, which stops the process should this program be killed.
    pub(crate) stands: bool,
}

impl Thread {
    /// Reads the state of a thread that has just stopped.
    pub(crate) fn read(tid: i32, stop: Stop, stands: bool) -> Result<Self> {
        let registers = ptrace::registers(tid).map_err(|source| Error::ptrace("registers", tid, source))?;
        let mask = ptrace::signal_mask(tid).map_err(|source| Error::ptrace("signal mask", tid, source))?;
        Ok(Self { tid, registers, mask, stop, deferred: Vec::new(), stands })
    }
}

/// What a thread shall look like when it is let run.
#[derive(Clone, Debug)]
pub struct ThreadState {
    /// General registers.
    pub registers: Registers,
    /// XSAVE area.
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub mask: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It existed before; it is given back as it was.
    Found,
    /// We made it; it dies unless launched.
    Stub,
}

/// A process with (some of) its threads stopped under our control.
#[derive(Debug)]
pub struct Tracee {
    pid: i32,
    /// Process id as it sees itself.
    pub(crate) own_pid: i32,
    threads: Vec<Thread>,
    mem: File,
    origin: Origin,
    pub(crate) scratch: Option<Scratch>,
    /// A `syscall` instruction of the process's own.
    pub(crate) instruction: Option<u64>,
    /// Whether a SIGSTOP of ours waits in it.
    pub(crate) stop_waits: bool,
    /// Whether it must not run here if this handle is dropped without a word.
    given_away: bool,
    /// Whether its threads have other registers than their own, with which nothing of it runs.
    pub(crate) parked: bool,
    /// Whether a SIGCONT from outside was driven out by a SIGSTOP of ours.
    pub(crate) continue_taken: bool,
    /// Where what must be put right is written down.
    pub(crate) ledger: Option<Ledger>,
    /// ptrace answers only the thread that seized.
    bound_to_thread: PhantomData<*const ()>,
}

impl Tracee {
    /// Stops a running process.
    ///
    /// # Errors
    /// When it is gone, traced by somebody else, or a thread does not stop within five seconds; it then runs on as before.
    pub fn freeze(pid: i32, extent: Extent) -> Result<Self> {
        let mut ledger = Ledger::take(pid);
        let stopped = Self::stop(pid, extent, ledger.as_mut());
        let mut tracee = match stopped {
            Ok(tracee) => tracee,
            Err(error) => {
                if let Some(ledger) = ledger {
                    ledger.close();
                }
                return Err(error);
            }
        };
        tracee.ledger = ledger;
        if let Some(ledger) = &mut tracee.ledger {
            ledger.note_threads(&tracee.threads)?;
        }
        tracee.block_all_signals()?;
        Ok(tracee)
    }

    /// Stops all threads of a process whose ledger is not to be touched. N.B. nothing is changed: their signals are not blocked.
    pub(crate) fn freeze_unrecorded(pid: i32) -> Result<Self> {
        Self::stop(pid, Extent::AllThreads, None)
    }

    fn stop(pid: i32, extent: Extent, ledger: Option<&mut Ledger>) -> Result<Self> {
        let status = read_status(pid).map_err(|_| Error::Gone(pid))?;
        if let Some(ledger) = ledger {
            ledger.note_stop(status.state() == 'T')?;
        }
        let filtered = status.number("Seccomp") != Some(0);
        // Wherever it is allowed: other threads than the leader may have filters, and telling takes longer than this.
        let options = Options { suspend_seccomp: filtered || may_suspend_seccomp(), ..Options::default() };
        let threads = stop_threads(pid, extent, options)?;
        let mut tracee = Self::hold(pid, threads, Origin::Found)?;
        tracee.own_pid = own_id(&status).unwrap_or(pid);
        let waits = |field| status.hexadecimal(field).is_some_and(|set| set & CONTINUE != 0);
        tracee.continue_taken = waits("ShdPnd") || waits("SigPnd");
        Ok(tracee)
    }

    /// Takes over a stub; it dies with this handle, or with this process, unless it is launched.
    ///
    /// # Errors
    /// When it is gone.
    pub fn adopt(pid: i32) -> Result<Self> {
        // Its filters are installed by remote calls, and more of those follow.
        let options = Options { exit_kill: true, trace_clone: true, suspend_seccomp: may_suspend_seccomp() };
        let status = read_status(pid).map_err(|_| Error::Gone(pid))?;
        let threads = stop_threads(pid, Extent::Leader, options)?;
        let mut tracee = Self::hold(pid, threads, Origin::Stub)?;
        tracee.own_pid = own_id(&status).unwrap_or(pid);
        tracee.block_all_signals()?;
        Ok(tracee)
    }

    fn hold(pid: i32, threads: Vec<Thread>, origin: Origin) -> Result<Self> {
        let path = format!("/proc/{pid}/mem");
        let opened = File::options().read(true).write(true).open(&path);
        let mem = match opened {
            Ok(mem) => mem,
            Err(source) => {
                for thread in &threads {
                    let _ = ptrace::detach(thread.tid, 0);
                }
                return Err(Error::proc(path, source));
            }
        };
        Ok(Self {
            pid,
            own_pid: pid,
            threads,
            mem,
            origin,
            scratch: None,
            instruction: None,
            stop_waits: false,
            given_away: false,
            parked: false,
            continue_taken: false,
            ledger: None,
            bound_to_thread: PhantomData,
        })
    }

    /// Process id as this process sees it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The stopped threads, the leader first.
    #[must_use]
    pub fn threads(&self) -> &[Thread] {
        &self.threads
    }

    /// One stopped thread.
    ///
    /// # Errors
    /// [`Error::NoThread`].
    pub fn thread(&self, tid: i32) -> Result<&Thread> {
        self.threads.iter().find(|thread| thread.tid == tid).ok_or(Error::NoThread { pid: self.pid, tid })
    }

    /// Changes the registers that a thread will have when it is let go.
    ///
    /// # Errors
    /// [`Error::NoThread`].
    pub fn amend_registers(&mut self, tid: i32, amend: impl FnOnce(&mut Registers)) -> Result<()> {
        let pid = self.pid;
        let place = self.threads.iter().position(|thread| thread.tid == tid);
        let index = place.ok_or(Error::NoThread { pid, tid })?;
        amend(&mut self.threads[index].registers);
        self.ledger.as_ref().map_or(Ok(()), |ledger| ledger.amend(index, &self.threads[index]))
    }

    /// Corrects what was found in a thread that a tracer before this one had changed.
    pub(crate) fn correct(&mut self, tid: i32, registers: Registers, mask: u64) {
        if let Some(thread) = self.threads.iter_mut().find(|thread| thread.tid == tid) {
            (thread.registers, thread.mask) = (registers, mask);
        }
    }

    /// Notes that the group stop is over in which the process was found.
    pub(crate) fn note_continued(&mut self) {
        self.threads.iter_mut().for_each(|thread| thread.stop = Stop::Interrupted);
    }

    /// /proc/PID/mem, open for reading and writing.
    #[must_use]
    pub fn mem(&self) -> &File {
        &self.mem
    }

    pub(crate) fn forget(&mut self, tid: i32) {
        self.threads.retain(|thread| thread.tid != tid);
    }

    pub(crate) fn set_standing(&mut self, tid: i32, stands: bool) {
        if let Some(thread) = self.threads.iter_mut().find(|thread| thread.tid == tid) {
            thread.stands = stands;
        }
    }

    pub(crate) fn defer(&mut self, tid: i32, signal: i32) {
        if let Some(thread) = self.threads.iter_mut().find(|thread| thread.tid == tid) {
            thread.deferred.push(signal);
        }
    }

    /// Takes in the thread whose birth `creator` has just reported.
    pub(crate) fn welcome(&mut self, creator: i32, deadline: Instant) -> Result<()> {
        let message =
            ptrace::event_message(creator).map_err(|source| Error::ptrace("event message", creator, source))?;
        let tid = message as i32;
        if !await_birth(tid, deadline)? {
            return Err(Error::Gone(tid));
        }
        self.threads.push(Thread::read(tid, Stop::Interrupted, false)?);
        self.block_signals(tid)
    }

    /// Creates a thread with id `tid` (as the process itself sees it) in a stub; returns its id as we see it.
    ///
    /// # Errors
    /// `EEXIST` when the id is taken.
    pub fn spawn_thread(&mut self, tid: i32) -> Result<i32> {
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        let arguments = CloneArguments { flags: flags as u64, set_tid_size: 1, ..CloneArguments::default() };
        let mut batch = Batch::new();
        let wanted = batch.data(&tid.to_le_bytes());
        let clone = batch.data(&arguments.to_bytes());
        batch.pointer(clone, std::mem::offset_of!(CloneArguments, set_tid), wanted);
        let what = format!("creating thread {tid}");
        batch.call(what, libc::SYS_clone3, &[clone.into(), size_of::<CloneArguments>().into()]);
        let before = self.threads.len();
        self.run(batch)?;
        self.threads.get(before).map(|thread| thread.tid).ok_or(Error::NoThread { pid: self.pid, tid })
    }

    /// Ends one thread of a stub.
    ///
    /// # Errors
    /// When it could not be run.
    pub fn end_thread(&mut self, tid: i32) -> Result<()> {
        let mut batch = Batch::new();
        batch.call("exit", libc::SYS_exit, &[0u64.into()]);
        match self.run_in(tid, batch) {
            Err(Error::Gone(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(Error::NoThread { pid: self.pid, tid }),
        }
    }

    /// Gives a thread of a stub the state it shall have when launched. No remote call may follow in this thread.
    ///
    /// # Errors
    /// `EINVAL` when the XSAVE area does not suit this CPU.
    pub fn set_state(&mut self, tid: i32, state: &ThreadState) -> Result<()> {
        self.thread(tid)?;
        ptrace::set_registers(tid, &state.registers).map_err(|source| Error::ptrace("set registers", tid, source))?;
        ptrace::set_xstate(tid, &state.xstate).map_err(|source| Error::ptrace("set XSAVE state", tid, source))?;
        ptrace::set_signal_mask(tid, state.mask).map_err(|source| Error::ptrace("set signal mask", tid, source))
    }

    pub(crate) fn is_found(&self) -> bool {
        self.origin == Origin::Found
    }

    /// Blocks the signals of a thread that is about to run for us: having been put back may have let them through.
    pub(crate) fn block_signals(&self, tid: i32) -> Result<()> {
        ptrace::set_signal_mask(tid, u64::MAX).map_err(|source| Error::ptrace("block signals", tid, source))
    }

    /// No handler may run while the process is ours. N.B. when all threads stand: should this program be killed before, it has
    /// to go on as it was.
    fn block_all_signals(&self) -> Result<()> {
        self.threads.iter().try_for_each(|thread| self.block_signals(thread.tid))
    }

    /// Has a found process stop, as by job control, in the moment in which it is let go by the death of this program. When it is
    /// given back it goes on all the same. Before a remote call it must
    /// [`Tracee::go_on`].
    ///
    /// # Errors
    /// When it is gone.
    pub fn stop_if_abandoned(&mut self) -> Result<()> {
        let stopped_already = self.threads.first().is_some_and(|leader| matches!(leader.stop, Stop::Group(_)));
        if !self.stop_waits && !stopped_already {
            godwit_kernel::process::kill(self.pid, libc::SIGSTOP).map_err(|_| Error::Gone(self.pid))?;
            self.stop_waits = true;
        }
        Ok(())
    }

    /// Whether a SIGSTOP waits in it that [`Tracee::stop_if_abandoned`] has sent.
    #[must_use]
    pub fn is_stop_prepared(&self) -> bool {
        self.stop_waits
    }

    /// From now on dropping this handle, as a panic does, leaves a found process stopped: it may run somewhere else. What is said in words
    /// ([`Tracee::release`]) holds all the same.
    pub fn give_away(&mut self) {
        self.given_away = true;
    }

    /// Lets a found process go into the stop that [`Tracee::stop_if_abandoned`] has prepared, parked if it is.
    ///
    /// # Errors
    /// As [`Tracee::release`].
    pub fn release_stopped(mut self) -> Result<()> {
        self.let_go_stopped()
    }

    fn let_go_stopped(&mut self) -> Result<()> {
        self.continue_taken = false;
        if std::mem::take(&mut self.stop_waits) {
            // Once more: a SIGCONT from outside may have taken it away.
            godwit_kernel::process::kill(self.pid, libc::SIGSTOP).map_err(|_| Error::Gone(self.pid))?;
        }
        if !self.parked {
            return self.let_go();
        }
        for thread in std::mem::take(&mut self.threads) {
            detach(thread.tid).map_err(|source| Error::ptrace("detach", thread.tid, source))?;
        }
        // N.B. as it is: it tells how the process was.
        self.ledger = None;
        Ok(())
    }

    /// Has a finished stub live on, stopped, should this program be killed: it may be continued then. No remote call may follow.
    /// That it is killed when its maker ends (PR_SET_PDEATHSIG(2const)) must be over; dropping this handle still kills it.
    ///
    /// # Errors
    /// When a thread is gone.
    pub fn free(&mut self) -> Result<()> {
        let failed = |request, tid| move |source| Error::ptrace(request, tid, source);
        let restless: Vec<i32> = self.threads.iter().filter(|thread| !thread.stands).map(|thread| thread.tid).collect();
        for tid in restless {
            let mask = ptrace::signal_mask(tid).map_err(failed("signal mask", tid))?;
            self.block_signals(tid)?;
            self.come_to_stand(tid)?;
            ptrace::set_signal_mask(tid, mask).map_err(failed("signal mask", tid))?;
        }
        // N.B. when all of them stand.
        let options = Options { suspend_seccomp: may_suspend_seccomp(), ..Options::default() };
        for thread in &self.threads {
            ptrace::set_options(thread.tid, options).map_err(failed("set options", thread.tid))?;
        }
        Ok(())
    }

    /// Lets a finished stub run: the moment it becomes a process.
    ///
    /// # Errors
    /// When a thread is gone.
    pub fn launch(mut self) -> Result<()> {
        for thread in std::mem::take(&mut self.threads) {
            ptrace::detach(thread.tid, 0).map_err(|source| Error::ptrace("detach", thread.tid, source))?;
        }
        Ok(())
    }

    /// Gives a found process back as it was: scratch memory gone, registers and signals restored, threads running.
    ///
    /// # Errors
    /// When something could not be put back; the rest is put back all the same.
    pub fn release(mut self) -> Result<()> {
        self.let_go()
    }

    fn let_go(&mut self) -> Result<()> {
        let mut outcome = self.stand_everywhere().and_then(|()| self.go_on()).and_then(|()| self.drop_scratch());
        let mut keep = |tid, done: Result<(), godwit_kernel::Errno>| {
            if let (Err(source), true) = (done, outcome.is_ok()) {
                outcome = Err(Error::ptrace("give back", tid, source));
            }
        };
        for thread in &self.threads {
            let put_back = ptrace::set_registers(thread.tid, &thread.registers)
                .and_then(|()| ptrace::set_signal_mask(thread.tid, thread.mask));
            keep(thread.tid, put_back);
        }
        // N.B. before the first one runs: what it does from then on must not be undone.
        if let Some(Err(error)) = self.ledger.as_mut().map(Ledger::note_put_back) {
            tracing::error!(pid = self.pid, %error, "noting that it is as it was");
        }
        let group_stopped = self.threads.iter().any(|thread| matches!(thread.stop, Stop::Group(_)));
        for thread in std::mem::take(&mut self.threads) {
            keep(thread.tid, detach(thread.tid));
            for signal in thread.deferred {
                let _ = godwit_kernel::process::send_signal(self.pid, thread.tid, signal);
            }
        }
        if group_stopped {
            await_stop_again(self.pid);
        }
        self.close_ledger();
        if std::mem::take(&mut self.continue_taken) {
            let _ = godwit_kernel::process::kill(self.pid, libc::SIGCONT);
        }
        match outcome {
            Err(Error::Gone(_)) => Ok(()),
            other => other,
        }
    }

    fn close_ledger(&mut self) {
        if let Some(ledger) = self.ledger.take() {
            ledger.close();
        }
    }

    /// Kills the process and reaps its threads as their tracer, the leader last (it reports only then).
    pub fn kill(mut self) {
        self.kill_threads();
    }

    fn kill_threads(&mut self) {
        const REAP_DEADLINE: Duration = Duration::from_secs(10);
        let _ = godwit_kernel::process::kill(self.pid, libc::SIGKILL);
        let deadline = Instant::now() + REAP_DEADLINE;
        let mut threads = std::mem::take(&mut self.threads);
        threads.sort_by_key(|thread| thread.tid == self.pid);
        for thread in threads {
            while let Ok(Some(ptrace::Status::Stopped { .. })) = crate::freeze::wait_until(thread.tid, deadline) {
                let _ = ptrace::cont(thread.tid, 0);
            }
        }
        self.close_ledger();
    }
}

/// Lets a thread go.
fn detach(tid: i32) -> Result<(), godwit_kernel::Errno> {
    let detached = ptrace::detach(tid, 0);
    if detached == Err(godwit_kernel::Errno::ESRCH) {
        // It was killed, and its process is a zombie until its tracer has noticed.
        let _ = crate::freeze::wait_until(tid, Instant::now() + END_PATIENCE);
    }
    detached
}

/// Waits until a process that was let go is back in its group stop: who freezes it next must see that it is in one.
fn await_stop_again(pid: i32) {
    const PATIENCE: Duration = Duration::from_millis(20);
    let deadline = Instant::now() + PATIENCE;
    // N.B. bounded: somebody may have continued it.
    while read_status(pid).is_ok_and(|status| status.state() != 'T') && Instant::now() < deadline {
        std::thread::yield_now();
    }
}

/// The id of a process or thread in its own PID namespace.
pub(crate) fn own_id(status: &Status) -> Option<i32> {
    i32::try_from(*status.numbers("NSpid").last()?).ok()
}

/// Whether this process may hold others with their seccomp filters suspended: it needs CAP_SYS_ADMIN and no filter itself.
fn may_suspend_seccomp() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| {
        let Ok(status) = read_status(std::process::id() as i32) else { return false };
        let privileged = status.hexadecimal("CapEff").is_some_and(|set| set >> CAP_SYS_ADMIN & 1 != 0);
        privileged && status.number("Seccomp") == Some(0)
    })
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if self.threads.is_empty() {
            self.close_ledger();
            return;
        }
        match self.origin {
            Origin::Stub => self.kill_threads(),
            Origin::Found => {
                let let_go = if self.given_away { self.let_go_stopped() } else { self.let_go() };
                if let Err(error) = let_go {
                    tracing::error!(pid = self.pid, %error, "a process could not be given back as it was");
                }
            }
        }
    }
}
