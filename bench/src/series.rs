//! All runs of a series, and what is written about them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::cli::SeriesArguments;
use crate::criu::{self, SCENARIOS};
use crate::figures::{Metric, Run, Summary, summarise};
use crate::machine::{self, Machine};
use crate::passage::{self, Conditions};
use crate::plan::Scenario;
use crate::targets::{Judged, judge};
use crate::{chart, table};

/// Memory that has to be there beside all copies of the process, in MiB.
const SPARE_MIB: u64 = 1024;
/// How often a run is tried.
const ATTEMPTS: u32 = 2;

/// Something to measure.
struct Subject<'a> {
    scenario: Scenario,
    criu: Option<&'a PathBuf>,
}

/// What bench.json holds.
#[derive(Debug, Serialize)]
struct Document<'a> {
    machine: &'a Machine,
    writer_mib_per_second: u64,
    summaries: &'a [Summary],
    targets: &'a [Judged],
    runs: &'a [Run],
}

/// Makes all runs, prints the tables, writes the files; gives the exit code.
///
/// # Errors
/// The files cannot be written, or this machine cannot be looked at.
pub fn run(arguments: &SeriesArguments) -> Result<u8> {
    let machine = Machine::here(arguments.mtu)?;
    let conditions =
        Conditions { writer: arguments.writer, mtu: arguments.mtu, patience: Duration::from_secs(arguments.patience) };
    let subjects = subjects(arguments);
    let (mut runs, mut failed) = (Vec::new(), 0);
    for &size_mib in &arguments.sizes {
        // CRIU's images are a third copy.
        let copies = if arguments.criu.is_some() { 3 } else { 2 };
        if machine::available_mib()? < copies * size_mib + SPARE_MIB {
            eprintln!("{size_mib} MiB: skipped, {copies} copies do not fit into this machine");
            continue;
        }
        for repetition in 1..=arguments.repetitions {
            for subject in &subjects {
                match attempt(subject, size_mib, &conditions, repetition) {
                    Some(run) => runs.push(run),
                    None => failed += 1,
                }
            }
        }
    }
    let summaries = summarise(&runs);
    let targets = judge(&summaries);
    print!("{}", table::render(&machine, &summaries, &targets));
    let document = Document {
        machine: &machine,
        writer_mib_per_second: arguments.writer,
        summaries: &summaries,
        targets: &targets,
        runs: &runs,
    };
    write(&arguments.out, "bench.json", &(serde_json::to_string_pretty(&document)? + "\n"))?;
    write(&arguments.out, "freeze.svg", &chart::render(&summaries))?;
    println!("\nbench.json and freeze.svg are in {}", arguments.out.display());
    if failed > 0 {
        eprintln!("bench: {failed} of {} runs failed", failed + runs.len());
    }
    Ok(u8::from(failed > 0 || runs.is_empty()))
}

/// What each size is measured in.
fn subjects(arguments: &SeriesArguments) -> Vec<Subject<'_>> {
    let ours = arguments.scenarios.iter().map(|&scenario| Subject { scenario, criu: None });
    let theirs =
        arguments.criu.iter().flat_map(|criu| SCENARIOS.map(|scenario| Subject { scenario, criu: Some(criu) }));
    ours.chain(theirs).collect()
}

impl Subject<'_> {
    fn name(&self) -> String {
        let name = self.scenario.name();
        if self.criu.is_some() { format!("CRIU {name}") } else { name.to_owned() }
    }

    fn run(&self, size_mib: u64, conditions: &Conditions) -> Result<Run> {
        match self.criu {
            Some(criu) => criu::run(criu, self.scenario, size_mib, conditions),
            None => passage::run(self.scenario, size_mib, conditions),
        }
    }
}

/// Tries a run again once: what went wrong is shown, but one bad moment should not spoil a series.
fn attempt(subject: &Subject<'_>, size_mib: u64, conditions: &Conditions, repetition: u32) -> Option<Run> {
    let name = subject.name();
    for _ in 0..ATTEMPTS {
        let started = Instant::now();
        match subject.run(size_mib, conditions) {
            Ok(run) => {
                let shown =
                    |metric| run.figures.get(&metric).map_or_else(|| "-".to_owned(), |value| format!("{value:.1} ms"));
                let (freeze, gap) = (shown(Metric::FreezeMs), shown(Metric::OwnGapMs));
                let noisy = if run.noisy { ", others were busy" } else { "" };
                let took = started.elapsed().as_secs_f64();
                eprintln!("{size_mib} MiB {name} #{repetition}: freeze {freeze}, own view {gap} ({took:.1} s{noisy})");
                return Some(run);
            }
            Err(error) => eprintln!("{size_mib} MiB {name} #{repetition}: {error:#}"),
        }
    }
    None
}

fn write(directory: &Path, name: &str, content: &str) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let path = directory.join(name);
    fs::write(&path, content).with_context(|| path.display().to_string())
}
