//! Making interfaces: inside a namespace as they were, and joined to the host's network where they lead out.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use godwit_kernel::Errno;
use godwit_proto::wire::NetworkJoint;
use godwit_proto::wire::network_joint::Kind;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_sys::Socket;
use nix::net::if_::if_nametoindex;

use super::{
    BRIDGE, CHOSEN_FLAGS, COPIED, GET, HEADER, LOOPBACK, Link, Tun, UP, attribute, failed, header, here, joint_for,
};
use crate::attribute::{Attribute, Attributes, find, read};
use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::netlink;

const NEW: u16 = 16;
const NEW_NAMESPACE_ID: u16 = 88;

/// The number by which a new namespace knows that of the host.
const HOST: u32 = 1;
/// `MACVLAN_MODE_BRIDGE`.
const MACVLAN_BRIDGE: u32 = 4;
/// `IFF_RUNNING`: it is up, and so is the other end.
const RUNNING: u32 = 0x40;

/// What interfaces are made with.
#[derive(Debug)]
pub(in crate::contents) struct Maker<'a> {
    /// The new namespace, a socket of it, and one of the host's.
    pub(in crate::contents) namespace: &'a Namespace,
    pub(in crate::contents) inside: &'a Socket,
    pub(in crate::contents) outside: &'a Socket,
    pub(in crate::contents) host: &'a Namespace,
    pub(in crate::contents) joints: &'a [NetworkJoint],
    /// How names of interfaces begin that appear on the host.
    pub(in crate::contents) prefix: &'a str,
}

