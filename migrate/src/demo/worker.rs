//! The program that the demo moves. It knows nothing of moves: it rewrites memory, compares all of it with what it ought to
//! be, and notes heartbeats that came late. Its standard streams are not used; what it sees goes to two files.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::cli::DemoWorkerArguments;

use super::observation::{Gap, RECORD_SIZE, Record, gaps_file, record_file};

/// A heartbeat that comes later than this is noted.
pub(super) const NOTED_GAP_MS: f64 = 2.0;

const THREADS: u64 = 4;
/// 64-bit words of a page.
const WORDS: usize = 512;
const HEARTBEAT: Duration = Duration::from_millis(1);
/// How often each thread goes to work, and the status is written.
const TICK: Duration = Duration::from_millis(10);
/// Pages that a thread rewrites each time: 25 MiB/s for four threads.
const REWRITES: u64 = 16;
/// How many times a thread goes to work in one pass over its memory, at most.
const TICKS_A_PASS: u64 = 150;

/// What the threads count; each has its own.
#[derive(Debug, Default)]
struct Counters {
    rewritten: AtomicU64,
    compared: AtomicU64,
    failed: AtomicU64,
    passes: AtomicU64,
}

/// Works until it is killed.
///
/// # Errors
/// The files cannot be written or a thread cannot be started.
pub fn work(arguments: &DemoWorkerArguments) -> Result<()> {
    // Outside of a PID namespace's first session this cannot fail but by being the leader already, which is as good.
    let _ = nix::unistd::setsid();
    close_inherited();
    let pages = u64::from(arguments.memory) * (1 << 20) / (WORDS as u64 * 8) / THREADS;
    let record = open(&record_file(&arguments.directory))?;
    let gaps = open(&gaps_file(&arguments.directory))?;
    let counters: Vec<Arc<Counters>> = (0..THREADS).map(|_| Arc::default()).collect();
    let mut fields = Vec::new();
    for (number, counters) in counters.iter().enumerate() {
        let counters = Arc::clone(counters);
        let thread = std::thread::Builder::new().name(format!("worker-{number}"));
        fields.push(thread.spawn(move || Field::sow(number as u64, pages, counters).tend())?);
    }
    let late = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&late);
    std::thread::Builder::new().name("heartbeat".to_owned()).spawn(move || beat(&noted))?;
    for number in 1.. {
        std::thread::sleep(TICK);
        write_gaps(&gaps, &late)?;
        write_record(&record, number, &counters)?;
        ensure!(!fields.iter().any(std::thread::JoinHandle::is_finished), "a thread ended");
    }
    Ok(())
}

/// Closes everything but the standard streams, as daemons do: what the demo was started with, such as a pipe of the shell
/// or the build tool that called it, leads outside.
fn close_inherited() {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
    let descriptors: Vec<i32> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter(|fd| *fd > 2).collect();
    for descriptor in descriptors {
        // One of them was the directory that is closed by now.
        let _ = nix::unistd::close(descriptor);
    }
}

/// Memory of one thread, and which version of each page ought to be there.
struct Field {
    seed: u64,
    memory: Vec<u64>,
    versions: Vec<u32>,
    counters: Arc<Counters>,
}

impl Field {
    fn sow(seed: u64, pages: u64, counters: Arc<Counters>) -> Self {
        let versions = vec![0; pages as usize];
        let memory = vec![0; pages as usize * WORDS];
        let mut field = Self { seed, memory, versions, counters };
        for page in 0..field.versions.len() {
            field.rewrite(page);
        }
        field
    }

    /// Rewrites some pages at random and compares some in order, for ever.
    fn tend(mut self) {
        let pages = self.versions.len();
        let share = pages.div_ceil(TICKS_A_PASS as usize).max(64);
        let mut random = mix(self.seed + 1);
        let mut next = 0;
        loop {
            for _ in 0..REWRITES {
                random = mix(random);
                let page = (random % pages as u64) as usize;
                self.compare(page);
                self.rewrite(page);
            }
            for _ in 0..share {
                self.compare(next);
                next += 1;
                if next == pages {
                    next = 0;
                    self.counters.passes.fetch_add(1, Ordering::Relaxed);
                }
            }
            std::thread::sleep(TICK);
        }
    }

