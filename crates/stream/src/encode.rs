//! Pages into frames.
//!
//! Runs of zero pages become frames without a payload; what is between them is cut to frame size and compressed
//! where the policy says so and it helps. Which pages to send, and when, is the caller's business.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use zstd::zstd_safe::{CCtx, CParameter};

use crate::adaptive::{Compression, Judgement};
use crate::header::{ENCODING_ZSTD, FrameHeader, Limits, PAGE_SIZE};
use crate::zero;

/// A header and the payload that goes with it; none for pages of zeroes.
pub type EncodedFrame = (FrameHeader, Option<Bytes>);

/// Runs longer than this are sampled before they are compressed whole.
const SAMPLED_ABOVE: usize = 64 << 10;
/// Bytes of the sample, from the middle of the run.
const SAMPLE: usize = 16 << 10;

/// Says which payloads carry a checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ChecksumPolicy {
    /// Compressed ones. The transport authenticates every byte; this catches a faulty (de)compressor.
    #[default]
    Compressed,
    /// All of them.
    Every,
}

/// Counts what an encoder has put out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Pages of zeroes, sent without a payload.
    pub zero_pages: u64,
    /// Pages sent as they are.
    pub raw_pages: u64,
    /// Pages sent compressed.
    pub zstd_pages: u64,
    /// Bytes of payload, headers not counted.
    pub payload_bytes: u64,
}

/// Turns pages into frames and remembers what compression was worth.
pub struct PageEncoder {
    compression: Compression,
    checksums: ChecksumPolicy,
    judgement: Judgement,
    compressor: Option<Compressor>,
    tally: Tally,
}

impl fmt::Debug for PageEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageEncoder")
            .field("compression", &self.compression)
            .field("checksums", &self.checksums)
            .field("tally", &self.tally)
            .finish_non_exhaustive()
    }
}

impl PageEncoder {
    /// Starts an encoder; contexts for zstd are made when first needed.
    pub fn new(compression: Compression) -> Self {
        Self {
            compression,
            checksums: ChecksumPolicy::default(),
            judgement: Judgement::new(),
            compressor: None,
            tally: Tally::default(),
        }
    }

    /// Sets which payloads carry a checksum.
    #[must_use]
    pub fn with_checksums(mut self, checksums: ChecksumPolicy) -> Self {
        self.checksums = checksums;
        self
    }

    /// Takes in what [`Compression::Adaptive`] decides by: the bytes a second that the link carries, and the share of
    /// one core, 0 to 1, that compression can have. Worth calling about once a second.
    pub fn observe(&mut self, link_bytes_per_second: f64, cpu_idle_hint: f64) {
        self.judgement.observe(link_bytes_per_second, cpu_idle_hint);
    }

    /// Counts what was put out so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Encodes the pages at `address` of `space`, any number of them, in order; raw payloads are copies.
    ///
    /// # Panics
    /// When `pages` is not whole pages, or `address` not a page's, or the end past 2^64.
    pub fn encode(&mut self, space: u32, address: u64, pages: &[u8], id: u64) -> Vec<EncodedFrame> {
        self.encode_runs(Place { space, address, id }, pages, |bytes| Bytes::copy_from_slice(&pages[bytes]))
    }

    /// Encodes as [`Self::encode`] does, but raw payloads share the memory of `pages`.
    ///
    /// # Panics
    /// As [`Self::encode`].
    pub fn encode_shared(&mut self, space: u32, address: u64, pages: &Bytes, id: u64) -> Vec<EncodedFrame> {
        self.encode_runs(Place { space, address, id }, pages, |bytes| pages.slice(bytes))
    }

    fn encode_runs(&mut self, place: Place, pages: &[u8], raw: impl Fn(Range<usize>) -> Bytes) -> Vec<EncodedFrame> {
        assert!(pages.len().is_multiple_of(PAGE_SIZE), "{} bytes are not whole pages", pages.len());
        assert!(place.address.is_multiple_of(PAGE_SIZE as u64), "{:#x} is no page's address", place.address);
        assert!(place.address.checked_add(pages.len() as u64).is_some(), "pages run over the end of memory");
        let mut frames = Vec::new();
        for run in zero::runs(pages) {
            for part in parts(run.pages) {
                let frame = if run.zero {
                    self.tally.zero_pages += part.len() as u64;
                    (place.zero(&part), None)
                } else {
                    self.encode_busy(place, pages, part, &raw)
                };
                frames.push(frame);
            }
        }
        frames
    }

