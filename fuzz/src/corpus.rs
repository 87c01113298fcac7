//! Examples and crashes: files in folders named after targets.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use godwit_carry::Party;
use godwit_fault::MigrationId;
use godwit_fault::ledger::{Ledger, Lineage, Subject};
use godwit_fault::pending::Pending;
use godwit_pages::{PageRange, PageSet};
use xxhash_rust::xxh3::xxh3_64;

use crate::targets::Target;

fn folder(kind: &str, target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(kind).join(target.name)
}

/// Files of this process that are examples of what the kernel says, beside those that were kept.
const LIVE: &[(&str, &[&str])] = &[
    ("proc-maps", &["/proc/self/maps"]),
    ("proc-status", &["/proc/self/status", "/proc/thread-self/status"]),
    ("proc-smaps", &["/proc/self/smaps"]),
    ("proc-stat", &["/proc/self/stat"]),
    ("proc-limits", &["/proc/self/limits"]),
    ("proc-mountinfo", &["/proc/self/mountinfo"]),
    ("proc-fdinfo", &["/proc/self/fdinfo/0", "/proc/self/fdinfo/1"]),
    ("proc-task", &["/proc/thread-self/syscall", "/proc/thread-self/sched"]),
    ("proc-lists", &["/proc/self/uid_map", "/proc/self/timens_offsets", "/sys/devices/system/cpu/possible"]),
    ("proc-net", &["/proc/net/udp", "/proc/net/igmp", "/proc/net/igmp6", "/proc/net/unix"]),
    ("proc-net-tcp", &["/proc/net/tcp", "/proc/net/tcp6"]),
];

/// What really was said to a decoder: what was kept, and what this host says now.
///
/// # Errors
/// A file cannot be read.
pub fn examples(target: &Target) -> Result<Vec<Vec<u8>>> {
    let mut examples: Vec<Vec<u8>> = files(&folder("corpus", target))?.into_iter().map(|(_, bytes)| bytes).collect();
    // N.B. a kernel need not have all of them.
    let live = LIVE.iter().filter(|(name, _)| *name == target.name).flat_map(|(_, paths)| *paths);
    examples.extend(live.filter_map(|path| fs::read(path).ok()));
    if target.name == "ledger" {
        examples.push(ledger()?);
    }
    if examples.is_empty() {
        examples.push(Vec::new());
    }
    Ok(examples)
}

/// A ledger as a daemon leaves it; it is long, and made in a moment.
fn ledger() -> Result<Vec<u8>> {
    let missing = PageSet::from(PageRange::from_pages(0x1000_0000, 100)?);
    let subject = Subject { id: MigrationId([3; 16]), pid: 1, lineage: Lineage::Moved, party: Party::TokenHolders };
    let ledger = Ledger::create(subject, &Pending::new(missing))?;
    let file = fs::File::from(ledger.as_fd().try_clone_to_owned()?);
    let mut bytes = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// What a decoder has stumbled over once, with names.
///
/// # Errors
/// A file cannot be read.
pub fn crashes(target: &Target) -> Result<Vec<(String, Vec<u8>)>> {
    files(&folder("crashes", target))
}

/// Keeps what a decoder has stumbled over; returns where.
///
/// # Errors
/// The file cannot be written.
pub fn keep(target: &Target, bytes: &[u8]) -> Result<PathBuf> {
    let folder = folder("crashes", target);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let path = folder.join(format!("{:016x}", xxh3_64(bytes)));
    fs::write(&path, bytes).with_context(|| path.display().to_string())?;
    Ok(path)
}

fn files(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        files.push((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), bytes));
    }
    files.sort();
    Ok(files)
}
