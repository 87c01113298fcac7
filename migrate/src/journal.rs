//! What this side writes down of a migration: enough for another `migrate` to go on with it, or to let the process go on here.

use crate::request::{Mode, Request};
use godwit_carry::{Credentials, Party};
use godwit_journal::{DEFAULT_STATE_DIRECTORY, Entry, Journal, ProcessName, Side};
use godwit_proto::Message;
use godwit_proto::image::AioRingEntry;
use godwit_session::decision::SourceRecord;
use godwit_tracee::Ledger;
use godwit_tracee::ledger::{self, Afterwards, Mended};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// An entry of this side.
pub type SourceEntry = Entry<SourceRecord, Facts>;

/// What is known of a migration.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Facts {
    /// The process.
    pub process: ProcessName,
    /// Its name.
    pub command: String,
    /// The page server, as the user called it.
    pub to: String,
    /// Who that page server has proved to be: nobody else is believed, or given pages.
    pub party: Party,
    /// The secret that both hosts share, where they were to go by that.
    pub token_file: Option<PathBuf>,
    /// Where this host's key and the hosts that it trusts are.
    pub config_dir: PathBuf,
    /// When memory travels.
    pub mode: Mode,
    /// Seconds since 1970 when it began.
    pub began: u64,
    /// What was done to the process and its network that would have to be undone.
    #[serde(default)]
    pub undo: Undo,
}

/// What would have to be undone should the process go on here.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Undo {
    /// Addresses that this host had.
    #[serde(default)]
    pub addresses: Vec<Address>,
    /// The packet filter tables that keep its network namespace silent.
    #[serde(default)]
    pub silent_by: Option<String>,
    /// Asynchronous I/O contexts, encoded.
    #[serde(default)]
    pub contexts: Vec<Vec<u8>>,
    /// It was stopped by job control before.
    #[serde(default)]
    pub was_stopped: bool,
}

/// An address of an interface.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Bits of its network.
    pub prefix_bits: u8,
    /// The interface.
    pub device: String,
    /// More about it, as rtnetlink(7) says it.
    #[serde(default)]
    pub content: Vec<u8>,
    /// Routes that go with it, likewise.
    #[serde(default)]
    pub routes: Vec<Vec<u8>>,
}

impl Facts {
    /// Chooses how the hosts know each other, as the move itself did.
    ///
    /// # Errors
    /// When the token or this host's key cannot be used.
    pub fn credentials(&self) -> godwit_carry::Result<Credentials> {
        Credentials::choose(&self.config_dir, self.token_file.as_deref())
    }

    /// What is known in the beginning. `None` when there is no such process.
    pub fn of(request: &Request, party: Party) -> Option<Self> {
        let command = std::fs::read_to_string(format!("/proc/{}/comm", request.pid)).unwrap_or_default();
        Some(Self {
            process: ProcessName::of(request.pid)?,
            command: command.trim().to_owned(),
            to: request.to.clone(),
            party,
            token_file: request.token_file.as_deref().map(absolute),
            config_dir: absolute(&request.config_dir),
            mode: request.mode,
            began: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            undo: Undo { was_stopped: is_stopped(request.pid), ..Undo::default() },
        })
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

impl Undo {
    /// Keeps asynchronous I/O contexts.
    pub fn keep_contexts(&mut self, contexts: &[AioRingEntry]) {
        self.contexts = contexts.iter().map(Message::encode_to_vec).collect();
    }

    /// The contexts. Those that cannot be read are left out.
    pub fn contexts(&self) -> Vec<AioRingEntry> {
        self.contexts.iter().filter_map(|bytes| AioRingEntry::decode(bytes.as_slice()).ok()).collect()
    }
}

/// Opens this side's journal.
///
/// # Errors
/// When the state directory cannot be used.
pub fn open(state_directory: &Path) -> godwit_journal::Result<Journal> {
    Journal::open(state_directory, Side::Source)
}

/// Where it stands what must be put right in a process should its agent be killed while it is held.
fn ledger_path(state_directory: &Path, process: &ProcessName) -> PathBuf {
    state_directory.join("held").join(format!("{}-{}", process.pid, process.pid_namespace))
}

/// From here on it is written down what must be put right in a process that is held.
///
/// # Errors
/// When that cannot be written down.
pub fn begin_ledger(state_directory: &Path, process: &ProcessName) -> std::io::Result<()> {
    let path = ledger_path(state_directory, process);
    DirBuilder::new().recursive(true).mode(0o700).create(path.parent().unwrap_or(state_directory))?;
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
    Ledger::begin(file, process.pid).map_err(std::io::Error::other)?.install();
    Ok(())
}

/// The process is not held any more, or will not go on here.
pub fn end_ledger(state_directory: &Path, process: &ProcessName) {
    if Ledger::uninstall().is_some() {
        let _ = std::fs::remove_file(ledger_path(state_directory, process));
    }
}

/// Removes what was written down of a process that another agent held.
pub fn forget_ledger(state_directory: &Path, process: &ProcessName) {
    let _ = std::fs::remove_file(ledger_path(state_directory, process));
}

/// Puts a process right whose agent was killed while it was held.
///
/// # Errors
/// When it cannot be.
pub fn mend(state_directory: &Path, process: &ProcessName, afterwards: Afterwards) -> std::io::Result<Mended> {
    let path = ledger_path(state_directory, process);
    let file = match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Mended::NothingToDo),
        Err(error) => return Err(error),
    };
    let mended = ledger::mend(&file, afterwards).map_err(std::io::Error::other)?;
    let _ = std::fs::remove_file(path);
    Ok(mended)
}

/// Whether job control has stopped a process. proc_pid_stat(5)
pub fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, fields)| fields.trim_start().starts_with('T'))
}

