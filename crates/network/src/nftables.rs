//! Messages to the packet filter (nf_tables), for a table that keeps the packets of some connections from the kernel.
//!
//! The table, for connections (that for requests has `tcp flags syn` and sets of listening addresses):
//! ```text
//! table inet godwit-ID {                        # owned by our socket: gone with it, however we end
//!     set flows4 { type ipv4_addr . inet_service . ipv4_addr . inet_service; }   # remote, local
//!     set flows6 { … }
//!     chain arriving { type filter hook prerouting priority raw;
//!         meta nfproto ipv4 ip saddr . tcp sport . ip daddr . tcp dport @flows4 drop … }
//!     chain leaving { type filter hook output priority raw;
//!         meta nfproto ipv4 ip daddr . tcp dport . ip saddr . tcp sport @flows4 drop … }
//! }
//! ```
//! That for datagrams has one chain, `type filter hook input`, where fragments of IPv4 are joined already, with rules such as
//! `meta l4proto udp meta nfproto ipv4 ip daddr . udp dport @listeners4 log group N drop`.
//! Where bridges call the packet filter by themselves, `arriving` is at `hook input`, and so is a chain like it at `hook forward`
//! ([`Place::AfterRouting`]). The sets are filled before, the chains are added when it is to take effect. Numbers are those of linux/netfilter/nf_tables.h; a message is a header of
//! netlink, one of nfnetlink, and attributes.

use std::net::IpAddr;

use crate::attribute::{self, Attributes};
use crate::deliver::MARK;
use crate::flow::{Datagrams, Flow, Listener};

/// How the names of all our tables begin.
pub(crate) const PREFIX: &str = "godwit-";

pub(crate) const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM;
const DELETE_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const NEW_SET: u16 = SUBSYSTEM | 9;
const NEW_ELEMENTS: u16 = SUBSYSTEM | 12;

const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

const INET: u8 = 1;
const ARP: u8 = 3;

/// `NFT_TABLE_F_OWNER`. Such a table cannot be switched on and off (`dormant`), so it takes effect with its chains.
const OWNED: u32 = 2;

const ARRIVING: &str = "arriving";
const LEAVING: &str = "leaving";
const PASSING: &str = "passing";

const HOOK_PREROUTING: u32 = 0;
const HOOK_INPUT: u32 = 1;
const HOOK_FORWARD: u32 = 2;
const HOOK_OUTPUT: u32 = 3;
const HOOK_ARP_IN: u32 = 0;
const HOOK_ARP_OUT: u32 = 1;
/// `NF_IP_PRI_RAW`: before connections are tracked, which shall not hear of these packets.
const PRIORITY_RAW: i32 = -300;

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

const META_MARK: u32 = 3;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;

/// 32-bit registers begin at this number.
const REGISTER: u32 = 8;

/// A set of keys: its name, and how a packet's key is loaded.
#[derive(Clone, Copy, Debug)]
struct Set {
    name: &'static str,
    id: u32,
    protocol: Option<u8>,
    fields: &'static [Field],
    /// The same for packets that leave.
    reversed: &'static [Field],
}

/// Bytes of a packet's network (false) or transport header (true).
#[derive(Clone, Copy, Debug)]
struct Field {
    transport: bool,
    offset: u32,
    length: u32,
}

const fn network(offset: u32, length: u32) -> Field {
    Field { transport: false, offset, length }
}

const SOURCE_PORT: Field = Field { transport: true, offset: 0, length: 2 };
const DESTINATION_PORT: Field = Field { transport: true, offset: 2, length: 2 };
const SOURCE4: Field = network(12, 4);
const DESTINATION4: Field = network(16, 4);
const SOURCE6: Field = network(8, 16);
const DESTINATION6: Field = network(24, 16);

