//! Packets from their IP header on: whose they are, and making them whole again.

use etherparse::checksum::Sum16BitWords;
use etherparse::{
    IpNumber, IpSlice, Ipv4HeaderSlice, NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket, TcpHeader,
    TcpOptionElement, TcpSlice, TransportSlice,
};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::flow::Flow;
use crate::fragments;

/// Where in an IPv4 header its own checksum lies.
const HEADER_CHECKSUM: usize = 10;
/// Where in a packet the TCP checksum lies, counted from the TCP header; and the UDP checksum.
const CHECKSUM_AT: usize = 16;
const UDP_CHECKSUM_AT: usize = 6;
const UDP_HEADER: usize = 8;

/// A packet from its IP header on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Name of the interface that it came by, where that counts and is known.
    pub interface: Option<String>,
}

impl From<Vec<u8>> for Packet {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, interface: None }
    }
}

/// What carries the payload of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Udp,
}

/// What is read of an arriving packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// The connection, as the receiving host sees it.
    pub(crate) flow: Flow,
    pub(crate) transport: Transport,
    /// Whether it asks for a new connection.
    pub(crate) opens: bool,
    /// Whether it says nothing but what has been received (TCP).
    pub(crate) only_acknowledges: bool,
}

impl Arrival {
    /// Whether it was sent to more hosts than one.
    pub(crate) fn is_for_many(&self) -> bool {
        let to = self.flow.local.ip();
        to.is_multicast() || matches!(to, IpAddr::V4(to) if to.is_broadcast())
    }
}

