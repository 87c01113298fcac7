//! TLS: version 1.3 only, and certificates that nobody vouches for.
//!
//! Where hosts know each other by their keys, both show a certificate that they have signed themselves, and the handshake fails
//! unless the other one's is in the list. Where they share a token, the server's certificate lives as long as the endpoint and
//! says nothing: the session has two definite ends, and who they are is proven right after, bound to this session. Which of the
//! two it is, or whether somebody wants to be enrolled, is told by the protocol's name (ALPN, RFC 7301), so two ends that mean
//! different things part before anything is said.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoClientAuth, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, CipherSuite, DigitallySignedStruct, DistinguishedName, PeerMisbehaved, SignatureScheme,
};

use crate::credentials::Hosts;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::peers::{Peers, Permission};
use crate::token::Role;

/// What a link is proved by. What else speaks QUIC on this port is turned away by TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// A token that both have.
    Token,
    /// Host keys that each has in its list.
    Host,
    /// The code of an invitation.
    Enrolment,
}

impl Way {
    const ALL: [Self; 3] = [Self::Token, Self::Host, Self::Enrolment];

    /// The protocol's name in ALPN.
    fn name(self) -> &'static [u8] {
        match self {
            Self::Token => b"godwit",
            Self::Host => b"godwit/host",
            Self::Enrolment => b"godwit/enrolment",
        }
    }

    /// The one that a finished handshake has settled on.
    pub(crate) fn of(connection: &quinn::Connection) -> Option<Self> {
        let data = connection.handshake_data()?.downcast::<quinn::crypto::rustls::HandshakeData>().ok()?;
        let name = data.protocol?;
        Self::ALL.into_iter().find(|way| way.name() == name)
    }
}

/// The name in certificates and in the client's call; nobody looks at it.
pub(crate) const SERVER_NAME: &str = "godwit";

/// A certificate for sessions that are proven otherwise.
pub(crate) fn nameless() -> Result<Arc<CertifiedKey>> {
    let made = rcgen::generate_simple_self_signed(vec![SERVER_NAME.to_owned()])
        .map_err(|source| Error::tls("make a certificate", source))?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    CertifiedKey::from_der(vec![made.cert.der().clone()], key.into(), &provider())
        .map(Arc::new)
        .map_err(|source| Error::tls("use the certificate", source))
}

/// Whom a certificate has to be of.
#[derive(Debug)]
pub(crate) enum Wanted {
    /// Anybody who has its key.
    Anyone,
    /// Somebody in the list who may do this.
    Listed(Peers, Permission),
    /// This host.
    Exactly(Fingerprint),
}

/// What one handshake has seen, for those who explain how it ended.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    presented: Mutex<Option<Fingerprint>>,
    enrols: AtomicBool,
}

impl Seen {
    /// The certificate that the other end has shown.
    pub(crate) fn presented(&self) -> Option<Fingerprint> {
        *self.presented.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a server goes by in one handshake.
#[derive(Debug)]
pub(crate) struct ServerSide<'a> {
    /// This host's key, where hosts are known by keys.
    pub(crate) hosts: Option<&'a Hosts>,
    /// The certificate otherwise.
    pub(crate) nameless: &'a Arc<CertifiedKey>,
    /// What a caller may choose from.
    pub(crate) ways: &'a [Way],
}

/// Makes a server's configuration for one handshake.
pub(crate) fn server(side: &ServerSide<'_>) -> Result<(QuicServerConfig, Arc<Seen>)> {
    let provider = provider();
    let seen = Arc::new(Seen::default());
    let own = side.hosts.map_or_else(|| side.nameless.clone(), |hosts| hosts.key.certified());
    let verifier: Arc<dyn ClientCertVerifier> = match side.hosts {
        Some(hosts) if side.ways != [Way::Token] => {
            let wanted = Wanted::Listed(hosts.peers.clone(), Permission::Receiving);
            // Those who prove a token show none.
            let optional = side.ways.contains(&Way::Token);
            Arc::new(ClientVerifier {
                check: Check { provider: provider.clone(), wanted, seen: seen.clone() },
                optional,
            })
        }
        _ => Arc::new(NoClientAuth),
    };
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| Error::tls("configure TLS 1.3", source))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(Own { key: own, seen: seen.clone() }));
    config.alpn_protocols = side.ways.iter().map(|way| way.name().to_vec()).collect();
    // Every connection is a full handshake: nothing to resume, no early data.
    config.send_tls13_tickets = 0;
    let config = QuicServerConfig::try_from(config).map_err(|source| Error::tls("configure QUIC", source))?;
    Ok((config, seen))
}

