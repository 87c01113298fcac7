//! A source that means no good, towards the page server.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use godwit_carry::Frame;
use godwit_fuzz::{Chance, damaged};
use godwit_proto::Typed;
use godwit_proto::image::VmaEntry;
use godwit_proto::wire::{self, MessageType};
use godwit_session::{Destination, Received};
use godwit_stream::{FrameHeader, Limits};
use godwit_tests::{Farewell, Mode, Peer, Victim, message_frame, wait_until};

use super::Stage;

/// Time for all of a test's conversations.
const LIMIT: Duration = Duration::from_secs(90);

/// Everything that a source can say, and how the page server's order of messages calls it.
const WORDS: [(MessageType, Received); 13] = [
    (MessageType::ClockPing, Received::ClockPing),
    (MessageType::Probe, Received::Probe),
    (MessageType::Prepare, Received::Prepare),
    (MessageType::Layout, Received::Layout),
    (MessageType::Drop, Received::Drop),
    (MessageType::RoundEnd, Received::RoundEnd),
    (MessageType::Streams, Received::Streams),
    (MessageType::Packets, Received::Packets),
    (MessageType::Final, Received::Final),
    (MessageType::Commit, Received::Commit),
    (MessageType::Offer, Received::Offer),
    (MessageType::HandOver, Received::HandOver),
    (MessageType::Abort, Received::Abort),
];
const STATES: [Destination; 5] =
    [Destination::Negotiated, Destination::Probed, Destination::Offered, Destination::Filling, Destination::Ready];

/// What one source said, for conversations elsewhere.
#[derive(Clone)]
struct Script {
    address: SocketAddr,
    token: PathBuf,
    words: Vec<Frame>,
}

impl Script {
    fn of(stage: &Stage) -> Result<Self> {
        Ok(Self { address: stage.address()?, token: stage.token(), words: stage.of_source() })
    }

    fn said(&self, kind: MessageType) -> Option<&Frame> {
        self.words.iter().find(|frame| frame.message_type() == Some(kind as u32))
    }

    fn decoded<M: Typed>(&self) -> Result<M> {
        let frame = self.said(M::TYPE).with_context(|| format!("{:?} was never said", M::TYPE))?;
        Ok(M::decode(frame.payload.clone())?)
    }

    /// Calls and goes as far as a state.
    async fn lead_to(&self, state: Destination) -> Result<Peer> {
        let mut peer = Peer::call(self.address, &self.token).await?;
        let mut hello: wire::Hello = self.decoded()?;
        hello.migration_id = random_id()?.to_vec();
        // A copy that is complete waits no longer for a source that has left.
        hello.options.get_or_insert_default().patience_ms = 300;
        peer.say(&hello).await?;
        peer.hear_of(MessageType::Welcome).await?;
        if state == Destination::Offered {
            peer.say(&wire::Offer::default()).await?;
            peer.hear_of(MessageType::ProbeReply).await?;
            return Ok(peer);
        }
        let steps = [
            (Destination::Probed, MessageType::Probe, MessageType::ProbeReply),
            (Destination::Filling, MessageType::Prepare, MessageType::Prepared),
        ];
        if state == Destination::Negotiated {
            return Ok(peer);
        }
        for (reached, said, heard) in steps {
            peer.say_frame(self.said(said).context("a step that was never said")?).await?;
            peer.hear_of(heard).await?;
            if reached == state {
                return Ok(peer);
            }
        }
        let after = self.words.iter().skip_while(|frame| frame.message_type() != Some(MessageType::Prepare as u32));
        for frame in after.skip(1) {
            peer.say_frame(frame).await?;
            if frame.message_type() == Some(MessageType::Final as u32) {
                break;
            }
        }
        peer.hear_of(MessageType::Ready).await?;
        Ok(peer)
    }

    /// Goes as far as a state, says something, and hears what comes of it.
    async fn try_out(&self, state: Destination, frame: &Frame) -> Result<Farewell> {
        let mut peer = self.lead_to(state).await.with_context(|| format!("going as far as {state:?}"))?;
        // N.B. the other side may have ended the link already.
        let _ = peer.say_frame(frame).await;
        peer.farewell().await
    }
}

fn random_id() -> Result<[u8; 16]> {
    use std::io::Read;
    let mut id = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut id)?;
    Ok(id)
}

fn frame_of<M: Typed>(message: &M) -> Frame {
    message_frame(M::TYPE as u32, message.encode_to_vec())
}

