//! Interfaces (rtnetlink(7), `RTM_NEWLINK`): those inside are made again, those that lead out are joined to the network here.
//!
//! An interface keeps its number, so that whatever names it by number needs no change.

mod maker;
mod tun;

pub(super) use maker::{Maker, plug_in_prepared, take_down};
use tun::Tun;
pub(super) use tun::cannot_be_made_here;
pub use tun::tun_flags;

use godwit_kernel::Errno;
use godwit_proto::wire::NetworkJoint;
use godwit_proto::wire::network_joint::Kind;
use nix::net::if_::if_nametoindex;

use super::Objection;
use crate::attribute::{find, without};
use crate::error::{Error, Result};
use crate::netlink;

pub(super) const GET: u16 = 18;
/// Bytes of `struct ifinfomsg`, the header of messages about interfaces.
pub(super) const HEADER: usize = 16;
/// Number of the loopback interface in every namespace.
const LOOPBACK: u32 = 1;

/// `IFLA_*`.
mod attribute {
    pub(super) const ADDRESS: u16 = 1;
    pub(super) const NAME: u16 = 3;
    pub(super) const MTU: u16 = 4;
    pub(super) const LOWER: u16 = 5;
    pub(super) const MASTER: u16 = 10;
    pub(super) const QUEUE_LENGTH: u16 = 13;
    pub(super) const INFO: u16 = 18;
    pub(super) const GROUP: u16 = 27;
    pub(super) const NAMESPACE_FD: u16 = 28;
    pub(super) const LOWER_NAMESPACE: u16 = 37;
    pub(super) const INFO_KIND: u16 = 1;
    pub(super) const INFO_DATA: u16 = 2;
    pub(super) const VETH_PEER: u16 = 1;
    pub(super) const MACVLAN_MODE: u16 = 1;
}

const BRIDGE: &str = "bridge";
/// Kinds that are made again as they were, from what the kernel says of them.
const COPIED: &[&str] = &[BRIDGE, "dummy", "ifb", "vlan", "macvlan", "vrf"];
/// What the kernel says of a bridge and does not take: how it fares, with timers that never stand still (`IFLA_BR_ROOT_ID` to
/// `IFLA_BR_FDB_FLUSH`, `IFLA_BR_MCAST_QUERIER_STATE`, `IFLA_BR_FDB_N_LEARNED`).
const BRIDGE_STATE: &[u16] = &[10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 40, 47, 48];
const UP: u32 = 1;
/// Flags that somebody has set: up, no ARP, promiscuous, all multicast, multicast.
const CHOSEN_FLAGS: u32 = UP | 0x80 | 0x100 | 0x200 | 0x1000;

/// An interface as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    flags: u32,
    pub(super) name: String,
    kind: Option<String>,
    data: Vec<u8>,
    mtu: u32,
    queue_length: Option<u32>,
    group: u32,
    hardware: Vec<u8>,
    master: Option<u32>,
    lower: Option<u32>,
    /// Whether what it sits on, or its other end, is in another namespace.
    lower_is_elsewhere: bool,
}

impl Link {
    /// Reads a message; `None` for what is none.
    pub(super) fn read(content: &[u8]) -> Option<Self> {
        let (header, attributes) = content.split_at_checked(HEADER)?;
        let word = |at: usize| Some(u32::from_ne_bytes(header.get(at..at + 4)?.try_into().ok()?));
        let number = |kind| find(attributes, kind).and_then(|attribute| attribute.native());
        let info = find(attributes, attribute::INFO).map(|info| info.value).unwrap_or_default();
        let kind = find(info, attribute::INFO_KIND).map(|kind| kind.text());
        let state = if kind.as_deref() == Some(BRIDGE) { BRIDGE_STATE } else { &[] };
        let data = find(info, attribute::INFO_DATA).map(|data| without(data.value, state)).unwrap_or_default();
        Some(Self {
            index: word(4).filter(|&index| index > 0 && i32::try_from(index).is_ok())?,
            flags: word(8)?,
            name: find(attributes, attribute::NAME)?.text(),
            kind,
            data,
            mtu: number(attribute::MTU)?,
            queue_length: number(attribute::QUEUE_LENGTH),
            group: number(attribute::GROUP).unwrap_or(0),
            hardware: find(attributes, attribute::ADDRESS).map(|address| address.value.to_vec()).unwrap_or_default(),
            master: number(attribute::MASTER),
            lower: number(attribute::LOWER),
            lower_is_elsewhere: find(attributes, attribute::LOWER_NAMESPACE).is_some(),
        })
    }

    pub(super) fn is_loopback(&self) -> bool {
        self.index == LOOPBACK
    }

    pub(super) fn is_down(&self) -> bool {
        self.flags & UP == 0
    }

    fn is(&self, kind: &str) -> bool {
        self.kind.as_deref() == Some(kind)
    }

    /// Whether packets leave the namespace by it.
    pub(super) fn leads_out(&self) -> bool {
        !self.is_loopback() && (self.kind.is_none() || self.lower_is_elsewhere)
    }

