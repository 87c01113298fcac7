//! Tables for people.

use std::fmt::Write;

use crate::figures::{Engine, Metric, Summary};
use crate::machine::Machine;
use crate::targets::Judged;

/// A column: its heading, and the text of a cell.
type Column = (&'static str, fn(&Summary) -> String);

const FREEZE: [Column; 13] = [
    ("MiB", |one| one.size_mib.to_string()),
    ("scenario", name),
    ("runs", |one| one.runs.to_string()),
    ("noisy", |one| one.noisy.to_string()),
    ("freeze ms", |one| cell(one, Metric::FreezeMs, 1)),
    ("min-max", range),
    ("own view", |one| cell(one, Metric::OwnGapMs, 1)),
    ("stop", |one| cell(one, Metric::StopMs, 1)),
    ("collect", |one| cell(one, Metric::CollectMs, 1)),
    ("final", |one| cell(one, Metric::FinalRoundMs, 1)),
    ("rebuild", |one| cell(one, Metric::RebuildMs, 1)),
    ("commit", |one| cell(one, Metric::CommitMs, 1)),
    ("resume", |one| cell(one, Metric::ResumeMs, 1)),
];

const MOVE: [Column; 13] = [
    ("MiB", |one| one.size_mib.to_string()),
    ("scenario", name),
    ("total ms", |one| cell(one, Metric::TotalMs, 0)),
    ("MB/s", |one| cell(one, Metric::MegabytesPerSecond, 0)),
    ("rounds", |one| cell(one, Metric::Rounds, 0)),
    ("wire MiB", |one| cell(one, Metric::WireMib, 0)),
    ("drain ms", |one| cell(one, Metric::DrainMs, 0)),
    ("faults", |one| cell(one, Metric::Faults, 0)),
    ("p50/p99 µs", |one| pair(one, Metric::FaultP50Us, Metric::FaultP99Us)),
    ("own view µs", |one| pair(one, Metric::OwnFaultP50Us, Metric::OwnFaultP99Us)),
    ("server MiB", |one| cell(one, Metric::ServerMib, 0)),
    ("slower %", |one| cell(one, Metric::SlowdownPercent, 1)),
    ("of CPU %", |one| cell(one, Metric::SlowdownCpuPercent, 1)),
];

/// Lays everything out.
#[must_use]
pub fn render(machine: &Machine, summaries: &[Summary], targets: &[Judged]) -> String {
    let mut text = format!("{machine}; medians\n");
    text += "\nThe freeze, and where it goes (ms)\n";
    text += &lay_out(&rows(&FREEZE, summaries));
    text += "\nThe whole move\n";
    text += &lay_out(&rows(&MOVE, summaries));
    if !targets.is_empty() {
        text += "\nTargets\n";
        let heading = ["", "measured", "target", ""].map(str::to_owned).to_vec();
        let row = |one: &Judged| {
            let value = format!("{:.*}", one.decimals, one.value);
            vec![one.subject.clone(), value, one.target.clone(), one.verdict.word().to_owned()]
        };
        text += &lay_out(&std::iter::once(heading).chain(targets.iter().map(row)).collect::<Vec<_>>());
    }
    text
}

fn name(summary: &Summary) -> String {
    match summary.engine {
        Engine::Godwit => summary.scenario.name().to_owned(),
        Engine::Criu => format!("CRIU {}", summary.scenario.name()),
    }
}

fn cell(summary: &Summary, metric: Metric, decimals: usize) -> String {
    summary.median(metric).map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}"))
}

fn pair(summary: &Summary, first: Metric, second: Metric) -> String {
    match (summary.median(first), summary.median(second)) {
        (Some(first), Some(second)) => format!("{first:.0}/{second:.0}"),
        _ => "-".to_owned(),
    }
}

fn range(summary: &Summary) -> String {
    let spread = summary.figures.get(&Metric::FreezeMs).or_else(|| summary.figures.get(&Metric::OwnGapMs));
    spread.map_or_else(|| "-".to_owned(), |spread| format!("{:.1}-{:.1}", spread.min, spread.max))
}

fn rows(columns: &[Column], summaries: &[Summary]) -> Vec<Vec<String>> {
    let heading = columns.iter().map(|(heading, _)| (*heading).to_owned()).collect();
    let mut ordered: Vec<&Summary> = summaries.iter().collect();
    ordered.sort_by_key(|one| (one.size_mib, one.engine, one.scenario));
    let rows = ordered.into_iter().map(|one| columns.iter().map(|(_, text)| text(one)).collect());
    std::iter::once(heading).chain(rows).collect()
}

/// Lines columns up: words to the left, numbers to the right.
fn lay_out(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let words = rows.iter().skip(1).any(|row| row[column].starts_with(|first: char| first.is_alphabetic()));
            let gap = if column == 0 { "" } else { "  " };
            // Writing to a string cannot fail.
            let _ = if words { write!(line, "{gap}{cell:<width$}") } else { write!(line, "{gap}{cell:>width$}") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["MiB", "name", "µs"], ["16", "a", "1"], ["4096", "long", "200"]];
        let rows: Vec<Vec<String>> = rows.iter().map(|row| row.map(str::to_owned).to_vec()).collect();
        assert_eq!(lay_out(&rows), " MiB  name   µs\n  16  a       1\n4096  long  200\n");
        assert_eq!(lay_out(&[]), "");
    }
}
