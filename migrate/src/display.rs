//! Shows a move while it runs and says at the end what it came to.
//!
//! Everything is written by one thread of its own, so that a slow terminal or a full pipe never holds up the move, least of
//! all the freeze. People are shown nothing new from [`Event::Frozen`] until the process runs again, here or there: what
//! comes in between is kept and told afterwards. With JSON every event is written as it comes; that costs the freeze
//! nothing, and whoever watches from outside may want to know at once.

mod bar;
mod handing;
mod people;
pub(crate) mod quantity;
pub(crate) mod words;

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::event::Event;
use crate::report::{Outcome, Report};
pub use handing::HandOverDisplay;
use people::People;

/// For whom a move is shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Audience {
    /// Programs: one JSON object a line on standard output.
    Programs,
    /// People at a terminal: a bar on standard error that is drawn again and again.
    Terminal,
    /// People who read it later: one line a phase on standard error.
    Log,
}

impl Audience {
    /// Tells a terminal on standard error from anything else. Log lines would tear a bar apart: with some, there is none.
    pub fn of_standard_error(verbosity: u8) -> Self {
        if verbosity == 0 && std::io::stderr().is_terminal() { Self::Terminal } else { Self::Log }
    }
}

/// A display that shows one move.
#[derive(Debug)]
pub struct Display {
    started: Instant,
    news: Sender<News>,
    writer: JoinHandle<()>,
}

enum News {
    Event(Duration, Event),
    Report(Box<Report>),
}

/// Shows events to one audience.
enum Writer {
    Programs,
    People(People),
}

impl Display {
    /// Starts to show a move to `destination`.
    pub fn start(audience: Audience, destination: &str) -> Self {
        Self::start_indented(audience, destination, "")
    }

    /// As [`Display::start`], with lines for people set off by `indent`.
    pub fn start_indented(audience: Audience, destination: &str, indent: &'static str) -> Self {
        let (news, incoming) = channel();
        let writer = match audience {
            Audience::Programs => Writer::Programs,
            Audience::Terminal => Writer::People(People::at_terminal(destination, indent)),
            Audience::Log => Writer::People(People::reading_later(destination, indent)),
        };
        let writer = std::thread::spawn(move || writer.run(&incoming));
        Self { started: Instant::now(), news, writer }
    }

    /// Counts the time of events from an earlier start, that of who has shown the move before.
    #[must_use]
    pub fn counting_from(self, started: Instant) -> Self {
        Self { started, ..self }
    }

    /// Shows an event; returns at once.
    pub fn show(&self, event: Event) {
        // Only a writer that panicked is gone, and the move matters more than its picture.
        let _ = self.news.send(News::Event(self.started.elapsed(), event));
    }

    /// Says what the move came to, and returns when everything is written.
    pub fn finish(self, report: &Report) {
        let _ = self.news.send(News::Report(Box::new(report.clone())));
        drop(self.news);
        let _ = self.writer.join();
    }
}

impl Writer {
    fn run(mut self, incoming: &Receiver<News>) {
        for news in incoming {
            match (&mut self, news) {
                (Self::Programs, News::Event(at, event)) => write_json(&Stamped::new(at, &event)),
                (Self::Programs, News::Report(report)) => report_to_programs(&report),
                (Self::People(people), News::Event(_, event)) => people.event(&event),
                (Self::People(people), News::Report(report)) => people.report(&report),
            }
        }
        if let Self::People(people) = &self {
            people.clear();
        }
    }
}

/// Writes the report for programs and, when the move did not succeed, words for the log beside it.
fn report_to_programs(report: &Report) {
    write_json(report);
    if report.outcome != Outcome::Moved {
        write_error(&(words::summary(report, "the destination").join("\n") + "\n"));
    }
}

/// An event and when it happened, counted from the start.
#[derive(Serialize)]
struct Stamped<'a> {
    #[serde(flatten)]
    event: &'a Event,
    at_ms: f64,
}

impl<'a> Stamped<'a> {
    fn new(at: Duration, event: &'a Event) -> Self {
        Self { event, at_ms: quantity::milliseconds(at) }
    }
}

fn write_json(value: &impl Serialize) {
    // Numbers that JSON cannot express are written as null: there is nothing that could fail.
    let line = serde_json::to_string(value).unwrap_or_default();
    write_out(&(line + "\n"));
}

/// Writes to standard output. A reader that left is no reason to stop: the move goes on without one.
fn write_out(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn write_error(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_events_say_what_and_when() {
        let line = |event: &Event| serde_json::to_string(&Stamped::new(Duration::from_micros(1500), event)).unwrap();
        assert_eq!(line(&Event::phase("probe")), r#"{"event":"phase","phase":"probe","at_ms":1.5}"#);
        assert_eq!(line(&Event::Frozen), r#"{"event":"frozen","at_ms":1.5}"#);
    }
}
