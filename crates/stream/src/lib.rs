//! Page frames: what travels between two hosts, as bytes.
//!
//! One connection carries one ordered channel, and the channel carries frames: a fixed header of
//! [`HEADER_SIZE`] bytes and a payload. A frame is either a message (its payload is opaque here) or a run of
//! pages. This crate lays the header out ([`FrameHeader`]), turns pages into frames ([`PageEncoder`]: zero pages
//! are elided, the rest is compressed when that pays) and frames back into pages ([`decode_pages`]).
//!
//! It owns no socket, no clock and no process: bytes in, bytes out. Everything decoded is taken to come from a
//! hostile peer; sizes are checked before memory is set aside for them.

mod adaptive;
mod decode;
mod encode;
mod error;
mod header;
mod zero;

pub use adaptive::Compression;
pub use decode::{Scratch, decode_message, decode_pages};
pub use encode::{ChecksumPolicy, EncodedFrame, PageEncoder, Tally};
pub use error::{Error, Result};
pub use header::{
    ENCODING_RAW, ENCODING_ZERO, ENCODING_ZSTD, FLAG_CHECKSUM, FLAGS_APPLICATION, FrameHeader, HEADER_SIZE,
    KIND_MESSAGE, KIND_PAGES, Limits, PAGE_SIZE, checksum,
};
pub use zero::is_zero;
