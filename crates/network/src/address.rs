//! Addresses of this host: looked up, taken away, given, and announced (rtnetlink(7), arp(7)).

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use godwit_kernel::{Errno, packet};
use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::net::if_::if_nametoindex;

use crate::attribute::{Attributes, find as attribute};
use crate::error::{Error, Result};
use crate::{netlink, routing};

/// An address as an interface of this host has it.
#[derive(Clone, Debug)]
pub struct Address {
    address: IpAddr,
    prefix_bits: u8,
    interface: u32,
    /// What the kernel is told of it: with its other end, label, lifetimes, flags and metric.
    content: Vec<u8>,
    /// When that was true.
    seen: Instant,
}

/// Bytes before the attributes of an address, and those of the attributes that are looked at (linux/if_addr.h).
const HEADER: usize = 8;
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const BROADCAST: u16 = 4;
const FLAGS: u16 = 8;
/// `IFA_F_NODAD`.
const NO_QUESTION: u32 = 0x02;

/// A network interface of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number.
    pub index: u32,
    /// Whether it is up.
    pub is_up: bool,
    /// Its link-layer address, if that is one of Ethernet's.
    hardware: Option<[u8; 6]>,
}

fn failed(resource: impl ToString, what: &'static str) -> impl FnOnce(Errno) -> Error {
    move |source| Error::call(resource.to_string(), what, source)
}

/// All addresses of this host.
pub(crate) fn all() -> Result<Vec<Address>> {
    let socket = netlink::open(NETLINK_ROUTE)?;
    Ok(routing::addresses(&socket)?.into_iter().filter_map(Address::of).collect())
}

/// Looks an address of this host up.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn find(address: IpAddr) -> Result<Option<Address>> {
    Ok(all()?.into_iter().find(|found| found.address == address))
}

/// All addresses of this host.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn addresses() -> Result<HashSet<IpAddr>> {
    Ok(all()?.iter().map(Address::ip).collect())
}

/// Whether this host has an address, so that a socket can be bound to it.
///
/// # Errors
/// As [`find`].
pub fn has(address: IpAddr) -> Result<bool> {
    // The whole of 127.0.0.0/8 is there with the one address that is listed.
    Ok(address.is_loopback() || address.is_unspecified() || find(address)?.is_some())
}

/// Looks an interface up by its name.
///
/// # Errors
/// `ENODEV` when there is none.
pub fn interface(name: &str) -> Result<Interface> {
    let index = if_nametoindex(name).map_err(failed(name, "looking it up"))?;
    let message = link(&netlink::open(NETLINK_ROUTE)?, index).map_err(failed(name, "looking it up"))?;
    let hardware = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok(),
        _ => None,
    });
    Ok(Interface { index, is_up: message.header.flags.contains(LinkFlags::Up), hardware })
}

fn link(socket: &Socket, index: u32) -> Result<LinkMessage, Errno> {
    let mut question = LinkMessage::default();
    question.header.index = index;
    let answers = netlink::ask(socket, RouteNetlinkMessage::GetLink(question), NLM_F_ACK)?;
    let message = answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(message) if message.header.index == index => Some(message),
        _ => None,
    });
    message.ok_or(Errno::ENODEV)
}

/// The first bytes of the hardware address of an interface, whatever kind of address that is, with zeros behind them.
pub(crate) fn hardware(socket: &Socket, index: u32) -> Result<[u8; 6], Errno> {
    let message = link(socket, index)?;
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => Some(bytes.as_slice()),
        _ => None,
    });
    let mut first = [0; 6];
    for (place, byte) in first.iter_mut().zip(address.unwrap_or_default()) {
        *place = *byte;
    }
    Ok(first)
}

/// Whether a packet to an address would come to this host.
fn is_local(socket: &Socket, address: IpAddr) -> Result<bool> {
    Ok(route(socket, None, address)?.is_some_and(|route| route.header.kind == RouteType::Local))
}

