//! Multicast groups that a socket has joined (ip(7), ipv6(7), RFC 3678).
//!
//! No call lists them. The kernel lists the groups of each interface (proc_pid_net(5): igmp, igmp6), whoever has joined them, and
//! a socket says of one group on one interface whether it is a member and from which sources it takes packets: so it is asked
//! about each.

use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::set_socket_option;
use godwit_kernel::socket::query_option;
use godwit_proto::image::MulticastMembership;
use nix::net::if_::{if_indextoname, if_nametoindex};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};

const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_MSFILTER: i32 = 48;

/// Where things are in `struct group_filter` and `struct group_req`: the number of an interface, a group, the mode, the number
/// of sources, sources.
const GROUP: usize = 8;
const ADDRESS: usize = 128;
const MODE: usize = GROUP + ADDRESS;
const COUNT: usize = MODE + 4;
const SOURCES: usize = COUNT + 4;
/// Sources that there is room for at first, and at most.
const SOME: usize = 16;
const MOST: usize = 4096;

fn level(address: IpAddr) -> i32 {
    if address.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

/// Writes an address as a sockaddr.
fn put(place: &mut [u8], address: IpAddr) {
    match address {
        IpAddr::V4(address) => {
            place[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            place[4..8].copy_from_slice(&address.octets());
        }
        IpAddr::V6(address) => {
            place[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            place[8..24].copy_from_slice(&address.octets());
        }
    }
}

/// Reads an address out of a sockaddr of the same family as `like`.
fn take(place: &[u8], like: IpAddr) -> Option<Vec<u8>> {
    let range = if like.is_ipv4() { 4..8 } else { 8..24 };
    place.get(range).map(<[u8]>::to_vec)
}

/// An address out of 4 or 16 bytes.
pub(crate) fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|bytes| Ipv4Addr::from(bytes).into()),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|bytes| Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

/// The bytes of an address.
pub(crate) fn bytes_of(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The groups of all interfaces, each with the interface's number, of one family.
fn groups(family: i32) -> Vec<(u32, IpAddr)> {
    let text = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    if family == libc::AF_INET6 { parse_six(&text("igmp6")) } else { parse_four(&text("igmp")) }
}

/// Lines of interfaces begin with a number, those of their groups with blanks.
pub(super) fn parse_four(text: &str) -> Vec<(u32, IpAddr)> {
    let mut interface = 0;
    let mut found = Vec::new();
    for line in text.lines().skip(1) {
        let Some(first) = line.split_whitespace().next() else { continue };
        if line.starts_with(char::is_whitespace) {
            let group = u32::from_str_radix(first, 16).map(|word| Ipv4Addr::from(word.to_ne_bytes()));
            found.extend(group.ok().map(|group| (interface, group.into())));
        } else {
            interface = first.parse().unwrap_or_default();
        }
    }
    found
}

/// Each line has the number and name of an interface, and a group.
pub(super) fn parse_six(text: &str) -> Vec<(u32, IpAddr)> {
    let line = |line: &str| {
        let mut columns = line.split_whitespace();
        let interface = columns.next()?.parse().ok()?;
        let group = u128::from_str_radix(columns.nth(1)?, 16).ok()?;
        Some((interface, Ipv6Addr::from(group).into()))
    };
    text.lines().filter_map(line).collect()
}

/// Lists the groups that a socket of a family has joined.
pub(crate) fn collect(entry: &Entry, family: i32) -> Result<Vec<MulticastMembership>> {
    // One of IPv6 may have joined groups of IPv4, too.
    let mut candidates = groups(libc::AF_INET);
    if family == libc::AF_INET6 {
        candidates.extend(groups(libc::AF_INET6));
    }
    candidates.sort_unstable();
    candidates.dedup();
    let mut memberships = Vec::new();
    for (interface, group) in candidates {
        match membership(entry.file.as_fd(), interface, group, SOME) {
            Ok(found) => memberships.extend(found),
            Err(source) => return Err(entry.error("MCAST_MSFILTER")(source)),
        }
    }
    Ok(memberships)
}

/// What a socket says of a group; `None` where it is no member.
fn membership(
    socket: BorrowedFd<'_>,
    interface: u32,
    group: IpAddr,
    room: usize,
) -> Result<Option<MulticastMembership>, Errno> {
    let mut filter = vec![0; SOURCES + room * ADDRESS];
    filter[..4].copy_from_slice(&interface.to_ne_bytes());
    put(&mut filter[GROUP..MODE], group);
    filter[COUNT..SOURCES].copy_from_slice(&(room as u32).to_ne_bytes());
    match query_option(socket, level(group), MCAST_MSFILTER, &mut filter) {
        Ok(_) => {}
        Err(Errno::EADDRNOTAVAIL | Errno::EINVAL | Errno::ENODEV | Errno::ENOPROTOOPT) => return Ok(None),
        Err(errno) => return Err(errno),
    }
    let word = |at: usize| u32::from_ne_bytes([filter[at], filter[at + 1], filter[at + 2], filter[at + 3]]);
    let count = word(COUNT) as usize;
    if count > room {
        return if count > MOST { Err(Errno::E2BIG) } else { membership(socket, interface, group, count) };
    }
    let name = if_indextoname(interface)?.to_string_lossy().into_owned();
    let sources = filter[SOURCES..].chunks_exact(ADDRESS).take(count).filter_map(|place| take(place, group));
    Ok(Some(MulticastMembership {
        group: bytes_of(group),
        interface: name,
        mode: word(MODE),
        sources: sources.collect(),
    }))
}

/// Has a new socket join the groups of the old one.
pub(crate) fn rebuild(socket: BorrowedFd<'_>, memberships: &[MulticastMembership], resource: &str) -> Result<()> {
    for membership in memberships {
        let group = address_of(&membership.group)
            .ok_or_else(|| Error::state(resource, "a multicast group that is no address"))?;
        let failed = |what| {
            let resource = format!("{resource}, multicast group {group} on {}", membership.interface);
            move |source| Error::call(resource, what, source)
        };
        let interface = if_nametoindex(membership.interface.as_str()).map_err(failed("looking the interface up"))?;
        let mut request = vec![0; MODE];
        request[..4].copy_from_slice(&interface.to_ne_bytes());
        put(&mut request[GROUP..], group);
        set_socket_option(socket, level(group), MCAST_JOIN_GROUP, &request).map_err(failed("MCAST_JOIN_GROUP"))?;
        if membership.mode == libc::MCAST_EXCLUDE as u32 && membership.sources.is_empty() {
            continue;
        }
        request.extend(membership.mode.to_ne_bytes());
        request.extend((membership.sources.len().min(MOST) as u32).to_ne_bytes());
        for source in membership.sources.iter().take(MOST) {
            let source = address_of(source).filter(|source| source.is_ipv4() == group.is_ipv4());
            let source = source.ok_or_else(|| Error::state(resource, "a source of a group that is no address"))?;
            let mut place = [0; ADDRESS];
            put(&mut place, source);
            request.extend(place);
        }
        set_socket_option(socket, level(group), MCAST_MSFILTER, &request).map_err(failed("MCAST_MSFILTER"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn groups_of_interfaces_are_read() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n1\tlo        :     1      V3\n\
            \t\t\t\t010000E0     1 0:00000000\t\t0\n2\teth0      :     2      V3\n\t\t\t\t030201EF     1 0:00000000\t\t0\n";
        let found = parse_four(text);
        assert_eq!(found, [(1, "224.0.0.1".parse().unwrap()), (2, "239.1.2.3".parse().unwrap())]);
        let text = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n";
        assert_eq!(parse_six(text), [(1, "ff02::1".parse().unwrap())]);
        assert!(parse_six("x\n1 lo zz").is_empty() && parse_four("x\n\n y").is_empty());
    }

    #[test]
    fn a_member_says_so() {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let group: IpAddr = "239.77.1.2".parse().unwrap();
        let ask = |socket: &UdpSocket| membership(socket.as_fd(), 1, group, SOME).unwrap();
        assert_eq!(ask(&socket), None);
        let wanted = MulticastMembership {
            group: bytes_of(group),
            interface: "lo".into(),
            mode: libc::MCAST_INCLUDE as u32,
            sources: vec![vec![10, 0, 0, 1], vec![10, 0, 0, 2]],
        };
        rebuild(socket.as_fd(), std::slice::from_ref(&wanted), "test").unwrap();
        assert_eq!(ask(&socket), Some(wanted.clone()));
        assert_eq!(membership(socket.as_fd(), 1, group, 1).unwrap(), Some(wanted));
        let any = UdpSocket::bind("0.0.0.0:0").unwrap();
        any.join_multicast_v4(&"239.77.1.2".parse().unwrap(), &Ipv4Addr::LOCALHOST).unwrap();
        let found = ask(&any).unwrap();
        assert!(found.mode == libc::MCAST_EXCLUDE as u32 && found.sources.is_empty(), "{found:?}");
        assert!(groups(libc::AF_INET).contains(&(1, group)));
    }
}
