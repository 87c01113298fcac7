//! UDP sockets as quinn needs them: large buffers, segmentation within what a datagram can hold, and what the
//! routing table knows of the path's size.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use nix::sys::socket::{setsockopt, sockopt};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, ServerConfig, TokioRuntime, UdpPoller};

use crate::error::{Error, Result};
use crate::lasting::Lasting;
use crate::transport::{LARGEST_MTU, Profile};

/// The most bytes one send of UDP can take, segmented or not: udp(7), IPv4's limit.
const LARGEST_SEND: usize = 65_507;
/// IPv4 and UDP headers, in bytes.
const HEADERS_V4: u16 = 28;
/// IPv6 and UDP headers, in bytes.
const HEADERS_V6: u16 = 48;

/// Opens an endpoint on `address`, for serving when there is a `server` configuration, as the one before it on the same port.
pub(crate) fn endpoint(
    address: SocketAddr,
    profile: Profile,
    server: Option<(ServerConfig, Lasting)>,
) -> Result<Endpoint> {
    // quinn would panic without a runtime.
    tokio::runtime::Handle::try_current().map_err(|_| Error::NoRuntime)?;
    let failed = |operation| move |source| Error::Socket { operation, address, source };
    let socket = UdpSocket::bind(address).map_err(failed("bind"))?;
    enlarge_buffers(&socket, profile.socket_buffer());
    let port = socket.local_addr().map_err(failed("name the socket bound to"))?.port();
    let runtime: Arc<dyn Runtime> = Arc::new(TokioRuntime);
    let socket = runtime.wrap_udp_socket(socket).map_err(failed("set up UDP on"))?;
    let (server, mut config) = match server {
        Some((server, lasting)) => (Some(server), lasting.endpoint(port)),
        None => (None, EndpointConfig::default()),
    };
    // Larger packets than this the peer is told not to send; constant, and within what quinn takes.
    config.max_udp_payload_size(LARGEST_MTU).map_err(|source| Error::tls("configure QUIC", source))?;
    Endpoint::new_with_abstract_socket(config, server, Arc::new(Segmented::new(socket)), runtime)
        .map_err(failed("open an endpoint on"))
}

/// The address to call `peer` from: any of this host's, of the same family.
pub(crate) fn unspecified_for(peer: SocketAddr) -> SocketAddr {
    match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// Asks for `bytes` each way, past net.core.rmem_max where CAP_NET_ADMIN allows: socket(7).
///
/// The default of 208 KiB overflows even on loopback. A smaller buffer than asked for costs packets, not
/// correctness, so no failure here is one.
fn enlarge_buffers(socket: &UdpSocket, bytes: usize) {
    let receive =
        setsockopt(socket, sockopt::RcvBufForce, &bytes).or_else(|_| setsockopt(socket, sockopt::RcvBuf, &bytes));
    let send =
        setsockopt(socket, sockopt::SndBufForce, &bytes).or_else(|_| setsockopt(socket, sockopt::SndBuf, &bytes));
    if let Err(errno) = receive.and(send) {
        tracing::debug!(%errno, bytes, "socket buffers stay small");
    }
}

/// Tells how large a UDP payload the way to `peer` may carry, as far as this host knows: IP_MTU of ip(7).
///
/// That is the first interface's size, or less where the kernel has learnt so; larger is not worth probing.
pub(crate) fn route_payload(peer: SocketAddr) -> Option<u16> {
    let peer = canonical(peer);
    let socket = UdpSocket::bind(unspecified_for(peer)).ok()?;
    socket.connect(peer).ok()?;
    let mtu = nix::sys::socket::getsockopt(&socket, sockopt::IpMtu).ok()?;
    let headers = if peer.is_ipv4() { HEADERS_V4 } else { HEADERS_V6 };
    Some(u16::try_from(mtu).unwrap_or(u16::MAX).saturating_sub(headers))
}

/// Turns an IPv4 address that a dual-stack socket shows as IPv6 back into one.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => (ip, address.port()).into(),
        IpAddr::V6(_) => address,
    }
}