/// The interface by which packets leave for `remote` from an address of this host's; `None` if there is no way, or it leads here.
///
/// # Errors
/// When the kernel cannot be asked.
pub(crate) fn interface_towards(socket: &Socket, local: IpAddr, remote: IpAddr) -> Result<Option<u32>> {
    let route = route(socket, Some(local), remote)?.filter(|route| route.header.kind != RouteType::Local);
    Ok(route.and_then(|route| {
        route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })
    }))
}

/// How a packet would go; `None` if it would not.
fn route(socket: &Socket, from: Option<IpAddr>, to: IpAddr) -> Result<Option<RouteMessage>> {
    let wrapped = |address| match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    };
    let (family, bits) = match to {
        IpAddr::V4(_) => (netlink_packet_route::AddressFamily::Inet, 32),
        IpAddr::V6(_) => (netlink_packet_route::AddressFamily::Inet6, 128),
    };
    let mut question = RouteMessage::default();
    question.header.address_family = family;
    question.attributes.push(RouteAttribute::Destination(wrapped(to)));
    question.header.destination_prefix_length = bits;
    if let Some(from) = from {
        question.attributes.push(RouteAttribute::Source(wrapped(from)));
        question.header.source_prefix_length = bits;
    }
    match netlink::ask(socket, RouteNetlinkMessage::GetRoute(question), NLM_F_ACK) {
        Ok(answers) => Ok(answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })),
        Err(Errno::ENETUNREACH | Errno::EHOSTUNREACH) => Ok(None),
        Err(source) => Err(Error::call(to.to_string(), "asking for its route", source)),
    }
}

impl Address {
    /// N.B. of a point-to-point link `ADDRESS` is the other end, and `LOCAL` is ours.
    fn of(content: Vec<u8>) -> Option<Self> {
        let (address, prefix_bits, interface) = routing::address(&content)?;
        Some(Self { address, prefix_bits, interface, content, seen: Instant::now() })
    }

    /// Makes an address that an interface does not have yet.
    #[must_use]
    pub fn new(address: IpAddr, prefix_bits: u8, interface: u32) -> Self {
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let mut content = Attributes(vec![family as u8, prefix_bits, 0, 0]);
        content.0.extend(interface.to_ne_bytes());
        match address {
            IpAddr::V4(address) => {
                content.bytes(ADDRESS, &address.octets());
                content.bytes(LOCAL, &address.octets());
                if prefix_bits < 31 {
                    let broadcast = u32::from(address) | u32::MAX.checked_shr(prefix_bits.into()).unwrap_or(0);
                    content.bytes(BROADCAST, &broadcast.to_be_bytes());
                }
            }
            IpAddr::V6(address) => {
                content.bytes(ADDRESS, &address.octets());
                content.native(FLAGS, NO_QUESTION);
            }
        }
        Self { address, prefix_bits, interface, content: content.0, seen: Instant::now() }
    }

    /// Makes an address that an interface does not have yet of what [`Address::told`] says; `None` where that makes no sense.
    #[must_use]
    pub fn from_told(told: &[u8], interface: u32) -> Option<Self> {
        Self::of(routing::address_for(told, interface)?)
    }

    /// What there is to be known of it, as rtnetlink(7) says it, for an interface of that name.
    ///
    /// # Errors
    /// When its own interface is gone.
    pub fn told(&self, interface: &str) -> Result<Vec<u8>> {
        let content = routing::relabelled(&self.content, &self.interface_name()?, interface);
        Ok(routing::aged(&content, self.seen.elapsed()))
    }

