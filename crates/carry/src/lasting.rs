//! What an endpoint has in common with the one that listened on its port before this program was started.
//!
//! Whoever still holds a link of a program that was killed learns it from the next one's first answer, a stateless reset (RFC 9000 section
//! 10.3), and not by waiting. For that both have to make the same of a connection's id: it is derived from what this host proves itself
//! by. The port is part of it, for an answer of one port must not end links of another.

use std::sync::Arc;

use hmac::{Hmac, Mac};
use quinn::EndpointConfig;
use quinn::crypto::{CryptoError, HmacKey};
use quinn_proto::HashedConnectionIdGenerator;
use sha2::Sha256;
use zeroize::Zeroizing;

/// A secret that outlives this program.
#[derive(Clone)]
pub(crate) struct Lasting(Zeroizing<[u8; 32]>);

impl std::fmt::Debug for Lasting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lasting(redacted)")
    }
}

impl Lasting {
    /// Derives it from what a host proves itself by.
    pub(crate) fn of(secret: &[u8]) -> Self {
        Self(Zeroizing::new(derived(secret, b"godwit endpoints")))
    }

    /// How an endpoint on a port of this host is set up.
    pub(crate) fn endpoint(&self, port: u16) -> EndpointConfig {
        let own = Zeroizing::new(derived(&*self.0, &port.to_be_bytes()));
        let ids = derived(&*own, b"connection ids");
        let ids = u64::from_le_bytes(ids[..8].try_into().expect("eight bytes"));
        let mut config = EndpointConfig::new(Arc::new(ResetKey(mac(&*own))));
        config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
        config
    }
}

fn mac(key: &[u8]) -> Hmac<Sha256> {
    <Hmac<Sha256> as Mac>::new_from_slice(key).expect("HMAC takes keys of any length")
}

fn derived(key: &[u8], purpose: &[u8]) -> [u8; 32] {
    mac(key).chain_update(purpose).finalize().into_bytes().into()
}

/// Makes reset tokens.
struct ResetKey(Hmac<Sha256>);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(&self.0.clone().chain_update(data).finalize().into_bytes());
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        self.0.clone().chain_update(data).verify_slice(signature).map_err(|_| CryptoError)
    }
}
