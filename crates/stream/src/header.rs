//! The frame header: 40 bytes, little endian, fixed width, every field checked both ways.
//!
//! It is laid out by bincode with fixed-size integers, behind this module alone. Nothing in it has a length of
//! its own, so a hostile header can ask for nothing but what [`FrameHeader::validate`] lets through.

use bincode::{Decode, Encode};

use crate::error::{Error, Result};

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;
/// Bytes in an encoded [`FrameHeader`].
pub const HEADER_SIZE: usize = 40;

/// Frame kind: a message, opaque here.
pub const KIND_MESSAGE: u8 = 1;
/// Frame kind: a run of pages.
pub const KIND_PAGES: u8 = 2;

/// Encoding: the payload as it is.
pub const ENCODING_RAW: u8 = 0;
/// Encoding: pages of zeroes, no payload.
pub const ENCODING_ZERO: u8 = 1;
/// Encoding: one zstd frame, smaller than the pages it stands for.
pub const ENCODING_ZSTD: u8 = 2;

/// Flag: the `checksum` field holds the payload's xxh3.
pub const FLAG_CHECKSUM: u16 = 1;
/// Flags the application may use as it likes; those neither here nor [`FLAG_CHECKSUM`] are reserved.
pub const FLAGS_APPLICATION: u16 = 0xff00;

/// Sizes no frame exceeds.
#[derive(Debug)]
pub struct Limits;

impl Limits {
    /// Bytes in the payload of a message.
    pub const MESSAGE_BYTES: usize = 16 << 20;
    /// Pages in one frame.
    pub const FRAME_PAGES: u32 = 512;
    /// Bytes of pages in one frame.
    pub const FRAME_BYTES: usize = Self::FRAME_PAGES as usize * PAGE_SIZE;
}

const LAYOUT: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Fixint,
    bincode::config::Limit<HEADER_SIZE>,
> = bincode::config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<HEADER_SIZE>();

/// What precedes each payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct FrameHeader {
    /// [`KIND_MESSAGE`] or [`KIND_PAGES`].
    pub kind: u8,
    /// [`ENCODING_RAW`], [`ENCODING_ZERO`] or [`ENCODING_ZSTD`].
    pub encoding: u8,
    /// [`FLAG_CHECKSUM`] and whatever of [`FLAGS_APPLICATION`] the application sets.
    pub flags: u16,
    /// Pages: 0 is the process's address space, above 0 the number of a shared object. Message: its type.
    pub space: u32,
    /// Pages: virtual address, or byte offset in the object. Message: 0.
    pub address: u64,
    /// Pages: how many, 1 to [`Limits::FRAME_PAGES`]. Message: 0.
    pub pages: u32,
    /// Bytes of payload that follow.
    pub length: u32,
    /// xxh3 (64 bits) of the payload as it travels, or 0 without [`FLAG_CHECKSUM`].
    pub checksum: u64,
    /// Free for the application: the number of a request, for example.
    pub id: u64,
}

impl FrameHeader {
    /// Describes a message of `length` payload bytes.
    pub fn message(message_type: u32, id: u64, length: u32) -> Self {
        Self {
            kind: KIND_MESSAGE,
            encoding: ENCODING_RAW,
            flags: 0,
            space: message_type,
            address: 0,
            pages: 0,
            length,
            checksum: 0,
            id,
        }
    }

    /// Describes `pages` pages that travel as they are.
    pub fn raw_pages(space: u32, address: u64, pages: u32, id: u64) -> Self {
        Self {
            kind: KIND_PAGES,
            encoding: ENCODING_RAW,
            flags: 0,
            space,
            address,
            pages,
            length: pages.saturating_mul(PAGE_SIZE as u32),
            checksum: 0,
            id,
        }
    }

    /// Describes `pages` pages of zeroes.
    pub fn zero_pages(space: u32, address: u64, pages: u32, id: u64) -> Self {
        Self { encoding: ENCODING_ZERO, length: 0, ..Self::raw_pages(space, address, pages, id) }
    }