    /// Routes by which this host speaks under it, and that go with it, each as rtnetlink(7) says it.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn routes(&self) -> Result<Vec<Vec<u8>>> {
        routing::routes_from(&netlink::open(NETLINK_ROUTE)?, self.address)
    }

    /// The address itself.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        self.address
    }

    /// Bits of the network's prefix.
    #[must_use]
    pub fn prefix_bits(&self) -> u8 {
        self.prefix_bits
    }

    /// The address that means all hosts of its network; IPv6 has none.
    pub(crate) fn broadcast(&self) -> Option<Ipv4Addr> {
        let value: [u8; 4] = attribute(self.content.get(HEADER..)?, BROADCAST)?.value.try_into().ok()?;
        Some(value.into())
    }

    /// Number of the interface that has it.
    #[must_use]
    pub fn interface(&self) -> u32 {
        self.interface
    }

    /// Name of the interface that has it.
    ///
    /// # Errors
    /// When it is gone.
    pub fn interface_name(&self) -> Result<String> {
        let name =
            nix::net::if_::if_indextoname(self.interface).map_err(failed(self.address, "naming its interface"))?;
        Ok(name.to_string_lossy().into_owned())
    }

    /// What this host would lose besides the address if it were taken away, in words: `None` for nothing.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn loss(&self) -> Result<Option<&'static str>> {
        let IpAddr::V4(own) = self.address else { return Ok(None) };
        let of_interface: Vec<Self> = (all()?.into_iter())
            .filter(|other| {
                other.interface == self.interface && other.address.is_ipv4() && other.address != self.address
            })
            .collect();
        if of_interface.is_empty() {
            return Ok(Some("it is the only IPv4 address of its interface, and routes would go with it"));
        }
        let network = |address: Ipv4Addr| {
            u32::from(address) & u32::MAX.checked_shl(32 - u32::from(self.prefix_bits())).unwrap_or(0)
        };
        let depends = |other: &&Self| {
            let IpAddr::V4(address) = other.address else { return false };
            other.is_secondary() && other.prefix_bits() == self.prefix_bits() && network(address) == network(own)
        };
        let takes_others = !self.is_secondary() && of_interface.iter().any(|other| depends(&other));
        Ok(takes_others.then_some("other addresses of its network are secondary to it and would go with it"))
    }

    fn is_secondary(&self) -> bool {
        /// `IFA_F_SECONDARY`.
        const SECONDARY: u8 = 1;
        self.content.get(2).is_some_and(|flags| flags & SECONDARY != 0)
    }

    /// Whether its interface has it now.
    #[must_use]
    pub fn is_here(&self) -> bool {
        find(self.address).is_ok_and(|found| found.is_some_and(|found| found.interface == self.interface))
    }

    /// Takes it away from its interface. Connections are not told.
    ///
    /// # Errors
    /// `EADDRNOTAVAIL` when it is not there.
    pub fn take_away(&self) -> Result<()> {
        let socket = netlink::open(NETLINK_ROUTE)?;
        routing::take_address(&socket, &self.content).map_err(failed(self.address, "taking it away"))
    }

    /// Gives it to its interface, ready at once: nobody else has it, so nobody is asked (`IFA_F_NODAD`).
    ///
    /// # Errors
    /// `EEXIST` when it is there already.
    pub fn give(&self) -> Result<()> {
        let socket = netlink::open(NETLINK_ROUTE)?;
        let content = routing::aged(&self.content, self.seen.elapsed());
        routing::give_address(&socket, &content).map_err(failed(self.address, "giving it to the interface"))?;
        self.await_route(&socket)
    }

    /// Waits until packets for the address are ours: the kernel adds the route of an IPv6 address a little later.
    fn await_route(&self, socket: &Socket) -> Result<()> {
        const PATIENCE: Duration = Duration::from_secs(1);
        const GLANCE: Duration = Duration::from_micros(20);
        let begun = Instant::now();
        while self.address.is_ipv6() && !is_local(socket, self.address)? {
            if begun.elapsed() > PATIENCE {
                return Err(Error::call(self.address.to_string(), "waiting for its route", Errno::ETIMEDOUT));
            }
            std::thread::sleep(GLANCE);
        }
        Ok(())
    }
}

/// Where routes lead that [`Address::routes`] has listed, in words of ip-route(8).
#[must_use]
pub fn route_names(routes: &[Vec<u8>]) -> Vec<String> {
    routes.iter().map(|route| routing::destination(route)).collect()
}