const FLOWS4: Set = Set {
    name: "flows4",
    id: 1,
    protocol: Some(NFPROTO_IPV4),
    fields: &[SOURCE4, SOURCE_PORT, DESTINATION4, DESTINATION_PORT],
    reversed: &[DESTINATION4, DESTINATION_PORT, SOURCE4, SOURCE_PORT],
};
const FLOWS6: Set = Set {
    name: "flows6",
    id: 2,
    protocol: Some(NFPROTO_IPV6),
    fields: &[SOURCE6, SOURCE_PORT, DESTINATION6, DESTINATION_PORT],
    reversed: &[DESTINATION6, DESTINATION_PORT, SOURCE6, SOURCE_PORT],
};
const LISTENERS4: Set = Set {
    name: "listeners4",
    id: 3,
    protocol: Some(NFPROTO_IPV4),
    fields: &[DESTINATION4, DESTINATION_PORT],
    reversed: &[],
};
const LISTENERS6: Set = Set {
    name: "listeners6",
    id: 4,
    protocol: Some(NFPROTO_IPV6),
    fields: &[DESTINATION6, DESTINATION_PORT],
    reversed: &[],
};
const PORTS: Set = Set { name: "ports", id: 5, protocol: None, fields: &[DESTINATION_PORT], reversed: &[] };

const ADDRESSES4: Set =
    Set { name: "addresses4", id: 6, protocol: Some(NFPROTO_IPV4), fields: &[DESTINATION4], reversed: &[] };
const ADDRESSES6: Set =
    Set { name: "addresses6", id: 7, protocol: Some(NFPROTO_IPV6), fields: &[DESTINATION6], reversed: &[] };

/// Which packets a rule drops among those whose key is in its set.
#[derive(Clone, Copy, Debug)]
enum Dropped {
    /// All of TCP.
    Tcp,
    /// Requests for new TCP connections.
    Requests,
    /// All of UDP, of which the listeners of a log group get a copy.
    Datagrams { group: u16 },
}

/// Elements of one set that fit one message; a message's attributes have 16-bit lengths.
const ELEMENTS_IN_MESSAGE: usize = 500;

/// A batch of messages that the kernel takes as one.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    /// Those that are acknowledged.
    pub(crate) sequences: Vec<u32>,
    next: u32,
    /// Where the last message begins.
    last: usize,
}

impl Batch {
    pub(crate) fn begin() -> Self {
        let mut batch = Self { next: 1, ..Self::default() };
        batch.message(BATCH_BEGIN, REQUEST, 0, SUBSYSTEM >> 8, |_| {});
        batch
    }

