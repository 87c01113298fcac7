//! Asking the kernel about one UNIX socket: who its peer is and what waits in it (sock_diag(7)).

use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_network::Namespace;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::cell::OnceCell;
use std::os::fd::{AsRawFd, OwnedFd};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SHOW_PEER: u32 = 4;
const SHOW_QUEUE_LENGTHS: u32 = 16;
const ATTRIBUTE_PEER: u16 = 2;
const ATTRIBUTE_QUEUE_LENGTHS: u16 = 4;
const ATTRIBUTE_SHUTDOWN: u16 = 6;
const HEADER: usize = 16;
const MESSAGE: usize = 16;

/// What the kernel says of a UNIX socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct UnixState {
    /// `TCP_*` state number.
    pub(crate) state: u8,
    /// Inode of the peer; 0 when there is none, or it is closed.
    pub(crate) peer: u32,
    /// Whether it is tied to a peer at all, closed or not.
    pub(crate) has_peer: bool,
    /// Bytes that wait; of a listening socket, connections that wait.
    pub(crate) waiting: u32,
    /// Of a listening socket, its backlog.
    pub(crate) backlog: u32,
    /// 1 for reading, 2 for writing, 3 for both.
    pub(crate) shutdown: u8,
}

/// The socket that questions go through, opened when the first is asked.
#[derive(Debug)]
pub(crate) struct UnixDiag {
    pid: i32,
    opened: OnceCell<OwnedFd>,
}

impl UnixDiag {
    /// Prepares for asking about sockets of the network namespace of process `pid`.
    pub(crate) fn of(pid: i32) -> Self {
        Self { pid, opened: OnceCell::new() }
    }

    fn netlink(&self) -> Result<&OwnedFd> {
        if let Some(open) = self.opened.get() {
            return Ok(open);
        }
        let open =
            || socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag);
        let opened = Namespace::of_process(self.pid)?.inside(open)?;
        let opened = opened.map_err(|source| Error::call("sock_diag", "opening a netlink socket", source))?;
        Ok(self.opened.get_or_init(|| opened))
    }

    /// Asks about the socket with this inode.
    ///
    /// # Errors
    /// `ENOENT` when there is none in this network namespace.
    pub(crate) fn ask(&self, inode: u32) -> Result<UnixState> {
        let failed = |what| move |source| Error::call(format!("UNIX socket {inode}"), what, source);
        let netlink = self.netlink()?.as_raw_fd();
        send(netlink, &question(inode), MsgFlags::empty()).map_err(failed("sock_diag"))?;
        let mut answer = [0u8; 4096];
        let length = recv(netlink, &mut answer, MsgFlags::empty()).map_err(failed("sock_diag"))?;
        read_answer(&answer[..length]).map_err(failed("sock_diag"))
    }
}

fn question(inode: u32) -> Vec<u8> {
    const NO_COOKIE: u32 = u32::MAX;
    let mut message = Vec::with_capacity(40);
    message.extend(40u32.to_ne_bytes());
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    for word in [u32::MAX, inode, SHOW_PEER | SHOW_QUEUE_LENGTHS, NO_COOKIE, NO_COOKIE] {
        message.extend(word.to_ne_bytes());
    }
    message
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(super) fn read_answer(answer: &[u8]) -> Result<UnixState, Errno> {
    let short = Errno::EBADMSG;
    if half(answer, 4).ok_or(short)? == libc::NLMSG_ERROR as u16 {
        return Err(Errno::from_raw((word(answer, HEADER).ok_or(short)? as i32).wrapping_neg()));
    }
    let mut state = UnixState { state: *answer.get(HEADER + 2).ok_or(short)?, ..UnixState::default() };
    let mut at = HEADER + MESSAGE;
    while let (Some(length), Some(kind)) = (half(answer, at), half(answer, at + 2)) {
        if length < 4 {
            return Err(short);
        }
        match kind {
            ATTRIBUTE_PEER => {
                state.has_peer = true;
                state.peer = word(answer, at + 4).ok_or(short)?;
            }
            ATTRIBUTE_QUEUE_LENGTHS => {
                state.waiting = word(answer, at + 4).ok_or(short)?;
                state.backlog = word(answer, at + 8).ok_or(short)?;
            }
            ATTRIBUTE_SHUTDOWN => state.shutdown = *answer.get(at + 4).ok_or(short)?,
            _ => {}
        }
        at += usize::from(length).next_multiple_of(4);
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Shutdown, shutdown, socketpair};
    use nix::sys::stat::fstat;

    #[test]
    fn a_pair_knows_its_peer() {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
        nix::unistd::write(&a, b"four").unwrap();
        shutdown(a.as_raw_fd(), Shutdown::Write).unwrap();
        let inodes = [&a, &b].map(|end| fstat(end).unwrap().st_ino as u32);
        let diag = UnixDiag::of(std::process::id() as i32);
        let (state_a, state_b) = (diag.ask(inodes[0]).unwrap(), diag.ask(inodes[1]).unwrap());
        assert_eq!((state_a.peer, state_b.peer), (inodes[1], inodes[0]));
        assert_eq!((state_a.shutdown, state_b.shutdown, state_b.waiting), (2, 1, 4));
        drop(a);
        let orphan = diag.ask(inodes[1]).unwrap();
        assert!(orphan.peer == 0 && orphan.shutdown == 3, "{orphan:?}");
        assert!(matches!(diag.ask(inodes[0]), Err(Error::Call { source: Errno::ENOENT, .. })));
    }

    #[test]
    fn short_answers_are_errors() {
        for length in 0..18 {
            assert!(read_answer(&vec![0; length]).is_err());
        }
    }
}