    /// The number of its other end, where it is a veth with both ends inside.
    fn other_end(&self) -> Option<u32> {
        self.lower.filter(|_| self.is("veth") && !self.lower_is_elsewhere)
    }

    fn can_be_made(&self) -> bool {
        self.is_loopback()
            || self.is("veth")
            || Tun::of(self).is_some()
            || self.kind.as_deref().is_some_and(|kind| COPIED.contains(&kind))
    }
}

pub(super) fn read_all(contents: &[Vec<u8>]) -> Vec<Link> {
    contents.iter().filter_map(|content| Link::read(content)).collect()
}

/// Whether any has come, gone or been changed: not whether it has work to do.
pub(super) fn differ(before: &[Link], now: &[Link]) -> bool {
    let same = |one: &Link, other: &Link| {
        let chosen = |link: &Link| Link { flags: link.flags & CHOSEN_FLAGS, ..link.clone() };
        chosen(one) == chosen(other)
    };
    before.len() != now.len() || !before.iter().zip(now).all(|(one, other)| same(one, other))
}

/// Which joint is for an interface that leads out, if one is.
pub(super) fn joint_for<'a>(link: &Link, joints: &'a [NetworkJoint]) -> Option<&'a NetworkJoint> {
    joints.iter().find(|joint| joint.interface == link.name || joint.interface.is_empty())
}

/// Names interfaces that cannot be made again, that lead nowhere, and joints without an interface. `files` are the names of interfaces
/// whose other ends the process has, once for each.
pub(super) fn objections(links: &[Link], joints: &[NetworkJoint], files: &[String]) -> Vec<Objection> {
    let mut objections = Vec::new();
    let leading_out: Vec<&Link> = links.iter().filter(|link| link.leads_out()).collect();
    for link in links {
        let mut object = |text: String, remedy: &str| {
            objections.push(Objection {
                resource: format!("interface {}", link.name),
                text,
                remedy: remedy.to_owned(),
            });
        };
        if link.leads_out() {
            if joint_for(link, joints).is_none() {
                object(
                    "it leads out of the process's network namespace, and nobody said where to at the destination"
                        .to_owned(),
                    "give --net veth=BRIDGE, --net macvlan=DEV or --net ns:NAME",
                );
            }
        } else if !link.can_be_made() {
            let kind = link.kind.as_deref().unwrap_or_default();
            object(
                format!("interfaces of kind {kind} cannot be made again"),
                "give --net ns:NAME to use a namespace prepared there",
            );
        } else if let Some(text) =
            Tun::of(link).and_then(|tun| tun.objection(files.iter().filter(|name| **name == link.name).count()))
        {
            object(text, "end that program, or give --net ns:NAME to use a namespace prepared there");
        }
    }
    for joint in joints {
        let meant =
            leading_out.iter().filter(|link| joint.interface.is_empty() || joint.interface == link.name).count();
        let (text, remedy) = match (meant, joint.interface.is_empty()) {
            (1, _) => continue,
            (0, true) => ("no interface leads out of the process's network namespace".to_owned(), "leave --net out"),
            (0, false) => (
                format!("no interface {} leads out of the process's network namespace", joint.interface),
                "name one that does, or leave its name out",
            ),
            (_, _) => (
                format!("{meant} interfaces lead out of the process's network namespace"),
                "say for each: --net INTERFACE:veth=BRIDGE",
            ),
        };
        objections.push(Objection { resource: format!("--net for {}", joint.name), text, remedy: remedy.to_owned() });
    }
    objections
}

/// Names what the destination lacks for a joint.
pub(super) fn missing_here(joint: &NetworkJoint) -> Option<Objection> {
    let name = joint.name.as_str();
    let object = |text: String, remedy: &str| {
        Some(Objection { resource: format!("interface {name}"), text, remedy: remedy.to_owned() })
    };
    let Ok(link) = here(name) else {
        return object(format!("the destination has no interface {name}"), "name another one with --net");
    };
    if link.flags & UP == 0 {
        return object(format!("the destination's interface {name} is down"), "take it up there");
    }
    if joint.kind() == Kind::Macvlan && link.master.is_some() {
        return object(format!("the destination's interface {name} is a port of another one"), "name that one");
    }
    if joint.kind() == Kind::Veth && !link.is(BRIDGE) {
        return object(
            format!("the destination's interface {name} is no bridge"),
            "give --net macvlan=DEV for an interface that is none",
        );
    }
    None
}

/// Names an interface of a prepared namespace that is down.
pub(super) fn down(link: &Link) -> Objection {
    Objection {
        resource: format!("interface {}", link.name),
        text: "it is down in the namespace that was prepared".to_owned(),
        remedy: "take it up there, with its routes: its other end, outside, is what must be down until then".to_owned(),
    }
}

