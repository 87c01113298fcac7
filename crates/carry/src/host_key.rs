//! This host's own key and certificate, made on first use.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::identity;
use crate::lasting::Lasting;
use crate::private::{self, Existing, Unfit};

/// The file in the configuration directory: the private key (PKCS 8) and the certificate, both as PEM (RFC 7468).
const FILE: &str = "host.pem";
/// Bytes of the longest such file that is read.
const LONGEST: usize = 64 << 10;

/// A host's key pair (Ed25519) with the certificate that it has signed itself. The key is never shown.
#[derive(Clone)]
pub struct HostKey {
    certified: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
    lasting: Lasting,
}

impl fmt::Debug for HostKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostKey({})", self.fingerprint)
    }
}

impl HostKey {
    /// Loads the key of this host from `directory`, and makes it where there is none. Those who come at the same time get the same.
    ///
    /// # Errors
    /// When the directory or the file cannot be made, read or used, or is open to others.
    pub fn load_or_create(directory: &Path) -> Result<Self> {
        let path = directory.join(FILE);
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |unfit: Unfit| Error::ConfigFile { path, reason: unfit.reason, source: unfit.source }
        };
        // Whoever can write there can put another key in its place.
        private::check_directory(directory).map_err(failed(directory))?;
        let text = match private::read(&path, LONGEST) {
            Err(unfit) if unfit.is_missing() => {
                private::directory(directory).map_err(failed(directory))?;
                let made = make()?;
                // Whoever was first, that one is it.
                private::write(&path, made.as_bytes(), Existing::Keep).map_err(failed(&path))?;
                private::read(&path, LONGEST).map_err(failed(&path))?
            }
            read => read.map_err(failed(&path))?,
        };
        Self::parse(&text).map_err(|reason| Error::ConfigFile { path, reason, source: None })
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let certificate =
            CertificateDer::from_pem_slice(text).map_err(|error| format!("has no certificate: {error}"))?;
        let key = PrivateKeyDer::from_pem_slice(text).map_err(|error| format!("has no private key: {error}"))?;
        let fingerprint = Fingerprint::of(&certificate);
        let lasting = Lasting::of(key.secret_der());
        let certified = CertifiedKey::from_der(vec![certificate], key, &identity::provider())
            .map_err(|error| format!("has a key and a certificate that cannot be used together: {error}"))?;
        Ok(Self { certified: Arc::new(certified), fingerprint, lasting })
    }

    /// Gives what other hosts know this one by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Gives what outlives this program.
    pub(crate) fn lasting(&self) -> Lasting {
        self.lasting.clone()
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }
}

/// Makes a key and its certificate.
fn make() -> Result<Zeroizing<String>> {
    let failed = |source| Error::tls("make this host's key", source);
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(failed)?;
    let parameters = rcgen::CertificateParams::new(vec![identity::SERVER_NAME.to_owned()]).map_err(failed)?;
    let certificate = parameters.self_signed(&key).map_err(failed)?;
    let private = Zeroizing::new(key.serialize_pem());
    Ok(Zeroizing::new(format!("{}{}", *private, certificate.pem())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn a_key_is_made_once_and_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("godwit");
        let all: Vec<Fingerprint> = std::thread::scope(|scope| {
            let made: Vec<_> = (0..8).map(|_| scope.spawn(|| HostKey::load_or_create(&place).unwrap())).collect();
            made.into_iter().map(|thread| thread.join().unwrap().fingerprint()).collect()
        });
        assert!(all.iter().all(|fingerprint| *fingerprint == all[0]), "{all:?}");
        assert_eq!(std::fs::metadata(place.join(FILE)).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(std::fs::metadata(&place).unwrap().mode() & 0o7777, 0o700);
        let again = HostKey::load_or_create(&place).unwrap();
        assert_eq!(format!("{again:?}"), format!("HostKey({})", all[0]));
    }

    #[test]
    fn what_is_no_key_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        let refused = || HostKey::load_or_create(directory.path()).unwrap_err().to_string();
        HostKey::load_or_create(directory.path()).unwrap();
        let good = std::fs::read_to_string(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(refused().contains("0640") && refused().contains(FILE), "{}", refused());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "").unwrap();
        assert!(refused().contains("no certificate"), "{}", refused());
        // Another host's certificate beside this one's key.
        let other = tempfile::tempdir().unwrap();
        HostKey::load_or_create(other.path()).unwrap();
        let other = std::fs::read_to_string(other.path().join(FILE)).unwrap();
        let certificate = &other[other.find("-----BEGIN CERTIFICATE").unwrap()..];
        let key = &good[..good.find("-----BEGIN CERTIFICATE").unwrap()];
        std::fs::write(&path, format!("{key}{certificate}")).unwrap();
        assert!(refused().contains("together"), "{}", refused());
    }
}
