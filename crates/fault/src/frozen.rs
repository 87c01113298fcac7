//! Reading the frozen process at the source.
//!
//! process_vm_readv(2) reaches what the process itself may read; /proc/PID/mem reaches the rest, such as guard-like pages that
//! were written before their protection was taken away.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use godwit_kernel::memory;
use godwit_pages::PAGE_SIZE;

use crate::error::{Error, Result};
use crate::page_source::PageReader;

/// A stopped process whose memory does not change.
#[derive(Debug)]
pub struct FrozenProcess {
    pid: i32,
    mem: File,
}

impl FrozenProcess {
    /// Opens the memory of process `pid`, which the caller keeps stopped.
    ///
    /// # Errors
    /// When it is gone or may not be read.
    pub fn open(pid: i32) -> io::Result<Self> {
        Ok(Self { pid, mem: File::open(format!("/proc/{pid}/mem"))? })
    }

    fn failed(&self, address: u64, pages: u32, source: io::Error) -> Error {
        let pid = self.pid;
        // N.B. /proc/PID/mem ends where a process has no memory any more.
        let is_gone = source.raw_os_error() == Some(godwit_kernel::Errno::ESRCH as i32)
            || source.kind() == io::ErrorKind::UnexpectedEof;
        if is_gone { Error::SourceGone { pid } } else { Error::Read { pid, address, pages, source } }
    }
}

impl PageReader for FrozenProcess {
    fn read(&self, space: u32, address: u64, into: &mut [u8]) -> Result<()> {
        let pages = u32::try_from(into.len() as u64 / PAGE_SIZE).unwrap_or(u32::MAX);
        if space != 0 {
            return Err(self.failed(address, pages, io::Error::from(io::ErrorKind::Unsupported)));
        }
        let done = match memory::read(self.pid, address, into) {
            Ok(done) => done.min(into.len()),
            // Nothing at all could be read by this way.
            Err(godwit_kernel::Errno::EFAULT) => 0,
            Err(errno) => return Err(self.failed(address, pages, errno.into())),
        };
        let rest = &mut into[done..];
        if rest.is_empty() {
            return Ok(());
        }
        self.mem.read_exact_at(rest, address + done as u64).map_err(|source| self.failed(address, pages, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_gone_is_told_from_memory_that_cannot_be_read() {
        let mut child = std::process::Command::new("sleep").arg("20").spawn().unwrap();
        let frozen = FrozenProcess::open(child.id() as i32).unwrap();
        let mut page = [0; PAGE_SIZE as usize];
        let mut read = || frozen.read(0, 0x1000, &mut page).unwrap_err();
        assert!(matches!(read(), Error::Read { .. }));
        child.kill().unwrap();
        // N.B. not waited for: a zombie has no memory, either.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !matches!(read(), Error::SourceGone { .. }) {
            assert!(std::time::Instant::now() < deadline);
        }
        child.wait().unwrap();
        assert!(matches!(read(), Error::SourceGone { .. }));
    }
}
