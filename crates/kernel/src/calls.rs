//! Counting the system calls of another process, by the tracepoints that the kernel has at each (perf_event_open(2), tracefs).

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::pid_t;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::check;

/// `struct perf_event_attr` as it was first (`PERF_ATTR_SIZE_VER0`).
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    config1: u64,
}

const _: () = assert!(size_of::<Attributes>() == 64);

/// `PERF_TYPE_TRACEPOINT`.
const TRACEPOINT: u32 = 2;
/// The flag `inherit`: threads that come up later count, too.
const INHERIT: u64 = 1 << 1;
/// `PERF_FLAG_FD_CLOEXEC`.
const CLOSED_ON_EXEC: libc::c_ulong = 8;
/// Threads may come up while they are listed; listings before that is given up.
const MAX_LISTINGS: usize = 16;

/// Counts how often the threads of a process come to a tracepoint. Dropping it takes the kernel some 40 ms.
#[derive(Debug)]
pub struct CallCounter {
    /// One for each thread that there was at the beginning.
    events: Vec<File>,
}

impl CallCounter {
    /// Begins to count. `point` is the name of a tracepoint among those of system calls: `sys_enter_setsockopt`. Takes some
    /// 15 ms for the first thread that is counted on a host. N.B. calls of 32-bit programs pass none.
    ///
    /// # Errors
    /// `ENOENT` when the kernel has no such tracepoint; `E2BIG` when there are more threads than `most`; what perf_event_open(2) says.
    pub fn begin(pid: pid_t, point: &str, most: usize) -> Result<Self, Errno> {
        let id = tracepoint(point)?;
        let mut counted = std::collections::HashSet::new();
        let mut events = Vec::new();
        for _ in 0..MAX_LISTINGS {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).map_err(|_| Errno::ESRCH)?;
            let tids: Vec<pid_t> = tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok()).collect();
            let fresh: Vec<pid_t> = tids.into_iter().filter(|tid| counted.insert(*tid)).collect();
            if fresh.is_empty() {
                return Ok(Self { events });
            }
            if counted.len() > most {
                return Err(Errno::E2BIG);
            }
            for tid in fresh {
                match open(tid, id) {
                    // It has ended.
                    Err(Errno::ESRCH) => {}
                    event => events.push(event?),
                }
            }
        }
        Err(Errno::EAGAIN)
    }

    /// How many there were so far.
    ///
    /// # Errors
    /// What read(2) says; `ENODATA` when an event counts no more.
    pub fn count(&self) -> Result<u64, Errno> {
        self.events.iter().try_fold(0, |sum, mut event| {
            let mut word = [0; 8];
            match event.read(&mut word) {
                Ok(8) => Ok(sum + u64::from_ne_bytes(word)),
                Ok(_) => Err(Errno::ENODATA),
                Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
            }
        })
    }
}

fn open(tid: pid_t, tracepoint: u64) -> Result<File, Errno> {
    let attributes = Attributes {
        kind: TRACEPOINT,
        size: size_of::<Attributes>() as u32,
        config: tracepoint,
        flags: INHERIT,
        ..Attributes::default()
    };
    // SAFETY: the kernel reads as many bytes as the attributes say that they have.
    let opened =
        check(unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attributes, tid, -1, -1, CLOSED_ON_EXEC) })?;
    // SAFETY: the descriptor is new and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(opened as i32) }.into())
}

/// The number of a tracepoint, out of an instance of tracefs that is mounted nowhere.
fn tracepoint(name: &str) -> Result<u64, Errno> {
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const CLOEXEC: libc::c_uint = 1;
    // SAFETY: a static string.
    let context = check(unsafe { libc::syscall(libc::SYS_fsopen, c"tracefs".as_ptr(), CLOEXEC) })?;
    // SAFETY: the descriptor is new and nobody else has it.
    let context = unsafe { OwnedFd::from_raw_fd(context as i32) };
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes no key and no value.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, null, null, 0) })?;
    // SAFETY: integers only.
    let root = check(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new and nobody else has it.
    let root = unsafe { OwnedFd::from_raw_fd(root as i32) };
    let path = format!("events/syscalls/{name}/id");
    let file = openat(&root, path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut text = String::new();
    File::from(file).read_to_string(&mut text).map_err(|_| Errno::EIO)?;
    text.trim().parse().map_err(|_| Errno::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{setsockopt, sockopt::KeepAlive};

    #[test]
    fn calls_of_all_threads_are_counted() {
        let pid = std::process::id() as pid_t;
        let counter = match CallCounter::begin(pid, "sys_enter_setsockopt", 1024) {
            Err(errno @ (Errno::EPERM | Errno::EACCES | Errno::ENOENT | Errno::ENODEV)) => {
                eprintln!("not on this machine: {errno}");
                return;
            }
            counter => counter.unwrap(),
        };
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let before = counter.count().unwrap();
        setsockopt(&socket, KeepAlive, &true).unwrap();
        let late = std::thread::spawn(move || setsockopt(&socket, KeepAlive, &false).unwrap());
        late.join().unwrap();
        // N.B. other tests may share this process.
        assert!(counter.count().unwrap() >= before + 2);
        assert_eq!(CallCounter::begin(pid, "sys_enter_nonsense", 1024).unwrap_err(), Errno::ENOENT);
        assert_eq!(CallCounter::begin(pid, "sys_enter_setsockopt", 0).unwrap_err(), Errno::E2BIG);
    }
}
