//! The one stream of a link: frames out, frames in, each half for a task of its own.
//!
//! Payloads are not copied on the way out. On the way in one that came in one packet is handed through, a longer one is
//! put together once, in memory that is used again when the frames before it are dropped.

use std::collections::VecDeque;
use std::net::SocketAddr;

use bytes::{Buf, Bytes, BytesMut};
use godwit_stream::{FrameHeader, HEADER_SIZE, KIND_MESSAGE, KIND_PAGES, decode_message};
use quinn::{Connection, RecvStream, SendStream, VarInt};

use crate::error::{CODE_PROTOCOL, Error, Result};

/// Pieces taken from quinn at a time: each time costs the connection's lock.
const PIECES: usize = 32;

/// Both halves.
#[derive(Debug)]
pub struct Channel {
    sender: Sender,
    receiver: Receiver,
}

impl Channel {
    pub(crate) fn new(connection: &Connection, address: SocketAddr, streams: (SendStream, RecvStream)) -> Self {
        let (send, receive) = streams;
        Self {
            sender: Sender { stream: send, address },
            receiver: Receiver {
                connection: connection.clone(),
                address,
                stream: receive,
                pieces: VecDeque::with_capacity(PIECES),
                assembly: BytesMut::new(),
            },
        }
    }

    /// Takes the halves apart.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }
}

/// A frame as it came: the header is valid, the payload as long as it says. Pages are still encoded.
#[derive(Debug, Clone)]
pub struct Frame {
    /// What the payload is.
    pub header: FrameHeader,
    /// The payload.
    pub payload: Bytes,
}

impl Frame {
    /// Gives a message's type, or `None` for pages.
    pub fn message_type(&self) -> Option<u32> {
        (self.header.kind == KIND_MESSAGE).then_some(self.header.space)
    }

    /// Says whether the frame carries pages.
    pub fn is_pages(&self) -> bool {
        self.header.kind == KIND_PAGES
    }
}

/// The half that sends. A send that is dropped half way leaves the stream inside a frame: then only closing is left.
///
/// Dropping it ends the stream as [`Self::finish`] does, without the waiting: a protocol on top that must tell an end
/// from a broken-off start needs a last message.
#[derive(Debug)]
pub struct Sender {
    stream: SendStream,
    address: SocketAddr,
}

impl Sender {
    /// Sends a message; waits while the peer or the path can take no more.
    ///
    /// # Errors
    /// When it is longer than [`godwit_stream::Limits::MESSAGE_BYTES`], or the link has ended.
    pub async fn send_message(&mut self, message_type: u32, id: u64, payload: Bytes) -> Result<()> {
        // A length past 32 bits is over the limit as well, and refused as such.
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        self.send(FrameHeader::message(message_type, id, length), Some(payload)).await
    }

    /// Sends a frame of pages, as [`godwit_stream::PageEncoder`] makes them.
    ///
    /// # Errors
    /// When header and payload do not fit each other or the link has ended.
    pub async fn send_pages(&mut self, header: FrameHeader, payload: Option<Bytes>) -> Result<()> {
        self.send(header, payload).await
    }

    /// Sends frames in order; cheaper than one by one.
    ///
    /// # Errors
    /// As [`Self::send_pages`]; when any frame is invalid none is sent.
    pub async fn send_frames(&mut self, frames: impl IntoIterator<Item = (FrameHeader, Option<Bytes>)>) -> Result<()> {
        let frames = frames.into_iter();
        let count = frames.size_hint().0;
        let mut headers = BytesMut::with_capacity(count * HEADER_SIZE);
        let mut pieces = Vec::with_capacity(2 * count);
        for (header, payload) in frames {
            let payload = payload.unwrap_or_default();
            headers.extend_from_slice(&encode(&header, &payload)?);
            pieces.push(headers.split().freeze());
            if !payload.is_empty() {
                pieces.push(payload);
            }
        }
        self.write(&mut pieces).await
    }

    /// Sends bytes that need be no frame: for tests of what the other side makes of them.
    ///
    /// # Errors
    /// When the link has ended.
    #[doc(hidden)]
    pub async fn send_bytes(&mut self, bytes: Bytes) -> Result<()> {
        self.write(&mut [bytes]).await
    }

    async fn send(&mut self, header: FrameHeader, payload: Option<Bytes>) -> Result<()> {
        let payload = payload.unwrap_or_default();
        let header = Bytes::copy_from_slice(&encode(&header, &payload)?);
        if payload.is_empty() { self.write(&mut [header]).await } else { self.write(&mut [header, payload]).await }
    }

    async fn write(&mut self, pieces: &mut [Bytes]) -> Result<()> {
        self.stream.write_all_chunks(pieces).await.map_err(|source| Error::write(self.address, source))
    }

