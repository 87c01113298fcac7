//! ptrace(2) and the waitpid(2) that goes with it.
//!
//! nix's `waitpid` cannot represent a stop by a real-time signal (it fails and the stop is lost), and its register types stop
//! at the general ones; hence these. All calls take a thread id; the caller must be the thread that seized it.
//!
//! A tracer that dies lets its tracees go. One that stands in the delivery of a signal is then given that signal, but only as
//! long as nobody has taken the report of the stop: waitpid(2) takes it, and the signal is lost. So stops are looked at and
//! left where they are (`WNOWAIT`), and a thread that stands in the delivery of a SIGSTOP stops its process by itself.

use crate::check;
use libc::{c_int, c_long, c_uint, c_void, pid_t};
use nix::errno::Errno;
use std::mem::MaybeUninit;

/// General purpose registers of a thread, as `PTRACE_GETREGS` returns them.
pub type Registers = libc::user_regs_struct;

/// `PTRACE_EVENT_STOP`: the stop of a seized thread by `PTRACE_INTERRUPT`, at birth, or by a group stop.
pub const EVENT_STOP: i32 = 128;
/// The signal that a stop at the entry or exit of a system call reports (`PTRACE_O_TRACESYSGOOD`): no signal of that number can
/// be delivered.
pub const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;
/// `PTRACE_EVENT_CLONE`.
pub const EVENT_CLONE: i32 = libc::PTRACE_EVENT_CLONE;

const GET_RSEQ_CONFIGURATION: c_uint = 0x420f;
const GETSIGMASK: c_uint = 0x420a;
const SETSIGMASK: c_uint = 0x420b;
const SECCOMP_GET_FILTER: c_uint = 0x420c;
const SECCOMP_GET_METADATA: c_uint = 0x420d;
const NT_X86_XSTATE: usize = 0x202;

/// What a thread that was waited for did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It ended with this exit code.
    Exited(i32),
    /// It was killed by this signal.
    Killed(i32),
    /// It is stopped; `event` is a `PTRACE_EVENT_*` number or 0 for a signal-delivery stop.
    Stopped {
        /// Signal that the stop reports.
        signal: i32,
        /// `PTRACE_EVENT_*`, or 0.
        event: i32,
    },
}

/// How `seize` sets a thread up (`PTRACE_O_*`). Stops at system calls are always told from traps.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Kill the thread when its tracer dies.
    pub exit_kill: bool,
    /// Attach to threads that it creates.
    pub trace_clone: bool,
    /// Do not apply its seccomp filters while it is traced.
    pub suspend_seccomp: bool,
}

impl Options {
    fn bits(self) -> c_long {
        let mut bits = libc::PTRACE_O_TRACESYSGOOD;
        if self.exit_kill {
            bits |= libc::PTRACE_O_EXITKILL;
        }
        if self.trace_clone {
            bits |= libc::PTRACE_O_TRACECLONE;
        }
        if self.suspend_seccomp {
            bits |= libc::PTRACE_O_SUSPEND_SECCOMP;
        }
        c_long::from(bits)
    }
}

/// Where a thread registered its restartable-sequence area (rseq(2)).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RseqConfiguration {
    /// Address of the area; 0 when there is none.
    pub pointer: u64,
    /// Its size in bytes.
    pub size: u32,
    /// Signature that precedes abort handlers.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
    pad: u32,
}

#[repr(C)]
struct PeekSigInfoArgs {
    offset: u64,
    flags: u32,
    count: i32,
}

/// Size of the kernel's `siginfo_t`.
pub const SIGINFO_SIZE: usize = 128;
/// A pending signal's `siginfo_t`, as raw bytes.
pub type SigInfo = [u8; SIGINFO_SIZE];

/// Which queue of pending signals is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// The thread's own.
    Thread,
    /// The one that all threads of the process share.
    Process,
}

/// A ptrace request whose two arguments are plain numbers.
fn request(request: c_uint, tid: pid_t, address: usize, data: usize) -> Result<c_long, Errno> {
    // SAFETY: none of the requests passed here makes the kernel write to memory of this process.
    check(unsafe { libc::ptrace(request, tid, address as *mut c_void, data as *mut c_void) })
}