impl Maker<'_> {
    /// Makes all interfaces, down and without an address.
    pub(in crate::contents) fn make(&self, links: &[Link]) -> Result<()> {
        let mut host = Attributes(vec![0; 4]);
        host.native(1, HOST);
        host.native(3, self.host.as_raw_fd() as u32);
        netlink::tell(self.inside, NEW_NAMESPACE_ID, 0, &host.0)
            .map_err(|source| Error::call("network namespace", "naming the host's", source))?;
        // What sits on others comes after them.
        let (below, above): (Vec<&Link>, Vec<&Link>) =
            links.iter().partition(|link| link.lower.is_none() || link.is("veth") || link.leads_out());
        let mut made = vec![LOOPBACK];
        for (number, link) in below.into_iter().chain(above).enumerate() {
            if !made.contains(&link.index) {
                made.extend(self.make_one(link, links, number)?);
            }
        }
        links.iter().filter(|link| link.is(BRIDGE)).try_for_each(|link| self.adjust_bridge(link))?;
        links.iter().try_for_each(|link| self.describe(link))?;
        links.iter().filter(|link| link.master.is_some()).try_for_each(|link| {
            let mut message = Attributes(header(link.index, 0, 0));
            message.native(attribute::MASTER, link.master.unwrap_or(0));
            netlink::tell(self.inside, NEW, 0, &message.0).map_err(failed(link, "making it a port"))
        })
    }

    /// Makes an interface, and its other end if that is inside, too; returns their numbers.
    fn make_one(&self, link: &Link, links: &[Link], number: usize) -> Result<Vec<u32>> {
        if let Some(tun) = Tun::of(link).filter(|_| !link.leads_out()) {
            return self.namespace.inside(|| tun.make(link))?.map(|()| vec![link.index]);
        }
        let mut message = Attributes(header(link.index, 0, 0));
        message.text(attribute::NAME, &link.name);
        let mut made = vec![link.index];
        let joint = if link.leads_out() { joint_for(link, self.joints) } else { None };
        match joint.map(NetworkJoint::kind) {
            Some(Kind::Veth) => {
                let mut peer = Attributes(header(0, 0, 0));
                peer.text(attribute::NAME, &self.outer_name(number));
                peer.native(attribute::NAMESPACE_FD, self.host.as_raw_fd() as u32);
                peer.native(attribute::MTU, link.mtu);
                peer.bytes(attribute::ADDRESS, &outer_address(&link.hardware));
                veth(&mut message, &peer.0);
            }
            Some(Kind::Macvlan) => {
                let on = here(&joint.map(|joint| joint.name.clone()).unwrap_or_default())?;
                let mode = find(&link.data, attribute::MACVLAN_MODE).filter(|_| link.is("macvlan"));
                let mode = mode.and_then(|mode| mode.native()).unwrap_or(MACVLAN_BRIDGE);
                message.native(attribute::LOWER, on.index);
                message.native(attribute::LOWER_NAMESPACE, HOST);
                message.nested(attribute::INFO, |info| {
                    info.text(attribute::INFO_KIND, "macvlan");
                    info.nested(attribute::INFO_DATA, |data| data.native(attribute::MACVLAN_MODE, mode));
                });
            }
            _ => match (link.other_end(), link.kind.as_deref()) {
                (Some(other), _) => {
                    let other = links.iter().find(|link| link.index == other).ok_or(Errno::ENODEV);
                    let other = other.map_err(failed(link, "finding its other end"))?;
                    let mut peer = Attributes(header(other.index, 0, 0));
                    peer.text(attribute::NAME, &other.name);
                    veth(&mut message, &peer.0);
                    made.push(other.index);
                }
                (None, Some(kind)) if COPIED.contains(&kind) => {
                    if let Some(lower) = link.lower {
                        message.native(attribute::LOWER, lower);
                    }
                    message.nested(attribute::INFO, |info| {
                        info.text(attribute::INFO_KIND, kind);
                        if kind != BRIDGE && !link.data.is_empty() {
                            info.bytes(attribute::INFO_DATA, &link.data);
                        }
                    });
                }
                _ => return Err(failed(link, "making it")(Errno::EOPNOTSUPP)),
            },
        }
        netlink::tell(self.inside, NEW, NLM_F_CREATE | NLM_F_EXCL, &message.0).map_err(failed(link, "making it"))?;
        if let Some(joint) = joint.filter(|joint| joint.kind() == Kind::Veth) {
            self.plug_in(&self.outer_name(number), &joint.name)?;
        }
        Ok(made)
    }

    fn outer_name(&self, number: usize) -> String {
        format!("{}{number}", self.prefix)
    }

    /// Makes the host's end of a veth a port of a bridge.
    fn plug_in(&self, end: &str, bridge: &str) -> Result<()> {
        let failed = |name: &str, what| {
            let resource = format!("interface {name}");
            move |source| Error::call(resource, what, source)
        };
        let bridge = if_nametoindex(bridge).map_err(failed(bridge, "looking it up"))?;
        let mut message = Attributes(header(0, UP, UP));
        message.text(attribute::NAME, end);
        message.native(attribute::MASTER, bridge);
        netlink::tell(self.outside, NEW, 0, &message.0).map_err(failed(end, "making it a port of the bridge"))
    }

    /// Changes what is not as a new bridge has it: a kernel refuses what it was not built with, even where that is off.
    fn adjust_bridge(&self, link: &Link) -> Result<()> {
        let listed = netlink::list(self.inside, GET, &[0; HEADER]).map_err(failed(link, "looking at it"))?;
        let fresh = listed.iter().filter_map(|told| Link::read(&told.content)).find(|fresh| fresh.index == link.index);
        let fresh = fresh.ok_or(Errno::ENODEV).map_err(failed(link, "looking at it"))?;
        let has = |wanted: &Attribute<'_>| find(&fresh.data, wanted.kind).is_some_and(|has| has.value == wanted.value);
        read(&link.data).filter(|wanted| !has(wanted)).try_for_each(|wanted| {
            let mut message = Attributes(header(link.index, 0, 0));
            message.nested(attribute::INFO, |info| {
                info.text(attribute::INFO_KIND, BRIDGE);
                info.nested(attribute::INFO_DATA, |data| data.copy(&wanted));
            });
            netlink::tell(self.inside, NEW, 0, &message.0).map_err(failed(link, "making it like the one before"))
        })
    }

    /// Gives an interface what does not depend on others.
    fn describe(&self, link: &Link) -> Result<()> {
        let mut message = Attributes(header(link.index, 0, 0));
        message.native(attribute::MTU, link.mtu);
        message.native(attribute::GROUP, link.group);
        if let Some(length) = link.queue_length {
            message.native(attribute::QUEUE_LENGTH, length);
        }
        if !link.is_loopback() && !link.hardware.is_empty() {
            message.bytes(attribute::ADDRESS, &link.hardware);
        }
        netlink::tell(self.inside, NEW, 0, &message.0).map_err(failed(link, "describing it"))
    }

    /// Takes those up that were.
    pub(in crate::contents) fn take_up(&self, links: &[Link]) -> Result<()> {
        links.iter().try_for_each(|link| {
            let message = header(link.index, link.flags & CHOSEN_FLAGS, CHOSEN_FLAGS);
            netlink::tell(self.inside, NEW, 0, &message).map_err(failed(link, "taking it up"))
        })
    }
}

