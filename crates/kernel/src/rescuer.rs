//! The rescuer: a tiny process that puts sockets right again should the process that forked it die.
//!
//! A socket in TCP repair mode is deaf and mute, and stays so when the process that put it there is killed. A rescuer is forked
//! before: it has copies of the sockets, waits at a pipe, and takes them out of repair mode when the thread that forked it ends
//! without a word. That thread traces the sockets' process, which runs on in the same moment: the rescuer learns of it by its
//! parent-death signal, for the pipe only ends with the last thread. It is a fork that never returns to Rust.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use libc::pid_t;
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::check;
use crate::stub::{SignalsBlocked, clone_with_pid};

/// Sent to a rescuer when the thread that forked it ends.
const DEATH: i32 = libc::SIGUSR1;
/// Byte: there is nothing to rescue any more.
static DONE: u8 = b'd';

/// A rescuer, seen from the process that forked it. Dropping it sends it away.
#[derive(Debug)]
pub struct Rescuer {
    pid: pid_t,
    pipe: Option<OwnedFd>,
}

/// A socket to be rescued.
#[derive(Clone, Copy, Debug)]
pub struct Endangered {
    /// The socket, here and in the rescuer.
    pub socket: RawFd,
    /// What `SO_REUSEADDR` shall be: leaving repair mode takes it away.
    pub reuse: i32,
}

impl Rescuer {
    /// Forks a rescuer for these sockets of process `owner`, which acts when the calling thread ends. By then the process stops by
    /// itself; the rescuer has it continue (`SIGCONT`) when all is right again. 0 stands for nobody.
    ///
    /// # Errors
    /// What pipe2(2) or clone3(2) say.
    pub fn spawn(sockets: &[Endangered], owner: pid_t) -> Result<Self, Errno> {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let _blocked = SignalsBlocked::new()?;
        let (waits_at, not_held) = (reader.as_raw_fd(), writer.as_raw_fd());
        // SAFETY: the child goes straight to `rescuer_main`, which is async-signal-safe and never returns.
        match unsafe { clone_with_pid(0, None) }? {
            0 => rescuer_main(waits_at, not_held, sockets, owner),
            pid => Ok(Self { pid, pipe: Some(writer) }),
        }
    }

    /// Says that there is nothing to rescue any more, without waiting for it to go.
    pub fn dismiss(&self) {
        if let Some(pipe) = &self.pipe {
            let _ = nix::unistd::write(pipe, std::slice::from_ref(&DONE));
        }
    }
}

impl Drop for Rescuer {
    fn drop(&mut self) {
        self.dismiss();
        // SAFETY: waits for one child of this process; a null status is allowed.
        let _ = check(unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) }.into());
    }
}

/// What a rescuer does. `sockets` is its own copy of its parent's memory.
fn rescuer_main(waits_at: RawFd, not_held: RawFd, sockets: &[Endangered], owner: pid_t) -> ! {
    const TCP_REPAIR: i32 = 19;
    const REPAIR_OFF_SILENT: i32 = -1;
    // SAFETY: raw system calls on integers only; nothing of the parent's Rust state is touched but plain memory.
    unsafe { libc::close(not_held) };
    // SAFETY: as above; a session of its own, so that nothing sent to the parent's group arrives here.
    unsafe { libc::setsid() };
    // SAFETY: as above; the name is a static string.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"godwit-rescuer".as_ptr()) };
    // All signals are blocked here, so this one is read from a descriptor.
    let mut death: libc::sigset_t = nothing();
    // SAFETY: `death` is a valid set.
    unsafe { libc::sigaddset(&raw mut death, DEATH) };
    // SAFETY: as above.
    let deaths = unsafe { libc::signalfd(-1, &raw const death, libc::SFD_CLOEXEC) };
    // SAFETY: raw system call on integers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, DEATH) };
    let mut places = [waits_at, deaths].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: two valid places. Should the parent have died before it was to send a signal, the pipe ends.
    while unsafe { libc::poll(places.as_mut_ptr(), 2, -1) } < 0 {}
    if places[0].revents & libc::POLLIN == 0 {
        for endangered in sockets {
            set(endangered.socket, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_SILENT);
            set(endangered.socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, endangered.reuse);
        }
        if owner > 0 {
            // SAFETY: raw system call on integers only.
            unsafe { libc::kill(owner, libc::SIGCONT) };
        }
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
    use std::os::fd::AsFd;

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
            let mut rescuer = Rescuer::spawn(&[Endangered { socket: stream.as_raw_fd(), reuse: 1 }], 0).unwrap();
            set_socket_option(stream.as_fd(), libc::IPPROTO_TCP, TCP_REPAIR, &1i32.to_ne_bytes()).unwrap();
            if rescued {
                // As if this process had died: its end of the pipe is gone.
                rescuer.pipe = None;
            }
            drop(rescuer);
            assert_eq!(is_in_repair_mode(&stream), !rescued);
        }
    }
}
