//! What can go wrong with a journal.

use std::io;
use std::path::PathBuf;

/// An error of a journal; says which file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read, written, made or removed.
    #[error("cannot {doing} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file does not hold what it should.
    #[error(
        "{path} is damaged: {why}. What stood there is lost; `migrate status` at the other host says how the migration stands, and this \
         file can be removed when that is settled",
        path = .path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A process works on this migration already.
    #[error("{path} is in use: a process works on this migration", path = .path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Others can write to a directory.
    #[error("{path} has mode {mode:04o}, which lets others write to it; chmod 700 it", path = .path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A directory is somebody else's.
    #[error("{path} belongs to user {owner}, who could write to it", path = .path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// It is no id of a migration.
    #[error("`{0}` is no migration id: 32 hexadecimal digits, or the first of them")]
    NoId(String),
    /// More than one migration begins like this.
    #[error("`{0}` stands for more than one migration: give more digits")]
    Ambiguous(String),
}

/// A result of a journal.
pub type Result<T, E = Error> = std::result::Result<T, E>;
