//! The bytes of an entry: a head of 64 bytes in words, and facts in JSON where the head says.
//!
//! ```text
//! godwit 1 decided 64 412 8f3a90c2d1e7b645                       \n
//!        │ │       │  │   └ XXH3 of the facts
//!        │ │       │  └ their length
//!        │ │       └ where they begin
//!        │ └ state
//!        └ version
//! ```
//! New facts are written beside the old ones before the head names them: the head is all that ever changes in place.

use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::xxh3_64;

use crate::State;

/// Bytes of the head.
pub(crate) const HEAD: usize = 64;
/// Bytes of an entry at most; a longer file is not read.
pub(crate) const LONGEST: usize = 4 << 20;
const MAGIC: &str = "godwit";
const VERSION: &str = "1";

/// Where facts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Offset of the facts in the file.
    pub offset: usize,
    /// Their length in bytes.
    pub length: usize,
    /// Their XXH3.
    pub sum: u64,
}

impl Format {
    pub(crate) fn of(offset: usize, facts: &[u8]) -> Self {
        Self { offset, length: facts.len(), sum: xxh3_64(facts) }
    }

    /// The head of an entry in a state.
    pub(crate) fn head(self, state: &str) -> [u8; HEAD] {
        let words = format!("{MAGIC} {VERSION} {state} {} {} {:016x}", self.offset, self.length, self.sum);
        let mut head = [b' '; HEAD];
        for (place, byte) in head.iter_mut().zip(words.bytes()) {
            *place = byte;
        }
        head[HEAD - 1] = b'\n';
        head
    }
}

/// Takes an entry apart.
///
/// # Errors
/// In words what is wrong with it.
pub fn decode<S: State, F: DeserializeOwned>(bytes: &[u8]) -> Result<(S, F, Format), String> {
    let head = bytes.get(..HEAD).ok_or("it is too short")?;
    let head = std::str::from_utf8(head).map_err(|_| "its head is no text")?;
    let words: Vec<&str> = head.split_ascii_whitespace().collect();
    let [MAGIC, version, state, offset, length, sum] = words[..] else {
        return Err("its head is another one".to_owned());
    };
    if version != VERSION {
        return Err(format!("it is of version {version}, this program knows {VERSION}"));
    }
    let state = S::of(state).ok_or_else(|| format!("`{state}` is no state"))?;
    let offset: usize = offset.parse().map_err(|_| "its head names no place")?;
    let length: usize = length.parse().map_err(|_| "its head names no length")?;
    let sum = u64::from_str_radix(sum, 16).map_err(|_| "its head names no checksum")?;
    let facts = offset.checked_add(length).filter(|_| offset >= HEAD).and_then(|end| bytes.get(offset..end));
    let facts = facts.ok_or("its facts are not where the head says")?;
    if xxh3_64(facts) != sum {
        return Err("its facts are not those that the head was made for".to_owned());
    }
    let decoded = serde_json::from_slice(facts).map_err(|error| format!("its facts: {error}"))?;
    Ok((state, decoded, Format { offset, length, sum }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_session::decision::{DestinationRecord, SourceRecord};
    use proptest::prelude::*;

    #[test]
    fn a_head_has_room_for_the_longest() {
        let format = Format { offset: LONGEST, length: LONGEST, sum: u64::MAX };
        for word in ["undecided", "runs-complete"] {
            let head = format.head(word);
            assert!(head.ends_with(b" \n"), "{head:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_apart_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<SourceRecord, serde_json::Value>(&bytes);
        }

        #[test]
        fn a_damaged_entry_is_refused_or_says_the_same(at in 0usize..100, bit in 0u8..8) {
            let facts = br#"{"pid": 4711, "to": "192.0.2.2"}"#;
            let mut bytes = Format::of(HEAD, facts).head("runs").to_vec();
            bytes.extend(facts);
            let whole: (DestinationRecord, serde_json::Value, _) = decode(&bytes).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            if let Ok((state, facts, _)) = decode::<DestinationRecord, serde_json::Value>(&bytes) {
                prop_assert_eq!((state, facts), (whole.0, whole.1));
            }
        }
    }
}