    /// Says that nothing more will come, and waits until the peer's host has acknowledged all there was. The link may
    /// be closed after that without losing anything.
    ///
    /// # Errors
    /// When the link ends before.
    pub async fn finish(&mut self) -> Result<()> {
        self.stream.finish().map_err(|_| Error::Closed)?;
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => {
                Err(Error::PeerClosed { code: code.into_inner(), reason: "the peer reads no more".into() })
            }
            Err(quinn::StoppedError::ConnectionLost(source)) => {
                Err(Error::connection(self.address, "finishing", source))
            }
            Err(source) => Err(Error::Lost { address: self.address, source: source.into() }),
        }
    }
}

/// Lays a header out after checking it against its payload.
fn encode(header: &FrameHeader, payload: &Bytes) -> Result<[u8; HEADER_SIZE]> {
    if header.length as usize != payload.len() {
        let (expected, actual) = (header.length, payload.len());
        return Err(godwit_stream::Error::PayloadLength { expected, actual }.into());
    }
    Ok(header.encode()?)
}

/// The half that receives; one task reads it, and does not give up in the middle of a [`Self::receive`].
#[derive(Debug)]
pub struct Receiver {
    connection: Connection,
    address: SocketAddr,
    stream: RecvStream,
    /// Bytes that have come and are not used, in order; none of the pieces is empty.
    pieces: VecDeque<Bytes>,
    assembly: BytesMut,
}

impl Receiver {
    /// Waits for the next frame; `None` when the peer has finished.
    ///
    /// # Errors
    /// When the link ends before, or what came is no frame: then the link is closed with
    /// [`CODE_PROTOCOL`](crate::CODE_PROTOCOL).
    pub async fn receive(&mut self) -> Result<Option<Frame>> {
        let Some(header) = self.header().await? else {
            return Ok(None);
        };
        let header = FrameHeader::decode(&header).map_err(|source| self.violated(source))?;
        let payload = self.payload(header.length as usize).await?;
        if header.kind == KIND_MESSAGE {
            // Pages are checked where they are decoded, on a thread that may take its time.
            let payload = decode_message(&header, payload).map_err(|source| self.violated(source))?;
            return Ok(Some(Frame { header, payload }));
        }
        Ok(Some(Frame { header, payload }))
    }

    /// Takes the bytes of a header, or `None` when the stream ends before the first of them.
    async fn header(&mut self) -> Result<Option<[u8; HEADER_SIZE]>> {
        let mut header = [0; HEADER_SIZE];
        let mut filled = 0;
        while filled < HEADER_SIZE {
            match self.piece().await? {
                Some(piece) => {
                    let length = piece.len().min(HEADER_SIZE - filled);
                    piece.split_to(length).copy_to_slice(&mut header[filled..filled + length]);
                    filled += length;
                }
                None if filled == 0 => return Ok(None),
                None => return Err(self.violated("the stream ends inside a header")),
            }
        }
        Ok(Some(header))
    }

    /// Takes `length` bytes, which the header's check has capped.
    async fn payload(&mut self, length: usize) -> Result<Bytes> {
        if length == 0 {
            return Ok(Bytes::new());
        }
        let Some(piece) = self.piece().await? else {
            return Err(self.violated("the stream ends before a payload"));
        };
        if piece.len() >= length {
            return Ok(piece.split_to(length));
        }
        self.assembly.reserve(length);
        while self.assembly.len() < length {
            let missing = length - self.assembly.len();
            let Some(piece) = self.piece().await? else {
                return Err(self.violated("the stream ends inside a payload"));
            };
            let part = piece.split_to(piece.len().min(missing));
            self.assembly.extend_from_slice(&part);
        }
        Ok(self.assembly.split().freeze())
    }

    /// Gives the first piece that is not used up, waiting for more when there is none; `None` at the stream's end.
    async fn piece(&mut self) -> Result<Option<&mut Bytes>> {
        if self.pieces.front().is_some_and(Bytes::is_empty) {
            self.pieces.pop_front();
        }
        while self.pieces.is_empty() {
            let mut arrived = [const { Bytes::new() }; PIECES];
            let read = self.stream.read_chunks(&mut arrived).await;
            let Some(count) = read.map_err(|source| Error::read(self.address, source))? else {
                return Ok(None);
            };
            self.pieces.extend(arrived.into_iter().take(count).filter(|piece| !piece.is_empty()));
        }
        Ok(self.pieces.front_mut())
    }

    fn violated(&self, what: impl ToString) -> Error {
        let what = what.to_string();
        self.connection.close(VarInt::from_u32(CODE_PROTOCOL), what.as_bytes());
        Error::Protocol { address: self.address, what }
    }
}
