//! What can be done here about a migration that came from another host, should that one not come back.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use godwit_fault::{MigrationId, lacks_pages};
use godwit_journal::{Journal, Side};
use godwit_resources::memory::awaits_pages;
use godwit_session::decision::DestinationRecord;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::known::{ArrivedFacts, look};
use super::outlook::{ALLOW_LOSS, Choice};
use super::resolve::Prospect;
use super::{ResolveArguments, only, open};

/// Longest wait for a process to end.
const TO_GO: Duration = Duration::from_secs(10);

/// The state of a copy that is written down, unless nobody was there to write that it has all its pages by now.
pub(super) fn as_it_is(id: &str, state: DestinationRecord, facts: &ArrivedFacts) -> DestinationRecord {
    let may_lack = || MigrationId::parse(id).is_none_or(|id| lacks_pages(id).unwrap_or(true));
    let is_complete = state == DestinationRecord::Runs { complete: false }
        && facts.process.is_there()
        // N.B. otherwise who held its pages was killed before they came.
        && (facts.has_daemon || facts.needs_none)
        && !may_lack()
        && awaits_pages(facts.process.pid) == Some(false);
    if is_complete { DestinationRecord::Runs { complete: true } } else { state }
}

/// A migration to this host.
pub(super) struct Arrived {
    journal: Journal,
    id: String,
    state: DestinationRecord,
    facts: ArrivedFacts,
}

impl Arrived {
    /// Finds one by the first digits of its id, unless this host is the source of one that begins like this.
    ///
    /// # Errors
    /// When a journal cannot be read, or several begin like this.
    pub(super) fn find(state_directory: &Path, id: &str) -> Result<Option<Self>> {
        let is_meant = |other: &String| other.starts_with(id);
        if open(state_directory, Side::Source)?.ids()?.iter().any(is_meant) {
            return Ok(None);
        }
        let journal = open(state_directory, Side::Destination)?;
        let Some(id) = only(&journal, id)? else { return Ok(None) };
        let found = journal.peek(&id)?;
        Ok(found.map(|(state, facts)| Self { state: as_it_is(&id, state, &facts), journal, id, facts }))
    }

    /// Says where a command is to be run that was given here.
    pub(super) fn at_its_source(&self, command: &str) -> anyhow::Error {
        let short = &self.id[..8];
        let from = self.facts.from.ip().to_canonical();
        anyhow!("migration {short} came here from {from}: `migrate {command}` is to be run there")
    }

    /// Says what can be done, or does it.
    ///
    /// # Errors
    /// When what is asked for could do harm.
    pub(super) fn resolve(&self, arguments: &ResolveArguments) -> Result<()> {
        let end = self.end();
        if arguments.thaw {
            return Err(self.at_its_source("resolve --thaw"));
        }
        if !arguments.end {
            let known = look(&self.journal, Side::Destination, &self.id)?.context("it is over")?;
            let short = &self.id[..8];
            let resume = format!(
                "`migrate resume {short}` at its source goes on with it, `migrate resolve {short}` there says more"
            );
            return arguments.common.tell(Prospect {
                known,
                resume: Some(resume),
                thaw: None,
                kill: Some(end.text(ALLOW_LOSS)),
            });
        }
        end.permit(arguments.allow_loss, ALLOW_LOSS)?;
        let process = &self.facts.process;
        let done =
            |text: &str| arguments.common.tell_done(&self.id, "ended", &format!("process {} {text}", process.pid));
        if !process.is_there() {
            done("has ended here already");
            return Ok(());
        }
        kill(Pid::from_raw(process.pid), Signal::SIGKILL).context("ending it")?;
        let deadline = Instant::now() + TO_GO;
        while process.is_there() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        ensure!(!process.is_there(), "process {} was killed and is not gone after {} s", process.pid, TO_GO.as_secs());
        done("is ended here");
        Ok(())
    }

    /// What would come of ending the copy that is here.
    fn end(&self) -> Choice {
        if !self.facts.process.is_there() {
            return Choice::Harmless("it has ended here already");
        }
        match self.state {
            DestinationRecord::Aborted => Choice::Harmless("it never ran here and never will"),
            DestinationRecord::Ready => Choice::Harmful("its source may tell it to run at any moment"),
            DestinationRecord::Runs { complete: true } => {
                Choice::Harmful("it runs here and has all it needs: it is the only copy there is")
            }
            DestinationRecord::Runs { complete: false } => Choice::Harmful(
                "it runs here until it comes upon a page that is still at its source, which can send them; what it did here would be lost",
            ),
        }
    }
}
