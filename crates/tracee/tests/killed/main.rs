//! Tracers killed at random instants, and processes put right by their ledgers.
//!
//! The tracer is this test program once more, running the test that is ignored otherwise.

use godwit_tracee::ledger::{Afterwards, Mended, mend};
use godwit_tracee::{Batch, Error, Extent, Ledger, Tracee, read_maps};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

const THREADS: u64 = 4;
const FAILURES: u64 = 4;
const SIGNALS: u64 = 5;
const CONTINUES: u64 = 6;
/// Tracers to kill, unless time is up before.
const ROUNDS: u32 = 300;
const TIME: Duration = Duration::from_secs(40);

fn scratch_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()))
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap()
}

/// A process that checks itself.
struct Worker {
    child: Child,
    words: File,
}

impl Worker {
    fn start() -> Self {
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
        let mut child = Command::new(program).arg(&path).stdout(Stdio::piped()).spawn().unwrap();
        expect_line(child.stdout.take().unwrap(), "ready");
        let worker = Self { child, words };
        worker.expect_beats().unwrap();
        worker
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn word(&self, index: u64) -> u64 {
        let mut bytes = [0; 8];
        self.words.read_exact_at(&mut bytes, index * 8).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Every thread goes on and finds nothing wrong.
    fn expect_beats(&self) -> Result<(), String> {
        let before: Vec<u64> = (0..THREADS).map(|index| self.word(index)).collect();
        wait_until("every thread has gone on", || {
            (0..THREADS).all(|index| self.word(index) > before[index as usize] + 1)
        })?;
        if self.word(FAILURES) == 0 { Ok(()) } else { Err(format!("{} failures", self.word(FAILURES))) }
    }

    /// It is as if nothing had happened.
    fn expect_unharmed(&self, maps: &[(u64, u64)]) -> Result<(), String> {
        self.expect_beats()?;
        let handled = self.word(SIGNALS);
        godwit_kernel::process::kill(self.pid(), libc::SIGUSR1).unwrap();
        wait_until("a signal has been handled", || self.word(SIGNALS) == handled + 1)?;
        if self.word(CONTINUES) != 0 {
            return Err("it has seen a SIGCONT".to_owned());
        }
        let now = ranges(self.pid());
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

/// Starts a tracer that holds `pid` again and again until it is killed; returns when it has begun.
fn start_tracer(pid: i32, ledger: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "holds_a_process_again_and_again", "--ignored", "--nocapture"])
        .env("GODWIT_TEST_PID", pid.to_string())
        .env("GODWIT_TEST_LEDGER", ledger)
        .stdout(Stdio::piped())
        .spawn()
        .expect("the test program runs");
    expect_line(child.stdout.take().unwrap(), "holding");
    child
}

#[test]
#[ignore = "a role in other tests"]
fn holds_a_process_again_and_again() {
    let pid = std::env::var("GODWIT_TEST_PID").unwrap().parse().unwrap();
    let file = File::options().read(true).write(true).open(std::env::var("GODWIT_TEST_LEDGER").unwrap()).unwrap();
    Ledger::begin(file, pid).unwrap().install();
    println!("\nholding");
    std::io::stdout().flush().unwrap();
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
fn no_ledger_or_a_damaged_one_is_an_error_and_touches_nothing() {
    let sleeper = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = sleeper.id() as i32;
    let worker = Worker { child: sleeper, words: open(&scratch_file("nothing")) };
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

#[test]
fn a_process_is_put_right_whenever_its_tracer_is_killed() {
    let path = scratch_file("ledger");
    let began = Instant::now();
    let (mut rounds, mut stopped, mut lost) = (0, 0, Vec::new());
    let mut worker = Worker::start();
    let mut maps = ranges(worker.pid());
    let mut random = 88_172_645_463_325_252u64;
    while rounds < ROUNDS && began.elapsed() < TIME {
        rounds += 1;
        drop(open(&path));
        let mut tracer = start_tracer(worker.pid(), &path);
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_micros(random % 4000));
        tracer.kill().unwrap();
        tracer.wait().unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mended = mend(&file, Afterwards::GoesOn);
        stopped += u32::from(matches!(mended, Ok(Mended::GivenBack)));
        let unharmed = match mended {
            Ok(Mended::GivenBack | Mended::NothingToDo) => worker.expect_unharmed(&maps),
            ref other => Err(format!("{other:?}")),
        };
        if let Err(error) = unharmed {
            lost.push(format!("round {rounds}: {error}; {mended:?}"));
            worker = Worker::start();
            maps = ranges(worker.pid());
        } else {
            assert_eq!(mend(&file, Afterwards::GoesOn).unwrap(), Mended::NothingToDo, "once is enough");
        }
    }
    println!("{rounds} tracers killed, {stopped} processes mended, {} lost: {lost:#?}", lost.len());
    assert!(rounds >= 50, "only {rounds} rounds in {TIME:?}");
    assert!(stopped * 2 > rounds, "most tracers are killed while they hold it");
    // The start of the two calls that make and remove the scratch mapping cannot be made safe.
    assert!(lost.len() as u32 * 8 <= rounds, "too many are lost");
}
