//! What only /proc/PID/smaps tells of an area: its `VmFlags` and page size. Reading it walks all page tables, so it is read
//! while the process runs and reused inside the freeze for areas that have not changed.

use crate::{Error, Result};
use std::collections::HashMap;
use std::path::PathBuf;

/// Flags and page size of an area.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Details {
    pub(super) end: u64,
    /// The two-letter codes of proc_pid_smaps(5), each followed by a space.
    pub(super) flags: String,
    /// Bytes.
    pub(super) page_size: u64,
}

impl Details {
    /// Whether it has one of the flags of proc_pid_smaps(5).
    pub(super) fn has(&self, code: &str) -> bool {
        self.flags.split_whitespace().any(|flag| flag == code)
    }

    /// Whether somebody is asked for pages of it that are missing (userfaultfd(2)): what is not there is not empty.
    pub(super) fn awaits_pages(&self) -> bool {
        self.has("um")
    }
}

/// Whether a process has memory that somebody is asked for where it is missing (userfaultfd(2)); `None` for one without memory,
/// which is gone or about to be, and where it cannot be looked at.
#[must_use]
pub fn awaits_pages(pid: i32) -> Option<bool> {
    // A thread that has ended has none, and the first one may end before the others.
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let mut seen = threads.filter_map(|thread| read_at(thread.path().join("smaps")).ok());
    let areas = seen.find(|areas| !areas.is_empty())?;
    Some(areas.values().any(Details::awaits_pages))
}

/// Reads the details of every area, by start address.
pub(super) fn read(pid: i32) -> Result<HashMap<u64, Details>> {
    read_at(format!("/proc/{pid}/smaps").into())
}

fn read_at(path: PathBuf) -> Result<HashMap<u64, Details>> {
    let text = std::fs::read(&path).map_err(|source| Error::Proc { path, source })?;
    Ok(parse(&String::from_utf8_lossy(&text)))
}

fn header(line: &str) -> Option<(u64, u64)> {
    let (range, _) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

pub(crate) fn parse(text: &str) -> HashMap<u64, Details> {
    let mut areas = HashMap::new();
    let mut current = None;
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(details) = current.and_then(|start| areas.get_mut(&start)) {
                let details: &mut Details = details;
                details.flags = format!("{} ", flags.trim());
            }
        } else if let Some(size) = line.strip_prefix("KernelPageSize:") {
            if let Some(details) = current.and_then(|start| areas.get_mut(&start)) {
                let kib: u64 = size.trim().trim_end_matches("kB").trim().parse().unwrap_or(4);
                details.page_size = kib.saturating_mul(1024);
            }
        } else if let Some((start, end)) = header(line) {
            areas.insert(start, Details { end, ..Details::default() });
            current = Some(start);
        }
    }
    areas
}

#[cfg(test)]
mod tests {
    #[test]
    fn missing_pages_are_told_from_other_uses() {
        let flags = |flags: &str| super::parse(&format!("1000-2000 rw-p 00000000 00:00 0\nVmFlags: {flags}\n"));
        assert!(flags("rd wr um sd")[&0x1000].awaits_pages());
        assert!(!flags("rd wr uw sd")[&0x1000].awaits_pages());
    }

    #[test]
    fn reads_its_own_stack() {
        let areas = super::read(std::process::id() as i32).unwrap();
        assert!(areas.values().any(|details| details.flags.contains("gd ")), "some area grows down");
        assert!(areas.values().any(|details| details.page_size == 4096));
    }
}
