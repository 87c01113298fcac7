//! Lists of sockets that the kernel keeps (sock_diag(7)), for what no call on the socket itself tells.

use crate::{Error, Result};
use godwit_kernel::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::os::fd::AsRawFd;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const DONE: u16 = 3;
const HEADER: usize = 16;

/// One socket of a list: its message and the attributes behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) message: Vec<u8>,
    pub(crate) attributes: Vec<(u16, Vec<u8>)>,
}

impl Listed {
    /// The first attribute of a kind.
    pub(crate) fn attribute(&self, kind: u16) -> Option<&[u8]> {
        self.attributes.iter().find(|(this, _)| *this == kind).map(|(_, value)| value.as_slice())
    }

    /// A number in the message.
    pub(crate) fn word(&self, at: usize) -> Option<u32> {
        word(&self.message, at)
    }
}

/// The native word at a place.
pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Asks for a list. Each socket's message has `length` bytes before its attributes.
///
/// # Errors
/// `ENOENT` where the kernel has no such list.
pub(crate) fn list(what: &str, request: &[u8], length: usize) -> Result<Vec<Listed>> {
    let failed = |source| Error::call(what, "sock_diag", source);
    let kind = SockType::Raw;
    let netlink =
        socket(AddressFamily::Netlink, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag).map_err(failed)?;
    let mut message = Vec::with_capacity(HEADER + request.len());
    message.extend(((HEADER + request.len()) as u32).to_ne_bytes());
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(request);
    send(netlink.as_raw_fd(), &message, MsgFlags::empty()).map_err(failed)?;
    let mut listed = Vec::new();
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let received = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(failed)?;
        if read(&buffer[..received], length, &mut listed).map_err(failed)? {
            return Ok(listed);
        }
    }
}

/// Reads some messages; returns whether the list is complete.
pub(super) fn read(mut rest: &[u8], length: usize, into: &mut Vec<Listed>) -> Result<bool, Errno> {
    while rest.len() >= HEADER {
        let whole = word(rest, 0).ok_or(Errno::EBADMSG)? as usize;
        let kind = u16::from_ne_bytes([rest[4], rest[5]]);
        let content = rest.get(HEADER..whole).ok_or(Errno::EBADMSG)?;
        match kind {
            DONE => return Ok(true),
            _ if kind == libc::NLMSG_ERROR as u16 => {
                let code = word(content, 0).ok_or(Errno::EBADMSG)? as i32;
                return if code == 0 { Ok(true) } else { Err(Errno::from_raw(code.wrapping_neg())) };
            }
            SOCK_DIAG_BY_FAMILY => {
                let (message, attributes) = content.split_at_checked(length).ok_or(Errno::EBADMSG)?;
                into.push(Listed { message: message.to_vec(), attributes: split(attributes) });
            }
            _ => {}
        }
        rest = rest.get(whole.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn split(mut rest: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let mut attributes = Vec::new();
    while let Some((head, _)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let Some(value) = rest.get(4..length) else { break };
        attributes.push((u16::from_ne_bytes([head[2], head[3]]), value.to_vec()));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_an_error_or_nothing() {
        let mut listed = Vec::new();
        assert_eq!(read(&[0; 15], 4, &mut listed), Ok(false));
        assert_eq!(read(&[0; 64], 4, &mut listed), Err(Errno::EBADMSG));
        assert_eq!(read(&[0xff; 64], 4, &mut listed), Err(Errno::EBADMSG));
        assert_eq!(split(&[1, 0, 0, 0, 0]), []);
        assert!(listed.is_empty());
    }
}
