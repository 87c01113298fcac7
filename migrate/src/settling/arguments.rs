//! What these commands are told.

use std::path::PathBuf;

use anyhow::Result;
use clap::{ArgAction, Args};
use godwit_journal::DEFAULT_STATE_DIRECTORY;

use super::print;
use super::resolve::Prospect;
use crate::journal;
use crate::request::DEFAULT_RECONNECT_FOR;

/// Reads the first digits of an id, or all of them.
fn digits(text: &str) -> Result<String, String> {
    let is_one = (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let expected = || "expected the first hexadecimal digits of a migration's id, 32 at most".to_owned();
    is_one.then(|| text.to_ascii_lowercase()).ok_or_else(expected)
}

/// What goes on with a migration needs to know.
#[derive(Args, Debug)]
pub struct ResumeArguments {
    /// The migration, or the first digits of its id
    #[arg(value_name = "ID", value_parser = digits)]
    pub id: String,
    /// Call the destination for S seconds
    #[arg(long, value_name = "S", default_value_t = DEFAULT_RECONNECT_FOR.as_secs(), value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub reconnect_for: u64,
    /// How and where
    #[command(flatten)]
    pub common: CommonArguments,
}

/// What tells of migrations needs to know.
#[derive(Args, Debug)]
pub struct StatusArguments {
    /// The migration, or the first digits of its id; without one all that are not over
    #[arg(value_name = "ID", value_parser = digits)]
    pub id: Option<String>,
    /// How and where
    #[command(flatten)]
    pub common: CommonArguments,
}

/// What calls a migration off needs to know.
#[derive(Args, Debug)]
pub struct CancelArguments {
    /// The migration, or the first digits of its id
    #[arg(value_name = "ID", value_parser = digits)]
    pub id: String,
    /// How and where
    #[command(flatten)]
    pub common: CommonArguments,
}

/// What resolves a migration needs to know.
#[derive(Args, Debug)]
pub struct ResolveArguments {
    /// The migration, or the first digits of its id
    #[arg(value_name = "ID", value_parser = digits)]
    pub id: String,
    /// Let the frozen process go on here
    #[arg(long, conflicts_with = "end")]
    pub thaw: bool,
    /// End the frozen process here; at a destination, the copy that came
    #[arg(long = "kill")]
    pub end: bool,
    /// Thaw it even where a copy may run at the destination
    #[arg(long, requires = "thaw")]
    pub allow_two_copies: bool,
    /// End it even where something is lost with it
    #[arg(long, requires = "end")]
    pub allow_loss: bool,
    /// How and where
    #[command(flatten)]
    pub common: CommonArguments,
}

/// What all of them take.
#[derive(Args, Debug)]
pub struct CommonArguments {
    /// Where hand-overs are written down
    #[arg(long = "state-dir", value_name = "DIRECTORY", default_value = DEFAULT_STATE_DIRECTORY)]
    pub state_directory: PathBuf,
    /// Write JSON to standard output, one object a line
    #[arg(long)]
    pub json: bool,
    /// Log to standard error: -v what happens, -vv details
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}

impl CommonArguments {
    /// What to type about a migration.
    pub(super) fn command(&self, word: &str, short: &str) -> String {
        journal::command(&format!("{word} {short}"), &self.state_directory)
    }

    /// Says what can be done.
    pub(super) fn tell(&self, prospect: Prospect) -> Result<()> {
        if self.json {
            print(&format!("{}\n", serde_json::to_string(&prospect)?));
            return Ok(());
        }
        print(&prospect.to_string());
        Ok(())
    }

    /// Says what was done.
    pub(super) fn tell_done(&self, id: &str, done: &str, text: &str) {
        match self.json {
            true => print(&format!("{}\n", serde_json::json!({ "migration_id": id, "done": done, "text": text }))),
            false => print(&format!("{text}\n")),
        }
    }
}
