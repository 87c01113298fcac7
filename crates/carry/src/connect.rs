//! The side that calls.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectError, Connection, Endpoint};

use crate::authentication;
use crate::channel::Channel;
use crate::credentials::Credentials;
use crate::error::{CONNECTING, Error, Result};
use crate::identity::{self, Attempt, Wanted, Way};
use crate::link::Link;
use crate::party::Party;
use crate::peers::Permission;
use crate::socket;
use crate::token::Role;
use crate::transport::{self, Profile, Timing};

/// Time in which a server that is not wanted is still told so.
const PARTING: Duration = Duration::from_millis(200);

/// Calls `address` and proves who this is, within `timeout`.
///
/// # Errors
/// [`Error::Refused`], [`Error::Untrusted`], [`Error::NotTrusted`] or [`Error::Modes`] when either side does not want the other,
/// [`Error::TimedOut`] when nobody answers, and however else it can end.
pub async fn connect(
    address: SocketAddr,
    credentials: impl Into<Credentials>,
    profile: Profile,
    timeout: Duration,
) -> Result<(Link, Channel)> {
    Connector::new(credentials, profile).connect(address, timeout).await
}

/// What calls have in common.
#[derive(Debug, Clone)]
pub struct Connector {
    credentials: Credentials,
    profile: Profile,
    timing: Timing,
}

impl Connector {
    /// Calls for one use, as one host or with one token.
    pub fn new(credentials: impl Into<Credentials>, profile: Profile) -> Self {
        Self { credentials: credentials.into(), profile, timing: Timing::default() }
    }

    /// Sets how long is too long on the links; [`Timing::authentication`] is the listener's.
    #[must_use]
    pub fn with_timing(mut self, timing: Timing) -> Self {
        self.timing = timing;
        self
    }

    /// Calls `address`, from a socket of its own, and proves who this is, within `timeout`.
    ///
    /// # Errors
    /// As [`connect`].
    pub async fn connect(&self, address: SocketAddr, timeout: Duration) -> Result<(Link, Channel)> {
        let address = socket::canonical(address);
        let endpoint = socket::endpoint(socket::unspecified_for(address), self.profile, None)?;
        match tokio::time::timeout(timeout, self.call(address, &endpoint)).await {
            Ok(Ok(connected)) => Ok(connected),
            Ok(Err(error)) => {
                // N.B. the closing words leave only while the runtime runs, and the caller may end it now.
                let _ = tokio::time::timeout(PARTING, endpoint.wait_idle()).await;
                Err(error)
            }
            Err(_) => Err(Error::TimedOut { address, during: CONNECTING }),
        }
    }

    /// Calls each of `addresses` in turn, each within `timeout`, until one answers. A refusal is an answer: the others
    /// are names of the same host.
    ///
    /// # Errors
    /// The last address's, or the refusal.
    pub async fn connect_any(&self, addresses: &[SocketAddr], timeout: Duration) -> Result<(Link, Channel)> {
        let mut last = Error::Resolve { host: "an empty list".into(), source: None };
        for address in addresses {
            match self.connect(*address, timeout).await {
                Err(error @ (Error::TimedOut { .. } | Error::Lost { .. } | Error::Socket { .. })) => last = error,
                answered => return answered,
            }
        }
        Err(last)
    }

    async fn call(&self, address: SocketAddr, endpoint: &Endpoint) -> Result<(Link, Channel)> {
        let token = self.credentials.current_token();
        let hosts = self.credentials.hosts().filter(|_| token.is_none());
        let way = if hosts.is_some() { Way::Host } else { Way::Token };
        let wanted = match hosts {
            Some(hosts) => Wanted::Listed(hosts.peers.clone(), Permission::Sending),
            None => Wanted::Anyone,
        };
        let (config, seen) = identity::client(way, hosts.map(|hosts| hosts.key.certified()), wanted)?;
        let attempt = Attempt { hosts, seen: &seen, role: Role::Client, way };
        let (connection, streams) = async {
            let transport = (self.profile, self.timing);
            let connection = shake_hands_with(endpoint, config, address, transport).await?;
            let streams = match token {
                Some(token) => authentication::as_client(&connection, token).await?,
                None => authentication::as_known_client(&connection).await?,
            };
            Ok((connection, streams))
        }
        .await
        .map_err(|error| attempt.explain(error))?;
        connection.set_receive_window(self.profile.proven_window());
        tracing::debug!(%address, "connected and authenticated");
        let channel = Channel::new(&connection, address, streams);
        let Some(hosts) = hosts else {
            return Ok((Link::new(connection, endpoint.clone(), Party::TokenHolders, None), channel));
        };
        // N.B. the certificate of this very session, which TLS has asked for.
        let fingerprint = identity::peer_fingerprint(&connection)
            .ok_or_else(|| authentication::refuse(&connection, "the server shows no certificate"))?;
        // Who was revoked since is unknown by name.
        let peer = hosts.peers.find(fingerprint).ok().flatten();
        Ok((Link::new(connection, endpoint.clone(), Party::Host(fingerprint), peer), channel))
    }
}

/// Connects as far as TLS goes.
pub(crate) async fn shake_hands(
    endpoint: &Endpoint,
    config: QuicClientConfig,
    address: SocketAddr,
    profile: Profile,
) -> Result<Connection> {
    shake_hands_with(endpoint, config, address, (profile, Timing::default())).await
}

async fn shake_hands_with(
    endpoint: &Endpoint,
    config: QuicClientConfig,
    address: SocketAddr,
    (profile, timing): (Profile, Timing),
) -> Result<Connection> {
    let mut config = ClientConfig::new(Arc::new(config));
    config.transport_config(transport::config(profile, timing, socket::route_payload(address)));
    endpoint
        .connect_with(config, address, identity::SERVER_NAME)
        .map_err(|source| unusable(address, source))?
        .await
        .map_err(|source| Error::connection(address, CONNECTING, source))
}

/// Translates what quinn finds wrong before anything is sent.
fn unusable(address: SocketAddr, source: ConnectError) -> Error {
    let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, source);
    Error::Socket { operation: "call", address, source }
}
