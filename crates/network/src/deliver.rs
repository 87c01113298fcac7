//! Handing packets to the sockets of this host, as if they had just arrived.
//!
//! A raw socket (raw(7)) sends each to the address that it is meant for, which is one of this host: it goes through the
//! loopback device and keeps the route it was sent by, so that nothing asks whether its sender can be there.
//!
//! Nothing asks either whether that route leads to the address in the header. A packet that counts as having arrived by an
//! interface is sent to an address of that interface, whatever its header says: sockets see the interface and the address that
//! they would have seen. So a datagram can also be given to a socket of this host that was sent to another one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use godwit_kernel::Errno;
use godwit_kernel::descriptors::set_socket_option;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6,
    SockaddrStorage, sendmsg, sendto, socket,
};

use crate::address::{Address, all};
use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::packet::{self, Packet, Transport};

/// The mark (`SO_MARK`) of packets that are delivered here: a filter can tell them from all others, because only who may
/// administrate the network can give it.
pub const MARK: u32 = 0x676f_6477;

/// The mark of packets that are made up in a peer's place ([`crate::stand_in`]): nobody else is to take them for what it has said.
pub(crate) const SPOKEN: u32 = MARK + 2;
/// The mark of packets of this host's that were led back to it, to be dropped.
pub(crate) const LED_HERE: u32 = MARK + 1;

/// Delivers packets.
#[derive(Debug)]
pub struct Delivery {
    /// The addresses of this host: a packet for any other would be sent to somebody else.
    here: Vec<Address>,
    /// Numbers of its interfaces that have addresses, by name.
    interfaces: HashMap<String, u32>,
    place: Namespace,
    ipv4: OwnedFd,
    ipv6: Option<OwnedFd>,
    /// The loopback device takes packets of an IPv6 group only as long as somebody has joined the group there.
    groups: Mutex<HashMap<Ipv6Addr, UdpSocket>>,
}

impl Delivery {
    /// Prepares for delivering to the addresses that this host has now.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW` and `CAP_NET_ADMIN`.
    pub fn new() -> Result<Self> {
        Self::with_mark(MARK)
    }

    /// As [`Delivery::new`], with another mark.
    pub(crate) fn with_mark(mark: u32) -> Result<Self> {
        let ipv4 = raw(AddressFamily::Inet, mark)?;
        // A host may do without IPv6.
        let ipv6 = match raw(AddressFamily::Inet6, mark) {
            Ok(socket) => {
                const IPV6_HDRINCL: i32 = 36;
                set_socket_option(socket.as_fd(), libc::IPPROTO_IPV6, IPV6_HDRINCL, &1i32.to_ne_bytes())
                    .map_err(|source| Error::call("raw socket", "IPV6_HDRINCL", source))?;
                Some(socket)
            }
            Err(Error::Call { source: Errno::EAFNOSUPPORT, .. }) => None,
            Err(error) => return Err(error),
        };
        let here = all()?;
        let named = |here: &Address| Some((here.interface_name().ok()?, here.interface()));
        let interfaces = here.iter().filter_map(named).collect();
        Ok(Self { here, interfaces, place: Namespace::current()?, ipv4, ipv6, groups: Mutex::default() })
    }

    fn is_here(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.here.iter().any(|here| here.ip() == address)
    }

    /// Whether a datagram to an address concerns this host.
    fn is_for_this_host(&self, address: IpAddr) -> bool {
        let is_broadcast = |address: Ipv4Addr| {
            address.is_broadcast() || self.here.iter().any(|here| here.broadcast() == Some(address))
        };
        self.is_here(address) || address.is_multicast() || matches!(address, IpAddr::V4(to) if is_broadcast(to))
    }

