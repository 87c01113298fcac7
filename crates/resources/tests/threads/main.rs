//! Freezes small programs, reads them, builds stubs from what was read, and reads those.
//!
//! Needs root; says so and fails otherwise.

mod victim;

use godwit_proto::image::{CoreEntry, TaskTimersEntry};
use godwit_resources::threads::{self, Collected};
use godwit_resources::{identity, restart::SleepWatch};
use godwit_tracee::{Extent, Tracee};
use std::time::Duration;
use victim::Victim;

fn freeze_and_collect(pid: i32) -> (Tracee, Collected) {
    let mut numbering = identity::inspect(pid).unwrap().numbering;
    let mut watch = SleepWatch::new();
    let tids: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    watch.sample(pid, &tids);
    let mut tracee = Tracee::freeze(pid, Extent::AllThreads).unwrap();
    watch.settle(&mut tracee).unwrap();
    let collected = threads::collect(&mut tracee, &mut numbering, &watch).unwrap();
    (tracee, collected)
}

/// Makes a stub with the numbers of what was collected, which must be free.
fn build(collected: &Collected) -> (Tracee, threads::Rebuilt, Vec<i32>) {
    let pid = collected.process.pid as i32;
    let stub = godwit_kernel::stub::spawn(pid).unwrap();
    let mut stub = Tracee::adopt(stub).unwrap();
    threads::prepare(&mut stub, &collected.leader).unwrap();
    let mut outer = vec![pid];
    for &tid in collected.tids() {
        outer.push(stub.spawn_thread(tid as i32).unwrap());
    }
    let rebuilt = threads::rebuild(&mut stub, collected.image(), &outer).unwrap();
    (stub, rebuilt, outer)
}

/// Forgets what lives in memory that a bare stub does not have.
fn without_memory(mut collected: Collected) -> Collected {
    for core in std::iter::once(&mut collected.leader).chain(&mut collected.threads) {
        core.thread_core.as_mut().unwrap().rseq_entry = None;
    }
    collected
}

fn timers(collected: &mut Collected) -> TaskTimersEntry {
    collected.leader.tc.as_mut().unwrap().timers.take().unwrap()
}

/// Blanks what a stub cannot share with its model: registers, masks (everything is blocked), the parent's death signal.
fn comparable(mut core: CoreEntry) -> CoreEntry {
    core.thread_info = core
        .thread_info
        .map(|info| godwit_proto::image::ThreadInfoX86 { clear_tid_addr: info.clear_tid_addr, ..Default::default() });
    let thread = core.thread_core.as_mut().unwrap();
    (thread.user_regs, thread.xstate, thread.blk_sigset, thread.rseq_entry) = (None, None, None, None);
    (thread.pdeath_sig, thread.sleep_left_ns) = (None, None);
    if let Some(task) = &mut core.tc {
        task.blk_sigset = 0;
    }
    core
}

