//! What the daemon itself may do: what serving pages takes, and nothing else.
//!
//! It reads what other hosts send, so somebody may take it over one day. Then it has no capabilities, makes only the system calls listed
//! here, and opens no file but what it has to look at with every call: the list of trusted hosts, and what /proc says of itself.
//! The file of its socket is not among them, so it stays when the daemon ends; the next one puts its own there.

use std::path::{Path, PathBuf};

use godwit_kernel::filter::{self, Allowed, Only};
use godwit_kernel::privileges;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, RestrictionStatus, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest Landlock that is understood here; what a kernel does not have is left out.
const LANDLOCK: ABI = ABI::V6;

/// Shuts the calling thread, and all that it starts, off from files but those below `readable`, from TCP, from abstract UNIX
/// sockets, and from signalling others (landlock(7)). To be called while there is one thread, and when all else is open.
pub(crate) fn shut_off_files(readable: &[PathBuf]) {
    match shut_off(readable) {
        Ok(RestrictionStatus { ruleset: RulesetStatus::FullyEnforced, .. }) => {}
        Ok(status) => tracing::warn!(enforced = ?status.ruleset, "this kernel's Landlock is not all that there is"),
        Err(error) => tracing::warn!(%error, "this daemon may open files that it does not need"),
    }
}

fn shut_off(readable: &[PathBuf]) -> Result<RestrictionStatus, RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    for path in readable.iter().map(PathBuf::as_path).chain([Path::new("/proc/self")]) {
        match PathFd::new(path) {
            Ok(place) => ruleset = ruleset.add_rule(PathBeneath::new(place, AccessFs::ReadFile | AccessFs::ReadDir))?,
            Err(error) => tracing::warn!(%error, path = %path.display(), "it will not be read later either"),
        }
    }
    ruleset.restrict_self()
}

const fn one_of(argument: u32, mask: u32, values: &'static [u32]) -> Only {
    Only { argument, mask, values }
}

/// Arguments that requests of a userfaultfd have in common (ioctl_userfaultfd(2)).
const USERFAULTFD: &[Only] = &[one_of(1, 0xff00, &[0xaa00])];
const NON_BLOCKING: &[Only] = &[one_of(1, !0, &[libc::FIONBIO as u32])];
const NOTHING_EXECUTABLE: &[Only] = &[one_of(2, libc::PROT_EXEC as u32, &[0])];
const THREADS: &[Only] = &[one_of(0, libc::CLONE_THREAD as u32, &[libc::CLONE_THREAD as u32])];
const FOR_READING: &[Only] = &[one_of(2, (libc::O_ACCMODE | libc::O_CREAT) as u32, &[libc::O_RDONLY as u32])];
const DATAGRAMS: &[Only] =
    &[one_of(0, !0, &[libc::AF_INET as u32, libc::AF_INET6 as u32]), one_of(1, 0xf, &[libc::SOCK_DGRAM as u32])];
/// Names of threads, and threads that give up capabilities.
const ON_THREADS: &[Only] =
    &[one_of(0, !0, &[libc::PR_SET_NAME as u32, libc::PR_CAPBSET_READ as u32, libc::PR_CAPBSET_DROP as u32])];

