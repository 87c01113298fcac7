//! The list of targets.

use crate::{journal, proc_text, wire};

/// What is understood of some bytes, as a number.
pub(crate) type Decoder = fn(&[u8]) -> usize;

/// One decoder.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of the folders of its examples and crashes.
    pub name: &'static str,
    /// Bytes of memory that it may take, whatever the input.
    pub memory: usize,
    /// Decodes; returns how much was understood.
    pub(crate) decode: Decoder,
}

/// Memory for what reads a few kilobytes of text or attributes.
const LITTLE: usize = 32 << 20;
/// Memory for a message: what is admitted, and what collections set aside while they grow.
const MESSAGE: usize = 3 * godwit_proto::HEAVIEST + (64 << 20);

/// All targets.
#[must_use]
pub fn all() -> Vec<Target> {
    let crates = [
        godwit_carry::decoders::ALL,
        godwit_fault::decoders::ALL,
        godwit_network::decoders::ALL,
        godwit_rebuild::decoders::ALL,
        godwit_resources::decoders::ALL,
        proc_text::ALL,
        journal::ALL,
    ];
    let texts = crates.into_iter().flatten().map(|&(name, decode)| {
        let decodes_messages = ["state", "order", "layouts", "page-ranges", "network-namespace"].contains(&name);
        Target { name, memory: if decodes_messages { MESSAGE } else { LITTLE }, decode }
    });
    let messages = wire::ALL.iter().map(|&(name, decode)| Target { name, memory: MESSAGE, decode });
    texts.chain(messages).collect()
}

/// The target of that name.
#[must_use]
pub fn named(name: &str) -> Option<Target> {
    all().into_iter().find(|target| target.name == name)
}
