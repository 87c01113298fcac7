//! Addresses, nexthops, routes, rules and neighbours (rtnetlink(7)): listed by the kernel, and told to it again as they were.

use std::collections::HashSet;

use godwit_kernel::Errno;
use godwit_proto::wire::NetworkNamespace;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_sys::Socket;

use crate::attribute::{Attributes, find, without};
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
        const LIFETIMES: u16 = 6;
        const FLAGS: u16 = 8;
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
        // The time it is valid; when it was made is of no use to another host.
        if let Some([times @ .., _, _, _, _, _, _, _, _]) = find(attributes, LIFETIMES).map(|times| times.value)
            && times.get(4..8).is_some_and(|valid| valid != [0xff; 4])
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

    /// Has the kernel go from what it has to what it shall have.
    fn follow(&self, socket: &Socket, has: &[Vec<u8>], wanted: &[Vec<u8>]) -> Result<()> {
        let failed =
            |what, source| Error::call(format!("{} of the process's network namespace", self.what), what, source);
        let (old, new): (HashSet<&Vec<u8>>, HashSet<&Vec<u8>>) = (has.iter().collect(), wanted.iter().collect());
        for gone in has.iter().filter(|content| !new.contains(content)) {
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
pub(super) fn read_as_any(content: &[u8]) -> usize {
    let kinds = [ADDRESSES, NEXTHOPS, ROUTES, RULES, NEIGHBOURS];
    kinds.iter().filter(|kind| kind.settled(content).is_some()).count() + usize::from(address(content).is_some())
}

/// Reads all of it.
pub(super) fn read(socket: &Socket, into: &mut NetworkNamespace) -> Result<()> {
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
pub(super) fn follow(socket: &Socket, has: &NetworkNamespace, wanted: &NetworkNamespace) -> Result<()> {
    ADDRESSES.follow(socket, &has.addresses, &wanted.addresses)?;
    NEXTHOPS.follow(socket, &has.nexthops, &wanted.nexthops)?;
    ROUTES.follow(socket, &has.routes, &wanted.routes)?;
    RULES.follow(socket, &has.rules, &wanted.rules)?;
    NEIGHBOURS.follow(socket, &has.neighbours, &wanted.neighbours)
}

/// The IP address in a message about an address, and the number of the interface that has it.
pub(super) fn address(content: &[u8]) -> Option<(std::net::IpAddr, u8, u32)> {
    const ADDRESS: u16 = 1;
    const LOCAL: u16 = 2;
    let (header, attributes) = content.split_at_checked(ADDRESSES.header)?;
    let index = u32::from_ne_bytes(header.get(4..8)?.try_into().ok()?);
    let bytes = find(attributes, LOCAL).or_else(|| find(attributes, ADDRESS))?.value;
    let ip = match bytes.len() {
        4 => std::net::IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => std::net::IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    Some((ip, header[1], index))
}
