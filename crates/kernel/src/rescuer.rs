//! The rescuer: a tiny process that puts sockets right again should the process that forked it die.
//!
//! A socket in TCP repair mode is deaf and mute, and stays so when the process that put it there is killed. A rescuer is forked
//! before, shares the descriptors of its maker (`CLONE_FILES`), and waits. It takes the sockets that it was told of out of repair mode
//! when the thread that forked it ends without a word. That thread traces the sockets' process, which stops in the same moment and must
//! not be let go on before: so the word is a parent-death signal, which tells of the thread, not of its process. The rescuer lets nothing
//! go on itself: there may be more to put right. It is a fork that never returns to Rust.
//!
//! Forking takes a millisecond or two, and what is to be rescued is known late: so that is written into memory that both share.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::pid_t;
use nix::errno::Errno;

use crate::check;
use crate::shared::SharedWords;
use crate::stub::{SignalsBlocked, clone_with_pid};

/// Sent to a rescuer when the thread that forked it ends.
const DEATH: i32 = libc::SIGUSR1;
/// Sent to it when there is nothing to rescue any more.
const DONE: i32 = libc::SIGUSR2;

/// The word before those of the sockets: their number.
const COUNT: usize = 0;
const FIRST: usize = 1;

/// A rescuer, seen from the process that forked it. Dropping it sends it away.
#[derive(Debug)]
pub struct Rescuer {
    pid: pid_t,
    told: SharedWords,
}

/// A socket to be rescued.
#[derive(Clone, Copy, Debug)]
pub struct Endangered {
    /// The socket, here and in the rescuer.
    pub socket: RawFd,
    /// What `SO_REUSEADDR` shall be: leaving repair mode takes it away.
    pub reuse: i32,
}

impl Endangered {
    fn to_word(self) -> u64 {
        u64::from(self.socket as u32) << 32 | u64::from(self.reuse as u32)
    }

    fn of_word(word: u64) -> Self {
        Self { socket: (word >> 32) as i32, reuse: word as i32 }
    }
}

impl Rescuer {
    /// Forks a rescuer for up to `room` sockets, which acts when the calling thread ends. So far it has nothing to rescue.
    ///
    /// # Errors
    /// What memfd_create(2) or clone3(2) say.
    pub fn spawn(room: usize) -> Result<Self, Errno> {
        let told = SharedWords::create(c"godwit-rescuer", (FIRST + room) as u64)?;
        let maker = std::process::id() as pid_t;
        let _blocked = SignalsBlocked::new()?;
        // SAFETY: the child goes straight to `rescuer_main`, which is async-signal-safe and never returns.
        match unsafe { clone_with_pid(libc::CLONE_FILES as u64, None) }? {
            0 => rescuer_main(told.words(), maker),
            pid => Ok(Self { pid, told }),
        }
    }

    /// Tells it what to rescue.
    ///
    /// # Errors
    /// `ENOSPC` when they are more than there is room for.
    pub fn answer_for(&self, sockets: &[Endangered]) -> Result<(), Errno> {
        let words = self.told.words();
        let places = words.get(FIRST..FIRST + sockets.len()).ok_or(Errno::ENOSPC)?;
        for (place, endangered) in places.iter().zip(sockets) {
            place.store(endangered.to_word(), Ordering::Relaxed);
        }
        // N.B. last: what is counted is there.
        words[COUNT].store(sockets.len() as u64, Ordering::Release);
        Ok(())
    }

    /// Says that there is nothing to rescue any more. It goes when this is dropped: that takes time, which is not to be had now.
    pub fn dismiss(&self) {
        self.told.words()[COUNT].store(0, Ordering::Release);
    }
}

impl Drop for Rescuer {
    fn drop(&mut self) {
        self.dismiss();
        // SAFETY: raw system call on integers only; the child has not been waited for.
        unsafe { libc::kill(self.pid, DONE) };
        // SAFETY: waits for one child of this process; a null status is allowed.
        let _ = check(unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) }.into());
    }
}