#[test]
fn a_rebuilt_process_collects_as_the_first() {
    let mut victim = Victim::start("state", &[]);
    let (tracee, mut first) = freeze_and_collect(victim.pid());
    assert_eq!(first.threads.len(), 1);
    assert_eq!(first.seccomp.seccomp_filters.len(), 2);
    assert_eq!(first.place.cwd, b"/tmp");
    assert_eq!(first.place.umask, 0o027);
    let leader = first.leader.thread_core.clone().unwrap();
    let creds = leader.creds.clone().unwrap();
    assert_eq!((creds.uid, creds.euid, creds.suid, creds.fsuid), (1001, 1002, 1003, 1003));
    assert_eq!((creds.gid, creds.egid, creds.sgid, creds.fsgid), (2001, 2002, 2003, 2002));
    assert_eq!(creds.groups, [7, 77, 777]);
    assert_eq!((creds.cap_amb[0], creds.no_new_privs), (1 << 12, Some(1)));
    assert_eq!((leader.sched_policy, leader.sched_flags, leader.pdeath_sig), (Some(3), Some(1), Some(10)));
    let other = first.threads[0].thread_core.clone().unwrap();
    assert_eq!((other.sched_nice, other.timer_slack_ns), (Some(7), Some(123_456)));
    assert_eq!(other.comm.as_deref(), Some("second thread"));
    assert_eq!(other.creds.as_ref().unwrap().uid, 1111);
    assert_eq!(other.signals_p.as_ref().unwrap().signals.len(), 3);
    let task = first.leader.tc.clone().unwrap();
    assert_eq!(task.signals_s.unwrap().signals.len(), 3);
    assert_eq!(task.membarrier_registration_mask, Some(1 << 4));
    let posix: Vec<u32> = task.timers.as_ref().unwrap().posix.iter().map(|timer| timer.it_id).collect();
    assert_eq!(posix, [1, 3, 4, 5, 6]);

    tracee.kill();
    victim.reap();
    first = without_memory(first);
    let (mut stub, rebuilt, outer) = build(&first);
    for (core, &tid) in std::iter::once(&first.leader).chain(&first.threads).zip(&outer) {
        let state = threads::final_state(&stub, tid, core, rebuilt).unwrap();
        assert_eq!(state.mask, core.thread_core.as_ref().unwrap().blk_sigset.unwrap());
    }
    let mut numbering = identity::Numbering::default();
    let mut second = threads::collect(&mut stub, &mut numbering, &SleepWatch::new()).unwrap();

    let (before, after) = (timers(&mut first), timers(&mut second));
    assert_eq!((before.real.isec, before.real.iusec), (after.real.isec, after.real.iusec));
    let left = (before.real.vsec as f64 - after.real.vsec as f64).abs();
    assert!(left <= 1.0, "{before:?} {after:?}");
    assert_eq!(before.posix.len(), after.posix.len());
    for (before, after) in before.posix.iter().zip(&after.posix) {
        let away = (second.clocks.monotonic_ns - first.clocks.monotonic_ns) as f64 / 1e9;
        let left = |timer: &godwit_proto::image::PosixTimerEntry| timer.vsec as f64 + timer.vnsec as f64 / 1e9;
        let expected = if (before.clock_id as i32) < 0 { left(before) } else { left(before) - away };
        // Clocks and timers are not read in one moment, and a busy machine may do something else in between.
        assert!((left(after) - expected).abs() < 0.1, "{before:?} {after:?} away {away}");
        let plain = |timer: &godwit_proto::image::PosixTimerEntry| {
            let mut timer = *timer;
            (timer.vsec, timer.vnsec) = (0, 0);
            timer
        };
        assert_eq!(plain(before), plain(after));
    }
    assert_eq!(first.process.threads, second.process.threads);
    assert_eq!((first.process.pgid, first.process.sid), (second.process.pgid, second.process.sid));
    assert_eq!(first.seccomp, second.seccomp);
    assert_eq!(first.place, second.place);
    assert_eq!((first.dumpable, first.thp_disabled), (second.dumpable, second.thp_disabled));
    assert_eq!(comparable(first.leader), comparable(second.leader));
    assert_eq!(comparable(first.threads.remove(0)), comparable(second.threads.remove(0)));
    stub.kill();
    let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(outer[0]), None);
}

#[test]
fn hostile_images_are_refused() {
    let mut victim = Victim::start("sleeps", &["nanosleep", "100000"]);
    let (tracee, collected) = freeze_and_collect(victim.pid());
    let rebuilt = threads::Rebuilt { away_ns: 0 };
    let pid = victim.pid();
    let spoil = |spoiler: &dyn Fn(&mut CoreEntry)| {
        let mut core = collected.leader.clone();
        spoiler(&mut core);
        threads::final_state(&tracee, pid, &core, rebuilt).unwrap_err()
    };
    spoil(&|core| core.thread_core = None);
    spoil(&|core| core.thread_core.as_mut().unwrap().user_regs = None);
    spoil(&|core| core.thread_core.as_mut().unwrap().user_regs = Some(vec![0xff; 216]));
    spoil(&|core| core.thread_core.as_mut().unwrap().user_regs.as_mut().unwrap().truncate(100));
    spoil(&|core| core.thread_core.as_mut().unwrap().xstate = Some(vec![0xff; 4096]));
    spoil(&|core| core.thread_core.as_mut().unwrap().xstate = Some(Vec::new()));
    tracee.kill();
    victim.reap();
}

/// How an interrupted call is continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Continuation {
    /// By the kernel that it was interrupted in.
    Released,
    /// As at a destination, where that kernel's memory of it is not.
    Moved,
}

const TIMEOUT_MS: i64 = 1500;