/// Removes what was written down of processes that have ended before anything was decided about them.
pub fn sweep(journal: &Journal, state_directory: &Path) {
    for id in journal.ids().unwrap_or_default() {
        let is_over = |entry: &SourceEntry| {
            let process = &entry.facts().process;
            let undecided = matches!(entry.state(), SourceRecord::Undecided | SourceRecord::Stayed);
            undecided && process.is_of_here() && !process.is_there()
        };
        if let Ok(Some(entry)) = journal.find(&id)
            && is_over(&entry)
        {
            forget_ledger(state_directory, &entry.facts().process);
            let _ = entry.remove();
        }
    }
}

/// A command of this program about what is written down in a state directory, as it is to be typed.
#[must_use]
pub fn command(words: &str, state_directory: &Path) -> String {
    match state_directory == Path::new(DEFAULT_STATE_DIRECTORY) {
        true => format!("`migrate {words}`"),
        false => format!("`migrate {words} --state-dir {}`", state_directory.display()),
    }
}

/// Why a process is kept frozen of whose migration nothing that can be read is written down here.
#[must_use]
pub fn given_away(journal: &Journal) -> String {
    let is_damaged =
        |id: &String| matches!(journal.peek::<SourceRecord, Facts>(id), Err(godwit_journal::Error::Damaged { .. }));
    let ids = journal.ids().unwrap_or_default();
    let damaged: Vec<String> =
        ids.iter().filter(|id| is_damaged(id)).map(|id| journal.path(id).display().to_string()).collect();
    let place = match damaged.is_empty() {
        true => "another state directory".to_owned(),
        false => format!("{} (damaged) or another state directory", damaged.join(", ")),
    };
    format!("it was given away by a migration that is written down in {place}, or was and is lost: it is kept frozen")
}

/// What can be done about it.
pub const ELSEWHERE: &str = "`migrate status --state-dir` with that directory says how it stands; if that is lost, nothing but SIGKILL can be \
                             done to it";

/// Longest wait for what a `migrate` that was killed has left at work.
const PATIENCE: Duration = Duration::from_secs(2);

/// Keeps other `migrate`s of this host from a process, whatever their state directories, until it is dropped: a lock on its directory below
/// /proc.
///
/// # Errors
/// `EWOULDBLOCK` when another one has it, and goes on having it for a moment: one that was killed may take that long to be gone.
pub fn claim(pid: i32) -> Result<Flock<File>, Errno> {
    let deadline = Instant::now() + PATIENCE;
    let mut directory = File::open(format!("/proc/{pid}")).map_err(|_| Errno::ESRCH)?;
    loop {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(claim) => return Ok(claim),
            Err((back, Errno::EWOULDBLOCK)) if Instant::now() < deadline => directory = back,
            Err((_, errno)) => return Err(errno),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Finds an entry. One that is in use is waited for: of a `migrate` that was killed something may go on for a moment, to put connections right.
///
/// # Errors
/// As [`Journal::find`].
pub fn find_patiently(journal: &Journal, id: &str) -> godwit_journal::Result<Option<SourceEntry>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match journal.find(id) {
            Err(godwit_journal::Error::InUse { .. }) if Instant::now() < deadline => {}
            found => return found,
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// An earlier migration of a process that is not over.
#[derive(Debug)]
pub enum Earlier {
    /// Another `migrate` is at work on it; whether its hand-over was decided.
    UnderWay(String, bool),
    /// Its hand-over was decided.
    Decided(String),
    /// Nothing was decided, and nobody is at work on it any more.
    Left(Box<SourceEntry>),
}

/// Finds a migration of a process that is not over.
///
/// # Errors
/// When the journal cannot be read.
pub fn earlier(journal: &Journal, process: &ProcessName) -> godwit_journal::Result<Option<Earlier>> {
    for id in journal.ids()? {
        let Ok(Some((state, facts))) = journal.peek::<SourceRecord, Facts>(&id) else { continue };
        if facts.process != *process {
            continue;
        }
        let is_decided = |state| matches!(state, SourceRecord::Decided | SourceRecord::Given);
        return Ok(match journal.find::<SourceRecord, Facts>(&id) {
            Ok(Some(entry)) if is_decided(entry.state()) => Some(Earlier::Decided(id)),
            Ok(Some(entry)) => Some(Earlier::Left(Box::new(entry))),
            Ok(None) => continue,
            Err(godwit_journal::Error::InUse { .. }) => Some(Earlier::UnderWay(id, is_decided(state))),
            Err(error) => return Err(error),
        });
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_as_they_are_to_be_typed() {
        assert_eq!(command("status", Path::new(DEFAULT_STATE_DIRECTORY)), "`migrate status`");
        assert_eq!(command("resume 12", Path::new("/tmp/here")), "`migrate resume 12 --state-dir /tmp/here`");
    }

    #[test]
    fn what_is_left_of_ended_processes_is_swept_away() {
        let directory = tempfile::tempdir().unwrap();
        let journal = open(directory.path()).unwrap();
        let mut sleeper = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = |number: u8| format!("{number:032x}");
        let begin = |number, pid, state| {
            let facts = Facts::of(&Request::new(pid, "there"), Party::TokenHolders).unwrap();
            drop(journal.reserve(&id(number)).unwrap().publish(state, facts).unwrap());
        };
        let pid = sleeper.id() as i32;
        begin(1, pid, SourceRecord::Undecided);
        // Somebody may have to be told about this one.
        begin(2, pid, SourceRecord::Decided);
        begin(3, std::process::id() as i32, SourceRecord::Undecided);
        sweep(&journal, directory.path());
        assert_eq!(journal.ids().unwrap().len(), 3);
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        sweep(&journal, directory.path());
        assert_eq!(journal.ids().unwrap(), [id(2), id(3)]);
    }
}
