//! The side that waits to be called.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, ServerConfig, VarInt};

use crate::authentication;
use crate::channel::Channel;
use crate::crowd::{Crowd, Place};
use crate::error::{Error, Result};
use crate::identity;
use crate::link::Link;
use crate::socket;
use crate::token::Token;
use crate::transport::{self, Profile, Timing};

/// Calls that wait to be accepted; more are turned away.
const WAITING_CALLS: usize = 64;
/// Bytes kept of the packets of one waiting call, and of all.
const WAITING_BYTES: (u64, u64) = (64 << 10, 1 << 20);

/// A socket that waits for calls. Dropping it ends that; links that came of it live on.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    address: SocketAddr,
    call: Arc<Call>,
    crowd: Arc<Crowd>,
}

/// What accepting a call takes.
#[derive(Debug)]
struct Call {
    config: ServerConfig,
    token: Token,
    profile: Profile,
    timing: Timing,
}

impl Listener {
    /// Listens on `address`, where port 0 is any free one and `[::]` is for IPv4 as well, unless
    /// net.ipv6.bindv6only says otherwise.
    ///
    /// # Errors
    /// When the socket cannot be had, or outside a tokio runtime.
    pub fn bind(address: SocketAddr, token: &Token, profile: Profile) -> Result<Self> {
        Self::bind_with(address, token, profile, Timing::default())
    }

    /// Listens as [`Self::bind`] does, with another idea of how long is too long.
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub fn bind_with(address: SocketAddr, token: &Token, profile: Profile, timing: Timing) -> Result<Self> {
        let mut config = ServerConfig::with_crypto(Arc::new(identity::server()?));
        config
            .max_incoming(WAITING_CALLS)
            .incoming_buffer_size(WAITING_BYTES.0)
            .incoming_buffer_size_total(WAITING_BYTES.1)
            .transport_config(transport::config(profile, timing, None));
        let endpoint = socket::endpoint(address, profile, Some(config.clone()))?;
        let address = endpoint.local_addr().map_err(|source| Error::Socket {
            operation: "name the socket bound to",
            address,
            source,
        })?;
        let call = Arc::new(Call { config, token: token.clone(), profile, timing });
        Ok(Self { endpoint, address, call, crowd: Arc::default() })
    }

    /// Gives the address that is listened on, with its port.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the next call; `None` when the listener has been closed. Where too many who have proven nothing are being
    /// answered already, callers are turned away.
    pub async fn accept(&self) -> Option<Incoming> {
        loop {
            let incoming = self.endpoint.accept().await?;
            match self.crowd.admit(socket::canonical(incoming.remote_address()).ip()) {
                Some(place) => {
                    let (endpoint, call) = (self.endpoint.clone(), self.call.clone());
                    return Some(Incoming { incoming, endpoint, call, place });
                }
                None => incoming.refuse(),
            }
        }
    }

    /// Closes every link that came of this listener and waits, for at most `limit`, until the peers are told.
    pub async fn close(&self, code: u32, reason: &str, limit: Duration) {
        self.endpoint.close(VarInt::from_u32(code), reason.as_bytes());
        // Not in time: the peers will find out by their idle timeouts.
        let _ = tokio::time::timeout(limit, self.endpoint.wait_idle()).await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Links keep the socket; without this it would go on taking calls that nobody answers.
        self.endpoint.set_server_config(None);
    }
}

/// A call: nothing has been answered yet and nobody is known to be there. Dropping it turns the caller away.
#[derive(Debug)]
pub struct Incoming {
    incoming: quinn::Incoming,
    endpoint: Endpoint,
    call: Arc<Call>,
    place: Place,
}

impl Incoming {
    /// Gives the address the call seems to come from.
    pub fn remote_address(&self) -> SocketAddr {
        socket::canonical(self.incoming.remote_address())
    }

    /// Answers: handshake, the caller's proof, ours. Takes [`Timing::authentication`] at most; belongs on a task of its
    /// own, so that one slow caller does not keep the others waiting.
    ///
    /// # Errors
    /// [`Error::Refused`] when the caller does not prove the token, or not in time, and however else it can end.
    pub async fn authenticate(self) -> Result<(Link, Channel)> {
        let address = self.remote_address();
        // N.B. the place is kept until the proof has come.
        let Self { incoming, endpoint, call, place: _place } = self;
        let mut config = call.config.clone();
        config.transport_config(transport::config(call.profile, call.timing, socket::route_payload(address)));
        let deadline = tokio::time::Instant::now() + call.timing.authentication;
        let lost = |source| Error::connection(address, "shaking hands", source);
        let connecting = incoming.accept_with(Arc::new(config)).map_err(lost)?;
        let connection: Connection = match tokio::time::timeout_at(deadline, connecting).await {
            Ok(connected) => connected.map_err(lost)?,
            Err(_) => {
                return Err(Error::TimedOut { address, during: "shaking hands" });
            }
        };
        let proven = authentication::as_server(&connection, &call.token);
        let streams = match tokio::time::timeout_at(deadline, proven).await {
            Ok(streams) => streams?,
            Err(_) => {
                return Err(authentication::refuse(&connection, "the client proved no token in time"));
            }
        };
        connection.set_receive_window(call.profile.proven_window());
        tracing::debug!(%address, "caller authenticated");
        let channel = Channel::new(&connection, address, streams);
        Ok((Link::new(connection, endpoint), channel))
    }
}
