//! What the kernel says of one tracked connection, and what has another kernel track it (linux/netfilter/nfnetlink_conntrack.h).

use std::net::{IpAddr, SocketAddr};

use crate::attribute::{Attributes, find, read as attributes_of};
use crate::flow::Flow;
use crate::translation::Translation;

/// Bytes of `struct nfgenmsg`.
pub(super) const HEADER: usize = 4;

/// `CTA_*`.
pub(super) const ORIGINAL: u16 = 1;
pub(super) const REPLY: u16 = 2;
pub(super) const ZONE: u16 = 18;
pub(super) const ID: u16 = 12;
const STATUS: u16 = 3;
const PROTOCOL_STATE: u16 = 4;
const HELPER: u16 = 5;
const SOURCE_TRANSLATION: u16 = 6;
const TIMEOUT: u16 = 7;
const MARK: u16 = 8;
const DESTINATION_TRANSLATION: u16 = 13;
const MASTER: u16 = 14;
const SEQUENCE_ADJUSTMENTS: [u16; 2] = [15, 16];
const LABELS: u16 = 22;
/// What can be told of a connection that does not depend on others.
const OF_ITS_OWN: &[u16] = &[ORIGINAL, REPLY, STATUS, PROTOCOL_STATE, TIMEOUT, MARK, ZONE, LABELS];
/// What else can be told back.
const OF_OTHERS: &[u16] = &[HELPER, MASTER, SEQUENCE_ADJUSTMENTS[0], SEQUENCE_ADJUSTMENTS[1]];

/// `CTA_TUPLE_*`, `CTA_IP_*`, `CTA_PROTO_*`.
const ADDRESSES: u16 = 1;
const PROTOCOL: u16 = 2;
const SOURCE_ADDRESSES: [u16; 2] = [1, 3];
const DESTINATION_ADDRESSES: [u16; 2] = [2, 4];
const NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
/// `CTA_NAT_*`: lowest address of IPv4 and IPv6, and the ports.
const LOWEST_IPV4: u16 = 1;
const HIGHEST_IPV4: u16 = 2;
const PORTS: u16 = 3;
const LOWEST_IPV6: u16 = 4;
const HIGHEST_IPV6: u16 = 5;

/// `CTA_PROTOINFO_TCP*`.
const TCP: u16 = 1;
const TCP_STATE: u16 = 1;
const TCP_FLAGS: [u16; 2] = [4, 5];
/// `IP_CT_TCP_FLAG_*` (linux/netfilter/nf_conntrack_tcp.h): window scaling, SACK, and who closed first.
const FLAGS_THAT_STAY: u8 = 0x07;
/// `IP_CT_TCP_FLAG_BE_LIBERAL`: what the windows were is not told, so no packet is to be measured by them.
const LIBERAL: u8 = 0x08;

/// `IPS_*` (linux/netfilter/nf_conntrack_common.h).
const EXPECTED: u32 = 1;
const SEEN_REPLY: u32 = 1 << 1;
const ASSURED: u32 = 1 << 2;
const CONFIRMED: u32 = 1 << 3;

/// A connection of TCP, or datagrams of UDP between two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) is_tcp: bool,
    pub(super) flow: Flow,
}

impl Key {
    pub(super) fn tcp(flow: Flow) -> Self {
        Self { is_tcp: true, flow }
    }

    pub(super) fn udp(flow: Flow) -> Self {
        Self { is_tcp: false, flow }
    }

    /// As the other end has it.
    pub(super) fn turned(self) -> Self {
        Self { flow: Flow { local: self.flow.remote, remote: self.flow.local }, ..self }
    }

    /// Begins a message about it: the header, and the tuple of what arrives by it, as the kernel writes it.
    pub(super) fn question(&self) -> Attributes {
        let family = if self.flow.local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let mut question = Attributes(vec![family as u8, 0, 0, 0]);
        question.nested(ORIGINAL, |tuple| self.write_tuple(tuple));
        question
    }

    fn write_tuple(&self, into: &mut Attributes) {
        let Flow { local, remote } = self.flow;
        into.nested(ADDRESSES, |addresses| {
            for (end, kinds) in [(remote.ip(), SOURCE_ADDRESSES), (local.ip(), DESTINATION_ADDRESSES)] {
                match end {
                    IpAddr::V4(address) => addresses.bytes(kinds[0], &address.octets()),
                    IpAddr::V6(address) => addresses.bytes(kinds[1], &address.octets()),
                }
            }
        });
        into.nested(PROTOCOL, |protocol| {
            let number = if self.is_tcp { libc::IPPROTO_TCP } else { libc::IPPROTO_UDP };
            protocol.bytes(NUMBER, &[number as u8]);
            protocol.bytes(SOURCE_PORT, &remote.port().to_be_bytes());
            protocol.bytes(DESTINATION_PORT, &local.port().to_be_bytes());
        });
    }
}