/// Has this host have routes again that went with an address, once that is here.
///
/// # Errors
/// Naming the first that the kernel does not take; the others are given all the same.
pub fn give_routes(routes: &[Vec<u8>]) -> Result<()> {
    if routes.is_empty() {
        return Ok(());
    }
    let socket = netlink::open(NETLINK_ROUTE)?;
    let give = |route: &Vec<u8>| {
        let name = format!("route {}", routing::destination(route));
        routing::give_route(&socket, route).map_err(failed(name, "having it again"))
    };
    let outcomes: Vec<Result<()>> = routes.iter().map(give).collect();
    outcomes.into_iter().collect()
}

/// Tells links of addresses.
///
/// N.B. closing its socket takes the kernel some 10 ms: not to be dropped while anything is frozen.
#[derive(Debug)]
pub struct Announcer {
    socket: OwnedFd,
}

impl Announcer {
    /// Prepares for telling.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW`.
    pub fn new() -> Result<Self> {
        Ok(Self { socket: packet::sender().map_err(failed("packet socket", "opening it"))? })
    }

    /// Tells a link that an address is here now: gratuitous ARP (RFC 5227, 3), or an unsolicited neighbour advertisement
    /// (RFC 4861, 7.2.6). Nothing where the link has no addresses of its own.
    ///
    /// # Errors
    /// When the interface does not send.
    pub fn announce(&self, address: &Address, interface: &Interface) -> Result<()> {
        let Some(hardware) = interface.hardware else { return Ok(()) };
        let (ether, destination, bytes) = match address.address {
            IpAddr::V4(address) => (libc::ETH_P_ARP, [0xff; 6], gratuitous_arp(&hardware, address.octets())),
            IpAddr::V6(address) => {
                (libc::ETH_P_IPV6, [0x33, 0x33, 0, 0, 0, 1], unsolicited_advertisement(&hardware, address.octets()))
            }
        };
        packet::send(self.socket.as_fd(), interface.index, ether as u16, &destination, &bytes)
            .map_err(failed(address.address, "announcing it"))
    }
}

/// An ARP request for an address by the one who has it (RFC 826).
fn gratuitous_arp(hardware: &[u8; 6], address: [u8; 4]) -> Vec<u8> {
    let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, 1];
    bytes.extend(hardware);
    bytes.extend(address);
    bytes.extend([0; 6]);
    bytes.extend(address);
    bytes
}

/// A neighbour advertisement to all nodes that overrides what they knew (RFC 4861, 4.4), with its IPv6 header.
fn unsolicited_advertisement(hardware: &[u8; 6], address: [u8; 16]) -> Vec<u8> {
    const ADVERTISEMENT: u8 = 136;
    const OVERRIDE: u8 = 0x20;
    const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    const LENGTH: u8 = 32;
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address);
    // The option "target link-layer address", one unit of eight bytes.
    message.extend([2, 1]);
    message.extend(hardware);
    let mut sum = etherparse::checksum::Sum16BitWords::new();
    for piece in [&address[..], &ALL_NODES, &[0, 0, 0, LENGTH], &[0, 0, 0, libc::IPPROTO_ICMPV6 as u8], &message] {
        sum = sum.add_slice(piece);
    }
    message[2..4].copy_from_slice(&sum.ones_complement().to_ne_bytes());
    let mut bytes = vec![0x60, 0, 0, 0, 0, LENGTH, libc::IPPROTO_ICMPV6 as u8, 255];
    bytes.extend(address);
    bytes.extend(ALL_NODES);
    bytes.extend(message);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{Icmpv6Slice, Ipv6HeaderSlice};

    #[test]
    fn an_advertisement_is_sound() {
        let address = [0xfd, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        let bytes = unsolicited_advertisement(&[0x16, 0x87, 0xef, 0xf7, 0x41, 0x4d], address);
        let ip = Ipv6HeaderSlice::from_slice(&bytes).unwrap();
        assert_eq!((ip.payload_length() as usize, ip.hop_limit()), (bytes.len() - 40, 255));
        let message = Icmpv6Slice::from_slice(&bytes[40..]).unwrap();
        assert!(message.is_checksum_valid(ip.source(), ip.destination()));
    }
}
