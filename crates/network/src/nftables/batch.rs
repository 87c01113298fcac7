//! A batch of messages, and the statements that our tables are made of.

use super::PRIORITY_RAW;
use super::keys::{FLOWS4, FLOWS6, Field, LISTENERS4, LISTENERS6, NFPROTO_IPV6, PORTS, Set, add_address, add_port};
use crate::attribute::{self, Attributes};
use crate::deliver::LED_HERE;
use crate::flow::{Flow, Listener};
use std::net::{Ipv4Addr, Ipv6Addr};

pub(crate) const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM;
pub(super) const DELETE_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const NEW_SET: u16 = SUBSYSTEM | 9;
const NEW_ELEMENTS: u16 = SUBSYSTEM | 12;

pub(super) const REQUEST: u16 = 1;
pub(super) const ACKNOWLEDGE: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

pub(super) const INET: u8 = 1;
pub(super) const ARP: u8 = 3;

/// `NFT_TABLE_F_OWNER`. Such a table cannot be switched on and off (`dormant`), so it takes effect with its chains.
pub(super) const OWNED: u32 = 2;

pub(super) const ARRIVING: &str = "arriving";
pub(super) const LEAVING: &str = "leaving";

/// Kinds of chains: one that lets through or drops, and one behind which a changed packet is routed anew.
const FILTER: &str = "filter";
pub(super) const ROUTE: &str = "route";

const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

const META_MARK: u32 = 3;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;

/// 32-bit registers begin at this number.
const REGISTER: u32 = 8;

/// Which packets a rule drops among those whose key is in its set.
#[derive(Clone, Copy, Debug)]
pub(super) enum Dropped {
    /// All of TCP.
    Tcp,
    /// All of TCP, of which the listeners of a log group get a copy.
    Heard { group: u16 },
    /// The same, and it is sent to this host, to be dropped there.
    LedHere { group: u16 },
    /// Requests for new TCP connections, of which the listeners of a log group get a copy, if there is one.
    Requests { group: Option<u16> },
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

