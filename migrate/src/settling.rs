//! `migrate status`, `resume`, `cancel` and `resolve`: migrations that are not over, and what can be done about them.
//!
//! The facts come from the journals of this host and, where it can be reached, from the destination. A choice that could make two
//! copies run, or lose the only one, is refused unless a flag says that this is wanted.

mod arguments;
mod arrived;
mod cancel;
mod known;
mod outlook;
mod resolve;
mod resume;

use std::path::Path;

use anyhow::{Result, ensure};
use godwit_journal::{DEFAULT_STATE_DIRECTORY, Journal, Side};
use godwit_session::decision::SourceRecord;

use crate::journal::{self, Facts};
pub use arguments::{CancelArguments, CommonArguments, ResolveArguments, ResumeArguments, StatusArguments};
pub use cancel::cancel;
pub use known::status;
pub use resolve::resolve;
pub use resume::{go_on, resume};

/// Opens a journal. A state directory that somebody names has to be there: nothing is written down in one that is made for the question.
///
/// # Errors
/// When it is not, or cannot be used.
fn open(state_directory: &Path, side: Side) -> Result<Journal> {
    let is_named = state_directory != Path::new(DEFAULT_STATE_DIRECTORY);
    ensure!(!is_named || state_directory.is_dir(), "there is no directory {}", state_directory.display());
    Ok(Journal::open(state_directory, side)?)
}

/// The whole id of the only entry whose id begins so.
fn only(journal: &Journal, id: &str) -> Result<Option<String>> {
    let mut ids: Vec<String> = journal.ids()?.into_iter().filter(|other| other.starts_with(id)).collect();
    ensure!(ids.len() < 2, "several migrations begin like this: {}", ids.join(", "));
    Ok(ids.pop())
}

fn unknown(id: &str, state_directory: &Path) -> anyhow::Error {
    let status = journal::command("status", state_directory);
    anyhow::anyhow!("no migration {id} is written down here; {status} lists those that are")
}

fn peek(journal: &Journal, id: &str) -> Result<(String, SourceRecord, Facts)> {
    let none = || unknown(id, journal.state_directory());
    let id = only(journal, id)?.ok_or_else(none)?;
    let (state, facts) = journal.peek(&id)?.ok_or_else(none)?;
    Ok((id, state, facts))
}

/// Writes to standard output. A reader that left is no error.
fn print(text: &str) {
    use std::io::Write as _;
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}
