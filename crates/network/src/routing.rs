//! Addresses, nexthops, routes, rules and neighbours (rtnetlink(7)): listed by the kernel, and told to it again as they were.

use std::collections::HashSet;
use std::net::IpAddr;

use godwit_kernel::Errno;
use godwit_proto::wire::NetworkNamespace;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_sys::Socket;

use crate::attribute::{Attribute, Attributes, find, read as attributes_of, without};
use crate::error::{Error, Result};
use crate::netlink;

/// One kind of thing that the kernel lists.
#[derive(Clone, Copy, Debug)]
struct Kind {
    what: &'static str,
    /// Number of the message that makes one. The one that takes it away and the one that asks for all follow it.
    new: u16,
    /// Bytes before the attributes.
    header: usize,
    flags: u16,
    /// Takes away what header and attributes say of how it fares; `None` where it comes about by itself.
    settle: fn(&mut [u8], &[u8]) -> Option<Vec<u8>>,
}

const IPV4: u8 = libc::AF_INET as u8;
const IPV6: u8 = libc::AF_INET6 as u8;

fn is_ip(header: &[u8]) -> bool {
    matches!(header[0], IPV4 | IPV6)
}

const ADDRESSES: Kind = Kind {
    what: "addresses",
    new: 20,
    header: 8,
    flags: NLM_F_REPLACE,
    settle: |header, attributes| {
        // It is not to be asked whether anybody has it, nor does it wait for an answer: IFA_F_NODAD, not IFA_F_TENTATIVE.
        const NO_QUESTION: u32 = 0x02;
        const TENTATIVE: u32 = 0x40;
        if !is_ip(header) {
            return None;
        }
        let mut kept = Attributes(without(attributes, &[LIFETIMES, FLAGS]));
        let mut flags = find(attributes, FLAGS).and_then(|flags| flags.native()).unwrap_or(header[2].into());
        if header[0] == IPV6 {
            flags = (flags | NO_QUESTION) & !TENTATIVE;
        }
        header[2] = flags as u8;
        kept.native(FLAGS, flags);
        // The times it is preferred and valid; when it was made is of no use to another host.
        if let Some([times @ .., _, _, _, _, _, _, _, _]) = find(attributes, LIFETIMES).map(|times| times.value)
            && times.get(..8).is_some_and(|both| both != [0xff; 8])
        {
            kept.bytes(LIFETIMES, &[times, &[0; 8]].concat());
        }
        Some(kept.0)
    },
};

const NEXTHOPS: Kind = Kind {
    what: "nexthops",
    new: 104,
    header: 8,
    flags: NLM_F_REPLACE,
    settle: |_, attributes| Some(attributes.to_vec()),
};

const ROUTES: Kind = Kind {
    what: "routes",
    new: 24,
    header: 12,
    flags: 0,
    settle: |header, attributes| {
        const OF_THE_KERNEL: u8 = 2;
        const CLONED: u32 = 0x200;
        const ON_LINK: u32 = 4;
        const STATE: u16 = 12;
        const NEXTHOP: u16 = 30;
        /// What a route that has a nexthop does not say itself: interface, gateways, encapsulation.
        const SAID_BY_NEXTHOP: &[u16] = &[4, 5, 9, STATE, 18, 21, 22];
        let flags = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        header[8..12].copy_from_slice(&(flags & ON_LINK).to_ne_bytes());
        let left_out = if find(attributes, NEXTHOP).is_some() { SAID_BY_NEXTHOP } else { &[STATE] };
        // Those of the kernel come with addresses.
        let is_chosen = header[5] != OF_THE_KERNEL && flags & CLONED == 0 && is_ip(header);
        is_chosen.then(|| without(attributes, left_out))
    },
};

