//! /proc/PID/fdinfo/FD (proc_pid_fdinfo(5)): parsed on demand, since each kind has fields of its own.

use crate::{Error, Result};

/// The text of one fdinfo file.
#[derive(Clone, Debug, Default)]
pub(crate) struct FdInfo {
    text: String,
    /// File offset.
    pub(crate) pos: u64,
    /// `O_*` flags; `O_CLOEXEC` tells of the number, all others of the open file description.
    pub(crate) flags: i32,
}

impl FdInfo {
    /// Takes in a file's text.
    pub(crate) fn parse(text: String) -> Result<Self> {
        let mut info = Self { text, pos: 0, flags: 0 };
        let pos = info.value("pos").and_then(|value| value.parse::<i64>().ok());
        let flags = info.value("flags").and_then(|value| u32::from_str_radix(value, 8).ok());
        match (pos, flags) {
            (Some(pos), Some(flags)) => {
                info.pos = pos as u64;
                info.flags = flags as i32;
                Ok(info)
            }
            _ => Err(Error::state("fdinfo", format!("no pos or flags in {:?}", info.text))),
        }
    }

    /// What there would be to read about an IP socket.
    pub(crate) fn of_socket(flags: i32) -> Self {
        Self { text: String::new(), pos: 0, flags }
    }

    /// The first value of a field.
    pub(crate) fn value<'a>(&'a self, field: &'a str) -> Option<&'a str> {
        self.values(field).next()
    }

    /// The values of all lines that begin with a field.
    pub(crate) fn values<'a>(&'a self, field: &'a str) -> impl Iterator<Item = &'a str> {
        self.text.lines().filter_map(move |line| Some(line.strip_prefix(field)?.strip_prefix(':')?.trim()))
    }

    /// The rest of all lines that begin with a word.
    pub(crate) fn lines<'a>(&'a self, word: &'a str) -> impl Iterator<Item = &'a str> {
        self.text.lines().filter_map(move |line| Some(line.strip_prefix(word)?.trim()))
    }

    /// Status flags of the open file description, without `O_CLOEXEC` and what only open(2) itself looks at.
    pub(crate) fn status_flags(&self) -> i32 {
        const ONLY_AT_OPEN: i32 = libc::O_CLOEXEC | libc::O_CREAT | libc::O_EXCL | libc::O_NOCTTY | libc::O_TRUNC;
        self.flags & !ONLY_AT_OPEN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_and_flags_split() {
        let info = FdInfo::parse("pos:\t77\nflags:\t02104001\nmnt_id:\t9\ntfd: 1 a\ntfd: 2 b\n".into()).unwrap();
        assert_eq!(info.pos, 77);
        assert_eq!(info.status_flags(), 0o104001);
        assert_eq!(info.values("tfd").collect::<Vec<_>>(), ["1 a", "2 b"]);
        assert!(FdInfo::parse("pos: x".into()).is_err());
    }
}
