//! Frames back into pages, and nothing else: a payload that does not make exactly the promised pages is refused.

use std::fmt;

use bytes::{Bytes, BytesMut};
use zstd::zstd_safe::{self, DCtx};

use crate::error::{Error, Result};
use crate::header::{
    ENCODING_RAW, ENCODING_ZERO, ENCODING_ZSTD, FrameHeader, KIND_MESSAGE, KIND_PAGES, Limits, checksum,
};

/// What decoding reuses from frame to frame: a zstd context and memory, one per thread that decodes.
#[derive(Default)]
pub struct Scratch {
    context: Option<DCtx<'static>>,
    memory: BytesMut,
    zeroes: Bytes,
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scratch").field("capacity", &self.memory.capacity()).finish_non_exhaustive()
    }
}

impl Scratch {
    /// Makes an empty scratch; memory is set aside when first needed, 4 MiB at most.
    pub fn new() -> Self {
        Self::default()
    }

    fn zeroes(&mut self, length: usize) -> Bytes {
        if self.zeroes.is_empty() {
            self.zeroes = vec![0; Limits::FRAME_BYTES].into();
        }
        self.zeroes.slice(..length)
    }

    fn inflate(&mut self, header: &FrameHeader, payload: &[u8]) -> Result<Bytes> {
        let expected = header.page_bytes();
        let failed = |reason: String| Error::Inflate { address: header.address, expected, reason };
        // The same allocation comes back once the caller has dropped the pages of the frames before.
        self.memory.clear();
        self.memory.resize(expected, 0);
        let context = self.context.get_or_insert_with(DCtx::create);
        let inflated = context
            .decompress(&mut self.memory[..], payload)
            .map_err(|code| failed(zstd_safe::get_error_name(code).to_owned()))?;
        if inflated != expected {
            return Err(failed(format!("{inflated} bytes came out")));
        }
        Ok(self.memory.split().freeze())
    }
}

/// Gives back the pages of a frame, [`FrameHeader::page_bytes`] bytes.
///
/// A raw payload is handed through untouched; zeroes and inflated pages share memory with `scratch`, which is
/// reused once they are dropped. The output of zstd never exceeds what the header promises.
///
/// # Errors
/// When the header does not hold, is not one of pages, or the payload is not what it says: length, checksum, content.
pub fn decode_pages(header: &FrameHeader, payload: Bytes, scratch: &mut Scratch) -> Result<Bytes> {
    check(header, &payload, KIND_PAGES)?;
    match header.encoding {
        ENCODING_RAW => Ok(payload),
        ENCODING_ZERO => Ok(scratch.zeroes(header.page_bytes())),
        ENCODING_ZSTD => scratch.inflate(header, &payload),
        encoding => Err(Error::Encoding { kind: header.kind, encoding }),
    }
}

/// Gives back the payload of a message.
///
/// # Errors
/// When the header does not hold, is not one of a message, or length or checksum are not the payload's.
pub fn decode_message(header: &FrameHeader, payload: Bytes) -> Result<Bytes> {
    check(header, &payload, KIND_MESSAGE)?;
    Ok(payload)
}

fn check(header: &FrameHeader, payload: &[u8], kind: u8) -> Result<()> {
    header.validate()?;
    if header.kind != kind {
        return Err(Error::WrongKind { expected: kind, actual: header.kind });
    }
    if header.length as usize != payload.len() {
        return Err(Error::PayloadLength { expected: header.length, actual: payload.len() });
    }
    if header.has_checksum() {
        let actual = checksum(payload);
        if actual != header.checksum {
            return Err(Error::Checksum { address: header.address, expected: header.checksum, actual });
        }
    }
    Ok(())
}
