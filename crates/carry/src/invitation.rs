//! Invitations: a secret that admits one host, once, for some minutes; and the code in which it is told.
//!
//! An open invitation is a file in `invitations` of the configuration directory, so that one can be made while a page server
//! runs. Whoever succeeds in removing the file has used the invitation: unlink(2) lets one of many win.
//!
//! The code is one word in Crockford's base 32 (letters of either case; what is easily mistaken stands for the same):
//! version (1 byte), secret (16), fingerprint (32), address, and the first 4 bytes of the SHA-256 of all that.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::address::{DEFAULT_PORT, HostPort};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::private::{self, Existing, Unfit};
use crate::token::Token;

const DIRECTORY: &str = "invitations";
/// How long an invitation is open unless told otherwise.
pub const DEFAULT_VALIDITY: Duration = Duration::from_secs(600);
const VERSION: u8 = 1;
const SECRET_SIZE: usize = 16;
const CHECK_SIZE: usize = 4;
/// Characters of the longest code: a host name of 255 characters, and hyphens.
const LONGEST_CODE: usize = 1024;
/// Bytes of the longest file that is read.
const LONGEST: usize = 256;
/// Proofs of a wrong secret for one invitation after which it is withdrawn. Its id is told to nobody who does not have the secret, so
/// these are not a stranger's.
const WRONG_PROOFS: u32 = 3;
/// What is wrong with most codes that are wrong.
const MISTYPED: &str = "it is not complete, or has a typing error";
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// The secret of an invitation; never shown but inside a [`Code`].
#[derive(Clone, PartialEq, Eq)]
struct Secret(Zeroizing<[u8; SECRET_SIZE]>);

impl Secret {
    fn new() -> Result<Self> {
        use std::io::Read;
        let mut bytes = Zeroizing::new([0; SECRET_SIZE]);
        let path = Path::new("/dev/urandom");
        let failed =
            |source| Error::ConfigFile { path: path.into(), reason: "cannot be read".into(), source: Some(source) };
        fs::File::open(path).and_then(|mut random| random.read_exact(&mut *bytes)).map_err(failed)?;
        Ok(Self(bytes))
    }

    /// What the invitation is called; says nothing of the secret.
    fn id(&self) -> InvitationId {
        let digest = Sha256::new().chain_update(b"godwit invitation id").chain_update(*self.0).finalize();
        let (id, _) = digest.split_first_chunk().expect("a digest has 32 bytes");
        InvitationId(*id)
    }

    /// What is proved to have the secret.
    fn token(&self) -> Token {
        let digest = Sha256::new().chain_update(b"godwit invitation secret").chain_update(*self.0).finalize();
        let digest: Zeroizing<[u8; 32]> = Zeroizing::new(digest.into());
        Token::from_bytes(&*digest).expect("a digest is long enough")
    }
}

/// Names an invitation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct InvitationId([u8; Self::SIZE]);

impl InvitationId {
    pub(crate) const SIZE: usize = 8;

    pub(crate) fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8; Self::SIZE] {
        &self.0
    }
}

impl fmt::Display for InvitationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What an invitation is told by. Shown by [`Code::reveal`] only.
#[derive(Clone, PartialEq, Eq)]
pub struct Code {
    secret: Secret,
    fingerprint: Fingerprint,
    address: HostPort,
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Code(redacted, {} at {})", self.fingerprint, self.address)
    }
}

impl Code {
    /// Takes a code apart.
    ///
    /// # Errors
    /// When it was mistyped, or is none.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |reason| Error::Code { reason };
        if text.len() > LONGEST_CODE {
            return Err(wrong("it is too long"));
        }
        let bytes = decode(text).map_err(wrong)?;
        let Some((payload, check)) = bytes.split_last_chunk::<CHECK_SIZE>() else {
            return Err(wrong("it is too short"));
        };
        if check[..] != Sha256::digest(payload)[..CHECK_SIZE] {
            return Err(wrong(MISTYPED));
        }
        let taken = || {
            let (version, rest) = payload.split_first()?;
            let (secret, rest) = rest.split_first_chunk()?;
            let (fingerprint, address) = rest.split_first_chunk()?;
            Some((*version, secret, fingerprint, address))
        };
        let (version, secret, fingerprint, address) = taken().ok_or_else(|| wrong("it is too short"))?;
        if version != VERSION {
            return Err(wrong("it was made by another release"));
        }
        let address = std::str::from_utf8(address).ok().and_then(|text| HostPort::parse(text, DEFAULT_PORT).ok());
        Ok(Self {
            secret: Secret(Zeroizing::new(*secret)),
            fingerprint: Fingerprint::from_bytes(*fingerprint),
            address: address.ok_or_else(|| wrong("its address is none"))?,
        })
    }

    /// Gives the code itself, secret and all: for the one who asked for it, and not for logs.
    pub fn reveal(&self) -> Zeroizing<String> {
        let address = self.address.to_string();
        let mut bytes = Zeroizing::new(vec![VERSION]);
        bytes.extend_from_slice(&*self.secret.0);
        bytes.extend_from_slice(self.fingerprint.bytes());
        bytes.extend_from_slice(address.as_bytes());
        let check = Sha256::digest(&*bytes);
        bytes.extend_from_slice(&check[..CHECK_SIZE]);
        Zeroizing::new(encode(&bytes))
    }

    /// Gives the inviting host's fingerprint.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Gives the place where the inviting host is to be called.
    pub fn address(&self) -> &HostPort {
        &self.address
    }

    pub(crate) fn id(&self) -> InvitationId {
        self.secret.id()
    }

    pub(crate) fn token(&self) -> Token {
        self.secret.token()
    }
}