    /// Adds the checksum of `payload`.
    #[must_use]
    pub fn with_checksum(mut self, payload: &[u8]) -> Self {
        self.flags |= FLAG_CHECKSUM;
        self.checksum = checksum(payload);
        self
    }

    /// Says whether the header carries a checksum.
    pub fn has_checksum(&self) -> bool {
        self.flags & FLAG_CHECKSUM != 0
    }

    /// Counts the bytes of memory the frame's pages cover; 0 for a message.
    pub fn page_bytes(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }

    /// Lays the header out.
    ///
    /// # Errors
    /// When a field is out of range: what the peer would refuse is not sent either.
    pub fn encode(&self) -> Result<[u8; HEADER_SIZE]> {
        self.validate()?;
        let mut bytes = [0; HEADER_SIZE];
        let written = bincode::encode_into_slice(self, &mut bytes, LAYOUT);
        // Fixed-width fields into a buffer of exactly their sum: anything else is a mistake in this file.
        assert!(matches!(written, Ok(HEADER_SIZE)), "a header is {HEADER_SIZE} bytes");
        Ok(bytes)
    }

    /// Reads a header from the first [`HEADER_SIZE`] bytes of `bytes` and checks every field.
    ///
    /// # Errors
    /// Whatever does not hold, by field.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let layout = |source| Error::HeaderLayout { length: bytes.len(), source };
        let exact = bytes.get(..HEADER_SIZE).ok_or_else(|| layout(None))?;
        let (header, consumed): (Self, usize) =
            bincode::decode_from_slice(exact, LAYOUT).map_err(|source| layout(Some(source)))?;
        if consumed != HEADER_SIZE {
            return Err(layout(None));
        }
        header.validate()?;
        Ok(header)
    }

    /// Checks every field against the others and against [`Limits`].
    ///
    /// # Errors
    /// Names the first field that does not hold.
    pub fn validate(&self) -> Result<()> {
        if self.flags & !(FLAG_CHECKSUM | FLAGS_APPLICATION) != 0 {
            return Err(Error::Flags(self.flags));
        }
        if self.checksum != 0 && !self.has_checksum() {
            return Err(Error::StrayChecksum(self.checksum));
        }
        match self.kind {
            KIND_MESSAGE => self.validate_message(),
            KIND_PAGES => self.validate_pages(),
            kind => Err(Error::Kind(kind)),
        }
    }

    fn validate_message(&self) -> Result<()> {
        if self.encoding != ENCODING_RAW {
            return Err(self.bad_encoding());
        }
        if self.pages != 0 {
            return Err(Error::Pages { kind: self.kind, pages: self.pages });
        }
        if self.address != 0 {
            return Err(Error::Address { address: self.address, pages: 0 });
        }
        if self.length as usize > Limits::MESSAGE_BYTES {
            return Err(self.bad_length());
        }
        Ok(())
    }

    fn validate_pages(&self) -> Result<()> {
        if self.pages == 0 || self.pages > Limits::FRAME_PAGES {
            return Err(Error::Pages { kind: self.kind, pages: self.pages });
        }
        let aligned = self.address.is_multiple_of(PAGE_SIZE as u64);
        if !aligned || self.address.checked_add(self.page_bytes() as u64).is_none() {
            return Err(Error::Address { address: self.address, pages: self.pages });
        }
        let length = self.length as usize;
        let fits = match self.encoding {
            ENCODING_RAW => length == self.page_bytes(),
            ENCODING_ZERO => length == 0,
            ENCODING_ZSTD => length > 0 && length < self.page_bytes(),
            _ => return Err(self.bad_encoding()),
        };
        if !fits {
            return Err(self.bad_length());
        }
        if self.encoding == ENCODING_ZERO && self.has_checksum() {
            return Err(Error::StrayChecksum(self.checksum));
        }
        Ok(())
    }

    fn bad_encoding(&self) -> Error {
        Error::Encoding { kind: self.kind, encoding: self.encoding }
    }

    fn bad_length(&self) -> Error {
        Error::Length { kind: self.kind, encoding: self.encoding, pages: self.pages, length: self.length }
    }
}

/// Computes the checksum of a payload as it travels: xxh3, 64 bits, no seed.
pub fn checksum(payload: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(payload)
}
