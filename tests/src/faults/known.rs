//! Cells that do not hold, and why. None of them may hold: the matrix says so when one does.

use super::cell::Cell;
use super::fault::Fault;

/// The reason why a cell does not hold; none if it has to.
pub(super) fn reason(_cell: Cell) -> Option<&'static str> {
    None
}

/// Whether the fault has ended the copy itself, once in a hundred times: where memory is full the kernel chooses whom it ends, and it may choose
/// what runs. That is told (`migrate resume` ends with 4, and what is at the source is kept), and such a cell is run once more.
pub(super) fn has_ended_the_copy(fault: Fault, error: &anyhow::Error) -> bool {
    fault == Fault::MemoryFull && format!("{error:#}").contains("migrate resume ended with exit status: 4")
}

/// Whether a fault can lose the source's last word, that it needs to know nothing more. Where it is lost, the entry of the migration
/// stays in the destination's journal (a file of 16 KiB in memory): a source forgets before it says so, and nobody else can say it. The table
/// marks these cells with a star. Nothing else may stay, and no entry where the fault is another.
pub(super) fn last_word_may_be_lost(fault: Fault) -> bool {
    // Full memory may end the page server, too.
    !matches!(fault, Fault::LazyPagesKilled | Fault::JournalFullHere | Fault::JournalFullThere)
}