/// What the kernel says of one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    header: &'a [u8],
    attributes: &'a [u8],
    original: &'a [u8],
    reply: &'a [u8],
    there: Tuple<'a>,
    back: Tuple<'a>,
}

impl<'a> Entry<'a> {
    pub(super) fn read(content: &'a [u8]) -> Option<Self> {
        let (header, attributes) = content.split_at_checked(HEADER)?;
        let (original, reply) = (find(attributes, ORIGINAL)?.value, find(attributes, REPLY)?.value);
        let (there, back) = (Tuple::read(original)?, Tuple::read(reply)?);
        Some(Self { header, attributes, original, reply, there, back })
    }

    /// The connection as who is called sees it; none where addresses or ports are translated, or of another protocol.
    pub(super) fn key(&self) -> Option<Key> {
        (!self.source_changes() && !self.destination_changes()).then(|| self.there.key()).flatten()
    }

    /// As [`Self::key`], also where the address or port that was called became this one (DNAT, redirect).
    pub(super) fn key_behind(&self) -> Option<Key> {
        if self.source_changes() { None } else { self.back.key().map(Key::turned) }
    }

    /// The address that was called, before it was translated.
    pub(super) fn called(&self) -> Option<IpAddr> {
        address(self.there.destination)
    }

    /// Whether it is known for good (`IPS_ASSURED`).
    pub(super) fn is_settled(&self) -> bool {
        let status = find(self.attributes, STATUS).and_then(|status| number(status.value));
        status.is_some_and(|status| status & ASSURED != 0)
    }

    fn source_changes(&self) -> bool {
        self.there.from() != self.back.to()
    }

    fn destination_changes(&self) -> bool {
        self.there.to() != self.back.from()
    }

    /// Has it forgotten.
    pub(super) fn removal(&self) -> Vec<u8> {
        let mut message = Attributes(vec![self.header[0], 0, 0, 0]);
        let named = [ORIGINAL, ZONE, ID].map(|kind| find(self.attributes, kind));
        named.iter().flatten().for_each(|attribute| message.copy(attribute));
        message.0
    }

    /// Has another one forgotten that is in its place.
    pub(super) fn displacement(&self) -> Vec<u8> {
        let mut message = Attributes(vec![self.header[0], 0, 0, 0]);
        let named = [ORIGINAL, ZONE].map(|kind| find(self.attributes, kind));
        named.iter().flatten().for_each(|attribute| message.copy(attribute));
        message.0
    }

    /// Has the kernel track it. A translated one is told as if it were not, and what it is translated to.
    pub(super) fn message(&self) -> Vec<u8> {
        self.message_of(&[OF_ITS_OWN, OF_OTHERS].concat(), &Translation::default())
    }

    /// As [`Self::message`], under other addresses and without what depends on other connections; none of one that is translated and is to
    /// have other addresses besides.
    pub(super) fn message_elsewhere(&self, addresses: &Translation) -> Option<Vec<u8>> {
        let is_translated = self.source_changes() || self.destination_changes();
        (!is_translated || addresses.is_empty()).then(|| self.message_of(OF_ITS_OWN, addresses))
    }

    fn message_of(&self, kinds: &[u16], addresses: &Translation) -> Vec<u8> {
        let mut message = Attributes(vec![self.header[0], 0, 0, 0]);
        let (source_changes, destination_changes) = (self.source_changes(), self.destination_changes());
        for attribute in attributes_of(self.attributes).filter(|attribute| kinds.contains(&attribute.kind)) {
            match attribute.kind {
                ORIGINAL => message.nested(ORIGINAL, |tuple| rewritten(tuple, self.original, addresses)),
                REPLY if source_changes || destination_changes => {
                    message.nested(REPLY, |tuple| reversed(tuple, self.original));
                }
                REPLY => message.nested(REPLY, |tuple| rewritten(tuple, self.reply, addresses)),
                STATUS => message.number(STATUS, number(attribute.value).unwrap_or_default() & !EXPECTED),
                PROTOCOL_STATE => message.nested(PROTOCOL_STATE, |state| protocol_state(state, attribute.value)),
                _ => message.copy(&attribute),
            }
        }
        if source_changes {
            message.nested(SOURCE_TRANSLATION, |to| translation(to, self.back.to().0, self.back.to().1));
        }
        if destination_changes {
            message.nested(DESTINATION_TRANSLATION, |to| translation(to, self.back.from().0, self.back.from().1));
        }
        message.0
    }
}

