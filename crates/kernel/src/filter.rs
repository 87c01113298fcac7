//! Which system calls a program may still make (seccomp(2)): a list of those that it needs, and nothing else.
//!
//! What is forbidden fails with `EPERM` rather than kills: a daemon that comes upon a call which nobody thought of goes on with what it
//! can do without. The kernel's log says which call it was, where the kernel keeps one (audit, `SECCOMP_FILTER_FLAG_LOG`).

use crate::check;
use crate::privileges::gain_nothing;
use libc::{c_long, sock_filter};
use nix::errno::Errno;

/// `AUDIT_ARCH_X86_64`.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Bit in the numbers of x32, a second table of the same calls.
const X32: u32 = 0x4000_0000;
/// Places in `struct seccomp_data`: the number of the call, the architecture, and the low half of the first argument.
const CALL_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

/// A system call that may be made.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    call: c_long,
    only: &'static [Only],
}

/// What the low 32 bits of an argument must be: with `mask`, one of `values`. A pointer cannot be followed.
#[derive(Clone, Copy, Debug)]
pub struct Only {
    /// Which argument, counted from 0.
    pub argument: u32,
    /// The bits that count.
    pub mask: u32,
    /// What they may be.
    pub values: &'static [u32],
}

impl Allowed {
    /// Allows a call with any arguments.
    #[must_use]
    pub const fn always(call: c_long) -> Self {
        Self { call, only: &[] }
    }

    /// Allows a call where all of this holds of its arguments.
    #[must_use]
    pub const fn only(call: c_long, only: &'static [Only]) -> Self {
        Self { call, only }
    }

    /// Its part of the filter, which begins and ends with the number of the call in the accumulator.
    fn program(&self) -> Vec<sock_filter> {
        let mut body = Vec::new();
        let length: usize = self.only.iter().map(|only| only.values.len() + 3).sum();
        for only in self.only {
            body.extend([step(LOAD, ARGUMENTS_AT + 8 * only.argument, 0, 0), step(AND, only.mask, 0, 0)]);
            for (&value, after) in only.values.iter().zip((0..only.values.len()).rev()) {
                // Past the other values, and past the jump behind them.
                body.push(step(EQUAL, value, after as u8 + 1, 0));
            }
            // Past what follows of the conditions, and past the permission.
            let rest = length - body.len() - 1;
            body.push(step(JUMP, rest as u32 + 1, 0, 0));
        }
        body.push(step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0));
        if !self.only.is_empty() {
            body.push(step(LOAD, CALL_AT, 0, 0));
        }
        let mut program = vec![step(EQUAL, self.call as u32, 0, body.len() as u8)];
        program.extend(body);
        program
    }
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

const fn step(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Has all system calls fail from now on with `EPERM`, in all threads of the process and what they start, but those that are allowed: the
/// first ones cost least. clone3(2), whose flags no filter can see, fails with `ENOSYS`, so that clone(2) is used instead. Takes
/// [`gain_nothing`] along.
///
/// # Errors
/// `EINVAL` where the kernel has no filters, `ESRCH` where a thread has a filter of its own.
pub fn allow_calls(allowed: &[Allowed]) -> Result<(), Errno> {
    gain_nothing()?;
    let deny = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let absent = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    // N.B. a filter of its own: it is asked for with every thread, and not worth a line in the log.
    let mut program = vec![step(LOAD, CALL_AT, 0, 0), step(EQUAL, libc::SYS_clone3 as u32, 0, 1)];
    program.extend([step(RETURN, absent, 0, 0), step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0)]);
    install(&mut program, 0)?;
    let mut program = vec![step(LOAD, ARCHITECTURE_AT, 0, 0), step(EQUAL, ARCHITECTURE, 1, 0)];
    program.extend([step(RETURN, deny, 0, 0), step(LOAD, CALL_AT, 0, 0)]);
    program.extend([step(AT_LEAST, X32, 0, 1), step(RETURN, deny, 0, 0)]);
    let clone3 = Allowed::always(libc::SYS_clone3);
    program.extend(allowed.iter().chain([&clone3]).flat_map(Allowed::program));
    program.push(step(RETURN, deny, 0, 0));
    install(&mut program, libc::SECCOMP_FILTER_FLAG_LOG)
}

