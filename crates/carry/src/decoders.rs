//! What reads words of others here, each behind a function of bytes: what the fuzzer calls. Each returns how much it has
//! understood, which is what the fuzzer is guided by.

use crate::address::HostPort;
use crate::{authentication, error, token::Token};

/// Something that reads words of others.
pub type Decoder = fn(&[u8]) -> usize;

/// All of them, by name.
pub const ALL: &[(&str, Decoder)] = &[
    ("greeting", |bytes| {
        bytes.first_chunk().and_then(authentication::parse).map_or(0, |(version, _)| 1 + usize::from(version == 1))
    }),
    ("closing-words", |bytes| error::clean(bytes).len()),
    ("token", |bytes| usize::from(Token::from_bytes(bytes).is_ok())),
    ("host-address", |bytes| usize::from(HostPort::parse(&String::from_utf8_lossy(bytes), 7477).is_ok())),
];
