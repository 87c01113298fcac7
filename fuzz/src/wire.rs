//! What comes over a link: frames, pages, and every message.

use crate::targets::Decoder;
use bytes::Bytes;
use godwit_proto::wire::{self, MessageType};
use godwit_proto::{Message, Typed, decode};
use godwit_resources::host;
use godwit_stream::{FrameHeader, HEADER_SIZE, KIND_MESSAGE, Limits, Scratch, decode_message, decode_pages};

/// Its decoders, by name.
pub(crate) const ALL: &[(&str, Decoder)] = &[("stream", stream), ("message", message)];

/// What comes on the one stream of a link, as a receiver takes it apart: frame after frame, until one is none.
fn stream(mut bytes: &[u8]) -> usize {
    let mut scratch = Scratch::new();
    let mut frames = 0;
    while let Some((head, rest)) = bytes.split_first_chunk::<HEADER_SIZE>() {
        let Ok(header) = FrameHeader::decode(head) else { break };
        assert!(header.length as usize <= Limits::MESSAGE_BYTES.max(Limits::FRAME_BYTES), "a length is capped");
        assert_eq!(header.encode().ok().as_ref(), Some(head), "a header that is read is written the same");
        let Some((payload, rest)) = rest.split_at_checked(header.length as usize) else { break };
        let payload = Bytes::copy_from_slice(payload);
        if header.kind == KIND_MESSAGE {
            let Ok(payload) = decode_message(&header, payload) else { break };
            frames += 1 + understood(header.space, &payload);
        } else {
            let Ok(pages) = decode_pages(&header, payload, &mut scratch) else { break };
            assert_eq!(pages.len(), header.page_bytes(), "exactly the promised pages come out");
            frames += 1;
        }
        bytes = rest;
    }
    frames
}

/// A message whose type stands in one byte before it.
fn message(bytes: &[u8]) -> usize {
    bytes.split_first().map_or(0, |(&kind, payload)| understood(kind.into(), payload))
}

/// Whether what a message says is written again as it was understood.
fn whole<M: Typed + PartialEq>(bytes: &[u8]) -> Option<M> {
    let message: M = decode(bytes).ok()?;
    let again = M::decode(message.encode_to_vec().as_slice());
    assert!(again.is_ok(), "{:?} is not read as it was written", M::TYPE);
    Some(message)
}

fn understood(kind: u32, bytes: &[u8]) -> usize {
    use MessageType as T;
    let fields = |length: Option<usize>| length.map_or(0, |length| 1 + length.ilog2().min(20) as usize);
    macro_rules! plain {
        ($($message:ident),*) => {
            match MessageType::try_from(kind as i32) {
                Ok(T::Unspecified) | Err(_) => 0,
                Ok(T::Welcome) => fields(whole::<wire::Welcome>(bytes).map(|welcome| 1 + suits(&welcome))),
                $(Ok(T::$message) => fields(whole::<wire::$message>(bytes).map(|message| 1 + message.encoded_len())),)*
            }
        };
    }
    plain!(
        Hello,
        ClockPing,
        ClockPong,
        Probe,
        ProbeReply,
        Prepare,
        Prepared,
        Layout,
        Drop,
        RoundEnd,
        RoundAck,
        Final,
        Ready,
        Commit,
        Running,
        Abort,
        Failure,
        PageRequest,
        Drained,
        DrainedAck,
        Streams,
        Packets,
        Offer,
        HandOver,
        Query,
        Verdict,
        Over
    )
}

/// What a source makes of the facts of a host.
fn suits(welcome: &wire::Welcome) -> usize {
    let theirs = welcome.host.clone().unwrap_or_default();
    host::compare(&wire::HostFacts { page_size: 4096, ..wire::HostFacts::default() }, &theirs).len()
}
