//! Events and reports in words. Nothing here writes; texts from elsewhere lose their control characters, so that a file
//! name cannot play with the terminal.

use crate::event::{Event, Faults, Progress};
use crate::report::{Failure, Freeze, Outcome, Report, SourceState};
use crate::request::Mode;

use super::quantity::{PAGE, bytes, count, counted, short_time, time};

/// Replaces control characters and cuts what is too long for a line.
pub(crate) fn printable(text: &str) -> String {
    text.chars().take(2000).map(|character| if character.is_control() { '?' } else { character }).collect()
}

/// The line that an event is worth, if any.
pub(crate) fn line(event: &Event, destination: &str) -> Option<String> {
    match event {
        // Rounds are told by their results, the freeze by its end.
        Event::Phase { phase, .. } if matches!(&**phase, "round" | "done") || inside_the_freeze(phase) => None,
        Event::Phase { phase, .. } => Some(format!("{}: {}", printable(phase), doing(phase))),
        Event::Round(round) => Some(format!(
            "round {}: {} in {}, {} on the wire; {} written meanwhile",
            round.number,
            counted(round.pages, "page"),
            time(round.elapsed_ms),
            bytes(round.bytes),
            counted(round.dirty_pages, "page"),
        )),
        Event::Warning { text } => Some(format!("warning: {}", printable(text))),
        // It ran before this `migrate` asked.
        Event::Running { dest_pid, freeze_ms: 0.0 } => Some(format!("it runs on {destination} as process {dest_pid}")),
        Event::Running { dest_pid, freeze_ms } => {
            Some(format!("freeze: over after {}; runs on {destination} as process {dest_pid}", time(*freeze_ms)))
        }
        Event::Thawed => Some("freeze: over; the process runs here as before".to_owned()),
        Event::Drained { drain_ms, faults } => {
            Some(format!("drain: all pages arrived after {}{}", time(*drain_ms), told(faults)))
        }
        Event::Named { .. } | Event::Progress(_) | Event::Frozen | Event::Committed | Event::Ended => None,
    }
}

/// What a phase is called beside the bar.
pub(crate) fn title(phase: &str, round: u32) -> String {
    if round > 0 && phase == "round" { format!("round {round}") } else { printable(phase).replace('-', " ") }
}

/// What a phase does.
pub(crate) fn doing(phase: &str) -> &'static str {
    match phase {
        "negotiate" => "agreeing with the destination on version and identity",
        "probe" => "looking for everything that could stand in the way",
        "prepare" => "watching for writes, building the copy ahead",
        "round" => "sending memory while the process runs",
        "drain" => "sending the pages that are left, those that are touched first",
        "freeze" | "collect" | "final-round" | "rebuild" | "commit" => "handing over",
        "done" => "done",
        _ => "at work",
    }
}

/// The figures beside the bar.
pub(crate) fn figures(progress: &Progress) -> String {
    let mut text = format!(
        "{}/{} pages  {}/s",
        count(progress.pages_done),
        count(progress.pages_total),
        bytes(rounded(progress.rate_bytes_per_s)),
    );
    if progress.dirty_rate_pages_per_s > 0.0 {
        let dirty = rounded(progress.dirty_rate_pages_per_s * PAGE as f64);
        text += &format!("  dirty {}/s", bytes(dirty));
    }
    if let Some(eta) = progress.eta_ms {
        text += &format!("  ETA {}", if eta < 1000.0 { "< 1 s".to_owned() } else { format!("{:.0} s", eta / 1e3) });
    }
    text
}

/// What a move came to: a line or two when all went well, and otherwise what went wrong, where, what state the process is
/// in and what to do.
pub(crate) fn summary(report: &Report, destination: &str) -> Vec<String> {
    match report.outcome {
        Outcome::Moved => moved(report, destination),
        Outcome::Ended => {
            let when = if report.drain_ms > 0.0 {
                format!(", {} after it began to run and", time(report.drain_ms))
            } else {
                String::new()
            };
            let first = format!(
                "Process {} moved to {destination} and ended there{when} before all its pages had come.",
                report.source_pid
            );
            let second = if report.source_state == SourceState::Frozen {
                let id = report.migration_id.get(..8).unwrap_or_default();
                format!(
                    "What it was at the hand-over is kept here, frozen: `migrate resolve {id} --kill --allow-loss` gives that up; \
                     `migrate resolve {id} --thaw --allow-two-copies` has it go on from there, and do once more what it did at the \
                     destination."
                )
            } else {
                "Nothing of it is left here either. What ended it, the page server's log says.".to_owned()
            };
            vec![first, second]
        }
        Outcome::Refused => refused(report),
        Outcome::Failed => ended(report, "could not be moved"),
        Outcome::Cancelled => ended(report, "was not moved: cancelled"),
        Outcome::Unknown if report.dest_pid.is_some() => {
            ended(report, "runs at the destination, and may lack pages there")
        }
        Outcome::Unknown => ended(report, "may or may not run at the destination"),
    }
}

