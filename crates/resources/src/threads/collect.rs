//! Reading a frozen process. Runs inside the freeze: few files, one batch per thread.

use super::Collected;
use crate::credentials::CredentialQuestions;
use crate::filesystem::{self, MaskQuestion};
use crate::identity::{Group, Numbering};
use crate::limits::LimitQuestions;
use crate::restart::SleepWatch;
use crate::scheduling::SchedulingQuestions;
use crate::signals::{self, ActionQuestions, StackQuestion};
use crate::timers::{self, ClockQuestions, Clocks, TimerQuestions};
use crate::{Error, Obstacle, Result, registers, seccomp};
use godwit_kernel::Errno;
use godwit_kernel::process::{self, Compared};
use godwit_kernel::ptrace::{self, Queue};
use godwit_proto::image::core_entry::March;
use godwit_proto::image::{
    CoreEntry, PosixTimerEntry, PstreeEntry, SeccompEntry, SeccompMode, TaskCoreEntry, ThreadCoreEntry,
};
use godwit_proto::magics::{TASK_ALIVE, TASK_STOPPED};
use godwit_tracee::{Batch, Buffer, Call, Outcome, Stop, Thread, Tracee};

const PR_GET_TID_ADDRESS: i32 = 40;
const PR_GET_THP_DISABLE: i32 = 42;
/// Asks for the present personality without setting one.
const PERSONALITY_QUERY: u32 = u32::MAX;
const MEMBARRIER_CMD_GET_REGISTRATIONS: i32 = 1 << 9;

/// Reads the threads of a frozen process and what they share.
///
/// `watch` must have settled this freeze. `numbering` translates thread ids to those that the process sees.
///
/// # Errors
/// [`Error::Obstacle`] for what appeared after the inspection and cannot be moved; otherwise when a thread is gone.
pub fn collect(tracee: &mut Tracee, numbering: &mut Numbering, watch: &SleepWatch) -> Result<Collected> {
    let pid = tracee.pid();
    let stopped = tracee.threads().to_vec();
    let mut all = SeccompEntry::default();
    let mut tids = Vec::with_capacity(stopped.len());
    let mut threads = Vec::with_capacity(stopped.len());
    let mut shared = None;
    for thread in &stopped {
        require_sharing(pid, thread.tid)?;
        tids.push(numbering.inner(pid, thread.tid)? as u32);
        let mut batch = Batch::new();
        let process = match thread.tid == pid {
            true => Some(ProcessQuestions::ask(&mut batch, timers::list(pid)?)),
            false => None,
        };
        let questions = ThreadQuestions::ask(&mut batch);
        let outcome = tracee.run_in(thread.tid, batch)?;
        let mut core = questions.answer(&outcome, tracee, thread, &mut all, watch)?;
        if let Some(process) = process {
            shared = Some(process.answer(&outcome, thread, &mut core, numbering)?);
        }
        threads.push(core);
    }
    let shared = shared.ok_or_else(|| Error::state(format!("process {pid}"), "its leader was not stopped"))?;
    let group = Group::read(pid)?;
    let process = PstreeEntry {
        pid: tids[0],
        ppid: group.parent as u32,
        pgid: numbering.same(pid, group.group)? as u32,
        sid: numbering.same(pid, group.session)? as u32,
        threads: tids,
    };
    let mut place = filesystem::directories(pid)?;
    place.umask = shared.umask;
    if let Some(obstacle) = filesystem::obstacles(&place).into_iter().next() {
        return Err(Error::Obstacle(obstacle));
    }
    let leader = threads.remove(0);
    Ok(Collected {
        process,
        leader,
        threads,
        seccomp: all,
        place,
        dumpable: shared.dumpable,
        thp_disabled: shared.thp_disabled,
        clocks: shared.clocks,
    })
}

/// Refuses a thread that has a descriptor table or working directory of its own (unshare(2)).
fn require_sharing(pid: i32, tid: i32) -> Result<()> {
    if pid == tid {
        return Ok(());
    }
    for (what, text) in [
        (Compared::Descriptors, "has descriptors of its own (CLONE_FILES)"),
        (Compared::Filesystem, "has a working directory of its own (CLONE_FS)"),
    ] {
        match process::compare(pid, tid, what) {
            // ENOSYS: a kernel without kcmp(2); the inspection could not tell either.
            Ok(std::cmp::Ordering::Equal) | Err(Errno::ENOSYS) => {}
            Ok(_) => return Err(Error::Obstacle(Obstacle::new(format!("thread {tid}"), text, ""))),
            Err(source) => return Err(Error::call(format!("thread {tid}"), "comparing it with the leader", source)),
        }
    }
    Ok(())
}

