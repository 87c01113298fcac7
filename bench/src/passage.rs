//! One run: hosts, page server and victim of its own, a quiet moment, warm memory, the move, and what all sides say of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{PageServer, Running, RunningMigration, TwoHosts, wait_for, wait_until};
use migrate::report::{Outcome, Report};

use crate::figures::{Engine, Figures, Metric, Run};
use crate::machine::{self, Quiet};
use crate::plan::Scenario;
use crate::status::Status;

/// What all runs of a series have in common.
#[derive(Clone, Copy, Debug)]
pub struct Conditions {
    /// What writers rewrite, in MiB/s.
    pub writer: u64,
    /// The largest packet between the hosts in bytes.
    pub mtu: u32,
    /// How long to wait for a quiet moment.
    pub patience: Duration,
}

/// Longest time that a victim may take to fill its memory.
const FILL: Duration = Duration::from_secs(120);
/// Longest time that a move may take.
pub const MOVE: Duration = Duration::from_secs(300);
/// How long the victim's work is looked at before it is moved.
const BEFORE: Duration = Duration::from_millis(1500);
/// Memory beside the process's, in MiB.
const MARGIN_MIB: u64 = 64;

/// A victim on its first host, ready to go.
#[derive(Debug)]
pub struct Victim {
    /// The process.
    pub running: Running,
    /// Its pid on its host.
    pub pid: u32,
    status: PathBuf,
}