    /// Its bytes, complete.
    pub(crate) fn finish(mut self) -> (Vec<u8>, Vec<u32>) {
        self.message(BATCH_END, REQUEST, 0, SUBSYSTEM >> 8, |_| {});
        (self.bytes, self.sequences)
    }

    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, fill: impl FnOnce(&mut Attributes)) {
        let start = self.bytes.len();
        self.last = start;
        let sequence = self.next;
        self.next += 1;
        if flags & ACKNOWLEDGE != 0 {
            self.sequences.push(sequence);
        }
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(sequence.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        let mut attributes = Attributes(std::mem::take(&mut self.bytes));
        fill(&mut attributes);
        self.bytes = attributes.0;
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Makes an object that is described already: a header of nfnetlink and attributes. It is not acknowledged.
    pub(crate) fn make(&mut self, kind: u16, content: &[u8]) {
        let family = content.first().copied().unwrap_or(0);
        let attributes = content.get(4..).unwrap_or_default();
        self.message(kind, REQUEST | CREATE | APPEND, family, 0, |message| message.0.extend(attributes));
    }

    /// Takes the table away that is described so.
    pub(crate) fn remove_table(&mut self, content: &[u8]) {
        const NAME: u16 = 1;
        let family = content.first().copied().unwrap_or(0);
        if let Some(name) = content.get(4..).and_then(|attributes| attribute::find(attributes, NAME)) {
            self.message(DELETE_TABLE, REQUEST, family, 0, |message| message.copy(&name));
        }
    }

    /// Has the last message acknowledged, and so all of them: a batch is taken as a whole.
    pub(crate) fn acknowledge_last(&mut self) {
        self.sequences.push(self.next - 1);
        let at = self.last + 6;
        if let Some(flags) = self.bytes.get_mut(at..at + 2) {
            let with = u16::from_ne_bytes([flags[0], flags[1]]) | ACKNOWLEDGE;
            flags.copy_from_slice(&with.to_ne_bytes());
        }
    }

    fn command(&mut self, kind: u16, flags: u16, fill: impl FnOnce(&mut Attributes)) {
        self.message(kind, REQUEST | ACKNOWLEDGE | flags, INET, 0, fill);
    }

    /// A table of a family through whose chains nothing passes.
    fn wall(&mut self, family: u8, name: &str, flags: u32, hooks: [u32; 2], priority: i32) {
        const POLICY_DROP: u32 = 0;
        self.message(NEW_TABLE, REQUEST | ACKNOWLEDGE | CREATE, family, 0, |table| {
            table.text(1, name);
            table.number(2, flags);
        });
        for (chain, hook) in [ARRIVING, LEAVING].into_iter().zip(hooks) {
            self.message(NEW_CHAIN, REQUEST | ACKNOWLEDGE | CREATE, family, 0, |message| {
                message.text(1, name);
                message.text(3, chain);
                message.nested(4, |on| {
                    on.number(1, hook);
                    on.number(2, priority as u32);
                });
                message.number(5, POLICY_DROP);
                message.text(7, "filter");
            });
        }
    }

    /// Lets packets that are delivered here ([`crate::deliver`]) through a wall.
    fn gate(&mut self, family: u8, name: &str) {
        const NF_ACCEPT: u32 = 1;
        for chain in [ARRIVING, LEAVING] {
            self.message(NEW_RULE, REQUEST | ACKNOWLEDGE | CREATE | APPEND, family, 0, |rule| {
                rule.text(1, name);
                rule.text(2, chain);
                rule.nested(4, |list| {
                    list.load_meta(META_MARK);
                    list.equals_bytes(&MARK.to_ne_bytes());
                    list.expression("immediate", |immediate| {
                        immediate.number(1, 0);
                        immediate.nested(2, |data| data.nested(2, |verdict| verdict.number(1, NF_ACCEPT)));
                    });
                });
            });
        }
    }

    fn table(&mut self, name: &str) {
        self.command(NEW_TABLE, CREATE, |table| {
            table.text(1, name);
            table.number(2, OWNED);
        });
    }

    fn set(&mut self, table: &str, set: &Set) {
        let length: u32 = set.fields.iter().map(|field| field.length.next_multiple_of(4)).sum();
        self.command(NEW_SET, CREATE, |message| {
            message.text(1, table);
            message.text(2, set.name);
            message.number(3, 0);
            // What people's tools call the type of the key; of no meaning to the kernel.
            message.number(4, 0);
            message.number(5, length);
            message.number(10, set.id);
        });
    }

    fn chain(&mut self, table: &str, name: &str, hook: u32) {
        self.chain_at(table, name, hook, PRIORITY_RAW);
    }

    fn chain_at(&mut self, table: &str, name: &str, hook: u32, priority: i32) {
        self.command(NEW_CHAIN, CREATE, |chain| {
            chain.text(1, table);
            chain.text(3, name);
            chain.nested(4, |on| {
                on.number(1, hook);
                on.number(2, priority as u32);
            });
            chain.text(7, "filter");
        });
    }

    /// A rule that drops packets whose key is in a set.
    fn rule(&mut self, table: &str, chain: &str, set: &Set, fields: &[Field], dropped: Dropped) {
        const TCP_FLAGS: Field = Field { transport: true, offset: 13, length: 1 };
        const SYN: u8 = 2;
        const SYN_AND_ACK: u8 = 0x12;
        self.command(NEW_RULE, CREATE | APPEND, |rule| {
            rule.text(1, table);
            rule.text(2, chain);
            rule.nested(4, |list| {
                let transport = match dropped {
                    Dropped::Tcp | Dropped::Requests => libc::IPPROTO_TCP,
                    Dropped::Datagrams { .. } => libc::IPPROTO_UDP,
                };
                list.meta_is(META_L4PROTO, transport as u8);
                if let Some(protocol) = set.protocol {
                    list.meta_is(META_NFPROTO, protocol);
                }
                if matches!(dropped, Dropped::Requests) {
                    list.load(&TCP_FLAGS, REGISTER);
                    list.expression("bitwise", |bitwise| {
                        bitwise.number(1, REGISTER);
                        bitwise.number(2, REGISTER);
                        bitwise.number(3, 1);
                        bitwise.nested(4, |data| data.bytes(1, &[SYN_AND_ACK]));
                        bitwise.nested(5, |data| data.bytes(1, &[0]));
                    });
                    list.equals(SYN);
                }
                let mut register = REGISTER;
                for field in fields {
                    list.load(field, register);
                    register += field.length.div_ceil(4);
                }
                list.expression("lookup", |lookup| {
                    lookup.text(1, set.name);
                    lookup.number(2, REGISTER);
                    lookup.number(4, set.id);
                });
                if let Dropped::Datagrams { group } = dropped {
                    list.expression("log", |log| log.bytes(1, &group.to_be_bytes()));
                }
                list.expression("immediate", |immediate| {
                    immediate.number(1, 0);
                    immediate.nested(2, |data| data.nested(2, |verdict| verdict.number(1, 0)));
                });
            });
        });
    }

    /// A rule that gives a log group a copy of all fragments of IPv6 datagrams but the first: these do not say which port they are
    /// for, and are joined after this hook.
    fn later_fragments(&mut self, table: &str, chain: &str, group: u16) {
        const FRAGMENT_HEADER: u8 = 44;
        const OFFSET_AT: u32 = 2;
        const OFFSET_BITS: [u8; 2] = [0xff, 0xf8];
        const DIFFERS: u32 = 1;
        self.command(NEW_RULE, CREATE | APPEND, |rule| {
            rule.text(1, table);
            rule.text(2, chain);
            rule.nested(4, |list| {
                list.meta_is(META_L4PROTO, libc::IPPROTO_UDP as u8);
                list.meta_is(META_NFPROTO, NFPROTO_IPV6);
                list.expression("exthdr", |header| {
                    header.number(1, REGISTER);
                    header.bytes(2, &[FRAGMENT_HEADER]);
                    header.number(3, OFFSET_AT);
                    header.number(4, 2);
                });
                list.expression("bitwise", |bitwise| {
                    bitwise.number(1, REGISTER);
                    bitwise.number(2, REGISTER);
                    bitwise.number(3, 2);
                    bitwise.nested(4, |data| data.bytes(1, &OFFSET_BITS));
                    bitwise.nested(5, |data| data.bytes(1, &[0; 2]));
                });
                list.expression("cmp", |cmp| {
                    cmp.number(1, REGISTER);
                    cmp.number(2, DIFFERS);
                    cmp.nested(3, |data| data.bytes(1, &[0; 2]));
                });
                list.expression("log", |log| log.bytes(1, &group.to_be_bytes()));
            });
        });
    }

    fn flows<'a>(&mut self, table: &str, flows: impl Iterator<Item = &'a Flow>) {
        let mut keys: [Vec<Vec<u8>>; 2] = Default::default();
        for flow in flows {
            let mut key = Vec::new();
            for end in [flow.remote, flow.local] {
                add_address(&mut key, end.ip());
                add_port(&mut key, end.port());
            }
            keys[usize::from(flow.local.is_ipv6())].push(key);
        }
        self.elements(table, &FLOWS4, &keys[0]);
        self.elements(table, &FLOWS6, &keys[1]);
    }

    /// Sets of listeners, and the rules that go with them in chains.
    fn sets_of_listeners(&mut self, table: &str, chains: &[(&str, u32)], dropped: Dropped) {
        for set in [&LISTENERS4, &LISTENERS6, &PORTS] {
            self.set(table, set);
            for (chain, _) in chains {
                self.rule(table, chain, set, set.fields, dropped);
            }
        }
    }

    /// Fills the sets of listeners.
    fn listeners<'a>(&mut self, table: &str, listeners: impl Iterator<Item = &'a Listener>) {
        let mut keys: [Vec<Vec<u8>>; 3] = Default::default();
        for listener in listeners {
            let mut key = Vec::new();
            if let Some(address) = listener.address {
                add_address(&mut key, address);
            }
            add_port(&mut key, listener.port);
            let which = listener.address.map_or(2, |address| usize::from(address.is_ipv6()));
            keys[which].push(key);
        }
        for (set, keys) in [&LISTENERS4, &LISTENERS6, &PORTS].into_iter().zip(&keys) {
            self.elements(table, set, keys);
        }
    }

    fn elements(&mut self, table: &str, set: &Set, keys: &[Vec<u8>]) {
        for some in keys.chunks(ELEMENTS_IN_MESSAGE) {
            self.command(NEW_ELEMENTS, CREATE, |message| {
                message.text(1, table);
                message.text(2, set.name);
                message.nested(3, |list| {
                    for key in some {
                        list.nested(1, |element| element.nested(1, |data| data.bytes(1, key)));
                    }
                });
            });
        }
    }
}

