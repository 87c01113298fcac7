//! What can be wrong with a frame. Every value named here was read from the peer and is shown as it came.

/// Says why bytes are no frame, or a frame's payload no pages.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The header is shorter than its fixed size or does not parse.
    #[error("a frame header is {} bytes, these {length} do not parse as one", crate::HEADER_SIZE)]
    HeaderLayout {
        /// Bytes that were there.
        length: usize,
        /// What the parser said.
        #[source]
        source: Option<bincode::error::DecodeError>,
    },
    /// The frame kind is not known.
    #[error("frame kind {0} is unknown")]
    Kind(u8),
    /// The encoding is not known, or not one for this kind of frame.
    #[error("encoding {encoding} is not one for frames of kind {kind}")]
    Encoding {
        /// Kind of the frame.
        kind: u8,
        /// The encoding it claims.
        encoding: u8,
    },
    /// A reserved flag is set.
    #[error("frame flags {0:#06x} contain reserved ones")]
    Flags(u16),
    /// A checksum is given where the flags say there is none, or for no payload.
    #[error("checksum {0:#018x} is given on a frame that has none")]
    StrayChecksum(u64),
    /// The number of pages is out of range.
    #[error("{pages} pages in a frame of kind {kind}")]
    Pages {
        /// Kind of the frame.
        kind: u8,
        /// Pages it claims.
        pages: u32,
    },
    /// The address is not page aligned, or the pages run over the end of the address space.
    #[error("{pages} pages at {address:#x} are not a range of pages")]
    Address {
        /// First byte.
        address: u64,
        /// Pages from there.
        pages: u32,
    },
    /// The payload's length does not fit the rest of the header, or is above the limit.
    #[error("payload length {length} does not fit a frame of kind {kind}, encoding {encoding}, {pages} pages")]
    Length {
        /// Kind of the frame.
        kind: u8,
        /// Its encoding.
        encoding: u8,
        /// Its pages.
        pages: u32,
        /// The length it claims, in bytes.
        length: u32,
    },
    /// The payload handed over is not as long as the header says.
    #[error("payload is {actual} bytes, the header says {expected}")]
    PayloadLength {
        /// From the header, in bytes.
        expected: u32,
        /// What is there, in bytes.
        actual: usize,
    },
    /// The payload's checksum is not the header's.
    #[error("payload of the frame at {address:#x} has checksum {actual:#018x}, the header says {expected:#018x}")]
    Checksum {
        /// Address field of the frame.
        address: u64,
        /// From the header.
        expected: u64,
        /// Computed.
        actual: u64,
    },
    /// The compressed payload does not inflate to the pages the header promises.
    #[error("compressed pages at {address:#x} do not inflate to {expected} bytes: {reason}")]
    Inflate {
        /// Address field of the frame.
        address: u64,
        /// Bytes promised.
        expected: usize,
        /// What zstd said, or how much came out.
        reason: String,
    },
    /// Pages were asked of a frame that carries a message, or the other way round.
    #[error("a frame of kind {actual} where kind {expected} was needed")]
    WrongKind {
        /// Kind needed.
        expected: u8,
        /// Kind of the frame.
        actual: u8,
    },
}

/// The crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;