const RULES: Kind = Kind {
    what: "rules",
    new: 32,
    header: 12,
    flags: 0,
    settle: |header, attributes| {
        const DETACHED_OR_UNRESOLVED: u32 = 0x4 | 0x8 | 0x10;
        let flags = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        header[8..12].copy_from_slice(&(flags & !DETACHED_OR_UNRESOLVED).to_ne_bytes());
        is_ip(header).then(|| attributes.to_vec())
    },
};

const NEIGHBOURS: Kind = Kind {
    what: "neighbours",
    new: 28,
    header: 12,
    flags: NLM_F_REPLACE,
    settle: |header, attributes| {
        const STALE: u16 = 0x04;
        const PERMANENT: u16 = 0x80;
        const HEARD_OF: u16 = 0x02 | STALE | 0x08 | 0x10;
        const PROXY: u8 = 0x08;
        const LINK_LAYER_ADDRESS: u16 = 2;
        const STATE: u16 = 3;
        const PROBES: u16 = 4;
        let state = u16::from_ne_bytes([header[8], header[9]]);
        if state & HEARD_OF != 0 {
            header[8..10].copy_from_slice(&STALE.to_ne_bytes());
        }
        let known = state & (HEARD_OF | PERMANENT) != 0 && find(attributes, LINK_LAYER_ADDRESS).is_some();
        (is_ip(header) && (known || header[10] & PROXY != 0)).then(|| without(attributes, &[STATE, PROBES]))
    },
};

impl Kind {
    fn list(&self, socket: &Socket, question: &[u8]) -> Result<Vec<Vec<u8>>> {
        let told = match netlink::list(socket, self.new + 2, question) {
            // Kernels without nexthops as things of their own.
            Err(Errno::EOPNOTSUPP) => Vec::new(),
            outcome => outcome.map_err(|source| Error::call(self.what, "listing them", source))?,
        };
        Ok(told
            .into_iter()
            .filter(|told| told.kind == self.new)
            .filter_map(|told| self.settled(&told.content))
            .collect())
    }

    fn all(&self, socket: &Socket) -> Result<Vec<Vec<u8>>> {
        self.list(socket, &vec![0; self.header])
    }

    /// What a message says of the thing itself; `None` where it comes about by itself, or makes no sense.
    fn settled(&self, content: &[u8]) -> Option<Vec<u8>> {
        let (header, attributes) = content.split_at_checked(self.header)?;
        let mut settled = header.to_vec();
        let attributes = (self.settle)(&mut settled, attributes)?;
        settled.extend(attributes);
        Some(settled)
    }

    /// What makes a thing itself. An address is the same one while its lifetimes run down: taken away and made again, it would have lost
    /// the routes that lean on it.
    fn identity(&self, content: &[u8]) -> Vec<u8> {
        match content.split_at_checked(self.header) {
            Some((&[family, prefix, _, ref rest @ ..], attributes)) if self.new == ADDRESSES.new => {
                [&[family, prefix, 0], rest, &without(attributes, &[LIFETIMES, FLAGS])].concat()
            }
            _ => content.to_vec(),
        }
    }

    /// Has the kernel go from what it has to what it shall have.
    fn follow(&self, socket: &Socket, has: &[Vec<u8>], wanted: &[Vec<u8>]) -> Result<()> {
        let failed =
            |what, source| Error::call(format!("{} of the process's network namespace", self.what), what, source);
        let old: HashSet<&Vec<u8>> = has.iter().collect();
        let stays: HashSet<Vec<u8>> = wanted.iter().map(|content| self.identity(content)).collect();
        for gone in has.iter().filter(|content| !stays.contains(&self.identity(content))) {
            match netlink::tell(socket, self.new + 1, 0, gone) {
                // It went with something else.
                Ok(()) | Err(Errno::ENOENT | Errno::ESRCH | Errno::EADDRNOTAVAIL) => {}
                Err(source) => return Err(failed("taking one away", source)),
            }
        }
        // What leans on others comes after them, which no single order says: those that do not fit yet are tried again.
        let mut waiting: Vec<&Vec<u8>> = wanted.iter().filter(|content| !old.contains(content)).collect();
        loop {
            let before = waiting.len();
            let mut refusal = None;
            waiting.retain(|content| {
                let settled = self.settled(content);
                let appended = if self.new == ROUTES.new && content.first() == Some(&IPV4) { NLM_F_APPEND } else { 0 };
                let flags = NLM_F_CREATE | self.flags | appended;
                match settled.map(|settled| netlink::tell(socket, self.new, flags, &settled)) {
                    None | Some(Ok(()) | Err(Errno::EEXIST)) => false,
                    Some(Err(source)) => {
                        refusal = Some(source);
                        true
                    }
                }
            });
            match refusal {
                None => return Ok(()),
                Some(source) if waiting.len() == before => return Err(failed("making one", source)),
                Some(_) => {}
            }
        }
    }
}