/// What only nf_tables has among attributes.
trait Expressions {
    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Attributes));
    /// Goes on only if the first register has this byte, or these.
    fn equals(&mut self, value: u8);
    fn equals_bytes(&mut self, value: &[u8]);
    /// Loads what is said of a packet.
    fn load_meta(&mut self, key: u32);
    /// Goes on only if a packet has this.
    fn meta_is(&mut self, key: u32, value: u8);
    fn load(&mut self, field: &Field, register: u32);
}

impl Expressions for Attributes {
    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Attributes)) {
        self.nested(1, |list| {
            list.text(1, name);
            list.nested(2, fill);
        });
    }

    fn equals(&mut self, value: u8) {
        self.equals_bytes(&[value]);
    }

    fn equals_bytes(&mut self, value: &[u8]) {
        self.expression("cmp", |cmp| {
            cmp.number(1, REGISTER);
            cmp.number(2, 0);
            cmp.nested(3, |data| data.bytes(1, value));
        });
    }

    fn load_meta(&mut self, key: u32) {
        self.expression("meta", |meta| {
            meta.number(1, REGISTER);
            meta.number(2, key);
        });
    }

    fn meta_is(&mut self, key: u32, value: u8) {
        self.load_meta(key);
        self.equals(value);
    }

    fn load(&mut self, field: &Field, register: u32) {
        self.expression("payload", |payload| {
            payload.number(1, register);
            payload.number(2, if field.transport { 2 } else { 1 });
            payload.number(3, field.offset);
            payload.number(4, field.length);
        });
    }
}

