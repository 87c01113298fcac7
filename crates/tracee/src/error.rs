use godwit_kernel::Errno;
use std::path::PathBuf;

/// What can go wrong with a tracee. That it died is [`Error::Gone`]: an outcome every caller must expect.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A thread or process has exited or was killed.
    #[error("process {0} is gone")]
    Gone(i32),
    /// ptrace refused to attach.
    #[error("cannot attach to thread {tid}: {source}")]
    Seize {
        /// Thread.
        tid: i32,
        /// Cause.
        source: Errno,
    },
    /// Another tracer holds it.
    #[error("thread {tid} is already traced by process {tracer} (a debugger or strace?)")]
    AlreadyTraced {
        /// Thread.
        tid: i32,
        /// Pid of the other tracer.
        tracer: i32,
    },
    /// The thread group leader has exited while other threads live on.
    #[error("the main thread of process {0} has exited while other threads run")]
    LeaderExited(i32),
    /// A thread did not stop in time.
    #[error("thread {tid} did not stop within {waited_ms} ms (state {state}: it is blocked inside the kernel)")]
    StopTimeout {
        /// Thread.
        tid: i32,
        /// State letter of proc_pid_stat(5).
        state: char,
        /// Time waited.
        waited_ms: u64,
    },
    /// New threads kept appearing faster than they could be stopped.
    #[error("process {0} creates threads faster than they can be stopped")]
    NeverSettles(i32),
    /// A ptrace request failed.
    #[error("ptrace {request} on thread {tid}: {source}")]
    Ptrace {
        /// Request.
        request: &'static str,
        /// Thread.
        tid: i32,
        /// Cause.
        source: Errno,
    },
    /// The tracee has no `syscall` instruction that could be borrowed.
    #[error("process {0} has no system call instruction in its vdso or code")]
    NoSyscallInstruction(i32),
    /// A system call that the tracee was made to run failed.
    #[error("{what} inside process {pid}: {source}")]
    Remote {
        /// What was attempted.
        what: String,
        /// Process.
        pid: i32,
        /// Cause.
        source: Errno,
    },
    /// The tracee crashed while running for us.
    #[error("thread {tid} took signal {signal} at {address:#x} while running remote system calls")]
    Crashed {
        /// Thread.
        tid: i32,
        /// Signal number.
        signal: i32,
        /// Instruction pointer.
        address: u64,
    },
    /// A remote call did not return.
    #[error("a remote system call in thread {tid} did not return within {waited_ms} ms")]
    CallTimeout {
        /// Thread.
        tid: i32,
        /// Time waited.
        waited_ms: u64,
    },
    /// Its memory could not be read or written.
    #[error("memory of process {pid} at {address:#x}: {source}")]
    Memory {
        /// Process.
        pid: i32,
        /// First address.
        address: u64,
        /// Cause.
        source: Errno,
    },
    /// A file under /proc could not be read.
    #[error("{path}: {source}")]
    Proc {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A file under /proc has an unknown form.
    #[error("{path}: cannot make sense of {text:?}")]
    ProcText {
        /// File.
        path: PathBuf,
        /// The line.
        text: String,
    },
    /// The ledger of a process could not be written.
    #[error("the ledger of process {pid} cannot be written: {source}")]
    Ledger {
        /// Process.
        pid: i32,
        /// Cause.
        source: Errno,
    },
    /// A file is not a ledger, or is damaged.
    #[error("not a ledger, or a damaged one")]
    BadLedger,
    /// A process that is to be put right is traced.
    #[error("process {0} is still traced by another program")]
    StillTraced(i32),
    /// No such thread in this tracee.
    #[error("process {pid} has no stopped thread {tid}")]
    NoThread {
        /// Process.
        pid: i32,
        /// Thread.
        tid: i32,
    },
}

impl Error {
    /// Builds the error of a failed ptrace request; a vanished thread becomes [`Error::Gone`].
    pub(crate) fn ptrace(request: &'static str, tid: i32, source: Errno) -> Self {
        if source == Errno::ESRCH { Self::Gone(tid) } else { Self::Ptrace { request, tid, source } }
    }

    /// The error of memory that could not be read or written; where the process is gone, [`Error::Gone`].
    #[must_use]
    pub fn memory(pid: i32, address: u64, source: Errno) -> Self {
        if source == Errno::ESRCH { Self::Gone(pid) } else { Self::Memory { pid, address, source } }
    }

    pub(crate) fn proc(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Proc { path: path.into(), source }
    }
}
