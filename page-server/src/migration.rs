//! One migration as its tasks see it: frames from the link to the workshop's queue, replies from the workshop to the link.

use crate::arrivals::Arrivals;
use crate::event::Event;
use crate::handing::Handing;
use crate::policy::Guard;
use crate::server::{COMING_BACK, Drained, MigrationFaults, Shared};
use crate::standing::Standing;
use crate::workshop::{self, Commission, Outcome, Reply, Work};
use anyhow::{Context as _, Result, anyhow, bail};
use bytes::Bytes;
use godwit_carry::{Channel, Link, Receiver, Sender};
use godwit_fault::MigrationId;
use godwit_journal::ProcessName;
use godwit_network::{Delivery, Flow, Namespace, Packet};
use godwit_pages::PageSet;
use godwit_proto::wire::{self, MessageType, Role};
use godwit_proto::{Message, Typed, decode};
use godwit_session::decision::{Destination, DestinationEvent, ToDestination};
use godwit_stream::decode_message;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Versions of the messages that this program understands.
const VERSION: u32 = 1;
/// Frames that wait for the workshop; with 1 MiB each they bound the memory of a migration.
const QUEUE: usize = 8;
/// Answers that wait to be sent, at most: a source asks one thing after the other.
const REPLIES: usize = 64;
/// Time in which what was said last has to get away.
const PARTING: Duration = Duration::from_secs(2);
/// Time that a source has to send packets after connections, at most; it is over when the source leaves.
const PACKETS: Duration = Duration::from_secs(3700);
/// Time that a complete copy waits at most for a source that has left, whatever that asked for.
const LONGEST_PATIENCE: Duration = Duration::from_secs(24 * 3600);
/// Time that a source has to say that it needs nothing more, when all is done.
const LAST_WORD: Duration = Duration::from_secs(10);
/// Time a peer has for its first message.
const GREETING: Duration = Duration::from_secs(10);

/// What became of a migration.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The process runs here with all its memory.
    Moved { pid: i32 },
    /// The process runs here, and whoever comes after this program has to bring the rest of its memory.
    Left { pid: i32, missing_pages: u64 },
    /// The process has run here and ended before all its memory came.
    Ended { pid: i32 },
    /// A program of this host has connections.
    HandedOver { connections: usize },
    /// Nothing was left behind.
    Abandoned(String),
}

/// Receives one process; no ending where a source came back for a hand-over that began before.
///
/// # Errors
/// When the peer does not open a migration properly.
pub(crate) async fn receive(
    link: Link,
    channel: Channel,
    shared: Arc<Shared>,
) -> Result<(MigrationId, Option<Ending>)> {
    let (mut sender, mut receiver) = channel.split();
    let hello = tokio::time::timeout(GREETING, greeting(&mut receiver)).await.context("no greeting came")??;
    let id = MigrationId::from_slice(&hello.migration_id).ok_or_else(|| anyhow!("a migration id has 16 bytes"))?;
    if !(hello.oldest_version..=hello.newest_version).contains(&VERSION) {
        let text = format!(
            "the source speaks versions {} to {}, this page server {VERSION}",
            hello.oldest_version, hello.newest_version
        );
        refuse(&mut sender, &text).await;
        bail!(text);
    }
    // N.B. not by its name: one that nobody knows would count as the first.
    if hello.role != Role::Control as i32 {
        bail!("a connection for something else came to the control port (role {})", hello.role);
    }
    let host = godwit_resources::host::facts()?;
    let (fault_port, drain_port) = shared.fault_ports();
    let welcome = wire::Welcome {
        version: VERSION,
        host: Some(host),
        fault_port: fault_port.into(),
        drain_port: drain_port.into(),
    };
    let party = link.party();
    if hello.resume {
        send(&mut sender, &welcome).await?;
        settle(&link, (sender, receiver), shared.registry.find(id, party), shared).await;
        return Ok((id, None));
    }
    let _place = match shared.admit() {
        Ok(place) => place,
        Err([text, remedy]) => {
            fail(&mut sender, "page server", text, remedy, wire::FailureCode::Refused).await;
            bail!("{text}");
        }
    };
    let options = hello.options.unwrap_or_default();
    let process = if options.process.is_empty() {
        String::new()
    } else {
        // N.B. what a host says of its processes is good for its own attempts only.
        let host = link.peer().map(|peer| peer.fingerprint.to_string());
        format!("{} {}", host.unwrap_or_else(|| link.remote_address().ip().to_string()), options.process)
    };
    let standing = {
        let shared = shared.clone();
        // N.B. it may have to wait for an earlier attempt to go: then the pids are free.
        tokio::task::spawn_blocking(move || shared.registry.begin(id, party, &process)).await.context("beginning")?
    };
    let standing = match standing {
        Ok(standing) => standing,
        Err(error) => {
            let text = error.to_string();
            fail(&mut sender, "migration id", &text, "", wire::FailureCode::Protocol).await;
            return Err(error);
        }
    };
    send(&mut sender, &welcome).await?;
    let host = link.peer().map(|peer| peer.name.clone());
    shared.style.say(&Event::Begun { migration_id: id.to_string(), from: link.remote_address(), host });

    let name = id.to_string().get(..8).unwrap_or_default().to_owned();
    let commission = Commission {
        standing: standing.clone(),
        journal: shared.registry.journal.clone(),
        from: link.remote_address(),
        options,
        guard: Guard::new(shared.policy.clone()),
        handing: Handing::new(name.clone(), shared.hand_over_to.clone()),
        arrivals: Arrivals::new(name, shared.holds.clone()),
    };
    // What has begun ends in one way or the other, also when it is this program that failed.
    let ending = build(&link, (sender, receiver), commission, shared.faults(standing.clone()), &shared)
        .await
        .unwrap_or_else(|error| {
            let why = godwit_carry::with_causes(error.as_ref());
            link.close(godwit_carry::CODE_DONE, &why);
            Ending::Abandoned(why)
        });
    standing.end();
    Ok((id, Some(ending)))
}

