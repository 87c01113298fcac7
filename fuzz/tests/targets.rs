//! Every target: what it has stumbled over once, what really was said, and damaged examples for a short time.

use std::alloc::System;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cap::Cap;
use godwit_fuzz::{Finding, Memory, Target, all, crashes, examples, fuzz, keep, replay};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

const MEMORY: Memory = Memory { now: || ALLOCATOR.allocated(), most: || ALLOCATOR.max_allocated() };

/// Time for each target, in milliseconds; `GODWIT_FUZZ_MS` is another.
fn time() -> Duration {
    let chosen = std::env::var("GODWIT_FUZZ_MS").ok().and_then(|text| text.parse().ok());
    Duration::from_millis(chosen.unwrap_or(400))
}

fn report(target: &Target, name: &str, finding: &Finding) -> Result<()> {
    let kept = keep(target, &finding.input)?;
    bail!("{}, {name}: {}; kept in {}", target.name, finding.what, kept.display())
}

#[test]
fn what_was_stumbled_over_once_is_not_again() -> Result<()> {
    let mut inputs = 0;
    for target in all() {
        for (name, bytes) in crashes(&target)? {
            inputs += 1;
            if let Err(finding) = replay(&target, &bytes, MEMORY) {
                bail!("{}, {name}: {}", target.name, finding.what);
            }
        }
    }
    ensure!(inputs > 0, "there are no such inputs: is this the right folder?");
    Ok(())
}

#[test]
fn what_really_was_said_is_understood() -> Result<()> {
    for target in all() {
        let mut understood = 0;
        for example in examples(&target)? {
            match replay(&target, &example, MEMORY) {
                Ok((much, ..)) => understood += much,
                Err(finding) => report(&target, "an example", &finding)?,
            }
        }
        ensure!(understood > 0, "{}: none of its examples is understood", target.name);
    }
    Ok(())
}

#[test]
fn damaged_examples_do_no_harm() -> Result<()> {
    for target in all() {
        match fuzz(&target, time(), u64::from(std::process::id()), MEMORY).context(target.name)? {
            Ok(tally) => ensure!(tally.inputs > 0, "{}: nothing was tried", target.name),
            Err(finding) => report(&target, "a damaged example", &finding)?,
        }
    }
    Ok(())
}
