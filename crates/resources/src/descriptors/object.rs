//! Files without a path, described as the shared objects that their content travels as.

use super::regular;
use crate::{Error, Result};
use godwit_proto::wire::{SharedObject, shared_object::Kind};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use std::os::fd::BorrowedFd;

const MFD_ALLOW_SEALING: u32 = 2;
const MFD_HUGETLB: u32 = 4;

/// Describes the file behind a descriptor whose link under /proc/PID/fd (or map_files) is `link`: a memfd, or a file whose last
/// link is gone. The number is left at 0. Device and inode identify it.
///
/// # Errors
/// When the descriptor or the link is unusable.
pub fn shared_object(file: BorrowedFd<'_>, link: &[u8]) -> Result<SharedObject> {
    let path = regular::path(link)?;
    let failed = |what| {
        let path = path.clone();
        move |source| Error::call(path, what, source)
    };
    let stat = fstat(file).map_err(failed("fstat"))?;
    let file_system = fstatfs(file).map_err(failed("fstatfs"))?;
    let huge = file_system.filesystem_type() == HUGETLBFS_MAGIC;
    let memfd = path.strip_prefix("/memfd:");
    let seals = match memfd {
        Some(_) => fcntl(file, FcntlArg::F_GET_SEALS).map_err(failed("F_GET_SEALS"))? as u32,
        None => 0,
    };
    // A memfd made without MFD_ALLOW_SEALING has exactly F_SEAL_SEAL.
    let sealable = if memfd.is_some() && seals != libc::F_SEAL_SEAL as u32 { MFD_ALLOW_SEALING } else { 0 };
    let kind = match (memfd, huge) {
        (_, true) => Kind::Hugetlb,
        (Some(_), false) => Kind::Memfd,
        (None, false) => Kind::GhostFile,
    };
    Ok(SharedObject {
        kind: kind.into(),
        size: stat.st_size as u64,
        name: memfd.unwrap_or(&path).to_owned(),
        memfd_flags: sealable | if huge && memfd.is_some() { MFD_HUGETLB } else { 0 },
        seals,
        device: stat.st_dev,
        inode: stat.st_ino,
        path: if memfd.is_some() { String::new() } else { path },
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        huge_page_size: if huge { file_system.block_size() as u64 } else { 0 },
        ..SharedObject::default()
    })
}
