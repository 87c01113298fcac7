//! A relay: two virtual Ethernet pairs whose near ends lie in a network namespace of nobody, where packet sockets (packet(7)) carry
//! frames from one to the other, along a [`Path`]. For kernels without netem.
//!
//! Frames come with a `virtio_net_hdr` that says what of their checksum and segmentation is still to be done: large ones and
//! unfinished ones go on as they are. The far ends are told to hand over single segments all the same, for on a real path a
//! segment is lost and not sixty kilobytes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_kernel::descriptors::set_socket_option;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, socket};
use nix::sys::time::TimeSpec;

use crate::host::Host;
use crate::path::{Fate, Lane, Path};

const SOL_PACKET: i32 = 263;
const PACKET_VNET_HDR: i32 = 15;
const PACKET_IGNORE_OUTGOING: i32 = 23;
const SO_RCVBUFFORCE: i32 = 33;
const SOL_SOCKET: i32 = 1;
/// Bytes of `struct virtio_net_hdr`.
const HEADER: usize = 10;
/// Longest frame: IP's own limit with room for what is in front of it.
const LONGEST: usize = 70 << 10;
/// Room for frames that a relay on a busy machine has not come to yet.
const BUFFER: i32 = 32 << 20;
/// How soon a lane that nothing moves on sees that it is at its end.
const GLANCE: Duration = Duration::from_millis(100);

/// A path between two interfaces. Dropped, it ends: nothing is carried any more.
#[derive(Debug)]
pub struct Relay {
    /// From the first interface to the second, and back.
    traffic: [Arc<Traffic>; 2],
    end: Arc<AtomicBool>,
}

/// What a relay has done with the frames of one direction.
#[derive(Debug, Default)]
pub struct Traffic {
    carried: AtomicU64,
    late: AtomicU64,
    lost: AtomicU64,
    largest: AtomicU64,
}

impl Traffic {
    /// Frames that were carried, late ones among them.
    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }

    /// Frames that were carried with such a delay that others overtook them.
    pub fn late(&self) -> u64 {
        self.late.load(Ordering::Relaxed)
    }

    /// Frames that were lost.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Bytes of the largest frame.
    pub fn largest(&self) -> u64 {
        self.largest.load(Ordering::Relaxed)
    }

    fn count(&self, fate: Fate, bytes: usize) {
        self.largest.fetch_max(bytes as u64, Ordering::Relaxed);
        match fate {
            Fate::Lost => self.lost.fetch_add(1, Ordering::Relaxed),
            Fate::Late => {
                self.late.fetch_add(1, Ordering::Relaxed);
                self.carried.fetch_add(1, Ordering::Relaxed)
            }
            Fate::Carried => self.carried.fetch_add(1, Ordering::Relaxed),
        };
    }
}

impl Relay {
    /// Makes an interface on each of two hosts (which may be one and the same) and lays a path between them.
    ///
    /// # Errors
    /// ip(8) failed, or a packet socket could not be opened.
    pub(crate) fn lay(one: (&Host, &str), two: (&Host, &str), mtu: u32, path: Path) -> Result<Self> {
        let far = [(one.0.init_pid(), one.1.to_owned()), (two.0.init_pid(), two.1.to_owned())];
        // The namespace is that of a thread, and lives on with the sockets.
        let making = std::thread::spawn(move || -> Result<[OwnedFd; 2]> {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("a network namespace for the relay")?;
            // The relay's own ends say nothing.
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            let [first, second] = far;
            Ok([near_end("near0", &first, mtu)?, near_end("near1", &second, mtu)?])
        });
        let [first, second] =
            making.join().map_err(|_| anyhow::anyhow!("the thread that lays the path panicked"))??;
        for (host, interface) in [one, two] {
            host.run("ip", &["link", "set", interface, "gso_max_segs", "1"])?;
        }
        let (first, second) = (Arc::new(first), Arc::new(second));
        let relay = Self { traffic: [Arc::default(), Arc::default()], end: Arc::default() };
        for (number, (from, to)) in [(&first, &second), (&second, &first)].into_iter().enumerate() {
            let (from, to, traffic) = (Arc::clone(from), Arc::clone(to), Arc::clone(&relay.traffic[number]));
            let end = Arc::clone(&relay.end);
            let lane = Lane::new(Path { seed: path.seed * 2 + number as u64, ..path });
            std::thread::Builder::new().name(format!("relay-{number}")).spawn(move || {
                // An interface that is gone has gone with its host.
                let _ = carry(&from, &to, lane, &traffic, &end);
            })?;
        }
        Ok(relay)
    }