    fn rewrite(&mut self, page: usize) {
        self.versions[page] = self.versions[page].wrapping_add(1);
        let mut word = self.first_word(page);
        for place in &mut self.memory[page * WORDS..][..WORDS] {
            *place = word;
            word = mix(word);
        }
        self.counters.rewritten.fetch_add(1, Ordering::Relaxed);
    }

    fn compare(&self, page: usize) {
        let mut word = self.first_word(page);
        let mut right = true;
        for place in &self.memory[page * WORDS..][..WORDS] {
            right &= *place == word;
            word = mix(word);
        }
        self.counters.compared.fetch_add(1, Ordering::Relaxed);
        if !right {
            self.counters.failed.fetch_add(1, Ordering::Relaxed);
            eprintln!("worker {}: page {page} is not version {}", self.seed, self.versions[page]);
        }
    }

    /// A page's first word depends on whose page it is, which one, and which version: a stale page shows.
    fn first_word(&self, page: usize) -> u64 {
        mix(self.seed << 56 ^ (page as u64) << 32 ^ u64::from(self.versions[page]))
    }
}

/// A step of a generator (Steele and others' SplitMix64) that spreads every bit of its input.
fn mix(value: u64) -> u64 {
    let mut mixed = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Notes when a heartbeat is late, by the clock on the wall: the only one that two hosts share.
fn beat(late: &Mutex<Vec<Gap>>) {
    let mut last = wall_clock_us();
    loop {
        std::thread::sleep(HEARTBEAT);
        let now = wall_clock_us();
        let gap = Gap { at_us: now, gap_us: now.saturating_sub(last) };
        if gap.gap_us as f64 > NOTED_GAP_MS * 1e3 {
            late.lock().unwrap_or_else(PoisonError::into_inner).push(gap);
        }
        last = now;
    }
}

/// Microseconds since 1970.
pub(super) fn wall_clock_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn write_gaps(mut file: &File, late: &Mutex<Vec<Gap>>) -> Result<()> {
    let gaps = std::mem::take(&mut *late.lock().unwrap_or_else(PoisonError::into_inner));
    for gap in gaps {
        writeln!(file, "{}", serde_json::to_string(&gap)?)?;
    }
    Ok(())
}

fn write_record(file: &File, number: u64, counters: &[Arc<Counters>]) -> Result<()> {
    let sum = |of: fn(&Counters) -> &AtomicU64| counters.iter().map(|one| of(one).load(Ordering::Relaxed)).sum();
    let record = Record {
        number,
        // Asked anew each time: they are facts of where it runs.
        pid: i32::try_from(std::process::id())?,
        host: nix::unistd::gethostname()?.to_string_lossy().into_owned(),
        rewritten: sum(|one| &one.rewritten),
        compared: sum(|one| &one.compared),
        failed: sum(|one| &one.failed),
        passes: counters.iter().map(|one| one.passes.load(Ordering::Relaxed)).min().unwrap_or(0),
        end: number,
    };
    let mut line = serde_json::to_vec(&record)?;
    ensure!(line.len() < RECORD_SIZE, "the status is too long");
    line.resize(RECORD_SIZE - 1, b' ');
    line.push(b'\n');
    file.write_all_at(&line, 0)?;
    Ok(())
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).write(true).truncate(true).open(path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_or_stale_page_is_found() {
        let counters = Arc::new(Counters::default());
        let mut field = Field::sow(3, 8, Arc::clone(&counters));
        (0..8).for_each(|page| field.compare(page));
        assert_eq!(counters.failed.load(Ordering::Relaxed), 0);
        field.memory[5 * WORDS + 511] ^= 1;
        (0..8).for_each(|page| field.compare(page));
        assert_eq!(counters.failed.load(Ordering::Relaxed), 1);
        let stale = field.memory.clone();
        field.rewrite(5);
        field.compare(5);
        assert_eq!(counters.failed.load(Ordering::Relaxed), 1);
        field.memory = stale;
        field.compare(5);
        field.memory.fill(0);
        field.compare(0);
        assert_eq!(counters.failed.load(Ordering::Relaxed), 3);
    }
}
