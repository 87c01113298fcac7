//! Packets from their IP header on: whose they are, and making them whole again.

use etherparse::{IpNumber, IpSlice, NetSlice, PacketBuilder, SlicedPacket, TcpSlice, TransportSlice};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::flow::Flow;

/// Where in a packet the TCP checksum lies, counted from the TCP header.
const CHECKSUM_AT: usize = 16;

/// What is read of an arriving TCP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// The connection, as the receiving host sees it.
    pub(crate) flow: Flow,
    /// Whether it asks for a new connection.
    pub(crate) opens: bool,
}

/// Reads a packet; `None` for what is not TCP, is a fragment or is cut short.
pub(crate) fn read(packet: &[u8]) -> Option<Arrival> {
    let sliced = SlicedPacket::from_ip(packet).ok()?;
    let (source, destination) = addresses(sliced.net.as_ref()?)?;
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { return None };
    let flow = Flow {
        local: SocketAddr::new(destination, tcp.destination_port()),
        remote: SocketAddr::new(source, tcp.source_port()),
    };
    Some(Arrival { flow, opens: tcp.syn() && !tcp.ack() })
}

fn addresses(net: &NetSlice<'_>) -> Option<(IpAddr, IpAddr)> {
    match net {
        NetSlice::Ipv4(ip) => Some((ip.header().source_addr().into(), ip.header().destination_addr().into())),
        NetSlice::Ipv6(ip) => Some((ip.header().source_addr().into(), ip.header().destination_addr().into())),
        NetSlice::Arp(_) => None,
    }
}

/// Completes the TCP checksum. What a packet socket shows may have only that of the pseudo header yet: the sender's interface
/// was to add the rest. `None` for a packet that was damaged on its way, which is for its sender to send again.
pub(crate) fn complete(packet: &mut [u8]) -> Option<()> {
    let (at, found, sum, partial) = {
        let ip = IpSlice::from_slice(packet).ok()?;
        if ip.payload_ip_number() != IpNumber::TCP {
            return None;
        }
        let payload = ip.payload().payload;
        let tcp = TcpSlice::from_slice(payload).ok()?;
        let header = tcp.to_header();
        let sum = match &ip {
            IpSlice::Ipv4(ip) => {
                header.calc_checksum_ipv4_raw(ip.header().source(), ip.header().destination(), tcp.payload())
            }
            IpSlice::Ipv6(ip) => {
                header.calc_checksum_ipv6_raw(ip.header().source(), ip.header().destination(), tcp.payload())
            }
        };
        let at = payload.as_ptr() as usize - packet.as_ptr() as usize + CHECKSUM_AT;
        (at, tcp.checksum(), sum.ok()?, pseudo_sum(&ip))
    };
    if found != sum {
        if found != partial {
            return None;
        }
        packet.get_mut(at..at + 2)?.copy_from_slice(&sum.to_be_bytes());
    }
    Some(())
}

/// Sum of the words of the pseudo header of a TCP packet, which is what a checksum that is to be completed consists of.
fn pseudo_sum(ip: &IpSlice<'_>) -> u16 {
    let (addresses, length) = match ip {
        IpSlice::Ipv4(ip) => ([ip.header().source(), ip.header().destination()].concat(), ip.payload().payload.len()),
        IpSlice::Ipv6(ip) => ([ip.header().source(), ip.header().destination()].concat(), ip.payload().payload.len()),
    };
    let words = addresses.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    fold(words.sum::<u32>() + length as u32 + u32::from(IpNumber::TCP.0))
}

/// Adds the carries of a sum of words to it.
fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What a checksum becomes when words that it covers do (RFC 1624, equation 3).
fn amended(checksum: u16, old: &[u8], new: &[u8]) -> u16 {
    let words = |bytes: &[u8], by: fn(u16) -> u16| -> u32 {
        bytes.chunks_exact(2).map(|word| u32::from(by(u16::from_be_bytes([word[0], word[1]])))).sum()
    };
    !fold(u32::from(!checksum) + words(old, |word| !word) + words(new, |word| word))
}

/// Replaces the addresses of a TCP packet, and amends its checksums. What is no such packet stays as it is.
pub(crate) fn translate(packet: &mut [u8], translation: impl Fn(IpAddr) -> IpAddr) {
    /// Where in an IPv4 header its checksum lies, and where the source address of each family.
    const HEADER_CHECKSUM: usize = 10;
    const SOURCE4: usize = 12;
    const SOURCE6: usize = 8;
    let Some((tcp_checksum, is_partial, source, destination)) = checksum_and_addresses(packet) else { return };
    let (at, width) = if source.is_ipv4() { (SOURCE4, 4) } else { (SOURCE6, 16) };
    for (at, address) in [(at, source), (at + width, destination)] {
        let octets = |address: IpAddr| match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let (old, new) = (octets(address), octets(translation(address)));
        if old == new || old.len() != new.len() {
            continue;
        }
        packet[at..at + width].copy_from_slice(&new);
        let mut amend = |at: usize, is_partial: bool| {
            let found = u16::from_be_bytes([packet[at], packet[at + 1]]);
            let becomes = if is_partial { !amended(!found, &old, &new) } else { amended(found, &old, &new) };
            packet[at..at + 2].copy_from_slice(&becomes.to_be_bytes());
        };
        amend(tcp_checksum, is_partial);
        if address.is_ipv4() {
            amend(HEADER_CHECKSUM, false);
        }
    }
}

