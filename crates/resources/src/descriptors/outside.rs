//! Who else holds a pipe, named pipe or socket: found by reading where the descriptors of all processes lead.

use crate::descriptors::table::Directory;
use std::collections::{BTreeSet, HashMap};

/// Another process that holds something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) pid: i32,
    pub(crate) comm: String,
}

/// Finds for each of `wanted` (links as in /proc/PID/fd) a process that has it open and is not among `insiders`, nor a child of
/// `maker`, which has lent it what it has.
///
/// Processes that end meanwhile are passed over. Every thread group has a descriptor table of its own, apart from
/// rare uses of clone(2) that other inspections refuse.
pub(crate) fn holders(insiders: &[i32], maker: Option<i32>, wanted: &BTreeSet<Vec<u8>>) -> HashMap<Vec<u8>, Holder> {
    let mut found = HashMap::new();
    if wanted.is_empty() {
        return found;
    }
    let Ok(processes) = std::fs::read_dir("/proc") else { return found };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for other in pids.filter(|other| !insiders.contains(other)) {
        let Ok(directory) = Directory::open(other) else { continue };
        let is_lent = || maker.is_some() && parent(other) == maker;
        for fd in directory.numbers().unwrap_or_default() {
            let Ok(Some(link)) = directory.link(fd) else { continue };
            if wanted.contains(&link) && !found.contains_key(&link) {
                if is_lent() {
                    break;
                }
                let comm = std::fs::read_to_string(format!("/proc/{other}/comm")).unwrap_or_default();
                found.insert(link, Holder { pid: other, comm: comm.trim().to_owned() });
            }
        }
    }
    found
}

/// The parent of a process, as proc_pid_stat(5) tells it.
fn parent(pid: i32) -> Option<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // N.B. the name before may have parentheses and blanks in it.
    text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_child_was_lent_has_no_other_holder() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let kept = socket.try_clone().unwrap();
        let mut child =
            std::process::Command::new("sleep").arg("20").stdin(std::os::fd::OwnedFd::from(socket)).spawn().unwrap();
        use std::os::fd::AsRawFd;
        let link = std::fs::read_link(format!("/proc/self/fd/{}", kept.as_raw_fd())).unwrap();
        let wanted = BTreeSet::from([link.into_os_string().into_encoded_bytes()]);
        let own = std::process::id() as i32;
        let (seen, lent) = (holders(&[own], None, &wanted), holders(&[own], Some(own), &wanted));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(seen.values().map(|holder| holder.pid).collect::<Vec<_>>(), [child.id() as i32]);
        assert!(lent.is_empty());
    }
}