/// Stops a program in a call after `run_ms`, lets it go after another while, and reads what it says.
fn interrupt(call: &str, continuation: Continuation, stops: usize) {
    let mut victim = Victim::start("sleeps", &[call, &TIMEOUT_MS.to_string()]);
    let pid = victim.pid();
    let mut numbering = identity::inspect(pid).unwrap().numbering;
    let mut watch = SleepWatch::new();
    for stop in 1..=stops {
        std::thread::sleep(Duration::from_millis(300));
        watch.sample(pid, &[pid]);
        let mut tracee = Tracee::freeze(pid, Extent::AllThreads).unwrap();
        watch.settle(&mut tracee).unwrap();
        let collected = threads::collect(&mut tracee, &mut numbering, &watch).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        if continuation == Continuation::Moved && stop == stops {
            let rebuilt = threads::Rebuilt { away_ns: 50_000_000 };
            let state = threads::final_state(&tracee, pid, &collected.leader, rebuilt).unwrap();
            tracee.amend_registers(pid, |registers| *registers = state.registers).unwrap();
        }
        tracee.release().unwrap();
    }
    let said = victim.line();
    let words: Vec<&str> = said.split_whitespace().collect();
    assert_ne!(words[1], "EINTR", "{call} {continuation:?}: {said}");
    let took: i64 = words[2].parse().unwrap();
    // A receive timeout is a property of the socket: it begins again at every stop. Others may be late by the stops.
    let late = 150 + stops as i64 * if call == "recv" { 450 } else { 60 };
    assert!((TIMEOUT_MS - 5..TIMEOUT_MS + late).contains(&took), "{call} {continuation:?}: {said}");
    victim.reap();
}

const CALLS: [&str; 9] = [
    "nanosleep",
    "nanosleep-rest",
    "clock_nanosleep",
    "clock_nanosleep-same",
    "poll",
    "ppoll",
    "select",
    "futex",
    "futex-absolute",
];
const IMPATIENT: [&str; 5] = ["epoll_wait", "epoll_pwait2", "sigtimedwait", "semtimedop", "recv"];

fn interrupt_all(calls: &[&'static str], continuation: Continuation, stops: usize) {
    // One thread each: a tracee belongs to the thread that froze it.
    let started: Vec<_> =
        calls.iter().map(|&call| std::thread::spawn(move || interrupt(call, continuation, stops))).collect();
    let failed = started.into_iter().filter_map(|thread| thread.join().err()).count();
    assert_eq!(failed, 0, "{continuation:?}");
}

#[test]
fn released_sleeps_end_when_they_would_have() {
    interrupt_all(&CALLS, Continuation::Released, 1);
}

#[test]
fn moved_sleeps_end_when_they_would_have() {
    interrupt_all(&CALLS, Continuation::Moved, 1);
}

#[test]
fn sleeps_that_were_stopped_before_end_when_they_would_have() {
    interrupt_all(&CALLS, Continuation::Moved, 3);
}

#[test]
fn calls_that_give_up_on_any_wake_do_not_notice() {
    interrupt_all(&IMPATIENT, Continuation::Moved, 1);
    interrupt_all(&["epoll_wait", "recv"], Continuation::Released, 2);
}

#[test]
fn a_restartable_sequence_is_aborted_on_both_sides() {
    let mut victim = Victim::start("sequence", &[]);
    let places = victim.line();
    let [start, end, abort] = places
        .split(' ')
        .map(|word| u64::from_str_radix(word, 16).expect("the C library registers no rseq area"))
        .collect::<Vec<_>>()[..]
    else {
        panic!("{places}")
    };
    let mut aborted = 0;
    for _ in 0..20 {
        let (tracee, collected) = freeze_and_collect(victim.pid());
        let raw = collected.leader.thread_core.unwrap().user_regs.unwrap();
        let moved = godwit_resources::registers::from_bytes(&raw).unwrap().rip;
        assert_eq!(tracee.threads()[0].registers.rip, moved);
        assert!(!(start..end).contains(&moved), "{moved:#x} in {places}");
        aborted += usize::from(moved == abort);
        tracee.release().unwrap();
    }
    assert!(aborted > 10, "only {aborted}");
}

#[test]
fn a_stopped_process_stays_stopped() {
    let victim = Victim::start("sleeps", &["poll", "100000"]);
    let pid = nix::unistd::Pid::from_raw(victim.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let state = |wanted: char| {
        let reached = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            godwit_tracee::read_status(pid.as_raw()).unwrap().state() == wanted
        });
        assert!(reached, "never {wanted}");
    };
    state('T');
    let (tracee, collected) = freeze_and_collect(victim.pid());
    let task = collected.leader.tc.clone().unwrap();
    assert_eq!((task.task_state, task.stop_signo), (godwit_proto::magics::TASK_STOPPED, Some(libc::SIGSTOP as u32)));
    tracee.release().unwrap();
    state('T');

    // A stub is stopped the same way before it has run an instruction of the program.
    let (tracee, collected) = freeze_and_collect(victim.pid());
    tracee.kill();
    drop(victim);
    let collected = without_memory(collected);
    let (stub, _, _) = build(&collected);
    threads::stop_again(&stub, &collected.leader).unwrap();
    stub.launch().unwrap();
    state('T');
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let _ = nix::sys::wait::waitpid(pid, None);
}

