//! The side that waits to be called.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, RecvStream, SendStream, ServerConfig, VarInt};
use rustls::sign::CertifiedKey;

use crate::authentication;
use crate::channel::Channel;
use crate::credentials::{Credentials, Hosts};
use crate::crowd::{Crowd, Place};
use crate::enrolment;
use crate::error::{Error, Result};
use crate::identity::{self, Attempt, ServerSide, Way};
use crate::invitation::Invitations;
use crate::link::Link;
use crate::party::Party;
use crate::peers::{Peer, Permission};
use crate::socket;
use crate::token::Role;
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
    credentials: Credentials,
    /// The certificate where a token is proved.
    nameless: Arc<CertifiedKey>,
    /// Where callers may be enrolled.
    invitations: Option<Invitations>,
    profile: Profile,
    timing: Timing,
}

/// What became of a call.
#[derive(Debug)]
pub enum Answered {
    /// Somebody who is known, or knows the token, wants to talk.
    Linked(Link, Channel),
    /// Somebody was invited and is in the list from now on.
    Enrolled(Peer),
}

impl Listener {
    /// Listens on `address`, where port 0 is any free one and `[::]` is for IPv4 as well, unless
    /// net.ipv6.bindv6only says otherwise.
    ///
    /// # Errors
    /// When the socket cannot be had, or outside a tokio runtime.
    pub fn bind(address: SocketAddr, credentials: impl Into<Credentials>, profile: Profile) -> Result<Self> {
        Self::bind_with(address, credentials, profile, Timing::default())
    }

    /// Listens as [`Self::bind`] does, with another idea of how long is too long.
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub fn bind_with(
        address: SocketAddr,
        credentials: impl Into<Credentials>,
        profile: Profile,
        timing: Timing,
    ) -> Result<Self> {
        let credentials = credentials.into();
        let nameless = identity::nameless()?;
        let (crypto, _) =
            identity::server(&ServerSide { hosts: credentials.hosts(), nameless: &nameless, ways: &[Way::Token] })?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config
            .max_incoming(WAITING_CALLS)
            .incoming_buffer_size(WAITING_BYTES.0)
            .incoming_buffer_size_total(WAITING_BYTES.1)
            .transport_config(transport::config(profile, timing, None));
        let endpoint = socket::endpoint(address, profile, Some((config.clone(), credentials.lasting())))?;
        let address = endpoint.local_addr().map_err(|source| Error::Socket {
            operation: "name the socket bound to",
            address,
            source,
        })?;
        let call = Arc::new(Call { config, credentials, nameless, invitations: None, profile, timing });
        Ok(Self { endpoint, address, call, crowd: Arc::default() })
    }

    /// Enrols callers who were invited, too.
    #[must_use]
    pub fn with_invitations(mut self, invitations: Invitations) -> Self {
        let Call { config, credentials, nameless, profile, timing, .. } = &*self.call;
        self.call = Arc::new(Call {
            config: config.clone(),
            credentials: credentials.clone(),
            nameless: nameless.clone(),
            invitations: Some(invitations),
            profile: *profile,
            timing: *timing,
        });
        self
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

    /// Answers as [`Self::answer`] does, where nobody can be enrolled.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub async fn authenticate(self) -> Result<(Link, Channel)> {
        let address = self.remote_address();
        match self.answer().await? {
            Answered::Linked(link, channel) => Ok((link, channel)),
            Answered::Enrolled(_) => {
                Err(Error::Refused { address, reason: "it was enrolled, and is to call again".into() })
            }
        }
    }

    /// Answers: handshake, the caller's proof, ours. Takes [`Timing::authentication`] at most; belongs on a task of its
    /// own, so that one slow caller does not keep the others waiting. The list of trusted hosts is looked at now.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Untrusted`], [`Error::NotTrusted`] or [`Error::Modes`] when the caller does not prove what it
    /// has to, or not in time, and however else it can end.
    pub async fn answer(self) -> Result<Answered> {
        let address = self.remote_address();
        // N.B. the place is kept until the proof has come.
        let Self { incoming, endpoint, call, place: _place } = self;
        let token = call.credentials.current_token();
        let hosts = call.credentials.hosts();
        let invitations = call.invitations.as_ref().filter(|invitations| hosts.is_some() && invitations.any());
        let ways: Vec<Way> =
            [(Way::Host, hosts.is_some()), (Way::Token, token.is_some()), (Way::Enrolment, invitations.is_some())]
                .into_iter()
                .filter_map(|(way, is_open)| is_open.then_some(way))
                .collect();
        let (crypto, seen) = identity::server(&ServerSide { hosts, nameless: &call.nameless, ways: &ways })?;
        let mut config = call.config.clone();
        config.crypto = Arc::new(crypto);
        config.transport_config(transport::config(call.profile, call.timing, socket::route_payload(address)));
        let deadline = tokio::time::Instant::now() + call.timing.authentication;
        let attempt = Attempt {
            hosts,
            seen: &seen,
            role: Role::Server,
            way: if hosts.is_some() { Way::Host } else { Way::Token },
        };
        let lost = |source| attempt.explain(Error::connection(address, "shaking hands", source));
        let connecting = incoming.accept_with(Arc::new(config)).map_err(lost)?;
        let connection: Connection = match tokio::time::timeout_at(deadline, connecting).await {
            Ok(connected) => connected.map_err(lost)?,
            Err(_) => {
                return Err(Error::TimedOut { address, during: "shaking hands" });
            }
        };
        let proven = async {
            match (Way::of(&connection), hosts, token, invitations) {
                (Some(Way::Token), _, Some(token), _) => {
                    Ok(Proven::Link(authentication::as_server(&connection, token).await?, None))
                }
                (Some(Way::Host), Some(hosts), ..) => {
                    let peer = listed(&connection, hosts)?;
                    Ok(Proven::Link(authentication::as_known_server(&connection).await?, Some(peer)))
                }
                (Some(Way::Enrolment), Some(hosts), _, Some(invitations)) => {
                    enrolment::serve(&connection, hosts, invitations).await.map(Proven::Invitation)
                }
                _ => Err(authentication::refuse(&connection, "no common way of proving who one is")),
            }
        };
        let (streams, peer) = match tokio::time::timeout_at(deadline, proven).await {
            Ok(Ok(Proven::Link(streams, peer))) => (streams, peer),
            Ok(Ok(Proven::Invitation(peer))) => return Ok(Answered::Enrolled(peer)),
            Ok(Err(error)) => return Err(attempt.explain(error)),
            Err(_) => {
                return Err(authentication::refuse(&connection, "the client proved nothing in time"));
            }
        };
        connection.set_receive_window(call.profile.proven_window());
        tracing::debug!(%address, "caller authenticated");
        let channel = Channel::new(&connection, address, streams);
        let party = peer.as_ref().map_or(Party::TokenHolders, |peer| Party::Host(peer.fingerprint));
        Ok(Answered::Linked(Link::new(connection, endpoint, party, peer), channel))
    }
}

/// What a caller has proved.
enum Proven {
    Link((SendStream, RecvStream), Option<Peer>),
    Invitation(Peer),
}

/// Gives the entry of a caller; TLS has asked for its certificate, and this is so even should it not have.
fn listed(connection: &Connection, hosts: &Hosts) -> Result<Peer> {
    let find = |fingerprint| hosts.peers.find(fingerprint).ok().flatten();
    identity::peer_fingerprint(connection)
        .and_then(find)
        .filter(|peer| peer.permission.covers(Permission::Receiving))
        .ok_or_else(|| authentication::refuse(connection, "the caller shows no certificate of a trusted host"))
}
