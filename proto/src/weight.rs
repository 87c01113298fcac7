//! How much memory a message takes, found out before any of it is set aside.
//!
//! Two bytes of a message can say that there is one more file, and one more file is a kilobyte of memory: what a peer may send
//! in one frame would otherwise decode to several gigabytes. So the message is walked through first, by its schema, without
//! keeping anything.

use std::fmt;

use prost::{DecodeError, Message};

/// Bytes that a message may take in memory. As many threads, mappings and files as there can be take less than half of it.
pub const HEAVIEST: usize = 256 << 20;
/// Messages within messages, at most; the schema has no more.
const DEEPEST: usize = 16;

/// What a message is made of.
#[derive(Debug)]
pub struct Shape {
    /// Bytes of it alone, in memory.
    size: usize,
    /// Fields that take more memory than their bytes in the message, by number.
    parts: &'static [(u64, Part)],
}

#[derive(Debug)]
enum Part {
    Message(&'static Shape),
    /// Numbers in a row, perhaps one byte each.
    Numbers,
}

/// Messages that know their shape: all of them.
pub trait Shaped {
    /// It.
    const SHAPE: &'static Shape;
}

include!(concat!(env!("OUT_DIR"), "/shapes.rs"));

/// Why a message was not decoded.
#[derive(Debug)]
pub enum Refused {
    /// It is no such message.
    Malformed(DecodeError),
    /// It would take more than [`HEAVIEST`] bytes, or has fields that no message has.
    Heavy,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(_) => f.write_str("a message makes no sense"),
            Self::Heavy => write!(f, "a message would take more than {} MiB of memory", HEAVIEST >> 20),
        }
    }
}

impl std::error::Error for Refused {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Malformed(error) => Some(error),
            Self::Heavy => None,
        }
    }
}

/// Decodes a message of a peer. Takes no more memory than [`HEAVIEST`], and what collections set aside for growing.
///
/// # Errors
/// When it is malformed or would take more.
pub fn decode<M: Message + Shaped + Default>(bytes: &[u8]) -> Result<M, Refused> {
    let mut left = HEAVIEST;
    match weigh(M::SHAPE, bytes, DEEPEST, &mut left) {
        // What is cut short is for the decoder to complain of, which stops at the same place.
        Walked::Whole | Walked::CutShort => M::decode(bytes).map_err(Refused::Malformed),
        Walked::TooHeavy => Err(Refused::Heavy),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Walked {
    Whole,
    CutShort,
    TooHeavy,
}

/// Takes what a message needs from what is `left`.
fn weigh(shape: &Shape, mut bytes: &[u8], depth: usize, left: &mut usize) -> Walked {
    let mut take = |amount: usize| left.checked_sub(amount).map(|rest| *left = rest).is_some();
    if depth == 0 || !take(shape.size) {
        return Walked::TooHeavy;
    }
    while !bytes.is_empty() {
        let Some(key) = varint(&mut bytes) else { return Walked::CutShort };
        let wire_type = key & 7;
        let length = match wire_type {
            0 => {
                if varint(&mut bytes).is_none() {
                    return Walked::CutShort;
                }
                0
            }
            1 => 8,
            2 => match varint(&mut bytes).map(usize::try_from) {
                Some(Ok(length)) => length,
                _ => return Walked::CutShort,
            },
            5 => 4,
            // N.B. groups: the decoder skips those it does not know and goes on behind them.
            _ => return Walked::TooHeavy,
        };
        let Some((content, rest)) = bytes.split_at_checked(length) else { return Walked::CutShort };
        bytes = rest;
        let part = shape.parts.iter().find(|(number, _)| *number == key >> 3).map(|(_, part)| part);
        let walked = match part {
            Some(Part::Message(shape)) if wire_type == 2 => weigh(shape, content, depth - 1, left),
            Some(Part::Numbers) => charge(left, (content.len().max(1)).saturating_mul(size_of::<u64>())),
            _ if wire_type == 2 => charge(left, content.len() + size_of::<Vec<u8>>()),
            _ => Walked::Whole,
        };
        if walked != Walked::Whole {
            return walked;
        }
    }
    Walked::Whole
}

fn charge(left: &mut usize, amount: usize) -> Walked {
    match left.checked_sub(amount) {
        Some(rest) => {
            *left = rest;
            Walked::Whole
        }
        None => Walked::TooHeavy,
    }
}

/// Takes a number of up to ten bytes from the front.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for (at, &byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte < 0x80 {
            *bytes = &bytes[at + 1..];
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::FileEntry;
    use crate::wire::{Final, Prepare, Probe, SharedObject};

    #[test]
    fn a_message_of_nothing_but_beginnings_is_refused_before_it_takes_memory() {
        // Field 6: a file, of no bytes.
        let files = [0x32, 0].repeat(8 << 20);
        assert!(matches!(decode::<Final>(&files), Err(Refused::Heavy)));
        let few = [0x32, 0].repeat(1000);
        assert_eq!(decode::<Final>(&few).unwrap().files.len(), 1000);
        // The same one level down, and numbers of one byte each.
        let facts = [&[0x0a, 0x80, 0x80, 0x80, 0x06][..], &[0x32, 0].repeat(6 << 20)].concat();
        assert!(matches!(decode::<Probe>(&facts), Err(Refused::Heavy)));
    }

    #[test]
    fn what_is_measured_is_what_it_takes() {
        let prepare = Prepare {
            objects: vec![SharedObject::default(); 10],
            files: vec![FileEntry::default(); 10],
            ..Prepare::default()
        };
        let mut left = HEAVIEST;
        assert!(weigh(Prepare::SHAPE, &prepare.encode_to_vec(), DEEPEST, &mut left) == Walked::Whole);
        let least = size_of::<Prepare>() + 10 * (size_of::<SharedObject>() + size_of::<FileEntry>());
        assert!((least..2 * least).contains(&(HEAVIEST - left)));
        assert_eq!(decode::<Prepare>(&prepare.encode_to_vec()).unwrap(), prepare);
    }

    #[test]
    fn groups_and_cuts_are_refused() {
        assert!(matches!(decode::<Prepare>(&[0x0b, 0x0c]), Err(Refused::Heavy)));
        assert!(matches!(decode::<Prepare>(&[0x0a, 9, 1]), Err(Refused::Malformed(_))));
        assert!(matches!(decode::<Prepare>(&[0xff; 11]), Err(Refused::Malformed(_))));
    }
}
