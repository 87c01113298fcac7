//! Where a process stands in the file system: working directory, root directory, file creation mask (chdir(2), chroot(2)).

use crate::{Error, Obstacle, Result};
use godwit_proto::image::{FdTypes, FileEntry, FsEntry, RegFileEntry};
use godwit_tracee::{Batch, Call, Outcome};
use std::os::unix::ffi::OsStrExt;

/// What the kernel appends to the name of something that has been removed.
const DELETED: &[u8] = b" (deleted)";
const MAX_PATH: usize = 4096;

/// Working directory, root directory and file creation mask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Working directory, as this process would reach it.
    pub cwd: Vec<u8>,
    /// Root directory, likewise.
    pub root: Vec<u8>,
    /// File creation mask.
    pub umask: u32,
}

impl Place {
    /// Composes the messages, giving the two directories the ids `first` and `first + 1`.
    #[must_use]
    pub fn to_messages(&self, first: u32) -> (FsEntry, Vec<FileEntry>) {
        let directory = |id: u32, path: &[u8]| FileEntry {
            r#type: FdTypes::Reg.into(),
            id,
            reg: Some(Box::new(RegFileEntry {
                id,
                flags: (libc::O_RDONLY | libc::O_DIRECTORY) as u32,
                name: String::from_utf8_lossy(path).into_owned(),
                mode: Some(libc::S_IFDIR),
                ..RegFileEntry::default()
            })),
            ..FileEntry::default()
        };
        let entry = FsEntry { cwd_id: first, root_id: first + 1, umask: Some(self.umask) };
        (entry, vec![directory(first, &self.cwd), directory(first + 1, &self.root)])
    }

    /// Reads what [`Place::to_messages`] composed, the directories being among `files`.
    ///
    /// # Errors
    /// When one of them is not there.
    pub fn from_messages(entry: &FsEntry, files: &[FileEntry]) -> Result<Self> {
        let path = |id: u32, what: &str| {
            let file = files.iter().filter_map(|file| file.reg.as_deref()).find(|file| file.id == id);
            let name = file.ok_or_else(|| Error::state(what, format!("no file {id}")))?.name.as_bytes();
            if !name.starts_with(b"/") || name.len() >= MAX_PATH || name.contains(&0) {
                return Err(Error::state(what, "not an absolute path"));
            }
            Ok(name.to_vec())
        };
        Ok(Self {
            cwd: path(entry.cwd_id, "working directory")?,
            root: path(entry.root_id, "root directory")?,
            umask: entry.umask.unwrap_or(0o022) & 0o777,
        })
    }
}

fn link(pid: i32, name: &str) -> Result<Vec<u8>> {
    let path = format!("/proc/{pid}/{name}");
    let target = std::fs::read_link(&path).map_err(|source| Error::Proc { path: path.into(), source })?;
    Ok(target.as_os_str().as_bytes().to_vec())
}

/// Reads working and root directory of a process; its mask is 0 in the result.
///
/// # Errors
/// When it is gone.
pub fn directories(pid: i32) -> Result<Place> {
    Ok(Place { cwd: link(pid, "cwd")?, root: link(pid, "root")?, umask: 0 })
}

/// Lists what of a place cannot be moved.
#[must_use]
pub fn obstacles(place: &Place) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    for (what, path) in [("working directory", &place.cwd), ("root directory", &place.root)] {
        let name = String::from_utf8_lossy(path);
        if path.ends_with(DELETED) {
            obstacles.push(Obstacle::new(
                format!("{what} {name}"),
                "has been removed",
                "have the process change directory",
            ));
        } else if !path.starts_with(b"/") {
            obstacles.push(Obstacle::new(format!("{what} {name}"), "cannot be reached from here", ""));
        } else if std::str::from_utf8(path).is_err() {
            obstacles.push(Obstacle::new(format!("{what} {name}"), "is not named in UTF-8", ""));
        }
    }
    obstacles
}

/// Says of an executable that has been removed that the destination could not open it.
#[must_use]
pub fn executable_obstacle(path: &[u8]) -> Option<Obstacle> {
    let known = path.strip_suffix(DELETED)?;
    let known = String::from_utf8_lossy(known);
    let text = "has been removed or replaced since it was started";
    let remedy = "start it anew from the file that is there now, or from a copy that stays";
    Some(Obstacle::new(format!("executable {known}"), text, remedy))
}

/// A question about the file creation mask, asked in a batch (umask(2)).
pub(crate) struct MaskQuestion(Call);

impl MaskQuestion {
    pub(crate) fn ask(batch: &mut Batch) -> Self {
        // It can only be read by setting it; the second call puts it back before anybody else can run.
        let mask = batch.call("umask", libc::SYS_umask, &[0u64.into()]);
        batch.call("umask", libc::SYS_umask, &[mask.into()]);
        Self(mask)
    }

    pub(crate) fn answer(self, outcome: &Outcome) -> u32 {
        outcome.result(self.0).map_or(0o022, |mask| mask as u32)
    }
}

/// Adds the calls that put a process in its place. It must still be root: directories may be closed to its own user.
pub(crate) fn set(batch: &mut Batch, place: &Place) {
    let cwd = batch.string(&place.cwd);
    let what = format!("changing to directory {}", String::from_utf8_lossy(&place.cwd));
    batch.call(what, libc::SYS_chdir, &[cwd.into()]);
    if place.root != b"/" {
        let root = batch.string(&place.root);
        let what = format!("changing root directory to {}", String::from_utf8_lossy(&place.root));
        batch.call(what, libc::SYS_chroot, &[root.into()]);
    }
    batch.call("umask", libc::SYS_umask, &[place.umask.into()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_survives_its_messages() {
        let place = Place { cwd: b"/tmp".to_vec(), root: b"/".to_vec(), umask: 0o027 };
        let (entry, files) = place.to_messages(7);
        assert_eq!(Place::from_messages(&entry, &files).unwrap(), place);
        assert!(Place::from_messages(&entry, &files[1..]).is_err());
        let relative = Place { cwd: b"tmp".to_vec(), ..place };
        let (entry, files) = relative.to_messages(1);
        assert!(Place::from_messages(&entry, &files).is_err());
    }
}
