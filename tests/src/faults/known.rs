//! Cells that do not hold, and why. None of them may hold: the matrix says so when one does.

use super::cell::Cell;

/// The reason why a cell does not hold; none if it has to.
pub(super) fn reason(_cell: Cell) -> Option<&'static str> {
    None
}