/// Has the kernel track a TCP connection that nobody knows more of than that it is established; `is_called`: by the other end.
pub(super) fn established(flow: Flow, is_called: bool, timeout_seconds: u32) -> Vec<u8> {
    const ESTABLISHED: u8 = 3;
    let key = if is_called { Key::tcp(flow) } else { Key::tcp(flow).turned() };
    let mut message = key.question();
    message.nested(REPLY, |tuple| key.turned().write_tuple(tuple));
    message.number(STATUS, SEEN_REPLY | ASSURED | CONFIRMED);
    message.number(TIMEOUT, timeout_seconds);
    message.nested(PROTOCOL_STATE, |state| {
        state.nested(TCP, |tcp| {
            tcp.bytes(TCP_STATE, &[ESTABLISHED]);
            TCP_FLAGS.iter().for_each(|&kind| tcp.bytes(kind, &[LIBERAL, LIBERAL]));
        });
    });
    message.0
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_be_bytes)
}

/// One direction of a connection: addresses, and ports where it has any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tuple<'a> {
    source: &'a [u8],
    destination: &'a [u8],
    protocol: Option<u8>,
    ports: Option<(&'a [u8], &'a [u8])>,
}

impl<'a> Tuple<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let addresses = find(bytes, ADDRESSES)?.value;
        let mut both = attributes_of(addresses).map(|address| address.value);
        let protocol = find(bytes, PROTOCOL)?.value;
        let port = |kind| find(protocol, kind).map(|port| port.value);
        Some(Self {
            source: both.next()?,
            destination: both.next()?,
            protocol: find(protocol, NUMBER).and_then(|number| number.value.first().copied()),
            ports: port(SOURCE_PORT).zip(port(DESTINATION_PORT)),
        })
    }

    /// What it is one of, as who is called sees it.
    fn key(&self) -> Option<Key> {
        let port = |bytes: &[u8]| bytes.try_into().ok().map(u16::from_be_bytes);
        let (from, to) = self.ports?;
        let local = SocketAddr::new(address(self.destination)?, port(to)?);
        let flow = Flow::new(local, SocketAddr::new(address(self.source)?, port(from)?));
        match self.protocol.map(i32::from) {
            Some(libc::IPPROTO_TCP) => Some(Key::tcp(flow)),
            Some(libc::IPPROTO_UDP) => Some(Key::udp(flow)),
            _ => None,
        }
    }

    fn from(&self) -> (&'a [u8], Option<&'a [u8]>) {
        (self.source, self.ports.map(|ports| ports.0))
    }

    fn to(&self) -> (&'a [u8], Option<&'a [u8]>) {
        (self.destination, self.ports.map(|ports| ports.1))
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    }
}

/// Writes a tuple with other addresses.
fn rewritten(into: &mut Attributes, tuple: &[u8], addresses: &Translation) {
    for attribute in attributes_of(tuple) {
        if attribute.kind != ADDRESSES {
            into.copy(&attribute);
            continue;
        }
        into.nested(ADDRESSES, |all| {
            for one in attributes_of(attribute.value) {
                match address(one.value).map(|address| addresses.address(address)) {
                    Some(IpAddr::V4(new)) if one.value.len() == 4 => all.bytes(one.kind, &new.octets()),
                    Some(IpAddr::V6(new)) => all.bytes(one.kind, &new.octets()),
                    _ => all.copy(&one),
                }
            }
        });
    }
}

/// Writes the tuple of the answers to what `original` is the tuple of, with nothing translated.
fn reversed(into: &mut Attributes, original: &[u8]) {
    /// What stands for what in the other direction.
    fn other(kind: u16) -> u16 {
        const TURNED: [u16; 5] = [0, 2, 1, 4, 3];
        TURNED.get(usize::from(kind)).copied().unwrap_or(kind)
    }
    for attribute in attributes_of(original) {
        match attribute.kind {
            ADDRESSES => into.nested(ADDRESSES, |addresses| {
                let mut all: Vec<_> = attributes_of(attribute.value).map(|one| (other(one.kind), one.value)).collect();
                all.sort_by_key(|&(kind, _)| kind);
                all.into_iter().for_each(|(kind, value)| addresses.bytes(kind, value));
            }),
            PROTOCOL => into.nested(PROTOCOL, |protocol| {
                for one in attributes_of(attribute.value) {
                    let kind = match one.kind {
                        SOURCE_PORT => DESTINATION_PORT,
                        DESTINATION_PORT => SOURCE_PORT,
                        kind => kind,
                    };
                    protocol.bytes(kind, one.value);
                }
            }),
            _ => into.copy(&attribute),
        }
    }
}