    /// Delivers one packet. Returns whether it was one that can be delivered; what the kernel then makes of it is the business
    /// of TCP, which has its packets again if they are lost, or of who uses UDP, where packets may be lost.
    pub fn deliver(&self, packet: impl Into<Packet>) -> bool {
        let Packet { mut bytes, interface } = packet.into();
        if let Some(to) = packet::fragment(&bytes) {
            return self.is_here(to) && self.arrive(&bytes, to, interface.as_deref()).is_ok();
        }
        let Some(arrival) = packet::read(&bytes) else { return false };
        if packet::complete(&mut bytes).is_none() {
            return false;
        }
        let to = arrival.flow.local.ip();
        let sent = match arrival.transport {
            Transport::Tcp if self.is_here(to) => self.send(&bytes, SocketAddr::new(to, 0), None),
            Transport::Udp if self.is_for_this_host(to) => self.arrive(&bytes, to, interface.as_deref()),
            Transport::Tcp | Transport::Udp => return false,
        };
        match sent {
            Ok(()) => true,
            Err(errno) => {
                tracing::debug!(%errno, flow = ?arrival.flow, "a packet that was held back is lost");
                false
            }
        }
    }

    /// Has a packet arrive here whatever address it was sent `to`, as if it came by an interface, where this host has one of
    /// that name with an address of its own; else by the loopback device.
    ///
    /// # Errors
    /// `EMSGSIZE` when it is too long, `EAFNOSUPPORT` for IPv6 where there is none.
    pub fn arrive(&self, bytes: &[u8], to: IpAddr, interface: Option<&str>) -> Result<(), Errno> {
        let index = interface.and_then(|name| self.interfaces.get(name).copied());
        let way = index.and_then(|index| {
            let usable = |here: &&Address| here.interface() == index && here.ip().is_ipv4() == to.is_ipv4();
            self.here.iter().find(usable).map(|here| (here.ip(), index))
        });
        if let IpAddr::V6(group) = to
            && group.is_multicast()
        {
            self.join(group)?;
        }
        match (way, to) {
            (Some((IpAddr::V6(own), index)), _) => {
                let scope = if own.is_unicast_link_local() { index } else { 0 };
                self.send(bytes, SocketAddrV6::new(own, 0, 0, scope).into(), Some(index))
            }
            (Some((own, index)), _) => self.send(bytes, SocketAddr::new(own, 0), Some(index)),
            (None, IpAddr::V4(_)) => self.send(bytes, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0), None),
            (None, IpAddr::V6(_)) => self.send(bytes, SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0), None),
        }
    }

    fn join(&self, group: Ipv6Addr) -> Result<(), Errno> {
        const LOOPBACK: u32 = 1;
        let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Vacant(place) = groups.entry(group) {
            let bound = self.place.inside(|| UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)));
            let member = bound.map_err(|_| Errno::ENONET)?.map_err(errno)?;
            member.join_multicast_v6(&group, LOOPBACK).map_err(errno)?;
            place.insert(member);
        }
        Ok(())
    }

    fn send(&self, bytes: &[u8], to: SocketAddr, interface: Option<u32>) -> Result<(), Errno> {
        let flags = MsgFlags::MSG_DONTWAIT;
        match (to, interface) {
            (SocketAddr::V4(to), Some(interface)) => {
                let by = libc::in_pktinfo {
                    ipi_ifindex: interface as i32,
                    ipi_spec_dst: libc::in_addr { s_addr: 0 },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                let control = [ControlMessage::Ipv4PacketInfo(&by)];
                let to = SockaddrIn::from(to);
                sendmsg(self.ipv4.as_raw_fd(), &[IoSlice::new(bytes)], &control, flags, Some(&to)).map(drop)
            }
            (SocketAddr::V4(to), None) => {
                sendto(self.ipv4.as_raw_fd(), bytes, &SockaddrStorage::from(to), flags).map(drop)
            }
            (SocketAddr::V6(to), _) => {
                let socket = self.ipv6.as_ref().ok_or(Errno::EAFNOSUPPORT)?;
                sendto(socket.as_raw_fd(), bytes, &SockaddrIn6::from(to), flags).map(drop)
            }
        }
    }
}

fn raw(family: AddressFamily, mark: u32) -> Result<OwnedFd> {
    let failed = |what| move |source| Error::call("raw socket", what, source);
    let socket =
        socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).map_err(failed("opening it"))?;
    set_socket_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, &mark.to_ne_bytes())
        .map_err(failed("SO_MARK"))?;
    Ok(socket)
}