/// Makes a client's configuration, with a certificate to show where there is a `key`.
pub(crate) fn client(
    way: Way,
    key: Option<Arc<CertifiedKey>>,
    wanted: Wanted,
) -> Result<(QuicClientConfig, Arc<Seen>)> {
    let provider = provider();
    let seen = Arc::new(Seen::default());
    let check = Check { provider: provider.clone(), wanted, seen: seen.clone() };
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| Error::tls("configure TLS 1.3", source))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(check));
    let mut config = match key {
        Some(key) => builder.with_client_cert_resolver(Arc::new(Own { key, seen: seen.clone() })),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![way.name().to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    let config = QuicClientConfig::try_from(config).map_err(|source| Error::tls("configure QUIC", source))?;
    Ok((config, seen))
}

/// ring, with AES-128-GCM first: the fastest where the processor has AES, and QUIC's own packets need it anyway.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// The certificate that the other end of a finished handshake has shown and has the key of.
pub(crate) fn peer_fingerprint(connection: &quinn::Connection) -> Option<Fingerprint> {
    let certificates = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    Some(Fingerprint::of(certificates.first()?))
}

/// What the alerts mean by which a handshake ends: RFC 8446 section 6.
const ACCESS_DENIED: u8 = 49;
const CERTIFICATE_REQUIRED: u8 = 116;
const NO_APPLICATION_PROTOCOL: u8 = 120;

/// What is known of a handshake that failed.
#[derive(Debug)]
pub(crate) struct Attempt<'a> {
    /// This host's key and list, where it goes by them.
    pub(crate) hosts: Option<&'a Hosts>,
    /// What it has seen.
    pub(crate) seen: &'a Seen,
    /// Which of the two this side is.
    pub(crate) role: Role,
    /// What this side was to do.
    pub(crate) way: Way,
}

impl Attempt<'_> {
    /// Says what an alert means; other errors stay as they are.
    pub(crate) fn explain(&self, error: Error) -> Error {
        let Error::Alert { address, alert, by_peer } = error else { return error };
        match (alert, self.hosts, self.seen.presented()) {
            (ACCESS_DENIED, Some(hosts), Some(presented)) if !by_peer => untrusted(&hosts.peers, address, presented),
            (ACCESS_DENIED, Some(hosts), _) if by_peer => {
                let own = hosts.key.fingerprint();
                let command = Peers::usual_command(own, &crate::enrolment::own_name());
                Error::NotTrusted { address, own: Box::new(own), command }
            }
            (NO_APPLICATION_PROTOCOL | CERTIFICATE_REQUIRED, ..) => {
                let reason = match (self.role, self.way) {
                    (Role::Client, Way::Token) => {
                        "this side proves a token, and the page server there goes by trusted host keys alone"
                    }
                    (Role::Client, _) => {
                        "this side goes by host keys, and the page server there by a token (--token-file)"
                    }
                    (Role::Server, Way::Token) => {
                        "the caller goes by host keys, and this page server by a token (--token-file)"
                    }
                    (Role::Server, _) => {
                        "the caller proves a token, or answers an invitation that is not open; this page server goes by \
                         trusted host keys alone"
                    }
                };
                Error::Modes { address, reason }
            }
            _ => Error::Alert { address, alert, by_peer },
        }
    }
}

/// The error that says that the certificate of the host at `address` is not trusted.
fn untrusted(peers: &Peers, address: SocketAddr, fingerprint: Fingerprint) -> Error {
    let reason = match peers.find(fingerprint) {
        Ok(None) => "that host's key is not among those that are trusted here",
        Ok(Some(_)) => "that host is trusted here, but not for this direction",
        Err(_) => "that host's entry in the list of trusted hosts cannot be used (`migrate hosts` says why)",
    };
    let command = peers.command(fingerprint, &address.ip().to_string());
    Error::Untrusted { address, fingerprint: Box::new(fingerprint), reason, command }
}

/// The certificate to show, with its key.
struct Own {
    key: Arc<CertifiedKey>,
    seen: Arc<Seen>,
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Own(redacted)")
    }
}

impl ResolvesServerCert for Own {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // N.B. the caller's certificate is looked at later, and by then nobody says what it is for. Who names two protocols gets
        // no leniency by it.
        let enrols = hello.alpn().is_some_and(|mut names| names.all(|name| name == Way::Enrolment.name()));
        self.seen.enrols.store(enrols, Ordering::Relaxed);
        Some(self.key.clone())
    }
}

impl ResolvesClientCert for Own {
    fn resolve(&self, _roots: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.key.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Looks at the other end's certificate; that it has the key to it, its signature of the handshake shows.
#[derive(Debug)]
struct Check {
    provider: Arc<CryptoProvider>,
    wanted: Wanted,
    seen: Arc<Seen>,
}

impl Check {
    fn accept(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let fingerprint = Fingerprint::of(certificate);
        *self.seen.presented.lock().unwrap_or_else(PoisonError::into_inner) = Some(fingerprint);
        let accepted = match &self.wanted {
            Wanted::Anyone => true,
            Wanted::Exactly(wanted) => fingerprint == *wanted,
            Wanted::Listed(..) if self.seen.enrols.load(Ordering::Relaxed) => true,
            Wanted::Listed(peers, permission) => match peers.find(fingerprint) {
                Ok(found) => found.is_some_and(|peer| peer.permission.covers(*permission)),
                Err(error) => {
                    tracing::warn!(%error, "an entry of the list of trusted hosts cannot be used");
                    false
                }
            },
        };
        if accepted {
            Ok(())
        } else {
            // As an alert: access_denied.
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// There is no TLS 1.2 here.
fn unadvertised() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
}

impl ServerCertVerifier for Check {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.accept(certificate).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        unadvertised()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

/// [`Check`] at the server.
#[derive(Debug)]
struct ClientVerifier {
    check: Check,
    optional: bool,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        !self.optional
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check.accept(certificate).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        unadvertised()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check.verify_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.check.schemes()
    }
}
