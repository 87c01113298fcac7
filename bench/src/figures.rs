//! What a run yields, and medians over runs.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::plan::Scenario;

/// Who moves.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// This engine.
    Godwit,
    /// The one that it is compared with.
    Criu,
}

/// Something that is measured; its unit is in its name.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The freeze as the engine reports it.
    FreezeMs,
    /// The freeze as the process sees it.
    OwnGapMs,
    /// The difference of the two.
    DisagreementMs,
    /// The longest that the process missed a heartbeat otherwise.
    OtherGapMs,
    /// Part of the freeze: stopping all threads.
    StopMs,
    /// Part of the freeze: reading the state of the process.
    CollectMs,
    /// Part of the freeze: sending what was written since the last round.
    FinalRoundMs,
    /// Part of the freeze: completing the copy at the destination.
    RebuildMs,
    /// Part of the freeze: handing over the right to run.
    CommitMs,
    /// Part of the freeze: from there until the last thread runs.
    ResumeMs,
    /// From the first word to the last page.
    TotalMs,
    /// Memory divided by that time; a megabyte is 10^6 bytes.
    MegabytesPerSecond,
    /// Rounds before the freeze.
    Rounds,
    /// Bytes sent.
    WireMib,
    /// From the end of the freeze to the last page.
    DrainMs,
    /// Page faults served.
    Faults,
    /// Their median.
    FaultP50Us,
    /// Their 99th percentile.
    FaultP99Us,
    /// Pages that the process found absent.
    OwnFaults,
    /// How long it waited for them: the median.
    OwnFaultP50Us,
    /// The 99th percentile.
    OwnFaultP99Us,
    /// The page server's largest resident memory.
    ServerMib,
    /// How much less work a busy process gets done while pages travel.
    SlowdownPercent,
    /// The same for the processor time that it had.
    SlowdownCpuPercent,
}

/// Figures of one run.
pub type Figures = BTreeMap<Metric, f64>;

/// One run.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Who moved.
    pub engine: Engine,
    /// What was moved, and how.
    pub scenario: Scenario,
    /// How large it was.
    pub size_mib: u64,
    /// Others used the processors just before.
    pub noisy: bool,
    /// What was measured.
    pub figures: Figures,
}

/// A metric over several runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

/// All runs of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Who moved.
    pub engine: Engine,
    /// What was moved, and how.
    pub scenario: Scenario,
    /// How large it was.
    pub size_mib: u64,
    /// How many runs there were.
    pub runs: usize,
    /// How many of them were noisy.
    pub noisy: usize,
    /// What was measured.
    pub figures: BTreeMap<Metric, Spread>,
}

impl Spread {
    /// Summarises values; `None` without any.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) };
        Some(Self { median, min, max })
    }
}

impl Summary {
    /// A metric's median.
    #[must_use]
    pub fn median(&self, metric: Metric) -> Option<f64> {
        self.figures.get(&metric).map(|spread| spread.median)
    }
}

/// Summarises runs by engine, scenario and size, in this order.
#[must_use]
pub fn summarise(runs: &[Run]) -> Vec<Summary> {
    let mut groups: BTreeMap<(Engine, Scenario, u64), Vec<&Run>> = BTreeMap::new();
    for run in runs {
        groups.entry((run.engine, run.scenario, run.size_mib)).or_default().push(run);
    }
    let summary = |((engine, scenario, size_mib), runs): ((Engine, Scenario, u64), Vec<&Run>)| {
        let mut values: BTreeMap<Metric, Vec<f64>> = BTreeMap::new();
        for (&metric, &value) in runs.iter().flat_map(|run| &run.figures) {
            values.entry(metric).or_default().push(value);
        }
        let figures = values.into_iter().filter_map(|(metric, values)| Some((metric, Spread::of(values)?))).collect();
        let noisy = runs.iter().filter(|run| run.noisy).count();
        Summary { engine, scenario, size_mib, runs: runs.len(), noisy, figures }
    };
    groups.into_iter().map(summary).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(Spread::of(vec![]), None);
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of(vec![4.0, 1.0]).unwrap().median, 2.5);
    }

    #[test]
    fn runs_of_a_kind_are_put_together() {
        let run = |size_mib, freeze, noisy| Run {
            engine: Engine::Godwit,
            scenario: Scenario::HybridIdle,
            size_mib,
            noisy,
            figures: Figures::from([(Metric::FreezeMs, freeze)]),
        };
        let summaries = summarise(&[run(256, 1.0, false), run(16, 7.0, false), run(256, 3.0, true)]);
        assert_eq!(
            summaries.iter().map(|one| (one.size_mib, one.runs, one.noisy)).collect::<Vec<_>>(),
            [(16, 1, 0), (256, 2, 1)]
        );
        assert_eq!(summaries[1].median(Metric::FreezeMs), Some(2.0));
        assert_eq!(summaries[1].median(Metric::Rounds), None);
    }
}