/// Reads a message as one of every kind.
pub(crate) fn read_as_any(content: &[u8]) -> usize {
    let kinds = [ADDRESSES, NEXTHOPS, ROUTES, RULES, NEIGHBOURS];
    kinds.iter().filter(|kind| kind.settled(content).is_some()).count() + usize::from(address(content).is_some())
}

/// Reads all of it.
pub(crate) fn read(socket: &Socket, into: &mut NetworkNamespace) -> Result<()> {
    into.addresses = ADDRESSES.all(socket)?;
    into.nexthops = NEXTHOPS.all(socket)?;
    into.routes = ROUTES.all(socket)?;
    into.rules = RULES.all(socket)?;
    into.neighbours = NEIGHBOURS.all(socket)?;
    let mut proxies = vec![0; NEIGHBOURS.header];
    proxies[10] = 0x08;
    into.neighbours.extend(NEIGHBOURS.list(socket, &proxies)?);
    Ok(())
}

/// Has a namespace that has all of `has` have all of `wanted`.
pub(crate) fn follow(socket: &Socket, has: &NetworkNamespace, wanted: &NetworkNamespace) -> Result<()> {
    ADDRESSES.follow(socket, &has.addresses, &wanted.addresses)?;
    NEXTHOPS.follow(socket, &has.nexthops, &wanted.nexthops)?;
    ROUTES.follow(socket, &has.routes, &wanted.routes)?;
    RULES.follow(socket, &has.rules, &wanted.rules)?;
    NEIGHBOURS.follow(socket, &has.neighbours, &wanted.neighbours)
}

/// All addresses of a namespace, each as the kernel is told of it.
pub(crate) fn addresses(socket: &Socket) -> Result<Vec<Vec<u8>>> {
    ADDRESSES.all(socket)
}

/// Attributes of an address that mean the same on another host (linux/if_addr.h): the address, its other end, label, broadcast, lifetimes,
/// flags, metric, and who has set it.
const OF_ADDRESS: &[u16] = &[1, 2, LABEL, 4, LIFETIMES, FLAGS, 9, 11];
const LABEL: u16 = 3;
const LIFETIMES: u16 = 6;
const FLAGS: u16 = 8;

/// An address for an interface, made of what another host, or this one at another time, says of it.
pub(crate) fn address_for(content: &[u8], index: u32) -> Option<Vec<u8>> {
    let settled = ADDRESSES.settled(content)?;
    let (header, attributes) = settled.split_at_checked(ADDRESSES.header)?;
    let mut told = Attributes(header.to_vec());
    told.0[4..8].copy_from_slice(&index.to_ne_bytes());
    attributes_of(attributes)
        .filter(|attribute| OF_ADDRESS.contains(&attribute.kind))
        .for_each(|attribute| told.copy(&attribute));
    Some(told.0)
}

