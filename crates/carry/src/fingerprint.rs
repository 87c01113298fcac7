//! What a host is known by: SHA-256 of its certificate.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

/// SHA-256 of a host's certificate (DER), shown as 64 hexadecimal digits, as `openssl x509 -fingerprint -sha256` does but for
/// the colons.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint([u8; Self::SIZE]);

impl Fingerprint {
    /// Bytes of a fingerprint.
    pub const SIZE: usize = 32;

    /// Computes that of a certificate.
    pub(crate) fn of(certificate: &[u8]) -> Self {
        Self(Sha256::digest(certificate).into())
    }

    pub(crate) fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8; Self::SIZE] {
        &self.0
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Fingerprint {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "a fingerprint has 64 hexadecimal digits";
        let digits: Vec<u32> = text
            .chars()
            .filter(|&character| character != ':')
            .map(|character| character.to_digit(16).ok_or(FORM))
            .take(2 * Self::SIZE + 1)
            .collect::<Result<_, _>>()?;
        if digits.len() != 2 * Self::SIZE {
            return Err(FORM);
        }
        let mut bytes = [0; Self::SIZE];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = (pair[0] << 4 | pair[1]) as u8;
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_parses_again_with_or_without_colons() {
        let one = Fingerprint::of(b"certificate");
        assert_eq!(one.to_string().parse(), Ok(one));
        let digits: Vec<char> = one.to_string().to_uppercase().chars().collect();
        let colons: Vec<String> = digits.chunks(2).map(|pair| pair.iter().collect()).collect();
        assert_eq!(colons.join(":").parse(), Ok(one));
        for text in ["", "abc", &"g".repeat(64), &"a".repeat(63), &"a".repeat(65), &"é".repeat(32)] {
            assert!(text.parse::<Fingerprint>().is_err(), "{text}");
        }
    }
}
