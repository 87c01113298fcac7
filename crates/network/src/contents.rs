//! What is in a network namespace: read from the one that a process leaves, made again in the one that it comes to.
//!
//! Nearly everything is what the kernel says of it over netlink(7), told to another kernel. Interfaces keep their numbers, so
//! the rest may name them as before.

mod filter;
mod links;
mod settings;

use std::net::IpAddr;

use godwit_proto::wire::network_joint::Kind;
use godwit_proto::wire::{NetworkJoint, NetworkNamespace};
use netlink_sys::Socket;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};

use crate::address::{Address, Announcer, interface};
use crate::error::{Error, Result};
use crate::flow::Flow;
use crate::namespace::Namespace;
use crate::tracking::Settled;
use crate::{netlink, routing, tracking};
pub use links::tun_flags;
use links::{Link, Maker};

/// Something that keeps a namespace from being made again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Objection {
    /// What it is about: an interface, the packet filter.
    pub resource: String,
    /// What is wrong with it.
    pub text: String,
    /// What can be done about it.
    pub remedy: String,
}

/// The sockets by which a namespace is asked and told.
#[derive(Debug)]
struct Sockets {
    route: Socket,
    filter: Socket,
}

impl Sockets {
    fn open(namespace: &Namespace) -> Result<Self> {
        namespace
            .inside(|| Ok(Self { route: netlink::open(NETLINK_ROUTE)?, filter: netlink::open(NETLINK_NETFILTER)? }))?
    }
}

/// Reads a namespace, again and again.
#[derive(Debug)]
pub struct Reader {
    sockets: Sockets,
}

impl Reader {
    /// Prepares for reading.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn new(namespace: &Namespace) -> Result<Self> {
        Ok(Self { sockets: Sockets::open(namespace)? })
    }

    /// Lists the connections that the packet filter tracks. It takes milliseconds, however few they are.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn tracked(&self) -> Result<Vec<Vec<u8>>> {
        tracking::read(&self.sockets.filter)
    }

    /// Adds to those that were listed what is tracked of these connections and was not known, or not settled: what comes later counts.
    pub fn add_tracked<'a>(&self, tracked: &mut Vec<Vec<u8>>, flows: impl Iterator<Item = &'a Flow>) {
        if !tracked.is_empty() || tracking::count(&self.sockets.filter) != Some(0) {
            let mut settled = Settled::default();
            tracked.iter().for_each(|content| settled.learn(content));
            tracked.extend(tracking::ask(&self.sockets.filter, &mut settled, flows));
        }
    }

    /// Reads everything but settings and what is tracked.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn read(&self) -> Result<NetworkNamespace> {
        let listed = netlink::list(&self.sockets.route, links::GET, &[0; links::HEADER]);
        let listed = listed.map_err(|source| Error::call("interfaces", "listing them", source))?;
        let mut contents = NetworkNamespace {
            links: listed.into_iter().map(|told| told.content).collect(),
            filter: filter::read(&self.sockets.filter)?,
            ..NetworkNamespace::default()
        };
        routing::read(&self.sockets.route, &mut contents)?;
        Ok(contents)
    }
}

/// Reads everything in a namespace.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn read(namespace: &Namespace) -> Result<NetworkNamespace> {
    let mut contents = Reader::new(namespace)?.read()?;
    contents.settings = namespace.inside(settings::read)?;
    Ok(contents)
}

/// Reads what is said of a namespace, and changes nothing: for [`crate::decoders`].
pub(crate) fn look_through(contents: &NetworkNamespace) -> usize {
    let links = links::read_all(&contents.links);
    let joint = NetworkJoint { kind: Kind::Veth.into(), name: "bridge0".to_owned(), ..NetworkJoint::default() };
    let objections = links::objections(&links, &[joint], &[]).len();
    let routing = [&contents.addresses, &contents.nexthops, &contents.routes, &contents.rules, &contents.neighbours];
    let routing: usize = routing.into_iter().flatten().map(|content| routing::read_as_any(content)).sum();
    let filter: usize = contents.filter.iter().map(|object| filter::read_as_any(&object.content)).sum();
    let tracked: usize = contents.tracked.iter().filter_map(|content| tracking::look_through(content)).sum();
    let settings = contents.settings.iter().filter(|setting| settings::is_one(&setting.path)).count();
    links.len() + objections + routing + filter + tracked + settings
}

