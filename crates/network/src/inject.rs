//! Having packets arrive by the interface that they would have come by, so that the packet filter takes them for what they are: somebody
//! whom it turns away is turned away.
//!
//! The kernel takes a frame for one that an interface has received when a program of bpf(2) is tried on it ([`bpf`]). No interface is made
//! for that, nor changed.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use godwit_kernel::{Errno, bpf};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::address::{hardware, interface_towards};
use crate::error::{Error, Result};
use crate::{fragments, netlink, packet};

/// Longest packet: a frame has to fit a page, with what the kernel adds. Longer datagrams come in fragments.
pub(crate) const LONGEST: usize = 3 << 10;
/// Whom frames are from: nobody, but no address of a group.
const NOBODY: [u8; 6] = *b"\x02gdwit";

/// Has packets arrive.
#[derive(Debug)]
pub(crate) struct Injector {
    program: OwnedFd,
    socket: Mutex<Socket>,
    /// By which interfaces packets come: from one address to another.
    towards: Mutex<HashMap<(IpAddr, IpAddr), Option<u32>>>,
    /// Addresses of interfaces.
    hardware: Mutex<HashMap<u32, [u8; 6]>>,
}

impl Injector {
    /// # Errors
    /// Where the kernel, or its owner, does not let us.
    pub(crate) fn prepare() -> Result<Self> {
        let program =
            bpf::load_passing().map_err(|source| Error::call("packets", "loading a program (bpf)", source))?;
        let socket = Mutex::new(netlink::open(NETLINK_ROUTE)?);
        Ok(Self { program, socket, towards: Mutex::default(), hardware: Mutex::default() })
    }

    /// The interface by which packets of `remote` to `local` come: that by which answers go. `None` when that is not known, or it is this
    /// host itself.
    pub(crate) fn way(&self, local: IpAddr, remote: IpAddr) -> Option<u32> {
        match lock(&self.towards).entry((local, remote)) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(place) => {
                let found = interface_towards(&lock(&self.socket), local, remote);
                *place.insert(found.unwrap_or_else(|error| {
                    tracing::debug!(%error, "by which interface packets come");
                    None
                }))
            }
        }
    }

    /// Has a packet to `to` arrive by an interface of the calling thread's network namespace.
    ///
    /// # Errors
    /// `EMSGSIZE` when it is too long and no datagram, `ENODEV` where there is no such interface.
    pub(crate) fn inject(&self, packet: &[u8], to: IpAddr, interface: u32) -> Result<(), Errno> {
        if packet.len() <= LONGEST {
            return self.inject_frame(packet, to, interface);
        }
        let parts = fragments::split(packet, LONGEST).ok_or(Errno::EMSGSIZE)?;
        parts.iter().try_for_each(|part| self.inject_frame(part, to, interface))
    }

    fn inject_frame(&self, packet: &[u8], to: IpAddr, interface: u32) -> Result<(), Errno> {
        const ETHERNET: usize = 14;
        let own = match lock(&self.hardware).entry(interface) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(place) => *place.insert(hardware(&lock(&self.socket), interface)?),
        };
        let (receiver, kind) = match to {
            IpAddr::V4(group) if group.is_multicast() => {
                let [_, high, middle, low] = group.octets();
                ([0x01, 0x00, 0x5e, high & 0x7f, middle, low], libc::ETH_P_IP)
            }
            IpAddr::V6(group) if group.is_multicast() => {
                let [.., a, b, c, d] = group.octets();
                ([0x33, 0x33, a, b, c, d], libc::ETH_P_IPV6)
            }
            IpAddr::V4(to) if to.is_broadcast() => ([0xff; 6], libc::ETH_P_IP),
            IpAddr::V4(_) => (own, libc::ETH_P_IP),
            IpAddr::V6(_) => (own, libc::ETH_P_IPV6),
        };
        let mut frame = Vec::with_capacity(ETHERNET + packet.len());
        frame.extend(receiver);
        frame.extend(NOBODY);
        frame.extend((kind as u16).to_be_bytes());
        frame.extend(packet);
        packet::complete_header(&mut frame[ETHERNET..]);
        bpf::have_arrive(self.program.as_fd(), &frame, interface)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
