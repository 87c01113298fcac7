//! `migrate resolve`: how a hand-over stands, and what the user decides about it.

use std::fmt;

use anyhow::{Context, Result, ensure};
use godwit_journal::Side;
use godwit_session::decision::{SourceRecord, Verdict};
use serde::Serialize;

use super::arrived::Arrived;
use super::known::{Known, look};
use super::outlook::{ALLOW_LOSS, ALLOW_TWO_COPIES, Outlook};
use super::{ResolveArguments, open, peek};
use crate::agent;
use crate::cancel::Cancel;
use crate::journal::SourceEntry;

/// Says how a hand-over stands and what can be done, or does it.
///
/// # Errors
/// When there is no such migration, it is under way, or what is asked for could do harm.
pub fn resolve(arguments: &ResolveArguments, cancel: &Cancel) -> Result<()> {
    if let Some(arrived) = Arrived::find(&arguments.common.state_directory, &arguments.id)? {
        return arrived.resolve(arguments);
    }
    let journal = open(&arguments.common.state_directory, Side::Source)?;
    let (id, state, facts) = peek(&journal, &arguments.id)?;
    let short = id[..8].to_owned();
    if journal.is_in_use(&id) {
        let way = match state {
            SourceRecord::Decided | SourceRecord::Given => "it settles the hand-over by itself".to_owned(),
            _ => format!("nothing is decided; {} calls it off", arguments.common.command("cancel", &short)),
        };
        let text = format!("a `migrate` is at work on migration {short}: {way}");
        ensure!(!arguments.thaw && !arguments.end, "{text}");
        let known = look(&journal, Side::Source, &id)?.context("it is over")?;
        return arguments.common.tell(Prospect { known, resume: Some(text), thaw: None, kill: None });
    }
    let answer = agent::ask(&facts, &id, cancel);
    let outlook = Outlook::of(state, answer.as_ref().ok(), facts.process.is_there());
    if !arguments.thaw && !arguments.end {
        let known = look(&journal, Side::Source, &id)?.context("it is over")?;
        let when = if answer.is_ok() { "" } else { " once the destination answers" };
        let command = arguments.common.command("resume", &short);
        let resume = outlook.resume.then(|| format!("{command} brings it to its end{when}"));
        return arguments.common.tell(Prospect {
            known,
            resume,
            thaw: Some(outlook.thaw.text(ALLOW_TWO_COPIES)),
            kill: Some(outlook.end.text(ALLOW_LOSS)),
        });
    }
    let entry: SourceEntry = journal.find(&id)?.context("it is over")?;
    if arguments.thaw {
        outlook.thaw.permit(arguments.allow_two_copies, ALLOW_TWO_COPIES)?;
        let is_over_there = answer.is_ok_and(|answer| answer.ended);
        agent::thaw(entry, is_over_there).map_err(anyhow::Error::msg)?;
        arguments.common.tell_done(&id, "thawed", &format!("process {} goes on here", facts.process.pid));
    } else {
        outlook.end.permit(arguments.allow_loss, ALLOW_LOSS)?;
        let was_here = facts.process.is_there();
        let needs_nothing =
            answer.is_ok_and(|answer| answer.ended || answer.verdict == Verdict::Runs { complete: true });
        agent::end(entry, needs_nothing).map_err(anyhow::Error::msg)?;
        let pid = facts.process.pid;
        let text =
            if was_here { format!("process {pid} is ended here") } else { format!("process {pid} is gone here") };
        arguments.common.tell_done(&id, "ended", &format!("{text}; the migration is forgotten"));
    }
    Ok(())
}

/// How a migration stands and what can be done about it.
#[derive(Debug, Serialize)]
pub(super) struct Prospect {
    #[serde(flatten)]
    pub(super) known: Known,
    /// What `migrate resume` would do, or who does it already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) resume: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) thaw: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) kill: Option<String>,
}

impl fmt::Display for Prospect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.known)?;
        for (choice, flag) in [(&self.resume, ""), (&self.thaw, "--thaw: "), (&self.kill, "--kill: ")] {
            if let Some(text) = choice {
                writeln!(f, "  {flag}{text}")?;
            }
        }
        Ok(())
    }
}
