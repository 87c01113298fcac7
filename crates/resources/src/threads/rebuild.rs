//! Making the threads of a stub those of the process that was collected.

use crate::credentials::{self, Capabilities};
use crate::filesystem::{self, Place};
use crate::seccomp::{self, Scope};
use crate::timers::{self, ClockQuestions, Clocks, IdChoice, IdQuestion};
use crate::{Error, Result, limits, registers, restart, scheduling, signals};
use godwit_kernel::ptrace::{self, Queue};
use godwit_proto::image::{CoreEntry, PstreeEntry, SeccompEntry, TaskCoreEntry, ThreadCoreEntry};
use godwit_proto::magics::TASK_STOPPED;
use godwit_tracee::{Batch, ThreadState, Tracee};

const PR_SET_THP_DISABLE: i32 = 41;
const RSEQ_FLAG_UNREGISTER: u32 = 1;
/// Most threads that one message may hold.
const MAX_THREADS: usize = 1 << 20;

/// What [`rebuild`] needs to know of a process: what was collected, as it arrived.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// The leader, with what all threads share.
    pub leader: &'a CoreEntry,
    /// The other threads.
    pub threads: &'a [CoreEntry],
    /// Their ids, in the same order.
    pub tids: &'a [u32],
    /// The process.
    pub process: &'a PstreeEntry,
    /// The filter programs that threads refer to.
    pub seccomp: &'a SeccompEntry,
    /// Directories and file creation mask.
    pub place: &'a Place,
    /// PR_SET_DUMPABLE(2const).
    pub dumpable: i32,
    /// PR_SET_THP_DISABLE(2const).
    pub thp_disabled: bool,
    /// The process's clocks when its timers were read.
    pub clocks: Clocks,
}

/// What [`rebuild`] found out, for [`final_state`].
#[derive(Clone, Copy, Debug)]
pub struct Rebuilt {
    /// Nanoseconds that the process was away, by its own CLOCK_MONOTONIC.
    pub away_ns: i64,
}

fn task(core: &CoreEntry) -> Result<&TaskCoreEntry> {
    core.tc.as_ref().ok_or_else(|| Error::state("leader", "nothing about the process"))
}

fn thread(core: &CoreEntry) -> Result<&ThreadCoreEntry> {
    core.thread_core.as_ref().ok_or_else(|| Error::state("thread", "nothing about the thread"))
}

/// Readies a new stub, before it gets memory and threads: takes from it what it inherited, makes it leader of a session,
/// and registers its memory barriers, which takes the kernel milliseconds once there are threads.
///
/// # Errors
/// When a call fails.
pub fn prepare(stub: &mut Tracee, leader: &CoreEntry) -> Result<()> {
    let pid = stub.pid();
    let mut batch = Batch::new();
    let inherited = ptrace::rseq_configuration(pid).unwrap_or_default();
    if inherited.pointer != 0 {
        // N.B. the kernel kills a thread whose registered area has been unmapped.
        let arguments =
            [inherited.pointer.into(), inherited.size.into(), RSEQ_FLAG_UNREGISTER.into(), inherited.signature.into()];
        batch.call("unregistering the inherited rseq area", libc::SYS_rseq, &arguments);
    }
    batch.call("clearing the robust list", libc::SYS_set_robust_list, &[0u64.into(), 24u64.into()]);
    batch.call("clearing the tid address", libc::SYS_set_tid_address, &[0u64.into()]);
    // Fails in a stub that leads a session already.
    batch.attempt("setsid", libc::SYS_setsid, &[]);
    let registrations = leader.tc.as_ref().and_then(|task| task.membarrier_registration_mask).unwrap_or(0);
    for command in (0..31).map(|bit| 1u32 << bit).filter(|command| registrations & command != 0) {
        let arguments = [command.into(), 0u64.into(), 0u64.into()];
        batch.call(format!("registering memory barriers {command:#x}"), libc::SYS_membarrier, &arguments);
    }
    stub.run(batch)?;
    Ok(())
}