/// Answers a source that has come back, until it leaves.
async fn settle(link: &Link, (sender, receiver): (Sender, Receiver), standing: Arc<Standing>, shared: Arc<Shared>) {
    let (replies, outbox) = mpsc::channel(REPLIES);
    standing.attach(replies);
    let writer = tokio::spawn(write(sender, outbox));
    read(receiver, standing.clone(), None, shared).await;
    // Its outbox ends when another link takes its place, or the migration is over.
    writer.abort();
    link.close(godwit_carry::CODE_DONE, "answered");
}

/// Builds one process from what the link brings.
async fn build(
    link: &Link,
    (sender, receiver): (Sender, Receiver),
    commission: Commission,
    mut faults: MigrationFaults,
    shared: &Arc<Shared>,
) -> Result<Ending> {
    let (queue, mut work) = mpsc::channel(QUEUE);
    let (replies, outbox) = mpsc::channel(REPLIES);
    let standing = commission.standing.clone();
    let id = standing.id;
    let patience = Duration::from_millis(commission.options.patience_ms.into()).min(LONGEST_PATIENCE);
    standing.attach(replies);
    standing.attach_queue(queue.clone(), patience);
    let workshop = tokio::task::spawn_blocking({
        // N.B. a thread of its own inside the blocking task: the builder changes the thread's namespaces for its children.
        move || {
            std::thread::Builder::new()
                .name(format!("workshop {id}"))
                .spawn(move || {
                    let outcome = workshop::work(&mut work, commission, &mut faults);
                    (outcome, faults, work)
                })
                .map(std::thread::JoinHandle::join)
        }
    });
    let writer = tokio::spawn(write(sender, outbox));
    let reader = tokio::spawn(read(receiver, standing.clone(), Some(queue), shared.clone()));
    let joined = workshop.await.context("the workshop's task")?.context("starting the workshop's thread")?;
    let Ok((outcome, mut faults, work)) = joined else { bail!("the workshop's thread panicked") };
    // From here on packets come by the first link only.
    standing.detach_queue();
    match outcome {
        Outcome::Abandoned(why) => {
            standing.detach();
            let sender = finished(writer).await;
            reader.abort();
            close(link, sender, &why).await;
            Ok(Ending::Abandoned(why))
        }
        Outcome::HandedOver { connections, flows } => {
            standing.detach();
            let sender = finished(writer).await;
            let delivered = tokio::task::spawn_blocking(move || deliver(work, flows, None));
            let _ = tokio::time::timeout(PACKETS, delivered).await;
            close(link, sender, "handed over").await;
            reader.abort();
            Ok(Ending::HandedOver { connections })
        }
        Outcome::Running { pid, draining, child, huge, expects_packets, flows, network } => {
            reap(child);
            let delivered = expects_packets.then(|| tokio::task::spawn_blocking(move || deliver(work, flows, network)));
            let mut is_ended = false;
            if draining {
                match faults.drained().await? {
                    Drained::Left { missing_pages } => {
                        reader.abort();
                        link.close(godwit_carry::CODE_DONE, "the page server ends before all pages are here");
                        return Ok(Ending::Left { pid, missing_pages });
                    }
                    // N.B. one that executes another program needs none of its pages any more either, and goes on.
                    Drained::Departed => is_ended = !has_process(pid).await,
                    Drained::Complete => {}
                }
                if is_ended {
                    // N.B. the fault service tells the source, whenever that calls.
                    standing.end_there();
                } else {
                    shared.unless_it_ends(PARTING, faults.acknowledged()).await.unwrap_or(Ok(()))?;
                }
            }
            standing.note(DestinationEvent::Complete);
            if let Some(delivered) = delivered {
                // The source leaves when no more packets come.
                let _ = tokio::time::timeout(PACKETS, delivered).await;
            }
            gather(pid, huge).await;
            // The source says that it needs nothing more, and leaves.
            let _ = shared.unless_it_ends(PARTING, tokio::time::timeout(LAST_WORD, reader)).await;
            writer.abort();
            link.close(godwit_carry::CODE_DONE, "moved");
            Ok(if is_ended { Ending::Ended { pid } } else { Ending::Moved { pid } })
        }
    }
}