fn install(program: &mut [sock_filter], flags: libc::c_ulong) -> Result<(), Errno> {
    let length = u16::try_from(program.len()).map_err(|_| Errno::E2BIG)?;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_TSYNC | flags);
    // SAFETY: the kernel copies `len` instructions from where they are, and checks them.
    match check(unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) })? {
        0 => Ok(()),
        // The id of the thread that stands in the way.
        _ => Err(Errno::ESRCH),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

    /// What a thread takes, what is tried, and two calls under conditions.
    const ALLOWED: &[Allowed] = &[
        Allowed::only(
            libc::SYS_socket,
            &[
                Only { argument: 0, mask: !0, values: &[libc::AF_INET as u32, libc::AF_INET6 as u32] },
                Only { argument: 1, mask: 0xf, values: &[libc::SOCK_DGRAM as u32] },
            ],
        ),
        Allowed::only(libc::SYS_socket, &[Only { argument: 2, mask: !0, values: &[77] }]),
        Allowed::only(
            libc::SYS_clone,
            &[Only { argument: 0, mask: libc::CLONE_THREAD as u32, values: &[libc::CLONE_THREAD as u32] }],
        ),
        Allowed::always(libc::SYS_getpgid),
        Allowed::always(libc::SYS_close),
        Allowed::always(libc::SYS_futex),
        Allowed::always(libc::SYS_mmap),
        Allowed::always(libc::SYS_munmap),
        Allowed::always(libc::SYS_mprotect),
        Allowed::always(libc::SYS_madvise),
        Allowed::always(libc::SYS_rseq),
        Allowed::always(libc::SYS_set_robust_list),
        Allowed::always(libc::SYS_rt_sigprocmask),
        Allowed::always(libc::SYS_sigaltstack),
        Allowed::always(libc::SYS_sched_getaffinity),
        Allowed::always(libc::SYS_prctl),
        Allowed::always(libc::SYS_gettid),
        Allowed::always(libc::SYS_brk),
        Allowed::always(libc::SYS_exit),
        Allowed::always(libc::SYS_exit_group),
    ];

    fn opens(family: AddressFamily, kind: SockType) -> Option<Errno> {
        socket(family, kind, SockFlag::SOCK_CLOEXEC, None).err()
    }

    /// What is wrong, as an exit code.
    fn first_mistake() -> i32 {
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let (answer, answered) = std::sync::mpsc::channel();
        // One that was there before.
        std::thread::spawn(move || {
            let _ = told.recv();
            let _ = answer.send(nix::unistd::getsid(None));
        });
        let forbidden = allow_calls(ALLOWED);
        let _ = tell.send(());
        let expected = [
            forbidden.is_ok(),
            answered.recv() == Ok(Err(Errno::EPERM)),
            nix::unistd::getsid(None) == Err(Errno::EPERM),
            nix::unistd::getpgid(None).is_ok(),
            opens(AddressFamily::Inet, SockType::Datagram).is_none(),
            opens(AddressFamily::Inet6, SockType::Datagram).is_none(),
            opens(AddressFamily::Inet, SockType::Stream) == Some(Errno::EPERM),
            opens(AddressFamily::Unix, SockType::Datagram) == Some(Errno::EPERM),
            // SAFETY: takes integers; a child that there was against expectation would end with this one's words.
            check(unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) }) == Err(Errno::EPERM),
            // SAFETY: the kernel does not come to look at the pointer.
            check(unsafe { libc::syscall(libc::SYS_clone3, 0, 0) }) == Err(Errno::ENOSYS),
            std::thread::spawn(|| nix::unistd::getpgid(None).is_ok()).join().unwrap_or(false),
        ];
        expected.iter().position(|held| !held).map_or(0, |place| place as i32 + 1)
    }

    /// In a process of its own: a filter is there to stay.
    #[test]
    fn what_is_not_allowed_fails_in_all_threads() {
        // SAFETY: the child only makes system calls, allocates, and ends; the tests run in a process each.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let mistake = first_mistake();
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(mistake) };
        }
        assert!(child > 0);
        let mut status = 0;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the number of the expectation that did not hold, times 256");
    }
}
