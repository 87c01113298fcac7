//! Shared memory that other processes have mapped, too: moved away with one of them it would be two.

use super::Backing;
use crate::{Obstacle, Result};
use godwit_proto::wire::shared_object::Kind;
use godwit_tracee::{Vma, read_maps};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What tells one shared object from another: device, inode and name (proc_pid_maps(5)).
type Identity = (u64, u64, Vec<u8>);

/// One mapping of such an object.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    start: u64,
    kind: Kind,
    is_writable: bool,
}

fn shared_objects(vmas: Vec<Vma>) -> impl Iterator<Item = (Identity, Mapping)> {
    vmas.into_iter().filter(|vma| vma.shared).filter_map(|vma| match Backing::of(&vma) {
        Backing::Object(kind) => {
            let is_writable = vma.protection & libc::PROT_WRITE != 0;
            Some(((vma.device, vma.inode, vma.name), Mapping { start: vma.start, kind, is_writable }))
        }
        _ => None,
    })
}

/// Names what a process has mapped without a file behind it, or with a deleted one, and another process has, too, where one of them may
/// write to it. Processes that end meanwhile are passed over.
///
/// # Errors
/// When the process is gone.
pub(super) fn obstacles(pid: i32) -> Result<Vec<Obstacle>> {
    let ipc = |pid: i32| -> Option<PathBuf> { std::fs::read_link(format!("/proc/{pid}/ns/ipc")).ok() };
    let mut own: BTreeMap<Identity, Mapping> = BTreeMap::new();
    for (identity, mapping) in shared_objects(read_maps(pid)?) {
        own.entry(identity).or_insert(mapping).is_writable |= mapping.is_writable;
    }
    let mut obstacles = Vec::new();
    let own_ipc = ipc(pid);
    for other in crate::identity::processes().filter(|&other| other != pid) {
        if own.is_empty() {
            break;
        }
        for (identity, theirs) in shared_objects(read_maps(other).unwrap_or_default()) {
            // N.B. segments of System V are counted anew in each IPC namespace.
            let is_same = |kind: Kind| kind != Kind::Sysv || ipc(other) == own_ipc;
            let is_shared = |own: &&Mapping| (own.is_writable || theirs.is_writable) && is_same(own.kind);
            let Some(start) = own.get(&identity).filter(is_shared).map(|own| own.start) else { continue };
            own.remove(&identity);
            let comm = std::fs::read_to_string(format!("/proc/{other}/comm")).unwrap_or_default();
            obstacles.push(Obstacle::new(
                format!("mapping at {start:#x} ({})", String::from_utf8_lossy(&identity.2)),
                format!("process {other}, {}, shares this memory, and would no longer", comm.trim()),
                "end that process, or have it unmap this memory",
            ));
        }
    }
    Ok(obstacles)
}