    pub(super) fn message(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        fill: impl FnOnce(&mut Attributes),
    ) {
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

    pub(super) fn command(&mut self, kind: u16, flags: u16, fill: impl FnOnce(&mut Attributes)) {
        self.message(kind, REQUEST | ACKNOWLEDGE | flags, INET, 0, fill);
    }

    /// A table of a family through whose chains nothing passes.
    pub(super) fn wall(&mut self, family: u8, name: &str, flags: u32, hooks: [u32; 2], priority: i32) {
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
                message.text(7, FILTER);
            });
        }
    }

    /// Lets packets that have a mark ([`crate::deliver`]) through chains.
    pub(super) fn gate<'a>(&mut self, family: u8, name: &str, chains: impl IntoIterator<Item = &'a str>, mark: u32) {
        for chain in chains {
            self.message(NEW_RULE, REQUEST | ACKNOWLEDGE | CREATE | APPEND, family, 0, |rule| {
                rule.text(1, name);
                rule.text(2, chain);
                rule.nested(4, |list| {
                    list.load_meta(META_MARK);
                    list.equals_bytes(&mark.to_ne_bytes());
                    list.verdict(NF_ACCEPT);
                });
            });
        }
    }

    pub(super) fn table(&mut self, name: &str) {
        self.command(NEW_TABLE, CREATE, |table| {
            table.text(1, name);
            table.number(2, OWNED);
        });
    }

    pub(super) fn set(&mut self, table: &str, set: &Set) {
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

    pub(super) fn chain(&mut self, table: &str, name: &str, hook: u32) {
        self.chain_at(table, name, hook, PRIORITY_RAW);
    }

    pub(super) fn chain_at(&mut self, table: &str, name: &str, hook: u32, priority: i32) {
        self.chain_of(table, name, FILTER, hook, priority);
    }

    pub(super) fn chain_of(&mut self, table: &str, name: &str, kind: &str, hook: u32, priority: i32) {
        self.command(NEW_CHAIN, CREATE, |chain| {
            chain.text(1, table);
            chain.text(3, name);
            chain.nested(4, |on| {
                on.number(1, hook);
                on.number(2, priority as u32);
            });
            chain.text(7, kind);
        });
    }

    /// A rule that drops packets whose key is in a set.
    pub(super) fn rule(&mut self, table: &str, chain: &str, set: &Set, fields: &[Field], dropped: Dropped) {
        const TCP_FLAGS: Field = Field { transport: true, offset: 13, length: 1 };
        const SYN: u8 = 2;
        const SYN_AND_ACK: u8 = 0x12;
        self.command(NEW_RULE, CREATE | APPEND, |rule| {
            rule.text(1, table);
            rule.text(2, chain);
            rule.nested(4, |list| {
                let transport = match dropped {
                    Dropped::Tcp | Dropped::Heard { .. } | Dropped::LedHere { .. } | Dropped::Requests { .. } => {
                        libc::IPPROTO_TCP
                    }
                    Dropped::Datagrams { .. } => libc::IPPROTO_UDP,
                };
                list.meta_is(META_L4PROTO, transport as u8);
                if let Some(protocol) = set.protocol {
                    list.meta_is(META_NFPROTO, protocol);
                }
                if matches!(dropped, Dropped::Requests { .. }) {
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
                if let Dropped::Datagrams { group }
                | Dropped::Heard { group }
                | Dropped::LedHere { group }
                | Dropped::Requests { group: Some(group) } = dropped
                {
                    list.expression("log", |log| log.bytes(1, &group.to_be_bytes()));
                }
                match dropped {
                    Dropped::LedHere { .. } => list.lead_here(set),
                    _ => list.verdict(NF_DROP),
                }
            });
        });
    }

    /// A rule that drops what [`Dropped::LedHere`] has led to this host.
    pub(super) fn drop_led_here(&mut self, table: &str, chain: &str) {
        self.command(NEW_RULE, CREATE | APPEND, |rule| {
            rule.text(1, table);
            rule.text(2, chain);
            rule.nested(4, |list| {
                list.load_meta(META_MARK);
                list.equals_bytes(&LED_HERE.to_ne_bytes());
                list.verdict(NF_DROP);
            });
        });
    }

    /// A rule that gives a log group a copy of all fragments of IPv6 datagrams but the first: these do not say which port they are
    /// for, and are joined after this hook.
    pub(super) fn later_fragments(&mut self, table: &str, chain: &str, group: u16) {
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

    pub(super) fn flows<'a>(&mut self, table: &str, flows: impl Iterator<Item = &'a Flow>) {
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
    pub(super) fn sets_of_listeners(&mut self, table: &str, chains: &[(&str, u32)], dropped: Dropped) {
        for set in [&LISTENERS4, &LISTENERS6, &PORTS] {
            self.set(table, set);
            for (chain, _) in chains {
                self.rule(table, chain, set, set.fields, dropped);
            }
        }
    }

    /// Fills the sets of listeners.
    pub(super) fn listeners<'a>(&mut self, table: &str, listeners: impl Iterator<Item = &'a Listener>) {
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

    pub(super) fn elements(&mut self, table: &str, set: &Set, keys: &[Vec<u8>]) {
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
    /// What becomes of the packet.
    fn verdict(&mut self, verdict: u32);
    /// Marks a packet, of the protocol that a set is for, and has it sent to this host's loopback address. Its checksums are wrong then.
    fn lead_here(&mut self, set: &Set);
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

    fn verdict(&mut self, verdict: u32) {
        self.expression("immediate", |immediate| {
            immediate.number(1, 0);
            immediate.nested(2, |data| data.nested(2, |code| code.number(1, verdict)));
        });
    }

    fn lead_here(&mut self, set: &Set) {
        /// Where the destination is in a header of IPv4, and of IPv6.
        const DESTINATIONS: [u32; 2] = [16, 24];
        const NETWORK_HEADER: u32 = 1;
        let is_ipv6 = set.protocol == Some(NFPROTO_IPV6);
        let here = match is_ipv6 {
            true => Ipv6Addr::LOCALHOST.octets().to_vec(),
            false => Ipv4Addr::LOCALHOST.octets().to_vec(),
        };
        let load = |list: &mut Self, bytes: &[u8]| {
            list.expression("immediate", |immediate| {
                immediate.number(1, REGISTER);
                immediate.nested(2, |data| data.bytes(1, bytes));
            });
        };
        load(self, &LED_HERE.to_ne_bytes());
        self.expression("meta", |meta| {
            meta.number(2, META_MARK);
            meta.number(3, REGISTER);
        });
        load(self, &here);
        self.expression("payload", |payload| {
            payload.number(2, NETWORK_HEADER);
            payload.number(3, DESTINATIONS[usize::from(is_ipv6)]);
            payload.number(4, here.len() as u32);
            payload.number(5, REGISTER);
        });
    }
}
