//! What the figures should be, and whether they are.

use serde::Serialize;

use crate::figures::{Engine, Metric, Summary};
use crate::plan::Scenario;

/// A goal for a figure.
#[derive(Clone, Debug, Serialize)]
pub struct Judged {
    /// What it is about.
    pub subject: String,
    /// What it should be.
    pub target: String,
    /// What it is.
    pub value: f64,
    /// Decimals that are worth showing.
    #[serde(skip)]
    pub decimals: usize,
    /// Whether that is good enough.
    pub verdict: Verdict,
}

/// Whether a figure is good enough.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is.
    Ok,
    /// It is not.
    Over,
}

/// Size at which most goals are set.
const COMMON_MIB: u64 = 1024;
/// Sizes whose freezes are compared.
const SMALL_MIB: u64 = 16;
const LARGE_MIB: u64 = 4096;

/// Which way is better.
#[derive(Clone, Copy, Debug)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

/// Compares figures with their goals, as far as they were measured.
#[must_use]
pub fn judge(summaries: &[Summary]) -> Vec<Judged> {
    let ours = || summaries.iter().filter(|summary| summary.engine == Engine::Godwit);
    let median = |scenario: Scenario, size: u64, metric: Metric| {
        ours().find(|one| (one.scenario, one.size_mib) == (scenario, size)).and_then(|one| one.median(metric))
    };
    let worst = |metric: Metric| ours().filter_map(|one| one.median(metric)).map(f64::abs).max_by(f64::total_cmp);
    let mut judged = Vec::new();
    let mut add = |subject: String, value: Option<f64>, unit: &str, bound: Bound| {
        judged.extend(value.map(|value| compare(subject, value, unit, bound)));
    };
    for scenario in [Scenario::HybridIdle, Scenario::HybridWriter] {
        let name = scenario.name();
        let freeze = median(scenario, COMMON_MIB, Metric::FreezeMs);
        add(format!("freeze, {name}, {COMMON_MIB} MiB"), freeze, "ms", Bound::AtMost(15.0));
        let small = median(scenario, SMALL_MIB, Metric::FreezeMs);
        let ratio = median(scenario, LARGE_MIB, Metric::FreezeMs).zip(small).map(|(large, small)| large / small);
        add(format!("freeze, {name}, {LARGE_MIB} MiB to {SMALL_MIB} MiB"), ratio, "times", Bound::AtMost(1.5));
    }
    for summary in ours().filter(|summary| summary.scenario == Scenario::PostCopy) {
        let at = format!("post-copy, {} MiB", summary.size_mib);
        add(format!("fault p50, {at}"), summary.median(Metric::FaultP50Us), "µs", Bound::AtMost(150.0));
        add(format!("fault p99, {at}"), summary.median(Metric::FaultP99Us), "µs", Bound::AtMost(1000.0));
    }
    let rate = median(Scenario::HybridIdle, COMMON_MIB, Metric::MegabytesPerSecond);
    add(format!("whole move, hybrid-idle, {COMMON_MIB} MiB"), rate, "MB/s", Bound::AtLeast(400.0));
    add("page server's own memory, largest".to_owned(), worst(Metric::ServerMib), "MiB", Bound::AtMost(64.0));
    let slowdown = median(Scenario::HybridBusy, COMMON_MIB, Metric::SlowdownCpuPercent);
    add(format!("busy process slowed in its processor time, {COMMON_MIB} MiB"), slowdown, "%", Bound::AtMost(15.0));
    add("own view and report differ, largest".to_owned(), worst(Metric::DisagreementMs), "ms", Bound::AtMost(2.0));
    judged
}

fn compare(subject: String, value: f64, unit: &str, bound: Bound) -> Judged {
    let (target, good) = match bound {
        Bound::AtMost(limit) => (format!("at most {limit} {unit}"), value <= limit),
        Bound::AtLeast(limit) => (format!("at least {limit} {unit}"), value >= limit),
    };
    let decimals = if value.abs() < 10.0 { 2 } else { 0 };
    Judged { subject, target, value, decimals, verdict: if good { Verdict::Ok } else { Verdict::Over } }
}

impl Verdict {
    /// Its word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Over => "over",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::{Figures, Run, summarise};

    fn run(scenario: Scenario, size_mib: u64, figures: &[(Metric, f64)]) -> Run {
        let figures = Figures::from_iter(figures.iter().copied());
        Run { engine: Engine::Godwit, scenario, size_mib, noisy: false, figures }
    }

    #[test]
    fn only_what_was_measured_is_judged() {
        assert!(judge(&[]).is_empty());
        let runs = [
            run(Scenario::HybridIdle, 16, &[(Metric::FreezeMs, 4.0), (Metric::DisagreementMs, -2.5)]),
            run(Scenario::HybridIdle, 1024, &[(Metric::FreezeMs, 15.0), (Metric::MegabytesPerSecond, 399.0)]),
            run(Scenario::HybridIdle, 4096, &[(Metric::FreezeMs, 7.0)]),
        ];
        let judged = judge(&summarise(&runs));
        let verdicts: Vec<(f64, Verdict)> = judged.iter().map(|one| (one.value, one.verdict)).collect();
        assert_eq!(
            verdicts,
            [(15.0, Verdict::Ok), (1.75, Verdict::Over), (399.0, Verdict::Over), (2.5, Verdict::Over)]
        );
        assert_eq!(judged[0].target, "at most 15 ms");
    }
}
