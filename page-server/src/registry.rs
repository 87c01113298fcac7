//! Which migrations there are here: those under way, and those whose hand-over somebody may still ask about.

use crate::standing::{Facts, Standing, Whose};
use crate::workshop::Work;
use anyhow::{Result, bail};
use godwit_carry::Party;
use godwit_fault::MigrationId;
use godwit_journal::{Entry, Journal, Side};
use godwit_session::decision::{Destination, DestinationRecord};
use std::collections::{HashMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time after which nobody asks about a hand-over any more that is settled on this side.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// Settled hand-overs that are kept at most: each has a file open.
const MOST_KEPT: usize = 256;
/// Names of migrations that are remembered when all else is forgotten.
const MOST_NAMES: usize = 1 << 16;
/// Time that an attempt which a later one replaces has to go.
const TO_GO: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Known {
    standing: Arc<Standing>,
    since: Instant,
    /// The process at its host, if that was said.
    process: String,
}

/// All migrations of this page server.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) journal: Journal,
    known: Mutex<HashMap<MigrationId, Known>>,
    names: Mutex<Names>,
}

/// Names that were used. What somebody has written down of a migration must not make a second copy of its process when it is said
/// again.
#[derive(Debug, Default)]
struct Names {
    all: HashSet<MigrationId>,
    oldest_first: VecDeque<MigrationId>,
}

impl Names {
    /// Notes a name; says whether it was new.
    fn use_up(&mut self, id: MigrationId) -> bool {
        if !self.all.insert(id) {
            return false;
        }
        self.oldest_first.push_back(id);
        if self.oldest_first.len() > MOST_NAMES
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.all.remove(&oldest);
        }
        true
    }
}

impl Registry {
    /// Takes up what page servers before this one have written down.
    ///
    /// # Errors
    /// When the journal cannot be used.
    pub(crate) fn open(state_directory: &Path) -> Result<Self> {
        let journal = Journal::open(state_directory, Side::Destination)?;
        journal.tidy();
        let mut known = HashMap::new();
        for id in journal.ids()? {
            let entry: Entry<DestinationRecord, Facts> = match journal.find(&id) {
                Ok(Some(entry)) => entry,
                Ok(None) | Err(godwit_journal::Error::InUse { .. }) => continue,
                Err(error) => {
                    tracing::warn!(%error, "what is written down of a migration cannot be used");
                    continue;
                }
            };
            // Of another PID namespace that has the same state directory.
            if !entry.facts().process.is_of_here() {
                continue;
            }
            let is_settled =
                matches!(entry.state(), DestinationRecord::Runs { complete: true } | DestinationRecord::Aborted);
            if is_settled && entry.age() > KEPT {
                if let Err(error) = entry.remove() {
                    tracing::warn!(%error, "a migration that is over stays in the journal");
                }
                continue;
            }
            if let Some(id) = MigrationId::parse(&id) {
                let standing = Arc::new(Standing::left(id, entry));
                known.insert(id, Known { standing, since: Instant::now(), process: String::new() });
            }
        }
        Ok(Self { journal, known: Mutex::new(known), names: Mutex::default() })
    }

    /// Begins a migration. An earlier one of the same process that was not decided is replaced: its source has given it up, or there
    /// would be no later one. To be called where waiting is allowed.
    ///
    /// # Errors
    /// When this migration has begun already: its id is used once.
    pub(crate) fn begin(&self, id: MigrationId, party: Party, process: &str) -> Result<Arc<Standing>> {
        let standing = Arc::new(Standing::new(id, party));
        let replaced: Vec<_> = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let is_settled = |side| matches!(side, Destination::Runs { complete: true } | Destination::Aborted);
            known.retain(|_, one| {
                let side = one.standing.side();
                let is_old = is_settled(side) && one.since.elapsed() > KEPT;
                if is_old {
                    one.standing.forget();
                }
                side != Destination::Forgotten && !is_old
            });
            let mut settled: Vec<_> = known
                .iter()
                .filter(|(_, one)| is_settled(one.standing.side()))
                .map(|(id, one)| (one.since, *id))
                .collect();
            settled.sort_by_key(|(since, _)| *since);
            // N.B. what is written down of them stays, and is found again should somebody ask.
            for (_, oldest) in settled.iter().take(settled.len().saturating_sub(MOST_KEPT)) {
                known.remove(oldest);
            }
            let is_new = self.names.lock().unwrap_or_else(PoisonError::into_inner).use_up(id);
            if !is_new || known.contains_key(&id) {
                bail!("migration {id} has been here before");
            }
            let same = |one: &&Known| !process.is_empty() && one.process == process;
            let replaced = known.values().filter(same).map(|one| one.standing.clone()).collect();
            let process = process.to_owned();
            known.insert(id, Known { standing: standing.clone(), since: Instant::now(), process });
            replaced
        };
        for earlier in replaced {
            replace(&earlier);
        }
        Ok(standing)
    }

    /// What is known of a migration, for whoever has begun it; to others it is as unknown as one that never was.
    pub(crate) fn find(&self, id: MigrationId, caller: Party) -> Arc<Standing> {
        match self.look_up(id) {
            Some(standing) if standing.party == caller => standing,
            Some(_) => {
                tracing::warn!(migration = %id, %caller, "somebody else than its sender asks about a migration");
                Arc::new(Standing::unknown(id, caller))
            }
            None => Arc::new(Standing::unknown(id, caller)),
        }
    }

    /// Looks whether copies that a page server before this one has left have all their pages by now.
    pub(crate) fn look_for_pages(&self) {
        let all: Vec<_> = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.values().map(|one| one.standing.clone()).collect()
        };
        all.iter().for_each(|standing| standing.look_for_pages(Whose::Own));
    }

    /// Notes of a copy that a page server before this one has left that this one has its pages brought.
    pub(crate) fn take_over(&self, id: MigrationId, by_daemon: bool) -> Option<Arc<Standing>> {
        let standing = self.look_up(id)?;
        standing.take_over(by_daemon);
        Some(standing)
    }

    /// What is known of a migration, if only by what is written down.
    fn look_up(&self, id: MigrationId) -> Option<Arc<Standing>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(one) = known.get(&id) {
            return Some(one.standing.clone());
        }
        let entry: Option<Entry<DestinationRecord, Facts>> = self.journal.find(&id.to_string()).unwrap_or_default();
        let entry = entry.filter(|entry| entry.facts().process.is_of_here())?;
        let standing = Arc::new(Standing::left(id, entry));
        known.insert(id, Known { standing: standing.clone(), since: Instant::now(), process: String::new() });
        Some(standing)
    }
}

/// Ends an attempt that was not decided, and waits until nothing is left of it.
fn replace(earlier: &Standing) {
    let Some(queue) = earlier.queue() else { return };
    tracing::info!(migration = %earlier.id, "a later attempt to move the same process replaces this one");
    let lost = Work::Lost("a later attempt to move the same process has begun".to_owned());
    let _ = queue.blocking_send(lost);
    let _ = queue.blocking_send(Work::Away(earlier.links()));
    drop(queue);
    let deadline = Instant::now() + TO_GO;
    while earlier.queue().is_some() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_good_for_one_migration() {
        let mut names = Names::default();
        let id = |number: u64| MigrationId([number.to_le_bytes(), [7; 8]].concat().try_into().unwrap());
        assert!(names.use_up(id(0)) && !names.use_up(id(0)));
        for number in 1..=MOST_NAMES as u64 {
            assert!(names.use_up(id(number)));
        }
        assert_eq!(names.all.len(), MOST_NAMES);
        assert!(!names.use_up(id(1)), "younger ones are remembered");
    }
}
