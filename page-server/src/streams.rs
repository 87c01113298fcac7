//! What waits in connections, as it comes in pieces.

use anyhow::{Context, Result, bail};
use godwit_proto::image::InetSkEntry;
use godwit_proto::{Message, wire};
use std::collections::HashMap;

/// Bytes in all queues together that are taken in, at most.
const MAX_BYTES: usize = 1 << 30;
/// Connections, at most: as many as there can be descriptors.
const MAX_CONNECTIONS: usize = 1 << 20;

/// Connections whose content has arrived, wholly or in part.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    whole: wire::Streams,
    /// Where each is; `None` if it was taken out.
    places: HashMap<u32, Option<usize>>,
    bytes: usize,
    option_sets: usize,
    sockets: usize,
    /// Sockets that were told of in advance, by their numbers.
    expected: HashMap<u32, InetSkEntry>,
}

impl Streams {
    /// Takes in what a message has.
    pub(crate) fn add(&mut self, message: wire::Streams) -> Result<()> {
        let sets: usize = message.option_sets.iter().map(Message::encoded_len).sum();
        let sockets: usize = message.sockets.iter().map(|socket| socket.encoded_len() + size_of::<InetSkEntry>()).sum();
        self.bytes = self.bytes.saturating_add(sets).saturating_add(sockets);
        self.option_sets += message.option_sets.len();
        self.whole.option_sets.extend(message.option_sets);
        if self.option_sets > MAX_CONNECTIONS {
            bail!("more than {MAX_CONNECTIONS} sets of socket options");
        }
        self.expect(message.expected)?;
        self.sockets += message.sockets.len();
        if self.sockets > MAX_CONNECTIONS || self.bytes > MAX_BYTES {
            bail!("more than {MAX_CONNECTIONS} sockets, or than {} MiB of them", MAX_BYTES >> 20);
        }
        self.whole.sockets.extend(message.sockets);
        self.whole.streams.reserve(message.streams.len());
        self.whole.sockets.reserve(message.streams.iter().filter(|stream| stream.expected != 0).count());
        for piece in message.streams {
            let alone = if piece.entry.is_some() { size_of::<wire::StreamContent>() } else { 0 };
            self.bytes = self.bytes.saturating_add(piece.encoded_len() + alone);
            if self.bytes > MAX_BYTES || self.places.len() > MAX_CONNECTIONS {
                bail!("the connections hold more than {} MiB that were not read or acknowledged", MAX_BYTES >> 20);
            }
            match (self.places.get(&piece.id), &piece.entry) {
                (Some(_), Some(_)) => bail!("connection {} was described twice", piece.id),
                (None, None) => bail!("connection {} was not described", piece.id),
                (Some(None), None) => bail!("connection {} was complete", piece.id),
                (Some(&Some(place)), None) => {
                    self.whole.streams[place].received.extend(piece.received);
                    self.whole.streams[place].sent.extend(piece.sent);
                }
                (None, Some(_)) => {
                    if piece.expected != 0 {
                        let socket = self.expected.remove(&piece.expected);
                        let socket = socket.with_context(|| format!("connection {} was not expected", piece.id))?;
                        self.whole.sockets.push(InetSkEntry { id: piece.id, ..socket });
                    }
                    self.places.insert(piece.id, Some(self.whole.streams.len()));
                    self.whole.streams.push(piece);
                }
            }
        }
        Ok(())
    }

    fn expect(&mut self, expected: Vec<wire::ExpectedConnection>) -> Result<()> {
        for mut one in expected {
            self.sockets += 1;
            self.bytes = self.bytes.saturating_add(one.encoded_len() + size_of::<InetSkEntry>());
            if self.sockets > MAX_CONNECTIONS || self.bytes > MAX_BYTES {
                bail!("more than {MAX_CONNECTIONS} sockets, or than {} MiB of them", MAX_BYTES >> 20);
            }
            let socket = one.socket.take().context("an expected connection without a socket")?;
            let number = socket.id;
            // N.B. what is made of it in advance depends on this alone.
            let family = InetSkEntry { family: socket.family, ..InetSkEntry::default() };
            if self.expected.insert(number, socket).is_some() {
                bail!("connection {number} was expected twice");
            }
            self.whole.expected.push(wire::ExpectedConnection { socket: Some(family), ..one });
        }
        Ok(())
    }

