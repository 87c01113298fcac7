//! What an operator sees: a line for each event, or with --json an object.

use std::io::Write;
use std::net::SocketAddr;

use godwit_fault::{DrainReport, Event};
use serde_json::{Value, json};

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// For people.
    Lines,
    /// For programs.
    Json,
}

impl Style {
    /// Says that the daemon is ready.
    pub(crate) fn listening(self, socket: &std::path::Path, faults: SocketAddr, drain: SocketAddr) {
        let socket = socket.display().to_string();
        match self {
            Self::Lines => {
                self.write(&format!("listening on {socket}, for faults on {faults}, for the rest on {drain}"))
            }
            Self::Json => self.write(&json!({
                "event": "listening", "socket": socket, "faults_port": faults.port(), "drain_port": drain.port(),
            })),
        }
    }

    /// Says what happened.
    pub(crate) fn event(self, event: &Event) {
        match (self, event) {
            (Self::Lines, Event::Serving { id, missing }) => {
                self.write(&format!("{id}: serving; {missing} pages are at the source"));
            }
            (Self::Lines, Event::Drained { id, report }) => self.write(&format!("{id}: {}", drained(report))),
            (Self::Lines, Event::Finished { id, report }) => {
                let known = if report.acknowledged { "has let go of its copy" } else { "could not be told" };
                self.write(&format!("{id}: finished; the source {known}"));
            }
            // Trouble belongs on standard error in either style.
            (Self::Lines, Event::Trouble { text }) => eprintln!("lazy-pages: {text}"),
            (Self::Json, event) => self.write(&object(event)),
        }
    }

    fn write(self, line: &dyn std::fmt::Display) {
        let mut output = std::io::stdout().lock();
        // Nobody reads any more: the drain matters more.
        let _ = writeln!(output, "{line}").and_then(|()| output.flush());
    }
}

fn drained(report: &DrainReport) -> String {
    let DrainReport { pages, drain_us, faults, p50_us, p99_us, .. } = report;
    let end = if report.departed { "the program ended" } else { "all pages are there" };
    format!("{end}: {pages} pages in {} ms, {faults} faults, p50 {p50_us} µs, p99 {p99_us} µs", drain_us / 1000)
}

fn object(event: &Event) -> Value {
    match event {
        Event::Serving { id, missing } => {
            json!({"event": "serving", "migration_id": id.to_string(), "pages_missing": missing})
        }
        Event::Drained { id, report } => with_report("drained", &id.to_string(), report),
        Event::Finished { id, report } => with_report("finished", &id.to_string(), report),
        Event::Trouble { text } => json!({"event": "trouble", "text": text}),
    }
}

fn with_report(event: &str, id: &str, report: &DrainReport) -> Value {
    json!({
        "event": event, "migration_id": id, "pages": report.pages, "drain_ms": report.drain_us as f64 / 1e3,
        "faults": {"count": report.faults, "p50_us": report.p50_us, "p99_us": report.p99_us},
        "holes": report.holes, "departed": report.departed, "acknowledged": report.acknowledged,
    })
}
