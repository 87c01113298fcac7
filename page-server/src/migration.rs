//! One migration as its tasks see it: frames from the link to the workshop's queue, replies from the workshop to the link.

use crate::arrivals::Arrivals;
use crate::event::Event;
use crate::handing::Handing;
use crate::server::{MigrationFaults, Shared};
use crate::workshop::{self, Outcome, Reply, Work};
use anyhow::{Context as _, Result, anyhow, bail};
use bytes::Bytes;
use godwit_carry::{Channel, Link, Receiver, Sender};
use godwit_fault::MigrationId;
use godwit_network::{Delivery, Namespace, Packet};
use godwit_pages::PageSet;
use godwit_proto::wire::{self, MessageType, Role};
use godwit_proto::{Message, Typed};
use godwit_stream::decode_message;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Versions of the messages that this program understands.
const VERSION: u32 = 1;
/// Frames that wait for the workshop; with 1 MiB each they bound the memory of a migration.
const QUEUE: usize = 8;
/// Time that a source has to send packets after connections, at most; it is over when the source leaves.
const PACKETS: Duration = Duration::from_secs(3700);
/// Time a peer has for its first message.
const GREETING: Duration = Duration::from_secs(10);

/// What became of a migration.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The process runs here with all its memory.
    Moved { pid: i32 },
    /// A program of this host has connections.
    HandedOver { connections: usize },
    /// Nothing was left behind.
    Abandoned(String),
}

/// Receives one process.
///
/// # Errors
/// When the peer does not open a migration properly.
pub(crate) async fn receive(link: Link, channel: Channel, shared: Arc<Shared>) -> Result<(MigrationId, Ending)> {
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
    if hello.role() != Role::Control {
        bail!("a {:?} connection came to the control port", hello.role());
    }
    let host = godwit_resources::host::facts()?;
    let (fault_port, drain_port) = shared.fault_ports();
    let welcome = wire::Welcome {
        version: VERSION,
        host: Some(host),
        fault_port: fault_port.into(),
        drain_port: drain_port.into(),
    };
    send(&mut sender, &welcome).await?;
    shared.style.say(&Event::Begun { migration_id: id.to_string(), from: link.remote_address() });

    let options = hello.options.unwrap_or_default();
    let name = id.to_string().get(..8).unwrap_or_default().to_owned();
    let handing = Handing::new(name.clone(), shared.hand_over_to.clone());
    let beside = (Arrivals::new(name, shared.holds.clone()), handing);
    // What has begun ends in one way or the other, also when it is this program that failed.
    let ending =
        build(&link, (sender, receiver), options, (shared.faults(id), beside), id).await.unwrap_or_else(|error| {
            let why = format!("{error:#}");
            link.close(godwit_carry::CODE_DONE, &why);
            Ending::Abandoned(why)
        });
    Ok((id, ending))
}

/// Builds one process from what the link brings.
async fn build(
    link: &Link,
    (sender, receiver): (Sender, Receiver),
    options: wire::Options,
    (mut faults, beside): (MigrationFaults, (Arrivals, Handing)),
    id: MigrationId,
) -> Result<Ending> {
    let (queue, mut work) = mpsc::channel(QUEUE);
    let (replies, outbox) = mpsc::unbounded_channel();
    let workshop = tokio::task::spawn_blocking({
        // N.B. a thread of its own inside the blocking task: the builder changes the thread's namespaces for its children.
        move || {
            std::thread::Builder::new()
                .name(format!("workshop {id}"))
                .spawn(move || {
                    let outcome = workshop::work(&mut work, replies, options, &mut faults, id.to_string(), beside);
                    (outcome, faults, work)
                })
                .map(std::thread::JoinHandle::join)
        }
    });
    let writer = tokio::spawn(write(sender, outbox));
    let reader = tokio::spawn(read(receiver, queue));
    let joined = workshop.await.context("the workshop's task")?.context("starting the workshop's thread")?;
    let Ok((outcome, mut faults, work)) = joined else { bail!("the workshop's thread panicked") };
    let sender = writer.await.context("the writing task")?;
    match outcome {
        Outcome::Abandoned(why) => {
            reader.abort();
            close(link, sender, &why).await;
            Ok(Ending::Abandoned(why))
        }
        Outcome::HandedOver { connections } => {
            let delivered = tokio::task::spawn_blocking(move || deliver(work, None));
            let _ = tokio::time::timeout(PACKETS, delivered).await;
            close(link, sender, "handed over").await;
            reader.abort();
            Ok(Ending::HandedOver { connections })
        }
        Outcome::Running { pid, draining, child, huge, expects_packets, network } => {
            reap(child);
            let delivered = expects_packets.then(|| tokio::task::spawn_blocking(move || deliver(work, network)));
            if draining {
                faults.drained().await?;
            }
            if let Some(delivered) = delivered {
                // The source leaves when no more packets come.
                let _ = tokio::time::timeout(PACKETS, delivered).await;
            }
            close(link, sender, "moved").await;
            gather(pid, huge).await;
            reader.abort();
            Ok(Ending::Moved { pid })
        }
    }
}