/// Where the TCP checksum of a packet lies, whether it is still to be completed, and the packet's addresses.
fn checksum_and_addresses(packet: &[u8]) -> Option<(usize, bool, IpAddr, IpAddr)> {
    let ip = IpSlice::from_slice(packet).ok()?;
    if ip.payload_ip_number() != IpNumber::TCP {
        return None;
    }
    let payload = ip.payload().payload;
    let tcp = TcpSlice::from_slice(payload).ok()?;
    let at = payload.as_ptr() as usize - packet.as_ptr() as usize + CHECKSUM_AT;
    Some((at, tcp.checksum() == pseudo_sum(&ip), ip.source_addr(), ip.destination_addr()))
}

/// Makes the packet by which the remote end of a connection says that it sends no more: `next` is its sequence number,
/// `acknowledged` what it has acknowledged, and `window` (unscaled) how much it takes.
#[must_use]
pub fn end_of_stream(flow: &Flow, next: u32, acknowledged: u32, window: u16) -> Vec<u8> {
    const HOPS: u8 = 64;
    let builder = match (flow.remote.ip(), flow.local.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), HOPS),
        (from, to) => PacketBuilder::ipv6(wide(from).octets(), wide(to).octets(), HOPS),
    };
    let builder = builder.tcp(flow.remote.port(), flow.local.port(), next, window).ack(acknowledged).fin();
    let mut bytes = Vec::with_capacity(builder.size(0));
    // Writing to memory does not fail.
    let _ = builder.write(&mut bytes, &[]);
    bytes
}

fn wide(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(syn: bool) -> Vec<u8> {
        let builder = PacketBuilder::ipv4([10, 0, 0, 9], [10, 0, 0, 1], 64).tcp(4000, 80, 1000, 500);
        let builder = if syn { builder.syn() } else { builder.ack(7) };
        let mut bytes = Vec::new();
        builder.write(&mut bytes, b"hello").unwrap();
        bytes
    }

    #[test]
    fn a_packet_is_read() {
        let arrival = read(&packet(false)).unwrap();
        assert_eq!(
            (arrival.flow.local, arrival.flow.remote),
            ("10.0.0.1:80".parse().unwrap(), "10.0.0.9:4000".parse().unwrap())
        );
        assert!(!arrival.opens && read(&packet(true)).unwrap().opens);
        assert_eq!(read(&packet(false)[..30]), None);
        assert_eq!(read(&[]), None);
    }

    #[test]
    fn a_missing_checksum_is_added() {
        let whole = packet(false);
        let mut lacking = lacking_checksum(&whole);
        assert_ne!(lacking, whole);
        complete(&mut lacking).unwrap();
        assert_eq!(lacking, whole);
        complete(&mut lacking).unwrap();
        assert_eq!(lacking, whole);
        assert_eq!(complete(&mut [0; 40]), None);
    }

    /// The packet as its sender's interface gets it.
    fn lacking_checksum(whole: &[u8]) -> Vec<u8> {
        let mut lacking = whole.to_vec();
        let partial = pseudo_sum(&IpSlice::from_slice(whole).unwrap());
        let (at, ..) = checksum_and_addresses(whole).unwrap();
        lacking[at..at + 2].copy_from_slice(&partial.to_be_bytes());
        lacking
    }

    #[test]
    fn what_was_damaged_is_not_made_whole() {
        let mut damaged = packet(false);
        *damaged.last_mut().unwrap() ^= 1;
        assert_eq!(complete(&mut damaged), None);
        translate(&mut damaged, |_| IpAddr::from([192, 0, 2, 1]));
        assert_eq!(complete(&mut damaged), None);
    }

    #[test]
    fn a_translated_packet_is_as_if_it_had_been_sent_so() {
        let four = |from: [u8; 4], to: [u8; 4]| PacketBuilder::ipv4(from, to, 64).tcp(4000, 80, 1000, 500).ack(7);
        let six = |from: [u8; 16], to: [u8; 16]| PacketBuilder::ipv6(from, to, 64).tcp(4000, 80, 1000, 500).ack(7);
        for payload in [&b""[..], b"hello", &[0xff; 1400]] {
            let mut cases = Vec::new();
            for (to, builder) in [([10, 0, 0, 1], 0), ([255, 255, 255, 254], 1)] {
                let (mut before, mut after) = (Vec::new(), Vec::new());
                four([10, 0, 0, 9], to).write(&mut before, payload).unwrap();
                four([10, 0, 0, 9], [192, 168, 77, builder]).write(&mut after, payload).unwrap();
                cases.push((before, after, IpAddr::from(to), IpAddr::from([192, 168, 77, builder])));
            }
            let (mut before, mut after) = (Vec::new(), Vec::new());
            six([1; 16], [0xfd; 16]).write(&mut before, payload).unwrap();
            six([1; 16], [0x7e; 16]).write(&mut after, payload).unwrap();
            cases.push((before, after, IpAddr::from([0xfd; 16]), IpAddr::from([0x7e; 16])));
            for (before, after, old, new) in cases {
                let map = |address| if address == old { new } else { address };
                let mut translated = before.clone();
                translate(&mut translated, map);
                assert_eq!(translated, after);
                let mut translated = lacking_checksum(&before);
                translate(&mut translated, map);
                assert_eq!(translated, lacking_checksum(&after));
                complete(&mut translated).unwrap();
                assert_eq!(translated, after);
            }
        }
        let mut short = packet(false)[..25].to_vec();
        translate(&mut short, |_| IpAddr::from([1, 1, 1, 1]));
        assert_eq!(short, packet(false)[..25]);
    }
}
