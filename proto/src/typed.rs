//! Which number a message carries in its frame header; nothing here reads or writes frames.

use crate::wire::{self, MessageType};

/// Names the frame number of a message, so that sender and receiver cannot disagree about it.
pub trait Typed: prost::Message + crate::Shaped + Default {
    /// The number that stands in the header of a frame with this message.
    const TYPE: MessageType;
}

macro_rules! typed {
    ($($message:ident),* $(,)?) => {
        $(impl Typed for wire::$message {
            const TYPE: MessageType = MessageType::$message;
        })*
    };
}

typed!(
    Hello,
    Welcome,
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
    Over,
);
