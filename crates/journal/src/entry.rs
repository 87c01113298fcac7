//! Entries: made, changed, found again and removed.

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::format::{Format, HEAD, LONGEST, decode};
use crate::{Error, Result, State};

/// Room that an entry takes at once, so that what comes later needs none.
const ROOM: usize = 16 << 10;
/// Digits of a migration's id.
const ID_DIGITS: usize = 32;

/// Whose journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Of processes that leave this host.
    Source,
    /// Of processes that come to it.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// The entries of one side.
#[derive(Clone, Debug)]
pub struct Journal(PathBuf);

/// Room for an entry that nobody can find yet. Dropping it gives it up.
#[derive(Debug)]
pub struct Reserved {
    /// There until it is published.
    file: Option<Flock<File>>,
    hidden: PathBuf,
    path: PathBuf,
}

/// An entry that this process works on, and nobody else.
#[derive(Debug)]
pub struct Entry<S, F> {
    file: Flock<File>,
    path: PathBuf,
    state: S,
    facts: F,
    format: Format,
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { doing, path, source }
}

/// Whether a word is the id of a migration.
fn is_id(word: &str) -> bool {
    word.len() == ID_DIGITS && word.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

impl Journal {
    /// Opens one side's journal under a state directory, which is made if need be, for root's eyes only.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(state_directory: &Path, side: Side) -> Result<Self> {
        let directory = state_directory.join(side.to_string());
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        made.map_err(failed("make", &directory))?;
        for directory in [state_directory, &directory] {
            let metadata = directory.metadata().map_err(failed("examine", directory))?;
            // Whoever can write there could have a process ended or let go on. One where only owners can remove (/tmp) will do above.
            let mode = metadata.mode() & 0o7777;
            if mode & 0o022 != 0 && mode & 0o1000 == 0 {
                return Err(Error::Open { path: directory.to_owned(), mode });
            }
            let owner = metadata.uid();
            if owner != 0 && owner != nix::unistd::geteuid().as_raw() {
                return Err(Error::Foreign { path: directory.to_owned(), owner });
            }
        }
        Ok(Self(directory))
    }

    /// The state directory that it is under.
    #[must_use]
    pub fn state_directory(&self) -> &Path {
        self.0.parent().unwrap_or(&self.0)
    }

    /// Makes room for an entry.
    ///
    /// # Errors
    /// When there is none, or an entry of this id.
    pub fn reserve(&self, id: &str) -> Result<Reserved> {
        if !is_id(id) {
            return Err(Error::NoId(id.to_owned()));
        }
        let (hidden, path) = (self.0.join(format!(".{id}")), self.0.join(id));
        if path.exists() {
            return Err(Error::InUse { path });
        }
        let file = make_locked(&hidden)?;
        let written = (&*file).write_all(&[0; ROOM]);
        let reserved = Reserved { file: Some(file), hidden, path };
        written.map_err(failed("make room for", &reserved.hidden))?;
        Ok(reserved)
    }

    /// Finds an entry, by its id or the first digits of it, and locks it.
    ///
    /// # Errors
    /// When there is more than one, it is in use, or damaged.
    pub fn find<S: State, F: DeserializeOwned>(&self, id: &str) -> Result<Option<Entry<S, F>>> {
        let Some(path) = self.path_of(id)? else { return Ok(None) };
        Entry::open(path).map(Some)
    }

    /// Looks into an entry that may be in use.
    ///
    /// # Errors
    /// When it cannot be read or is damaged.
    pub fn peek<S: State, F: DeserializeOwned>(&self, id: &str) -> Result<Option<(S, F)>> {
        let Some(path) = self.path_of(id)? else { return Ok(None) };
        let (state, facts, _) = read(&path)?;
        Ok(Some((state, facts)))
    }

    /// Whether a process works on an entry. `false` where there is no entry.
    #[must_use]
    pub fn is_in_use(&self, id: &str) -> bool {
        let opened = File::open(self.0.join(id));
        opened.is_ok_and(|file| Flock::lock(file, FlockArg::LockSharedNonblock).is_err())
    }

    /// Where the entry of an id is.
    #[must_use]
    pub fn path(&self, id: &str) -> PathBuf {
        self.0.join(id)
    }

    /// The ids of all entries, in order.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn ids(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.0).map_err(failed("read", &self.0))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut ids: Vec<String> = names.filter(|name| is_id(name)).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// Removes what was reserved by processes that are gone.
    pub fn tidy(&self) {
        let Ok(entries) = std::fs::read_dir(&self.0) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let is_reserved = name.to_str().and_then(|name| name.strip_prefix('.')).is_some_and(is_id);
            let lock = || Flock::lock(File::open(entry.path()).ok()?, FlockArg::LockExclusiveNonblock).ok();
            // N.B. removed while it is locked: somebody may be about to make it.
            if is_reserved && let Some(_left) = lock() {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    fn path_of(&self, id: &str) -> Result<Option<PathBuf>> {
        if is_id(id) {
            return Ok(Some(self.0.join(id)).filter(|path| path.exists()));
        }
        if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Error::NoId(id.to_owned()));
        }
        let matching: Vec<String> = self.ids()?.into_iter().filter(|other| other.starts_with(id)).collect();
        match matching.as_slice() {
            [] => Ok(None),
            [one] => Ok(Some(self.0.join(one))),
            _ => Err(Error::Ambiguous(id.to_owned())),
        }
    }
}