/// Writes what is known of the state of a protocol. The kernel tells flags as it does not take them: with a mask of none.
fn protocol_state(into: &mut Attributes, state: &[u8]) {
    for protocol in attributes_of(state) {
        if protocol.kind != TCP {
            into.copy(&protocol);
            continue;
        }
        into.nested(TCP, |tcp| {
            for one in attributes_of(protocol.value) {
                match one.value.first() {
                    Some(flags) if TCP_FLAGS.contains(&one.kind) => {
                        tcp.bytes(one.kind, &[flags & FLAGS_THAT_STAY | LIBERAL, FLAGS_THAT_STAY | LIBERAL]);
                    }
                    _ => tcp.copy(&one),
                }
            }
        });
    }
}

fn translation(into: &mut Attributes, address: &[u8], port: Option<&[u8]>) {
    let (lowest, highest) = if address.len() == 4 { (LOWEST_IPV4, HIGHEST_IPV4) } else { (LOWEST_IPV6, HIGHEST_IPV6) };
    into.bytes(lowest, address);
    into.bytes(highest, address);
    if let Some(port) = port {
        into.nested(PORTS, |ports| {
            ports.bytes(1, port);
            ports.bytes(2, port);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(local: &str, remote: &str) -> Flow {
        Flow::new(local.parse().unwrap(), remote.parse().unwrap())
    }

    #[test]
    fn what_is_made_up_reads_as_what_was_meant() {
        for (local, remote) in [("10.0.0.1:80", "10.0.0.9:4000"), ("[fd00::1]:80", "[fd00::9]:4000")] {
            let flow = flow(local, remote);
            let (called, caller) = (established(flow, true, 60), established(flow, false, 60));
            assert_eq!(Entry::read(&called).unwrap().key(), Some(Key::tcp(flow)));
            assert_eq!(Entry::read(&caller).unwrap().key(), Some(Key::tcp(flow).turned()));
            assert!(Entry::read(&called).unwrap().is_settled());
        }
    }

    #[test]
    fn what_was_called_by_another_port_is_known_by_its_own() {
        let (there, back) = (flow("10.0.0.1:80", "10.0.0.9:4000"), flow("10.0.0.1:7000", "10.0.0.9:4000"));
        let mut content = Key::tcp(there).question();
        content.nested(REPLY, |tuple| Key::tcp(back).turned().write_tuple(tuple));
        let entry = Entry::read(&content.0).unwrap();
        assert_eq!((entry.key(), entry.key_behind()), (None, Some(Key::tcp(back))));
        let message = entry.message_elsewhere(&Translation::default()).unwrap();
        assert!(find(&message[HEADER..], DESTINATION_TRANSLATION).is_some());
        assert!(find(&message[HEADER..], SOURCE_TRANSLATION).is_none());
    }

    #[test]
    fn addresses_become_others_in_both_directions() {
        let pairs = [("10.0.0.1", "10.9.0.1"), ("fd00::1", "fd09::1")];
        let addresses = Translation::new(pairs.map(|(old, new)| (old.parse().unwrap(), new.parse().unwrap()))).unwrap();
        for (local, remote, there) in [
            ("10.0.0.1:80", "10.0.0.9:4000", "10.9.0.1:80"),
            ("[fd00::1]:80", "[fd00::9]:4000", "[fd09::1]:80"),
            ("10.0.0.2:80", "10.0.0.9:4000", "10.0.0.2:80"),
        ] {
            let content = established(flow(local, remote), true, 60);
            let message = Entry::read(&content).unwrap().message_elsewhere(&addresses).unwrap();
            assert_eq!(Entry::read(&message).unwrap().key(), Some(Key::tcp(flow(there, remote))), "{local}");
        }
    }

    #[test]
    fn flags_are_told_so_that_they_are_taken() {
        let mut state = Attributes::default();
        state.nested(TCP, |tcp| {
            tcp.bytes(TCP_STATE, &[3]);
            tcp.bytes(TCP_FLAGS[0], &[0x23, 0]);
        });
        let mut told = Attributes::default();
        protocol_state(&mut told, &state.0);
        let tcp = find(&told.0, TCP).unwrap().value;
        assert_eq!(find(tcp, TCP_FLAGS[0]).unwrap().value, [0x0b, 0x0f]);
        assert_eq!(find(tcp, TCP_STATE).unwrap().value, [3]);
    }
}
