//! The side that calls.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{ClientConfig, ConnectError, Endpoint};

use crate::authentication;
use crate::channel::Channel;
use crate::error::{Error, Result};
use crate::identity;
use crate::link::Link;
use crate::socket;
use crate::token::Token;
use crate::transport::{self, Profile, Timing};

/// Time in which a server without the token is still told so.
const PARTING: Duration = Duration::from_millis(200);

/// Calls `address` and proves the token, within `timeout`.
///
/// # Errors
/// [`Error::Refused`] when either side does not hold the other's token, [`Error::TimedOut`] when nobody answers, and
/// however else it can end.
pub async fn connect(
    address: SocketAddr,
    token: &Token,
    profile: Profile,
    timeout: Duration,
) -> Result<(Link, Channel)> {
    Connector::new(token, profile).connect(address, timeout).await
}

/// What calls have in common.
#[derive(Debug, Clone)]
pub struct Connector {
    token: Token,
    profile: Profile,
    timing: Timing,
}

impl Connector {
    /// Calls for one use with one token.
    pub fn new(token: &Token, profile: Profile) -> Self {
        Self { token: token.clone(), profile, timing: Timing::default() }
    }

    /// Sets how long is too long on the links; [`Timing::authentication`] is the listener's.
    #[must_use]
    pub fn with_timing(mut self, timing: Timing) -> Self {
        self.timing = timing;
        self
    }

    /// Calls `address`, from a socket of its own, and proves the token, within `timeout`.
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
            Err(_) => Err(Error::TimedOut { address, during: "connecting" }),
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
        let mut config = ClientConfig::new(Arc::new(identity::client()?));
        config.transport_config(transport::config(self.profile, self.timing, socket::route_payload(address)));
        let connection = endpoint
            .connect_with(config, address, identity::SERVER_NAME)
            .map_err(|source| unusable(address, source))?
            .await
            .map_err(|source| Error::connection(address, "connecting", source))?;
        let streams = authentication::as_client(&connection, &self.token).await?;
        connection.set_receive_window(self.profile.proven_window());
        tracing::debug!(%address, "connected and authenticated");
        let channel = Channel::new(&connection, address, streams);
        Ok((Link::new(connection, endpoint.clone()), channel))
    }
}

/// Translates what quinn finds wrong before anything is sent.
fn unusable(address: SocketAddr, source: ConnectError) -> Error {
    let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, source);
    Error::Socket { operation: "call", address, source }
}
