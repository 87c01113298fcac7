//! The secret that two hosts share, and the proof of holding it.
//!
//! The token never travels. What travels is an HMAC over a value that only the two ends of one TLS session can
//! compute (RFC 8446 section 7.5, RFC 5705), so a proof that somebody in the middle picks up fits no other session.

use std::fmt;
use std::path::Path;

use hmac::{Hmac, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::lasting::Lasting;
use crate::private::{self, Unfit};

/// Bytes of the shortest token.
pub(crate) const SHORTEST: usize = 32;
/// Bytes of the longest token file that is read.
const LONGEST: usize = 64 << 10;
/// Bytes of a proof.
pub(crate) const PROOF_SIZE: usize = 32;

/// A secret known to both ends; wiped from memory when the last copy is dropped, never shown.
#[derive(Clone)]
pub struct Token(std::sync::Arc<Zeroizing<Vec<u8>>>);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(redacted)")
    }
}

impl Token {
    /// Reads a token, all bytes of a regular file that belongs to this user or root and that nobody else can read.
    ///
    /// # Errors
    /// When the file cannot be read, is open to others, or has less than 32 bytes or more than 64 KiB.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed =
            |unfit: Unfit| Error::TokenFile { path: path.to_owned(), reason: unfit.reason, source: unfit.source };
        let bytes = private::read(path, LONGEST).map_err(failed)?;
        match bytes.len() {
            length if length < SHORTEST => {
                Err(failed(Unfit::new(format!("has {length} bytes, a token has at least {SHORTEST}"))))
            }
            _ => Ok(Self(bytes.into())),
        }
    }

    /// Makes a token of bytes at hand.
    ///
    /// # Errors
    /// When there are fewer than 32.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < SHORTEST {
            return Err(Error::TokenLength { length: bytes.len() });
        }
        Ok(Self(Zeroizing::new(bytes.to_vec()).into()))
    }

    /// Proves the token to the other end of the session that `exporter` came from.
    pub(crate) fn prove(&self, exporter: &[u8], role: Role) -> [u8; PROOF_SIZE] {
        let mut mac = self.mac();
        mac.update(exporter);
        mac.update(role.name());
        mac.finalize().into_bytes().into()
    }

    /// Checks a proof by the side that is `role`, in time that does not depend on where it is wrong.
    pub(crate) fn verifies(&self, exporter: &[u8], role: Role, proof: &[u8; PROOF_SIZE]) -> bool {
        self.prove(exporter, role).ct_eq(proof).into()
    }

    /// Gives what outlives this program.
    pub(crate) fn lasting(&self) -> Lasting {
        Lasting::of(&self.0)
    }

    fn mac(&self) -> Hmac<Sha256> {
        // HMAC hashes keys longer than a block and pads shorter ones: no length is an error.
        <Hmac<Sha256> as Mac>::new_from_slice(&self.0).expect("HMAC takes keys of any length")
    }
}

/// The side that proves. It is part of the proof: otherwise one side's could be sent back as the other's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Client,
    Server,
}

impl Role {
    pub(crate) fn name(self) -> &'static [u8] {
        match self {
            Self::Client => b"client",
            Self::Server => b"server",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(bytes: &[u8], mode: u32) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn a_private_file_is_taken_as_it_is() {
        let token = Token::load(file(b"0123456789abcdef0123456789abcdef\n", 0o400).path()).unwrap();
        assert_eq!(token.0.len(), 33);
        assert_eq!(format!("{token:?}"), "Token(redacted)");
    }

    #[test]
    fn files_that_are_no_secret_are_refused() {
        for mode in [0o640, 0o604, 0o620, 0o601] {
            let refused = Token::load(file(&[1; 40], mode).path()).unwrap_err().to_string();
            assert!(refused.contains(&format!("{mode:04o}")) && refused.contains("chmod"), "{refused}");
        }
        assert!(Token::load(file(&[1; 31], 0o600).path()).is_err());
        assert!(Token::load(file(&[1; LONGEST + 1], 0o600).path()).is_err());
        assert!(Token::load(file(&[1; LONGEST], 0o600).path()).is_ok());
        assert!(Token::load("/dev/zero").is_err());
        assert!(Token::load("/").is_err());
        assert!(Token::load("/nonexistent/token").is_err());
        assert!(Token::from_bytes(&[1; 31]).is_err());
    }

    #[test]
    fn a_fifo_is_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(Token::load(&path).is_err());
    }

    #[test]
    fn a_proof_fits_one_token_session_and_role() {
        let (one, two) = (Token::from_bytes(&[1; 32]).unwrap(), Token::from_bytes(&[2; 32]).unwrap());
        let proof = one.prove(b"session", Role::Client);
        assert!(one.verifies(b"session", Role::Client, &proof));
        assert!(!one.verifies(b"session", Role::Server, &proof));
        assert!(!one.verifies(b"another", Role::Client, &proof));
        assert!(!two.verifies(b"session", Role::Client, &proof));
    }
}