/// Makes a table that knows `flows` and does nothing yet.
pub(crate) fn connections<'a>(table: &str, flows: impl Iterator<Item = &'a Flow>) -> Batch {
    let mut batch = Batch::begin();
    batch.table(table);
    batch.set(table, &FLOWS4);
    batch.set(table, &FLOWS6);
    batch.flows(table, flows);
    batch
}

/// Which packets of a connection are kept from their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ways {
    /// Those that arrive and those that leave.
    Both,
    /// Those that arrive.
    Arriving,
}

/// Where arriving packets of TCP are kept from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Before anything is made of them.
    BeforeRouting,
    /// When it is known whose they are. An address that has gone is nobody's: packets to it would be passed on.
    AfterRouting,
}

impl Place {
    /// Chains, and their hooks.
    const fn chains(self) -> &'static [(&'static str, u32)] {
        match self {
            Self::BeforeRouting => &[(ARRIVING, HOOK_PREROUTING)],
            Self::AfterRouting => &[(ARRIVING, HOOK_INPUT), (PASSING, HOOK_FORWARD)],
        }
    }
}

/// Has a table made by [`connections`] keep their packets from the kernel, and those of `more`.
pub(crate) fn hold_connections<'a>(
    table: &str,
    more: impl Iterator<Item = &'a Flow>,
    ways: Ways,
    place: Place,
) -> Batch {
    let mut batch = Batch::begin();
    batch.flows(table, more);
    for (chain, hook) in place.chains() {
        batch.chain(table, chain, *hook);
    }
    if ways == Ways::Both {
        batch.chain(table, LEAVING, HOOK_OUTPUT);
    }
    for set in [&FLOWS4, &FLOWS6] {
        for (chain, _) in place.chains() {
            batch.rule(table, chain, set, set.fields, Dropped::Tcp);
        }
        if ways == Ways::Both {
            batch.rule(table, LEAVING, set, set.reversed, Dropped::Tcp);
        }
    }
    batch
}

/// Adds connections to a table that holds already.
pub(crate) fn hold_more<'a>(table: &str, more: impl Iterator<Item = &'a Flow>) -> Batch {
    let mut batch = Batch::begin();
    batch.flows(table, more);
    batch
}

/// Which packets to listening sockets are kept from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ToListeners {
    /// Requests for new connections.
    Requests,
    /// All of them: those of connections that nobody here knows of, too.
    Everything,
}

