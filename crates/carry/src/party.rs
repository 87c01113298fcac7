//! Who is at the other end of a link, as far as that was proved.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::fingerprint::Fingerprint;

/// Whoever has begun something, to be compared with whoever goes on with it on a later link. Shown as a fingerprint, or `token`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(into = "String", try_from = "String")]
pub enum Party {
    /// The host with this certificate.
    Host(Fingerprint),
    /// Somebody who knows the token: one party, however many they are, and whichever the token is.
    TokenHolders,
}

/// What [`Party::TokenHolders`] are called where the others have a fingerprint.
const TOKEN_HOLDERS: &str = "token";

impl Party {
    /// Words that [`Self::to_words`] gives.
    pub const WORDS: usize = 1 + Fingerprint::SIZE / size_of::<u64>();

    /// Writes it as numbers, the first of which is not 0.
    #[must_use]
    pub fn to_words(self) -> [u64; Self::WORDS] {
        let mut words = [0; Self::WORDS];
        match self {
            Self::TokenHolders => words[0] = 1,
            Self::Host(fingerprint) => {
                words[0] = 2;
                let (parts, _) = fingerprint.bytes().as_chunks();
                for (word, part) in words[1..].iter_mut().zip(parts) {
                    *word = u64::from_le_bytes(*part);
                }
            }
        }
        words
    }

    /// Reads what [`Self::to_words`] has given; `None` where it is something else.
    #[must_use]
    pub fn from_words(words: [u64; Self::WORDS]) -> Option<Self> {
        let [kind, parts @ ..] = words;
        match kind {
            1 if parts.iter().all(|part| *part == 0) => Some(Self::TokenHolders),
            2 => {
                let mut bytes = [0; Fingerprint::SIZE];
                let (places, _) = bytes.as_chunks_mut();
                for (place, part) in places.iter_mut().zip(parts) {
                    *place = part.to_le_bytes();
                }
                Some(Self::Host(Fingerprint::from_bytes(bytes)))
            }
            _ => None,
        }
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(fingerprint) => fingerprint.fmt(f),
            Self::TokenHolders => f.write_str(TOKEN_HOLDERS),
        }
    }
}

impl FromStr for Party {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == TOKEN_HOLDERS { Ok(Self::TokenHolders) } else { text.parse().map(Self::Host) }
    }
}

impl From<Party> for String {
    fn from(party: Party) -> Self {
        party.to_string()
    }
}

impl TryFrom<String> for Party {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_is_read_again() {
        let one = Party::Host(Fingerprint::of(b"one"));
        let other = Party::Host(Fingerprint::of(b"other"));
        assert_ne!(one, other);
        for party in [one, other, Party::TokenHolders] {
            assert_eq!(Party::from_words(party.to_words()), Some(party));
            assert_eq!(party.to_string().parse(), Ok(party));
        }
        for words in [[0; Party::WORDS], [3; Party::WORDS], [u64::MAX; Party::WORDS], [1; Party::WORDS]] {
            assert_eq!(Party::from_words(words), None);
        }
        for text in ["", "Token", "tokens", "0123"] {
            assert!(text.parse::<Party>().is_err(), "{text}");
        }
    }
}
