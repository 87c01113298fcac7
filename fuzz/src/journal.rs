//! What a side of a hand-over has written down.

use crate::targets::Decoder;
use godwit_journal::decode;
use godwit_session::decision::{DestinationRecord, SourceRecord};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes of an entry's head.
const HEAD: usize = 64;

/// An entry, as it is, and as the facts of one whose head is right: a checksum would keep all damage out.
pub(crate) const ALL: &[(&str, Decoder)] = &[("journal", |bytes| {
    let states = ["undecided", "decided", "ready", "runs", "runs-complete"];
    let state = states[usize::from(bytes.first().copied().unwrap_or(0)) % states.len()];
    let head = format!("godwit 1 {state} {HEAD} {} {:016x}", bytes.len(), xxh3_64(bytes));
    let mut whole = vec![b' '; HEAD];
    whole.splice(..head.len().min(HEAD), head.bytes().take(HEAD));
    whole.extend(bytes);
    understood(bytes) + understood(&whole)
})];

fn understood(bytes: &[u8]) -> usize {
    let source = decode::<SourceRecord, Value>(bytes).is_ok();
    let destination = decode::<DestinationRecord, Value>(bytes).is_ok();
    usize::from(source) + 2 * usize::from(destination)
}