/// An address whose label begins with the name of another interface instead.
pub(crate) fn relabelled(content: &[u8], from: &str, to: &str) -> Vec<u8> {
    changed(content, LABEL, |told, label| {
        let label = label.text();
        told.text(LABEL, &label.strip_prefix(from).map_or_else(|| to.to_owned(), |rest| format!("{to}{rest}")));
    })
}

/// An address as it is some time later: that much less of its lifetimes is left.
pub(crate) fn aged(content: &[u8], by: std::time::Duration) -> Vec<u8> {
    let seconds = u32::try_from(by.as_secs()).unwrap_or(u32::MAX);
    changed(content, LIFETIMES, |told, times| {
        let mut value = times.value.to_vec();
        for (at, least) in [(0, 0), (4, 1)] {
            if let Some(word) = value.get_mut(at..at + 4)
                && *word != [0xff; 4]
            {
                let left = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]).saturating_sub(seconds);
                word.copy_from_slice(&left.max(least).to_ne_bytes());
            }
        }
        told.bytes(LIFETIMES, &value);
    })
}

fn changed(content: &[u8], kind: u16, change: impl Fn(&mut Attributes, &Attribute<'_>)) -> Vec<u8> {
    let (header, attributes) = content.split_at(ADDRESSES.header.min(content.len()));
    let mut told = Attributes(header.to_vec());
    for attribute in attributes_of(attributes) {
        if attribute.kind == kind { change(&mut told, &attribute) } else { told.copy(&attribute) }
    }
    told.0
}

/// Has an interface have an address.
pub(crate) fn give_address(socket: &Socket, content: &[u8]) -> Result<(), Errno> {
    netlink::tell(socket, ADDRESSES.new, NLM_F_CREATE | NLM_F_EXCL, content)
}

/// Takes an address away from its interface.
pub(crate) fn take_address(socket: &Socket, content: &[u8]) -> Result<(), Errno> {
    netlink::tell(socket, ADDRESSES.new + 1, 0, content)
}

/// Routes by which this host speaks under an address, unless they are the kernel's own: they go with the address, or forget it.
pub(crate) fn routes_from(socket: &Socket, address: IpAddr) -> Result<Vec<Vec<u8>>> {
    const SOURCE: u16 = 7;
    let address = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let mut routes = ROUTES.all(socket)?;
    routes.retain(|route| find(&route[ROUTES.header..], SOURCE).is_some_and(|source| source.value == address));
    Ok(routes)
}

/// Has this host have a route again that went with an address.
pub(crate) fn give_route(socket: &Socket, content: &[u8]) -> Result<(), Errno> {
    // N.B. one of IPv6 is still there, and lacks its source.
    let more = if content.first() == Some(&IPV6) { NLM_F_REPLACE } else { NLM_F_APPEND };
    match netlink::tell(socket, ROUTES.new, NLM_F_CREATE | more, content) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Where a route leads, in words of ip-route(8).
pub(crate) fn destination(route: &[u8]) -> String {
    const DESTINATION: u16 = 1;
    let address = route.get(ROUTES.header..).and_then(|attributes| find(attributes, DESTINATION));
    let address = address.and_then(|attribute| ip(attribute.value));
    address.map_or_else(|| "default".to_owned(), |address| format!("{address}/{}", route.get(1).unwrap_or(&0)))
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(<[u8; 4]>::try_from(bytes).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(bytes).ok()?.into()),
        _ => None,
    }
}

/// The IP address in a message about an address, and the number of the interface that has it.
pub(crate) fn address(content: &[u8]) -> Option<(IpAddr, u8, u32)> {
    const ADDRESS: u16 = 1;
    const LOCAL: u16 = 2;
    let (header, attributes) = content.split_at_checked(ADDRESSES.header)?;
    let index = u32::from_ne_bytes(header.get(4..8)?.try_into().ok()?);
    let bytes = find(attributes, LOCAL).or_else(|| find(attributes, ADDRESS))?.value;
    let ip = ip(bytes)?;
    Some((ip, header[1], index))
}
