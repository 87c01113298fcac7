//! Which program a process runs: execve(2) gives it another one, with another address space.

use crate::{Error, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// The program that a process ran when this was made, known by its address space: /proc/PID/mem stays that of the one for which it was
/// opened (proc_pid_mem(5)).
#[derive(Debug)]
pub struct Program(File);

impl Program {
    /// The one that runs now.
    ///
    /// # Errors
    /// When the process is gone, or may not be looked into.
    pub fn of(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/mem");
        File::open(&path).map(Self).map_err(|source| Error::proc(path, source))
    }

    /// Whether it still runs; not once the process has ended, or executes another program.
    #[must_use]
    pub fn runs(&self) -> bool {
        // N.B. nothing is ever mapped there, which is an error; where there is no memory any more it is its end.
        !matches!(self.0.read_at(&mut [0], 0), Ok(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    #[test]
    fn another_program_is_told_from_the_first() {
        let script = "echo first; read line; exec sh -c 'echo second; read line'";
        let mut shell =
            Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (pid, mut input) = (shell.id() as i32, shell.stdin.take().unwrap());
        let mut words = BufReader::new(shell.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert_eq!(words.next().unwrap(), "first");
        let first = Program::of(pid).unwrap();
        assert!(first.runs());
        input.write_all(b"\n").unwrap();
        assert_eq!(words.next().unwrap(), "second");
        let second = Program::of(pid).unwrap();
        assert_eq!((first.runs(), second.runs()), (false, true));
        drop(input);
        shell.wait().unwrap();
        assert!(!second.runs());
    }
}