/// The open invitations of a configuration directory.
#[derive(Clone, Debug)]
pub struct Invitations {
    directory: PathBuf,
    wrong: Arc<Mutex<HashMap<InvitationId, u32>>>,
}

/// An invitation that is open.
pub(crate) struct Open {
    id: InvitationId,
    secret: Secret,
}

impl Invitations {
    /// Gives the invitations of a configuration directory; nothing is read or made yet.
    pub fn in_directory(configuration: &Path) -> Self {
        Self { directory: configuration.join(DIRECTORY), wrong: Arc::default() }
    }

    /// Invites one host to this one, which has `fingerprint` and is called at `address`.
    ///
    /// # Errors
    /// When the invitation cannot be written down.
    pub fn create(&self, fingerprint: Fingerprint, address: HostPort, validity: Duration) -> Result<Code> {
        self.forget_expired();
        let secret = Secret::new()?;
        let expires = now().saturating_add(validity.as_secs());
        let path = self.path(secret.id());
        let failed =
            |unfit: Unfit| Error::ConfigFile { path: path.clone(), reason: unfit.reason, source: unfit.source };
        private::directory(&self.directory).map_err(failed)?;
        let text = Zeroizing::new(format!("secret {}\nexpires {expires}\n", encode(&*secret.0)));
        private::write(&path, text.as_bytes(), Existing::Keep).map_err(failed)?;
        Ok(Code { secret, fingerprint, address })
    }

    /// Says whether anybody is invited now.
    pub(crate) fn any(&self) -> bool {
        self.forget_expired();
        self.entries().next().is_some()
    }

    /// Finds an open invitation.
    pub(crate) fn find(&self, id: InvitationId) -> Option<Open> {
        let (secret, expires) = read(&self.path(id))?;
        // A file under another one's name, or one whose time has come, admits nobody.
        (secret.id() == id && now() < expires).then_some(Open { id, secret })
    }

    /// Uses an invitation up; says whether it was still there. Of many who call this at the same time one is told so.
    pub(crate) fn take(&self, open: &Open) -> bool {
        fs::remove_file(self.path(open.id)).is_ok()
    }

    /// Notes that somebody who knows the id of an invitation did not prove its secret.
    pub(crate) fn was_wrong(&self, open: &Open) {
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        let count = wrong.entry(open.id).or_default();
        *count += 1;
        if *count >= WRONG_PROOFS {
            wrong.remove(&open.id);
            tracing::warn!(invitation = %open.id, "withdrawn after {WRONG_PROOFS} proofs of a wrong secret");
            self.take(open);
        }
    }

    fn path(&self, id: InvitationId) -> PathBuf {
        self.directory.join(id.to_string())
    }

    fn entries(&self) -> impl Iterator<Item = PathBuf> {
        let visible = |entry: &fs::DirEntry| !entry.file_name().to_string_lossy().starts_with('.');
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        entries.filter(visible).map(|entry| entry.path())
    }

    fn forget_expired(&self) {
        for path in self.entries() {
            if read(&path).is_none_or(|(_, expires)| now() >= expires)
                && let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "an invitation that has expired cannot be removed");
            }
        }
    }
}

impl Open {
    pub(crate) fn token(&self) -> Token {
        self.secret.token()
    }
}

/// Reads an invitation's file: the secret, and the second since 1970 in which it expires.
fn read(path: &Path) -> Option<(Secret, u64)> {
    let bytes = private::read(path, LONGEST).ok()?;
    let text = std::str::from_utf8(&bytes).ok()?;
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    let secret = Zeroizing::new(decode(value("secret")?).ok()?);
    let secret = Secret(Zeroizing::new(secret.as_slice().try_into().ok()?));
    Some((secret, value("expires")?.parse().ok()?))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(u64::MAX, |since| since.as_secs())
}

fn encode(bytes: &[u8]) -> String {
    // All the room at once: a string that grows leaves copies of a secret behind.
    let mut text = String::with_capacity(bytes.len() * 8 / 5 + 1);
    let (mut buffer, mut bits) = (0u32, 0);
    for byte in bytes {
        buffer = buffer << 8 | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            text.push(char::from(ALPHABET[(buffer >> bits & 31) as usize]));
        }
    }
    if bits > 0 {
        text.push(char::from(ALPHABET[(buffer << (5 - bits) & 31) as usize]));
    }
    text
}

