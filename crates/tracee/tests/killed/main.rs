//! Tracers killed at random instants, and processes put right by their ledgers.
//!
//! The tracer is this test program once more, running the test that is ignored otherwise.

use godwit_tracee::ledger::{Afterwards, Mended, mend};
use godwit_tracee::{Batch, Error, Extent, Ledger, Tracee, is_parked, read_maps, read_status};
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

const FAILURES: u64 = 4;
const SIGNALS: u64 = 5;
const CONTINUES: u64 = 6;
/// Time for killing tracers in each test, unless `GODWIT_REPETITIONS` says how many.
const TIME: Duration = Duration::from_secs(8);

fn scratch_file(name: &str) -> PathBuf {
    // Each test has a thread of its own.
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}-{test}", std::process::id()))
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap()
}

fn reopen(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// A process that checks itself.
struct Worker {
    child: Child,
    pid: i32,
    words: File,
    threads: u64,
}

impl Worker {
    fn start(threads: u64) -> Self {
        Self::start_by(&[], threads)
    }

    /// Starts one that does not know itself by the pid that we know it by.
    fn start_in_namespace() -> Self {
        let mut worker =
            Self::start_by(&["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", "\"$@\"; :", "sh"], 1);
        let only_child = |pid: i32| {
            let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
            children.trim().parse().unwrap()
        };
        worker.pid = only_child(only_child(worker.pid));
        assert_eq!(read_status(worker.pid).unwrap().numbers("NSpid").len(), 2);
        worker
    }

    fn start_by(launcher: &[&str], threads: u64) -> Self {
        let program = scratch_file("worker");
        if !program.exists() {
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/killed/worker.c");
            let compiled =
                Command::new("cc").args(["-O1", "-Wall", "-pthread", "-o"]).arg(&program).arg(source).status();
            assert!(compiled.expect("a C compiler is needed: apt-get install gcc").success());
        }
        let path = scratch_file("words");
        let words = open(&path);
        words.set_len(4096).unwrap();
        let mut arguments: Vec<OsString> = launcher.iter().map(Into::into).collect();
        arguments.extend([program.into(), path.into(), threads.to_string().into()]);
        let mut command = Command::new(&arguments[0]);
        let mut child = command.args(&arguments[1..]).stdout(Stdio::piped()).spawn().unwrap();
        expect_line(child.stdout.take().unwrap(), "ready");
        let worker = Self { pid: child.id() as i32, child, words, threads };
        worker.expect_beats().unwrap();
        worker
    }

    fn signal(&self, signal: i32) {
        godwit_kernel::process::kill(self.pid, signal).unwrap();
    }

    /// As if it had not seen any SIGCONT yet.
    fn forget_continues(&self) {
        self.words.write_all_at(&[0; 8], CONTINUES * 8).unwrap();
    }

    fn word(&self, index: u64) -> u64 {
        let mut bytes = [0; 8];
        self.words.read_exact_at(&mut bytes, index * 8).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Every thread goes on and finds nothing wrong.
    fn expect_beats(&self) -> Result<(), String> {
        let before: Vec<u64> = (0..self.threads).map(|index| self.word(index)).collect();
        wait_until("every thread has gone on", || {
            (0..self.threads).all(|index| self.word(index) > before[index as usize] + 1)
        })?;
        if self.word(FAILURES) == 0 { Ok(()) } else { Err(format!("{} failures", self.word(FAILURES))) }
    }

    /// It is as if nothing had happened.
    fn expect_unharmed(&self, maps: &[(u64, u64)]) -> Result<(), String> {
        self.expect_beats()?;
        let handled = self.word(SIGNALS);
        self.signal(libc::SIGUSR1);
        wait_until("a signal has been handled", || self.word(SIGNALS) == handled + 1)?;
        if self.word(CONTINUES) != 0 {
            return Err("it has seen a SIGCONT".to_owned());
        }
        let now = ranges(self.pid);
        if now == maps { Ok(()) } else { Err(format!("mappings {now:x?} instead of {maps:x?}")) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ranges(pid: i32) -> Vec<(u64, u64)> {
    let maps = read_maps(pid).unwrap_or_default();
    maps.iter().filter(|vma| !vma.name.starts_with(b"[stack")).map(|vma| (vma.start, vma.end)).collect()
}

/// What state the threads of a process are in, and which signals wait for them.
fn states(pid: i32) -> String {
    let tids = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let statuses = tids.filter_map(|entry| read_status(entry.file_name().to_str()?.parse().ok()?).ok());
    let fields = ["State", "SigPnd", "ShdPnd", "SigBlk"];
    statuses.map(|status| fields.map(|field| status.text(field).to_owned()).join(" ")).collect::<Vec<_>>().join("; ")
}

fn expect_line(output: ChildStdout, wanted: &str) {
    let found = BufReader::new(output).lines().map_while(Result::ok).any(|line| line == wanted);
    assert!(found, "it ended without saying {wanted:?}");
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !condition() {
        if Instant::now() >= deadline {
            return Err(format!("waited in vain until {what}"));
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

/// What a tracer does until it is killed.
#[derive(Clone, Copy, Debug)]
enum Role {
    /// Holds the process again and again, with calls of all kinds.
    Holds,
    /// Holds it, and makes and removes the scratch mapping again and again.
    Maps,
    /// Puts it right, once.
    Mends,
    /// Holds it, and has put back what was changed.
    PutsBack,
    /// Holds it parked.
    Parks,
    /// As well, as one that has filters.
    ParksFiltered,
}

impl Role {
    fn test(self) -> &'static str {
        match self {
            Role::Holds => "holds_a_process_again_and_again",
            Role::Maps => "makes_and_removes_the_scratch_mapping_again_and_again",
            Role::Mends => "puts_a_process_right",
            Role::PutsBack => "holds_a_process_as_it_was",
            Role::Parks => "holds_a_parked_process",
            Role::ParksFiltered => "holds_a_parked_process_with_filters",
        }
    }
}

/// Starts this program in a role towards `pid`; returns when it has begun.
fn start(role: Role, pid: i32, ledger: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", role.test(), "--ignored", "--nocapture"])
        .env("GODWIT_TEST_PID", pid.to_string())
        .env("GODWIT_TEST_LEDGER", ledger)
        .stdout(Stdio::piped())
        .spawn()
        .expect("the test program runs");
    expect_line(child.stdout.take().unwrap(), "begun");
    child
}

/// Installs the ledger that a tracer is to keep, and says so.
fn begin_to_hold() -> i32 {
    let pid = std::env::var("GODWIT_TEST_PID").unwrap().parse().unwrap();
    Ledger::begin(given_ledger(), pid).unwrap().install();
    say_that_it_begins();
    pid
}

fn given_ledger() -> File {
    reopen(Path::new(&std::env::var_os("GODWIT_TEST_LEDGER").unwrap()))
}

fn say_that_it_begins() {
    println!("\nbegun");
    std::io::stdout().flush().unwrap();
}

#[test]
#[ignore = "a role in other tests"]
fn holds_a_process_again_and_again() {
    let pid = begin_to_hold();
    for round in 0u64.. {
        let extent = if round % 4 == 3 { Extent::Leader } else { Extent::AllThreads };
        let mut tracee = Tracee::freeze(pid, extent).unwrap();
        let tids: Vec<i32> = tracee.threads().iter().map(|thread| thread.tid).collect();
        for call in 0..24 {
            let mut batch = Batch::new();
            // Every now and then one that the scratch mapping is too small for.
            batch.buffer(if call == 20 && round % 2 == 0 { 200_000 } else { 100 });
            batch.call("getpid", libc::SYS_getpid, &[]);
            tracee.run_in(tids[call % tids.len()], batch).unwrap();
        }
        if round % 3 == 0 {
            tracee.drop_scratch().unwrap();
        }
        tracee.release().unwrap();
    }
}

#[test]
#[ignore = "a role in other tests"]
fn makes_and_removes_the_scratch_mapping_again_and_again() {
    let pid = begin_to_hold();
    for round in 0usize.. {
        let mut tracee = Tracee::freeze(pid, Extent::AllThreads).unwrap();
        let tids: Vec<i32> = tracee.threads().iter().map(|thread| thread.tid).collect();
        for turn in round..round + 50 {
            tracee.run_in(tids[turn % tids.len()], Batch::new()).unwrap();
            tracee.drop_scratch().unwrap();
        }
        tracee.release().unwrap();
    }
}

#[test]
#[ignore = "a role in other tests"]
fn holds_a_process_as_it_was() {
    let pid = std::env::var("GODWIT_TEST_PID").unwrap().parse().unwrap();
    Ledger::begin(given_ledger(), pid).unwrap().install();
    let mut tracee = Tracee::freeze(pid, Extent::AllThreads).unwrap();
    tracee.run(Batch::new()).unwrap();
    tracee.drop_scratch().unwrap();
    say_that_it_begins();
    loop {
        std::thread::park();
    }
}

#[test]
#[ignore = "a role in other tests"]
fn holds_a_parked_process() {
    hold_parked(false);
}

#[test]
#[ignore = "a role in other tests"]
fn holds_a_parked_process_with_filters() {
    hold_parked(true);
}

fn hold_parked(filtered: bool) -> ! {
    let pid = std::env::var("GODWIT_TEST_PID").unwrap().parse().unwrap();
    let _tracee = park(pid, given_ledger(), filtered);
    say_that_it_begins();
    loop {
        std::thread::park();
    }
}

fn park(pid: i32, ledger: File, filtered: bool) -> Tracee {
    Ledger::begin(ledger, pid).unwrap().install();
    let mut tracee = Tracee::freeze(pid, Extent::AllThreads).unwrap();
    tracee.run(Batch::new()).unwrap();
    tracee.drop_scratch().unwrap();
    tracee.stop_if_abandoned().unwrap();
    tracee.park(filtered).unwrap();
    tracee
}

#[test]
#[ignore = "a role in other tests"]
fn puts_a_process_right() {
    let ledger = given_ledger();
    say_that_it_begins();
    mend(&ledger, Afterwards::GoesOn).unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn no_ledger_or_a_damaged_one_is_an_error_and_touches_nothing() {
    let sleeper = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = sleeper.id() as i32;
    let worker = Worker { child: sleeper, pid, words: open(&scratch_file("nothing")), threads: 0 };
    let path = scratch_file("damaged");
    let file = open(&path);
    assert!(matches!(mend(&file, Afterwards::GoesOn), Err(Error::BadLedger)), "empty");
    Ledger::begin(file.try_clone().unwrap(), pid).unwrap();
    assert_eq!(mend(&file, Afterwards::GoesOn).unwrap(), Mended::NothingToDo);
    let mut bytes = [0; 104];
    file.read_exact_at(&mut bytes, 0).unwrap();
    for at in 0..bytes.len() {
        let mut damaged = bytes;
        damaged[at] ^= 0x10;
        file.write_all_at(&damaged, 0).unwrap();
        assert!(matches!(mend(&file, Afterwards::GoesOn), Err(Error::BadLedger)), "byte {at}");
    }
    drop(worker);
}

/// Kills tracers of workers at random instants.
struct Killer {
    ledger: PathBuf,
    began: Instant,
    random: u64,
    rounds: u32,
    mended: u32,
    lost: Vec<String>,
}

impl Killer {
    fn new() -> Self {
        let random = 88_172_645_463_325_252;
        Self { ledger: scratch_file("ledger"), began: Instant::now(), random, rounds: 0, mended: 0, lost: Vec::new() }
    }

    /// Whether there is time for another round; counts it.
    fn goes_on(&mut self) -> bool {
        let wanted: Option<u32> = std::env::var("GODWIT_REPETITIONS").ok().and_then(|text| text.parse().ok());
        let goes_on = wanted.map_or_else(|| self.began.elapsed() < TIME, |wanted| self.rounds < wanted);
        self.rounds += u32::from(goes_on);
        goes_on
    }

    /// Starts this program in a role towards `pid`, and kills it within the next `microseconds`.
    fn start_and_kill(&mut self, role: Role, pid: i32, microseconds: u64) {
        let mut child = start(role, pid, &self.ledger);
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        std::thread::sleep(Duration::from_micros(self.random % microseconds));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Kills a tracer of `pid`, which begins a ledger anew.
    fn kill_tracer(&mut self, role: Role, pid: i32) {
        drop(open(&self.ledger));
        self.start_and_kill(role, pid, 4000);
    }

    fn mend(&mut self) -> Result<Mended, String> {
        let mended = mend(&reopen(&self.ledger), Afterwards::GoesOn).map_err(|error| format!("{error:?}"))?;
        self.mended += u32::from(matches!(mended, Mended::GivenBack | Mended::Stopped));
        if mended == Mended::Gone { Err("it has ended".to_owned()) } else { Ok(mended) }
    }

    /// Another round was fine, or else the worker is replaced.
    fn settle(&mut self, outcome: Result<(), String>, worker: &mut Worker, replacement: impl Fn() -> Worker) {
        match outcome {
            Ok(()) => {
                let again = mend(&reopen(&self.ledger), Afterwards::GoesOn).unwrap();
                assert_eq!(again, Mended::NothingToDo, "once is enough");
            }
            Err(error) => {
                self.lost.push(format!("round {}: {error}; {}", self.rounds, states(worker.pid)));
                *worker = replacement();
            }
        }
    }

    /// Every process that was traced is unharmed.
    fn finish(self) {
        let Self { began, rounds, mended, lost, .. } = self;
        println!("{rounds} tracers killed, {mended} processes mended, {} lost in {:?}", lost.len(), began.elapsed());
        assert!(lost.is_empty(), "{lost:#?}");
        assert!(rounds >= 20, "only {rounds} rounds in {TIME:?}");
        assert!(mended * 3 > rounds, "many tracers are killed while they hold it");
    }
}

/// Kills tracers of a worker and puts it right each time.
fn kill_tracers(role: Role, start: impl Fn() -> Worker) {
    let mut killer = Killer::new();
    let mut worker = start();
    let mut maps = ranges(worker.pid);
    while killer.goes_on() {
        killer.kill_tracer(role, worker.pid);
        let outcome = killer.mend().and_then(|_| worker.expect_unharmed(&maps));
        killer.settle(outcome, &mut worker, &start);
        maps = ranges(worker.pid);
    }
    killer.finish();
}

#[test]
fn a_process_is_put_right_whenever_its_tracer_is_killed() {
    kill_tracers(Role::Holds, || Worker::start(4));
}

#[test]
fn a_process_is_put_right_when_its_scratch_mapping_comes_and_goes() {
    kill_tracers(Role::Maps, || Worker::start(4));
}

/// No other thread stops it.
#[test]
fn a_process_of_one_thread_is_put_right_when_its_scratch_mapping_comes_and_goes() {
    kill_tracers(Role::Maps, || Worker::start(1));
}

#[test]
fn a_process_that_knows_itself_by_another_pid_is_put_right() {
    kill_tracers(Role::Maps, Worker::start_in_namespace);
}

#[test]
fn a_process_that_job_control_has_stopped_stays_stopped_and_is_put_right() {
    let mut killer = Killer::new();
    let mut worker = Worker::start(4);
    while killer.goes_on() {
        worker.signal(libc::SIGSTOP);
        let maps = ranges(worker.pid);
        wait_until("it is stopped", || is_stopped(worker.pid)).unwrap();
        let role = if killer.rounds.is_multiple_of(2) { Role::Holds } else { Role::Maps };
        killer.kill_tracer(role, worker.pid);
        let mended = killer.mend();
        let stopped = mended.and_then(|_| wait_until("it is stopped again", || is_stopped(worker.pid)));
        worker.signal(libc::SIGCONT);
        let outcome = stopped.and_then(|()| {
            worker.expect_beats()?;
            worker.forget_continues();
            worker.expect_unharmed(&maps)
        });
        killer.settle(outcome, &mut worker, || Worker::start(4));
    }
    killer.finish();
}

/// Then it may see a SIGCONT.
#[test]
fn a_process_is_put_right_when_who_puts_it_right_is_killed_too() {
    let mut killer = Killer::new();
    let mut worker = Worker::start(4);
    let mut maps = ranges(worker.pid);
    while killer.goes_on() {
        killer.kill_tracer(Role::Maps, worker.pid);
        killer.start_and_kill(Role::Mends, worker.pid, 1000);
        let outcome = killer.mend().and_then(|_| worker.expect_beats());
        worker.forget_continues();
        killer.settle(outcome.and_then(|()| worker.expect_unharmed(&maps)), &mut worker, || Worker::start(4));
        maps = ranges(worker.pid);
    }
    killer.finish();
}

/// Somebody has it continue before it is put right.
#[test]
fn a_process_that_somebody_has_continued_is_put_right_all_the_same() {
    let mut killer = Killer::new();
    let worker = Worker::start(4);
    let maps = ranges(worker.pid);
    for (afterwards, mended) in [(Afterwards::GoesOn, Mended::GivenBack), (Afterwards::StaysStopped, Mended::Stopped)] {
        killer.kill_tracer(Role::PutsBack, worker.pid);
        wait_until("it is stopped", || is_stopped(worker.pid)).unwrap();
        worker.signal(libc::SIGCONT);
        worker.expect_beats().unwrap();
        assert_eq!(mend(&reopen(&killer.ledger), afterwards).unwrap(), mended);
        if mended == Mended::Stopped {
            wait_until("it is stopped again", || is_stopped(worker.pid)).unwrap();
            worker.signal(libc::SIGCONT);
        }
        worker.expect_beats().unwrap();
        worker.forget_continues();
        worker.expect_unharmed(&maps).unwrap();
        assert_eq!(killer.mend(), Ok(Mended::NothingToDo), "once is enough");
    }
}

/// A process that was given away and is continued by somebody must not be a second copy.
#[test]
fn a_parked_process_runs_nothing_whoever_continues_it() {
    let mut killer = Killer::new();
    let worker = Worker::start(4);
    let maps = ranges(worker.pid);
    for (role, left) in [(Some(Role::Parks), true), (Some(Role::ParksFiltered), true), (None, true), (None, false)] {
        match role {
            Some(role) => killer.kill_tracer(role, worker.pid),
            None => park(worker.pid, open(&killer.ledger), false).release_stopped().unwrap(),
        }
        wait_until("it is stopped", || is_stopped(worker.pid)).unwrap();
        assert!(is_parked(worker.pid));
        let beats = || (0..4).map(|index| worker.word(index)).collect::<Vec<_>>();
        let (before, handled) = (beats(), worker.word(SIGNALS));
        for _ in 0..3 {
            worker.signal(libc::SIGUSR1);
            worker.signal(libc::SIGCONT);
            wait_until("it goes on", || !is_stopped(worker.pid)).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            assert!(is_parked(worker.pid));
            worker.signal(libc::SIGSTOP);
            wait_until("it is stopped again", || is_stopped(worker.pid)).unwrap();
        }
        assert_eq!((beats(), worker.word(SIGNALS)), (before, handled), "it has run");
        if !left {
            worker.signal(libc::SIGCONT);
        }
        assert_eq!(killer.mend(), Ok(Mended::GivenBack));
        worker.expect_beats().unwrap();
        assert!(!is_parked(worker.pid));
        wait_until("the signal is handled", || worker.word(SIGNALS) == handled + 1).unwrap();
        worker.forget_continues();
        worker.expect_unharmed(&maps).unwrap();
    }
}

/// Given back by the one who has parked it, it goes on.
#[test]
fn a_parked_process_is_given_back() {
    let ledger = scratch_file("ledger");
    let worker = Worker::start(4);
    let maps = ranges(worker.pid);
    for _ in 0..20 {
        let mut tracee = park(worker.pid, open(&ledger), false);
        // As asynchronous I/O is made again.
        tracee.go_on().unwrap();
        tracee.run(Batch::new()).unwrap();
        tracee.release().unwrap();
        worker.expect_unharmed(&maps).unwrap();
        assert_eq!(mend(&reopen(&ledger), Afterwards::GoesOn).unwrap(), Mended::NothingToDo);
    }
}

/// Whether all threads of a process are stopped.
fn is_stopped(pid: i32) -> bool {
    let tids = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tids.filter_map(|entry| read_status(entry.file_name().to_str()?.parse().ok()?).ok())
        .all(|status| status.state() == 'T')
}