/// Names what cannot be made again of the namespace of process `pid`, joined so. `files` are the names of interfaces whose other ends
/// (tun(4)) the process has, once for each.
#[must_use]
pub fn objections(pid: i32, contents: &NetworkNamespace, joints: &[NetworkJoint], files: &[String]) -> Vec<Objection> {
    if joints.iter().any(|joint| joint.kind() == Kind::Namespace) {
        return Vec::new();
    }
    let mut objections = links::objections(&links::read_all(&contents.links), joints, files);
    objections.extend(filter::objections(pid));
    objections
}

/// Names what this host lacks to make a namespace like another one, and to join it so.
#[must_use]
pub fn missing_here(contents: &NetworkNamespace, joints: &[NetworkJoint]) -> Vec<Objection> {
    if joints.iter().any(|joint| joint.kind() == Kind::Namespace) {
        return Vec::new();
    }
    let lacking = joints.iter().filter_map(links::missing_here);
    lacking.chain(links::cannot_be_made_here(&links::read_all(&contents.links))).collect()
}

/// Names interfaces of a namespace, prepared for a process, that have addresses of its and are down: nothing can be sent by them,
/// and their routes are gone.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn down_in_prepared(namespace: &Namespace, contents: &NetworkNamespace) -> Result<Vec<Objection>> {
    let prepared = Reader::new(namespace)?.read()?;
    let wanted = addresses(contents);
    let has_wanted = |link: &Link| {
        let mut there = prepared.addresses.iter().filter_map(|content| routing::address(content));
        there.any(|(ip, _, index)| index == link.index && wanted.contains(&ip))
    };
    let links = links::read_all(&prepared.links);
    Ok(links.iter().filter(|link| link.is_down() && has_wanted(link)).map(links::down).collect())
}

/// All addresses in it.
#[must_use]
pub fn addresses(contents: &NetworkNamespace) -> Vec<IpAddr> {
    contents.addresses.iter().filter_map(|content| routing::address(content)).map(|(ip, ..)| ip).collect()
}

/// Whether interfaces have come, gone or changed between two looks at a namespace.
#[must_use]
pub fn links_differ(before: &NetworkNamespace, now: &NetworkNamespace) -> bool {
    links::differ(&links::read_all(&before.links), &links::read_all(&now.links))
}

/// A namespace with what was made in it.
#[derive(Debug)]
pub struct Furnished {
    namespace: Namespace,
    sockets: Sockets,
    contents: NetworkNamespace,
}

impl Furnished {
    /// Makes a namespace like another one, joined to this host's network so. `prefix` is how the names of interfaces begin
    /// that appear on this host; at most eleven bytes.
    ///
    /// # Errors
    /// Naming what the kernel does not take. Nothing is left of it then.
    pub fn make(
        namespace: Namespace,
        contents: &NetworkNamespace,
        joints: &[NetworkJoint],
        prefix: &str,
    ) -> Result<Self> {
        let sockets = Sockets::open(&namespace)?;
        let (outside, host) = (netlink::open(NETLINK_ROUTE)?, Namespace::current()?);
        let links = links::read_all(&contents.links);
        let maker =
            Maker { namespace: &namespace, inside: &sockets.route, outside: &outside, host: &host, joints, prefix };
        maker.make(&links)?;
        let others = links.iter().filter(|link| !link.is_loopback());
        namespace.inside(|| others.for_each(|link| settings::keep_from_making_addresses(&link.name)))?;
        maker.take_up(&links)?;
        let mut furnished = Self { namespace, sockets, contents: NetworkNamespace::default() };
        // What a new namespace has by itself.
        routing::read(&furnished.sockets.route, &mut furnished.contents)?;
        furnished.follow(contents)?;
        furnished.namespace.inside(|| settings::apply(&contents.settings))?;
        Ok(furnished)
    }