/// A link-layer address for the host's end of a veth. A bridge takes the lowest of its ports' for itself, and a host must not
/// change its own because a process has come: nothing is higher than this.
fn outer_address(inner: &[u8]) -> [u8; 6] {
    const HIGHEST: u8 = 0xfe;
    let mut address = [HIGHEST; 6];
    if let Some(inner) = inner.get(1..6) {
        address[1..].copy_from_slice(inner);
    }
    address
}

/// Says that an interface is one end of a veth, and what the other one is like.
fn veth(message: &mut Attributes, peer: &[u8]) {
    message.nested(attribute::INFO, |info| {
        info.text(attribute::INFO_KIND, "veth");
        info.nested(attribute::INFO_DATA, |data| {
            // N.B. its value is a message with a header, so it is not marked as one that only nests attributes.
            data.bytes(attribute::VETH_PEER, peer);
        });
    });
}

/// Takes up the ends on this host of veths that lead into a namespace, where they are down. Returns once packets pass.
pub(in crate::contents) fn plug_in_prepared(inside: &Socket, outside: &Socket) -> Result<()> {
    const PATIENCE: Duration = Duration::from_millis(500);
    const GLANCE: Duration = Duration::from_micros(100);
    let all = |socket: &Socket| -> Result<Vec<Link>> {
        let listed = netlink::list(socket, GET, &[0; HEADER]);
        let listed = listed.map_err(|source| Error::call("interfaces", "listing them", source))?;
        Ok(listed.iter().filter_map(|told| Link::read(&told.content)).collect())
    };
    let is_veth = |link: &Link| link.is("veth") && link.lower_is_elsewhere;
    let (here, there) = (all(outside)?, all(inside)?);
    let leads_to = |end: &Link, inner: &Link| end.lower == Some(inner.index) && inner.lower == Some(end.index);
    let ends: Vec<&Link> = here
        .iter()
        .filter(|end| is_veth(end) && end.flags & UP == 0)
        .filter(|end| there.iter().any(|inner| is_veth(inner) && inner.flags & UP != 0 && leads_to(end, inner)))
        .collect();
    for end in &ends {
        netlink::tell(outside, NEW, 0, &header(end.index, UP, UP)).map_err(failed(end, "taking it up"))?;
    }
    let begun = Instant::now();
    let is_ready = |link: &&Link| link.flags & RUNNING != 0 || !ends.iter().any(|end| leads_to(end, link));
    while !ends.is_empty() && begun.elapsed() < PATIENCE && !all(inside)?.iter().all(|link| is_ready(&link)) {
        std::thread::sleep(GLANCE);
    }
    Ok(())
}

/// Takes an interface down for good.
pub(in crate::contents) fn take_down(socket: &Socket, link: &Link) -> Result<()> {
    netlink::tell(socket, NEW, 0, &header(link.index, 0, UP)).map_err(failed(link, "taking it down"))
}
