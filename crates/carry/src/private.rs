//! Files that only their owner may read: how they are read, and how they come into being whole.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use zeroize::Zeroizing;

/// What is wrong with a file, and what the system said where it failed.
#[derive(Debug)]
pub(crate) struct Unfit {
    pub(crate) reason: String,
    pub(crate) source: Option<io::Error>,
}

impl Unfit {
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), source: None }
    }

    pub(crate) fn is_missing(&self) -> bool {
        self.source.as_ref().is_some_and(|source| source.kind() == io::ErrorKind::NotFound)
    }

    fn system(reason: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self { reason: reason.to_owned(), source: Some(source) }
    }
}

/// Reads all of a regular file that belongs to this user or root, that nobody else can read, and that has `longest` bytes at most.
pub(crate) fn read(path: &Path, longest: usize) -> Result<Zeroizing<Vec<u8>>, Unfit> {
    // O_NONBLOCK: a FIFO must be refused below, not waited for.
    let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(Unfit::system("cannot be opened"))?;
    let metadata = file.metadata().map_err(Unfit::system("cannot be examined"))?;
    if !metadata.is_file() {
        return Err(Unfit::new("is not a regular file"));
    }
    check_owner(metadata.uid())?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Unfit::new(format!("mode {mode:04o} lets others at it; chmod 600 it")));
    }
    // Room for everything at once: a vector that grows leaves copies of the secret behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(longest + 1));
    file.take(longest as u64 + 1).read_to_end(&mut bytes).map_err(Unfit::system("cannot be read"))?;
    if bytes.len() > longest {
        return Err(Unfit::new(format!("has more than {longest} bytes")));
    }
    Ok(bytes)
}

fn check_owner(owner: u32) -> Result<(), Unfit> {
    if owner != 0 && owner != nix::unistd::geteuid().as_raw() {
        return Err(Unfit::new(format!("belongs to user {owner}, not to this user or root")));
    }
    Ok(())
}

/// Whether a directory, should it exist, belongs to this user or root and can be written to by its owner alone.
pub(crate) fn check_directory(path: &Path) -> Result<(), Unfit> {
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata.map_err(Unfit::system("cannot be examined"))?,
    };
    check_owner(metadata.uid())?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(Unfit::new(format!("mode {mode:04o} lets others write to it; chmod 700 it")));
    }
    Ok(())
}

/// Makes a directory that only its owner can use, with those above it; one that is there must be writable for its owner alone.
pub(crate) fn directory(path: &Path) -> Result<(), Unfit> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Unfit::system("cannot be made"))?;
    check_directory(path)
}

/// What to do where a file of the name exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existing {
    /// Put the new one in its place.
    Replace,
    /// Leave it, and say so.
    Keep,
}

/// Writes a file of mode 0600 so that whoever looks sees all of it or nothing; says whether it is there now.
pub(crate) fn write(path: &Path, content: &[u8], existing: Existing) -> Result<bool, Unfit> {
    let draft = draft_of(path);
    let written = (|| {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&draft)?;
        file.write_all(content)?;
        file.sync_all()?;
        match existing {
            Existing::Replace => fs::rename(&draft, path).map(|()| true),
            // N.B. rename(2) would replace what somebody else has put there meanwhile; link(2) does not.
            Existing::Keep => match fs::hard_link(&draft, path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
                linked => linked.map(|()| true),
            },
        }
    })();
    // After a rename there is none.
    let _ = fs::remove_file(&draft);
    written.map_err(Unfit::system("cannot be written"))
}

/// A name beside `path` that nobody else uses. Names that begin with a dot are passed over by those who list.
fn draft_of(path: &Path) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.{number}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_whole_private_and_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("below").join("file");
        super::directory(path.parent().unwrap()).unwrap();
        assert!(read(&path, 10).unwrap_err().is_missing());
        assert!(write(&path, b"one", Existing::Keep).unwrap());
        assert!(!write(&path, b"two", Existing::Keep).unwrap());
        assert_eq!(*read(&path, 10).unwrap(), b"one");
        assert!(write(&path, b"three", Existing::Replace).unwrap());
        assert_eq!(*read(&path, 5).unwrap(), b"three");
        assert!(read(&path, 4).is_err());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "drafts are left");
    }

    #[test]
    fn directories_that_others_can_write_to_are_refused() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o770)).unwrap();
        assert!(super::directory(directory.path()).unwrap_err().reason.contains("0770"));
    }
}