/// Reads a packet; `None` for what is neither TCP nor UDP, is a fragment ([`fragments`]) or is cut short.
pub(crate) fn read(packet: &[u8]) -> Option<Arrival> {
    let sliced = SlicedPacket::from_ip(packet).ok()?;
    let (source, destination) = addresses(sliced.net.as_ref()?)?;
    let (mut opens, mut only_acknowledges) = (false, false);
    let (to, from, transport) = match sliced.transport? {
        TransportSlice::Tcp(tcp) => {
            opens = tcp.syn() && !tcp.ack();
            only_acknowledges = !tcp.syn() && !tcp.fin() && !tcp.rst() && tcp.payload().is_empty();
            (tcp.destination_port(), tcp.source_port(), Transport::Tcp)
        }
        TransportSlice::Udp(udp) => (udp.destination_port(), udp.source_port(), Transport::Udp),
        _ => return None,
    };
    let flow = Flow { local: SocketAddr::new(destination, to), remote: SocketAddr::new(source, from) };
    Some(Arrival { flow, transport, opens, only_acknowledges })
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
        match ip.payload_ip_number() {
            IpNumber::TCP => {}
            IpNumber::UDP => return complete_datagram(packet),
            _ => return None,
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

/// Writes the checksum of an IPv4 header, which raw sockets do by themselves (raw(7)).
pub(crate) fn complete_header(packet: &mut [u8]) {
    let sum = Ipv4HeaderSlice::from_slice(packet).map(|header| header.to_header().calc_header_checksum());
    if let (Ok(sum), Some(place)) = (sum, packet.get_mut(HEADER_CHECKSUM..HEADER_CHECKSUM + 2)) {
        place.copy_from_slice(&sum.to_be_bytes());
    }
}

fn complete_datagram(packet: &mut [u8]) -> Option<()> {
    let (at, sum) = {
        let ip = IpSlice::from_slice(packet).ok()?;
        let (from, to) = match &ip {
            IpSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
            IpSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        };
        let payload = ip.payload().payload;
        let length = usize::from(u16::from_be_bytes([*payload.get(4)?, *payload.get(5)?]));
        let datagram = payload.get(..length).filter(|datagram| datagram.len() >= UDP_HEADER)?;
        let mut summed = datagram.to_vec();
        summed[UDP_CHECKSUM_AT..UDP_HEADER].fill(0);
        let sum = checksum(from, to, libc::IPPROTO_UDP as u8, &summed);
        (payload.as_ptr() as usize - packet.as_ptr() as usize + UDP_CHECKSUM_AT, sum)
    };
    packet.get_mut(at..at + 2)?.copy_from_slice(&sum);
    Some(())
}

/// The checksum of a datagram whose own field is zero, as it stands there (RFC 768).
fn checksum(from: IpAddr, to: IpAddr, protocol: u8, datagram: &[u8]) -> [u8; 2] {
    let mut sum = Sum16BitWords::new();
    for address in [from, to] {
        sum = match address {
            IpAddr::V4(address) => sum.add_4bytes(address.octets()),
            IpAddr::V6(address) => sum.add_16bytes(address.octets()),
        };
    }
    sum = sum.add_2bytes([0, protocol]).add_4bytes((datagram.len() as u32).to_be_bytes()).add_slice(datagram);
    // Zero would say that there is none.
    match sum.ones_complement() {
        0 => [0xff; 2],
        sum => sum.to_ne_bytes(),
    }
}

/// A datagram that is to arrive once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// `IPPROTO_UDP` or `IPPROTO_UDPLITE`.
    pub protocol: u8,
    /// Its sender.
    pub source: SocketAddr,
    /// Where it was sent to; of the same family.
    pub destination: SocketAddr,
    /// Hops left to it, and its type of service or traffic class.
    pub hops: u8,
    /// See above.
    pub traffic_class: u8,
    /// Its content.
    pub payload: &'a [u8],
}

impl Datagram<'_> {
    /// The packet that brings it; `None` when it is longer than one can be or its addresses do not go together.
    #[must_use]
    pub fn packet(&self) -> Option<Vec<u8>> {
        let length = UDP_HEADER + self.payload.len();
        let mut datagram = Vec::with_capacity(length);
        datagram.extend(self.source.port().to_be_bytes());
        datagram.extend(self.destination.port().to_be_bytes());
        // Of UDP-Lite, what the checksum covers: all of it (RFC 3828).
        datagram.extend(u16::try_from(length).ok()?.to_be_bytes());
        datagram.extend([0; 2]);
        datagram.extend(self.payload);
        let sum = checksum(self.source.ip(), self.destination.ip(), self.protocol, &datagram);
        datagram[UDP_CHECKSUM_AT..UDP_HEADER].copy_from_slice(&sum);
        let mut packet = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                const HEADER: usize = 20;
                let whole = u16::try_from(HEADER + length).ok()?.to_be_bytes();
                let mut header =
                    vec![0x45, self.traffic_class, whole[0], whole[1], 0, 0, 0, 0, self.hops, self.protocol];
                header.extend([0; 2]);
                header.extend(from.octets());
                header.extend(to.octets());
                header
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let class = u32::from(self.traffic_class) << 20;
                let mut header = (0x6000_0000 | class).to_be_bytes().to_vec();
                header.extend((length as u16).to_be_bytes());
                header.extend([self.protocol, self.hops]);
                header.extend(from.octets());
                header.extend(to.octets());
                header
            }
            _ => return None,
        };
        packet.extend(datagram);
        Some(packet)
    }
}

/// Sum of the words of the pseudo header of a packet, which is what a checksum that is to be completed consists of.
fn pseudo_sum(ip: &IpSlice<'_>) -> u16 {
    let (addresses, length) = match ip {
        IpSlice::Ipv4(ip) => ([ip.header().source(), ip.header().destination()].concat(), ip.payload().payload.len()),
        IpSlice::Ipv6(ip) => ([ip.header().source(), ip.header().destination()].concat(), ip.payload().payload.len()),
    };
    let words = addresses.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    fold(words.sum::<u32>() + length as u32 + u32::from(ip.payload_ip_number().0))
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

/// Replaces the addresses of a packet of TCP, UDP or UDP-Lite, or of a fragment of one, and amends its checksums. What is none
/// stays as it is.
pub(crate) fn translate(packet: &mut [u8], translation: impl Fn(IpAddr) -> IpAddr) {
    /// Where the source address of each family is.
    const SOURCE4: usize = 12;
    const SOURCE6: usize = 8;
    let Some((checksum, source, destination)) = checksum_and_addresses(packet) else { return };
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
        let mut amend = |at: usize, amended: &dyn Fn(u16) -> u16| {
            let found = u16::from_be_bytes([packet[at], packet[at + 1]]);
            packet[at..at + 2].copy_from_slice(&amended(found).to_be_bytes());
        };
        match checksum {
            Some(Checksum { at, is: Stage::Partial, .. }) => amend(at, &|found| !amended(!found, &old, &new)),
            Some(Checksum { at, may_be_zero, .. }) => amend(at, &|found| match amended(found, &old, &new) {
                // Zero would say that there is none.
                0 if !may_be_zero => u16::MAX,
                becomes => becomes,
            }),
            None => {}
        }
        if address.is_ipv4() {
            amend(HEADER_CHECKSUM, &|found| amended(found, &old, &new));
        }
    }
}