/// What serving takes: of the runtime (tokio, std, the allocator), of QUIC, of the socket of page servers, of userfaultfds and ledgers. Those
/// first that a fault waits for.
const NEEDED: &[Allowed] = &[
    Allowed::only(libc::SYS_ioctl, USERFAULTFD),
    Allowed::always(libc::SYS_futex),
    Allowed::always(libc::SYS_epoll_wait),
    Allowed::always(libc::SYS_sendmsg),
    Allowed::always(libc::SYS_recvmmsg),
    Allowed::always(libc::SYS_recvmsg),
    Allowed::always(libc::SYS_read),
    Allowed::always(libc::SYS_write),
    Allowed::always(libc::SYS_sched_yield),
    Allowed::always(libc::SYS_madvise),
    // More of the runtime.
    Allowed::always(libc::SYS_epoll_pwait),
    Allowed::always(libc::SYS_epoll_pwait2),
    Allowed::always(libc::SYS_epoll_ctl),
    Allowed::always(libc::SYS_epoll_create1),
    Allowed::always(libc::SYS_eventfd2),
    Allowed::always(libc::SYS_poll),
    Allowed::always(libc::SYS_ppoll),
    Allowed::always(libc::SYS_clock_gettime),
    Allowed::always(libc::SYS_clock_getres),
    Allowed::always(libc::SYS_clock_nanosleep),
    Allowed::always(libc::SYS_nanosleep),
    Allowed::always(libc::SYS_gettimeofday),
    Allowed::always(libc::SYS_getrandom),
    Allowed::always(libc::SYS_readv),
    Allowed::always(libc::SYS_writev),
    Allowed::always(libc::SYS_pread64),
    Allowed::always(libc::SYS_close),
    Allowed::always(libc::SYS_fcntl),
    Allowed::only(libc::SYS_ioctl, NON_BLOCKING),
    // Memory.
    Allowed::only(libc::SYS_mmap, NOTHING_EXECUTABLE),
    Allowed::only(libc::SYS_mprotect, NOTHING_EXECUTABLE),
    Allowed::always(libc::SYS_mremap),
    Allowed::always(libc::SYS_munmap),
    Allowed::always(libc::SYS_brk),
    Allowed::always(libc::SYS_membarrier),
    // Threads and their ends, and that of the daemon.
    Allowed::only(libc::SYS_clone, THREADS),
    Allowed::always(libc::SYS_rseq),
    Allowed::always(libc::SYS_set_robust_list),
    Allowed::always(libc::SYS_sigaltstack),
    Allowed::always(libc::SYS_rt_sigprocmask),
    Allowed::always(libc::SYS_rt_sigaction),
    Allowed::always(libc::SYS_rt_sigreturn),
    Allowed::always(libc::SYS_restart_syscall),
    Allowed::always(libc::SYS_gettid),
    Allowed::always(libc::SYS_getpid),
    Allowed::always(libc::SYS_geteuid),
    Allowed::always(libc::SYS_getcpu),
    Allowed::always(libc::SYS_sched_getaffinity),
    Allowed::always(libc::SYS_sched_getattr),
    Allowed::always(libc::SYS_sched_setattr),
    Allowed::only(libc::SYS_prctl, ON_THREADS),
    Allowed::always(libc::SYS_capget),
    Allowed::always(libc::SYS_capset),
    Allowed::always(libc::SYS_exit),
    Allowed::always(libc::SYS_exit_group),
    // Sockets: links, and the search for the largest packet of a route.
    Allowed::only(libc::SYS_socket, DATAGRAMS),
    Allowed::always(libc::SYS_bind),
    Allowed::always(libc::SYS_connect),
    Allowed::always(libc::SYS_accept4),
    Allowed::always(libc::SYS_getsockname),
    Allowed::always(libc::SYS_getpeername),
    Allowed::always(libc::SYS_getsockopt),
    Allowed::always(libc::SYS_setsockopt),
    Allowed::always(libc::SYS_sendto),
    Allowed::always(libc::SYS_recvfrom),
    Allowed::always(libc::SYS_sendmmsg),
    Allowed::always(libc::SYS_shutdown),
    // Ledgers of children, the list of trusted hosts, what a descriptor is.
    Allowed::always(libc::SYS_memfd_create),
    Allowed::always(libc::SYS_ftruncate),
    Allowed::only(libc::SYS_openat, FOR_READING),
    Allowed::always(libc::SYS_statx),
    Allowed::always(libc::SYS_newfstatat),
    Allowed::always(libc::SYS_fstat),
    Allowed::always(libc::SYS_lseek),
    Allowed::always(libc::SYS_getdents64),
    Allowed::always(libc::SYS_readlink),
    Allowed::always(libc::SYS_readlinkat),
];

/// Gives up capabilities and system calls that are not needed any more now that all sockets are there. The threads that serve
/// pages give up their capabilities themselves; what is started from here on inherits none.
pub(crate) fn give_up_the_rest() {
    if let Err(errno) = privileges::give_up_all() {
        tracing::warn!(%errno, "this daemon keeps its capabilities");
    }
    if let Err(errno) = filter::allow_calls(NEEDED) {
        tracing::warn!(%errno, "this daemon may make any system call");
    }
}
