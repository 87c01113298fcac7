//! Migrations as this host knows them, and `migrate status`, which tells of them.

use std::fmt::Write as _;
use std::net::SocketAddr;

use anyhow::{Result, ensure};
use godwit_journal::{Journal, ProcessName, Side};
use godwit_session::decision::{DestinationRecord, SourceRecord};
use serde::{Deserialize, Serialize};

use super::{StatusArguments, arrived, open, print, unknown};
use crate::agent;
use crate::cancel::Cancel;
use crate::journal::Facts;

/// What `page-server` has written down, as far as it concerns us.
#[derive(Debug, Deserialize)]
pub(super) struct ArrivedFacts {
    pub(super) process: ProcessName,
    command: String,
    pub(super) from: SocketAddr,
    /// Whether it has ended before all its pages came.
    #[serde(default)]
    ended: bool,
    /// Whether a daemon serves its pages, which may have brought all of them when no page server was there to write that down.
    #[serde(default)]
    pub(super) has_daemon: bool,
    /// Whether it was said to need no pages of its source any more.
    #[serde(default)]
    pub(super) needs_none: bool,
}

/// What a copy is said to have done that ended before all its pages came.
const ENDED: &str = "ended";

/// One migration as this host knows it.
#[derive(Debug, Serialize)]
pub(super) struct Known {
    migration_id: String,
    side: String,
    /// What is written down.
    state: &'static str,
    pid: i32,
    command: String,
    /// The other host.
    peer: String,
    /// Whether a `migrate` or `page-server` is at work on it.
    under_way: bool,
    /// Whether the process is there.
    process_is_there: bool,
    /// What the destination says; absent where it was not asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination_pid: Option<i32>,
}

/// Tells of migrations that are not over.
///
/// # Errors
/// When a journal cannot be read, or there is no such migration.
pub fn status(arguments: &StatusArguments) -> Result<()> {
    let mut all = Vec::new();
    let mut failed = 0;
    for side in [Side::Source, Side::Destination] {
        let journal = open(&arguments.common.state_directory, side)?;
        for id in journal.ids()? {
            if arguments.id.as_ref().is_some_and(|wanted| !id.starts_with(wanted)) {
                continue;
            }
            match look(&journal, side, &id) {
                Ok(Some(known)) => all.push(known),
                // It was over while we looked.
                Ok(None) => {}
                Err(error) => {
                    failed += 1;
                    eprintln!("migrate: {}", godwit_carry::with_causes(error.as_ref()));
                }
            }
        }
    }
    if let (true, 0, Some(id)) = (all.is_empty(), failed, &arguments.id) {
        return Err(unknown(id, &arguments.common.state_directory));
    }
    let mut text = String::new();
    for known in &all {
        if arguments.common.json {
            writeln!(text, "{}", serde_json::to_string(known)?)?;
        } else {
            writeln!(text, "{known}")?;
            if known.side == "source" && !known.under_way {
                let resolve = arguments.common.command("resolve", &known.migration_id[..8]);
                writeln!(text, "          {resolve} says what can be done")?;
            }
        }
    }
    if all.is_empty() && failed == 0 && !arguments.common.json {
        text += "no migration is under way or unsettled here\n";
    }
    print(&text);
    ensure!(failed == 0, "what is written down cannot all be read");
    Ok(())
}

/// Tells how one migration stands; `None` when it is over.
pub(super) fn look(journal: &Journal, side: Side, id: &str) -> Result<Option<Known>> {
    use godwit_journal::State as _;
    let under_way = journal.is_in_use(id);
    let new = |state, process: &ProcessName, command: &str, peer: String| Known {
        migration_id: id.to_owned(),
        side: side.to_string(),
        state,
        pid: process.pid,
        command: command.to_owned(),
        peer,
        under_way,
        process_is_there: process.is_there(),
        destination: None,
        destination_pid: None,
    };
    if side == Side::Destination {
        let found: Option<(DestinationRecord, ArrivedFacts)> = journal.peek(id)?;
        return Ok(found.map(|(state, facts)| {
            let state = arrived::as_it_is(id, state, &facts);
            let is_ended =
                facts.ended || !facts.process.is_there() && state == DestinationRecord::Runs { complete: false };
            let word = if is_ended { ENDED } else { state.word() };
            new(word, &facts.process, &facts.command, facts.from.to_string())
        }));
    }
    let found: Option<(SourceRecord, Facts)> = journal.peek(id)?;
    let Some((state, facts)) = found else { return Ok(None) };
    let mut known = new(state.word(), &facts.process, &facts.command, facts.to.clone());
    if !under_way {
        match agent::ask(&facts, id, &Cancel::new()?) {
            Ok(answer) => {
                known.destination = Some(answer.to_string());
                known.destination_pid = (answer.pid != 0).then_some(answer.pid);
            }
            Err(error) => known.destination = Some(format!("cannot be asked: {error}")),
        }
    }
    Ok(Some(known))
}

impl std::fmt::Display for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (preposition, verb) = if self.side == "source" { ("to", "leaves") } else { ("from", "comes") };
        write!(
            f,
            "{}  process {} ({}) {verb} {preposition} {}: {}",
            &self.migration_id[..8],
            self.pid,
            self.command,
            self.peer,
            self.state
        )?;
        f.write_str(match (self.side.as_str(), self.state) {
            // N.B. kept for as long as the source may still ask.
            ("destination", "runs-complete" | "aborted") => ", and its source has not confirmed that yet",
            ("destination", "runs") => ", and lacks pages that are still at its source",
            ("destination", ENDED) => " before all its pages came, and its source has not confirmed that yet",
            _ if self.under_way => ", under way",
            _ => ", nobody is at work on it",
        })?;
        if !self.process_is_there {
            f.write_str("; the process is gone here")?;
        }
        if let Some(destination) = &self.destination {
            write!(f, "; destination: {destination}")?;
        }
        Ok(())
    }
}