/// How far a checksum is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It is that of the pseudo header alone, and still to be completed.
    Partial,
    Whole,
}

/// A checksum that covers addresses.
#[derive(Clone, Copy, Debug)]
struct Checksum {
    /// Where in the packet it lies.
    at: usize,
    is: Stage,
    /// Whether zero is one like any other.
    may_be_zero: bool,
}

/// The checksum of a packet that covers its addresses, unless it has none, and these.
fn checksum_and_addresses(packet: &[u8]) -> Option<(Option<Checksum>, IpAddr, IpAddr)> {
    /// Of UDP-Lite.
    const UDP_LITE: IpNumber = IpNumber(libc::IPPROTO_UDPLITE as u8);
    let ip = IpSlice::from_slice(packet).ok()?;
    let ends = |checksum| Some((checksum, ip.source_addr(), ip.destination_addr()));
    let is_tcp = match ip.payload_ip_number() {
        IpNumber::TCP => true,
        IpNumber::UDP | UDP_LITE => false,
        _ => return None,
    };
    if fragments::is_later(&ip) {
        return ends(None);
    }
    let payload = ip.payload().payload;
    let (within, found) = if is_tcp {
        (CHECKSUM_AT, TcpSlice::from_slice(payload).ok()?.checksum())
    } else {
        (UDP_CHECKSUM_AT, u16::from_be_bytes([*payload.get(UDP_CHECKSUM_AT)?, *payload.get(UDP_CHECKSUM_AT + 1)?]))
    };
    if !is_tcp && found == 0 {
        return ends(None);
    }
    // N.B. one whole checksum among many is the same as the partial one.
    let is_partial = !ip.payload().fragmented && found == pseudo_sum(&ip) && !adds_up(&ip);
    let at = payload.as_ptr() as usize - packet.as_ptr() as usize + within;
    ends(Some(Checksum { at, is: if is_partial { Stage::Partial } else { Stage::Whole }, may_be_zero: is_tcp }))
}

/// Whether the checksum of a packet that is no fragment is right, if it covers all of it.
fn adds_up(ip: &IpSlice<'_>) -> bool {
    let payload = ip.payload().payload;
    checksum(ip.source_addr(), ip.destination_addr(), ip.payload_ip_number().0, payload) == [0xff; 2]
}

/// Makes the packet by which the remote end of a connection says that it sends no more: `next` is its sequence number,
/// `acknowledged` what it has acknowledged, and `window` (unscaled) how much it takes.
#[must_use]
pub fn end_of_stream(flow: &Flow, next: u32, acknowledged: u32, window: u16) -> Vec<u8> {
    written(from_peer(flow, next, window).ack(acknowledged).fin(), &[])
}

/// Makes the packet by which the remote end of a connection says nothing but how much it takes, otherwise as [`end_of_stream`], and which
/// time stamp it has `seen` last, if it is to say that.
#[must_use]
pub fn window_update(flow: &Flow, next: u32, acknowledged: u32, window: u16, seen: Option<u32>) -> Vec<u8> {
    // N.B. its own is 0: that is none that later ones could be older than.
    let timestamps = seen.map(|seen| (0, seen));
    spoken(flow, &Spoken { sequence: next, acknowledged, window, timestamps, ..Spoken::default() })
}