/// Makes a file and locks it, whoever tidies up meanwhile and takes it for one that was left.
fn make_locked(path: &Path) -> Result<Flock<File>> {
    const ATTEMPTS: usize = 1000;
    let mut attempts = 0;
    loop {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path);
        attempts += 1;
        match lock(file.map_err(failed("make", path))?, path) {
            Ok(file) if is_at(&file, path) => return Ok(file),
            Ok(_) | Err(Error::InUse { .. }) if attempts < ATTEMPTS => std::thread::sleep(Duration::from_millis(1)),
            Ok(_) => return Err(Error::InUse { path: path.to_owned() }),
            Err(error) => return Err(error),
        }
    }
}

/// Whether a path leads to a file that is open.
fn is_at(file: &File, path: &Path) -> bool {
    let number =
        |metadata: io::Result<std::fs::Metadata>| metadata.map(|metadata| (metadata.dev(), metadata.ino())).ok();
    number(file.metadata()).is_some_and(|own| number(std::fs::symlink_metadata(path)) == Some(own))
}

fn lock(file: File, path: &Path) -> Result<Flock<File>> {
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => Error::InUse { path: path.to_owned() },
        other => Error::Io { doing: "lock", path: path.to_owned(), source: other.into() },
    })
}

fn read<S: State, F: DeserializeOwned>(path: &Path) -> Result<(S, F, Format)> {
    let file = File::open(path).map_err(failed("open", path))?;
    let mut bytes = Vec::new();
    file.take(LONGEST as u64).read_to_end(&mut bytes).map_err(failed("read", path))?;
    decode(&bytes).map_err(|why| Error::Damaged { path: path.to_owned(), why })
}

impl Reserved {
    /// Makes it an entry that can be found.
    ///
    /// # Errors
    /// When there is no room for the facts.
    pub fn publish<S: State, F: Serialize>(mut self, state: S, facts: F) -> Result<Entry<S, F>> {
        let text = serde_json::to_vec(&facts).expect("facts are plain data");
        let format = Format::of(HEAD, &text);
        let mut bytes = format.head(state.word()).to_vec();
        bytes.extend(&text);
        let file = self.file.take().expect("there until it is published");
        file.write_all_at(&bytes, 0).map_err(failed("write", &self.hidden))?;
        std::fs::rename(&self.hidden, &self.path).map_err(failed("publish", &self.hidden))?;
        Ok(Entry { file, path: self.path.clone(), state, facts, format })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.hidden);
    }
}

impl<S: State, F: DeserializeOwned> Entry<S, F> {
    fn open(path: PathBuf) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed("open", &path))?;
        let file = lock(file, &path)?;
        let (state, facts, format) = read(&path)?;
        Ok(Self { file, path, state, facts, format })
    }
}

impl<S: State, F> Entry<S, F> {
    /// What it is in.
    pub fn state(&self) -> S {
        self.state
    }

    /// What is known.
    pub fn facts(&self) -> &F {
        &self.facts
    }

