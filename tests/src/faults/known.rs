//! Cells that do not hold, and why. None of them may hold: the matrix says so when one does.

use super::cell::Cell;
use super::fault::Fault;

/// The reason why a cell does not hold; none if it has to.
pub(super) fn reason(_cell: Cell) -> Option<&'static str> {
    None
}

/// Whether a fault can lose the source's last word, that it needs to know nothing more. Where it is lost, the entry of the migration
/// stays in the destination's journal (a file of 16 KiB in memory): a source forgets before it says so, and nobody else can say it. The table
/// marks these cells with a star. Nothing else may stay, and no entry where the fault is another.
pub(super) fn last_word_may_be_lost(fault: Fault) -> bool {
    // Full memory may end the page server, too.
    !matches!(fault, Fault::LazyPagesKilled | Fault::JournalFullHere | Fault::JournalFullThere)
}