    /// Follows what has changed, interfaces and settings apart.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn follow(&mut self, contents: &NetworkNamespace) -> Result<()> {
        routing::follow(&self.sockets.route, &self.contents, contents)?;
        filter::follow(&self.sockets.filter, &self.contents.filter, &contents.filter)?;
        self.contents = contents.clone();
        Ok(())
    }

    /// Tracks the connections that are tracked in `contents`.
    pub fn track(&self, contents: &NetworkNamespace) {
        tracking::make(&self.sockets.filter, &contents.tracked);
    }

    /// The namespace itself.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Nothing but the namespace.
    #[must_use]
    pub fn into_namespace(self) -> Namespace {
        self.namespace
    }
}

/// Tells everybody on the links that lead out of a namespace which addresses are there. Returns how they can be told again.
///
/// # Errors
/// When nobody can be told.
pub fn announce(namespace: &Namespace) -> Result<Announcement> {
    namespace.inside(|| {
        let sockets = netlink::open(NETLINK_ROUTE)?;
        let listed = netlink::list(&sockets, links::GET, &[0; links::HEADER]);
        let listed = listed.map_err(|source| Error::call("interfaces", "listing them", source))?;
        let links: Vec<Link> = listed.iter().filter_map(|told| Link::read(&told.content)).collect();
        let mut contents = NetworkNamespace::default();
        routing::read(&sockets, &mut contents)?;
        let mut announcement = Announcement { announcer: Announcer::new()?, addresses: Vec::new() };
        for (ip, prefix, index) in contents.addresses.iter().filter_map(|content| routing::address(content)) {
            if let Some(link) = links.iter().find(|link| link.index == index && link.leads_out()) {
                announcement.addresses.push((Address::new(ip, prefix, index), interface(&link.name)?));
            }
        }
        announcement.tell();
        Ok(announcement)
    })?
}

/// Addresses that links are told of.
#[derive(Debug)]
pub struct Announcement {
    announcer: Announcer,
    addresses: Vec<(Address, crate::address::Interface)>,
}

impl Announcement {
    /// Tells them once more. Its socket remembers the namespace.
    pub fn tell(&self) {
        for (address, interface) in &self.addresses {
            if let Err(error) = self.announcer.announce(address, interface) {
                tracing::warn!(%error, "neighbours go on looking for the address where it was");
            }
        }
    }
}

/// Takes up what leads into a namespace that was prepared, and was down so that nobody would meet its addresses twice: ends of
/// veths in the namespace `host`.
///
/// # Errors
/// When one cannot be.
pub fn plug_in_prepared(namespace: &Namespace, host: &Namespace) -> Result<()> {
    let inside = namespace.inside(|| netlink::open(NETLINK_ROUTE))??;
    let outside = host.inside(|| netlink::open(NETLINK_ROUTE))??;
    links::plug_in_prepared(&inside, &outside)
}

/// Takes all interfaces down that lead out of a namespace, for good.
///
/// # Errors
/// When one cannot be.
pub fn take_down(namespace: &Namespace) -> Result<()> {
    let socket = namespace.inside(|| netlink::open(NETLINK_ROUTE))??;
    let listed = netlink::list(&socket, links::GET, &[0; links::HEADER]);
    let listed = listed.map_err(|source| Error::call("interfaces", "listing them", source))?;
    let links = listed.iter().filter_map(|told| Link::read(&told.content));
    links.filter(Link::leads_out).try_for_each(|link| links::take_down(&socket, &link))
}
