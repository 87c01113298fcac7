//! Files that have a path at both hosts (regular files, directories, devices, anything opened with `O_PATH`), and files
//! without one, which are opened anew on the object that holds their content.

use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_proto::image::{FdTypes, FileEntry, MemfdFileEntry, RegFileEntry};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{Whence, lseek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Flags that an open file description keeps.
const KEPT: OFlag = OFlag::O_ACCMODE
    .union(OFlag::O_APPEND)
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_SYNC)
    .union(OFlag::O_DSYNC)
    .union(OFlag::O_DIRECT)
    .union(OFlag::O_NOATIME)
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_PATH);

/// The path in a link, without the mark that /proc puts behind the path of a deleted file.
pub(crate) fn path(link: &[u8]) -> Result<String> {
    let path = link.strip_suffix(b" (deleted)").unwrap_or(link);
    let text = std::str::from_utf8(path).map_err(|_| Error::state(String::from_utf8_lossy(path), "not UTF-8"))?;
    Ok(text.to_owned())
}

/// Collects a file that has a path.
pub(crate) fn collect(entry: &Entry, id: u32) -> Result<FileEntry> {
    let name = std::str::from_utf8(&entry.link).map_err(|_| Error::state(entry.name(), "not UTF-8"))?.to_owned();
    Ok(message(id, RegFileEntry { name, ..basic(entry, id) }))
}

/// Collects a deleted file whose content is shared object `object`.
pub(crate) fn collect_deleted(entry: &Entry, id: u32, object: u32) -> Result<FileEntry> {
    Ok(message(id, RegFileEntry { name: path(&entry.link)?, object: Some(object), ..basic(entry, id) }))
}

/// Collects a memfd whose content is shared object `object`.
pub(crate) fn collect_memfd(entry: &Entry, id: u32, object: u32) -> FileEntry {
    let memfd = MemfdFileEntry {
        id,
        flags: entry.info.status_flags() as u32,
        pos: entry.info.pos,
        inode_id: object,
        ..MemfdFileEntry::default()
    };
    FileEntry { r#type: FdTypes::Memfd as i32, id, memfd: Some(memfd.into()), ..FileEntry::default() }
}

fn basic(entry: &Entry, id: u32) -> RegFileEntry {
    RegFileEntry {
        id,
        flags: entry.info.status_flags() as u32,
        pos: entry.info.pos,
        size: Some(entry.stat.st_size as u64),
        mode: Some(entry.stat.st_mode),
        ..RegFileEntry::default()
    }
}

/// Wraps a file.
pub(crate) fn message(id: u32, reg: RegFileEntry) -> FileEntry {
    FileEntry { r#type: FdTypes::Reg as i32, id, reg: Some(RegFileEntry { id, ..reg }.into()), ..FileEntry::default() }
}

/// Opens a file once more, as an open file description of its own.
pub(crate) fn reopen(file: BorrowedFd<'_>, flags: OFlag) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // N.B. the last part of this path is a symbolic link.
    let kept = flags & KEPT & !OFlag::O_NOFOLLOW & !OFlag::O_DIRECTORY;
    open(path.as_str(), kept | OFlag::O_CLOEXEC | OFlag::O_NOCTTY, Mode::empty())
}

/// Opens a file at the destination as it was open at the source.
pub(crate) fn rebuild(reg: &RegFileEntry) -> Result<OwnedFd> {
    let failed = |what| move |source| Error::call(&reg.name, what, source);
    let wanted = OFlag::from_bits_truncate(reg.flags as i32);
    let external = reg.ext == Some(true);
    let created = if external { wanted & OFlag::O_CREAT } else { OFlag::empty() };
    let flags = wanted & KEPT | created | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    let file = open(reg.name.as_str(), flags, Mode::from_bits_truncate(0o644)).map_err(failed("open"))?;
    if external {
        return Ok(file);
    }
    let found = fstat(&file).map_err(failed("fstat"))?.st_mode & libc::S_IFMT;
    if reg.mode.is_some_and(|mode| mode & libc::S_IFMT != found) {
        return Err(Error::state(&reg.name, "it is of another type at the destination"));
    }
    let seeks = matches!(SFlag::from_bits_truncate(found), SFlag::S_IFREG | SFlag::S_IFDIR);
    if seeks && !wanted.contains(OFlag::O_PATH) {
        seek(file.as_fd(), reg.pos).map_err(failed("lseek"))?;
    }
    Ok(file)
}

/// Opens a file without a path on the object that holds its content.
pub(crate) fn rebuild_on(object: BorrowedFd<'_>, flags: u32, pos: u64, resource: &str) -> Result<OwnedFd> {
    let failed = |what| move |source| Error::call(resource, what, source);
    let file = reopen(object, OFlag::from_bits_truncate(flags as i32)).map_err(failed("opening it again"))?;
    seek(file.as_fd(), pos).map_err(failed("lseek"))?;
    Ok(file)
}

fn seek(file: BorrowedFd<'_>, pos: u64) -> Result<(), Errno> {
    if pos == 0 {
        return Ok(());
    }
    // An offset of a directory may use all 64 bits.
    lseek(file, pos as i64, Whence::SeekSet).map(drop)
}
