//! Huge pages, regained after a process runs: filling page by page never makes them.

use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::memory::advise;
use godwit_kernel::process::pidfd_open;
use godwit_pages::PageSet;
use std::os::fd::AsFd;

/// Bytes of a huge page on x86-64.
const HUGE_PAGE: u64 = 2 << 20;

/// Has the kernel gather pages of a running process into huge ones (madvise(2), `MADV_COLLAPSE`, Linux 6.1), one by one so
/// that the process is never held up for long. Returns how many succeeded.
///
/// # Errors
/// When the process is gone.
pub fn make_huge(pid: i32, pages: &PageSet) -> Result<u64> {
    const MADV_COLLAPSE: i32 = 25;
    let failed = |errno: Errno| Error::call(format!("process {pid}"), "MADV_COLLAPSE", errno);
    let pidfd = pidfd_open(pid).map_err(failed)?;
    let mut made = 0;
    for range in pages.iter() {
        let first = range.start().next_multiple_of(HUGE_PAGE);
        for start in
            (first..range.end()).step_by(HUGE_PAGE as usize).take_while(|start| start + HUGE_PAGE <= range.end())
        {
            match advise(pidfd.as_fd(), &[(start, HUGE_PAGE as usize)], MADV_COLLAPSE) {
                Ok(_) => made += 1,
                Err(Errno::ESRCH) => return Err(failed(Errno::ESRCH)),
                // Unmapped since, or no huge page to be had: the program works all the same.
                Err(errno) => tracing::trace!(pid, start, %errno, "not gathered"),
            }
        }
    }
    Ok(made)
}