/// A socket that never hands the kernel more than one datagram can hold.
///
/// quinn puts up to ten packets into one segmented send. Of jumbo packets that is more than 65507 bytes: the kernel
/// says EMSGSIZE, the packets are silently gone, and path discovery falls back to the smallest size.
struct Segmented {
    inner: Arc<dyn AsyncUdpSocket>,
    /// Bytes of the largest packet sent so far.
    largest: AtomicUsize,
}

impl Segmented {
    fn new(inner: Arc<dyn AsyncUdpSocket>) -> Self {
        Self { inner, largest: AtomicUsize::new(1) }
    }
}

impl fmt::Debug for Segmented {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segmented").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Segmented {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        if segment > self.largest.load(Ordering::Relaxed) {
            self.largest.fetch_max(segment, Ordering::Relaxed);
        }
        if transmit.contents.len() <= LARGEST_SEND {
            return self.inner.try_send(transmit);
        }
        // Only the first send after the packets grew. Should the second half block, both are sent again: packets
        // that come twice are dropped by the peer.
        let fitting = (LARGEST_SEND / segment).max(1) * segment;
        for contents in transmit.contents.chunks(fitting) {
            let segment_size = transmit.segment_size.filter(|segment| *segment < contents.len());
            let part = Transmit {
                destination: transmit.destination,
                ecn: transmit.ecn,
                contents,
                segment_size,
                src_ip: transmit.src_ip,
            };
            self.inner.try_send(&part)?;
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(context, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let fitting = LARGEST_SEND / self.largest.load(Ordering::Relaxed);
        self.inner.max_transmit_segments().min(fitting).max(1)
    }

    fn max_receive_segments(&self) -> usize {
        // quinn multiplies this with the largest packet for each receive buffer. The kernel coalesces up to 64 KiB,
        // and with eight of the largest packets a buffer holds that; 64 of them would be memory for nothing.
        let holding = 65_536_usize.div_ceil(usize::from(LARGEST_MTU));
        self.inner.max_receive_segments().min(holding)
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_route_is_known_for_both_families() {
        assert!(route_payload("127.0.0.1:9".parse().unwrap()).unwrap() >= LARGEST_MTU);
        assert!(route_payload("[::1]:9".parse().unwrap()).unwrap() >= LARGEST_MTU);
        assert!(route_payload("[::ffff:127.0.0.1]:9".parse().unwrap()).unwrap() >= LARGEST_MTU);
    }

    #[tokio::test]
    async fn segments_shrink_in_number_as_packets_grow() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let target = UdpSocket::bind("127.0.0.1:0").unwrap();
        let segmented = Arc::new(Segmented::new(TokioRuntime.wrap_udp_socket(socket).unwrap()));
        let mut poller = segmented.clone().create_io_poller();
        std::future::poll_fn(|context| poller.as_mut().poll_writable(context)).await.unwrap();
        let contents = vec![7; 10 * usize::from(LARGEST_MTU)];
        let transmit = Transmit {
            destination: target.local_addr().unwrap(),
            ecn: None,
            contents: &contents,
            segment_size: Some(usize::from(LARGEST_MTU)),
            src_ip: None,
        };
        segmented.try_send(&transmit).unwrap();
        assert!(segmented.max_transmit_segments() <= 7);
        target.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        let mut buffer = vec![0; 1 << 16];
        for _ in 0..10 {
            assert_eq!(target.recv(&mut buffer).unwrap(), usize::from(LARGEST_MTU));
        }
    }

    #[test]
    fn without_a_runtime_there_is_an_error() {
        let refused = endpoint("127.0.0.1:0".parse().unwrap(), Profile::Bulk, None);
        assert!(matches!(refused, Err(Error::NoRuntime)));
    }
}