/// Looks up an interface of the calling thread's namespace.
fn here(name: &str) -> Result<Link> {
    let failed = |source| Error::call(format!("interface {name}"), "looking it up", source);
    let index = if_nametoindex(name).map_err(failed)?;
    let socket = netlink::open(netlink_sys::protocols::NETLINK_ROUTE)?;
    let all = netlink::list(&socket, GET, &[0; HEADER]).map_err(failed)?;
    let found = all.iter().filter_map(|told| Link::read(&told.content)).find(|link| link.index == index);
    found.ok_or_else(|| failed(Errno::ENODEV))
}

fn header(index: u32, flags: u32, change: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    for word in [index, flags, change] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

fn failed(link: &Link, what: &'static str) -> impl FnOnce(Errno) -> Error {
    move |source| Error::call(format!("interface {}", link.name), what, source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attribute::Attributes;

    fn link(name: &str, index: u32, kind: Option<&str>, elsewhere: bool) -> Link {
        let mut message = Attributes(header(index, UP, 0));
        message.text(attribute::NAME, name);
        message.native(attribute::MTU, 1500);
        if elsewhere {
            message.native(attribute::LOWER_NAMESPACE, 0);
        }
        if let Some(kind) = kind {
            message.nested(attribute::INFO, |info| info.text(attribute::INFO_KIND, kind));
        }
        Link::read(&message.0).unwrap()
    }

    fn joint(interface: &str) -> NetworkJoint {
        NetworkJoint { kind: Kind::Veth.into(), name: "br0".into(), interface: interface.into() }
    }

    #[test]
    fn what_leads_out_needs_a_joint_and_the_rest_none() {
        let (lo, eth0) = (link("lo", 1, None, false), link("eth0", 2, Some("veth"), true));
        let (bridge, odd) = (link("br1", 3, Some("bridge"), false), link("odd", 4, Some("hsr"), false));
        let count = |links: &[Link], joints: &[NetworkJoint]| objections(links, joints, &[]).len();
        assert_eq!(count(&[lo.clone(), bridge.clone()], &[]), 0);
        assert_eq!(count(&[lo.clone(), eth0.clone()], &[joint("")]), 0);
        assert_eq!(count(&[lo.clone(), eth0.clone()], &[joint("eth0")]), 0);
        assert_eq!(count(&[lo.clone(), eth0.clone()], &[]), 1);
        assert_eq!(count(&[lo.clone(), odd], &[]), 1);
        assert_eq!(count(std::slice::from_ref(&lo), &[joint("")]), 1);
        assert_eq!(count(&[lo.clone(), eth0.clone()], &[joint("eth1")]), 2);
        assert_eq!(count(&[lo, eth0, link("eth1", 5, Some("veth"), true)], &[joint("")]), 1);
    }

    #[test]
    fn a_bridge_whose_timers_run_has_not_changed() {
        const GROUP_FORWARD_MASK: u16 = 9;
        const COLLECT_GARBAGE_TIMER: u16 = 19;
        let bridge = |flags, timer, mask| {
            let mut message = Attributes(header(3, flags, 0));
            message.text(attribute::NAME, "br1");
            message.native(attribute::MTU, 1500);
            message.nested(attribute::INFO, |info| {
                info.text(attribute::INFO_KIND, BRIDGE);
                info.nested(attribute::INFO_DATA, |data| {
                    data.native(COLLECT_GARBAGE_TIMER, timer);
                    data.native(GROUP_FORWARD_MASK, mask);
                });
            });
            vec![Link::read(&message.0).unwrap()]
        };
        const RUNNING: u32 = 0x40;
        let before = bridge(UP, 100, 0);
        assert!(!differ(&before, &bridge(UP | RUNNING, 200, 0)));
        assert!(differ(&before, &bridge(UP, 100, 1)));
        assert!(differ(&before, &bridge(0, 100, 0)));
        assert!(differ(&before, &[]));
    }

    #[test]
    fn a_tun_interface_needs_its_file_to_come_along() {
        let tun = |persistent: u8, flags| {
            let mut message = Attributes(header(4, flags, 0));
            message.text(attribute::NAME, "tun0");
            message.native(attribute::MTU, 1500);
            message.nested(attribute::INFO, |info| {
                info.text(attribute::INFO_KIND, "tun");
                info.nested(attribute::INFO_DATA, |data| {
                    // Its type and whether it is persistent.
                    data.bytes(3, &[1]);
                    data.bytes(6, &[persistent]);
                });
            });
            Link::read(&message.0).unwrap()
        };
        const LOWER_UP: u32 = 0x1_0000;
        let count = |link: Link, files: &[&str]| {
            let files: Vec<String> = files.iter().map(|&name| name.to_owned()).collect();
            objections(&[link], &[], &files).len()
        };
        assert_eq!(count(tun(0, UP | LOWER_UP), &["tun0"]), 0);
        assert_eq!(count(tun(0, UP | LOWER_UP), &["tun1"]), 1);
        assert_eq!(count(tun(1, UP), &[]), 0);
        assert_eq!(count(tun(1, UP | LOWER_UP), &[]), 1);
    }

    #[test]
    fn nonsense_is_no_interface() {
        assert_eq!(Link::read(&[]), None);
        assert_eq!(Link::read(&[0; 64]), None);
    }
}
