//! Connections that the packet filter tracks (nf_conntrack): with them, rules that know established connections and
//! translated addresses go on to fit.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use godwit_kernel::Errno;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_sys::Socket;

use crate::attribute::{Attributes, find, read as attributes_of};
use crate::error::{Error, Result};
use crate::flow::Flow;
use crate::netlink;

const SUBSYSTEM: u16 = 1 << 8;
const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const GET_STATISTICS: u16 = SUBSYSTEM | 5;
/// Bytes of `struct nfgenmsg`.
const HEADER: usize = 4;

/// `CTA_*`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const SOURCE_TRANSLATION: u16 = 6;
const ID: u16 = 12;
const DESTINATION_TRANSLATION: u16 = 13;
const ZONE: u16 = 18;
/// Tuples, status, protocol, helper, timeout, mark, master, sequence adjustments, zone and labels: all that can be told back.
const KEPT: &[u16] = &[ORIGINAL, REPLY, 3, 4, 5, 7, 8, 14, 15, 16, 18, 22];

/// `CTA_TUPLE_*`, `CTA_IP_*`, `CTA_PROTO_*`.
const ADDRESSES: u16 = 1;
const PROTOCOL: u16 = 2;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
/// `CTA_NAT_*`: lowest address of IPv4 and IPv6, and the ports.
const LOWEST_IPV4: u16 = 1;
const HIGHEST_IPV4: u16 = 2;
const PORTS: u16 = 3;
const LOWEST_IPV6: u16 = 4;
const HIGHEST_IPV6: u16 = 5;

/// Lists what is tracked.
pub(super) fn read(socket: &Socket) -> Result<Vec<Vec<u8>>> {
    // N.B. the list is made by going through the table of all namespaces, which takes milliseconds; counting does not.
    if count(socket) == Some(0) {
        return Ok(Vec::new());
    }
    match netlink::list(socket, GET, &[0; HEADER]) {
        Ok(told) => Ok(told.into_iter().filter(|told| told.kind == NEW).map(|told| told.content).collect()),
        // A kernel that tracks nothing.
        Err(Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EINVAL) => Ok(Vec::new()),
        Err(source) => Err(Error::call("tracked connections", "listing them", source)),
    }
}

/// Adds what is tracked of `flows` to what is `known`, unless that says the same for good (`IPS_ASSURED`).
pub(super) fn add<'a>(socket: &Socket, known: &mut Vec<Vec<u8>>, flows: impl Iterator<Item = &'a Flow>) {
    const ASSURED: u32 = 1 << 2;
    let mut settled = HashSet::new();
    let mut unsettled = HashMap::new();
    for (at, content) in known.iter().enumerate() {
        let Some(attributes) = content.get(HEADER..) else { continue };
        let status = find(attributes, STATUS).and_then(|status| status.value.try_into().ok()).map(u32::from_be_bytes);
        for tuple in [ORIGINAL, REPLY].iter().filter_map(|&kind| find(attributes, kind)) {
            if status.is_some_and(|status| status & ASSURED != 0) {
                settled.insert(tuple.value);
            } else {
                unsettled.insert(tuple.value, at);
            }
        }
    }
    let mut replaced = Vec::new();
    let mut found = Vec::new();
    for flow in flows {
        let mut tuple = Attributes::default();
        write_tuple(&mut tuple, flow);
        if settled.contains(tuple.0.as_slice()) {
            continue;
        }
        let mut question =
            Attributes(vec![if flow.local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 } as u8, 0, 0, 0]);
        question.nested(ORIGINAL, |inner| inner.0.extend(&tuple.0));
        if let Ok(told) = netlink::ask_one(socket, GET, &question.0)
            && told.kind == NEW
        {
            match unsettled.get(tuple.0.as_slice()) {
                Some(&at) => replaced.push((at, told.content)),
                None => found.push(told.content),
            }
        }
    }
    for (at, content) in replaced {
        known[at] = content;
    }
    known.extend(found);
}

/// Writes the tuple of what arrives by a TCP connection, as the kernel writes it.
fn write_tuple(into: &mut Attributes, flow: &Flow) {
    into.nested(ADDRESSES, |addresses| {
        for (ends, kinds) in [(flow.remote.ip(), [1, 3]), (flow.local.ip(), [2, 4])] {
            match ends {
                IpAddr::V4(address) => addresses.bytes(kinds[0], &address.octets()),
                IpAddr::V6(address) => addresses.bytes(kinds[1], &address.octets()),
            }
        }
    });
    into.nested(PROTOCOL, |protocol| {
        protocol.bytes(1, &[libc::IPPROTO_TCP as u8]);
        protocol.bytes(SOURCE_PORT, &flow.remote.port().to_be_bytes());
        protocol.bytes(DESTINATION_PORT, &flow.local.port().to_be_bytes());
    });
}

