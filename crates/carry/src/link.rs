//! The connection beside its channel: figures, and the end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, VarInt};

use crate::error::{Error, Result};
use crate::party::Party;
use crate::peers::Peer;
use crate::socket;

/// One authenticated connection. Clones are the same connection, which closes when it is told to, or when the last
/// clone and both halves of the channel are gone.
#[derive(Debug, Clone)]
pub struct Link {
    connection: Connection,
    /// Kept so that the socket outlives whoever made it.
    endpoint: Endpoint,
    other_end: Arc<(Party, Option<Peer>)>,
}

impl Link {
    pub(crate) fn new(connection: Connection, endpoint: Endpoint, party: Party, peer: Option<Peer>) -> Self {
        Self { connection, endpoint, other_end: Arc::new((party, peer)) }
    }

    /// Gives who has proved to be at the other end.
    pub fn party(&self) -> Party {
        self.other_end.0
    }

    /// Gives the host at the other end as this one knows it; `None` where a token was proved, which says no name.
    pub fn peer(&self) -> Option<&Peer> {
        self.other_end.1.as_ref()
    }

    /// Gives the peer's address, an IPv4 one as such even on a socket for both families.
    pub fn remote_address(&self) -> SocketAddr {
        socket::canonical(self.connection.remote_address())
    }

    /// Gives the current estimate of the round-trip time.
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// Counts bytes sent so far, everything inside UDP: frames, repetitions, QUIC's own.
    pub fn bytes_sent(&self) -> u64 {
        self.connection.stats().udp_tx.bytes
    }

    /// Counts bytes received so far, everything inside UDP.
    pub fn bytes_received(&self) -> u64 {
        self.connection.stats().udp_rx.bytes
    }

    /// Frames of streams sent so far: none while there is nothing to be sent, or the peer takes nothing in.
    pub fn stream_frames_sent(&self) -> u64 {
        self.connection.stats().frame_tx.stream
    }

    /// Gives the bytes of UDP payload that a packet on this path has been found to carry.
    pub fn path_payload(&self) -> u16 {
        self.connection.stats().path.current_mtu
    }

    /// Counts packets that were lost and sent again.
    pub fn packets_lost(&self) -> u64 {
        self.connection.stats().path.lost_packets
    }

    /// Limits what may be under way, in each direction, to `window` bytes: for a link that must leave room for another
    /// one beside it. What is under way already is not called back.
    pub fn throttle(&self, window: u32) {
        self.connection.set_send_window(window.into());
        self.connection.set_receive_window(VarInt::from_u32(window));
    }

    /// Closes at once, telling the peer a code (below [`CODE_AUTH_FAILED`](crate::CODE_AUTH_FAILED)) and a text; what is not yet acknowledged may be lost, see
    /// [`Sender::finish`](crate::Sender::finish). The peer hears of it only if the runtime goes on for a moment: see
    /// [`Self::settle`].
    pub fn close(&self, code: u32, reason: &str) {
        self.connection.close(VarInt::from_u32(code), reason.as_bytes());
    }

    /// Waits for the end of the link and says why it ended; [`Error::Closed`] when by this side.
    pub async fn closed(&self) -> Error {
        let source = self.connection.closed().await;
        Error::connection(self.remote_address(), "keeping the link", source)
    }

    /// Says whether and why the link has ended, without waiting.
    ///
    /// # Errors
    /// What [`Self::closed`] would give.
    pub fn check(&self) -> Result<()> {
        match self.connection.close_reason() {
            None => Ok(()),
            Some(source) => Err(Error::connection(self.remote_address(), "keeping the link", source)),
        }
    }

    /// Waits until all connections of the link's socket are over and their peers told, for at most `limit`. To be
    /// called after [`Self::close`] where the program ends next.
    pub async fn settle(&self, limit: Duration) {
        // Not settled in time: the peer will find out by its idle timeout.
        let _ = tokio::time::timeout(limit, self.endpoint.wait_idle()).await;
    }
}