impl Victim {
    /// Starts one and waits until its memory is full.
    ///
    /// # Errors
    /// It cannot be started or ended.
    pub fn start(hosts: &TwoHosts, scenario: Scenario, size_mib: u64, writer: u64) -> Result<Self> {
        let directory = hosts.directory();
        // N.B. a copy under another name: programs are told apart by their images.
        let program = directory.join("victim");
        fs::copy(std::env::current_exe()?, &program).context("a copy of this program")?;
        let status = directory.join("status");
        // The host's own shell opens the streams: files that were opened outside belong to mounts that the host does not see.
        let mut command = hosts.source.command("sh");
        command.args(["-c", r#"exec "$0" "$@" </dev/null >victim.log 2>&1"#]).arg(&program);
        command.args(["victim", "--memory", &size_mib.to_string(), "--status"]).arg(&status);
        command.args(scenario.victim_arguments(writer));
        let mut running = hosts.source.start_command(&mut command)?;
        wait_until("the victim to fill its memory", FILL, || {
            if let Some(ended) = running.ended()? {
                let words = fs::read_to_string(directory.join("victim.log")).unwrap_or_default();
                anyhow::bail!("the victim ended with {ended}: {words}");
            }
            Ok(status.is_file() && Status::read(&status).is_ok_and(|status| status.host == hosts.source.name()))
        })?;
        let pid = hosts.source.pid_here(running.host_pid())?;
        Ok(Self { running, pid, status })
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// It says nothing.
    pub fn status(&self) -> Result<Status> {
        Status::read(&self.status)
    }

    /// Waits until it has seen that it runs on another host.
    ///
    /// # Errors
    /// It has not within ten seconds.
    pub fn arrival(&self, host: &str) -> Result<Status> {
        wait_for("a heartbeat on the other host", Duration::from_secs(10), || {
            // The gap may be seen one beat after the name, and is written by another thread.
            Ok(self.status().ok().filter(|status| status.host == host && status.move_gap_us > 0))
        })?;
        std::thread::sleep(Duration::from_millis(50));
        self.status()
    }

    /// Waits for a quiet moment and warms memory for the copy.
    ///
    /// # Errors
    /// The victim is gone.
    pub fn settle(&self, size_mib: u64, patience: Duration) -> Result<Quiet> {
        let quiet = machine::wait_for_quiet(self.running.host_pid(), patience)?;
        machine::warm(size_mib + MARGIN_MIB);
        Ok(quiet)
    }
}

/// Makes one run.
///
/// # Errors
/// The move did not succeed, or the hosts cannot be made.
pub fn run(scenario: Scenario, size_mib: u64, conditions: &Conditions) -> Result<Run> {
    let hosts = TwoHosts::builder().mtu(conditions.mtu).build()?;
    let mut server = hosts.destination.page_server(&hosts.token)?;
    let victim = Victim::start(&hosts, scenario, size_mib, conditions.writer)?;
    let quiet = victim.settle(size_mib, conditions.patience)?;
    let before = if scenario.compares_work() { Some(observe(&victim)?) } else { None };
    let migration = hosts.source.migrate(&server, victim.pid).mode(scenario.mode()).limit(MOVE);
    let mut running = migration.start()?;
    let during = before.is_some().then(|| observe_rounds(&mut running, &victim)).transpose()?;
    let migration = running.finish()?;
    let report: Report = serde_json::from_value(migration.report()?.clone()).context("the report")?;
    ensure!(
        report.outcome == Outcome::Moved,
        "{:?}: {:?}{:?}\n{}",
        report.outcome,
        report.error,
        report.obstacles,
        server.log()
    );
    let status = victim.arrival(hosts.destination.name())?;
    let mut figures = of_report(&report, size_mib);
    add_own_view(&mut figures, &status, Some(report.freeze_ms));
    figures.insert(Metric::ServerMib, peak_mib(&mut server)?);
    if let (Some(before), Some(during)) = (before, during) {
        figures.insert(Metric::SlowdownPercent, slowdown(before.rate, during.rate));
        figures.insert(Metric::SlowdownCpuPercent, slowdown(before.cpu_rate, during.cpu_rate));
    }
    Ok(Run { engine: Engine::Godwit, scenario, size_mib, noisy: quiet == Quiet::No, figures })
}

/// Adds what the process saw itself.
pub fn add_own_view(figures: &mut Figures, status: &Status, reported_ms: Option<f64>) {
    let gap = status.move_gap_us as f64 / 1e3;
    figures.insert(Metric::OwnGapMs, gap);
    figures.insert(Metric::OtherGapMs, status.other_gap_us as f64 / 1e3);
    if let Some(reported) = reported_ms {
        figures.insert(Metric::DisagreementMs, gap - reported);
    }
    if status.faults > 0 {
        figures.insert(Metric::OwnFaults, status.faults as f64);
        figures.insert(Metric::OwnFaultP50Us, status.fault_p50_us);
        figures.insert(Metric::OwnFaultP99Us, status.fault_p99_us);
    }
}

/// Memory moved in a second of the whole move, in 10^6 bytes.
#[must_use]
pub fn megabytes_per_second(size_mib: u64, total_ms: f64) -> f64 {
    (size_mib << 20) as f64 / 1e3 / total_ms
}

fn of_report(report: &Report, size_mib: u64) -> Figures {
    let mut figures = Figures::from([
        (Metric::FreezeMs, report.freeze_ms),
        (Metric::StopMs, report.freeze.stop),
        (Metric::CollectMs, report.freeze.collect),
        (Metric::FinalRoundMs, report.freeze.final_round),
        (Metric::RebuildMs, report.freeze.rebuild),
        (Metric::CommitMs, report.freeze.commit),
        (Metric::ResumeMs, report.freeze.resume),
        (Metric::TotalMs, report.total_ms),
        (Metric::MegabytesPerSecond, megabytes_per_second(size_mib, report.total_ms)),
        (Metric::Rounds, f64::from(report.rounds)),
        (Metric::WireMib, report.bytes_on_wire as f64 / f64::from(1 << 20)),
        (Metric::DrainMs, report.drain_ms),
        (Metric::Faults, report.faults.count as f64),
    ]);
    if report.faults.count > 0 {
        figures.insert(Metric::FaultP50Us, report.faults.p50_us);
        figures.insert(Metric::FaultP99Us, report.faults.p99_us);
    }
    figures
}

/// How fast the victim's writer works: pages a second, and pages a second of its processor time.
#[derive(Clone, Copy, Debug)]
struct Work {
    rate: f64,
    cpu_rate: f64,
}

impl Work {
    /// What was done between two statuses; `None` when they are too close to say.
    fn between(first: &Status, last: &Status) -> Option<Self> {
        let pages = last.writes.checked_sub(first.writes)? as f64;
        let (time, cpu) = (last.at_us.checked_sub(first.at_us)?, last.writer_cpu_us.checked_sub(first.writer_cpu_us)?);
        (time > 0 && cpu > 0).then(|| Self { rate: pages * 1e6 / time as f64, cpu_rate: pages * 1e6 / cpu as f64 })
    }
}

fn observe(victim: &Victim) -> Result<Work> {
    let first = victim.status()?;
    std::thread::sleep(BEFORE);
    Work::between(&first, &victim.status()?).context("the writer does not write")
}

/// Looks at the victim's work from the first round to the freeze.
fn observe_rounds(running: &mut RunningMigration, victim: &Victim) -> Result<Work> {
    running.wait_for_phase("round")?;
    let first = victim.status()?;
    running.wait_for_event("the freeze", |event| event["event"] == "frozen")?;
    Work::between(&first, &victim.status()?).context("the rounds were too short to see any writing")
}

/// How much less is done, in percent; less than nothing when it is more.
fn slowdown(before: f64, during: f64) -> f64 {
    (1.0 - during / before) * 100.0
}

/// The page server's largest resident memory so far.
fn peak_mib(server: &mut PageServer) -> Result<f64> {
    let path = format!("/proc/{}/status", server.process().host_pid());
    let text = fs::read_to_string(Path::new(&path)).context(path)?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    Ok(kibibytes.context("no VmHWM")? / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_compared() {
        let status = |at_us, writes, writer_cpu_us| Status { at_us, writes, writer_cpu_us, ..Status::default() };
        let before = Work::between(&status(0, 0, 0), &status(1_000_000, 5000, 500_000)).unwrap();
        let during = Work::between(&status(0, 100, 0), &status(500_000, 2100, 200_000)).unwrap();
        assert_eq!((before.rate, before.cpu_rate), (5000.0, 10_000.0));
        assert_eq!((slowdown(before.rate, during.rate) + 0.5) as i32, 20);
        assert_eq!(slowdown(before.cpu_rate, during.cpu_rate), 0.0);
        assert!(Work::between(&status(5, 0, 0), &status(5, 0, 0)).is_none());
    }

    #[test]
    fn megabytes_are_decimal() {
        assert_eq!(megabytes_per_second(1024, 1000.0).round() as i64, 1074);
    }
}
