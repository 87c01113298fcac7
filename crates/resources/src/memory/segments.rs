//! System V shared memory (sysvipc(7)): which segments a process has, and whether they can be had elsewhere.

use crate::{Error, Obstacle, Result};
use godwit_kernel::{Errno, ipc};
use godwit_tracee::read_maps;
use std::collections::BTreeMap;

/// The segments that a process has attached: id and key.
///
/// # Errors
/// When the process is gone.
pub fn attached(pid: i32) -> Result<BTreeMap<i32, i32>> {
    let mut segments = BTreeMap::new();
    for vma in read_maps(pid)?.into_iter().filter(|vma| vma.name.starts_with(b"/SYSV")) {
        let Ok(id) = i32::try_from(vma.inode) else { continue };
        match ipc::segment(id) {
            Ok(segment) => segments.insert(id, segment.key),
            // It was detached and removed since.
            Err(Errno::EINVAL | Errno::EIDRM) => None,
            Err(source) => return Err(Error::call(format!("System V shared memory {id}"), "shmctl", source)),
        };
    }
    Ok(segments)
}

/// Checks that nothing here has the ids and keys of segments.
#[must_use]
pub fn check(ids: &[i32], keys: &[i32]) -> Vec<Obstacle> {
    let obstacle = |what: String| {
        Obstacle::new(what, "the destination has one of its own", "run the page server in another IPC namespace")
    };
    let taken = |id: &&i32| !matches!(ipc::segment(**id), Err(Errno::EINVAL | Errno::EIDRM));
    let ids = ids.iter().filter(taken).map(|id| obstacle(format!("System V shared memory with id {id}")));
    let in_use = |key: &&i32| **key != libc::IPC_PRIVATE && ipc::find_segment(**key) != Err(Errno::ENOENT);
    let keys = keys.iter().filter(in_use).map(|key| obstacle(format!("System V shared memory with key {key:#x}")));
    ids.chain(keys).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_named() {
        let id = ipc::create_segment(libc::IPC_PRIVATE, 4096, 0o600).unwrap();
        let named: Vec<String> =
            check(&[id, i32::MAX], &[libc::IPC_PRIVATE]).into_iter().map(|one| one.resource).collect();
        ipc::remove_segment(id).unwrap();
        assert_eq!(named, [format!("System V shared memory with id {id}")]);
        assert!(check(&[id], &[]).is_empty());
    }
}