/// Gives the threads of a stub everything but what they run with. `outer` has the id of each thread as we see it, the
/// leader's first and then in the order of `image.tids`. Memory and descriptors must be in place: limits and credentials
/// apply afterwards, and registering areas with the kernel touches them (see [`touched`]).
///
/// # Errors
/// [`Error::Tracee`] naming the first call that failed; [`Error::State`] when the image contradicts itself.
pub fn rebuild(stub: &mut Tracee, image: Image<'_>, outer: &[i32]) -> Result<Rebuilt> {
    if image.threads.len() != image.tids.len() || outer.len() != image.tids.len() + 1 || outer.len() > MAX_THREADS {
        return Err(Error::state("threads", "their number contradicts itself"));
    }
    let cores = || std::iter::once(image.leader).chain(image.threads);
    let mut threads = Vec::with_capacity(outer.len());
    for core in cores() {
        threads.push(thread(core)?);
    }
    let common = Common {
        pid: image.process.pid as i32,
        have: credentials::capabilities(stub.pid())?,
        cpus: scheduling::available_cpus()?,
        scope: seccomp::scope(threads.iter().copied()),
        filters: image.seccomp,
    };
    let (now, ids) = clocks(stub)?;
    for (((core, thread), &tid), &outer) in image.threads.iter().zip(&threads[1..]).zip(image.tids).zip(&outer[1..]) {
        let mut batch = Batch::new();
        common.add_own(&mut batch, core, thread, tid as i32)?;
        if common.scope == Scope::Thread {
            seccomp::install(&mut batch, common.filters, thread, Scope::Thread)?;
        }
        common.add_credentials(&mut batch, thread)?;
        stub.run_in(outer, batch)?;
    }
    rebuild_leader(stub, image, threads[0], &common, now, ids)?;
    set_from_outside(stub.pid(), task(image.leader)?);
    Ok(Rebuilt { away_ns: now.monotonic_ns.saturating_sub(image.clocks.monotonic_ns).max(0) })
}

/// Reads the stub's clocks, and whether it can choose timer ids.
fn clocks(stub: &mut Tracee) -> Result<(Clocks, IdChoice)> {
    let mut batch = Batch::new();
    let ids = IdQuestion::ask(&mut batch);
    let clocks = ClockQuestions::ask(&mut batch);
    let outcome = stub.run(batch)?;
    Ok((clocks.answer(&outcome), ids.answer(&outcome)))
}

/// What every thread's batch needs.
struct Common<'a> {
    pid: i32,
    have: Capabilities,
    cpus: Vec<u32>,
    scope: Scope,
    filters: &'a SeccompEntry,
}

impl Common<'_> {
    /// Adds what a thread has of its own, apart from filters and credentials.
    fn add_own(&self, batch: &mut Batch, core: &CoreEntry, thread: &ThreadCoreEntry, tid: i32) -> Result<()> {
        scheduling::set(batch, thread, &self.cpus)?;
        if let Some(stack) = &thread.sas {
            signals::set_stack(batch, stack);
        }
        let tid_address = core.thread_info.as_ref().map_or(0, |info| info.clear_tid_addr);
        batch.call("set_tid_address", libc::SYS_set_tid_address, &[tid_address.into()]);
        let length = if thread.futex_rla_len == 0 { 24 } else { thread.futex_rla_len };
        batch.call("set_robust_list", libc::SYS_set_robust_list, &[thread.futex_rla.into(), length.into()]);
        if let Some(rseq) = thread.rseq_entry.as_ref().filter(|rseq| rseq.rseq_abi_pointer != 0) {
            let arguments =
                [rseq.rseq_abi_pointer.into(), rseq.rseq_abi_size.into(), 0u64.into(), rseq.signature.into()];
            batch.call("registering the rseq area", libc::SYS_rseq, &arguments);
        }
        match &thread.signals_p {
            Some(pending) => signals::queue(batch, self.pid, tid, Queue::Thread, pending),
            None => Ok(()),
        }
    }

    /// Adds the step after which the thread can do no more than the program could.
    fn add_credentials(&self, batch: &mut Batch, thread: &ThreadCoreEntry) -> Result<()> {
        let creds = thread.creds.as_ref().ok_or_else(|| Error::state("thread", "no credentials"))?;
        credentials::set(batch, creds, self.have)?;
        // N.B. also when there was none: the stub has one of its own. A program's is not armed again: it tells of the end
        // of a parent which stays behind and has not ended, while the end of the stub's creator is nothing to the program.
        batch.call("PR_SET_PDEATHSIG", libc::SYS_prctl, &[libc::PR_SET_PDEATHSIG.into(), 0u64.into()]);
        Ok(())
    }
}