/// Makes a table that keeps packets to `listeners` from the kernel.
pub(crate) fn hold_listeners<'a>(
    table: &str,
    listeners: impl Iterator<Item = &'a Listener>,
    what: ToListeners,
    place: Place,
) -> Batch {
    let mut batch = Batch::begin();
    batch.table(table);
    for (chain, hook) in place.chains() {
        batch.chain(table, chain, *hook);
    }
    let dropped = match what {
        ToListeners::Requests => Dropped::Requests,
        ToListeners::Everything => Dropped::Tcp,
    };
    batch.sets_of_listeners(table, place.chains(), dropped);
    batch.listeners(table, listeners);
    batch
}

/// Makes a table that keeps datagrams from the kernel and gives them to the listeners of a log group instead.
pub(crate) fn hold_datagrams(table: &str, datagrams: &Datagrams, group: u16) -> Batch {
    let mut batch = Batch::begin();
    batch.table(table);
    batch.chain(table, ARRIVING, HOOK_INPUT);
    batch.set(table, &FLOWS4);
    batch.set(table, &FLOWS6);
    batch.flows(table, datagrams.flows.iter());
    for set in [&FLOWS4, &FLOWS6] {
        batch.rule(table, ARRIVING, set, set.fields, Dropped::Datagrams { group });
    }
    batch.sets_of_listeners(table, &[(ARRIVING, HOOK_INPUT)], Dropped::Datagrams { group });
    batch.listeners(table, datagrams.ports.iter());
    batch.later_fragments(table, ARRIVING, group);
    batch
}

/// Has a table made by [`hold_datagrams`] do the same with all that is sent to addresses which this host is about to lose, before
/// it is routed; fragments as they are.
pub(crate) fn hold_addresses(table: &str, addresses: &[IpAddr], group: u16) -> Batch {
    const LOST: &str = "lost";
    let mut batch = Batch::begin();
    let mut keys: [Vec<Vec<u8>>; 2] = Default::default();
    for address in addresses {
        let mut key = Vec::new();
        add_address(&mut key, *address);
        keys[usize::from(address.is_ipv6())].push(key);
    }
    // N.B. before the walls of [`silence`]: of chains with one priority the youngest comes first.
    batch.chain_at(table, LOST, HOOK_PREROUTING, PRIORITY_RAW - 1);
    for (set, keys) in [&ADDRESSES4, &ADDRESSES6].into_iter().zip(&keys) {
        batch.set(table, set);
        batch.elements(table, set, keys);
        batch.rule(table, LOST, set, set.fields, Dropped::Datagrams { group });
    }
    batch
}

/// Adds listening sockets to a table made by [`hold_listeners`].
pub(crate) fn more_listeners<'a>(table: &str, listeners: impl Iterator<Item = &'a Listener>) -> Batch {
    let mut batch = Batch::begin();
    batch.listeners(table, listeners);
    batch
}

/// Whose tables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// The socket's that makes them: they go with it.
    Ours,
    /// Nobody's: they stay until somebody removes them.
    Nobodys,
}

/// Makes tables that let nothing in or out, packets of IP and questions for link-layer addresses alike. What waited in sockets and is
/// put back into them there is all that gets through.
pub(crate) fn silence(table: &str, ownership: Ownership) -> Batch {
    let flags = if ownership == Ownership::Ours { OWNED } else { 0 };
    let mut batch = Batch::begin();
    batch.wall(INET, table, flags, [HOOK_PREROUTING, HOOK_OUTPUT], PRIORITY_RAW);
    batch.gate(INET, table);
    batch.wall(ARP, table, flags, [HOOK_ARP_IN, HOOK_ARP_OUT], 0);
    batch
}

/// Takes tables made by [`silence`] away.
pub(crate) fn end_silence(table: &str) -> Batch {
    let mut batch = Batch::begin();
    for family in [INET, ARP] {
        batch.message(DELETE_TABLE, REQUEST | ACKNOWLEDGE, family, 0, |message| message.text(1, table));
    }
    batch
}

/// Takes tables away.
pub(crate) fn remove(tables: &[String]) -> Batch {
    let mut batch = Batch::begin();
    for table in tables {
        batch.command(DELETE_TABLE, 0, |message| message.text(1, table));
    }
    batch
}

fn add_address(key: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => key.extend(address.octets()),
        IpAddr::V6(address) => key.extend(address.octets()),
    }
}

/// A port, padded to a register.
fn add_port(key: &mut Vec<u8>, port: u16) {
    key.extend(port.to_be_bytes());
    key.extend([0; 2]);
}
