//! Naming a process so that no later one of the same pid is meant.

use serde::{Deserialize, Serialize};

/// A process of one PID namespace and one run of the kernel. proc_pid_stat(5)
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ProcessName {
    /// Its pid.
    pub pid: i32,
    /// When it was started, in clock ticks since the kernel was.
    pub start_time: u64,
    /// /proc/sys/kernel/random/boot_id. random(4)
    pub boot_id: String,
    /// The inode of its PID namespace, as whoever wrote this was in. pid_namespaces(7)
    pub pid_namespace: u64,
}

impl ProcessName {
    /// Names a process that there is.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        Some(Self { pid, start_time: start_time(pid)?, boot_id: boot_id()?, pid_namespace: pid_namespace()? })
    }

    /// Whether it is a process that this one can know of: the same kernel, not begun anew, and the same pids.
    #[must_use]
    pub fn is_of_here(&self) -> bool {
        boot_id().as_ref() == Some(&self.boot_id) && pid_namespace() == Some(self.pid_namespace)
    }

    /// Whether it is there, and no zombie. One whose first thread has ended is there as long as others go on.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.is_of_here() && start_time(self.pid) == Some(self.start_time)
    }

    /// Whether it will not run another instruction of its own: it is not there, or all its threads are on their way out (and without
    /// memory by now). Other threads may go on when the first one has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let is_it = || fields(&stat(self.pid)?)?.nth(19)?.parse::<u64>().ok();
        !self.is_of_here() || is_it() != Some(self.start_time) || !has_going_threads(self.pid)
    }
}

/// Whether a thread of a process is not on its way out.
fn has_going_threads(pid: i32) -> bool {
    /// As in sched.h. N.B. the state of a thread that ends is this and that; this flag stays.
    const EXITING: u64 = 0x4;
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let flags = |stat: String| fields(&stat)?.nth(6)?.parse::<u64>().ok();
    let mut stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
    stats.any(|stat| flags(stat).is_some_and(|flags| flags & EXITING == 0))
}

/// The id of this run of the kernel.
fn boot_id() -> Option<String> {
    Some(std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned())
}

fn pid_namespace() -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    Some(std::fs::metadata("/proc/self/ns/pid").ok()?.ino())
}

fn stat(pid: i32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()
}

/// What stands behind the name: fields 3 and up. It may hold anything itself; what follows its closing parenthesis is fixed.
fn fields(stat: &str) -> Option<std::str::SplitAsciiWhitespace<'_>> {
    Some(stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace())
}

/// Field 22 of /proc/PID/stat; `None` when it is gone or a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let stat = stat(pid)?;
    let has_ended = matches!(fields(&stat)?.next()?, "Z" | "X");
    if has_ended && !has_going_threads(pid) {
        return None;
    }
    fields(&stat)?.nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_told_apart() {
        let own = ProcessName::of(std::process::id() as i32).unwrap();
        assert!(own.is_there() && own.is_of_here() && !own.is_over());
        assert!(!ProcessName { start_time: own.start_time + 1, ..own.clone() }.is_there());
        assert!(!ProcessName { boot_id: String::new(), ..own }.is_there());
        assert_eq!(ProcessName::of(i32::MAX), None);
    }

    #[test]
    fn a_zombie_is_over() {
        let mut child = std::process::Command::new("sleep").arg("20").spawn().unwrap();
        let name = ProcessName::of(child.id() as i32).unwrap();
        assert!(!name.is_over());
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        // N.B. not waited for.
        while name.is_there() || !name.is_over() {
            assert!(std::time::Instant::now() < deadline);
        }
        child.wait().unwrap();
        assert!(name.is_over());
    }

    #[test]
    fn a_process_without_its_first_thread_is_there() {
        const LEAVES: &str = "import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).pthread_exit(None)";
        let mut python = std::process::Command::new("python3");
        let mut child = python.args(["-c", LEAVES]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = child.id() as i32;
        let name = ProcessName::of(pid).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while stat(pid).is_none_or(|stat| fields(&stat).unwrap().next() != Some("Z")) {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(name.is_there() && !name.is_over());
        child.kill().unwrap();
        while name.is_there() {
            assert!(std::time::Instant::now() < deadline);
        }
        child.wait().unwrap();
    }
}
