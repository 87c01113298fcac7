//! Shows a hand-over of connections: too short for a bar, so events are for programs, and people hear warnings and how it ended.

use crate::event::Event;
use crate::handing::HandOverReport;
use crate::report::Outcome;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::quantity::{counted, time};
use super::words::{self, printable};
use super::{Audience, Stamped, write_error, write_json, write_out};

/// Shows one hand-over. A slow reader does not hold it up: somebody else writes.
#[derive(Debug)]
pub struct HandOverDisplay {
    audience: Audience,
    started: Instant,
    news: Sender<(Duration, Event)>,
    writer: JoinHandle<()>,
}

impl HandOverDisplay {
    /// Starts to show one, to programs or to people.
    pub fn start(audience: Audience) -> Self {
        let (news, incoming) = channel::<(Duration, Event)>();
        let writer = std::thread::spawn(move || {
            for (at, event) in incoming {
                match (audience, &event) {
                    (Audience::Programs, event) => write_json(&Stamped::new(at, event)),
                    (_, Event::Warning { .. }) => {
                        write_error(&words::line(&event, "").map_or_else(String::new, |line| line + "\n"));
                    }
                    _ => {}
                }
            }
        });
        Self { audience, started: Instant::now(), news, writer }
    }

    /// Shows an event; returns at once.
    pub fn show(&self, event: Event) {
        let _ = self.news.send((self.started.elapsed(), event));
    }

    /// Says what it came to.
    pub fn finish(self, report: &HandOverReport) {
        drop(self.news);
        let _ = self.writer.join();
        let text = summary(report).join("\n") + "\n";
        if self.audience == Audience::Programs {
            write_json(report);
        }
        match (report.outcome, self.audience) {
            (Outcome::Moved, Audience::Programs) => {}
            (Outcome::Moved, _) => write_out(&text),
            _ => write_error(&text),
        }
    }
}

fn summary(report: &HandOverReport) -> Vec<String> {
    let what = format!("{} of process {}", counted(report.descriptors.len() as u64, "connection"), report.source_pid);
    let ended = match report.outcome {
        Outcome::Moved | Outcome::Ended => {
            return vec![format!(
                "{what} handed over in {}, the process stopped for {}.",
                time(report.total_ms),
                time(report.stopped_ms)
            )];
        }
        Outcome::Refused => "not handed over, the process untouched",
        Outcome::Cancelled => "not handed over: cancelled. They are the process's as before",
        Outcome::Failed => "not handed over. They are the process's as before",
        Outcome::Unknown => "may or may not be handed over",
    };
    let mut lines = vec![format!("{what} {ended}.")];
    for obstacle in &report.obstacles {
        lines.push(format!("  {}: {}", printable(&obstacle.resource), printable(&obstacle.text)));
        if !obstacle.remedy.is_empty() {
            lines.push(format!("  Way out: {}", printable(&obstacle.remedy)));
        }
    }
    if let Some(error) = &report.error {
        let (phase, resource, text) = (printable(&error.phase), printable(&error.resource), printable(&error.text));
        lines.push(format!("Phase {phase}: {resource}: {text}"));
        if !error.remedy.is_empty() {
            lines.push(format!("What to do: {}", printable(&error.remedy)));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handing::HandOver;
    use crate::report::{Failure, Obstacle};
    use crate::request::Request;

    #[test]
    fn every_end_is_told() {
        let wish = HandOver { request: Request::new(42, "h"), descriptors: vec![7, 9], label: String::new() };
        let mut report = HandOverReport::new(&wish);
        report.outcome = Outcome::Moved;
        assert!(summary(&report)[0].starts_with("2 connections of process 42 handed over in"));
        report.outcome = Outcome::Refused;
        report.obstacles = vec![Obstacle { resource: "fd 7".into(), text: "no".into(), remedy: "yes".into() }];
        assert_eq!(summary(&report)[1..], ["  fd 7: no", "  Way out: yes"]);
        report.obstacles.clear();
        report.outcome = Outcome::Failed;
        report.error =
            Some(Failure { phase: "rebuild".into(), resource: "r".into(), text: "t".into(), ..Failure::default() });
        assert_eq!(summary(&report)[1], "Phase rebuild: r: t");
        for (outcome, code) in [(Outcome::Moved, 0), (Outcome::Failed, 1), (Outcome::Unknown, 3)] {
            report.outcome = outcome;
            assert_eq!(report.exit_code(), code);
        }
    }
}
