//! The file that a UNIX socket is bound to. At the destination a socket file that is there already (left behind, or the
//! source's own where both hosts share a file system) is replaced only when the move is settled, so that a move that fails
//! leaves it as it was.

use super::kind::refuse;
use super::table::Entry;
use super::unix_socket::printable;
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::unix_socket_file;
use godwit_proto::image::{FilePermsEntry, UnixSkEntry};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::socket::{UnixAddr, bind};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat, fstat, lstat};
use nix::unistd::{Gid, Uid, chown, unlink};
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A socket file in the making.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Where the new file waits while an older one has the path.
    hidden: Option<PathBuf>,
    settled: bool,
}

impl SocketFile {
    /// Has the new file take its path for good.
    pub(crate) fn settle(mut self) -> Result<()> {
        self.settled = true;
        let Some(hidden) = &self.hidden else { return Ok(()) };
        std::fs::rename(hidden, &self.path).map_err(|source| {
            let source = source.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            Error::call(format!("UNIX socket {}", self.path.display()), "rename", source)
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.settled {
            let _ = unlink(self.hidden.as_ref().unwrap_or(&self.path));
        }
    }
}

/// The path in a name, unless it is abstract or empty.
fn path_of(name: &[u8]) -> Option<&Path> {
    (!matches!(name.first(), None | Some(0))).then(|| Path::new(OsStr::from_bytes(name)))
}

/// Refuses a bound path that cannot be had again.
pub(crate) fn verdict(entry: &Entry, what: &str, name: &[u8]) -> Result<()> {
    let Some(path) = path_of(name) else { return Ok(()) };
    if !path.is_absolute() {
        return refuse(entry, what, "it is bound under a relative path");
    }
    let bound = unix_socket_file(entry.file.as_fd()).and_then(fstat).map_err(entry.error("SIOCUNIXFILE"))?;
    match lstat(path) {
        Ok(found) if (found.st_dev, found.st_ino) == (bound.st_dev, bound.st_ino) => Ok(()),
        _ => refuse(entry, what, "its file is gone, or another one has its path"),
    }
}

/// Reads owner and mode of the file.
pub(crate) fn permissions(entry: &Entry, name: &[u8]) -> Result<Option<FilePermsEntry>> {
    if path_of(name).is_none() {
        return Ok(None);
    }
    let stat = unix_socket_file(entry.file.as_fd()).and_then(fstat).map_err(entry.error("SIOCUNIXFILE"))?;
    Ok(Some(FilePermsEntry { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid }))
}

/// Binds a socket to its path.
pub(crate) fn bind_path(socket: &OwnedFd, message: &UnixSkEntry) -> Result<SocketFile> {
    let resource = format!("UNIX socket {}", printable(&message.name));
    let failed = |what| {
        let resource = resource.clone();
        move |source| Error::call(resource, what, source)
    };
    let path = path_of(&message.name).filter(|path| path.is_absolute());
    let path = path.ok_or_else(|| Error::state(&resource, "its path is not absolute"))?;
    let file = place(socket, path).map_err(failed("bind"))?;
    if let Some(wanted) = &message.file_perms {
        let made = file.hidden.as_deref().unwrap_or(path);
        chown(made, Some(Uid::from_raw(wanted.uid)), Some(Gid::from_raw(wanted.gid))).map_err(failed("chown"))?;
        let mode = Mode::from_bits_truncate(wanted.mode);
        fchmodat(AT_FDCWD, made, mode, FchmodatFlags::FollowSymlink).map_err(failed("chmod"))?;
    }
    Ok(file)
}

/// Binds to `path`. The address of a socket is the path it was bound to, so an older file has to make way for a moment.
fn place(socket: &OwnedFd, path: &Path) -> Result<SocketFile, Errno> {
    let address = UnixAddr::new(path)?;
    match lstat(path) {
        Err(Errno::ENOENT) => {
            bind(socket.as_raw_fd(), &address)?;
            return Ok(SocketFile { path: path.to_owned(), hidden: None, settled: false });
        }
        Err(source) => return Err(source),
        Ok(stat) if stat.st_mode & libc::S_IFMT != libc::S_IFSOCK => return Err(Errno::EADDRINUSE),
        Ok(_) => {}
    }
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(format!(".godwit-{}", std::process::id()));
    let hidden = PathBuf::from(hidden);
    renameat2(AT_FDCWD, path, AT_FDCWD, &hidden, RenameFlags::RENAME_NOREPLACE)?;
    if let Err(source) = bind(socket.as_raw_fd(), &address) {
        renameat2(AT_FDCWD, &hidden, AT_FDCWD, path, RenameFlags::RENAME_NOREPLACE)?;
        return Err(source);
    }
    renameat2(AT_FDCWD, path, AT_FDCWD, &hidden, RenameFlags::RENAME_EXCHANGE)?;
    Ok(SocketFile { path: path.to_owned(), hidden: Some(hidden), settled: false })
}