/// Takes what [`encode`] makes, in either case and with hyphens or blanks between; says what is wrong with anything else.
fn decode(text: &str) -> Result<Vec<u8>, &'static str> {
    const UNKNOWN: &str = "it has characters that no code has";
    let mut bytes = Vec::with_capacity(text.len() * 5 / 8 + 1);
    let (mut buffer, mut bits) = (0u32, 0);
    for character in text.chars().filter(|character| !(*character == '-' || character.is_ascii_whitespace())) {
        let letter = match character.to_ascii_lowercase() {
            'o' => b'0',
            'i' | 'l' => b'1',
            other => u8::try_from(other).map_err(|_| UNKNOWN)?,
        };
        let value = ALPHABET.iter().position(|known| *known == letter).ok_or(UNKNOWN)?;
        buffer = buffer << 5 | value as u32;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            bytes.push((buffer >> bits) as u8);
            buffer &= (1 << bits) - 1;
        }
    }
    // What is left over is padding.
    if bits < 5 && buffer == 0 { Ok(bytes) } else { Err(MISTYPED) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invite(directory: &Path, validity: Duration) -> (Invitations, Code) {
        let invitations = Invitations::in_directory(directory);
        let address = HostPort::parse("receiver.example:7000", DEFAULT_PORT).unwrap();
        let code = invitations.create(Fingerprint::of(b"x"), address, validity).unwrap();
        (invitations, code)
    }

    #[test]
    fn codes_survive_being_written_down() {
        let directory = tempfile::tempdir().unwrap();
        let (_, code) = invite(directory.path(), DEFAULT_VALIDITY);
        let text = code.reveal();
        assert!(Code::parse(&text).unwrap() == code);
        assert!(
            Code::parse(&format!(" {}\n", text.to_uppercase().replace('0', "O").replace('1', "L"))).unwrap() == code
        );
        let hyphens: String = text.chars().flat_map(|letter| [letter, '-']).collect();
        assert!(Code::parse(&hyphens).unwrap() == code);
        assert!(!format!("{code:?}").contains(&*encode(&*code.secret.0)));
    }

    #[test]
    fn every_typing_error_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let (_, code) = invite(directory.path(), DEFAULT_VALIDITY);
        let text = code.reveal();
        for place in 0..text.len() {
            let mut wrong = text.as_bytes().to_vec();
            wrong[place] = if wrong[place] == b'a' { b'b' } else { b'a' };
            assert!(Code::parse(std::str::from_utf8(&wrong).unwrap()).is_err(), "at {place}");
            let shorter = format!("{}{}", &text[..place], &text[place + 1..]);
            let error = Code::parse(&shorter).unwrap_err().to_string();
            assert!(error.contains(MISTYPED), "without {place}: {error}");
        }
        let swapped = (1..text.len()).find(|&at| text.as_bytes()[at] != text.as_bytes()[at - 1]).unwrap();
        let mut bytes = text.as_bytes().to_vec();
        bytes.swap(swapped, swapped - 1);
        assert!(Code::parse(std::str::from_utf8(&bytes).unwrap()).is_err());
        for text in ["", "a", "u", "ä", "0000000000", &"0".repeat(5000)] {
            assert!(Code::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_invitation_is_taken_once() {
        let directory = tempfile::tempdir().unwrap();
        let (invitations, code) = invite(directory.path(), DEFAULT_VALIDITY);
        assert!(invitations.any());
        let taken: usize = std::thread::scope(|scope| {
            let open = || invitations.find(code.id()).is_some_and(|open| invitations.take(&open));
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| usize::from(thread.join().unwrap())).sum()
        });
        assert_eq!(taken, 1);
        assert!(!invitations.any() && invitations.find(code.id()).is_none());
    }

    #[test]
    fn an_invitation_expires() {
        let directory = tempfile::tempdir().unwrap();
        let (invitations, code) = invite(directory.path(), Duration::ZERO);
        assert!(invitations.find(code.id()).is_none());
        assert!(!invitations.any());
        assert_eq!(fs::read_dir(directory.path().join(DIRECTORY)).unwrap().count(), 0);
    }

    #[test]
    fn wrong_proofs_withdraw_only_the_invitation_they_name() {
        let directory = tempfile::tempdir().unwrap();
        let (invitations, one) = invite(directory.path(), DEFAULT_VALIDITY);
        let (_, other) = invite(directory.path(), DEFAULT_VALIDITY);
        for _ in 0..WRONG_PROOFS {
            assert!(invitations.find(InvitationId([9; 8])).is_none());
            invitations.was_wrong(&invitations.find(one.id()).unwrap());
        }
        assert!(invitations.find(one.id()).is_none());
        assert!(invitations.find(other.id()).is_some());
    }
}
