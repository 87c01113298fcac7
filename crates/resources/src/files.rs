//! Files that a process has mapped: the destination must have the same ones. Objects are told apart by their build id
//! (elf(5), `NT_GNU_BUILD_ID`), everything by size.

use crate::memory::Backing;
use crate::{Obstacle, Result};
use godwit_proto::wire::FileFacts;
use godwit_tracee::read_maps;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

/// Largest program header table and note segment that are looked at, in bytes.
const MAX_TABLE: u64 = 64 * 1024;

/// The files that a running process has mapped.
///
/// # Errors
/// When the process is gone.
pub fn mapped(pid: i32) -> Result<Vec<FileFacts>> {
    let mut files = BTreeMap::new();
    for vma in read_maps(pid)? {
        if Backing::of(&vma) != Backing::File {
            continue;
        }
        let path = vma.name_text().into_owned();
        let entry = files.entry(path.clone()).or_insert_with(|| describe(pid, vma.start, vma.end, path));
        entry.executable |= vma.protection & libc::PROT_EXEC != 0;
        entry.writable |= vma.shared && vma.protection & libc::PROT_WRITE != 0;
    }
    Ok(files.into_values().collect())
}

/// Describes a mapped file, read through the mapping's own link: the path may lead elsewhere by now.
fn describe(pid: i32, start: u64, end: u64, path: String) -> FileFacts {
    let mut facts = FileFacts { mapped: true, path, ..FileFacts::default() };
    if let Ok(file) = File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}")) {
        if let Ok(metadata) = file.metadata() {
            facts.size = metadata.len();
            facts.mode = metadata.mode();
            facts.rdev = metadata.rdev();
        }
        facts.build_id = build_id(&file).unwrap_or_default();
    }
    facts
}

/// Names the mapped files of a process that this host lacks or has in another version.
#[must_use]
pub fn check(files: &[FileFacts]) -> Vec<Obstacle> {
    files.iter().filter(|facts| facts.mapped).filter_map(check_one).collect()
}

fn check_one(facts: &FileFacts) -> Option<Obstacle> {
    let differs = |text: String| {
        let remedy = "put the same file there, or mount the directory from shared storage";
        Some(Obstacle::new(facts.path.clone(), text, remedy))
    };
    let file = match File::open(&facts.path) {
        Ok(file) => file,
        Err(error) => return differs(format!("the destination cannot open it: {error}")),
    };
    let here = build_id(&file).unwrap_or_default();
    if here != facts.build_id {
        return differs("the destination has another build of it (build ids differ)".to_owned());
    }
    let size = file.metadata().map_or(0, |metadata| metadata.len());
    // A file that is written through the mapping may be growing while we look.
    if size != facts.size && !facts.writable {
        return differs(format!("it has {size} bytes at the destination, {} at the source", facts.size));
    }
    None
}

/// The build id of an ELF file; `None` for any other file and for objects without one.
fn build_id(file: &File) -> Option<Vec<u8>> {
    const PT_NOTE: u32 = 4;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).ok()?;
    if header[..5] != *b"\x7fELF\x02" {
        return None;
    }
    let word = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let half = |bytes: &[u8], at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let entry_size = u16::from_le_bytes([header[54], header[55]]) as u64;
    let entries = u16::from_le_bytes([header[56], header[57]]) as u64;
    if entry_size < 56 || entry_size * entries > MAX_TABLE {
        return None;
    }
    let mut table = vec![0; (entry_size * entries) as usize];
    file.read_exact_at(&mut table, word(&header, 32)?).ok()?;
    table.chunks_exact(entry_size as usize).filter(|entry| half(entry, 0) == Some(PT_NOTE)).find_map(|entry| {
        let size = word(entry, 32)?;
        let mut notes = vec![0; usize::try_from(size).ok().filter(|_| size <= MAX_TABLE)?];
        file.read_exact_at(&mut notes, word(entry, 8)?).ok()?;
        gnu_build_id(&notes)
    })
}

pub(crate) fn gnu_build_id(mut notes: &[u8]) -> Option<Vec<u8>> {
    const NT_GNU_BUILD_ID: u32 = 3;
    while notes.len() >= 12 {
        let half = |at: usize| u32::from_le_bytes(notes[at..at + 4].try_into().expect("four bytes"));
        let (name_size, size, kind) = (half(0) as usize, half(4) as usize, half(8));
        let name_end = 12usize.checked_add(name_size)?;
        let start = name_end.checked_next_multiple_of(4)?;
        let end = start.checked_add(size)?;
        let name = notes.get(12..name_end)?;
        let content = notes.get(start..end)?;
        if kind == NT_GNU_BUILD_ID && name == b"GNU\0" {
            return Some(content.to_vec());
        }
        notes = notes.get(end.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_its_own_files_and_sees_a_difference() {
        let files = mapped(std::process::id() as i32).unwrap();
        let libc = files.iter().find(|facts| facts.path.contains("libc")).expect("libc is mapped");
        assert!(libc.executable && !libc.build_id.is_empty());
        assert_eq!(check(&files), vec![]);
        let mut other = libc.clone();
        other.build_id[0] ^= 1;
        assert_eq!(check(&[other]).len(), 1);
    }

    #[test]
    fn hostile_notes_end_in_nothing() {
        let notes = [&u32::MAX.to_le_bytes()[..], &u32::MAX.to_le_bytes(), &3u32.to_le_bytes()].concat();
        assert_eq!(gnu_build_id(&notes), None);
    }
}