#[test]
fn every_message_in_every_state() -> Result<()> {
    let stage = Stage::set(&[])?;
    let script = Script::of(&stage)?;
    let refused = stage.hosts.source.converse(LIMIT, move || async move {
        let mut refused = 0;
        for state in STATES {
            for (kind, received) in WORDS {
                if state.after(received).is_ok() {
                    continue;
                }
                let frame = script.said(kind).cloned().unwrap_or_else(|| message_frame(kind as u32, Vec::new()));
                let heard = script.try_out(state, &frame).await.with_context(|| format!("{kind:?} when {state:?}"))?;
                let failure = heard.failure.clone().unwrap_or_default();
                let named = ["out of order", "does not send"].iter().any(|words| failure.contains(words));
                ensure!(named, "{kind:?} when {state:?}: {heard:?}");
                refused += 1;
            }
            // What a source never says, and what nobody does.
            for kind in [MessageType::Hello as u32, MessageType::Welcome as u32, MessageType::Running as u32, 0, 77] {
                let heard = script.try_out(state, &message_frame(kind, vec![8, 1])).await?;
                ensure!(heard.failure.is_some(), "message {kind} when {state:?}: {heard:?}");
                refused += 1;
            }
            let pages = Frame { header: FrameHeader::zero_pages(0, 0x1000_0000, 1, 0), payload: Bytes::new() };
            if state.after(Received::Pages).is_err() {
                let heard = script.try_out(state, &pages).await?;
                ensure!(heard.failure.is_some(), "pages when {state:?}: {heard:?}");
                refused += 1;
            }
        }
        Ok(refused)
    })?;
    ensure!(refused > 70, "only {refused} were refused");
    stage.expect_unharmed()
}

/// Greetings that open no migration.
#[test]
fn greetings_of_others() -> Result<()> {
    let stage = Stage::set(&[])?;
    let script = Script::of(&stage)?;
    stage.hosts.source.converse(LIMIT, move || async move {
        let hello: wire::Hello = script.decoded()?;
        let with = |change: fn(&mut wire::Hello)| {
            let mut changed = hello.clone();
            changed.migration_id = vec![7; 16];
            change(&mut changed);
            frame_of(&changed)
        };
        let cases = [
            ("a newer version", with(|hello| hello.oldest_version = 9), "versions"),
            ("an older version", with(|hello| (hello.oldest_version, hello.newest_version) = (0, 0)), "versions"),
            ("a short id", with(|hello| hello.migration_id.truncate(3)), "16 bytes"),
            ("another role", with(|hello| hello.role = wire::Role::Drain.into()), "control port"),
            ("an unknown role", with(|hello| hello.role = 77), "control port"),
            ("no greeting", frame_of(&wire::Commit::default()), "greeting"),
            ("nonsense", message_frame(MessageType::Hello as u32, vec![0xff; 64]), ""),
            ("pages", Frame { header: FrameHeader::zero_pages(0, 0, 1, 0), payload: Bytes::new() }, "greeting"),
            // It has been here.
            ("the same migration again", script.said(MessageType::Hello).cloned().context("a hello")?, "been here"),
        ];
        for (what, frame, word) in cases {
            let mut peer = Peer::call(script.address, &script.token).await?;
            peer.say_frame(&frame).await?;
            let heard = peer.farewell().await.context(what)?;
            let text = format!("{:?} {}", heard.failure, heard.end);
            ensure!(heard.replies.iter().all(|reply| *reply == MessageType::Failure), "{what}: {heard:?}");
            ensure!(text.contains(word), "{what}: {heard:?}");
        }
        Ok(())
    })?;
    stage.expect_unharmed()
}

/// Messages that are in order and mean what cannot be.
#[test]
fn state_that_no_process_has() -> Result<()> {
    let stage = Stage::set(&[])?;
    let script = Script::of(&stage)?;
    stage.hosts.source.converse(LIMIT, move || async move {
        for (what, state, frame) in impossible(&script)? {
            let heard = script.try_out(state, &frame).await.with_context(|| what.clone())?;
            ensure!(heard.failure.as_ref().is_some_and(|text| !text.is_empty()), "{what}: {heard:?}");
            ensure!(!heard.replies.contains(&MessageType::Ready), "{what}: {heard:?}");
        }
        Ok(())
    })?;
    stage.expect_unharmed()
}

