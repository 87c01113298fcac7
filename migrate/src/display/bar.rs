//! The bar on a terminal. It moves when events come and at no other time: nothing ticks by itself.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::event::Event;

use super::words;

/// Redraws in a second, at most.
const FREQUENCY: u8 = 10;

/// What the current phase does, and a bar where it counts pages.
pub(super) struct Bar {
    bar: ProgressBar,
    counting: ProgressStyle,
    waiting: ProgressStyle,
}

impl Bar {
    /// Makes a bar that is not drawn yet.
    pub(super) fn new(indent: &str) -> Self {
        let style = |template: &str| {
            let style = ProgressStyle::with_template(&format!("{indent}{template}"));
            style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
        };
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(FREQUENCY));
        Self { bar, counting: style("{prefix:<9} [{bar:24}] {msg}"), waiting: style("{prefix:<9} {msg}") }
    }

    /// Draws what an event changes.
    pub(super) fn follow(&self, event: &Event) {
        match event {
            Event::Phase { phase, round } => {
                self.bar.set_style(self.waiting.clone());
                self.bar.set_message(words::doing(phase));
                self.bar.set_prefix(words::title(phase, round.unwrap_or(0)));
            }
            Event::Progress(progress) => {
                self.bar.set_style(self.counting.clone());
                self.bar.set_length(progress.pages_total);
                self.bar.set_position(progress.pages_done.min(progress.pages_total));
                self.bar.set_message(words::figures(progress));
                self.bar.set_prefix(words::title(&progress.phase, progress.round));
            }
            _ => {}
        }
    }

    /// Writes a line above the bar.
    pub(super) fn line(&self, line: &str) {
        self.bar.println(line);
    }

    /// Takes the bar away.
    pub(super) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}
