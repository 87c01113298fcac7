//! Where a program stops itself (see CONTRIBUTING.md), in the order of a migration.

use crate::migration::Mode;

/// Which program stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Program {
    Migrate,
    PageServer,
}

/// A point of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point(usize);

const POINTS: [(&str, Program); 17] = [
    ("negotiate", Program::Migrate),
    ("probe", Program::Migrate),
    ("prepare", Program::Migrate),
    ("round", Program::Migrate),
    ("freeze", Program::Migrate),
    ("collect", Program::Migrate),
    ("final-round", Program::Migrate),
    ("rebuild", Program::Migrate),
    ("ready", Program::PageServer),
    ("commit", Program::Migrate),
    ("decided", Program::Migrate),
    ("committed", Program::Migrate),
    // The page server's has the same name: one stops before the decision has arrived, the other when it has.
    ("committed", Program::PageServer),
    ("granted", Program::PageServer),
    ("running", Program::PageServer),
    ("drain", Program::Migrate),
    ("done", Program::Migrate),
];

impl Point {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..POINTS.len()).map(Self)
    }

    /// Its place among all.
    pub fn place(self) -> usize {
        self.0
    }

    /// Its name, with the program's where that is not the source's.
    pub fn title(self) -> String {
        match self.program() {
            Program::Migrate => self.name().to_owned(),
            Program::PageServer => format!("{} (there)", self.name()),
        }
    }

    pub(super) fn name(self) -> &'static str {
        POINTS[self.0].0
    }

    pub(super) fn program(self) -> Program {
        POINTS[self.0].1
    }

    /// Whether a migration of this mode comes by.
    pub(super) fn is_in(self, mode: Mode) -> bool {
        match self.name() {
            "round" => mode == Mode::PreCopy,
            "drain" => mode == Mode::PostCopy,
            _ => true,
        }
    }
}
