//! After a move that did not happen: the process must be as it was.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::deadline::wait_until;
use crate::proc_view::ProcView;
use crate::victim::Victim;

/// Expects that a victim runs on, without errors, and that `/proc` shows nothing else than `before`.
///
/// The engine's programs may still be letting go when they are killed from outside; 5 s are allowed for that.
///
/// # Errors
/// Names what differs.
pub fn expect_untouched(victim: &Victim, before: &ProcView) -> Result<()> {
    let mut last = Ok(());
    let settled = wait_until("the process to be as before", Duration::from_secs(5), || {
        last = victim.view()?.expect_same_as(before);
        Ok(last.is_ok())
    });
    last?;
    settled?;
    victim.expect_beats(10).context("after a move that did not happen")?;
    Ok(())
}
