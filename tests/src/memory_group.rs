//! Memory that is short.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

/// A control group for memory, cgroups(7), of either version.
#[derive(Debug)]
pub struct MemoryGroup {
    path: PathBuf,
    limit: &'static str,
    usage: &'static str,
    nothing: &'static str,
}

/// What may still be had of full memory: the programs need some to say that there is none.
const LEFT: u64 = 2 << 20;

impl MemoryGroup {
    /// Makes a group of a process and its future children.
    ///
    /// # Errors
    /// There can be none.
    pub fn around(host_pid: u32) -> Result<Self> {
        let name = format!("godwit-test-{}-{host_pid}", std::process::id());
        let (root, limit, usage, nothing) = if PathBuf::from("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists() {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "-1")
        } else {
            // Controllers are handed down by hand.
            let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
            ("/sys/fs/cgroup", "memory.max", "memory.current", "max")
        };
        let path = PathBuf::from(root).join(name);
        fs::create_dir(&path).with_context(|| format!("a control group {}", path.display()))?;
        let group = Self { path, limit, usage, nothing };
        fs::write(group.path.join("cgroup.procs"), host_pid.to_string()).context("moving into a control group")?;
        Ok(group)
    }

    /// Has next to nothing left of it.
    ///
    /// # Errors
    /// As [`MemoryGroup::leave`].
    pub fn fill(&mut self) -> Result<()> {
        self.leave(LEFT)
    }

    /// Has so many bytes left of it.
    ///
    /// # Errors
    /// It cannot be limited.
    pub fn leave(&mut self, bytes: u64) -> Result<()> {
        let usage: u64 = fs::read_to_string(self.path.join(self.usage))?.trim().parse()?;
        fs::write(self.path.join(self.limit), (usage + bytes).to_string()).context("limiting memory")
    }

    /// Has as much as there is again.
    ///
    /// # Errors
    /// The limit stays.
    pub fn free(&mut self) -> Result<()> {
        fs::write(self.path.join(self.limit), self.nothing).context("no more limit of memory")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // It is busy until those in it are gone, and they go with the host.
        for _ in 0..200 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
