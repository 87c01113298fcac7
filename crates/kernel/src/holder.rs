//! The second holder: a tiny process that keeps copies of descriptors open, and does nothing else.
//!
//! When the last copy of a userfaultfd closes, threads that wait for a page read zeros. A holder outlives the process that
//! forked it, however that ends, so the threads go on waiting until somebody takes the descriptors up again with
//! pidfd_getfd(2). It is a fork that never returns to Rust: it closes every descriptor but its socket and receives
//! descriptors until told to leave. The end of its socket is no such word.
//!
//! In the holder the socket is descriptor 3, and what it is given lies behind it in the order of sending, without gaps.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use libc::pid_t;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::check;
use crate::stub::{SignalsBlocked, clone_with_pid};

/// Name of a holder, as in /proc/PID/comm.
pub const NAME: &str = "godwit-holder";
/// Number of the first descriptor that a holder was given.
pub const FIRST: RawFd = 4;
/// Most descriptors in one message.
pub const MOST: usize = 8;

/// The socket's number in the holder.
const SOCKET: RawFd = 3;
/// Byte: keep the descriptors of this message.
const KEEP: u8 = b'k';
/// Byte: keep them, and leave by yourself when one of the processes behind them (pidfds) has ended.
const KEEP_WHILE: u8 = b'w';
/// Byte: forget that: stay whoever ends.
const STAY: u8 = b's';
/// Byte: leave.
const LEAVE: u8 = b'l';
/// Byte: the answer.
static DONE: u8 = b'd';

/// What a holder is told to do with the descriptors it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Until it is told to leave.
    Always,
    /// Or until the process behind the last descriptor of the message, a pidfd, has ended.
    WhileAlive,
}

/// A holder, seen from the process that forked it. Dropping it leaves the holder alone.
#[derive(Debug)]
pub struct Holder {
    pid: pid_t,
    socket: OwnedFd,
}

impl Holder {
    /// Forks a holder that holds nothing yet.
    ///
    /// # Errors
    /// What socketpair(2) or clone3(2) say.
    pub fn spawn() -> Result<Self, Errno> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let _blocked = SignalsBlocked::new()?;
        // SAFETY: the child goes straight to `holder_main`, which is async-signal-safe and never returns.
        match unsafe { clone_with_pid(0, None) }? {
            0 => holder_main(theirs.as_raw_fd()),
            pid => {
                // Whoever forks it may be among the first to go where memory is short; it must not be. proc_pid_oom_score_adj(5)
                let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "0");
                Ok(Self { pid, socket: ours })
            }
        }
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> pid_t {
        self.pid
    }

    /// Gives it copies of `fds`, at most [`MOST`]; returns when it has them.
    ///
    /// # Errors
    /// `EPIPE` or `ECONNRESET` when it has been killed.
    pub fn hold(&self, fds: &[BorrowedFd<'_>], keep: Keep) -> Result<(), Errno> {
        self.tell(if keep == Keep::WhileAlive { KEEP_WHILE } else { KEEP }, fds)
    }

    /// Tells it not to leave by itself any more.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub fn stay(&self) -> Result<(), Errno> {
        self.tell(STAY, &[])
    }

    /// A descriptor by which any process can end it ([`end`]), also when this one is gone.
    ///
    /// # Errors
    /// `EMFILE` when there are too many open files.
    pub fn leash(&self) -> Result<OwnedFd, Errno> {
        let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        self.socket.try_clone().map_err(errno)
    }

    /// Ends the holder and with it its copies.
    ///
    /// # Errors
    /// When it has ended before.
    pub fn release(self) -> Result<(), Errno> {
        let told = self.tell(LEAVE, &[]);
        // SAFETY: waits for one child of this process; a null status is allowed.
        let waited = check(unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) }.into());
        told.and(waited).map(drop)
    }

    fn tell(&self, word: u8, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
        if fds.len() > MOST {
            return Err(Errno::E2BIG);
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        let bytes = [std::io::IoSlice::new(std::slice::from_ref(&word))];
        sendmsg::<()>(self.socket.as_raw_fd(), &bytes, control, MsgFlags::MSG_NOSIGNAL, None)?;
        let mut answer = [0];
        match recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())? {
            1 if answer[0] == DONE => Ok(()),
            0 => Err(Errno::ECONNRESET),
            _ => Err(Errno::EPROTO),
        }
    }
}

