//! `migrate demo`: two hosts on one machine, a real worker, there and back.
//!
//! The moves are made by this same program, started on the host that the worker is on, as a user would. What is told comes
//! from the worker's own status and from the reports; nothing here looks into the engine.

mod host;
mod observation;
mod passage;
mod stage;
mod worker;

pub use host::keep as keep_host;
pub use worker::work;

use std::io::Write;

use anyhow::{Context, Result, bail, ensure};

use crate::cancel::Cancel;
use crate::cli::DemoArguments;
use crate::display::quantity::{count, time};
use crate::report::Outcome;

use observation::{Gap, Observation, Record};
use passage::Passage;
use stage::{Side, Stage};

/// Sets the lines below a heading off.
const INDENT: &str = "      ";

/// Shows a move there and one back; gives the exit code.
///
/// # Errors
/// Something is missing or went wrong; everything that was made is removed all the same.
pub fn run(arguments: &DemoArguments, cancel: &Cancel) -> Result<u8> {
    let shown = show(arguments, cancel);
    if cancel.is_cancelled() {
        tell(format_args!("\nInterrupted. Both hosts and everything on them are removed."));
        return Ok(1);
    }
    shown
}

fn show(arguments: &DemoArguments, cancel: &Cancel) -> Result<u8> {
    tell(format_args!(
        "Godwit moves a running program from one host to another while it runs. Here is one such journey.\n"
    ));
    heading(1, "Two hosts, made of namespaces on this machine: own network, processes, mounts; a page server on each");
    let mut stage = Stage::set(arguments, cancel)?;
    tell(format_args!(
        "{INDENT}host-a {}  <-- virtual cable -->  host-b {}",
        stage.address(Side::A),
        stage.address(Side::B)
    ));

    heading(2, "A worker starts on host-a: four threads that keep rewriting memory and checking what they wrote");
    let observation = stage.start_worker(arguments.memory, cancel)?;
    let home = observation.settle(0, cancel)?;
    tell(format_args!(
        "{INDENT}process {}, {} MiB; it rewrites pages at random and compares all of them every few seconds",
        home.pid, arguments.memory
    ));
    count_up(&home);

    heading(3, "It moves to host-b while it works; only the freeze is a pause");
    let there = journey(&stage, &observation, &home, (Side::A, Side::B), arguments, cancel)?;
    heading(4, "It moves back to host-a");
    let back = journey(&stage, &observation, &there.after, (Side::B, Side::A), arguments, cancel)?;

    heading(5, "Everything is removed");
    drop(stage);
    tell(format_args!(""));
    if back.after.failed > 0 {
        tell(format_args!("Result: {} comparisons FAILED. That must not happen.", count(back.after.failed)));
        return Ok(1);
    }
    tell(format_args!(
        "Result: one process, never restarted, ran on two hosts. Its pauses: {} on the way there, {} on the way back.\n\
         It rewrote {} pages and compared {} before, between and after the moves: not one was wrong.",
        time(there.passage.report.freeze_ms),
        time(back.passage.report.freeze_ms),
        count(back.after.rewritten),
        count(back.after.compared),
    ));
    Ok(0)
}

/// A move and what the worker said after it.
struct Journey {
    passage: Passage,
    after: Record,
}

fn journey(
    stage: &Stage,
    observation: &Observation,
    before: &Record,
    (from, to): (Side, Side),
    arguments: &DemoArguments,
    cancel: &Cancel,
) -> Result<Journey> {
    let passage = stage.migrate(before.pid, from, to, arguments, cancel)?;
    let report = &passage.report;
    if report.outcome != Outcome::Moved {
        bail!("the move to {} did not succeed{}", to.name(), stage.logs());
    }
    // A pass over all memory that was begun before the move says little about it: the second one's end counts.
    let passes = observation.record()?.passes;
    let after = observation.settle(passes + 2, cancel).with_context(|| format!("after the move{}", stage.logs()))?;
    ensure!(after.host == to.name(), "the worker says that it runs on {}, not on {}", after.host, to.name());
    ensure!(after.pid == before.pid, "the worker's pid was {}, it is {} now", before.pid, after.pid);
    tell(format_args!("{INDENT}the worker says: I run on {} as process {}", after.host, after.pid));
    tell_gaps(observation, &passage)?;
    count_up(&after);
    Ok(Journey { passage, after })
}

/// Writes a line to standard output; a reader who left misses it, and everything is still cleaned up.
fn tell(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Tells how the worker saw its move: by the heartbeats that it missed.
fn tell_gaps(observation: &Observation, passage: &Passage) -> Result<()> {
    let (inside, outside): (Vec<Gap>, Vec<Gap>) =
        observation.gaps(passage.whole)?.into_iter().partition(|gap| gap.is_during(passage.freeze));
    let longest = |gaps: &[Gap]| match gaps.iter().map(Gap::milliseconds).reduce(f64::max) {
        Some(gap) => time(gap),
        None => format!("less than {}", time(worker::NOTED_GAP_MS)),
    };
    tell(format_args!(
        "{INDENT}it was without a heartbeat for {} in the freeze, and before and after it for {} at most",
        longest(&inside),
        longest(&outside)
    ));
    Ok(())
}

fn heading(number: u32, text: &str) {
    tell(format_args!("[{number}/5] {text}"));
}

fn count_up(record: &Record) {
    tell(format_args!(
        "{INDENT}so far {} pages rewritten, {} compared, {} wrong",
        count(record.rewritten),
        count(record.compared),
        count(record.failed)
    ));
}
