//! Signals: what a process does about each, what waits for it and its threads, and on which stack handlers run.
//!
//! Masks belong to the state that a thread is launched with (see [`crate::threads`]): while a thread is under our control
//! everything is blocked, so that queued signals wait and no handler runs half-way.

use crate::{Error, Result};
use godwit_kernel::ptrace::{self, Queue, SIGINFO_SIZE};
use godwit_proto::image::{CoreEntry, SaEntry, SiginfoEntry, SignalQueueEntry, ThreadSasEntry};
use godwit_proto::wire::LateSignal;
use godwit_tracee::{Batch, Buffer, Outcome, Tracee};

const LAST: i32 = 64;
/// Bytes of the kernel's `struct sigaction`: handler, flags, restorer, mask.
const ACTION_SIZE: usize = 32;
/// Bytes of the kernel's `sigset_t`.
const MASK_SIZE: usize = 8;
/// Bytes of `stack_t`.
const STACK_SIZE: usize = 24;
/// Most queued signals that one message may hold; RLIMIT_SIGPENDING is of this order.
const MAX_QUEUED: usize = 1 << 17;
/// `SS_AUTODISARM` and `SS_DISABLE`: the flags of an alternate stack that are settings, not observations.
const STACK_SETTINGS: u32 = 1 << 31 | libc::SS_DISABLE as u32;

/// The signals that can have an action, in ascending order.
fn with_actions() -> impl Iterator<Item = i32> {
    (1..=LAST).filter(|&signal| signal != libc::SIGKILL && signal != libc::SIGSTOP)
}

/// Questions about the actions of all signals, asked in a batch (rt_sigaction(2)).
pub(crate) struct ActionQuestions(Buffer);

impl ActionQuestions {
    pub(crate) fn ask(batch: &mut Batch) -> Self {
        let buffer = batch.buffer(with_actions().count() * ACTION_SIZE);
        for (index, signal) in with_actions().enumerate() {
            let slot = godwit_tracee::Arg::Address(buffer, index * ACTION_SIZE);
            batch.call("rt_sigaction", libc::SYS_rt_sigaction, &[signal.into(), 0u64.into(), slot, MASK_SIZE.into()]);
        }
        Self(buffer)
    }

    pub(crate) fn answer(self, outcome: &Outcome) -> Vec<SaEntry> {
        let word = |index: usize, field: usize| outcome.word(self.0, index * ACTION_SIZE + field * 8);
        (0..with_actions().count())
            .map(|index| SaEntry {
                sigaction: word(index, 0),
                flags: word(index, 1),
                restorer: word(index, 2),
                mask: word(index, 3),
                ..SaEntry::default()
            })
            .collect()
    }
}

/// Adds the calls that set the actions of all signals. Also those that are default: the stub inherited its creator's.
pub(crate) fn set_actions(batch: &mut Batch, actions: &[SaEntry]) -> Result<()> {
    if actions.len() != with_actions().count() {
        return Err(Error::state("signal actions", format!("{} of them", actions.len())));
    }
    for (signal, action) in with_actions().zip(actions) {
        let words = [action.sigaction, action.flags, action.restorer, action.mask];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let new = batch.data(&bytes);
        let what = "restoring a signal action";
        batch.call(what, libc::SYS_rt_sigaction, &[signal.into(), new.into(), 0u64.into(), MASK_SIZE.into()]);
    }
    Ok(())
}

/// Reads a queue of pending signals of a stopped thread, payload and all.
pub(crate) fn pending(tid: i32, queue: Queue) -> Result<SignalQueueEntry> {
    let signals = ptrace::pending_signals(tid, queue)
        .map_err(|source| Error::call(format!("thread {tid}"), "listing pending signals", source))?;
    Ok(SignalQueueEntry { signals: signals.iter().map(|siginfo| SiginfoEntry { siginfo: siginfo.to_vec() }).collect() })
}