/// Has a holder leave, by what [`Holder::leash`] gave. It is not waited for.
///
/// # Errors
/// `EPIPE` or `ECONNRESET` when it has ended before.
pub fn end(leash: BorrowedFd<'_>) -> Result<(), Errno> {
    use nix::sys::socket::{MsgFlags, send};
    send(leash.as_raw_fd(), &[LEAVE], MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT).map(drop)
}

/// One message as the holder receives it.
struct Received {
    /// `None` at the end of the socket.
    word: Option<u8>,
    /// The last descriptor that came with it, or -1.
    last: RawFd,
}

/// What a holder does. Dies only when told to, or, where that was asked for, after the process it holds for.
fn holder_main(socket: RawFd) -> ! {
    if socket != SOCKET {
        // SAFETY: raw system calls on integers only; nothing of the parent's Rust state is touched.
        unsafe { libc::dup3(socket, SOCKET, libc::O_CLOEXEC) };
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, SOCKET + 1, u32::MAX, 0) };
    // SAFETY: as above. 0 to 2 go too: a terminal or pipe must not be kept open.
    unsafe { libc::syscall(libc::SYS_close_range, 0, SOCKET - 1, 0) };
    // SAFETY: as above; a session of its own, so that nothing sent to the parent's group arrives here.
    unsafe { libc::setsid() };
    // SAFETY: as above; the name is a static string.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"godwit-holder".as_ptr()) };
    // Places 0 to 2 are taken, so that what is received lies behind the socket.
    for _ in 0..SOCKET {
        // SAFETY: a static path.
        unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    }
    // It needs none, and is there for as long as a drain takes. Where it cannot give them up it holds all the same.
    let _ = crate::privileges::give_up_all();
    let mut watched: RawFd = -1;
    let mut socket = SOCKET;
    loop {
        let mut places = [
            libc::pollfd { fd: socket, events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: watched, events: libc::POLLIN, revents: 0 },
        ];
        // SAFETY: two valid places; negative descriptors in them are ignored.
        unsafe { libc::poll(places.as_mut_ptr(), 2, -1) };
        if places[1].revents != 0 {
            leave();
        }
        if places[0].revents == 0 {
            continue;
        }
        let received = receive();
        match received.word {
            // N.B. the number stays taken: where descriptors lie must not change.
            None => socket = -1,
            Some(LEAVE) => {
                answer();
                leave();
            }
            Some(word) => {
                match word {
                    KEEP_WHILE => watched = received.last,
                    STAY => watched = -1,
                    _ => {}
                }
                answer();
            }
        }
    }
}

fn receive() -> Received {
    const SPACE: usize = 128;
    #[repr(align(8))]
    struct Control([u8; SPACE]);
    let mut control = Control([0; SPACE]);
    let mut word = 0u8;
    let mut piece = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: 1 };
    // SAFETY: an all-zero msghdr is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = SPACE as _;
    // SAFETY: the message describes buffers that live across the call.
    let length = unsafe { libc::recvmsg(SOCKET, &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    if length != 1 {
        return Received { word: None, last: -1 };
    }
    let header = size_of::<libc::cmsghdr>();
    let filled = message.msg_controllen as usize;
    let mut last = -1;
    if filled >= header + size_of::<RawFd>() {
        // The one control message begins the buffer; its first word is its length.
        let declared = usize::from_ne_bytes([
            control.0[0],
            control.0[1],
            control.0[2],
            control.0[3],
            control.0[4],
            control.0[5],
            control.0[6],
            control.0[7],
        ]);
        if (header + size_of::<RawFd>()..=SPACE).contains(&declared) {
            let place = &control.0[declared - size_of::<RawFd>()..declared];
            last = RawFd::from_ne_bytes([place[0], place[1], place[2], place[3]]);
        }
    }
    Received { word: Some(word), last }
}

fn answer() {
    // SAFETY: sends one static byte.
    unsafe { libc::send(SOCKET, (&raw const DONE).cast(), 1, libc::MSG_NOSIGNAL) };
}

fn leave() -> ! {
    // SAFETY: ends this process without running anything of the parent's.
    unsafe { libc::_exit(0) }
}