type Impossible = Vec<(String, Destination, Frame)>;

fn impossible(script: &Script) -> Result<Impossible> {
    let mut all = Impossible::new();
    orders(script, &mut all)?;
    pages(script, &mut all);
    states(script, &mut all)?;
    Ok(all)
}

/// Orders to build what cannot be.
fn orders(script: &Script, all: &mut Impossible) -> Result<()> {
    let prepare: wire::Prepare = script.decoded()?;
    let mut add = |what: &str, change: &dyn Fn(&mut wire::Prepare)| {
        let mut changed = prepare.clone();
        change(&mut changed);
        all.push((format!("an order: {what}"), Destination::Probed, frame_of(&changed)));
    };
    for pid in [0, 1, u32::MAX, 1 << 31, 1 << 30] {
        add(&format!("pid {pid}"), &|prepare| prepare.process.get_or_insert_default().pid = pid);
    }
    add("no process", &|prepare| prepare.process = None);
    add("its own pid as a thread", &|prepare| prepare.tids.push(prepare.process.as_ref().map_or(0, |one| one.pid)));
    add("a thread 0", &|prepare| prepare.tids.push(0));
    add("too many threads", &|prepare| prepare.tids = (30_000..130_000).collect());
    let mut areas = |what: &str, change: &dyn Fn(&mut Vec<VmaEntry>)| {
        add(what, &|prepare| change(&mut prepare.mm.get_or_insert_default().vmas));
    };
    areas("overlapping mappings", &|vmas| vmas.insert(1, vmas[0].clone()));
    areas("mappings out of order", &|vmas| vmas.reverse());
    areas("a mapping of the kernel's", &|vmas| vmas[0].start = 0xffff_8000_0000_0000);
    areas("a mapping that ends before it begins", &|vmas| vmas[0].end = vmas[0].start - 4096);
    areas("a mapping at 0", &|vmas| (vmas[0].start, vmas[0].end) = (0, 4096));
    areas("half a page", &|vmas| vmas[0].end += 17);
    areas("an offset beyond all files", &|vmas| vmas[0].pgoff = u64::MAX - 4095);
    areas("a vdso at the end of the world", &|vmas| {
        for vma in vmas.iter_mut().filter(|vma| vma.name().starts_with("[vdso")) {
            (vma.start, vma.end) = (u64::MAX - 8191, u64::MAX - 4095);
        }
    });
    areas("a vdso as large as the address space", &|vmas| {
        for vma in vmas.iter_mut().filter(|vma| vma.name().starts_with("[v")) {
            (vma.start, vma.end) = (0x1000, u64::MAX - 4095);
        }
    });
    areas("a file that is not here", &|vmas| {
        for vma in vmas.iter_mut().filter(|vma| vma.name().starts_with('/')) {
            vma.name = Some("/nowhere/../nowhere\0/x".to_owned());
        }
    });
    areas("an object that was never described", &|vmas| vmas[0].object = Some(12345));
    areas("more mappings than a process can have", &|vmas| {
        let one = VmaEntry { flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32, prot: 3, ..VmaEntry::default() };
        *vmas = (0..200_000)
            .map(|at| VmaEntry { start: 0x10_0000 + at * 8192, end: 0x10_1000 + at * 8192, ..one.clone() })
            .collect();
    });
    let object = |kind: wire::shared_object::Kind| wire::SharedObject {
        number: 9,
        kind: kind.into(),
        size: 4096,
        ..Default::default()
    };
    use wire::shared_object::Kind;
    let mut objects =
        |what: &str, object: wire::SharedObject| add(what, &move |prepare| prepare.objects.push(object.clone()));
    objects("an object larger than everything", wire::SharedObject { size: u64::MAX, ..object(Kind::AnonShm) });
    objects("an object as large as everything", wire::SharedObject { size: 1 << 47, ..object(Kind::AnonShm) });
    objects("huge pages of no size", wire::SharedObject { huge_page_size: 3, memfd_flags: 4, ..object(Kind::Hugetlb) });
    objects("a name with an end in it", wire::SharedObject { name: "a\0b".to_owned(), ..object(Kind::Memfd) });
    objects("a name without end", wire::SharedObject { name: "a".repeat(4000), ..object(Kind::Memfd) });
    objects("a segment with a negative id", wire::SharedObject { sysv_id: -1, sysv_key: 7, ..object(Kind::Sysv) });
    objects("a file with a path", object(Kind::File));
    Ok(())
}

