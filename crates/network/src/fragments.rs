//! Datagrams that are longer than a packet: in fragments (RFC 791; RFC 8200, section 4.5).

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};

use etherparse::{IpNumber, IpSlice, Ipv6ExtensionSlice};

use crate::flow::Flow;

/// Length of an IPv4 header without options, and of an IPv6 header.
const HEADER4: usize = 20;
const HEADER6: usize = 40;
/// Length of the header that says which fragment it is, of IPv6.
const FRAGMENT_HEADER: usize = 8;
const MORE_FRAGMENTS: u16 = 1;

/// A part of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) from: IpAddr,
    pub(crate) to: IpAddr,
    /// As the receiving host sees it; only the first part says it.
    pub(crate) flow: Option<Flow>,
}

/// Reads a fragment of a datagram; `None` for anything else.
pub(crate) fn read(packet: &[u8]) -> Option<Fragment> {
    let ip = IpSlice::from_slice(packet).ok()?;
    let payload = ip.payload();
    if !payload.fragmented || payload.ip_number != IpNumber::UDP {
        return None;
    }
    let (from, to) = (ip.source_addr(), ip.destination_addr());
    let port = |at: usize| Some(u16::from_be_bytes(payload.payload.get(at..at + 2)?.try_into().ok()?));
    let flow = || Some(Flow { local: SocketAddr::new(to, port(2)?), remote: SocketAddr::new(from, port(0)?) });
    Some(Fragment { from, to, flow: if is_later(&ip) { None } else { flow() } })
}

/// Whether it is a fragment without the header of what it is a part of.
pub(crate) fn is_later(ip: &IpSlice<'_>) -> bool {
    match ip {
        IpSlice::Ipv4(ip) => ip.header().fragments_offset().value() != 0,
        IpSlice::Ipv6(ip) => ip.extensions().clone().into_iter().any(|extension| {
            matches!(extension, Ipv6ExtensionSlice::Fragment(fragment) if fragment.fragment_offset().value() != 0)
        }),
    }
}

/// Splits a datagram that is complete into packets no longer than `longest`, without the checksums of their headers. `None` where its
/// headers are others than the plain ones, or it is a fragment already.
pub(crate) fn split(packet: &[u8], longest: usize) -> Option<Vec<Vec<u8>>> {
    static NEXT: AtomicU32 = AtomicU32::new(0x6764_7774);
    let ip = IpSlice::from_slice(packet).ok()?;
    let payload = ip.payload();
    if payload.fragmented || payload.ip_number != IpNumber::UDP {
        return None;
    }
    let (header, room) = match &ip {
        IpSlice::Ipv4(ip) if ip.header().options().is_empty() => (HEADER4, longest.checked_sub(HEADER4)?),
        IpSlice::Ipv6(ip) if ip.extensions().is_empty() => (HEADER6, longest.checked_sub(HEADER6 + FRAGMENT_HEADER)?),
        _ => return None,
    };
    let (header, content) = (packet.get(..header)?, payload.payload);
    let room = room & !7;
    if room == 0 {
        return None;
    }
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let count = content.len().div_ceil(room);
    let part = |(index, content): (usize, &[u8])| {
        // Both count in units of eight bytes; IPv6 leaves three bits behind that, IPv4 has them before.
        let at = (index * room / 8) as u16;
        let more = if index + 1 < count { MORE_FRAGMENTS } else { 0 };
        let mut bytes = header.to_vec();
        if header.len() == HEADER4 {
            bytes[2..4].copy_from_slice(&((HEADER4 + content.len()) as u16).to_be_bytes());
            bytes[4..6].copy_from_slice(&(id as u16).to_be_bytes());
            bytes[6..8].copy_from_slice(&(more << 13 | at).to_be_bytes());
        } else {
            bytes[4..6].copy_from_slice(&((FRAGMENT_HEADER + content.len()) as u16).to_be_bytes());
            bytes[6] = IpNumber::IPV6_FRAGMENTATION_HEADER.0;
            bytes.extend([IpNumber::UDP.0, 0]);
            bytes.extend((at << 3 | more).to_be_bytes());
            bytes.extend(id.to_be_bytes());
        }
        bytes.extend(content);
        bytes
    };
    Some(content.chunks(room).enumerate().map(part).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Datagram;

    #[test]
    fn a_datagram_is_split_and_its_parts_are_read() {
        let payload: Vec<u8> = (0..10_000).map(|byte| byte as u8).collect();
        for (source, destination) in [("10.0.0.9:7", "10.0.0.1:53"), ("[fd00::9]:7", "[fd00::1]:53")] {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            let protocol = libc::IPPROTO_UDP as u8;
            let made = Datagram { protocol, source, destination, hops: 9, traffic_class: 4, payload: &payload };
            let whole = made.packet().unwrap();
            let parts = split(&whole, 3000).unwrap();
            assert_eq!(parts.len(), 4);
            let mut joined = Vec::new();
            for (index, part) in parts.iter().enumerate() {
                assert!(part.len() <= 3000);
                let flow = (index == 0).then_some(Flow { local: destination, remote: source });
                assert_eq!(read(part), Some(Fragment { from: source.ip(), to: destination.ip(), flow }));
                joined.extend_from_slice(IpSlice::from_slice(part).unwrap().payload().payload);
                assert_eq!(split(part, 3000), None);
            }
            assert_eq!(joined, IpSlice::from_slice(&whole).unwrap().payload().payload);
            assert!(split(&whole, 27).is_none());
            for end in 0..200 {
                assert_eq!((split(&whole[..end], 3000), read(&whole[..end])), (None, None));
                read(&parts[1][..end]);
            }
        }
    }
}
