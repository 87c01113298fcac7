//! Handing packets to the sockets of this host, as if they had just arrived.
//!
//! What the packet filter may have to say something about ([`Delivery::deliver`]) comes by the interface that it would have come by
//! ([`crate::inject`]). All else a raw socket (raw(7)) sends to the address that it is meant for, which is one of this host: it goes through the
//! loopback device and keeps the route it was sent by, so that nothing asks whether its sender can be there.
//!
//! Nothing asks either whether that route leads to the address in the header. A packet that counts as having arrived by an
//! interface is sent to an address of that interface, whatever its header says: sockets see the interface and the address that
//! they would have seen. So a datagram can also be given to a socket of this host that was sent to another one.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use godwit_kernel::Errno;
use godwit_kernel::descriptors::set_socket_option;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6,
    SockaddrStorage, sendmsg, sendto, socket,
};

use crate::address::{Address, all};
use crate::error::{Error, Result};
use crate::flow::Flow;
use crate::fragments::{self, Fragment};
use crate::inject::{self, Injector};
use crate::namespace::Namespace;
use crate::netlink;
use crate::packet::{self, Packet, Transport};
use crate::room::{Fit, Rooms};
use crate::tcp_table;

/// The mark (`SO_MARK`) of packets that are delivered here: a filter can tell them from all others, because only who may
/// administrate the network can give it.
pub const MARK: u32 = 0x676f_6477;

/// The mark of packets that are made up in a peer's place ([`crate::stand_in`]): nobody else is to take them for what it has said.
pub(crate) const SPOKEN: u32 = MARK + 2;
/// The mark of packets of this host's that were led back to it, to be dropped.
pub(crate) const LED_HERE: u32 = MARK + 1;

/// The number of a network namespace's loopback device.
const LOOPBACK: u32 = 1;