/// A ptrace request whose data argument points to `data`, which the kernel reads or fills.
fn exchange<T>(request: c_uint, tid: pid_t, address: usize, data: &mut T) -> Result<c_long, Errno> {
    // SAFETY: each caller passes the type that its request is defined to read or write, exclusively borrowed.
    check(unsafe { libc::ptrace(request, tid, address as *mut c_void, std::ptr::from_mut(data)) })
}

/// Attaches to a thread without stopping it (`PTRACE_SEIZE`).
///
/// # Errors
/// `EPERM` when it is traced already or a zombie, `ESRCH` when it is gone.
pub fn seize(tid: pid_t, options: Options) -> Result<(), Errno> {
    request(libc::PTRACE_SEIZE, tid, 0, options.bits() as usize).map(drop)
}

/// Asks a seized thread to stop (`PTRACE_INTERRUPT`); the stop is reported by [`wait`].
pub fn interrupt(tid: pid_t) -> Result<(), Errno> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped thread run, delivering `signal` unless 0.
pub fn cont(tid: pid_t, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Lets a stopped thread run to the entry of its next system call, or from there to the exit, which report [`SYSCALL_STOP`].
pub fn cont_to_syscall(tid: pid_t) -> Result<(), Errno> {
    request(libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// Sets a stopped thread up anew.
pub fn set_options(tid: pid_t, options: Options) -> Result<(), Errno> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, options.bits() as usize).map(drop)
}

/// Reads why the signal was sent that a thread stands in the delivery of (`si_code` of sigaction(2)).
///
/// # Errors
/// `EINVAL` in a group stop.
pub fn signal_code(tid: pid_t) -> Result<i32, Errno> {
    let mut info: SigInfo = [0; SIGINFO_SIZE];
    exchange(libc::PTRACE_GETSIGINFO, tid, 0, &mut info)?;
    Ok(i32::from_le_bytes([info[8], info[9], info[10], info[11]]))
}

/// Lets go of a stopped thread, delivering `signal` unless 0.
pub fn detach(tid: pid_t, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// Reads the general registers.
pub fn registers(tid: pid_t) -> Result<Registers, Errno> {
    let mut registers = MaybeUninit::<Registers>::zeroed();
    exchange(libc::PTRACE_GETREGS, tid, 0, &mut registers)?;
    // SAFETY: the structure is plain integers, zeroed before and filled by the kernel.
    Ok(unsafe { registers.assume_init() })
}

/// Writes the general registers.
pub fn set_registers(tid: pid_t, registers: &Registers) -> Result<(), Errno> {
    let mut copy = *registers;
    exchange(libc::PTRACE_SETREGS, tid, 0, &mut copy).map(drop)
}

/// Reads the whole XSAVE area (`NT_X86_XSTATE`).
pub fn xstate(tid: pid_t) -> Result<Vec<u8>, Errno> {
    let mut area = vec![0u8; 16 * 1024];
    let mut iov = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    exchange(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, &mut iov)?;
    area.truncate(iov.iov_len);
    Ok(area)
}

/// Writes the whole XSAVE area.
///
/// # Errors
/// `EINVAL` when the area does not fit this CPU, `EFAULT` when it is too short.
pub fn set_xstate(tid: pid_t, area: &[u8]) -> Result<(), Errno> {
    let mut copy = area.to_vec();
    let mut iov = libc::iovec { iov_base: copy.as_mut_ptr().cast(), iov_len: copy.len() };
    exchange(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, &mut iov).map(drop)
}

/// Reads the mask of blocked signals.
pub fn signal_mask(tid: pid_t) -> Result<u64, Errno> {
    let mut mask = 0u64;
    exchange(GETSIGMASK, tid, size_of::<u64>(), &mut mask)?;
    Ok(mask)
}

/// Replaces the mask of blocked signals.
pub fn set_signal_mask(tid: pid_t, mask: u64) -> Result<(), Errno> {
    let mut copy = mask;
    exchange(SETSIGMASK, tid, size_of::<u64>(), &mut copy).map(drop)
}

/// Reads where the thread registered its restartable-sequence area.
pub fn rseq_configuration(tid: pid_t) -> Result<RseqConfiguration, Errno> {
    let mut configuration = RseqConfiguration::default();
    exchange(GET_RSEQ_CONFIGURATION, tid, size_of::<RseqConfiguration>(), &mut configuration)?;
    Ok(configuration)
}

/// Reads the value that goes with the event stop just reported (for example a new thread's id).
pub fn event_message(tid: pid_t) -> Result<u64, Errno> {
    let mut message: libc::c_ulong = 0;
    exchange(libc::PTRACE_GETEVENTMSG, tid, 0, &mut message)?;
    Ok(message)
}

/// Lists the pending signals of a queue without taking them off it (`PTRACE_PEEKSIGINFO`).
pub fn pending_signals(tid: pid_t, queue: Queue) -> Result<Vec<SigInfo>, Errno> {
    const BATCH: usize = 32;
    let mut pending = Vec::new();
    loop {
        let mut args = PeekSigInfoArgs {
            offset: pending.len() as u64,
            flags: u32::from(queue == Queue::Process),
            count: BATCH as i32,
        };
        let mut batch = [[0u8; SIGINFO_SIZE]; BATCH];
        // SAFETY: `args` is the structure PTRACE_PEEKSIGINFO reads, and `batch` has room for the `count` entries it asks for.
        let got = check(unsafe {
            libc::ptrace(libc::PTRACE_PEEKSIGINFO, tid, std::ptr::from_mut(&mut args), batch.as_mut_ptr())
        })? as usize;
        pending.extend_from_slice(&batch[..got]);
        if got < BATCH {
            return Ok(pending);
        }
    }
}

/// Reads seccomp filter number `index` (0 is the oldest) as raw `struct sock_filter` instructions.
///
/// # Errors
/// `ENOENT` past the newest filter; `EACCES` without `CAP_SYS_ADMIN`.
pub fn seccomp_filter(tid: pid_t, index: usize) -> Result<Vec<[u8; 8]>, Errno> {
    let count = request(SECCOMP_GET_FILTER, tid, index, 0)? as usize;
    let mut filter = vec![[0u8; 8]; count];
    // SAFETY: the kernel writes the `count` instructions it has just announced; a filter never changes.
    check(unsafe { libc::ptrace(SECCOMP_GET_FILTER, tid, index as *mut c_void, filter.as_mut_ptr()) })?;
    Ok(filter)
}

/// Reads the flags (`SECCOMP_FILTER_FLAG_*`) that filter number `index` was installed with.
pub fn seccomp_filter_flags(tid: pid_t, index: u64) -> Result<u64, Errno> {
    let mut metadata = [index, 0u64];
    exchange(SECCOMP_GET_METADATA, tid, size_of_val(&metadata), &mut metadata)?;
    Ok(metadata[1])
}

/// Looks for a report of a thread (`__WALL`), without taking it. Without blocking returns `None` when there is none.
fn look(tid: pid_t, flags: c_int) -> Result<Option<Status>, Errno> {
    let flags = libc::WEXITED | libc::__WALL | flags;
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    loop {
        // SAFETY: `info` is a valid place for what is reported.
        match check(unsafe { libc::waitid(libc::P_PID, tid as libc::id_t, info.as_mut_ptr(), flags) }.into()) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    // SAFETY: plain integers, zeroed before and filled by the kernel.
    let info = unsafe { info.assume_init() };
    // SAFETY: waitid(2) fills the fields of SIGCHLD; with nothing to report they are zero.
    if unsafe { info.si_pid() } == 0 {
        return Ok(None);
    }
    // SAFETY: as above.
    let status = unsafe { info.si_status() };
    Ok(Some(match info.si_code {
        libc::CLD_EXITED => Status::Exited(status),
        libc::CLD_KILLED | libc::CLD_DUMPED => Status::Killed(status),
        _ => Status::Stopped { signal: status & 0xff, event: status >> 8 },
    }))
}

/// Looks for a report, and takes it if it is that of an end. That of a stop stays until the thread is resumed.
fn wait_with(tid: pid_t, flags: c_int) -> Result<Option<Status>, Errno> {
    let seen = look(tid, libc::WNOWAIT | flags)?;
    if let Some(Status::Exited(_) | Status::Killed(_)) = seen {
        look(tid, libc::WNOHANG)?;
    }
    Ok(seen)
}

/// Waits until a thread stops or ends. A thread that stands still is reported again and again.
pub fn wait(tid: pid_t) -> Result<Status, Errno> {
    loop {
        if let Some(status) = wait_with(tid, 0)? {
            return Ok(status);
        }
    }
}

/// Returns what a thread has to report, `None` if nothing. A thread that stands still is reported again and again.
pub fn try_wait(tid: pid_t) -> Result<Option<Status>, Errno> {
    wait_with(tid, libc::WNOHANG)
}