/// Makes the packet by which this end of a connection has its peer say where it stands: a byte before `oldest`, the first that the peer has not
/// acknowledged, comes once more. To what sends nothing the peer would answer twice a second at most (tcp_invalid_ratelimit of ip-sysctl.rst).
#[must_use]
pub fn question(flow: &Flow, oldest: u32, expected: u32, window: u16, timestamp: Option<u32>) -> Vec<u8> {
    let peers = Flow { local: flow.remote, remote: flow.local };
    let (sequence, timestamps) = (oldest.wrapping_sub(1), timestamp.map(|own| (own, 0)));
    let said = Spoken { sequence, acknowledged: expected, window, timestamps, payload: b"?", ..Spoken::default() };
    spoken(&peers, &said)
}

/// Makes the packet by which the remote end of a connection sends a byte that it calls urgent, otherwise as [`end_of_stream`].
#[must_use]
pub fn urgent_byte(flow: &Flow, next: u32, acknowledged: u32, window: u16, byte: u8) -> Vec<u8> {
    // N.B. whether the kernel counts from 0 or from 1 (tcp_stdurg, tcp(7)), 0 is the first byte of the packet.
    written(from_peer(flow, next, window).ack(acknowledged).urg(0), &[byte])
}

/// What the remote end of a connection says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spoken {
    pub(crate) sequence: u32,
    pub(crate) acknowledged: u32,
    /// How much it takes, not scaled.
    pub(crate) window: u16,
    /// Its time stamp, and the last that it has seen.
    pub(crate) timestamps: Option<(u32, u32)>,
    /// What it has received behind a gap: the first sequence number of that, and the one behind it.
    pub(crate) later: Option<(u32, u32)>,
    /// Whether it says that it knows nothing of the connection.
    pub(crate) resets: bool,
    /// What it sends.
    pub(crate) payload: &'static [u8],
}

/// Makes the packet by which the remote end of a connection says something.
pub(crate) fn spoken(flow: &Flow, said: &Spoken) -> Vec<u8> {
    let builder = from_peer(flow, said.sequence, said.window);
    if said.resets {
        return written(builder.rst(), &[]);
    }
    let mut options = Vec::new();
    options.extend(said.timestamps.map(|(own, seen)| TcpOptionElement::Timestamp(own, seen)));
    options.extend(said.later.map(|later| TcpOptionElement::SelectiveAcknowledgement(later, [None; 3])));
    let builder = builder.ack(said.acknowledged);
    // There is room for these two.
    builder.options(&options).map_or_else(|_| Vec::new(), |builder| written(builder, said.payload))
}

fn from_peer(flow: &Flow, next: u32, window: u16) -> PacketBuilderStep<TcpHeader> {
    const HOPS: u8 = 64;
    let builder = match (flow.remote.ip(), flow.local.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), HOPS),
        (from, to) => PacketBuilder::ipv6(wide(from).octets(), wide(to).octets(), HOPS),
    };
    builder.tcp(flow.remote.port(), flow.local.port(), next, window)
}