/// Whether a process goes on whose memory is no more: it takes a moment to go behind it.
async fn has_process(pid: i32) -> bool {
    const MOMENT: Duration = Duration::from_millis(300);
    let is_there = || ProcessName::of(pid).is_some_and(|process| process.is_there());
    let deadline = tokio::time::Instant::now() + MOMENT;
    while is_there() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    is_there()
}

/// Delivers packets that the source sends after their connections, which are these.
fn deliver(mut queue: mpsc::Receiver<Work>, connections: HashSet<Flow>, network: Option<Namespace>) {
    let prepare = || Ok(Delivery::new()?.knowing(connections));
    let delivery = match network {
        Some(own) => own.inside(prepare).flatten(),
        None => prepare(),
    };
    let delivery = match delivery {
        Ok(delivery) => delivery.patiently(),
        Err(error) => return tracing::warn!(%error, "packets that arrived at the source are lost"),
    };
    let (mut delivered, mut all) = (0, 0);
    while let Some(Work::Frame(frame)) = queue.blocking_recv() {
        if frame.message_type() != Some(MessageType::Packets as u32) {
            return tracing::warn!("the source has said something else where packets were due");
        }
        let packets =
            decode_message(&frame.header, frame.payload).ok().and_then(|bytes| decode::<wire::Packets>(&bytes).ok());
        let wire::Packets { packets, interfaces } = packets.unwrap_or_default();
        let interfaces = interfaces.into_iter().map(|name| (!name.is_empty()).then_some(name));
        all += packets.len();
        let packets = packets.into_iter().zip(interfaces.chain(std::iter::repeat(None)));
        delivered += delivery.deliver(packets.map(|(bytes, interface)| Packet { bytes, interface }));
    }
    tracing::debug!(delivered, of = all, "packets that arrived at the source");
}

/// Makes memory huge again that was before, without keeping anybody waiting for it.
async fn gather(pid: i32, huge: PageSet) {
    if huge.is_empty() {
        return;
    }
    let wanted = huge.pages();
    match tokio::task::spawn_blocking(move || godwit_rebuild::make_huge(pid, &huge)).await {
        Ok(Ok(made)) => tracing::info!(pid, made, of = wanted / 512, "huge pages regained"),
        Ok(Err(error)) => tracing::debug!(pid, %error, "huge pages are not regained"),
        Err(error) => tracing::debug!(pid, %error, "huge pages are not regained"),
    }
}

async fn greeting(receiver: &mut Receiver) -> Result<wire::Hello> {
    let frame = receiver.receive().await?.ok_or_else(|| anyhow!("the peer left without a word"))?;
    if frame.message_type() != Some(MessageType::Hello as u32) {
        bail!("the first message must be a greeting");
    }
    Ok(decode::<wire::Hello>(&decode_message(&frame.header, frame.payload)?)?)
}

async fn send<M: Message + Typed>(sender: &mut Sender, message: &M) -> Result<()> {
    Ok(sender.send_message(M::TYPE as u32, 0, message.encode_to_vec().into()).await?)
}

async fn refuse(sender: &mut Sender, text: &str) {
    let remedy = "run the same release on both hosts";
    fail(sender, "protocol version", text, remedy, wire::FailureCode::Version).await;
}

async fn fail(sender: &mut Sender, resource: &str, text: &str, remedy: &str, code: wire::FailureCode) {
    let failure = wire::Failure {
        phase: "negotiate".to_owned(),
        resource: resource.to_owned(),
        text: text.to_owned(),
        remedy: remedy.to_owned(),
        code: code.into(),
    };
    let _ = send(sender, &failure).await;
    let _ = tokio::time::timeout(Duration::from_secs(1), sender.finish()).await;
}

