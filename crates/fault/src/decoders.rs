//! What reads words of others here, each behind a function of bytes: what the fuzzer calls. Each returns how much it has
//! understood, which is what the fuzzer is guided by.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use godwit_kernel::inbox;
use godwit_kernel::shared::SharedWords;

use crate::handover::Words;
use crate::ledger::Ledger;

/// Something that reads words of others.
pub type Decoder = fn(&[u8]) -> usize;

/// All of them, by name.
pub const ALL: &[(&str, Decoder)] = &[
    ("handover", |bytes| usize::from(serde_json::from_slice::<Words>(bytes).is_ok())),
    ("ledger", ledger),
    ("events", events),
];

/// A ledger as a daemon finds it that died.
fn ledger(bytes: &[u8]) -> usize {
    let words = bytes.len().div_ceil(8).max(1);
    let Ok(memory) = SharedWords::create(c"ledger", words as u64) else { return 0 };
    for (place, chunk) in memory.words().iter().zip(bytes.chunks(8)) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        place.store(u64::from_le_bytes(word), Ordering::Release);
    }
    let Ok(fd) = memory.as_fd().try_clone_to_owned() else { return 0 };
    Ledger::open(fd).map_or(0, |(_, pending)| 1 + pending.pages() as usize % 7)
}

fn events(bytes: &[u8]) -> usize {
    let words: Vec<AtomicU64> =
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()).into()).collect();
    words.chunks(inbox::MESSAGE_WORDS).filter_map(inbox::decode).count()
}