/// What is asked of each thread.
struct ThreadQuestions {
    scheduling: SchedulingQuestions,
    credentials: CredentialQuestions,
    stack: StackQuestion,
    robust: Buffer,
    tid_address: Buffer,
    death_signal: Buffer,
    seccomp: Call,
}

impl ThreadQuestions {
    fn ask(batch: &mut Batch) -> Self {
        let scheduling = SchedulingQuestions::ask(batch);
        let credentials = CredentialQuestions::ask(batch);
        let stack = StackQuestion::ask(batch);
        let robust = batch.buffer(16);
        let length = godwit_tracee::Arg::Address(robust, 8);
        batch.call("get_robust_list", libc::SYS_get_robust_list, &[0u64.into(), robust.into(), length]);
        let tid_address = batch.buffer(8);
        batch.attempt("PR_GET_TID_ADDRESS", libc::SYS_prctl, &[PR_GET_TID_ADDRESS.into(), tid_address.into()]);
        let death_signal = batch.buffer(4);
        batch.call("PR_GET_PDEATHSIG", libc::SYS_prctl, &[libc::PR_GET_PDEATHSIG.into(), death_signal.into()]);
        let seccomp = batch.attempt("PR_GET_SECCOMP", libc::SYS_prctl, &[libc::PR_GET_SECCOMP.into()]);
        Self { scheduling, credentials, stack, robust, tid_address, death_signal, seccomp }
    }

    fn answer(
        self,
        outcome: &Outcome,
        tracee: &mut Tracee,
        thread: &Thread,
        all: &mut SeccompEntry,
        watch: &SleepWatch,
    ) -> Result<CoreEntry> {
        let tid = thread.tid;
        let failed = |what: &'static str| move |source| Error::call(format!("thread {tid}"), what, source);
        let xstate = ptrace::xstate(tid).map_err(failed("reading its XSAVE area"))?;
        let mut saved = thread.registers;
        registers::check(&saved)?;
        let mut core = ThreadCoreEntry {
            futex_rla: outcome.word(self.robust, 0),
            futex_rla_len: outcome.word(self.robust, 8) as u32,
            blk_sigset: Some(thread.mask),
            sas: Some(self.stack.answer(outcome)),
            pdeath_sig: Some(outcome.half(self.death_signal, 0)),
            signals_p: Some(signals::pending(tid, Queue::Thread)?),
            creds: Some(self.credentials.answer(outcome, tracee, tid)?),
            ..ThreadCoreEntry::default()
        };
        self.scheduling.answer(outcome, &mut core);
        let mode = match outcome.result(self.seccomp) {
            Ok(seccomp::MODE_FILTER) => {
                core.seccomp_filter = seccomp::collect(tid, all)?;
                SeccompMode::Filter
            }
            Ok(seccomp::MODE_DISABLED) | Err(_) => SeccompMode::Disabled,
            Ok(_) => {
                return Err(Error::Obstacle(Obstacle::new(format!("thread {tid}"), "is in strict seccomp mode", "")));
            }
        };
        core.seccomp_mode = Some(mode.into());
        if let Ok(configuration) = ptrace::rseq_configuration(tid) {
            // The pointer to the sequence need not be cleared: the thread has left it, which makes it stale.
            core.rseq_entry = registers::rseq_message(&configuration);
        }
        if let Some((number, left)) = watch.wait(tid) {
            // What follows restart_syscall(2) is known to this kernel only; the destination is told the call itself.
            saved.orig_rax = number as u64;
            core.sleep_left_ns = left;
        }
        core.user_regs = Some(registers::to_bytes(&saved));
        let thread_info = registers::to_message(&saved, &xstate, outcome.word(self.tid_address, 0));
        core.xstate = Some(xstate);
        Ok(CoreEntry {
            mtype: March::X8664.into(),
            thread_info: Some(thread_info),
            thread_core: Some(core),
            ..CoreEntry::default()
        })
    }
}