fn moved(report: &Report, destination: &str) -> Vec<String> {
    let there = match report.dest_pid {
        Some(pid) if pid != report.source_pid => format!(" (process {pid} there)"),
        _ => String::new(),
    };
    if report.freeze_ms <= 0.0 {
        // Another `migrate` had given it away, and knows how long that took.
        let sent = format!("{} sent, {} on the wire", counted(report.pages_sent, "page"), bytes(report.bytes_on_wire));
        return vec![format!("Process {} has moved to {destination}{there}. {sent}.", report.source_pid)];
    }
    let first = format!(
        "Process {} moved to {destination}{there} in {}, frozen for {} ({}).",
        report.source_pid,
        time(report.total_ms),
        time(report.freeze_ms),
        parts(&report.freeze),
    );
    let mut second = format!(
        "{}: {}, {} with content, {} sent, {} on the wire",
        report.mode,
        counted(report.rounds.into(), "round"),
        counted(report.pages_total, "page"),
        count(report.pages_sent),
        bytes(report.bytes_on_wire),
    );
    if matches!(report.mode, Mode::Hybrid | Mode::PostCopy) {
        second += &match report.drain_ms {
            none if none <= 0.0 => "; no page was left for later".to_owned(),
            long => format!("; the last pages came {} after it{}", time(long), told(&report.faults)),
        };
    }
    vec![first, second + "."]
}

fn refused(report: &Report) -> Vec<String> {
    if report.obstacles.is_empty() {
        return ended(report, "was refused");
    }
    let number = report.obstacles.len() as u64;
    let stand = if number == 1 { "stands" } else { "stand" };
    let mut lines = vec![format!(
        "Process {} was not moved, {}: {} {stand} in the way.",
        report.source_pid,
        state(report.source_state),
        counted(number, "thing"),
    )];
    for (index, obstacle) in report.obstacles.iter().enumerate() {
        lines.push(format!("{:>3}. {}: {}", index + 1, printable(&obstacle.resource), printable(&obstacle.text)));
        if !obstacle.remedy.is_empty() {
            lines.push(format!("     Way out: {}", printable(&obstacle.remedy)));
        }
    }
    lines
}

fn ended(report: &Report, what: &str) -> Vec<String> {
    let nothing = Failure::default();
    let failure = report.error.as_ref().unwrap_or(&nothing);
    let mut line = format!("Process {} {what}", report.source_pid);
    if !failure.phase.is_empty() {
        line += &format!(" (phase {})", printable(&failure.phase));
    }
    let cause: Vec<String> = [&failure.resource, &failure.text]
        .into_iter()
        .filter(|text| !text.is_empty())
        .map(|text| printable(text))
        .collect();
    if !cause.is_empty() {
        line += &format!(": {}", cause.join(": "));
    }
    let stood = match report.source_state {
        SourceState::RunningAsBefore if report.freeze_ms > 0.0 => {
            format!(", after it had stood still for {}", time(report.freeze_ms))
        }
        _ => String::new(),
    };
    let mut lines = vec![format!("{}. Here it is {}{stood}.", line.trim_end_matches('.'), state(report.source_state))];
    let remedy = if failure.remedy.is_empty() { way_out(report) } else { printable(&failure.remedy) };
    if !remedy.is_empty() {
        lines.push(format!("What to do: {remedy}"));
    }
    lines
}

fn way_out(report: &Report) -> String {
    match (report.outcome, report.source_state) {
        (Outcome::Unknown, _) | (_, SourceState::Frozen) => format!(
            "look at the destination. If the process runs there, kill -KILL {pid} here; only if it certainly does not, \
             kill -CONT {pid}",
            pid = report.source_pid
        ),
        (Outcome::Cancelled, _) | (_, SourceState::Gone) => String::new(),
        _ => "mend the cause and run the same command again; -v says more".to_owned(),
    }
}

fn state(state: SourceState) -> &'static str {
    match state {
        SourceState::RunningAsBefore => "running as before",
        SourceState::Frozen => "kept frozen",
        SourceState::Gone => "gone",
    }
}

fn parts(freeze: &Freeze) -> String {
    [
        ("stop", freeze.stop),
        ("collect", freeze.collect),
        ("final round", freeze.final_round),
        ("rebuild", freeze.rebuild),
        ("commit", freeze.commit),
        ("resume", freeze.resume),
    ]
    .map(|(name, milliseconds)| format!("{name} {milliseconds:.2}"))
    .join(", ")
}

fn told(faults: &Faults) -> String {
    match faults.count {
        0 => ", no page was waited for".to_owned(),
        number => format!(
            ", {} waited for, p50 {} p99 {}",
            counted(number, "page"),
            short_time(faults.p50_us),
            short_time(faults.p99_us)
        ),
    }
}

fn inside_the_freeze(phase: &str) -> bool {
    matches!(phase, "freeze" | "collect" | "final-round" | "rebuild" | "commit")
}

/// The nearest whole number; anything odd (negative, infinite, not a number) becomes the nearest there is.
fn rounded(value: f64) -> u64 {
    value.round() as u64
}

#[cfg(test)]
mod tests;
