//! The fault matrix: at every point of a migration everything that can happen to it, with real processes.
//!
//! A *cell* is a [`Point`], a [`Fault`] and a mode. One of the two programs stops itself at the point; the fault happens; it goes on,
//! unless the fault has ended it. Whatever comes of that, afterwards exactly one copy of the victim runs, or is held and can be woken
//! up; its memory is right, it moves in the end, and nothing is left behind on either host. Cells that do not hold are listed with
//! the reason in [`known`], and must not hold: one that does is to be taken off that list.

mod cell;
pub(crate) mod copies;
mod fault;
mod known;
mod point;
mod stage;
mod table;
mod traces;

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::migration::Mode;
pub use cell::{Became, Cell, Seen, WayOut};
pub use fault::Fault;
pub use point::Point;
pub(crate) use stage::family;
pub use table::table;

/// What became of a cell, or why it does not hold.
#[derive(Debug)]
pub struct Entry {
    /// The cell.
    pub cell: Cell,
    /// What was seen.
    pub seen: anyhow::Result<Seen>,
    /// How long it took, all preparations included.
    pub elapsed: Duration,
}

impl Entry {
    /// Whether it is as it has to be: it holds, or it is known not to.
    pub fn is_as_expected(&self) -> bool {
        self.seen.is_ok() != self.reason().is_some()
    }

    /// Why it does not hold, if that is known.
    pub fn reason(&self) -> Option<&'static str> {
        known::reason(self.cell)
    }
}

/// The modes of the matrix: everything before the decision, and everything after it.
pub const MODES: [Mode; 2] = [Mode::PreCopy, Mode::PostCopy];

/// All cells of a fault.
pub fn cells(fault: Fault) -> Vec<Cell> {
    let all = MODES.iter().flat_map(|&mode| Point::all().map(move |point| Cell { point, fault, mode }));
    all.filter(|cell| cell.point.is_in(cell.mode)).collect()
}

/// Runs cells, so many at a time: most of them wait most of the time. Each is shown when it is over.
pub fn run(cells: Vec<Cell>, at_a_time: usize, show: impl Fn(&Entry) + Sync) -> Vec<Entry> {
    let left = Mutex::new(VecDeque::from(cells));
    let entries = Mutex::new(Vec::new());
    let take = || left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    std::thread::scope(|scope| {
        for _ in 0..at_a_time {
            scope.spawn(|| {
                while let Some(cell) = take() {
                    let started = Instant::now();
                    let seen = cell.run();
                    let entry = Entry { cell, seen, elapsed: started.elapsed() };
                    show(&entry);
                    entries.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
                }
            });
        }
    });
    let mut entries = entries.into_inner().unwrap_or_else(PoisonError::into_inner);
    entries.sort_by_key(|entry| (entry.cell.mode.word(), entry.cell.point.place(), entry.cell.fault));
    entries
}