    /// What became of the frames from the first interface to the second.
    pub fn there(&self) -> &Traffic {
        &self.traffic[0]
    }

    /// What became of the frames from the second interface to the first.
    pub fn back(&self) -> &Traffic {
        &self.traffic[1]
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

/// Makes a virtual Ethernet pair with one end here and one on a host, and yields a packet socket on the end that is here.
fn near_end(name: &str, (far_host, far_name): &(u32, String), mtu: u32) -> Result<OwnedFd> {
    let (far_host, mtu) = (far_host.to_string(), mtu.to_string());
    let words = ["link", "add", "name", name, "mtu", &mtu, "type", "veth", "peer", "name", far_name, "mtu", &mtu];
    ip(&[&words[..], &["netns", &far_host]].concat())?;
    // N.B. before the interface is up: a socket that is bound to none yet gets frames of all.
    let kind = (SockType::Raw, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK);
    let socket = socket(AddressFamily::Packet, kind.0, kind.1, SockProtocol::EthAll).context("a packet socket")?;
    for (level, option, value) in [
        (SOL_PACKET, PACKET_VNET_HDR, 1),
        (SOL_PACKET, PACKET_IGNORE_OUTGOING, 1),
        (SOL_SOCKET, SO_RCVBUFFORCE, BUFFER),
    ] {
        set_socket_option(socket.as_fd(), level, option, &value.to_ne_bytes())
            .with_context(|| format!("option {level}:{option} of a packet socket"))?;
    }
    let address = nix::ifaddrs::getifaddrs()?
        .filter(|interface| interface.interface_name == name)
        .find_map(|interface| interface.address?.as_link_addr().copied())
        .with_context(|| format!("no link-layer address of {name}"))?;
    bind(socket.as_raw_fd(), &address).with_context(|| format!("binding a packet socket to {name}"))?;
    ip(&["link", "set", name, "up"])?;
    Ok(socket)
}

fn ip(words: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(words).output().context("ip cannot be started")?;
    ensure!(output.status.success(), "ip {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Carries frames until the end.
fn carry(from: &OwnedFd, to: &OwnedFd, mut lane: Lane<Vec<u8>>, traffic: &Traffic, end: &AtomicBool) -> io::Result<()> {
    let mut buffer = vec![0; LONGEST];
    while !end.load(Ordering::Relaxed) {
        let wait = lane.next().map_or(GLANCE, |next| next.saturating_duration_since(Instant::now()).min(GLANCE));
        let mut polled = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut polled, Some(TimeSpec::from_duration(wait)), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        // N.B. a bounded number: what is due must not wait for the end of a flood.
        for _ in 0..64 {
            match recv(from.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => {
                    let bytes = length.saturating_sub(HEADER);
                    let fate = lane.put(Instant::now(), bytes, buffer[..length].to_vec());
                    traffic.count(fate, bytes);
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR | Errno::ENETDOWN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        while let Some(frame) = lane.take(Instant::now()) {
            match send(to.as_raw_fd(), &frame, MsgFlags::MSG_DONTWAIT) {
                // What does not get through is lost, as on any path.
                Ok(_) | Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::EINTR | Errno::ENETDOWN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}
