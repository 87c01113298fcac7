//! Damaging examples: bytes, numbers, lengths, and whole parts.

/// Inputs do not grow beyond this.
const LONGEST: usize = 1 << 20;
/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0xff,
    0xfff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_f000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];
/// Words that stand in text.
const WORDS: [&str; 14] = [
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "ffffffffffffffff",
    "-1",
    "..",
    "/../",
    "\0",
    " - ",
    "\\777",
    "\n",
    ":",
    "\u{fffd}é",
    "unlimited",
];

/// Numbers without a pattern, from a seed (xorshift).
#[derive(Debug)]
pub struct Chance(u64);

impl Chance {
    /// Begins with a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// The next of them.
    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// One of the numbers below `limit`, or 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.roll() >> 11) as usize % limit.max(1)
    }
}

/// Makes an input out of one example, and sometimes parts of another.
#[must_use]
pub fn damaged(chance: &mut Chance, example: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = example.to_vec();
    for _ in 0..=chance.below(6) {
        once(chance, &mut bytes, other);
    }
    bytes.truncate(LONGEST);
    bytes
}

fn once(chance: &mut Chance, bytes: &mut Vec<u8>, other: &[u8]) {
    let at = chance.below(bytes.len());
    let length = 1 + chance.below(16);
    let end = (at + length).min(bytes.len());
    match chance.below(12) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << chance.below(8),
        1 if !bytes.is_empty() => bytes[at] = chance.roll() as u8,
        2 => drop(bytes.drain(at..end)),
        3 => {
            let copy = bytes[at..end].to_vec();
            bytes.splice(at..at, copy);
        }
        4 => bytes.truncate(at),
        // A number of some width in the middle of others.
        5 | 6 => {
            let edge = EDGES[chance.below(EDGES.len())].wrapping_add(chance.below(3) as u64).to_le_bytes();
            let width = 1 << chance.below(4);
            overwrite(bytes, at, &edge[..width]);
        }
        // A number as protocol buffers have it.
        7 => {
            let number = varint(EDGES[chance.below(EDGES.len())]);
            bytes.splice(at..(at + 1).min(bytes.len()), number);
        }
        8 => drop(bytes.splice(at..end, WORDS[chance.below(WORDS.len())].bytes())),
        9 => drop(bytes.splice(at..at, WORDS[chance.below(WORDS.len())].bytes())),
        // A part of another example.
        10 if !other.is_empty() => {
            let from = chance.below(other.len());
            let to = (from + 1 + chance.below(256)).min(other.len());
            drop(bytes.splice(at..end, other[from..to].iter().copied()));
        }
        // The same part over and over.
        _ => {
            let part = bytes[at..end].to_vec();
            let scale = chance.below(12);
            let times = 1 + chance.below(1 << scale);
            bytes.splice(at..at, part.iter().copied().cycle().take((part.len() * times).min(LONGEST)));
        }
    }
}

fn overwrite(bytes: &mut Vec<u8>, at: usize, with: &[u8]) {
    let end = (at + with.len()).min(bytes.len());
    bytes.splice(at..end, with.iter().copied());
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}
