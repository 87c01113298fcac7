//! Runs the fault matrix and prints it as a table: `fault-matrix [WORD...]`, where words choose cells by their titles.

use std::process::ExitCode;

use godwit_tests::faults::{Entry, Fault, cells, run, table};

/// Cells at a time.
const AT_A_TIME: usize = 12;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut all: Vec<_> = Fault::ALL.into_iter().flat_map(cells).collect();
    all.retain(|cell| words.iter().all(|word| cell.to_string().contains(word.as_str())));
    if all.is_empty() {
        eprintln!("no cell has all of these words in its title: {}", words.join(" "));
        return ExitCode::from(2);
    }
    let started = std::time::Instant::now();
    let show = |entry: &Entry| {
        let what = entry.seen.as_ref().map_or("does not hold".to_owned(), ToString::to_string);
        eprintln!("{:5.1} s  {}: {what}", entry.elapsed.as_secs_f64(), entry.cell);
    };
    let entries = run(all, AT_A_TIME, show);
    println!("{}", table(&entries));
    let mut unexpected = 0;
    for entry in &entries {
        if let Err(error) = &entry.seen {
            eprintln!("{} does not hold ({}): {error:#}\n", entry.cell, entry.reason().unwrap_or("nobody knows why"));
        }
        unexpected += usize::from(!entry.is_as_expected());
    }
    eprintln!("{} cells in {:.0} s, {unexpected} not as expected", entries.len(), started.elapsed().as_secs_f64());
    ExitCode::from(u8::from(unexpected > 0))
}
