//! What a finished `migrate` said: exit status, events, report.

use std::process::ExitStatus;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A `migrate` command that has ended.
#[derive(Debug, Clone)]
pub struct Migration {
    /// How it ended.
    pub status: ExitStatus,
    /// Every line of standard output.
    pub events: Vec<Value>,
    /// Standard error.
    pub stderr: String,
}

impl Migration {
    /// Parses one JSON object a line.
    pub(crate) fn parse(status: ExitStatus, lines: &[String], stderr: String) -> Result<Self> {
        let events = lines
            .iter()
            .map(|line| {
                serde_json::from_str(line)
                    .with_context(|| format!("standard output has a line that is no JSON: {line}"))
            })
            .collect::<Result<_>>()?;
        Ok(Self { status, events, stderr })
    }

    /// The exit code; `None` after a signal.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The report, which must be the last line.
    ///
    /// # Errors
    /// There is none.
    pub fn report(&self) -> Result<&Value> {
        self.events
            .last()
            .filter(|event| event.get("event").and_then(Value::as_str) == Some("report"))
            .with_context(|| format!("no report: {self:#?}"))
    }

    /// A number of the report; `path` is a JSON pointer such as `/freeze/stop`.
    ///
    /// # Errors
    /// There is no such number.
    pub fn number(&self, path: &str) -> Result<f64> {
        let report = self.report()?;
        report
            .pointer(path)
            .and_then(Value::as_f64)
            .with_context(|| format!("the report has no number {path}: {report:#}"))
    }

    /// The report's outcome: moved, refused, failed, cancelled or unknown.
    ///
    /// # Errors
    /// There is no report, or it has no outcome.
    pub fn outcome(&self) -> Result<&str> {
        let report = self.report()?;
        report.get("outcome").and_then(Value::as_str).with_context(|| format!("no outcome: {report:#}"))
    }

    /// The moved process's pid in the page server's PID namespace.
    ///
    /// # Errors
    /// The report has none.
    pub fn dest_pid(&self) -> Result<u32> {
        let pid = self.report()?.get("dest_pid").and_then(Value::as_u64).context("the report has no dest_pid")?;
        Ok(u32::try_from(pid)?)
    }

    /// Everything it said, to look for words in.
    pub fn text(&self) -> String {
        let events: Vec<String> = self.events.iter().map(Value::to_string).collect();
        format!("{}\n{}", events.join("\n"), self.stderr)
    }

    /// Expects exit code 0, outcome `moved`, and every member that the report promises.
    ///
    /// # Errors
    /// Anything else; the error holds everything that was said.
    pub fn expect_moved(&self) -> Result<()> {
        self.expect(0, &["moved"])?;
        const NUMBERS: [&str; 18] = [
            "/rounds",
            "/pages_total",
            "/pages_sent",
            "/bytes_on_wire",
            "/total_ms",
            "/freeze_ms",
            "/freeze/stop",
            "/freeze/collect",
            "/freeze/final_round",
            "/freeze/rebuild",
            "/freeze/commit",
            "/freeze/resume",
            "/drain_ms",
            "/faults/count",
            "/faults/p50_us",
            "/faults/p99_us",
            "/source_pid",
            "/dest_pid",
        ];
        for path in NUMBERS {
            self.number(path)?;
        }
        for member in ["/migration_id", "/mode"] {
            ensure!(self.report()?.pointer(member).is_some(), "the report has no {member}");
        }
        let (freeze, total) = (self.number("/freeze_ms")?, self.number("/total_ms")?);
        ensure!(freeze > 0.0 && freeze <= total, "a freeze of {freeze} ms in a move of {total} ms");
        Ok(())
    }

    /// Expects an exit code and one of these outcomes.
    ///
    /// # Errors
    /// Anything else; the error holds everything that was said.
    pub fn expect(&self, code: i32, outcomes: &[&str]) -> Result<()> {
        ensure!(self.code() == Some(code), "exit {} instead of {code}:\n{}", self.status, self.text());
        let outcome = self.outcome()?;
        ensure!(outcomes.contains(&outcome), "outcome {outcome} instead of {outcomes:?}:\n{}", self.text());
        Ok(())
    }
}
