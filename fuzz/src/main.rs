//! Fuzzes targets for as long as one likes: `fuzz/run --seconds 600 state`.

use std::alloc::System;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use cap::Cap;
use clap::Parser;
use godwit_fuzz::{Memory, Target, all, fuzz, keep, named};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Feeds decoders with damaged examples of what they read.
#[derive(Debug, Parser)]
struct Arguments {
    /// Names of targets; all of them without any. `--list` names them
    targets: Vec<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where chance begins; another number, another run
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Name all targets, and do nothing
    #[arg(long)]
    list: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.list {
        all().iter().for_each(|target| println!("{}", target.name));
        return Ok(ExitCode::SUCCESS);
    }
    let targets: Vec<Target> = if arguments.targets.is_empty() {
        all()
    } else {
        let one = |name: &String| named(name).with_context(|| format!("no target is called {name}: see --list"));
        arguments.targets.iter().map(one).collect::<Result<_>>()?
    };
    let memory = Memory { now: || ALLOCATOR.allocated(), most: || ALLOCATOR.max_allocated() };
    let mut found = false;
    for target in targets {
        match fuzz(&target, Duration::from_secs(arguments.seconds), arguments.seed, memory)? {
            Ok(tally) => println!(
                "{}: {} inputs, {} examples, {}{} KiB at most, {} ms at most",
                target.name,
                tally.inputs,
                tally.examples,
                tally.edges.map_or_else(String::new, |edges| format!("{edges} edges, ")),
                tally.memory >> 10,
                tally.longest.as_millis()
            ),
            Err(finding) => {
                found = true;
                println!("{}: {}; kept in {}", target.name, finding.what, keep(&target, &finding.input)?.display());
            }
        }
    }
    Ok(if found { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
