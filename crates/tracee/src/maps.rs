//! /proc/PID/maps (proc_pid_maps(5)), parsed from bytes: file names need not be UTF-8, and this runs inside the freeze.

use crate::{Error, Result};
use std::io::Read;

/// One virtual memory area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// `PROT_READ | PROT_WRITE | PROT_EXEC` bits.
    pub protection: i32,
    /// Whether writes are shared (`MAP_SHARED`).
    pub shared: bool,
    /// Offset in the mapped file, in bytes.
    pub offset: u64,
    /// Device number of the mapped file, as `makedev(3)` composes it.
    pub device: u64,
    /// Inode number of the mapped file; 0 for private anonymous memory. A System V segment shows its id here.
    pub inode: u64,
    /// File name, pseudo-name (`[heap]`) or empty.
    pub name: Vec<u8>,
}

impl Vma {
    /// Length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.end - self.start
    }

    /// The name as text, lossily.
    #[must_use]
    pub fn name_text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.name)
    }

    /// Whether the kernel provides this area (vdso, vvar, vsyscall); it has no content of the process's own.
    #[must_use]
    pub fn is_kernel_provided(&self) -> bool {
        self.name.starts_with(b"[vdso") || self.name.starts_with(b"[vvar") || self.name.starts_with(b"[vsyscall")
    }
}

/// Reads a number in `radix` off the front of `text`; also drops the one byte behind it.
fn number(text: &mut &[u8], radix: u32) -> Option<u64> {
    let digits = text.iter().position(|byte| !byte.is_ascii_hexdigit()).unwrap_or(text.len());
    let value = u64::from_str_radix(std::str::from_utf8(&text[..digits]).ok()?, radix).ok()?;
    *text = text.get(digits + 1..).unwrap_or_default();
    Some(value)
}

/// Undoes the kernel's escaping of newlines in names.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&byte, tail)) = rest.split_first() {
        if let Some(tail) = rest.strip_prefix(b"\\012") {
            out.push(b'\n');
            rest = tail;
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    out
}

fn parse_line(mut line: &[u8]) -> Option<Vma> {
    let start = number(&mut line, 16)?;
    let end = number(&mut line, 16)?;
    if end <= start {
        return None;
    }
    let flags: [u8; 4] = line.get(..4)?.try_into().ok()?;
    line = line.get(5..)?;
    let protection = [(b'r', libc::PROT_READ), (b'w', libc::PROT_WRITE), (b'x', libc::PROT_EXEC)]
        .into_iter()
        .zip(flags)
        .filter(|&((letter, _), flag)| letter == flag)
        .fold(0, |bits, ((_, bit), _)| bits | bit);
    let offset = number(&mut line, 16)?;
    let major = number(&mut line, 16)?;
    let minor = number(&mut line, 16)?;
    let inode = number(&mut line, 10)?;
    let name = line.iter().position(|&byte| byte != b' ').map_or(&[][..], |at| &line[at..]);
    Some(Vma {
        start,
        end,
        protection,
        shared: flags[3] == b's',
        offset,
        device: libc::makedev(u32::try_from(major).ok()?, u32::try_from(minor).ok()?),
        inode,
        name: unescape(name),
    })
}

/// Parses the text of a maps file; the second value is the line that made no sense.
///
/// # Errors
/// The first line that is not of the documented form.
pub fn parse_maps(text: &[u8]) -> Result<Vec<Vma>, String> {
    text.split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| parse_line(line).ok_or_else(|| String::from_utf8_lossy(line).into_owned()))
        .collect()
}

/// Reads the areas of a process, in address order and disjoint.
///
/// The kernel lists some at a time: of a process that runs, one that was joined with others in between may be listed after parts of it.
/// Then they are read again.
///
/// # Errors
/// When the process is gone or the file cannot be read.
pub fn read_maps(pid: i32) -> Result<Vec<Vma>> {
    const ATTEMPTS: usize = 100;
    let mut vmas = read_once(pid)?;
    for _ in 1..ATTEMPTS {
        if are_disjoint(&vmas) {
            break;
        }
        vmas = read_once(pid)?;
    }
    Ok(vmas)
}

fn are_disjoint(vmas: &[Vma]) -> bool {
    vmas.windows(2).all(|pair| pair[0].end <= pair[1].start)
}

fn read_once(pid: i32) -> Result<Vec<Vma>> {
    let path = format!("/proc/{pid}/maps");
    let mut text = Vec::with_capacity(64 * 1024);
    std::fs::File::open(&path)
        .and_then(|mut file| file.read_to_end(&mut text))
        .map_err(|source| Error::proc(&path, source))?;
    parse_maps(&text).map_err(|text| Error::ProcText { path: path.into(), text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_names_with_spaces_and_newlines() {
        let text =
            b"55d0c0a00000-55d0c0a01000 r-xp 00001000 fe:01 1234                       /tmp/a b\\012c (deleted)\n\
                     7ffc0000-7ffd0000 rw-s 00000000 00:00 0 \n";
        let vmas = parse_maps(text).unwrap();
        assert_eq!(vmas[0].name, b"/tmp/a b\nc (deleted)");
        assert_eq!(vmas[0].protection, libc::PROT_READ | libc::PROT_EXEC);
        assert_eq!((vmas[0].offset, vmas[0].inode, vmas[0].device), (0x1000, 1234, libc::makedev(0xfe, 1)));
        assert!(vmas[1].shared && vmas[1].name.is_empty());
    }

    #[test]
    fn refuses_what_is_not_a_maps_line() {
        for bad in ["zz", "10-5 rwxp 0 0:0 0", "10-20", "10-20 rw", "10-20 rwxp 0 0:0"] {
            assert!(parse_maps(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_listing_in_which_areas_overlap_is_known() {
        let listed = |text: &[u8]| are_disjoint(&parse_maps(text).unwrap());
        assert!(listed(b"1000-2000 rw-p 0 00:00 0\n2000-3000 r--p 0 00:00 0\n5000-6000 r--p 0 00:00 0\n"));
        // The second was joined with what came before it.
        assert!(!listed(b"1000-2000 rw-p 0 00:00 0\n1000-3000 rw-p 0 00:00 0\n"));
        assert!(!listed(b"2000-3000 rw-p 0 00:00 0\n1000-2000 rw-p 0 00:00 0\n"));
    }

    #[test]
    fn reads_its_own_process() {
        let vmas = read_maps(std::process::id() as i32).unwrap();
        assert!(vmas.iter().any(|vma| vma.name == b"[stack]"));
    }
}
