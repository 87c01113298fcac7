//! TLS: version 1.3 only, a certificate that lives as long as the endpoint, and no trust in certificates at all.
//!
//! Nothing vouches for the server's certificate; the client checks only that the server holds its key, so that the
//! session has two definite ends. Who they are is proven by the token, right after, bound to this session.

use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{CipherSuite, DigitallySignedStruct, PeerMisbehaved, SignatureScheme};

use crate::error::{Error, Result};

/// Application protocol (RFC 7301): what else speaks QUIC on this port is turned away by TLS.
const ALPN: &[u8] = b"godwit";
/// The name in the certificate and in the client's call; nobody looks at it.
pub(crate) const SERVER_NAME: &str = "godwit";

/// Makes a server's configuration with a fresh key and certificate.
pub(crate) fn server() -> Result<QuicServerConfig> {
    let made = rcgen::generate_simple_self_signed(vec![SERVER_NAME.to_owned()])
        .map_err(|source| Error::tls("make a certificate", source))?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| Error::tls("configure TLS 1.3", source))?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .map_err(|source| Error::tls("use the certificate", source))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    // Every connection is a full handshake: nothing to resume, no early data.
    config.send_tls13_tickets = 0;
    QuicServerConfig::try_from(config).map_err(|source| Error::tls("configure QUIC", source))
}

/// Makes a client's configuration.
pub(crate) fn client() -> Result<QuicClientConfig> {
    let provider = provider();
    let mut config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| Error::tls("configure TLS 1.3", source))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(KeyHolder(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    QuicClientConfig::try_from(config).map_err(|source| Error::tls("configure QUIC", source))
}

/// ring, with AES-128-GCM first: the fastest where the processor has AES, and QUIC's own packets need it anyway.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// Accepts any certificate whose key signed this handshake.
#[derive(Debug)]
struct KeyHolder(Arc<CryptoProvider>);

impl ServerCertVerifier for KeyHolder {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