/// Pages, and the absence of pages, where there is nothing.
fn pages(script: &Script, all: &mut Impossible) {
    let somewhere = script.words.iter().find(|frame| frame.is_pages()).map_or(0, |frame| frame.header.address);
    let mut add = |what: &str, space: u32, address: u64, count: u32| {
        let header = FrameHeader::zero_pages(space, address, count, 0);
        all.push((format!("pages: {what}"), Destination::Filling, Frame { header, payload: Bytes::new() }));
    };
    add("where nothing is mapped", 0, 0x7000_0000_0000, 1);
    add("at 0", 0, 0, 1);
    add("of the kernel", 0, 0xffff_8000_0000_0000, 1);
    add("at the very end", 0, u64::MAX - 512 * 4096 - 4095, Limits::FRAME_PAGES);
    let layout = script.decoded::<wire::Prepare>().ok().and_then(|prepare| prepare.mm).unwrap_or_default();
    let last_before_a_gap = layout.vmas.windows(2).find(|pair| pair[0].end < pair[1].start);
    add("past the end of a mapping", 0, last_before_a_gap.map_or(0, |pair| pair[0].end - 4096), Limits::FRAME_PAGES);
    add("of an object that is none", 999, 0, 1);
    let payload = Bytes::from(vec![0x77; 100]);
    let header = FrameHeader {
        encoding: godwit_stream::ENCODING_ZSTD,
        length: 100,
        ..FrameHeader::raw_pages(0, somewhere, 1, 0)
    };
    all.push(("pages that do not inflate".to_owned(), Destination::Filling, Frame { header, payload }));
    for (what, space, start, pages) in
        [("at no page", 0, 17, 1), ("too many", 0, 4096, u64::MAX), ("of an object that is none", 999, 0, 1)]
    {
        let drop = wire::Drop { space, ranges: vec![wire::Range { start, pages }] };
        all.push((format!("absent pages: {what}"), Destination::Filling, frame_of(&drop)));
    }
    let nowhere = wire::Layout {
        mm: None,
        objects: vec![wire::SharedObject { number: 7, kind: 99, size: u64::MAX, ..Default::default() }],
    };
    all.push(("a layout with an object of no kind".to_owned(), Destination::Filling, frame_of(&nowhere)));
    let orphan = wire::StreamContent { id: 5, ..wire::StreamContent::default() };
    let streams = wire::Streams { streams: vec![orphan], ..wire::Streams::default() };
    all.push(("what waits in no connection".to_owned(), Destination::Filling, frame_of(&streams)));
    let files = [0x32, 0].repeat(7 << 20);
    all.push((
        "a message of nothing but beginnings".to_owned(),
        Destination::Filling,
        message_frame(MessageType::Final as u32, files),
    ));
}