/// `si_code` of signals that somebody has sent, by kill(2), sigqueue(3) and tgkill(2).
const SI_USER: i32 = 0;
const SI_QUEUE: i32 = -1;
const SI_TKILL: i32 = -6;
/// `si_code` of a POSIX timer's signal.
const SI_TIMER: i32 = -2;
/// Offset of `si_code`.
const CODE_AT: usize = 8;
/// Offset of the word in which the kernel ties a timer's signal to the timer.
const TIMER_PRIVATE_AT: usize = 32;

/// Adds the calls by which the running thread, `tid` of process `pid` in its own PID namespace, queues signals again.
///
/// N.B. for itself only: the kernel lets nobody else send a `siginfo_t` with a kernel's `si_code`.
pub(crate) fn queue(batch: &mut Batch, pid: i32, tid: i32, queue: Queue, entry: &SignalQueueEntry) -> Result<()> {
    if entry.signals.len() > MAX_QUEUED {
        return Err(Error::state("pending signals", format!("{} of them", entry.signals.len())));
    }
    for SiginfoEntry { siginfo } in &entry.signals {
        let mut siginfo: [u8; SIGINFO_SIZE] = siginfo
            .as_slice()
            .try_into()
            .map_err(|_| Error::state("pending signal", format!("{} bytes", siginfo.len())))?;
        let signal = i32::from_le_bytes(siginfo[..4].try_into().expect("four bytes"));
        if !(1..=LAST).contains(&signal) {
            return Err(Error::state("pending signal", format!("number {signal}")));
        }
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        if i32::from_le_bytes(siginfo[CODE_AT..CODE_AT + 4].try_into().expect("four bytes")) == SI_TIMER {
            // The timer that sent it is armed anew and must not be re-armed by the delivery as well.
            siginfo[TIMER_PRIVATE_AT..TIMER_PRIVATE_AT + 8].fill(0);
        }
        let info = batch.data(&siginfo);
        match queue {
            Queue::Process => {
                let arguments = [pid.into(), signal.into(), info.into()];
                batch.call("queueing a signal", libc::SYS_rt_sigqueueinfo, &arguments);
            }
            Queue::Thread => {
                let arguments = [pid.into(), tid.into(), signal.into(), info.into()];
                batch.call("queueing a signal", libc::SYS_rt_tgsigqueueinfo, &arguments);
            }
        }
    }
    Ok(())
}

fn word(siginfo: &[u8], at: usize) -> i32 {
    siginfo.get(at..at + 4).map_or(0, |word| i32::from_le_bytes(word.try_into().unwrap_or_default()))
}

/// Whether a signal is among those that wait for a whole process.
pub(crate) fn waits(queue: &SignalQueueEntry, signal: i32) -> bool {
    queue.signals.iter().any(|waiting| word(&waiting.siginfo, 0) == signal)
}

/// What waited in a stopped process when its state was read.
#[derive(Clone, Debug, Default)]
pub struct Waiting {
    shared: SignalQueueEntry,
    /// Of each thread: its id as the process sees it, and its queue. In the order of the tracee's threads.
    threads: Vec<(u32, SignalQueueEntry)>,
}

impl Waiting {
    /// Takes it out of a state: the leader's, and those of the other threads in the order of `tids`, the leader's first.
    #[must_use]
    pub fn of(tids: &[u32], leader: &CoreEntry, others: &[CoreEntry]) -> Self {
        let own =
            |core: &CoreEntry| core.thread_core.as_ref().and_then(|core| core.signals_p.clone()).unwrap_or_default();
        let shared = leader.tc.as_ref().and_then(|task| task.signals_s.clone()).unwrap_or_default();
        let threads = std::iter::once(leader).chain(others);
        Self { shared, threads: tids.iter().copied().zip(threads.map(own)).collect() }
    }

    /// Reads what somebody has sent since then. What the kernel or a timer has is not among it: that happens at the destination, too.
    ///
    /// # Errors
    /// When a thread is gone.
    pub fn sent_since(&self, tracee: &Tracee) -> Result<Vec<LateSignal>> {
        let mut late = Vec::new();
        let mut add = |tid: u32, now: SignalQueueEntry, before: &SignalQueueEntry| {
            let mut before = before.signals.clone();
            for signal in now.signals {
                match before.iter().position(|known| *known == signal) {
                    Some(known) => drop(before.swap_remove(known)),
                    None if is_of_somebody(&signal.siginfo, tid, tracee) => {
                        late.push(LateSignal { tid, siginfo: signal.siginfo });
                    }
                    None => {}
                }
            }
        };
        add(0, pending(tracee.pid(), Queue::Process)?, &self.shared);
        for (thread, (tid, before)) in tracee.threads().iter().zip(&self.threads) {
            add(*tid, pending(thread.tid, Queue::Thread)?, before);
        }
        Ok(late)
    }
}

