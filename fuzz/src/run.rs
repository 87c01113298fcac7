//! Running a target on inputs, and noticing what must not happen.

use std::any::Any;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::corpus;
use crate::coverage::Coverage;
use crate::mutation::{Chance, damaged};
use crate::targets::Target;

/// Time that one input may take: decoders do a millisecond's work, and machines are busy.
const MOMENT: Duration = Duration::from_secs(5);
/// New examples that a run takes up, at most.
const MOST_EXAMPLES: usize = 4096;

/// How much memory is taken, and was at most.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Bytes that are taken now.
    pub now: fn() -> usize,
    /// Bytes that were taken at most, so far.
    pub most: fn() -> usize,
}

/// Something that must not happen.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What happened.
    pub what: String,
    /// The input.
    pub input: Vec<u8>,
}

/// What a run has done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Inputs that were tried.
    pub inputs: u64,
    /// Examples at the end.
    pub examples: usize,
    /// Edges of control flow that were taken, where they are counted.
    pub edges: Option<usize>,
    /// Most bytes of memory that an input took, as far as that is known: only what exceeds all before is seen.
    pub memory: usize,
    /// Longest time of one input.
    pub longest: Duration,
}

fn reason(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".to_owned())
}

/// What is being decoded, since when: for the watchdog.
static UNDER_WAY: Mutex<Option<(Instant, Target, Vec<u8>)>> = Mutex::new(None);

/// Ends the program, and keeps the input, when one input takes for ever: nothing else ends an endless loop.
fn watch() {
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let under_way = UNDER_WAY.lock().ok().and_then(|under_way| under_way.clone());
            if let Some((since, target, input)) = under_way
                && since.elapsed() > 4 * MOMENT
            {
                let kept = corpus::keep(&target, &input);
                eprintln!("{}: an input does not come to an end: {kept:?}", target.name);
                std::process::abort();
            }
        }
    });
}

/// Has a target decode an input.
///
/// # Errors
/// What must not happen.
pub fn replay(target: &Target, input: &[u8], memory: Memory) -> Result<(usize, Duration, usize), Finding> {
    let finding = |what: String| Finding { what, input: input.to_vec() };
    let (before, most) = ((memory.now)(), (memory.most)());
    let begun = Instant::now();
    let decoded = catch_unwind(AssertUnwindSafe(|| (target.decode)(input)));
    let took = begun.elapsed();
    // N.B. an input that took less than one before it is not seen; the first that takes too much is.
    let peak = if (memory.most)() > most { (memory.most)().saturating_sub(before) } else { 0 };
    match decoded {
        Err(payload) => Err(finding(format!("panicked: {}", reason(payload.as_ref())))),
        Ok(_) if took > MOMENT => Err(finding(format!("took {:.1} s", took.as_secs_f64()))),
        Ok(_) if peak > target.memory => Err(finding(format!("took {} MiB of memory", peak >> 20))),
        Ok(understood) => Ok((understood, took, peak)),
    }
}

/// Feeds a target with damaged examples for so long. Everything depends on the seed, but for how far it comes.
///
/// # Errors
/// Examples cannot be read; what must not happen is given back as a finding.
pub fn fuzz(target: &Target, time: Duration, seed: u64, memory: Memory) -> Result<Result<Tally, Finding>> {
    static WATCHDOG: std::sync::Once = std::sync::Once::new();
    WATCHDOG.call_once(watch);
    let mut examples = corpus::examples(target)?;
    let mut tally = Tally::default();
    let mut known = HashSet::new();
    let mut coverage = Coverage::begin();
    let mut chance = Chance::new(seed);
    let end = Instant::now() + time;
    let pristine = examples.len();
    while Instant::now() < end {
        let input = if (tally.inputs as usize) < pristine {
            examples[tally.inputs as usize].clone()
        } else {
            // Half of the time one of those that were really said.
            let among = if chance.below(2) == 0 { pristine } else { examples.len() };
            let (one, other) = (chance.below(among), chance.below(examples.len()));
            damaged(&mut chance, &examples[one], &examples[other])
        };
        if let Ok(mut under_way) = UNDER_WAY.lock() {
            *under_way = Some((Instant::now(), *target, input.clone()));
        }
        if coverage.is_some() {
            Coverage::reset();
        }
        let replayed = replay(target, &input, memory);
        let (understood, took, peak) = match replayed {
            Ok(replayed) => replayed,
            Err(finding) => {
                clear();
                return Ok(Err(finding));
            }
        };
        tally.inputs += 1;
        tally.longest = tally.longest.max(took);
        tally.memory = tally.memory.max(peak);
        let is_new = match &mut coverage {
            Some(coverage) => coverage.is_new(),
            // Exactly while it is little, roughly when it is much.
            None => known.insert(if understood < 64 { understood } else { 64 + understood.ilog2() as usize }),
        };
        if is_new && examples.len() < MOST_EXAMPLES && !input.is_empty() {
            examples.push(input);
        }
    }
    clear();
    tally.examples = examples.len();
    tally.edges = coverage.map(|coverage| coverage.edges());
    Ok(Ok(tally))
}

fn clear() {
    if let Ok(mut under_way) = UNDER_WAY.lock() {
        *under_way = None;
    }
}
