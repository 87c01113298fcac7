//! Handing packets to the sockets of this host, as if they had just arrived.
//!
//! A raw socket (raw(7)) sends each to the address that it is meant for, which is one of this host: it goes through the
//! loopback device and keeps the route it was sent by, so that nothing asks whether its sender can be there.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use godwit_kernel::Errno;
use godwit_kernel::descriptors::set_socket_option;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket};

use crate::address::addresses;
use crate::error::{Error, Result};
use crate::packet;

/// Delivers packets.
#[derive(Debug)]
pub struct Delivery {
    /// The addresses of this host: a packet for any other would be sent to somebody else.
    here: HashSet<IpAddr>,
    ipv4: OwnedFd,
    ipv6: Option<OwnedFd>,
}

impl Delivery {
    /// Prepares for delivering to the addresses that this host has now.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW`.
    pub fn new() -> Result<Self> {
        let ipv4 = raw(AddressFamily::Inet)?;
        // A host may do without IPv6.
        let ipv6 = match raw(AddressFamily::Inet6) {
            Ok(socket) => {
                const IPV6_HDRINCL: i32 = 36;
                set_socket_option(socket.as_fd(), libc::IPPROTO_IPV6, IPV6_HDRINCL, &1i32.to_ne_bytes())
                    .map_err(|source| Error::call("raw socket", "IPV6_HDRINCL", source))?;
                Some(socket)
            }
            Err(Error::Call { source: Errno::EAFNOSUPPORT, .. }) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { here: addresses()?, ipv4, ipv6 })
    }

    /// Delivers one packet, from its IP header on. Returns whether it was one that can be delivered; what the kernel then
    /// makes of it is the business of TCP, which has its packets again if they are lost.
    pub fn deliver(&self, mut bytes: Vec<u8>) -> bool {
        let Some(arrival) = packet::read(&bytes) else { return false };
        if packet::complete(&mut bytes).is_none() {
            return false;
        }
        let to = arrival.flow.local.ip();
        if !to.is_loopback() && !self.here.contains(&to) {
            return false;
        }
        let socket = match (to, &self.ipv6) {
            (IpAddr::V4(_), _) => &self.ipv4,
            (IpAddr::V6(_), Some(socket)) => socket,
            (IpAddr::V6(_), None) => return false,
        };
        let to = SockaddrStorage::from(SocketAddr::new(to, 0));
        match sendto(socket.as_raw_fd(), &bytes, &to, MsgFlags::MSG_DONTWAIT) {
            Ok(_) => true,
            Err(errno) => {
                tracing::debug!(%errno, flow = ?arrival.flow, "a packet that was held back is lost");
                false
            }
        }
    }
}

fn raw(family: AddressFamily) -> Result<OwnedFd> {
    socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)
        .map_err(|source| Error::call("raw socket", "opening it", source))
}
