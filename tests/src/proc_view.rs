//! What `/proc` tells about a process, as the test sees it: compared before and after, and used to find a moved process.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail};

/// The parts of a process's `/proc` directory that a failed move must leave as they were.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcView {
    /// Mappings, neighbours that differ in nothing joined: tracking may split the heap in two for good.
    pub maps: Vec<String>,
    /// Descriptors and what they lead to.
    pub fds: BTreeMap<u32, String>,
    /// The lines of `/proc/PID/status` about identity, tracing and signals.
    pub status: BTreeMap<String, String>,
    /// The names of all threads, by tid.
    pub threads: BTreeMap<u32, String>,
    /// Its arguments and its environment, which lie in its memory.
    pub words: BTreeMap<String, String>,
}

/// The lines of `/proc/PID/status` that do not change by themselves in a victim.
const STATUS: [&str; 15] = [
    "Name",
    "Umask",
    "Tgid",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "Threads",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapEff",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
];

impl ProcView {
    /// Reads the view of process `pid` (a pid in the test's PID namespace).
    ///
    /// # Errors
    /// The process is gone.
    pub fn read(pid: u32) -> Result<Self> {
        let file = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            fs::read_to_string(&path).with_context(|| path)
        };
        let status = file("status")?
            .lines()
            .filter_map(|line| line.split_once(':'))
            .filter(|(key, _)| STATUS.contains(key))
            .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
            .collect();
        let mut fds = BTreeMap::new();
        for fd in numbers(&format!("/proc/{pid}/fd"))? {
            // A descriptor may be closed between the listing and the reading, as a thread may end.
            if let Ok(link) = fs::read_link(format!("/proc/{pid}/fd/{fd}")) {
                fds.insert(fd, link.to_string_lossy().into_owned());
            }
        }
        let mut threads = BTreeMap::new();
        for tid in numbers(&format!("/proc/{pid}/task"))? {
            if let Ok(name) = fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")) {
                threads.insert(tid, name.trim().to_owned());
            }
        }
        let mut words = BTreeMap::new();
        for name in ["cmdline", "environ"] {
            let path = format!("/proc/{pid}/{name}");
            let bytes = fs::read(&path).with_context(|| path)?;
            words.insert(name.to_owned(), String::from_utf8_lossy(&bytes).into_owned());
        }
        Ok(Self { maps: joined_maps(&file("maps")?), fds, status, threads, words })
    }

    /// Compares with an earlier view.
    ///
    /// # Errors
    /// Names every difference.
    pub fn expect_same_as(&self, before: &Self) -> Result<()> {
        let mut differences = Vec::new();
        for (line, sign) in only_in(&self.maps, &before.maps, '+').chain(only_in(&before.maps, &self.maps, '-')) {
            differences.push(format!("maps {sign} {line}"));
        }
        compare("fd", &before.fds, &self.fds, &mut differences);
        compare("status", &before.status, &self.status, &mut differences);
        compare("thread", &before.threads, &self.threads, &mut differences);
        compare("words", &before.words, &self.words, &mut differences);
        if !differences.is_empty() {
            bail!("the process is not as it was before:\n{}", differences.join("\n"));
        }
        Ok(())
    }
}

impl ProcView {
    /// Compares the copy at a destination with the view of the process before it was moved. Inode numbers differ there, and the
    /// kernel's own pages may have another shape; nothing else may.
    ///
    /// # Errors
    /// Names every difference.
    pub fn expect_copy_of(&self, original: &Self) -> Result<()> {
        self.without_numbers().expect_same_as(&original.without_numbers())
    }

    fn without_numbers(&self) -> Self {
        let kernels = |line: &&String| !["[vvar]", "[vvar_vclock]", "[vdso]"].iter().any(|name| line.ends_with(name));
        let plain_map = |line: &String| {
            // address, offset, mode, device, inode, name
            let words: Vec<&str> = line.splitn(6, ' ').collect();
            [0, 1, 2, 5].iter().filter_map(|&place| words.get(place).copied()).collect::<Vec<_>>().join(" ")
        };
        let plain_fd = |link: &String| match link.split_once(":[") {
            Some((kind, _)) => kind.to_owned(),
            // A deleted file comes back under another name.
            None if link.ends_with(" (deleted)") && !link.starts_with("/memfd:") => "(deleted)".to_owned(),
            None => link.clone(),
        };
        let mut status = self.status.clone();
        // Pids of another namespace, as the test sees them.
        status.remove("Tgid");
        let mut names: Vec<&String> = self.threads.values().collect();
        names.sort();
        Self {
            maps: self.maps.iter().filter(kernels).map(plain_map).collect(),
            fds: self.fds.iter().map(|(fd, link)| (*fd, plain_fd(link))).collect(),
            status,
            threads: names.into_iter().cloned().enumerate().map(|(at, name)| (at as u32, name)).collect(),
            words: self.words.clone(),
        }
    }
}