/// Delivers packets that the source sends after their connections.
fn deliver(mut queue: mpsc::Receiver<Work>, network: Option<Namespace>) {
    let delivery = match network {
        Some(own) => own.inside(Delivery::new).flatten(),
        None => Delivery::new(),
    };
    let delivery = match delivery {
        Ok(delivery) => delivery,
        Err(error) => return tracing::warn!(%error, "packets that arrived at the source are lost"),
    };
    let (mut delivered, mut all) = (0, 0);
    while let Some(Work::Frame(frame)) = queue.blocking_recv() {
        let packets =
            decode_message(&frame.header, frame.payload).ok().and_then(|bytes| wire::Packets::decode(bytes).ok());
        let wire::Packets { packets, interfaces } = packets.unwrap_or_default();
        let interfaces = interfaces.into_iter().map(|name| (!name.is_empty()).then_some(name));
        for (bytes, interface) in packets.into_iter().zip(interfaces.chain(std::iter::repeat(None))) {
            all += 1;
            delivered += u64::from(delivery.deliver(Packet { bytes, interface }));
        }
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
    Ok(wire::Hello::decode(decode_message(&frame.header, frame.payload)?)?)
}

async fn send<M: Message + Typed>(sender: &mut Sender, message: &M) -> Result<()> {
    Ok(sender.send_message(M::TYPE as u32, 0, message.encode_to_vec().into()).await?)
}

async fn refuse(sender: &mut Sender, text: &str) {
    let failure = wire::Failure {
        phase: "negotiate".to_owned(),
        resource: "protocol version".to_owned(),
        text: text.to_owned(),
        remedy: "run the same release on both hosts".to_owned(),
        code: wire::FailureCode::Version.into(),
    };
    let _ = send(sender, &failure).await;
    let _ = tokio::time::timeout(Duration::from_secs(1), sender.finish()).await;
}

/// Passes frames on in order; the bounded queue is what slows a source down.
async fn read(mut receiver: Receiver, queue: mpsc::Sender<Work>) {
    loop {
        let work = match receiver.receive().await {
            Ok(Some(frame)) => Work::Frame(frame),
            Ok(None) => Work::Lost("the source left".to_owned()),
            Err(error) => Work::Lost(error.to_string()),
        };
        let last = matches!(work, Work::Lost(_));
        if queue.send(work).await.is_err() || last {
            return;
        }
    }
}

async fn write(mut sender: Sender, mut outbox: mpsc::UnboundedReceiver<Reply>) -> Sender {
    while let Some(reply) = outbox.recv().await {
        if sender.send_message(reply.kind as u32, 0, Bytes::from(reply.bytes)).await.is_err() {
            break;
        }
    }
    sender
}

async fn close(link: &Link, mut sender: Sender, why: &str) {
    let _ = tokio::time::timeout(Duration::from_secs(2), sender.finish()).await;
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