/// What a rescuer does. N.B. it has the descriptors of its maker, not copies: it opens and closes none.
fn rescuer_main(told: &[AtomicU64], maker: pid_t) -> ! {
    const TCP_REPAIR: i32 = 19;
    const REPAIR_OFF_SILENT: i32 = -1;
    // SAFETY: raw system calls on integers only; a session of its own, so that nothing sent to the parent's group arrives here.
    unsafe { libc::setsid() };
    // SAFETY: as above.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, DEATH) };
    // SAFETY: as above; the name is a static string. N.B. whoever reads it knows that the rescuer will hear of a death.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"godwit-rescuer".as_ptr()) };
    // All signals are blocked here, so these are waited for.
    let mut words: libc::sigset_t = nothing();
    for signal in [DEATH, DONE] {
        // SAFETY: `words` is a valid set.
        unsafe { libc::sigaddset(&raw mut words, signal) };
    }
    // SAFETY: raw system call without arguments. Whoever dies before it was to send a signal is not the parent any more.
    let mut heard = if unsafe { libc::getppid() } == maker { 0 } else { DEATH };
    while heard != DEATH && heard != DONE {
        // SAFETY: a valid set; nothing more is asked about the signal.
        heard = unsafe { libc::sigwaitinfo(&raw const words, std::ptr::null_mut()) };
    }
    let count = if heard == DEATH { told[COUNT].load(Ordering::Acquire) as usize } else { 0 };
    for word in told.iter().skip(FIRST).take(count) {
        let endangered = Endangered::of_word(word.load(Ordering::Relaxed));
        set(endangered.socket, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_SILENT);
        set(endangered.socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, endangered.reuse);
    }
    // SAFETY: ends this process without running anything of the parent's.
    unsafe { libc::_exit(0) }
}

fn nothing() -> libc::sigset_t {
    // SAFETY: an all-zero set is a valid value, and empty.
    unsafe { std::mem::zeroed() }
}

fn set(socket: RawFd, level: i32, name: i32, value: i32) {
    // SAFETY: the kernel reads one int.
    unsafe { libc::setsockopt(socket, level, name, (&raw const value).cast(), size_of::<i32>() as libc::socklen_t) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptors::{set_socket_option, socket_option};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsFd, AsRawFd};

    const TCP_REPAIR: i32 = 19;

    fn is_in_repair_mode(stream: &TcpStream) -> bool {
        socket_option(stream.as_fd(), libc::IPPROTO_TCP, TCP_REPAIR, 4).unwrap() == 1i32.to_ne_bytes()
    }

    #[test]
    fn sockets_are_rescued_only_when_nothing_was_said() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("not checked: needs root");
            return;
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        for rescued in [false, true] {
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            // It acts when the thread that forked it ends.
            let rescuer = std::thread::scope(|scope| {
                let endanger = || {
                    let rescuer = Rescuer::spawn(1).unwrap();
                    let sockets = [Endangered { socket: stream.as_raw_fd(), reuse: 1 }];
                    assert_eq!(rescuer.answer_for(&[sockets[0]; 2]), Err(Errno::ENOSPC));
                    rescuer.answer_for(&sockets).unwrap();
                    let name = format!("/proc/{}/comm", rescuer.pid);
                    while !std::fs::read_to_string(&name).unwrap().starts_with("godwit-rescuer") {
                        std::thread::yield_now();
                    }
                    set_socket_option(stream.as_fd(), libc::IPPROTO_TCP, TCP_REPAIR, &1i32.to_ne_bytes()).unwrap();
                    if !rescued {
                        rescuer.dismiss();
                    }
                    rescuer
                };
                scope.spawn(endanger).join().unwrap()
            });
            let begun = std::time::Instant::now();
            while rescued && is_in_repair_mode(&stream) && begun.elapsed().as_secs() < 5 {
                std::thread::yield_now();
            }
            drop(rescuer);
            assert_eq!(is_in_repair_mode(&stream), !rescued);
        }
    }
}