#[test]
fn filters_that_all_threads_share_are_installed_once() {
    let mut victim = Victim::start("filtered", &[]);
    let (tracee, first) = freeze_and_collect(victim.pid());
    assert_eq!((first.threads.len(), first.seccomp.seccomp_filters.len()), (3, 2));
    tracee.kill();
    victim.reap();
    let first = without_memory(first);
    let (mut stub, _, outer) = build(&first);
    let mut numbering = identity::Numbering::default();
    let second = threads::collect(&mut stub, &mut numbering, &SleepWatch::new()).unwrap();
    assert_eq!(first.seccomp, second.seccomp);
    for (first, second) in first.threads.into_iter().zip(second.threads) {
        assert_eq!(comparable(first), comparable(second));
    }
    stub.kill();
    let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(outer[0]), None);
}

#[test]
fn obstacles_are_listed_all_at_once() {
    let mut shell = std::process::Command::new("unshare")
        .args(["--uts", "sh", "-c", "sleep 1000 & sleep 1000 & cd /proc/$$; wait"])
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let pid = shell.id() as i32;
    let tracee = Tracee::freeze(pid, Extent::Leader).unwrap();
    let inspection = identity::inspect(pid).unwrap();
    tracee.release().unwrap();
    let text: Vec<String> = inspection.obstacles.iter().map(ToString::to_string).collect();
    let count = |what: &str| text.iter().filter(|obstacle| obstacle.contains(what)).count();
    assert_eq!((count("is a child of"), count("UTS namespace"), count("is traced by")), (2, 1, 1), "{text:?}");
    for child in std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap().split_whitespace() {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(child.parse().unwrap()),
            nix::sys::signal::Signal::SIGKILL,
        );
    }
    let _ = shell.kill();
    shell.wait().unwrap();
    assert!(identity::inspect(2).is_err() || !identity::inspect(2).unwrap().obstacles.is_empty());
}

/// Threads come and go while it is looked at, and have other numbers inside: those that have ended meanwhile are left out.
#[test]
fn threads_that_end_while_they_are_looked_at_are_left_out() {
    const CHURN: &str = "
import threading
while True:
    threads = [threading.Thread(target=lambda: None) for _ in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
";
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("not checked: needs root");
    }
    let arguments = ["--pid", "--fork", "--kill-child", "python3", "-c", CHURN];
    let mut outside = std::process::Command::new("unshare").args(arguments).spawn().unwrap();
    let children = format!("/proc/{0}/task/{0}/children", outside.id());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let pid: i32 = loop {
        assert!(std::time::Instant::now() < deadline, "it does not start");
        let child = std::fs::read_to_string(&children).unwrap().trim().parse();
        // It has threads by then.
        match child.ok().filter(|pid| identity::inspect(*pid).is_ok_and(|found| found.facts.tids.len() > 1)) {
            Some(pid) => break pid,
            None => std::thread::sleep(std::time::Duration::from_millis(5)),
        }
    };
    let failed: Vec<_> = (0..300).filter_map(|_| identity::inspect(pid).err()).map(|error| error.to_string()).collect();
    outside.kill().unwrap();
    outside.wait().unwrap();
    assert!(failed.is_empty(), "{} of 300: {}", failed.len(), failed[0]);
}
