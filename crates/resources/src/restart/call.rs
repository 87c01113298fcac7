//! Which system calls wait, and where their timeouts are.

use godwit_tracee::Registers;

const FUTEX_COMMAND: u64 = 0x7f;
const FUTEX_WAIT: u64 = 0;
const TIMER_ABSTIME: u64 = 1;
/// Numbers that libc may not have yet.
const SYS_EPOLL_PWAIT2: i64 = 441;
const SYS_IO_PGETEVENTS: i64 = 333;

/// A register that carries an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Argument {
    First,
    Third,
    Fourth,
    Fifth,
}

impl Argument {
    pub(super) fn of(self, registers: &mut Registers) -> &mut u64 {
        match self {
            Self::First => &mut registers.rdi,
            Self::Third => &mut registers.rdx,
            Self::Fourth => &mut registers.r10,
            Self::Fifth => &mut registers.r8,
        }
    }
}

/// How a call is told how long to wait, counted from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timeout {
    /// In milliseconds, by value.
    Milliseconds(Argument),
    /// By pointer to a `struct timespec`.
    Timespec(Argument),
    /// Likewise, with the address (or 0) where the rest is stored when it is interrupted.
    Sleep { argument: Argument, remaining: u64 },
}

/// The timeout of a call with these registers; `None` when it has none, or an absolute one that holds unchanged.
pub(super) fn timeout(number: i64, r: &Registers) -> Option<Timeout> {
    let milliseconds = |argument: Argument| {
        let mut copy = *r;
        (*argument.of(&mut copy) as i32 >= 0).then_some(Timeout::Milliseconds(argument))
    };
    let timespec = |argument: Argument| {
        let mut copy = *r;
        (*argument.of(&mut copy) != 0).then_some(Timeout::Timespec(argument))
    };
    match number {
        libc::SYS_nanosleep => Some(Timeout::Sleep { argument: Argument::First, remaining: r.rsi }),
        libc::SYS_clock_nanosleep if r.rsi & TIMER_ABSTIME == 0 => {
            Some(Timeout::Sleep { argument: Argument::Third, remaining: r.r10 })
        }
        libc::SYS_futex if r.rsi & FUTEX_COMMAND == FUTEX_WAIT => timespec(Argument::Fourth),
        libc::SYS_poll => milliseconds(Argument::Third),
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => milliseconds(Argument::Fourth),
        SYS_EPOLL_PWAIT2 | libc::SYS_semtimedop => timespec(Argument::Fourth),
        libc::SYS_rt_sigtimedwait => timespec(Argument::Third),
        libc::SYS_io_getevents | SYS_IO_PGETEVENTS => timespec(Argument::Fifth),
        _ => None,
    }
}

/// Whether a call may return `EINTR` though no handler has run. The socket calls do when the socket has a timeout.
/// All of them have done nothing yet when they do, and can be made again.
pub(super) fn give_up_on_wake(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_epoll_wait
            | libc::SYS_epoll_pwait
            | SYS_EPOLL_PWAIT2
            | libc::SYS_rt_sigtimedwait
            | libc::SYS_semop
            | libc::SYS_semtimedop
            | libc::SYS_io_getevents
            | SYS_IO_PGETEVENTS
            | libc::SYS_accept
            | libc::SYS_accept4
            | libc::SYS_connect
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_recvmmsg
            | libc::SYS_sendto
            | libc::SYS_sendmsg
            | libc::SYS_sendmmsg
            | libc::SYS_read
            | libc::SYS_readv
            | libc::SYS_write
            | libc::SYS_writev
    )
}