/// Whether somebody else has sent a signal. N.B. we stop threads one by one, and in the end the process, by SIGSTOP.
fn is_of_somebody(siginfo: &[u8], tid: u32, tracee: &Tracee) -> bool {
    let is_ours = word(siginfo, 0) == libc::SIGSTOP && (tid != 0 || tracee.is_stop_prepared());
    matches!(word(siginfo, CODE_AT), SI_USER | SI_QUEUE | SI_TKILL) && !is_ours
}

/// Whether a signal stops its process.
#[must_use]
pub fn is_stop(signal: &LateSignal) -> bool {
    word(&signal.siginfo, 0) == libc::SIGSTOP
}

/// Sends a process that is about to run, and stands still so far, the signals that were sent to it elsewhere meanwhile. One that makes no
/// sense is left out: it is too late to refuse anything.
pub fn send_late(pid: i32, late: &[LateSignal]) {
    for LateSignal { tid, siginfo } in late {
        let Ok(info): Result<[u8; SIGINFO_SIZE], _> = siginfo.as_slice().try_into() else { continue };
        let signal = word(&info, 0);
        let tid = if *tid == 0 { None } else { outer(pid, *tid) };
        if !(1..=LAST).contains(&signal) {
            continue;
        }
        let sent = match (word(&info, CODE_AT), tid) {
            (SI_QUEUE, tid) => godwit_kernel::process::queue_signal(pid, tid, signal, &info),
            (_, Some(tid)) => godwit_kernel::process::send_signal(pid, tid, signal),
            (_, None) => godwit_kernel::process::kill(pid, signal),
        };
        if let Err(errno) = sent {
            tracing::warn!(pid, signal, %errno, "a signal that came while the process moved is lost");
        }
    }
}

/// A thread of a process, by its id as the process sees it.
fn outer(pid: i32, inner: u32) -> Option<i32> {
    let tids = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let tids = tids.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_it = |tid: &i32| {
        let status = godwit_tracee::read_status(*tid);
        status.is_ok_and(|status| status.numbers("NSpid").last().is_some_and(|own| *own == u64::from(inner)))
    };
    tids.into_iter().find(is_it)
}

/// A question about a thread's alternate signal stack, asked in a batch (sigaltstack(2)).
pub(crate) struct StackQuestion(Buffer);

impl StackQuestion {
    pub(crate) fn ask(batch: &mut Batch) -> Self {
        let buffer = batch.buffer(STACK_SIZE);
        batch.call("sigaltstack", libc::SYS_sigaltstack, &[0u64.into(), buffer.into()]);
        Self(buffer)
    }

    pub(crate) fn answer(self, outcome: &Outcome) -> ThreadSasEntry {
        ThreadSasEntry {
            ss_sp: outcome.word(self.0, 0),
            ss_flags: outcome.half(self.0, 8) & STACK_SETTINGS,
            ss_size: outcome.word(self.0, 16),
        }
    }
}

/// Adds the call that sets a thread's alternate signal stack.
pub(crate) fn set_stack(batch: &mut Batch, stack: &ThreadSasEntry) {
    let mut bytes = [0; STACK_SIZE];
    bytes[..8].copy_from_slice(&stack.ss_sp.to_le_bytes());
    bytes[8..12].copy_from_slice(&(stack.ss_flags & STACK_SETTINGS).to_le_bytes());
    bytes[16..].copy_from_slice(&stack.ss_size.to_le_bytes());
    let new = batch.data(&bytes);
    batch.call("restoring the alternate signal stack", libc::SYS_sigaltstack, &[new.into(), 0u64.into()]);
}
