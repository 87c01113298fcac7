//! Making a stub: an empty process with the right pid and tids, in the right namespaces.
//!
//! The namespaces of a stub are chosen by the thread that creates it: `unshare(CLONE_NEWTIME)` moves only the *children* of
//! the calling thread, so a builder's thread must not be reused for another migration.

use crate::{Error, Result};
use godwit_kernel::{Errno, ptrace, stub};
use godwit_resources::descriptors::Courier;
use godwit_tracee::{Batch, Tracee};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;
use std::time::{Duration, Instant};

/// End of the address space that processes use on x86-64 with four-level page tables.
const TASK_SIZE: u64 = 0x7fff_ffff_f000;
/// Lowest address that anybody may map (`vm.mmap_min_addr`).
pub(crate) const LOWEST: u64 = 0x1_0000;
const ARCH_MAP_VDSO_64: u64 = 0x2003;

/// What must be added to this host's clocks so that they go on where the source's were, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clocks {
    /// For `CLOCK_MONOTONIC`.
    pub monotonic_ns: i64,
    /// For `CLOCK_BOOTTIME`.
    pub boottime_ns: i64,
}

/// A stub just made.
#[derive(Debug)]
pub(crate) struct Birth {
    /// The stub, stopped.
    pub tracee: Tracee,
    /// The way files go into it.
    pub courier: Courier,
    /// Ids of the threads: (as the process itself sees them, as we see them), the leader first.
    pub tids: Vec<(i32, i32)>,
    /// Whether it got a PID namespace of its own.
    pub new_pid_namespace: bool,
    /// Our child: the stub, or the init of its PID namespace.
    pub child: i32,
    /// N.B. behind the stub: it ends after that.
    pub init: Init,
}

/// The init of a stub's PID namespace, if it got one. Ends with this handle, and is reaped, unless it is kept.
#[derive(Debug, Default)]
pub(crate) struct Init(Option<i32>);

impl Init {
    /// Leaves it to the process, which runs now.
    pub(crate) fn keep(&mut self) {
        self.0 = None;
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        const REAP_DEADLINE: Duration = Duration::from_secs(2);
        let Some(pid) = self.0 else { return };
        let _ = godwit_kernel::process::kill(pid, libc::SIGKILL);
        let deadline = Instant::now() + REAP_DEADLINE;
        while matches!(ptrace::try_wait(pid), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Enters a new time namespace for the children of this thread, unless the clocks agree already (time_namespaces(7)).
fn shift_clocks(clocks: Clocks) -> Result<()> {
    if clocks == Clocks::default() {
        return Ok(());
    }
    let own = own_clock_offsets();
    unshare(CloneFlags::from_bits_retain(0x80))
        .map_err(|source| Error::call("time namespace", "unshare(CLONE_NEWTIME)", source))?;
    let line = |id: i32, own: i64, shift: i64| {
        let total = own.saturating_add(shift);
        format!("{id} {} {}\n", total.div_euclid(1_000_000_000), total.rem_euclid(1_000_000_000))
    };
    let text = line(libc::CLOCK_MONOTONIC, own.monotonic_ns, clocks.monotonic_ns)
        + &line(libc::CLOCK_BOOTTIME, own.boottime_ns, clocks.boottime_ns);
    // N.B. by tid: `self` would name the main thread, whose children are not meant.
    let path = format!("/proc/{}/timens_offsets", gettid());
    std::fs::write(path, text).map_err(|source| Error::call("time namespace", "setting clock offsets", source))
}

/// The offsets of the time namespace this process runs in.
fn own_clock_offsets() -> Clocks {
    let mut clocks = Clocks::default();
    for line in std::fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default().lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [clock, seconds, nanoseconds] = words[..] else { continue };
        let total = seconds.parse::<i64>().unwrap_or(0) * 1_000_000_000 + nanoseconds.parse::<i64>().unwrap_or(0);
        match clock {
            "monotonic" => clocks.monotonic_ns = total,
            "boottime" => clocks.boottime_ns = total,
            _ => {}
        }
    }
    clocks
}

/// Waits for the only child of a new PID namespace's init; returns its pid as we see it.
fn child_of_init(init: i32, wanted: i32) -> Result<i32> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let path = format!("/proc/{init}/task/{init}/children");
    while Instant::now() < deadline {
        let children = std::fs::read_to_string(&path).unwrap_or_default();
        if let Some(pid) = children.split_whitespace().next().and_then(|word| word.parse().ok()) {
            return Ok(pid);
        }
        if let Ok(Some(ptrace::Status::Exited(code))) = ptrace::try_wait(init) {
            return Err(Error::Birth { pid: wanted, source: Errno::from_raw(code) });
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Err(Error::Birth { pid: wanted, source: Errno::ETIMEDOUT })
}

/// Makes a stub with process id `pid` and further threads `tids`. Where one of the ids is taken, or when
/// `new_pid_namespace` says so, in a PID namespace of its own, where they are free.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`, or when an id is out of range even in a new namespace.
pub(crate) fn give_birth(pid: i32, tids: &[i32], new_pid_namespace: bool, clocks: Clocks) -> Result<Birth> {
    shift_clocks(clocks)?;
    if !new_pid_namespace {
        match attempt(pid, tids, false) {
            Err(error) if error.is_id_taken() => {
                tracing::info!(pid, "pid or tid taken, using a new PID namespace");
            }
            outcome => return outcome,
        }
    }
    attempt(pid, tids, true)
}

fn attempt(pid: i32, tids: &[i32], new_pid_namespace: bool) -> Result<Birth> {
    let (courier, theirs) = Courier::pair()?;
    let born = |source| Error::Birth { pid, source };
    // N.B. declared before the stub: on failure it ends after that.
    let mut init = Init::default();
    let (outer, child) = if new_pid_namespace {
        let first = stub::spawn_in_new_namespace(pid).map_err(born)?;
        init = Init(Some(first));
        (child_of_init(first, pid)?, first)
    } else {
        let stub = stub::spawn(pid).map_err(born)?;
        (stub, stub)
    };
    let mut tracee = Tracee::adopt(outer)?;
    courier.isolate(&mut tracee)?;
    drop(theirs);
    let mut known = vec![(pid, outer)];
    for &tid in tids {
        known.push((tid, tracee.spawn_thread(tid)?));
    }
    Ok(Birth { tracee, courier, tids: known, new_pid_namespace, child, init })
}

/// Takes every mapping from a stub but the scratch one, which is moved to `scratch`, and maps the vdso at `vdso`. N.B. its
/// rseq area must be unregistered already: the kernel kills a process whose registered area is gone.
///
/// # Errors
/// When a call fails.
pub(crate) fn clear(tracee: &mut Tracee, scratch: u64, vdso: Option<u64>) -> Result<()> {
    tracee.move_scratch(scratch, 0)?;
    let (start, end) = tracee.scratch_range().expect("the scratch mapping was just moved");
    let mut batch = Batch::new();
    if start > LOWEST {
        batch.call("unmapping", libc::SYS_munmap, &[LOWEST.into(), (start - LOWEST).into()]);
    }
    batch.call("unmapping", libc::SYS_munmap, &[end.into(), (TASK_SIZE - end).into()]);
    if let Some(address) = vdso {
        batch.call("mapping the vdso", libc::SYS_arch_prctl, &[ARCH_MAP_VDSO_64.into(), address.into()]);
    }
    tracee.run(batch)?;
    Ok(())
}