/// Tells whether a process exists and is no zombie.
pub fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(')').map(|(_, rest)| rest.trim_start().starts_with(['Z', 'X'])))
        .is_some_and(|dead| !dead)
}

/// Tells whether a process has a tracer (ptrace(2)).
pub(crate) fn is_traced(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .is_ok_and(|status| status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0")))
}

/// Finds the process whose pid is `pid` in the PID namespace of the process `witness`, and yields the pid that the test
/// itself sees. The process may be in a namespace further down; `/proc/PID/status` lists its pid at every level.
///
/// # Errors
/// There is no such process.
pub fn pid_inside(witness: u32, pid: u32) -> Result<u32> {
    let depth = namespace_pids(witness).len().checked_sub(1).context("the host's init is gone")?;
    // The witness's own proc file system names the process that is meant; its namespace tells it from its equals.
    let seen = format!("/proc/{witness}/root/proc/{pid}/ns/pid");
    let namespace = fs::read_link(&seen).with_context(|| seen)?;
    for candidate in numbers("/proc")? {
        if namespace_pids(candidate).get(depth) == Some(&pid)
            && fs::read_link(format!("/proc/{candidate}/ns/pid")).is_ok_and(|link| link == namespace)
        {
            return Ok(candidate);
        }
    }
    bail!("no process has pid {pid} on that host")
}

/// The pids of a process in every namespace from the test's own down to the process's own; empty when it is gone.
pub(crate) fn namespace_pids(pid: u32) -> Vec<u32> {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .ok()
        .and_then(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
            Some(line.split_whitespace().filter_map(|number| number.parse().ok()).collect())
        })
        .unwrap_or_default()
}

/// The children of a process.
pub(crate) fn children(parent: u32) -> Vec<u32> {
    let is_child = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .ok()
            .and_then(|stat| stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok())
            == Some(parent)
    };
    numbers("/proc").unwrap_or_default().into_iter().filter(is_child).collect()
}

/// Every process that the test sees.
pub(crate) fn processes() -> Result<Vec<u32>> {
    numbers("/proc")
}

/// The inode number of a namespace link such as `/proc/PID/ns/net`.
pub(crate) fn namespace_id(pid: u32, kind: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/ns/{kind}");
    Ok(fs::metadata(&path).with_context(|| path)?.ino())
}

fn numbers(directory: &str) -> Result<Vec<u32>> {
    let entries = fs::read_dir(directory).with_context(|| directory.to_owned())?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Joins neighbouring lines of `/proc/PID/maps` that continue one another in address, file offset and everything else.
fn joined_maps(text: &str) -> Vec<String> {
    let mut joined: Vec<(u64, u64, u64, String)> = Vec::new();
    for line in text.lines() {
        let mut words = line.splitn(6, ' ');
        let (Some(range), Some(mode), Some(offset), Some(device), Some(inode)) =
            (words.next(), words.next(), words.next(), words.next(), words.next())
        else {
            continue;
        };
        let name = words.next().unwrap_or("").trim();
        // Such a ring can only be made anew.
        let inode = if name.starts_with("/[aio]") { "-" } else { inode };
        let Some((start, end)) = range.split_once('-') else { continue };
        let number = |hex| u64::from_str_radix(hex, 16).unwrap_or(0);
        let (start, end, offset) = (number(start), number(end), number(offset));
        let rest = format!("{mode} {device} {inode} {name}");
        if let Some(last) = joined.last_mut()
            && last.1 == start
            && last.3 == rest
            && (inode == "0" || last.2 + (last.1 - last.0) == offset)
        {
            last.1 = end;
            continue;
        }
        joined.push((start, end, offset, rest));
    }
    joined.into_iter().map(|(start, end, offset, rest)| format!("{start:x}-{end:x} {offset:x} {rest}")).collect()
}

fn only_in<'a>(these: &'a [String], those: &'a [String], sign: char) -> impl Iterator<Item = (&'a String, char)> {
    these.iter().filter(move |line| !those.contains(line)).map(move |line| (line, sign))
}

fn compare<K: Ord + std::fmt::Display>(
    kind: &str,
    before: &BTreeMap<K, String>,
    after: &BTreeMap<K, String>,
    differences: &mut Vec<String>,
) {
    for (key, value) in before {
        match after.get(key) {
            Some(now) if now == value => {}
            Some(now) => differences.push(format!("{kind} {key}: {value} became {now}")),
            None => differences.push(format!("{kind} {key} ({value}) is gone")),
        }
    }
    for (key, value) in after.iter().filter(|(key, _)| !before.contains_key(key)) {
        differences.push(format!("{kind} {key} ({value}) is new"));
    }
}
