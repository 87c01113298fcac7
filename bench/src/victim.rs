//! The process that is moved: M MiB of noise, threads that work on it in a known way, and one that watches the clock.
//!
//! It knows nothing of moves but one thing: hosts have names, so a heartbeat on another host than the one before has the
//! freeze in between. Every number is taken inside; nothing is asked of the kernel or the engine.

mod heart;
mod histogram;
mod random;
mod reader;
mod writer;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::cli::VictimArguments;
use crate::status::Status;

use heart::Heart;
use histogram::Histogram;
use random::Random;

/// 64-bit words of a page.
const WORDS: usize = 512;
/// How often the status is written.
const TICK: Duration = Duration::from_millis(10);

/// Memory that threads share until the end. Atomics, because safe code has no other shared memory; they cost no more.
type Memory = &'static [AtomicU64];

/// What the threads count.
#[derive(Debug, Default)]
struct Counters {
    writes: AtomicU64,
    writer_cpu_us: AtomicU64,
    touches: Histogram,
}

/// Works until it is killed.
///
/// # Errors
/// The status cannot be written or a thread ends.
pub fn work(arguments: &VictimArguments) -> Result<()> {
    let path = &arguments.status;
    let file = OpenOptions::new().create(true).write(true).truncate(true).open(path);
    let file = file.with_context(|| path.display().to_string())?;
    let memory = sow(arguments.memory)?;
    let counters = Arc::new(Counters::default());
    let heart = Arc::new(Heart::default());
    let mut threads = vec![start("heart", Arc::clone(&heart), |heart| heart.beat())?];
    if arguments.writer > 0 {
        let pace = if arguments.busy { writer::Pace::Busy } else { writer::Pace::Paced };
        let writer = writer::Writer::new(memory, arguments.writer, pace);
        let counters = Arc::clone(&counters);
        threads.push(start("writer", writer, move |writer| writer.write(&counters))?);
    }
    if arguments.reader {
        let (counters, heart) = (Arc::clone(&counters), Arc::clone(&heart));
        threads.push(start("reader", memory, move |memory| reader::touch(memory, &heart, &counters.touches))?);
    }
    for number in 1.. {
        write(&file, number, &heart, &counters)?;
        std::thread::sleep(TICK);
        ensure!(!threads.iter().any(JoinHandle::is_finished), "a thread ended");
    }
    Ok(())
}

fn start<T: Send + 'static>(name: &str, with: T, work: impl FnOnce(T) + Send + 'static) -> Result<JoinHandle<()>> {
    Ok(std::thread::Builder::new().name(name.to_owned()).spawn(move || work(with))?)
}

/// Fills memory with noise that no compression makes smaller.
fn sow(mebibytes: u64) -> Result<Memory> {
    let words = usize::try_from(mebibytes * (1 << 17)).context("more memory than addresses")?;
    let mut random = Random::new(mebibytes);
    let mut memory = Vec::new();
    memory.try_reserve_exact(words).context("not enough memory")?;
    memory.extend(std::iter::repeat_with(|| AtomicU64::new(random.next())).take(words));
    Ok(memory.leak())
}

fn write(file: &File, number: u64, heart: &Heart, counters: &Counters) -> Result<()> {
    let touches = &counters.touches;
    let status = Status {
        number,
        at_us: wall_clock_us(),
        host: heart.host(),
        move_gap_us: heart.move_gap_us(),
        other_gap_us: heart.other_gap_us(),
        writes: counters.writes.load(Ordering::Relaxed),
        writer_cpu_us: counters.writer_cpu_us.load(Ordering::Relaxed),
        faults: touches.count(),
        fault_p50_us: touches.percentile_us(50),
        fault_p99_us: touches.percentile_us(99),
        end: number,
    };
    Ok(file.write_all_at(&status.line()?, 0)?)
}

/// Microseconds since 1970, by the only clock that two hosts share.
fn wall_clock_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