/// Number of connections that a namespace tracks.
pub(super) fn count(socket: &Socket) -> Option<u32> {
    const ENTRIES: u16 = 1;
    let answer = netlink::ask_one(socket, GET_STATISTICS, &[0; HEADER]).ok()?;
    find(answer.content.get(HEADER..)?, ENTRIES)?.value.try_into().ok().map(u32::from_be_bytes)
}

/// Has a namespace forget what it tracks of TCP connections that are `ours`, whichever end has called; gives their number. Where addresses
/// or ports are translated nothing is forgotten: that is somebody else's business.
pub(crate) fn forget(socket: &Socket, ours: impl Fn(&Flow) -> bool) -> Result<usize> {
    let mut forgotten = 0;
    for content in read(socket)? {
        let Some((header, attributes)) = content.split_at_checked(HEADER) else { continue };
        let Some((original, reply)) = find(attributes, ORIGINAL).zip(find(attributes, REPLY)) else { continue };
        let Some((there, back)) = Tuple::read(original.value).zip(Tuple::read(reply.value)) else { continue };
        let is_ours = |flow: Flow| ours(&flow) || ours(&Flow::new(flow.remote, flow.local));
        let is_translated = there.from() != back.to() || there.to() != back.from();
        if is_translated || !there.flow().is_some_and(is_ours) {
            continue;
        }
        let mut message = Attributes(vec![header[0], 0, 0, 0]);
        let named = [Some(original), find(attributes, ZONE), find(attributes, ID)];
        named.iter().flatten().for_each(|attribute| message.copy(attribute));
        match netlink::tell(socket, DELETE, 0, &message.0) {
            Ok(()) => forgotten += 1,
            // It has ended by itself.
            Err(Errno::ENOENT) => {}
            Err(source) => return Err(Error::call("tracked connections", "forgetting one", source)),
        }
    }
    Ok(forgotten)
}

/// Has a namespace that tracks nothing track these. One that is not taken is found again by its next packet, or not: the
/// number of those is told.
pub(super) fn make(socket: &Socket, tracked: &[Vec<u8>]) {
    let failed = tracked.iter().filter(|content| {
        let message = message(content);
        let told = message.map(|message| netlink::tell(socket, NEW, NLM_F_CREATE | NLM_F_EXCL, &message));
        if let Some(Err(errno)) = told {
            tracing::debug!(%errno, "a tracked connection is not taken");
        }
        !matches!(told, Some(Ok(())))
    });
    let failed = failed.count();
    if failed > 0 {
        tracing::warn!(failed, of = tracked.len(), "tracked connections that this host does not take");
    }
}

/// One direction of a connection: addresses, and ports where it has any.
#[derive(Debug, PartialEq, Eq)]
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
            protocol: find(protocol, 1).and_then(|number| number.value.first().copied()),
            ports: port(SOURCE_PORT).zip(port(DESTINATION_PORT)),
        })
    }

    /// The connection, if it is one of TCP, as who is called sees it.
    fn flow(&self) -> Option<Flow> {
        let address = |bytes: &[u8]| match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
            _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        };
        let port = |bytes: &[u8]| bytes.try_into().ok().map(u16::from_be_bytes);
        let (from, to) = self.ports.filter(|_| self.protocol == Some(libc::IPPROTO_TCP as u8))?;
        let local = SocketAddr::new(address(self.destination)?, port(to)?);
        Some(Flow::new(local, SocketAddr::new(address(self.source)?, port(from)?)))
    }

    fn from(&self) -> (&'a [u8], Option<&'a [u8]>) {
        (self.source, self.ports.map(|ports| ports.0))
    }

    fn to(&self) -> (&'a [u8], Option<&'a [u8]>) {
        (self.destination, self.ports.map(|ports| ports.1))
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

/// What makes the kernel track a connection. A translated one is told as if it were not, and what it is translated to.
pub(super) fn message(content: &[u8]) -> Option<Vec<u8>> {
    let (header, attributes) = content.split_at_checked(HEADER)?;
    let (original, reply) = (find(attributes, ORIGINAL)?.value, find(attributes, REPLY)?.value);
    let (there, back) = (Tuple::read(original)?, Tuple::read(reply)?);
    let mut message = Attributes(vec![header[0], 0, 0, 0]);
    let (source_changes, destination_changes) = (there.from() != back.to(), there.to() != back.from());
    for attribute in attributes_of(attributes).filter(|attribute| KEPT.contains(&attribute.kind)) {
        if attribute.kind == REPLY && (source_changes || destination_changes) {
            message.nested(REPLY, |tuple| reversed(tuple, original));
        } else {
            message.copy(&attribute);
        }
    }
    if source_changes {
        message.nested(SOURCE_TRANSLATION, |to| translation(to, back.to().0, back.to().1));
    }
    if destination_changes {
        message.nested(DESTINATION_TRANSLATION, |to| translation(to, back.from().0, back.from().1));
    }
    Some(message.0)
}
