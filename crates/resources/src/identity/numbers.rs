//! The numbers of a process: as its own PID namespace counts and as ours does.

use crate::{Error, Result};
use godwit_tracee::{Status, read_status};
use std::collections::HashMap;

/// Translates thread ids from ours to those of a process's own PID namespace.
#[derive(Clone, Debug, Default)]
pub struct Numbering {
    /// Whether the namespaces differ at all.
    nested: bool,
    known: HashMap<i32, i32>,
}

impl Numbering {
    /// Finds out how a process counts.
    ///
    /// # Errors
    /// When its status has no numbers.
    pub fn read(pid: i32, status: &Status) -> Result<Self> {
        let nested = status.numbers("NSpid").len() > 1;
        let known = HashMap::from([(pid, innermost(pid, status)?)]);
        Ok(Self { nested, known })
    }

    /// Translates a thread id of process `pid`.
    ///
    /// # Errors
    /// When the thread is gone.
    pub fn inner(&mut self, pid: i32, tid: i32) -> Result<i32> {
        if !self.nested {
            return Ok(tid);
        }
        if let Some(&inner) = self.known.get(&tid) {
            return Ok(inner);
        }
        let status = read_status(tid)?;
        if status.number("Tgid") != Some(pid as u64) {
            return Err(Error::state(format!("thread {tid}"), format!("is not of process {pid}")));
        }
        let inner = innermost(tid, &status)?;
        self.known.insert(tid, inner);
        Ok(inner)
    }

    /// Translates the number of a process group or session of process `pid`: its own pid, or somebody else's number,
    /// which means nothing to it at the destination.
    pub(crate) fn same(&mut self, pid: i32, number: i32) -> Result<i32> {
        if number == pid { self.inner(pid, pid) } else { Ok(if self.nested { 0 } else { number }) }
    }
}

fn innermost(tid: i32, status: &Status) -> Result<i32> {
    let number = status.numbers("NSpid").last().copied().or_else(|| status.number("Pid"));
    number.map(|number| number as i32).ok_or_else(|| Error::state(format!("thread {tid}"), "has no number"))
}

/// Parent, process group, session and controlling terminal of a process, as we see them (proc_pid_stat(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Parent's pid.
    pub parent: i32,
    /// Process group id.
    pub group: i32,
    /// Session id.
    pub session: i32,
    /// Device number of the controlling terminal, or 0.
    pub terminal: i32,
}

impl Group {
    /// Reads them.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn read(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/stat");
        let text = match std::fs::read(&path) {
            Ok(text) => String::from_utf8_lossy(&text).into_owned(),
            Err(source) => return Err(Error::Proc { path: path.into(), source }),
        };
        Self::parse(&text).ok_or_else(|| Error::state(path, "an unknown form"))
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        // N.B. the name is in parentheses and may itself contain any.
        let mut words = text.rsplit_once(") ")?.1.split(' ').skip(1).map(|word| word.parse().ok());
        Some(Self { parent: words.next()??, group: words.next()??, session: words.next()??, terminal: words.next()?? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_confuse() {
        let group = Group::parse("7 (a) b) (c) S 1 2 3 34816 5 0").unwrap();
        assert_eq!(group, Group { parent: 1, group: 2, session: 3, terminal: 34816 });
        assert!(Group::parse("7 (a").is_none());
    }
}
