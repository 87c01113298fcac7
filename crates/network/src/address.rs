//! Addresses of this host: looked up, taken away, given, and announced (rtnetlink(7), arp(7)).

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use godwit_kernel::{Errno, packet};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, CacheInfo};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::net::if_::if_nametoindex;

use crate::error::{Error, Result};
use crate::netlink;

/// An address as an interface of this host has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    address: IpAddr,
    interface: u32,
    message: AddressMessage,
}

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
    let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let answers = netlink::ask(&socket, question, NLM_F_DUMP).map_err(failed("addresses", "looking them up"))?;
    let address = |answer| match answer {
        RouteNetlinkMessage::NewAddress(message) => {
            let interface = message.header.index;
            Some(Address { address: own_address(&message)?, interface, message })
        }
        _ => None,
    };
    Ok(answers.into_iter().filter_map(address).collect())
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

/// The address itself; of a point-to-point link `Address` is the other end, and `Local` is ours.
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

/// Looks an interface up by its name.
///
/// # Errors
/// `ENODEV` when there is none.
pub fn interface(name: &str) -> Result<Interface> {
    let index = if_nametoindex(name).map_err(failed(name, "looking it up"))?;
    let socket = netlink::open(NETLINK_ROUTE)?;
    let mut question = LinkMessage::default();
    question.header.index = index;
    let answers = netlink::ask(&socket, RouteNetlinkMessage::GetLink(question), NLM_F_ACK)
        .map_err(failed(name, "looking it up"))?;
    let message = answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(message) if message.header.index == index => Some(message),
        _ => None,
    });
    let message = message.ok_or_else(|| Error::call(name, "looking it up", Errno::ENODEV))?;
    let hardware = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok(),
        _ => None,
    });
    Ok(Interface { index, is_up: message.header.flags.contains(LinkFlags::Up), hardware })
}

/// Whether a packet to an address would come to this host.
fn is_local(socket: &Socket, address: IpAddr) -> Result<bool> {
    let mut question = RouteMessage::default();
    let (family, bits) = match address {
        IpAddr::V4(address) => {
            question.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(address)));
            (netlink_packet_route::AddressFamily::Inet, 32)
        }
        IpAddr::V6(address) => {
            question.attributes.push(RouteAttribute::Destination(RouteAddress::Inet6(address)));
            (netlink_packet_route::AddressFamily::Inet6, 128)
        }
    };
    question.header.address_family = family;
    question.header.destination_prefix_length = bits;
    match netlink::ask(socket, RouteNetlinkMessage::GetRoute(question), NLM_F_ACK) {
        Ok(answers) => Ok(answers.iter().any(
            |answer| matches!(answer, RouteNetlinkMessage::NewRoute(route) if route.header.kind == RouteType::Local),
        )),
        Err(Errno::ENETUNREACH | Errno::EHOSTUNREACH) => Ok(false),
        Err(source) => Err(Error::call(address.to_string(), "asking for its route", source)),
    }
}

impl Address {
    /// Makes an address that an interface does not have yet.
    #[must_use]
    pub fn new(address: IpAddr, prefix_bits: u8, interface: u32) -> Self {
        let mut message = AddressMessage::default();
        message.header.family = if address.is_ipv4() {
            netlink_packet_route::AddressFamily::Inet
        } else {
            netlink_packet_route::AddressFamily::Inet6
        };
        message.header.prefix_len = prefix_bits;
        message.header.index = interface;
        message.attributes.push(AddressAttribute::Address(address));
        if let IpAddr::V4(v4) = address {
            message.attributes.push(AddressAttribute::Local(address));
            if prefix_bits < 31 {
                let broadcast = u32::from(v4) | u32::MAX.checked_shr(prefix_bits.into()).unwrap_or(0);
                message.attributes.push(AddressAttribute::Broadcast(broadcast.into()));
            }
        }
        Self { address, interface, message }
    }

    /// The address itself.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        self.address
    }

    /// Bits of the network's prefix.
    #[must_use]
    pub fn prefix_bits(&self) -> u8 {
        self.message.header.prefix_len
    }

    /// The address that means all hosts of its network; IPv6 has none.
    pub(crate) fn broadcast(&self) -> Option<Ipv4Addr> {
        self.message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Broadcast(address) => Some(*address),
            _ => None,
        })
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
        self.message.header.flags.contains(AddressHeaderFlags::Secondary)
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
        let request = RouteNetlinkMessage::DelAddress(self.message.clone());
        netlink::ask(&socket, request, NLM_F_ACK).map(drop).map_err(failed(self.address, "taking it away"))
    }

    /// Gives it to its interface, ready at once: nobody else has it, so nobody is asked (`IFA_F_NODAD`).
    ///
    /// # Errors
    /// `EEXIST` when it is there already.
    pub fn give(&self) -> Result<()> {
        let socket = netlink::open(NETLINK_ROUTE)?;
        let mut message = self.message.clone();
        // What the kernel says of an address it has; not to be given back to it.
        message.attributes.retain(|attribute| {
            !matches!(attribute, AddressAttribute::CacheInfo(CacheInfo { .. }) | AddressAttribute::Flags(_))
        });
        if self.address.is_ipv6() {
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        let request = RouteNetlinkMessage::NewAddress(message);
        netlink::ask(&socket, request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)
            .map(drop)
            .map_err(failed(self.address, "giving it to the interface"))?;
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
