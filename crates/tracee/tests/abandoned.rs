//! What becomes of processes whose tracer is killed.
//!
//! The tracer is this test program once more, running one of the tests that are ignored otherwise.

use godwit_kernel::{ptrace, stub};
use godwit_tracee::{Batch, ThreadState, Tracee, read_status};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Where a stub's program lies in these tests.
const PROGRAM: u64 = 0x10_0000;
/// What its threads count.
const COUNTERS: u64 = PROGRAM + 4096;
/// `lock inc qword ptr [rdi]`, again and again.
const COUNTING: &[u8] = &[0xf0, 0x48, 0xff, 0x07, 0xeb, 0xfa];

/// This program in the role of a tracer. It prints the pid of its tracee as soon as it can be killed.
struct Tracer(Child);

impl Tracer {
    fn play(role: &str) -> (Self, i32) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", role, "--ignored", "--nocapture"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test program runs");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let tracer = Self(child);
        let pid = lines.find_map(|line| line.unwrap().strip_prefix("tracee ")?.parse().ok());
        (tracer, pid.expect("the tracer says what it traces"))
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A process that ends with the test.
struct Orphan(i32);

impl Drop for Orphan {
    fn drop(&mut self) {
        let _ = godwit_kernel::process::kill(self.0, libc::SIGKILL);
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn state(pid: i32) -> char {
    read_status(pid).map_or('X', |status| status.state())
}

fn counters(pid: i32) -> [u64; 2] {
    let mut bytes = [0; 16];
    let mem = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    mem.read_exact_at(&mut bytes, COUNTERS).unwrap();
    [0, 8].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()))
}

/// A stub of two threads that count, each for itself, as soon as they run. Of the second nothing was ever asked.
fn counting_stub() -> Tracee {
    // Tests run beside each other: each looks for two ids in a row at places of its own.
    let first = 20_000 + std::process::id() as i32 * 16 % 10_000;
    let free = |pid: i32| !std::path::Path::new(&format!("/proc/{pid}")).exists();
    let mut candidates = (first..first + 2000).filter(|&pid| free(pid) && free(pid + 1));
    let wanted = candidates.find_map(|pid| stub::spawn(pid).ok()).expect("some ids are free");
    let mut tracee = Tracee::adopt(wanted).unwrap();
    let mut batch = Batch::new();
    let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let arguments = [PROGRAM.into(), 8192u64.into(), protection.into(), flags.into(), u64::MAX.into(), 0u64.into()];
    batch.call("mmap", libc::SYS_mmap, &arguments);
    batch.call("prctl", libc::SYS_prctl, &[libc::PR_SET_PDEATHSIG.into(), 0u64.into()]);
    tracee.run(batch).unwrap();
    tracee.write(PROGRAM, COUNTING).unwrap();
    let second = tracee.spawn_thread(wanted + 1).unwrap();
    tracee.drop_scratch().unwrap();
    for (tid, counter) in [(tracee.pid(), COUNTERS), (second, COUNTERS + 8)] {
        let mut registers = tracee.thread(tid).unwrap().registers;
        registers.rip = PROGRAM;
        registers.rdi = counter;
        registers.orig_rax = u64::MAX;
        let xstate = ptrace::xstate(tid).unwrap();
        tracee.set_state(tid, &ThreadState { registers, xstate, mask: 0 }).unwrap();
    }
    tracee
}

/// Says what is traced, and waits to be killed.
fn wait_for_death(tracee: &Tracee) -> ! {
    println!("\ntracee {}", tracee.pid());
    std::io::stdout().flush().unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
#[ignore = "a role in other tests"]
fn frees_a_stub() {
    let mut tracee = counting_stub();
    tracee.free().unwrap();
    wait_for_death(&tracee);
}

#[test]
#[ignore = "a role in other tests"]
fn keeps_a_stub() {
    wait_for_death(&counting_stub());
}

#[test]
fn a_free_stub_outlives_its_tracer_stopped_and_can_be_continued() {
    let (tracer, pid) = Tracer::play("frees_a_stub");
    let stub = Orphan(pid);
    tracer.kill();
    wait_until("it is stopped", || state(stub.0) == 'T');
    assert_eq!(counters(stub.0), [0, 0], "neither thread has run an instruction");
    assert_eq!(read_status(stub.0).unwrap().hexadecimal("SigBlk"), Some(0));
    godwit_kernel::process::kill(stub.0, libc::SIGCONT).unwrap();
    wait_until("both threads count", || counters(stub.0).iter().all(|&counter| counter > 1000));
}

#[test]
fn a_stub_that_was_not_freed_dies_with_its_tracer() {
    let (tracer, pid) = Tracer::play("keeps_a_stub");
    let stub = Orphan(pid);
    assert_eq!(state(stub.0), 't');
    tracer.kill();
    wait_until("it is gone", || matches!(state(stub.0), 'X' | 'Z'));
}

#[test]
fn a_free_stub_is_launched_like_another_and_dies_with_its_handle() {
    let mut tracee = counting_stub();
    tracee.free().unwrap();
    let stub = Orphan(tracee.pid());
    tracee.launch().unwrap();
    wait_until("both threads count", || counters(stub.0).iter().all(|&counter| counter > 1000));
    assert!(matches!(state(stub.0), 'R'));
    let mut tracee = counting_stub();
    tracee.free().unwrap();
    let pid = tracee.pid();
    drop(tracee);
    assert_eq!(state(pid), 'X', "it is gone, and reaped");
}

/// A panic drops what it finds: a process that was given away must not run on by that.
#[test]
fn what_was_given_away_stays_stopped_when_its_handle_is_dropped() {
    for given_away in [false, true] {
        let mut sleeper = Command::new("sleep").arg("60").spawn().expect("sleep(1) starts");
        let pid = sleeper.id() as i32;
        let orphan = Orphan(pid);
        let held = std::thread::spawn(move || {
            let mut tracee = Tracee::freeze(pid, godwit_tracee::Extent::AllThreads).unwrap();
            tracee.stop_if_abandoned().unwrap();
            if given_away {
                tracee.give_away();
            }
            panic!("as it would be by a mistake of ours");
        });
        assert!(held.join().is_err());
        let expected = if given_away { 'T' } else { 'S' };
        wait_until("it stands as it should", || state(pid) == expected);
        drop(orphan);
        let _ = sleeper.wait();
    }
}
