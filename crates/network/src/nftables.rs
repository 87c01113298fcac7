//! Messages to the packet filter (nf_tables), for a table that keeps the packets of some connections from the kernel.
//!
//! The table, for connections (that for requests has `tcp flags syn` and sets of listening addresses):
//! ```text
//! table inet godwit-ID {                        # owned by our socket: gone with it, however we end
//!     set flows4 { type ipv4_addr . inet_service . ipv4_addr . inet_service; }   # remote, local
//!     set flows6 { … }
//!     chain arriving { type filter hook prerouting priority raw;
//!         meta nfproto ipv4 ip saddr . tcp sport . ip daddr . tcp dport @flows4 drop … }
//!     chain leaving { type filter hook output priority raw;    # behind a rule that accepts what has our mark
//!         meta nfproto ipv4 ip daddr . tcp dport . ip saddr . tcp sport @flows4 drop … }
//! }
//! ```
//! That for datagrams has one chain, `type filter hook input`, where fragments of IPv4 are joined already, with rules such as
//! `meta l4proto udp meta nfproto ipv4 ip daddr . udp dport @listeners4 log group N drop`.
//! Where bridges call the packet filter by themselves, `arriving` is at `hook input`, and so is a chain like it at `hook forward`
//! ([`Place::AfterRouting`]). The sets are filled before, the chains are added when it is to take effect. Numbers are those of linux/netfilter/nf_tables.h; a message is a header of
//! netlink, one of nfnetlink, and attributes.

mod batch;
mod keys;

use std::net::IpAddr;

use batch::{ACKNOWLEDGE, ARP, ARRIVING, DELETE_TABLE, Dropped, INET, LEAVING, OWNED, REQUEST, ROUTE};
pub(crate) use batch::{Batch, SUBSYSTEM};
use keys::{ADDRESSES4, ADDRESSES6, FLOWS4, FLOWS6, add_address};

use crate::deliver::{MARK, SPOKEN};
use crate::flow::{Datagrams, Flow, Listener};

/// How the names of all our tables begin.
pub(crate) const PREFIX: &str = "godwit-";

const PASSING: &str = "passing";

const HOOK_PREROUTING: u32 = 0;
const HOOK_INPUT: u32 = 1;
const HOOK_FORWARD: u32 = 2;
const HOOK_OUTPUT: u32 = 3;
const HOOK_ARP_IN: u32 = 0;
const HOOK_ARP_OUT: u32 = 1;

/// `NF_IP_PRI_RAW`: before connections are tracked, which shall not hear of these packets.
const PRIORITY_RAW: i32 = -300;

/// Behind all that filters and translates.
const PRIORITY_LATE: i32 = 225;

/// Makes a table that knows `flows` and does nothing yet.
pub(crate) fn connections<'a>(table: &str, flows: impl Iterator<Item = &'a Flow>) -> Batch {
    let mut batch = Batch::begin();
    batch.table(table);
    batch.set(table, &FLOWS4);
    batch.set(table, &FLOWS6);
    batch.flows(table, flows);
    batch
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

/// Has a table made by [`connections`] keep their packets from the kernel, and those of `more`. Where connections are to live
/// (`is_destination`) only those that arrive, and a gate lets in what was in a connection and can only be put back as a packet; elsewhere a gate
/// lets out what the kernel is told to send.
pub(crate) fn hold_connections<'a>(
    table: &str,
    more: impl Iterator<Item = &'a Flow>,
    is_destination: bool,
    place: Place,
) -> Batch {
    let mut batch = Batch::begin();
    batch.flows(table, more);
    for (chain, hook) in place.chains() {
        batch.chain(table, chain, *hook);
    }
    if is_destination {
        batch.gate(INET, table, place.chains().iter().map(|(chain, _)| *chain), MARK);
    } else {
        batch.chain(table, LEAVING, HOOK_OUTPUT);
        batch.gate(INET, table, [LEAVING], MARK);
    }
    for set in [&FLOWS4, &FLOWS6] {
        for (chain, _) in place.chains() {
            batch.rule(table, chain, set, set.fields, Dropped::Tcp);
        }
        if !is_destination {
            batch.rule(table, LEAVING, set, set.reversed, Dropped::Tcp);
        }
    }
    batch
}

/// Makes a table that cuts some connections off from their peers: what arrives of them is dropped, unless it is said in their place, and
/// what leaves goes no farther than to this host. A log group gets a copy of both.
pub(crate) fn stand_in<'a>(table: &str, flows: impl Iterator<Item = &'a Flow>, group: u16) -> Batch {
    let mut batch = connections(table, flows);
    for (chain, hook) in Place::AfterRouting.chains() {
        batch.chain(table, chain, *hook);
        batch.gate(INET, table, [*chain], SPOKEN);
        batch.drop_led_here(table, chain);
    }
    // N.B. late: whoever tracks connections sees what is sent, and takes what we say of it for what it is.
    batch.chain_of(table, LEAVING, ROUTE, HOOK_OUTPUT, PRIORITY_LATE);
    for set in [&FLOWS4, &FLOWS6] {
        for (chain, _) in Place::AfterRouting.chains() {
            batch.rule(table, chain, set, set.fields, Dropped::Heard { group });
        }
        batch.rule(table, LEAVING, set, set.reversed, Dropped::LedHere { group });
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
    /// Requests for new connections, of which the listeners of a log group get a copy, if there is one.
    Requests { group: Option<u16> },
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
        ToListeners::Requests { group } => Dropped::Requests { group },
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
    batch.gate(INET, table, [ARRIVING, LEAVING], MARK);
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