fn rebuild_leader(
    stub: &mut Tracee,
    image: Image<'_>,
    leader: &ThreadCoreEntry,
    common: &Common<'_>,
    now: Clocks,
    ids: IdChoice,
) -> Result<()> {
    let task = task(image.leader)?;
    let mut batch = Batch::new();
    filesystem::set(&mut batch, image.place);
    batch.call("personality", libc::SYS_personality, &[task.personality.into()]);
    let flag = |option: i32, value: bool| [option.into(), u64::from(value).into()];
    batch.call("PR_SET_THP_DISABLE", libc::SYS_prctl, &flag(PR_SET_THP_DISABLE, image.thp_disabled));
    let subreaper = task.child_subreaper.unwrap_or(false);
    batch.call("PR_SET_CHILD_SUBREAPER", libc::SYS_prctl, &flag(libc::PR_SET_CHILD_SUBREAPER, subreaper));
    signals::set_actions(&mut batch, &task.sigactions)?;
    common.add_own(&mut batch, image.leader, leader, common.pid)?;
    if let Some(pending) = &task.signals_s {
        signals::queue(&mut batch, common.pid, common.pid, Queue::Process, pending)?;
    }
    seccomp::install(&mut batch, common.filters, leader, common.scope)?;
    if let Some(timers) = &task.timers {
        timers::create(&mut batch, timers, ids)?;
        timers::arm(&mut batch, timers, image.clocks, now);
    }
    if let Some(rlimits) = &task.rlimits {
        limits::set(&mut batch, rlimits)?;
    }
    common.add_credentials(&mut batch, leader)?;
    // N.B. after the credentials, whose change resets it. 2 is the kernel's to give; 0 is the stricter neighbour.
    let dumpable = u64::from(image.dumpable == 1);
    batch.call("PR_SET_DUMPABLE", libc::SYS_prctl, &[libc::PR_SET_DUMPABLE.into(), dumpable.into()]);
    stub.run(batch)?;
    Ok(())
}

/// Has a process that is being made go first where memory is short, and not who makes it: nothing is lost with it. It gets its own
/// score when it is complete. proc_pid_oom_score_adj(5)
pub fn offer_to_oom_killer(pid: i32) {
    const FIRST: &str = "1000";
    if let Err(error) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), FIRST) {
        tracing::debug!(%error, "where memory is short its maker may have to go");
    }
}

/// Sets what only files of /proc can set. None of it is worth losing a migration for.
fn set_from_outside(pid: i32, task: &TaskCoreEntry) {
    let score = ("oom_score_adj", task.oom_score_adj.unwrap_or(0).to_string());
    let filter = task.coredump_filter.map(|value| ("coredump_filter", format!("{value:#x}")));
    for (file, value) in std::iter::once(score).chain(filter) {
        let path = format!("/proc/{pid}/{file}");
        if std::fs::read_to_string(&path).is_ok_and(|present| present.trim() == value) {
            continue;
        }
        if let Err(error) = std::fs::write(&path, &value) {
            tracing::warn!(%path, %value, %error, "not set as it was");
        }
    }
}

/// Composes what a rebuilt thread shall run with, and puts the timeout of an interrupted call into its memory.
///
/// # Errors
/// [`Error::State`] when the message has values that no thread can have or that this CPU cannot hold.
pub fn final_state(stub: &Tracee, outer: i32, core: &CoreEntry, rebuilt: Rebuilt) -> Result<ThreadState> {
    let thread = thread(core)?;
    let raw = thread.user_regs.as_ref().ok_or_else(|| Error::state("thread", "no registers"))?;
    let mut saved = registers::from_bytes(raw)?;
    registers::check(&saved)?;
    let left = thread.sleep_left_ns.map(|left| left.saturating_sub(rebuilt.away_ns).max(0));
    restart::resume(stub, &mut saved, left)?;
    let local = ptrace::xstate(outer)
        .map_err(|source| Error::call(format!("thread {outer}"), "reading its XSAVE area", source))?;
    let xstate = thread.xstate.as_ref().ok_or_else(|| Error::state("thread", "no XSAVE area"))?;
    Ok(ThreadState {
        registers: saved,
        xstate: registers::fit_xstate(xstate, &local)?,
        mask: thread.blk_sigset.unwrap_or(0),
    })
}

/// Addresses of the process that [`rebuild`], [`final_state`] or a thread's first steps touch. With post-copy these pages
/// had better be there beforehand.
#[must_use]
pub fn touched(core: &CoreEntry) -> Vec<u64> {
    let mut addresses = Vec::new();
    let Some(thread) = &core.thread_core else { return addresses };
    addresses.extend(thread.rseq_entry.as_ref().map(|rseq| rseq.rseq_abi_pointer));
    if let Some(saved) = thread.user_regs.as_ref().and_then(|raw| registers::from_bytes(raw).ok()) {
        addresses.extend([saved.rip, saved.rsp, saved.fs_base]);
        if thread.sleep_left_ns.is_some() {
            addresses.extend(restart::timeout_place(&saved));
        }
    }
    addresses.retain(|&address| address != 0);
    addresses
}

/// Stops a rebuilt process again that was stopped by a signal (job control) when it was collected. To be called right
/// before it is launched: no remote call may follow.
///
/// # Errors
/// When it is gone.
pub fn stop_again(stub: &Tracee, leader: &CoreEntry) -> Result<()> {
    if task(leader)?.task_state != TASK_STOPPED {
        return Ok(());
    }
    godwit_kernel::process::kill(stub.pid(), libc::SIGSTOP)
        .map_err(|source| Error::call(format!("process {}", stub.pid()), "stopping it again", source))
}