/// Waits for the next frame; otherwise says why none will come.
async fn whole_frame(
    receiver: &mut Receiver,
    standing: &Standing,
    silence: Option<Duration>,
) -> std::result::Result<godwit_carry::Frame, String> {
    let receiving = receiver.receive();
    tokio::pin!(receiving);
    loop {
        let received = match silence {
            Some(silence) => tokio::time::timeout(silence, &mut receiving).await,
            None => Ok((&mut receiving).await),
        };
        match received {
            Ok(Ok(Some(frame))) => return Ok(frame),
            Ok(Ok(None)) => return Err("the source left".to_owned()),
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) if matches!(standing.side(), Destination::Building | Destination::Ready) => {
                let seconds = silence.unwrap_or_default().as_secs();
                return Err(format!("nothing whole came from the source for {seconds} s"));
            }
            Err(_) => {}
        }
    }
}

/// Passes frames on in order, to the workshop or to what answers without one; the bounded queue is what slows a source down. Behind
/// a link that is lost the decision is waited for. Until there is one each frame must have come whole within the patience that this program
/// has; afterwards there may be nothing to say for long.
async fn read(
    mut receiver: Receiver,
    standing: Arc<Standing>,
    own_queue: Option<mpsc::Sender<Work>>,
    shared: Arc<Shared>,
) {
    let silence = own_queue.is_some().then_some(shared.patience);
    let link = standing.links();
    let (why, queue) = loop {
        let frame = match whole_frame(&mut receiver, &standing, silence).await {
            Ok(frame) => frame,
            Err(why) => break (why, own_queue),
        };
        let word = match frame.message_type().and_then(|kind| MessageType::try_from(kind as i32).ok()) {
            Some(MessageType::Query) => Some(ToDestination::Query),
            Some(MessageType::Over) => Some(ToDestination::Over),
            Some(MessageType::Commit) => Some(ToDestination::Commit),
            _ => None,
        };
        if let Some(word) = word {
            let standing = standing.clone();
            // N.B. it may look into /proc, or wait for a copy that is just let go.
            let heard = tokio::task::spawn_blocking(move || standing.hear(word)).await;
            if heard.unwrap_or(true) {
                continue;
            }
        }
        let queue = own_queue.clone().or_else(|| standing.queue());
        if let Some(queue) = queue {
            // Without a workshop nobody misses it.
            let _ = queue.send(Work::Frame(frame)).await;
        }
    };
    let Some(queue) = queue.or_else(|| standing.queue()) else { return };
    if queue.send(Work::Lost(why)).await.is_err() {
        return;
    }
    if standing.side() == Destination::Ready {
        // N.B. also once this program is to end: who does not come back soon then finds the next one, which knows what became of it.
        let _ = shared.unless_it_ends(COMING_BACK, tokio::time::sleep(standing.patience())).await;
        let _ = queue.send(Work::Away(link)).await;
    }
}

async fn write(mut sender: Sender, mut outbox: mpsc::Receiver<Reply>) -> Sender {
    while let Some(reply) = outbox.recv().await {
        if sender.send_message(reply.kind as u32, 0, Bytes::from(reply.bytes)).await.is_err() {
            break;
        }
    }
    sender
}

/// Waits until everything is said. N.B. a source that does not read would have it wait for ever.
async fn finished(mut writer: tokio::task::JoinHandle<Sender>) -> Option<Sender> {
    match tokio::time::timeout(PARTING, &mut writer).await {
        Ok(sender) => sender.ok(),
        Err(_) => {
            writer.abort();
            None
        }
    }
}

async fn close(link: &Link, sender: Option<Sender>, why: &str) {
    if let Some(mut sender) = sender {
        let _ = tokio::time::timeout(PARTING, sender.finish()).await;
    }
    link.close(godwit_carry::CODE_DONE, why);
}

/// Waits for a child in the background, so that it does not stay a zombie, and says how it ended.
fn reap(child: i32) {
    let waiting = std::thread::Builder::new().name(format!("reap {child}")).spawn(move || {
        match godwit_kernel::ptrace::wait(child) {
            Ok(status) => tracing::info!(pid = child, ?status, "a process that moved here has ended"),
            Err(errno) => tracing::debug!(pid = child, %errno, "not a child of ours"),
        }
    });
    if let Err(error) = waiting {
        tracing::warn!(pid = child, %error, "its end will leave a zombie until this page server ends");
    }
}
