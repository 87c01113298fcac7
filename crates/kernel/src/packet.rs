//! Packet sockets (packet(7)): seeing packets on their way in, and sending frames to everybody on a link.

use crate::check;
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What a packet socket sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// IPv4, TCP only.
    TcpOverIpv4,
    /// IPv6, TCP only, without extension headers.
    TcpOverIpv6,
}

/// Opens a socket for copies of packets of a kind that arrive in this network namespace, from their network headers on, whatever becomes
/// of the packets. It does not block, and gets none before [`see`].
///
/// # Errors
/// `EPERM` without `CAP_NET_RAW`.
pub fn arrivals(protocol: Protocol, buffer_bytes: i32) -> Result<OwnedFd, Errno> {
    let ether = match protocol {
        Protocol::TcpOverIpv4 => libc::ETH_P_IP,
        Protocol::TcpOverIpv6 => libc::ETH_P_IPV6,
    };
    // N.B. without a protocol until the filter is there.
    let socket = open(0)?;
    attach(&socket, &[statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0)])?;
    let forced = libc::SO_RCVBUFFORCE;
    let bytes = buffer_bytes.to_ne_bytes();
    crate::descriptors::set_socket_option(std::os::fd::AsFd::as_fd(&socket), libc::SOL_SOCKET, forced, &bytes)?;
    let address = address(0, ether as u16, &[]);
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `address` is a whole sockaddr_ll.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) }.into())?;
    Ok(socket)
}

/// Has a socket made by [`arrivals`] get a copy of every packet of its kind from now on, unless it has the mark `but` (`SO_MARK` of who
/// sent it from here). That is quick.
///
/// # Errors
/// `ENOMEM`.
pub fn see(socket: &OwnedFd, protocol: Protocol, but: u32) -> Result<(), Errno> {
    /// Where a filter finds the mark: `SKF_AD_OFF + SKF_AD_MARK` (linux/filter.h).
    const MARK: u32 = (-0x1000i32 + 20) as u32;
    let at = match protocol {
        Protocol::TcpOverIpv4 => 9,
        Protocol::TcpOverIpv6 => 6,
    };
    let program = [
        // A = byte at `at`; take the packet if A is TCP and its mark is another, else nothing of it
        statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, at),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 3, libc::IPPROTO_TCP as u32),
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, MARK),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, 0, but),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    attach(socket, &program)
}

fn attach(socket: &OwnedFd, program: &[libc::sock_filter]) -> Result<(), Errno> {
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    let length = size_of::<libc::sock_fprog>() as libc::socklen_t;
    let name = libc::SO_ATTACH_FILTER;
    // SAFETY: the kernel copies the program during the call; it does not write to it.
    let done =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, (&raw const filter).cast(), length) };
    check(done.into()).map(drop)
}

/// Opens a socket for [`send`].
///
/// # Errors
/// `EPERM` without `CAP_NET_RAW`.
pub fn sender() -> Result<OwnedFd, Errno> {
    open(0)
}

/// Sends `payload` as a frame of EtherType `ether` through an interface to a link-layer address.
///
/// # Errors
/// `ENETDOWN` when the interface is down, `ENXIO` when there is none of this number.
pub fn send(
    socket: BorrowedFd<'_>,
    interface: u32,
    ether: u16,
    destination: &[u8; 6],
    payload: &[u8],
) -> Result<(), Errno> {
    let address = address(interface as i32, ether, destination);
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the kernel reads `payload` and a whole sockaddr_ll.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            payload.as_ptr().cast(),
            payload.len(),
            libc::MSG_DONTWAIT,
            (&raw const address).cast(),
            length,
        )
    };
    check(sent as libc::c_long).map(drop)
}

fn open(protocol: i32) -> Result<OwnedFd, Errno> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers.
    let socket = check(unsafe { libc::socket(libc::AF_PACKET, kind, protocol) }.into())?;
    // SAFETY: the kernel has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(socket as i32) })
}

fn statement(code: u32, if_true: u8, if_false: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: if_true, jf: if_false, k }
}

fn address(interface: i32, ether: u16, destination: &[u8]) -> libc::sockaddr_ll {
    let mut bytes = [0; 8];
    bytes[..destination.len()].copy_from_slice(destination);
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ether.to_be(),
        sll_ifindex: interface,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: destination.len() as u8,
        sll_addr: bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_is_an_error() {
        match sender() {
            Ok(socket) => {
                let sent = send(std::os::fd::AsFd::as_fd(&socket), 0x7fff_ffff, 0x0806, &[0xff; 6], &[0; 28]);
                assert_eq!(sent, Err(Errno::ENXIO));
            }
            Err(errno) => assert_eq!(errno, Errno::EPERM),
        }
    }
}