    fn encode_busy(
        &mut self,
        place: Place,
        pages: &[u8],
        part: Range<usize>,
        raw: impl Fn(Range<usize>) -> Bytes,
    ) -> EncodedFrame {
        let bytes = part.start * PAGE_SIZE..part.end * PAGE_SIZE;
        let count = part.len() as u64;
        let mut header = place.raw(&part);
        let payload = if let Some(payload) = self.compress(&pages[bytes.clone()]) {
            self.tally.zstd_pages += count;
            // Smaller than the pages, so smaller than 4 GiB by far.
            header.length = payload.len() as u32;
            header.encoding = ENCODING_ZSTD;
            header.with_checksum(&payload).paired(payload)
        } else {
            self.tally.raw_pages += count;
            let payload = raw(bytes);
            match self.checksums {
                ChecksumPolicy::Compressed => header.paired(payload),
                ChecksumPolicy::Every => header.with_checksum(&payload).paired(payload),
            }
        };
        self.tally.payload_bytes += payload.1.as_ref().map_or(0, |bytes| bytes.len() as u64);
        payload
    }

    /// Compresses one run, or says by `None` that it goes as it is.
    fn compress(&mut self, pages: &[u8]) -> Option<Bytes> {
        match self.compression {
            Compression::Off => None,
            Compression::Level(level) => self.compressor.get_or_insert_with(Compressor::new).whole(level, pages),
            Compression::Adaptive => {
                let level = self.judgement.level()?;
                if !self.judgement.may_try() {
                    return None;
                }
                let compressor = self.compressor.get_or_insert_with(Compressor::new);
                let smaller = compressor.promises(level, pages).then(|| compressor.whole(level, pages)).flatten();
                match &smaller {
                    Some(payload) => self.judgement.shrank(level, pages.len() as f64 / payload.len() as f64),
                    None => self.judgement.stayed(),
                }
                smaller
            }
        }
    }
}

impl FrameHeader {
    fn paired(self, payload: Bytes) -> EncodedFrame {
        (self, Some(payload))
    }
}

/// Where the first page of a buffer belongs.
#[derive(Clone, Copy)]
struct Place {
    space: u32,
    address: u64,
    id: u64,
}

impl Place {
    fn zero(self, part: &Range<usize>) -> FrameHeader {
        FrameHeader::zero_pages(self.space, self.at(part), part.len() as u32, self.id)
    }

    fn raw(self, part: &Range<usize>) -> FrameHeader {
        FrameHeader::raw_pages(self.space, self.at(part), part.len() as u32, self.id)
    }

    fn at(self, part: &Range<usize>) -> u64 {
        self.address + (part.start * PAGE_SIZE) as u64
    }
}

/// Cuts a run into parts no longer than a frame may be.
fn parts(run: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let most = Limits::FRAME_PAGES as usize;
    run.clone().step_by(most).map(move |start| start..run.end.min(start + most))
}

/// A zstd context that is kept (making one costs more than a small run does) and room for its output.
struct Compressor {
    context: CCtx<'static>,
    level: Option<i32>,
    output: Vec<u8>,
}

impl Compressor {
    fn new() -> Self {
        Self { context: CCtx::create(), level: None, output: vec![0; Limits::FRAME_BYTES] }
    }

    /// Says whether a sample of `pages` shrinks; short runs are their own sample.
    fn promises(&mut self, level: i32, pages: &[u8]) -> bool {
        if pages.len() <= SAMPLED_ABOVE {
            return true;
        }
        let middle = (pages.len() - SAMPLE) / 2;
        self.shrink(level, &pages[middle..middle + SAMPLE]).is_some()
    }

    fn whole(&mut self, level: i32, pages: &[u8]) -> Option<Bytes> {
        self.shrink(level, pages).map(Bytes::copy_from_slice)
    }

    /// Compresses to at most seven eighths, or not at all: less is not worth the peer's time.
    fn shrink(&mut self, level: i32, pages: &[u8]) -> Option<&[u8]> {
        if self.level != Some(level) {
            self.context.set_parameter(CParameter::CompressionLevel(level)).ok()?;
            self.level = Some(level);
        }
        let room = self.output.get_mut(..pages.len() / 8 * 7)?;
        // The one failure there is in practice is that the room is too small.
        let length = self.context.compress2(room, pages).ok()?;
        self.output.get(..length)
    }
}