/// What a datagram takes of its receiver's buffer, besides its bytes.
const OVERHEAD: u32 = 1024;
/// What one takes that comes as a frame: a page.
const INJECTED: u32 = 4096 + OVERHEAD;
/// What one takes that comes in several.
const FRAGMENTED: u32 = 12 * INJECTED;

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
    /// Made when it is needed; `None` where it cannot be.
    injector: OnceLock<Option<Injector>>,
    /// `None` where nobody can be asked.
    rooms: Option<Mutex<Rooms>>,
    /// Whether there was room for a datagram whose first fragment has come.
    fits_in_parts: AtomicBool,
    /// Connections that lived here, as far as they are known, and by which it is asked whether one still does.
    connections: HashSet<Flow>,
    sockets: Option<Mutex<Socket>>,
    /// How many datagrams it was to have arrive, by port, of whose receivers nothing is known.
    injected: Mutex<HashMap<u16, u32>>,
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
        let unknown = |error: &Error| tracing::debug!(%error, "what room receivers have is not known");
        Ok(Self {
            here,
            interfaces,
            place: Namespace::current()?,
            ipv4,
            ipv6,
            groups: Mutex::default(),
            injector: OnceLock::new(),
            rooms: Rooms::new().inspect_err(unknown).ok().map(Mutex::new),
            fits_in_parts: AtomicBool::new(true),
            connections: HashSet::new(),
            sockets: None,
            injected: Mutex::default(),
        })
    }

    /// Leaves out what only acknowledges on one of these connections, but for the last of it; and that too, should the connection have ended since it came
    /// to live here: nobody would know any more what it was about, and its peer would be answered with a reset. To be called where it is to
    /// deliver.
    #[must_use]
    pub fn knowing(mut self, connections: HashSet<Flow>) -> Self {
        let unknown = |error: &Error| tracing::debug!(%error, "whether connections have ended is not known");
        self.sockets = netlink::open(NETLINK_SOCK_DIAG).inspect_err(unknown).ok().map(Mutex::new);
        self.connections = connections;
        self
    }

    /// Of what only acknowledges on one of the known connections the last says all.
    fn leave_out_old(&self, packets: &mut Vec<Packet>) {
        if self.connections.is_empty() {
            return;
        }
        let mut told: HashSet<Flow> = HashSet::new();
        let mut is_last = |packet: &Packet| {
            let arrival = packet::read(&packet.bytes).filter(|arrival| arrival.only_acknowledges);
            arrival.is_none_or(|arrival| !self.connections.contains(&arrival.flow) || told.insert(arrival.flow))
        };
        let mut last_first: Vec<Packet> = packets.drain(..).rev().filter(|packet| is_last(packet)).collect();
        last_first.reverse();
        *packets = last_first;
    }

    /// Whether nothing is left of a connection that has lived here.
    fn has_ended(&self, flow: &Flow) -> bool {
        let Some(sockets) = self.sockets.as_ref().filter(|_| self.connections.contains(flow)) else { return false };
        let socket = sockets.lock().unwrap_or_else(PoisonError::into_inner);
        tcp_table::has_connection(&socket, flow) == Some(false)
    }

    /// Gives datagrams to receivers as they read, for half a second at most, instead of all at once: they run.
    #[must_use]
    pub fn patiently(mut self) -> Self {
        if let Some(rooms) = &mut self.rooms {
            rooms.get_mut().unwrap_or_else(PoisonError::into_inner).be_patient();
        }
        self
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

    /// Delivers packets that have come, to this host or another one. Returns how many there were that can be delivered; what the kernel then
    /// makes of them is the business of TCP, which has its packets again if they are lost, or of who uses UDP, where packets may be lost.
    ///
    /// The packet filter sees requests for connections and datagrams come by the interface that they came by, or by which answers would leave,
    /// where the kernel lets us; all others come by the loopback device, and so do datagrams whose receiver has not much room left, and all but
    /// the first 32 to a port of which no receiver is found. Of the packets that are given here, those of connections come first.
    pub fn deliver(&self, packets: impl IntoIterator<Item = impl Into<Packet>>) -> usize {
        let mut packets: Vec<Packet> = packets.into_iter().map(Into::into).collect();
        if packets.is_empty() {
            return 0;
        }
        packets.sort_by_cached_key(|packet| {
            packet::read(&packet.bytes).is_none_or(|arrival| arrival.transport != Transport::Tcp)
        });
        self.leave_out_old(&mut packets);
        let deliver = |packets: Vec<Packet>| packets.into_iter().filter_map(|packet| self.deliver_one(packet)).count();
        self.place.inside(|| deliver(packets)).unwrap_or_else(|error| {
            tracing::warn!(%error, "packets are lost");
            0
        })
    }

    /// Has a packet of TCP that was made up come by the loopback device, with our mark.
    pub fn say(&self, packet: Vec<u8>) -> Option<()> {
        let to = packet::read(&packet)?.flow.local.ip();
        self.is_here(to).then(|| self.send_by_loopback(&packet, to))?
    }

    /// Sends a packet to another host that was made up in the place of a connection of this one. It may be lost on the way.
    pub fn send_on(&self, packet: &[u8]) {
        let Some(arrival) = packet::read(packet) else { return };
        let to = arrival.flow.local.ip();
        if let Err(errno) = self.send(packet, SocketAddr::new(to, 0), None) {
            tracing::debug!(%errno, %to, "a packet that was made up is not sent");
        }
    }

    fn deliver_one(&self, packet: Packet) -> Option<()> {
        let Packet { mut bytes, interface } = packet;
        let interface = interface.as_deref();
        if let Some(Fragment { from, to, flow }) = fragments::read(&bytes) {
            if !self.is_here(to) {
                return None;
            }
            if let Some(flow) = flow {
                self.fits_in_parts.store(self.room(&flow, FRAGMENTED) != Fit::Full, Ordering::Relaxed);
            }
            let named = interface.and_then(|name| self.interfaces.get(name).copied());
            let way = named.filter(|way| *way != LOOPBACK && !self.is_here(from));
            let way = way.filter(|_| self.fits_in_parts.load(Ordering::Relaxed));
            let injected = way.and_then(|way| self.inject(&bytes, to, way));
            return injected.or_else(|| self.arrive(&bytes, to, interface).ok());
        }
        let arrival = packet::read(&bytes)?;
        packet::complete(&mut bytes)?;
        let to = arrival.flow.local.ip();
        match arrival.transport {
            Transport::Tcp if !self.is_here(to) => None,
            Transport::Tcp if arrival.only_acknowledges && self.has_ended(&arrival.flow) => None,
            Transport::Tcp if !arrival.opens => self.send_by_loopback(&bytes, to),
            Transport::Tcp => {
                let way = self.way(&arrival.flow, interface);
                way.and_then(|way| self.inject(&bytes, to, way)).or_else(|| self.send_by_loopback(&bytes, to))
            }
            Transport::Udp if !self.is_for_this_host(to) => None,
            Transport::Udp => {
                let way = self.way(&arrival.flow, interface);
                let frames = if way.is_some() { bytes.len().div_ceil(inject::LONGEST) as u32 } else { 0 };
                let size = (frames * INJECTED).max(2 * bytes.len() as u32 + OVERHEAD);
                let way = match self.room(&arrival.flow, size) {
                    Fit::Roomy => way,
                    Fit::Full => None,
                    Fit::Unknown => way.filter(|_| self.takes_one_more(arrival.flow.local.port())),
                };
                let lost =
                    |errno| tracing::debug!(%errno, flow = ?arrival.flow, "a datagram that was held back is lost");
                way.and_then(|way| self.inject(&bytes, to, way))
                    .or_else(|| self.arrive(&bytes, to, interface).map_err(lost).ok())
            }
        }
    }

    /// The interface by which a packet comes: the one that it came by, where that has the address or the packet is for many; else
    /// the one by which answers leave. N.B. none for a packet of this host's own: none comes by such an interface.
    fn way(&self, flow: &Flow, interface: Option<&str>) -> Option<u32> {
        let to = flow.local.ip();
        let named = interface.and_then(|name| self.interfaces.get(name).copied());
        if named == Some(LOOPBACK) || self.is_here(flow.remote.ip()) {
            return None;
        }
        let has = |index: u32| self.here.iter().any(|here| here.interface() == index && here.ip() == to);
        match named {
            Some(index) if !self.is_here(to) || has(index) => Some(index),
            _ if !self.is_here(to) || to.is_loopback() => None,
            _ => self.injector()?.way(to, flow.remote.ip()),
        }
    }

    /// Waits for room for a datagram that takes so much of its receiver's buffer.
    fn room(&self, flow: &Flow, bytes: u32) -> Fit {
        match &self.rooms {
            Some(rooms) => rooms.lock().unwrap_or_else(PoisonError::into_inner).wait(flow, bytes),
            None => Fit::Unknown,
        }
    }

    /// Whether a datagram that takes a page of its receiver's buffer may well fit there, however short it is.
    fn takes_one_more(&self, port: u16) -> bool {
        /// More than half of what the usual buffer has room for.
        const MOST: u32 = 32;
        let mut injected = self.injected.lock().unwrap_or_else(PoisonError::into_inner);
        let count = injected.entry(port).or_insert(0);
        *count += 1;
        *count <= MOST
    }

    fn inject(&self, bytes: &[u8], to: IpAddr, interface: u32) -> Option<()> {
        let lost = |errno| tracing::debug!(%errno, "a packet comes by the loopback device");
        self.injector()?.inject(bytes, to, interface).map_err(lost).ok()
    }

    fn injector(&self) -> Option<&Injector> {
        let prepared = self.injector.get_or_init(|| {
            let without = |error| tracing::debug!(%error, "packets come by the loopback device");
            Injector::prepare().map_err(without).ok()
        });
        prepared.as_ref()
    }

    fn send_by_loopback(&self, bytes: &[u8], to: IpAddr) -> Option<()> {
        let lost = |errno| tracing::debug!(%errno, %to, "a packet that was held back is lost");
        self.send(bytes, SocketAddr::new(to, 0), None).map_err(lost).ok()
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
