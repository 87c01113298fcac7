//! Watches on files (inotify(7)). A watch knows its inode only, so its path is found through the file handle that fdinfo shows;
//! at the destination the path is watched again under the same number.

use super::event::set_status;
use super::kind::refuse;
use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::descriptors::{open_by_handle, readable_bytes, set_next_watch};
use godwit_kernel::{Errno, events};
use godwit_proto::image::{FdTypes, FhEntry, FileEntry, InotifyFileEntry, InotifyWdEntry};
use nix::fcntl::{OFlag, open, readlink};
use nix::sys::stat::{Mode, lstat};
use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// How far behind the last watch the numbers of new ones begin. Where they stood at the source cannot be seen, and a number
/// must not come back while its removal may still wait to be read.
const GAP: i32 = 1 << 20;

/// The mount points of a process by device, as fdinfo writes it.
#[derive(Debug)]
pub(crate) struct Mounts(HashMap<u64, Vec<String>>);

impl Mounts {
    /// Reads /proc/PID/mountinfo (proc_pid_mountinfo(5)).
    pub(crate) fn read(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/mountinfo");
        let text = std::fs::read(&path).map_err(|source| Error::Proc { path: path.into(), source })?;
        let mut mounts: HashMap<u64, Vec<String>> = HashMap::new();
        for line in String::from_utf8_lossy(&text).lines() {
            let mut words = line.split(' ').skip(2);
            let (Some(device), Some(point)) = (words.next(), words.nth(1)) else { continue };
            let numbers = device.split_once(':').map(|(major, minor)| (major.parse::<u64>(), minor.parse::<u64>()));
            if let Some((Ok(major), Ok(minor))) = numbers {
                mounts.entry(major << 20 | minor).or_default().push(unescape(point));
            }
        }
        Ok(Self(mounts))
    }
}