fn written(builder: PacketBuilderStep<TcpHeader>, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(builder.size(payload.len()));
    // Writing to memory does not fail.
    let _ = builder.write(&mut bytes, payload);
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
        assert_eq!(arrival.transport, Transport::Tcp);
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

    #[test]
    fn a_datagram_is_made_and_read() {
        for (source, destination) in [("10.0.0.9:7", "10.0.0.1:53"), ("[fd00::9]:7", "[ff05::1]:53")] {
            for payload in [&b""[..], b"odd", &[7; 1000]] {
                let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
                let protocol = libc::IPPROTO_UDP as u8;
                let made = Datagram { protocol, source, destination, hops: 9, traffic_class: 4, payload };
                let whole = made.packet().unwrap();
                let arrival = read(&whole).unwrap();
                assert_eq!((arrival.flow.local, arrival.flow.remote), (destination, source));
                assert!(arrival.transport == Transport::Udp && arrival.is_for_many() == destination.is_ipv6());
                let at = whole.len() - payload.len() - 2;
                let mut lacking = whole.clone();
                lacking[at..at + 2].fill(0x5a);
                complete(&mut lacking).unwrap();
                assert_eq!(lacking, whole);
                // Another implementation agrees about it.
                let sliced = SlicedPacket::from_ip(&whole).unwrap();
                let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("no UDP") };
                let sum = match sliced.net.unwrap() {
                    NetSlice::Ipv4(ip) => {
                        let (from, to) = (ip.header().source(), ip.header().destination());
                        udp.to_header().calc_checksum_ipv4_raw(from, to, payload)
                    }
                    NetSlice::Ipv6(ip) => {
                        let (from, to) = (ip.header().source(), ip.header().destination());
                        udp.to_header().calc_checksum_ipv6_raw(from, to, payload)
                    }
                    NetSlice::Arp(_) => panic!("no IP"),
                };
                assert_eq!(sum.unwrap(), udp.checksum());
            }
        }
        let too_long = [0; 65_530];
        let (source, destination) = ("10.0.0.9:7".parse().unwrap(), "10.0.0.1:53".parse().unwrap());
        let made = Datagram { protocol: 17, source, destination, hops: 9, traffic_class: 0, payload: &too_long };
        assert_eq!(made.packet(), None);
    }

    /// The packet as its sender's interface gets it.
    fn lacking_checksum(whole: &[u8]) -> Vec<u8> {
        let mut lacking = whole.to_vec();
        let partial = pseudo_sum(&IpSlice::from_slice(whole).unwrap());
        let at = checksum_and_addresses(whole).unwrap().0.unwrap().at;
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
    fn a_translated_datagram_is_as_if_it_had_been_sent_so() {
        let cases = [
            ("10.0.0.9:7", "10.0.0.1:53", "192.168.77.1:53"),
            ("10.0.0.9:7", "255.255.255.254:53", "0.0.0.1:53"),
            ("[fd00::9]:7", "[fd00::1]:53", "[7e7e::ffff:1]:53"),
        ];
        for (source, old, new) in cases.map(|(source, old, new)| {
            let at = |text: &str| text.parse::<SocketAddr>().unwrap();
            (at(source), at(old), at(new))
        }) {
            let map = |address| if address == old.ip() { new.ip() } else { address };
            for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE].map(|protocol| protocol as u8) {
                // Among so many there are some whose checksum becomes, or was, zero written as all ones.
                for number in 0..=u16::MAX {
                    let payload = &number.to_be_bytes();
                    let made = |destination| {
                        let datagram = Datagram { protocol, source, destination, hops: 9, traffic_class: 4, payload };
                        with_header_checksum(datagram.packet().unwrap())
                    };
                    let mut translated = made(old);
                    translate(&mut translated, map);
                    assert_eq!(translated, made(new), "{payload:?}");
                }
            }
        }
    }

    /// What the kernel adds to a header that is sent by a raw socket.
    fn with_header_checksum(mut packet: Vec<u8>) -> Vec<u8> {
        if packet[0] >> 4 == 4 {
            packet[10..12].fill(0);
            let sum = Sum16BitWords::new().add_slice(&packet[..20]).ones_complement();
            packet[10..12].copy_from_slice(&sum.to_ne_bytes());
        }
        packet
    }

    #[test]
    fn a_checksum_that_is_not_there_stays_so() {
        let (source, destination) = ("10.0.0.9:7".parse().unwrap(), "10.0.0.1:53".parse().unwrap());
        let made = Datagram { protocol: 17, source, destination, hops: 9, traffic_class: 0, payload: b"hello" };
        let mut datagram = with_header_checksum(made.packet().unwrap());
        datagram[26..28].fill(0);
        let mut fragment = datagram.clone();
        // The second one of a datagram: there is only content where a header would be.
        fragment[6..8].copy_from_slice(&[0, 1]);
        for before in [datagram, with_header_checksum(fragment)] {
            let mut after = before.clone();
            translate(&mut after, |address| if address == destination.ip() { [192, 0, 2, 1].into() } else { address });
            assert_eq!(after[16..20], [192, 0, 2, 1]);
            assert_eq!(after[20..], before[20..]);
            assert_eq!(Sum16BitWords::new().add_slice(&after[..20]).ones_complement(), 0);
        }
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