/// What is asked of the leader for all.
struct ProcessQuestions {
    clocks: ClockQuestions,
    timers: TimerQuestions,
    actions: ActionQuestions,
    limits: LimitQuestions,
    umask: MaskQuestion,
    personality: Call,
    dumpable: Call,
    thp_disabled: Call,
    subreaper: Buffer,
    barriers: Call,
}

/// What the leader's answers say beside its message.
struct Shared {
    umask: u32,
    dumpable: i32,
    thp_disabled: bool,
    clocks: Clocks,
}

impl ProcessQuestions {
    fn ask(batch: &mut Batch, posix: Vec<PosixTimerEntry>) -> Self {
        let clocks = ClockQuestions::ask(batch);
        let timers = TimerQuestions::ask(batch, posix);
        let actions = ActionQuestions::ask(batch);
        let limits = LimitQuestions::ask(batch);
        let umask = MaskQuestion::ask(batch);
        let personality = batch.call("personality", libc::SYS_personality, &[PERSONALITY_QUERY.into()]);
        let dumpable = batch.call("PR_GET_DUMPABLE", libc::SYS_prctl, &[libc::PR_GET_DUMPABLE.into()]);
        let thp_disabled = batch.attempt("PR_GET_THP_DISABLE", libc::SYS_prctl, &[PR_GET_THP_DISABLE.into()]);
        let subreaper = batch.buffer(4);
        let arguments = [libc::PR_GET_CHILD_SUBREAPER.into(), subreaper.into()];
        batch.call("PR_GET_CHILD_SUBREAPER", libc::SYS_prctl, &arguments);
        let arguments = [MEMBARRIER_CMD_GET_REGISTRATIONS.into(), 0u64.into(), 0u64.into()];
        let barriers = batch.attempt("membarrier", libc::SYS_membarrier, &arguments);
        Self { clocks, timers, actions, limits, umask, personality, dumpable, thp_disabled, subreaper, barriers }
    }

    fn answer(
        self,
        outcome: &Outcome,
        leader: &Thread,
        core: &mut CoreEntry,
        numbering: &mut Numbering,
    ) -> Result<Shared> {
        let pid = leader.tid;
        let mut timers = self.timers.answer(outcome);
        for timer in &mut timers.posix {
            if let Some(tid) = timer.notify_thread_id {
                timer.notify_thread_id = Some(numbering.inner(pid, tid)?);
            }
        }
        let shared = signals::pending(pid, Queue::Process)?;
        let (task_state, stop_signo) = match leader.stop {
            // N.B. sent while it was stopped by us: of both the kernel keeps the last.
            _ if signals::waits(&shared, libc::SIGCONT) => (TASK_ALIVE, None),
            _ if signals::waits(&shared, libc::SIGSTOP) => (TASK_STOPPED, Some(libc::SIGSTOP as u32)),
            Stop::Interrupted => (TASK_ALIVE, None),
            Stop::Group(signal) => (TASK_STOPPED, Some(signal as u32)),
        };
        let comm = core.thread_core.as_ref().and_then(|core| core.comm.clone()).unwrap_or_default();
        core.tc = Some(TaskCoreEntry {
            task_state,
            stop_signo,
            personality: outcome.result(self.personality).unwrap_or(0) as u32,
            blk_sigset: leader.mask,
            comm,
            timers: Some(timers),
            rlimits: Some(self.limits.answer(outcome)),
            signals_s: Some(shared),
            sigactions: self.actions.answer(outcome),
            child_subreaper: Some(outcome.half(self.subreaper, 0) != 0),
            membarrier_registration_mask: outcome.result(self.barriers).ok().map(|mask| mask as u32),
            oom_score_adj: number(pid, "oom_score_adj", 10).map(|value| value as i32),
            coredump_filter: number(pid, "coredump_filter", 16).map(|value| value as u32),
            ..TaskCoreEntry::default()
        });
        Ok(Shared {
            umask: self.umask.answer(outcome),
            dumpable: outcome.result(self.dumpable).unwrap_or(0) as i32,
            thp_disabled: outcome.result(self.thp_disabled).unwrap_or(0) != 0,
            clocks: self.clocks.answer(outcome),
        })
    }
}

/// A file of /proc/PID that holds one number.
fn number(pid: i32, file: &str, radix: u32) -> Option<i64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
    i64::from_str_radix(text.trim(), radix).ok()
}