    /// Takes out those that are complete, and all sockets. More may come of the last one.
    pub(crate) fn take_complete(&mut self) -> wire::Streams {
        let last = self.whole.streams.pop();
        let complete = std::mem::take(&mut self.whole);
        for stream in &complete.streams {
            self.places.insert(stream.id, None);
        }
        if let Some(last) = last {
            self.places.insert(last.id, Some(0));
            self.whole.streams.push(last);
        }
        complete
    }

    /// All of them.
    pub(crate) fn into_whole(self) -> wire::Streams {
        self.whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_joined_and_nonsense_is_refused() {
        let piece = |id, first: bool, received: &[u8], sent: &[u8]| wire::StreamContent {
            id,
            entry: first.then(Default::default),
            received: received.to_vec(),
            sent: sent.to_vec(),
            ..wire::StreamContent::default()
        };
        let message = |streams| wire::Streams { streams, ..wire::Streams::default() };
        let mut streams = Streams::default();
        streams.add(message(vec![piece(7, true, b"ab", b""), piece(8, true, b"", b"x")])).unwrap();
        streams.add(message(vec![piece(7, false, b"c", b"de")])).unwrap();
        assert!(streams.add(message(vec![piece(7, true, b"", b"")])).is_err());
        assert!(streams.add(message(vec![piece(9, false, b"", b"")])).is_err());
        let complete = streams.take_complete().streams;
        assert_eq!(complete.iter().map(|stream| stream.id).collect::<Vec<_>>(), [7]);
        assert!(streams.add(message(vec![piece(7, false, b"f", b"")])).is_err(), "it is being put together");
        streams.add(message(vec![piece(8, false, b"", b"y"), piece(9, true, b"", b"")])).unwrap();
        let contents = [complete, streams.into_whole().streams].concat();
        assert_eq!((contents[0].received.as_slice(), contents[0].sent.as_slice()), (&b"abc"[..], &b"de"[..]));
        assert_eq!((contents.len(), contents[1].sent.as_slice()), (3, &b"xy"[..]));
    }

    #[test]
    fn what_was_expected_comes_once() {
        let socket = |id| Some(InetSkEntry { id, family: 2, src_port: 80, ..InetSkEntry::default() });
        let expected = |id| wire::ExpectedConnection { socket: socket(id), option_set: 5 };
        let mut streams = Streams::default();
        let told = |expected| wire::Streams { expected, ..wire::Streams::default() };
        streams.add(told(vec![expected(1), expected(2)])).unwrap();
        let known = streams.take_complete();
        assert_eq!((known.sockets.len(), known.expected.len(), known.expected[0].option_set), (0, 2, 5));
        let entry = Some(wire::StreamContent::default().entry.unwrap_or_default());
        let stream = |id, expected| wire::Streams {
            streams: vec![wire::StreamContent { id, expected, entry, ..wire::StreamContent::default() }],
            ..wire::Streams::default()
        };
        streams.add(stream(30, 2)).unwrap();
        let whole = streams.take_complete();
        assert_eq!((whole.sockets[0].id, whole.sockets[0].src_port), (30, 80));
        assert!(streams.add(stream(31, 2)).is_err(), "it has come already");
        assert!(streams.add(stream(32, 3)).is_err(), "it was never told of");
        assert!(streams.add(told(vec![expected(1)])).is_err(), "twice");
        assert!(streams.add(told(vec![wire::ExpectedConnection::default()])).is_err(), "nothing about it");
    }
}
