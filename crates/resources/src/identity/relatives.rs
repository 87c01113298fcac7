//! Other processes that a process is tied to: children, a parent that shares its memory, those that it traces.

use crate::{Error, Obstacle, Result};
use godwit_kernel::process::{Compared, compare};
use godwit_tracee::read_status;
use std::cmp::Ordering;

fn numbered(directory: &str) -> std::io::Result<impl Iterator<Item = i32> + use<>> {
    Ok(std::fs::read_dir(directory)?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()))
}

/// All processes of the system.
pub(crate) fn processes() -> impl Iterator<Item = i32> {
    numbered("/proc").into_iter().flatten()
}

/// The threads of a process, the leader first.
pub(super) fn threads(pid: i32) -> Result<Vec<i32>> {
    let path = format!("/proc/{pid}/task");
    let mut tids: Vec<i32> = match numbered(&path) {
        Ok(tids) => tids.collect(),
        Err(source) => return Err(Error::Proc { path: path.into(), source }),
    };
    tids.sort_by_key(|&tid| tid != pid);
    Ok(tids)
}

/// Refuses a stopped process that has children by now.
///
/// # Errors
/// [`Error::Obstacle`] naming the first.
pub(super) fn refuse_children(pid: i32, tids: impl Iterator<Item = i32>) -> Result<()> {
    match tids.flat_map(|tid| children(pid, tid)).next() {
        None => Ok(()),
        Some(child) => Err(Error::Obstacle(Obstacle::new(
            describe(child),
            format!("is a child of process {pid}, born since it was looked at; process trees are not moved"),
            "run the same command again when the process has reaped it",
        ))),
    }
}

/// Lists the relatives that keep a process from being moved.
pub(super) fn inspect(pid: i32, tids: &[i32], parent: i32, obstacles: &mut Vec<Obstacle>) -> Result<()> {
    for &tid in tids {
        for child in children(pid, tid) {
            let text = format!("is a child of thread {tid}; process trees are not moved");
            obstacles.push(Obstacle::new(describe(child), text, "have the process end and reap its children first"));
        }
    }
    if parent != 0 && matches!(compare(pid, parent, Compared::AddressSpace), Ok(Ordering::Equal)) {
        let text = format!("shares its memory with its parent {} (vfork)", describe(parent));
        obstacles.push(Obstacle::new(format!("process {pid}"), text, ""));
    } else if parent != 0 {
        let shared = [(Compared::Descriptors, "descriptors"), (Compared::Filesystem, "working directory")];
        for (what, name) in shared {
            if matches!(compare(pid, parent, what), Ok(Ordering::Equal)) {
                let text = format!("shares its {name} with its parent {}", describe(parent));
                obstacles.push(Obstacle::new(format!("process {pid}"), text, ""));
            }
        }
    }
    obstacles.extend(tids.iter().flat_map(|&tid| unshared(pid, tid)));
    for tracee in processes() {
        let Ok(status) = read_status(tracee) else { continue };
        if status.number("TracerPid").is_some_and(|tracer| tids.contains(&(tracer as i32))) {
            obstacles.push(Obstacle::new(describe(tracee), format!("is traced by process {pid}"), "have it detach"));
        }
    }
    Ok(())
}

/// What a thread has of its own that the others share.
fn unshared(pid: i32, tid: i32) -> Vec<Obstacle> {
    let differs = |what| matches!(compare(pid, tid, what), Ok(Ordering::Less | Ordering::Greater));
    let mut own = vec![(Compared::Descriptors, "descriptors"), (Compared::Filesystem, "working directory")];
    own.retain(|(what, _)| differs(*what));
    // N.B. a thread that ends has none of these any more, or is gone meanwhile. It gives the memory back first.
    if !own.is_empty() && !matches!(compare(pid, tid, Compared::AddressSpace), Ok(Ordering::Equal)) {
        return Vec::new();
    }
    let obstacle = |(_, name)| Obstacle::new(format!("thread {tid}"), format!("has {name} of its own (unshare)"), "");
    own.into_iter().map(obstacle).collect()
}

fn children(pid: i32, tid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

fn describe(pid: i32) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("process {pid} ({})", comm.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    fn tids() -> Vec<i32> {
        let entries = std::fs::read_dir("/proc/self/task").unwrap();
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
    }

    #[test]
    fn threads_that_end_have_nothing_of_their_own() {
        let pid = std::process::id() as i32;
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    std::thread::spawn(|| {});
                }
            });
            for _ in 0..2000 {
                let found: Vec<_> = tids().into_iter().flat_map(|tid| unshared(pid, tid)).collect();
                if !found.is_empty() {
                    over.store(true, Relaxed);
                }
                assert_eq!(found, []);
            }
            over.store(true, Relaxed);
        });
    }

    #[test]
    fn a_thread_with_its_own_directory_is_found() {
        let pid = std::process::id() as i32;
        let found = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
            unshared(pid, nix::unistd::gettid().as_raw())
        });
        let found = found.join().unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].text.contains("working directory"), "{found:?}");
    }
}
