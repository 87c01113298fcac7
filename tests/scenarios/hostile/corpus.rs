//! Examples for the fuzzer out of real migrations: `GODWIT_CORPUS=fuzz/corpus cargo nextest run -p godwit-tests --run-ignored all corpus`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use godwit_proto::wire::{self, MessageType};
use godwit_proto::{Message, Typed};
use godwit_tests::{Mode, Said, TwoHosts, victim_program};

use super::record;

/// Longest example of a stream in bytes.
const LONGEST: usize = 12 << 10;

/// Where examples go.
struct Corpus {
    folder: PathBuf,
    scrubbed: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Corpus {
    fn keep(&self, target: &str, name: &str, bytes: &[u8]) -> Result<()> {
        let mut bytes = bytes.to_vec();
        for (found, instead) in &self.scrubbed {
            replace(&mut bytes, found, instead);
        }
        if target == "stream" {
            bytes.truncate(LONGEST);
        }
        let folder = self.folder.join(target);
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(name), bytes).with_context(|| folder.display().to_string())
    }

    fn keep_message<M: Message>(&self, target: &str, name: &str, message: &M) -> Result<()> {
        self.keep(target, name, &message.encode_to_vec())
    }

    /// Keeps one of each message that was said, and what both sides said as they said it.
    fn keep_words(&self, name: &str, words: &[Said]) -> Result<()> {
        let mut streams: HashMap<(bool, u16), Vec<u8>> = HashMap::new();
        for said in words {
            let stream = streams.entry((said.by == godwit_tests::Speaker::Source, said.port)).or_default();
            stream.extend(said.frame.header.encode()?);
            stream.extend(&said.frame.payload);
            let Some(kind) = said.kind() else { continue };
            let bytes = [&[kind as u8][..], &said.frame.payload].concat();
            self.keep("message", &format!("{name}-{kind:?}"), &bytes)?;
            match kind {
                MessageType::Final => {
                    self.keep("state", name, &said.frame.payload)?;
                    self.keep("page-ranges", name, &said.frame.payload)?;
                }
                MessageType::Prepare => {
                    self.keep("order", name, &said.frame.payload)?;
                    let prepare = wire::Prepare::decode(&said.frame.payload[..])?;
                    let layout = wire::Layout { mm: prepare.mm, objects: Vec::new() }.encode_to_vec();
                    let mut after = wire::Layout::decode(&layout[..])?;
                    after.mm.iter_mut().for_each(|mm| mm.vmas.iter_mut().for_each(|vma| vma.prot ^= 2));
                    let both = [&(layout.len() as u16).to_le_bytes()[..], &layout, &after.encode_to_vec()].concat();
                    self.keep("layouts", name, &both)?;
                }
                MessageType::Probe => {
                    let probe = wire::Probe::decode(&said.frame.payload[..])?;
                    if let Some(network) = probe.process.and_then(|process| process.network) {
                        self.keep_message("network-namespace", name, &network)?;
                        for (at, link) in network.links.iter().enumerate() {
                            self.keep("attributes", &format!("{name}-{at}"), link.get(16..).unwrap_or_default())?;
                        }
                    }
                }
                _ => {}
            }
        }
        for ((is_source, port), bytes) in streams {
            let who = if is_source { "source" } else { "destination" };
            self.keep("stream", &format!("{name}-{who}-{port}"), &bytes)?;
        }
        Ok(())
    }
}

/// Puts other bytes of the same number in the place of some.
fn replace(bytes: &mut [u8], found: &[u8], instead: &[u8]) {
    assert_eq!(found.len(), instead.len(), "lengths stand before what is replaced");
    let mut at = 0;
    while let Some(place) = bytes.get(at..).and_then(|rest| rest.windows(found.len()).position(|part| part == found)) {
        bytes[at + place..at + place + found.len()].copy_from_slice(instead);
        at += place + found.len();
    }
}

/// Paths of this machine, and others of the same length.
fn scrubbed() -> Vec<(Vec<u8>, Vec<u8>)> {
    let program = victim_program().display().to_string();
    let folder = Path::new(&program).parent().map(|folder| folder.display().to_string()).unwrap_or_default();
    let other = |path: &str| format!("/opt/{}", "v".repeat(path.len().saturating_sub(5)));
    [program, folder].map(|path| (path.clone().into_bytes(), other(&path).into_bytes())).to_vec()
}

#[test]
#[ignore = "writes into the repository"]
fn corpus_grows() -> Result<()> {
    let folder = godwit_tests::corpus_folder().context("GODWIT_CORPUS says where examples go")?;
    let corpus = Corpus { folder: std::path::absolute(folder)?, scrubbed: scrubbed() };
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let moves: [(&str, &[&str], Mode); 8] = [
        ("memory", &["2", "2", "4"], Mode::Hybrid),
        ("memory", &["1", "1", "4"], Mode::PostCopy),
        ("threads", &[], Mode::StopAndCopy),
        ("timers", &[], Mode::StopAndCopy),
        ("signals", &[], Mode::PreCopy),
        ("events", &[], Mode::StopAndCopy),
        ("pipes", &[], Mode::StopAndCopy),
        ("credentials", &[], Mode::StopAndCopy),
    ];
    for (victim, arguments, mode) in moves {
        let words = record(&hosts, &server, victim, arguments, mode).with_context(|| victim.to_owned())?;
        corpus.keep_words(&format!("{victim}-{}", mode.word()), &words)?;
    }
    // What a source says when there is something that cannot be moved.
    let refusal = wire::ProbeReply {
        obstacles: vec![wire::Obstacle { resource: "fd 5".into(), text: "a lock".into(), remedy: "none".into() }],
        pid_free: true,
    };
    let bytes = [&[wire::ProbeReply::TYPE as u8][..], &refusal.encode_to_vec()].concat();
    corpus.keep("message", "refusal-ProbeReply", &bytes)
}
