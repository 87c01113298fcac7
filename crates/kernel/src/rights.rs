//! Descriptors that travel over UNIX sockets: SCM_RIGHTS of unix(7).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Most descriptors in one message here; the kernel takes 253.
pub const MOST: usize = 64;

/// Sends one message with copies of `fds`.
///
/// # Errors
/// `E2BIG` for more than [`MOST`], `EPIPE` when the peer is gone.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    if fds.len() > MOST {
        return Err(Errno::E2BIG);
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
}

/// Receives one message: how many bytes it has, and its descriptors, which are closed on exec. 0 bytes are the end.
///
/// # Errors
/// `EMSGSIZE` when the message did not fit, or what recvmsg(2) says.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let mut control = cmsg_space!([RawFd; MOST]);
    let mut pieces = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            for fd in raw {
                // SAFETY: the kernel has just opened this descriptor for us, and no one else knows of it.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    if received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(Errno::EMSGSIZE);
    }
    Ok((received.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_arrives_with_its_message() {
        let (one, two) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        send(one.as_fd(), b"hello", &[file.as_fd(), one.as_fd()]).unwrap();
        let mut buffer = [0; 16];
        let (length, fds) = receive(two.as_fd(), &mut buffer).unwrap();
        assert_eq!((&buffer[..length], fds.len()), (&b"hello"[..], 2));
        send(one.as_fd(), &[0; 17], &[]).unwrap();
        assert_eq!(receive(two.as_fd(), &mut buffer).unwrap_err(), Errno::EMSGSIZE);
    }
}
