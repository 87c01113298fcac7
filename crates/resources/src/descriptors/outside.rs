//! Who else holds a pipe, named pipe or socket: found by reading where the descriptors of all processes lead.

use crate::descriptors::table::Directory;
use std::collections::{BTreeSet, HashMap};

/// Another process that holds something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) pid: i32,
    pub(crate) comm: String,
}

/// Finds for each of `wanted` (links as in /proc/PID/fd) a process that has it open and is not among `insiders`.
///
/// Processes that end meanwhile are passed over. Every thread group has a descriptor table of its own, apart from
/// rare uses of clone(2) that other inspections refuse.
pub(crate) fn holders(insiders: &[i32], wanted: &BTreeSet<Vec<u8>>) -> HashMap<Vec<u8>, Holder> {
    let mut found = HashMap::new();
    if wanted.is_empty() {
        return found;
    }
    let Ok(processes) = std::fs::read_dir("/proc") else { return found };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for other in pids.filter(|other| !insiders.contains(other)) {
        let Ok(directory) = Directory::open(other) else { continue };
        for fd in directory.numbers().unwrap_or_default() {
            let Ok(Some(link)) = directory.link(fd) else { continue };
            if wanted.contains(&link) && !found.contains_key(&link) {
                let comm = std::fs::read_to_string(format!("/proc/{other}/comm")).unwrap_or_default();
                found.insert(link, Holder { pid: other, comm: comm.trim().to_owned() });
            }
        }
    }
    found
}
