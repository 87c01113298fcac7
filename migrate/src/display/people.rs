//! What people see: lines, and at a terminal a bar below them. Nothing new inside the freeze.

use crate::event::Event;
use crate::report::{Outcome, Report};

use super::bar::Bar;
use super::{words, write_error, write_out};

/// Shows one move to people.
pub(super) struct People {
    /// At a terminal.
    bar: Option<Box<Bar>>,
    /// No copy runs: nothing may be drawn.
    frozen: bool,
    /// Lines that were not shown yet.
    kept: Vec<String>,
    destination: String,
    indent: &'static str,
}

impl People {
    /// Shows a move to `destination` at a terminal.
    pub(super) fn at_terminal(destination: &str, indent: &'static str) -> Self {
        Self { bar: Some(Box::new(Bar::new(indent))), ..Self::reading_later(destination, indent) }
    }

    /// Shows a move to `destination` in lines.
    pub(super) fn reading_later(destination: &str, indent: &'static str) -> Self {
        Self { bar: None, frozen: false, kept: Vec::new(), destination: words::printable(destination), indent }
    }

    /// Shows an event, or keeps it until something may be shown.
    pub(super) fn event(&mut self, event: &Event) {
        // The bar names the phase already.
        let named = self.bar.is_some() && matches!(event, Event::Phase { .. });
        let line = words::line(event, &self.destination).filter(|_| !named);
        self.kept.extend(line.map(|line| format!("{}{line}", self.indent)));
        self.frozen = match event {
            Event::Frozen => true,
            Event::Running { .. } | Event::Thawed => false,
            _ => self.frozen,
        };
        if self.frozen {
            return;
        }
        self.say_kept();
        if let Some(bar) = &self.bar {
            bar.follow(event);
        }
    }

    /// Says what the move came to: to standard output when it succeeded, otherwise to standard error.
    pub(super) fn report(&mut self, report: &Report) {
        self.say_kept();
        self.clear();
        let lines = words::summary(report, &self.destination);
        let text: String = lines.iter().map(|line| format!("{}{line}\n", self.indent)).collect();
        match report.outcome {
            Outcome::Moved => write_out(&text),
            _ => write_error(&text),
        }
    }

    /// Takes the bar away.
    pub(super) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.clear();
        }
    }

    fn say_kept(&mut self) {
        for line in self.kept.drain(..) {
            match &self.bar {
                Some(bar) => bar.line(&line),
                None => write_error(&format!("{line}\n")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_shown_inside_the_freeze() {
        let mut people = People::reading_later("host", "");
        people.event(&Event::Frozen);
        people.event(&Event::warning("the heap was split"));
        people.event(&Event::Committed);
        assert_eq!(people.kept, ["warning: the heap was split"]);
        people.event(&Event::Running { dest_pid: 1, freeze_ms: 1.0 });
        assert!(people.kept.is_empty());
        people.event(&Event::phase("drain"));
        assert!(people.kept.is_empty());
    }
}