/// States of a stopped process that none can be in.
fn states(script: &Script, all: &mut Impossible) -> Result<()> {
    let state: wire::Final = script.decoded()?;
    let mut add = |what: &str, change: &dyn Fn(&mut wire::Final)| {
        let mut changed = state.clone();
        change(&mut changed);
        all.push((format!("a state: {what}"), Destination::Filling, frame_of(&changed)));
    };
    add("no leader", &|state| state.leader = None);
    add("no directories", &|state| state.fs = None);
    add("threads without state", &|state| state.tids.push(31_000));
    add("a descriptor beyond all", &|state| state.descriptors[0].fd = 1 << 30);
    add("a descriptor twice", &|state| state.descriptors.push(state.descriptors[0].clone()));
    add("a descriptor of no file", &|state| state.descriptors[0].id = 0x7777_7777);
    add("a file of an unknown kind", &|state| state.files.iter_mut().for_each(|file| file.r#type = 9999));
    add("files without their parts", &|state| state.files.iter_mut().for_each(|file| file.reg = None));
    add("a file at a path with an end in it", &|state| {
        state
            .files
            .iter_mut()
            .filter_map(|file| file.reg.as_deref_mut())
            .for_each(|file| file.name = "/tmp/\0/../x".to_owned());
    });
    add("a file up many times, and not there", &|state| {
        state
            .files
            .iter_mut()
            .filter_map(|file| file.reg.as_deref_mut())
            .for_each(|file| file.name = "/../".repeat(900) + "nowhere");
    });
    add("missing pages of nothing", &|state| {
        let range = wire::Range { start: 0x7000_0000_0000, pages: 1 << 20 };
        state.missing = vec![wire::PageRanges { space: 0, ranges: vec![range] }];
    });
    add("missing pages of an object", &|state| {
        state.missing = vec![wire::PageRanges { space: 3, ranges: vec![wire::Range { start: 0, pages: 1 }] }];
    });
    add("guards of the kernel", &|state| state.guards = vec![wire::Range { start: 0xffff_8000_0000_0000, pages: 1 }]);
    add("huge pages past the end", &|state| state.huge = vec![wire::Range { start: u64::MAX - 4095, pages: 9 }]);
    let mut of_thread = |what: &str, change: &dyn Fn(&mut godwit_proto::image::ThreadCoreEntry)| {
        add(what, &|state| {
            if let Some(thread) = state.leader.as_mut().and_then(|core| core.thread_core.as_mut()) {
                change(thread);
            }
        });
    };
    of_thread("registers of another size", &|thread| thread.user_regs = Some(vec![0; 7]));
    of_thread("registers of the kernel", &|thread| thread.user_regs = Some(vec![0xff; 27 * 8]));
    of_thread("an XSAVE area without end", &|thread| thread.xstate = Some(vec![0xff; 1 << 20]));
    of_thread("no credentials", &|thread| thread.creds = None);
    of_thread("a filter that is not there", &|thread| thread.seccomp_filter = Some(7));
    Ok(())
}

/// A source that says nothing, or half a word, is given up, whatever it waits for.
#[test]
fn sources_that_never_finish() -> Result<()> {
    let stage = Stage::set(&["--patience", "2"])?;
    let script = Script::of(&stage)?;
    stage.hosts.source.converse(LIMIT, move || async move {
        for state in [Destination::Negotiated, Destination::Filling, Destination::Ready] {
            let peer = script.lead_to(state).await?;
            let heard = peer.farewell().await.with_context(|| format!("silent when {state:?}"))?;
            let ended = ["nothing whole", "has not come back"].iter().any(|words| heard.end.contains(words));
            ensure!(ended, "silent when {state:?}: {heard:?}");
        }
        // A frame that is announced and never comes to its end, by drops.
        let mut peer = script.lead_to(Destination::Filling).await?;
        let header = FrameHeader::message(MessageType::Final as u32, 0, Limits::MESSAGE_BYTES as u32);
        let begun = Instant::now();
        let mut said = peer.sender.send_bytes(Bytes::copy_from_slice(&header.encode()?)).await;
        while said.is_ok() && begun.elapsed() < Duration::from_secs(10) {
            tokio::time::sleep(Duration::from_millis(100)).await;
            said = peer.sender.send_bytes(Bytes::from_static(&[0x32])).await;
        }
        ensure!(said.is_err(), "drops were taken for {:?}", begun.elapsed());
        // One that says hello and nothing else, ten times at once.
        let mut peers = Vec::new();
        for _ in 0..10 {
            peers.push(Peer::call(script.address, &script.token).await?);
        }
        let heard = peers.pop().context("ten")?.farewell().await?;
        ensure!(heard.replies.is_empty(), "{heard:?}");
        Ok(())
    })?;
    stage.expect_unharmed()
}

/// A source that asks and asks and reads no answer.
#[test]
fn a_source_that_does_not_listen() -> Result<()> {
    let stage = Stage::set(&[])?;
    let script = Script::of(&stage)?;
    let asked = stage.hosts.source.converse(LIMIT, move || async move {
        let mut peer = script.lead_to(Destination::Negotiated).await?;
        // What is on its way back gets no more room.
        peer.link.throttle(4096);
        let begun = Instant::now();
        for asked in 0.. {
            if peer.say(&wire::ClockPing { sent_ns: asked }).await.is_err() {
                return Ok(asked);
            }
            ensure!(begun.elapsed() < Duration::from_secs(60), "{asked} questions were taken, and no answer read");
        }
        bail!("no end of numbers")
    })?;
    ensure!(asked > 64, "it was ended after {asked} questions");
    wait_until("the page server to say why", LIMIT, || Ok(stage.server.log().contains("does not read")))
        .with_context(|| stage.server.log())?;
    stage.expect_unharmed()
}

/// Whoever has not the token costs little, and keeps nobody out.
#[test]
fn a_flood_of_strangers() -> Result<()> {
    let mut stage = Stage::set(&[])?;
    let address = stage.address()?;
    let wrong = stage.hosts.other_token("wrong")?.path().to_owned();
    let noise = stage.hosts.destination.on_its_network(|| Ok(UdpSocket::bind("127.0.0.1:0")?))?;
    let local = stage.hosts.destination.address().to_owned();
    let strangers = stage.hosts.destination.converse_aside(LIMIT, move || async move {
        let end = Instant::now() + Duration::from_secs(5);
        let mut turned_away = 0u32;
        while Instant::now() < end {
            let calls = (0..24).map(|_| {
                let wrong = wrong.clone();
                async move { Peer::call(address, &wrong).await }
            });
            for call in futures_of(calls).await {
                turned_away += u32::from(call.is_err());
            }
            for bytes in [&[0xc0; 1200][..], &[0; 1200], &[0x40; 30]] {
                // N.B. from a socket of its own; the page server's buffer may be full.
                let _ = noise.send_to(bytes, (local.as_str(), address.port()));
            }
        }
        Ok(turned_away)
    });
    let mut victim: Victim = stage.hosts.source.victim("memory", &["2", "4", "4"])?;
    victim.expect_beats(5)?;
    let migration = stage.hosts.source.migrate(&stage.server, victim.pid()).mode(Mode::PreCopy).run()?;
    migration.expect_moved().with_context(|| format!("beside strangers; {}", stage.server.log()))?;
    victim.follow(&stage.hosts.destination, &migration)?;
    victim.expect_beats(5)?;
    victim.finish()?;
    let turned_away = strangers.join().map_err(|_| anyhow::anyhow!("the strangers panicked"))??;
    ensure!(turned_away >= 24, "only {turned_away} strangers came");
    let program = stage.server.process().host_pid();
    stage.before.expect_again(&stage.hosts.destination, program)?;
    stage.expect_unharmed()
}

async fn futures_of<F: Future + 'static>(futures: impl Iterator<Item = F>) -> Vec<F::Output>
where
    F::Output: 'static,
{
    let local = tokio::task::LocalSet::new();
    let all: Vec<_> = futures.map(|future| local.spawn_local(future)).collect();
    local.await;
    let mut done = Vec::new();
    for one in all {
        done.extend(one.await);
    }
    done
}

/// A real migration with damage somewhere, many times over.
#[test]
fn damaged_migrations() -> Result<()> {
    let stage = Stage::set(&["--patience", "3"])?;
    let script = Script::of(&stage)?;
    let seconds = std::env::var("GODWIT_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let seed = u64::from(std::process::id());
    let tried = stage.hosts.source.converse(LIMIT + Duration::from_secs(seconds), move || async move {
        let mut chance = Chance::new(seed);
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut tried = 0;
        while Instant::now() < end {
            tried += 1;
            one_damaged(&script, &mut chance).await.with_context(|| format!("seed {seed}, attempt {tried}"))?;
        }
        Ok(tried)
    })?;
    ensure!(tried > 3, "only {tried} were tried");
    stage.expect_unharmed()
}

/// Says everything up to the decision, which is not said, with one frame or more damaged.
async fn one_damaged(script: &Script, chance: &mut Chance) -> Result<()> {
    let mut peer = Peer::call(script.address, &script.token).await?;
    let mut hello: wire::Hello = script.decoded()?;
    hello.migration_id = random_id()?.to_vec();
    hello.options.get_or_insert_default().patience_ms = 300;
    peer.say(&hello).await?;
    let last = script.words.iter().position(|frame| frame.message_type() == Some(MessageType::Commit as u32));
    let words = &script.words[1..last.unwrap_or(script.words.len())];
    let hurt = chance.below(words.len());
    for (at, frame) in words.iter().enumerate() {
        let said = if at == hurt || chance.below(12) == 0 {
            let other = &words[chance.below(words.len())].payload;
            let payload = damaged(chance, &frame.payload, other);
            let frame = match frame.message_type() {
                Some(kind) => message_frame(kind, payload),
                None => {
                    let address = [frame.header.address, 0, 0x7000_0000_0000, u64::MAX - 4095][chance.below(4)];
                    Frame { header: FrameHeader { address, ..frame.header }, payload: frame.payload.clone() }
                }
            };
            peer.say_frame(&frame).await
        } else {
            peer.say_frame(frame).await
        };
        if said.is_err() {
            break;
        }
    }
    peer.link.close(0, "enough");
    Ok(())
}
