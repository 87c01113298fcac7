//! How a connection is tuned, for the two uses there are.

use std::sync::Arc;
use std::time::Duration;

use crate::congestion::Discerning;
use quinn::congestion::CubicConfig;
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

/// UDP payload of the largest packet: 9000, the usual jumbo frame, less the headers of IPv6 and UDP.
pub(crate) const LARGEST_MTU: u16 = 8952;
/// UDP payload to start with: Ethernet's 1500 less the headers of IPv6 and UDP.
const FIRST_MTU: u16 = 1452;
/// UDP payload that QUIC needs of every path: RFC 9000 section 14.
const SMALLEST_MTU: u16 = 1200;
/// UDP payload that is not worth a probe more.
const FINEST_CHANGE: u16 = 20;
/// Bytes in flight before anything is known of the path. quinn's 12000 would be a single jumbo packet and a half.
const INITIAL_WINDOW: u64 = 1 << 20;
/// Packets that may overtake one before it counts as lost: more than are under way.
const OVERTAKEN: u32 = 1 << 16;
/// Round trips after which a packet counts as lost that others have overtaken.
const LATE: f32 = 1.4;
/// Bytes a peer may send before it has proven its token.
const UNPROVEN_WINDOW: u32 = 16 << 10;

/// What a link is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Throughput: large windows and buffers.
    Bulk,
    /// Latency: windows so small that nothing queues for long.
    Faults,
}

impl Profile {
    /// Bytes in one stream's window.
    fn window(self) -> u32 {
        match self {
            Self::Bulk => 8 << 20,
            Self::Faults => 256 << 10,
        }
    }

    /// Bytes of the socket's buffers. A window's worth may arrive at once, so no smaller than that.
    pub(crate) fn socket_buffer(self) -> usize {
        match self {
            Self::Bulk => 8 << 20,
            Self::Faults => 1 << 20,
        }
    }

    /// The connection's window once the peer has proven its token.
    pub(crate) fn proven_window(self) -> VarInt {
        VarInt::from_u32(self.window())
    }
}

/// How long is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Quiet time after which a sign of life is sent.
    pub keep_alive: Duration,
    /// Quiet time after which the link counts as lost.
    pub idle: Duration,
    /// Time a listener gives a peer from its first packet to a verified proof.
    pub authentication: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            keep_alive: Duration::from_secs(1),
            idle: Duration::from_secs(10),
            authentication: Duration::from_secs(5),
        }
    }
}

/// Tunes a connection over a route that carries `route_payload` bytes in a packet, where that is known.
pub(crate) fn config(profile: Profile, timing: Timing, route_payload: Option<u16>) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(profile.window()))
        .receive_window(VarInt::from_u32(UNPROVEN_WINDOW))
        .send_window(2 * u64::from(profile.window()))
        .keep_alive_interval(Some(timing.keep_alive))
        // Longer than QUIC can express is as good as never.
        .max_idle_timeout(IdleTimeout::try_from(timing.idle).ok());

    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW);
    config.congestion_controller_factory(Arc::new(Discerning(Arc::new(congestion))));
    // By time alone: on long ways packets overtake one another, and each that is taken for lost is sent twice.
    config.packet_threshold(OVERTAKEN).time_threshold(LATE);

    let largest = route_payload.unwrap_or(LARGEST_MTU).clamp(SMALLEST_MTU, LARGEST_MTU);
    let first = FIRST_MTU.min(largest);
    let mut discovery = MtuDiscoveryConfig::default();
    // Halving the range to the last 20 bytes takes nine round trips, each as long as what is in flight makes it. In
    // quarters it takes three, and the end of the range is tried whatever the halves say.
    discovery.upper_bound(largest).minimum_change(((largest - first) / 4).max(FINEST_CHANGE));
    // A path that got smaller is noticed by loss; whether it has grown again is worth a probe now and then.
    discovery.black_hole_cooldown(Duration::from_secs(5)).interval(Duration::from_secs(60));
    config.initial_mtu(first).min_mtu(SMALLEST_MTU).mtu_discovery_config(Some(discovery));
    Arc::new(config)
}
