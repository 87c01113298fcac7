//! Namespaces that a process does not share with this one (namespaces(7)).
//!
//! Two kinds are moved: a time namespace, as offsets of clocks, and a PID namespace that holds only the process and its
//! init, which is made anew.

use crate::{Error, Obstacle, Result};
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const NANOSECONDS: i64 = 1_000_000_000;

fn namespace(pid: &str, kind: &str) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

/// Lists the namespaces that keep a process from being moved; `inner` is its pid as it sees it itself.
pub(super) fn inspect(pid: i32, inner: i32, obstacles: &mut Vec<Obstacle>) -> Result<()> {
    let id = pid.to_string();
    // Network namespaces are the business of who knows what becomes of them.
    let kinds = [("mnt", "mount"), ("ipc", "IPC"), ("uts", "UTS"), ("user", "user"), ("cgroup", "cgroup")];
    for (kind, name) in kinds {
        let option = if kind == "mnt" { "mount" } else { kind };
        let same = namespace(&id, kind) == namespace("self", kind);
        // `ip netns exec` gives every command a mount namespace of its own, in which only /sys differs.
        let excused = kind == "mnt" && is_of_ip_netns(&id) && mounts(&id) == mounts("self");
        if !same && !excused {
            obstacles.push(Obstacle::new(
                format!("process {pid}"),
                format!("is in another {name} namespace than this program"),
                format!("run this program there: nsenter --target {pid} --{option}, if the destination's page server is in one alike"),
            ));
        }
    }
    if namespace(&id, "pid") != namespace("self", "pid") {
        inspect_pid_namespace(pid, inner, obstacles);
    }
    if namespace(&id, "pid") != namespace(&id, "pid_for_children") {
        obstacles.push(Obstacle::new(format!("process {pid}"), "creates children in another PID namespace", ""));
    }
    Ok(())
}

/// Whether a mount namespace comes from `ip netns exec` (ip-netns(8)), which gives every command one of its own: nobody chose
/// it, and only /sys differs, whose source is the name of the network namespace.
fn is_of_ip_netns(pid: &str) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    let mut of_sys = text
        .lines()
        .filter_map(|line| line.split_once(" - "))
        .filter(|(mount, system)| mount.split(' ').nth(4) == Some("/sys") && system.starts_with("sysfs "));
    let source = of_sys.next_back().and_then(|(_, system)| system.split(' ').nth(1));
    let network = std::fs::metadata(format!("/proc/{pid}/ns/net")).map(|file| (file.dev(), file.ino())).ok();
    source.is_some_and(|name| {
        let named = std::fs::metadata(Path::new("/run/netns").join(name)).map(|file| (file.dev(), file.ino())).ok();
        named.is_some() && named == network
    })
}

/// What a process sees mounted where: (root within the file system, mount point, type), leaving out /proc and /sys, which show
/// each process its own namespaces anyway (proc_pid_mountinfo(5)).
fn mounts(pid: &str) -> Option<BTreeSet<(String, String, String)>> {
    Some(parse_mounts(&std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?))
}

pub(crate) fn parse_mounts(text: &str) -> BTreeSet<(String, String, String)> {
    let below =
        |point: &str, top: &str| point.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let mount = |line: &str| {
        let (mount, system) = line.split_once(" - ")?;
        let mut words = mount.split(' ').skip(3);
        let (root, point) = (words.next()?, words.next()?);
        let kind = system.split(' ').next()?;
        (!below(point, "/proc") && !below(point, "/sys")).then(|| (root.to_owned(), point.to_owned(), kind.to_owned()))
    };
    text.lines().filter_map(mount).collect()
}

/// A PID namespace can be made anew for one process, but not be shared with others that stay behind.
fn inspect_pid_namespace(pid: i32, inner: i32, obstacles: &mut Vec<Obstacle>) {
    if inner == 1 {
        obstacles.push(Obstacle::new(format!("process {pid}"), "is the init of its PID namespace", ""));
        return;
    }
    let theirs = namespace(&pid.to_string(), "pid");
    let mut others = Vec::new();
    for other in super::relatives::processes().filter(|&other| other != pid) {
        if namespace(&other.to_string(), "pid") != theirs {
            continue;
        }
        let is_init = godwit_tracee::read_status(other).is_ok_and(|status| status.numbers("NSpid").last() == Some(&1));
        if !is_init {
            others.push(other.to_string());
        }
    }
    if !others.is_empty() {
        let text = format!("shares its PID namespace with others ({})", others.join(", "));
        obstacles.push(Obstacle::new(format!("process {pid}"), text, "run this program inside that namespace"));
    }
}

/// How far the CLOCK_MONOTONIC and CLOCK_BOOTTIME of a process are ahead of ours, in nanoseconds (time_namespaces(7)).
pub(super) fn clocks_ahead(pid: i32) -> Result<(i64, i64)> {
    if namespace(&pid.to_string(), "time") == namespace("self", "time") {
        return Ok((0, 0));
    }
    let (theirs, ours) = (offsets(&pid.to_string())?, offsets("self")?);
    Ok((theirs.0.saturating_sub(ours.0), theirs.1.saturating_sub(ours.1)))
}

fn offsets(pid: &str) -> Result<(i64, i64)> {
    let path = format!("/proc/{pid}/timens_offsets");
    match std::fs::read_to_string(&path) {
        Ok(text) => parse_offsets(&text).ok_or_else(|| Error::state(path, "an unknown form")),
        Err(source) => Err(Error::Proc { path: path.into(), source }),
    }
}

pub(crate) fn parse_offsets(text: &str) -> Option<(i64, i64)> {
    let of = |clock: &str| {
        let mut words = text.lines().find_map(|line| line.strip_prefix(clock))?.split_whitespace();
        let (seconds, nanoseconds): (i64, i64) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        seconds.checked_mul(NANOSECONDS)?.checked_add(nanoseconds)
    };
    Some((of("monotonic")?, of("boottime")?))
}

/// Whether a map of user_namespaces(7) has the id.
pub(crate) fn maps(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let words: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        matches!(words[..], [first, _, count] if (first..first.saturating_add(count)).contains(&u64::from(id)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_may_be_negative() {
        let text = "monotonic         -5         250000000\nboottime           7         0\n";
        assert_eq!(parse_offsets(text), Some((-4_750_000_000, 7_000_000_000)));
        assert_eq!(parse_offsets("monotonic 1"), None);
    }

    #[test]
    fn maps_have_ranges() {
        let map = "         0     100000      65536\n";
        assert!(maps(map, 0) && maps(map, 65535) && !maps(map, 65536));
    }
}