    /// Time since something was written last; none where the clock was put back.
    pub fn age(&self) -> Duration {
        let modified = self.file.metadata().and_then(|metadata| metadata.modified());
        modified.ok().and_then(|then| then.elapsed().ok()).unwrap_or_default()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The migration's id.
    pub fn id(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// Writes a new state down. It is there, whole, when this returns.
    ///
    /// # Errors
    /// What write(2) says.
    pub fn record(&mut self, state: S) -> Result<()> {
        if state != self.state {
            self.file.write_all_at(&self.format.head(state.word()), 0).map_err(failed("write", &self.path))?;
            self.state = state;
        }
        Ok(())
    }

    /// Writes new facts down.
    ///
    /// # Errors
    /// When there is no room.
    pub fn amend(&mut self, facts: F) -> Result<()>
    where
        F: Serialize,
    {
        let text = serde_json::to_vec(&facts).expect("facts are plain data");
        // Beside the old ones.
        let first = HEAD..HEAD + text.len();
        let old = self.format.offset..self.format.offset + self.format.length;
        let offset = if first.end <= old.start { HEAD } else { old.end };
        self.file.write_all_at(&text, offset as u64).map_err(failed("write", &self.path))?;
        let format = Format::of(offset, &text);
        self.file.write_all_at(&format.head(self.state.word()), 0).map_err(failed("write", &self.path))?;
        (self.facts, self.format) = (facts, format);
        Ok(())
    }

    /// Removes it: the migration is over.
    ///
    /// # Errors
    /// What unlink(2) says.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(failed("remove", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_session::decision::SourceRecord;
    use serde::Deserialize;

    const ID: &str = "00112233445566778899aabbccddeeff";

    #[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
    struct Facts {
        text: String,
    }

    fn facts(length: usize) -> Facts {
        Facts { text: "x".repeat(length) }
    }

    /// In a directory where everybody can make something, what is somebody else's is not ours.
    #[test]
    fn what_belongs_to_others_is_not_used() {
        use std::os::unix::fs::PermissionsExt;
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("not checked: needs root");
        }
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o1777)).unwrap();
        assert!(Journal::open(directory.path(), Side::Source).is_ok());
        std::os::unix::fs::chown(directory.path().join("source"), Some(65534), None).unwrap();
        assert!(matches!(Journal::open(directory.path(), Side::Source), Err(Error::Foreign { owner: 65534, .. })));
    }

    #[test]
    fn what_is_being_reserved_is_not_tidied_away() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path(), Side::Source).unwrap();
        std::fs::write(directory.path().join(format!("source/.{ID}")), "left").unwrap();
        let goes_on = std::sync::atomic::AtomicBool::new(true);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while goes_on.load(std::sync::atomic::Ordering::Relaxed) {
                    journal.tidy();
                }
            });
            let reserve = |id: &str| journal.reserve(id)?.publish(SourceRecord::Undecided, facts(1))?.remove();
            let outcome = (0..500u32).try_for_each(|number| reserve(&format!("{number:032x}")));
            goes_on.store(false, std::sync::atomic::Ordering::Relaxed);
            outcome.unwrap();
        });
        assert_eq!(std::fs::read_dir(directory.path().join("source")).unwrap().count(), 0);
    }

    #[test]
    fn entries_are_found_by_who_comes_after() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path(), Side::Source).unwrap();
        let reserved = journal.reserve(ID).unwrap();
        assert!(journal.ids().unwrap().is_empty());
        assert!(journal.find::<SourceRecord, Facts>(ID).unwrap().is_none());
        let mut entry = reserved.publish(SourceRecord::Undecided, facts(3)).unwrap();
        assert!(journal.is_in_use(ID));
        assert!(matches!(journal.find::<SourceRecord, Facts>(ID), Err(Error::InUse { .. })));
        assert!(matches!(journal.reserve(ID), Err(Error::InUse { .. })));
        for length in [1000, 10, 5000, 20000, 1] {
            entry.amend(facts(length)).unwrap();
            let seen = journal.peek::<SourceRecord, Facts>(&ID[..5]).unwrap().unwrap();
            assert_eq!(seen, (SourceRecord::Undecided, facts(length)));
        }
        entry.record(SourceRecord::Decided).unwrap();
        drop(entry);
        assert!(!journal.is_in_use(ID));
        let entry = journal.find::<SourceRecord, Facts>("0011").unwrap().unwrap();
        assert_eq!((entry.state(), entry.facts(), entry.id()), (SourceRecord::Decided, &facts(1), ID));
        entry.remove().unwrap();
        assert!(journal.ids().unwrap().is_empty());
    }

    #[test]
    fn what_was_reserved_and_left_is_tidied_away() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path(), Side::Destination).unwrap();
        let count = || std::fs::read_dir(directory.path().join("destination")).unwrap().count();
        let reserved = journal.reserve(ID).unwrap();
        journal.tidy();
        assert_eq!(count(), 1, "it is in use");
        drop(reserved);
        assert_eq!(count(), 0);
        std::fs::write(directory.path().join("destination").join(format!(".{ID}")), "left").unwrap();
        journal.tidy();
        assert_eq!(count(), 0);
    }

    #[test]
    fn nonsense_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path(), Side::Source).unwrap();
        for id in ["", "..", "xyz", "../../etc/passwd"] {
            assert!(matches!(journal.peek::<SourceRecord, Facts>(id), Err(Error::NoId(_))), "{id}");
            assert!(matches!(journal.reserve(id), Err(Error::NoId(_))), "{id}");
        }
        std::fs::write(directory.path().join("source").join(ID), "nonsense").unwrap();
        let error = journal.find::<SourceRecord, Facts>(ID).unwrap_err().to_string();
        assert!(error.contains(ID) && error.contains("damaged"), "{error}");
    }
}
