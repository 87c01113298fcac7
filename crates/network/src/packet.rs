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

/// Sets the TCP checksum. What a packet socket shows may have none yet: the sender's interface was to add it.
pub(crate) fn complete(packet: &mut [u8]) -> Option<()> {
    let (at, sum) = {
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
        (payload.as_ptr() as usize - packet.as_ptr() as usize + CHECKSUM_AT, sum.ok()?)
    };
    packet.get_mut(at..at + 2)?.copy_from_slice(&sum.to_be_bytes());
    Some(())
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
        let mut lacking = whole.clone();
        lacking[36..38].copy_from_slice(&[0xab, 0xcd]);
        complete(&mut lacking).unwrap();
        assert_eq!(lacking, whole);
        assert_eq!(complete(&mut [0; 40]), None);
    }
}