/// Undoes the octal escapes of mountinfo.
pub(super) fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let code = tail.get(..3).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match (byte, code) {
            (b'\\', Some(code)) => {
                bytes.push(code);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A watch as fdinfo shows it.
#[derive(Debug)]
pub(super) struct Watch {
    wd: u32,
    inode: u64,
    device: u64,
    mask: u32,
    kind: u32,
    handle: Vec<u8>,
}

/// Parses `wd:1 ino:2 sdev:3 mask:4 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:0011223344556677`.
pub(super) fn parse(line: &str) -> Option<Watch> {
    let fields: HashMap<&str, &str> = line.split_whitespace().filter_map(|word| word.split_once(':')).collect();
    let hexadecimal = |key: &str| u64::from_str_radix(fields.get(key)?, 16).ok();
    let digits = fields.get("f_handle").copied().unwrap_or_default().as_bytes();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    Some(Watch {
        wd: u32::try_from(hexadecimal("wd")?).ok()?,
        inode: hexadecimal("ino")?,
        device: hexadecimal("sdev")?,
        mask: u32::try_from(hexadecimal("mask")?).ok()?,
        kind: u32::try_from(hexadecimal("fhandle-type").unwrap_or(0)).ok()?,
        handle: digits.chunks(2).map(byte).collect::<Option<_>>()?,
    })
}

/// Finds the path of a watched file.
fn find(watch: &Watch, mounts: &Mounts) -> Option<String> {
    for point in mounts.0.get(&watch.device)? {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let Ok(mount) = open(point.as_str(), flags, Mode::empty()) else { continue };
        let flags = libc::O_PATH | libc::O_CLOEXEC;
        let Ok(file) = open_by_handle(mount.as_fd(), watch.kind as i32, &watch.handle, flags) else { continue };
        let Ok(path) = readlink(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str()) else { continue };
        let Some(path) = path.to_str() else { continue };
        if lstat(path).is_ok_and(|stat| stat.st_ino == watch.inode) {
            return Some(path.to_owned());
        }
    }
    None
}

fn locate(entry: &Entry, mounts: &Mounts) -> Result<Vec<(Watch, String)>> {
    let mut located = Vec::new();
    for line in entry.info.lines("inotify ") {
        let watch = parse(line).ok_or_else(|| Error::state(entry.name(), format!("cannot make sense of {line:?}")))?;
        match find(&watch, mounts) {
            Some(path) => located.push((watch, path)),
            None => {
                let text = format!("the path of watch {} (inode {}) cannot be found", watch.wd, watch.inode);
                return refuse(entry, "inotify", &text);
            }
        }
    }
    located.sort_by_key(|(watch, _)| watch.wd);
    Ok(located)
}

/// Names the watched paths.
///
/// # Errors
/// [`Error::Obstacle`] when one cannot be found.
pub(crate) fn paths(entry: &Entry, mounts: &Mounts) -> Result<Vec<String>> {
    Ok(locate(entry, mounts)?.into_iter().map(|(_, path)| path).collect())
}

/// Collects an instance.
pub(crate) fn collect(entry: &Entry, id: u32, mounts: &Mounts) -> Result<FileEntry> {
    if readable_bytes(entry.file.as_fd()).map_err(entry.error("FIONREAD"))? > 0 {
        return refuse(entry, "inotify", "events wait in it that the program has not read yet; try again later");
    }
    let message = |(watch, path): (Watch, String)| InotifyWdEntry {
        id,
        i_ino: watch.inode,
        mask: watch.mask,
        s_dev: watch.device as u32,
        wd: watch.wd,
        f_handle: FhEntry {
            bytes: watch.handle.len() as u32,
            r#type: watch.kind,
            handle: watch.handle.chunks(8).map(padded).collect(),
            path: Some(path),
            ..FhEntry::default()
        },
        ..InotifyWdEntry::default()
    };
    let message = InotifyFileEntry {
        id,
        flags: entry.info.status_flags() as u32,
        wd: locate(entry, mounts)?.into_iter().map(message).collect(),
        ..InotifyFileEntry::default()
    };
    Ok(FileEntry { r#type: FdTypes::Inotify as i32, id, ify: Some(message.into()), ..FileEntry::default() })
}

fn padded(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Makes an instance again, with all watches.
pub(crate) fn rebuild(message: &InotifyFileEntry) -> Result<OwnedFd> {
    let failed = |what| move |source| Error::call("inotify", what, source);
    let file = events::inotify(libc::IN_CLOEXEC).map_err(failed("inotify_init1"))?;
    let mut last = 0;
    for watch in &message.wd {
        let path = watch.f_handle.path.as_deref().unwrap_or_default();
        let wrong = |text: &str| Error::state(format!("inotify watch {} on {path}", watch.wd), text);
        let wanted = i32::try_from(watch.wd).map_err(|_| wrong("no such watch number"))?;
        let name = CString::new(path).map_err(|_| wrong("a zero byte in its path"))?;
        set_next_watch(file.as_fd(), wanted).map_err(failed("INOTIFY_IOC_SETNEXTWD"))?;
        let failed = |source: Errno| Error::call(format!("inotify watch on {path}"), "inotify_add_watch", source);
        let got = events::add_watch(file.as_fd(), &name, watch.mask).map_err(failed)?;
        if got != wanted {
            return Err(wrong("it got another number; two watched paths are one file at the destination"));
        }
        last = last.max(wanted);
    }
    set_next_watch(file.as_fd(), last.saturating_add(GAP)).map_err(failed("INOTIFY_IOC_SETNEXTWD"))?;
    set_status(&file, message.flags).map_err(failed("F_SETFL"))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_parsed() {
        let line = "wd:b ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d";
        let watch = parse(line).unwrap();
        assert_eq!((watch.wd, watch.inode, watch.device, watch.kind), (11, 0x9e7e, 0x80_0013, 1));
        assert_eq!(watch.handle, [0x7e, 0x9e, 0, 0, 0x64, 0x0d, 0x1b, 0x6d]);
        assert!(parse("wd:1 ino:2").is_none());
        assert!(parse("wd:1 ino:2 sdev:3 mask:4 f_handle:xx").is_none());
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape(r"/a\040b\134c\9"), r"/a b\c\9");
    }
}
