//! The thread that serves faults: events of userfaultfds in, urgent requests out, their pages in.
//!
//! Nothing in it may take longer than a few dozen microseconds.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use godwit_carry::{CODE_DONE, Incoming, Link, Listener, Sender};
use godwit_kernel::uffd::Userfaultfd;
use godwit_proto::wire::{Drained, PageRequest, Role};
use godwit_proto::{Message, Typed};
use godwit_stream::FrameHeader;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};

use crate::arrival;
use crate::error::{Error, Result};
use crate::greeting::{self, CODE_ACKNOWLEDGED, CODE_REPLACED, say};
use crate::handle::DrainReport;
use crate::migration::{Drain, LaneName, Stage};
use crate::queue::Request;
use crate::service::{self, Assignment, Registry};
use crate::space::Attempt;

/// Runs until told to stop.
pub(crate) async fn run(
    listener: Listener,
    registry: Registry,
    mut assigned: mpsc::UnboundedReceiver<Assignment>,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        tokio::select! {
            incoming = listener.accept() => match incoming {
                Some(incoming) => drop(tokio::spawn(answer(incoming, registry.clone()))),
                None => break,
            },
            Some(Assignment { drain, pidfd }) = assigned.recv() => {
                tokio::spawn(watch_spaces(drain.clone()));
                tokio::spawn(watch_process(drain, pidfd));
            }
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    listener.close(CODE_DONE, "the fault service ends", Duration::from_millis(200)).await;
}

async fn answer(incoming: Incoming, registry: Registry) {
    let address = incoming.remote_address();
    let accepted = match incoming.authenticate().await {
        Ok(accepted) => accepted,
        Err(error) => return greeting::tell_turned_away(address, error.into()),
    };
    let served = async {
        let caller = accepted.0.party();
        let find = |id| service::find(&registry, id, caller);
        let (drain, link, sender, receiver) = greeting::receive(accepted, Role::Faults, find).await?;
        tracing::info!(migration = %drain.id, %address, "the source is linked for faults");
        let number = drain.fault_link_up();
        let mut receiver = receiver;
        let served = tokio::select! {
            biased;
            () = replaced(&drain.fault_link, number) => {
                link.close(CODE_REPLACED, "a newer link took over");
                return Ok(());
            }
            ended = arrival::take_in(&drain, LaneName::Faults, &link, &mut receiver) => ended,
            ended = ask(&drain, sender, number) => ended,
        };
        let served = match served {
            // N.B. on a bad path this may come without the word itself, and nobody comes again to say it.
            Err(Error::Link(godwit_carry::Error::PeerClosed { code, .. })) if code == u64::from(CODE_ACKNOWLEDGED) => {
                drain.acknowledged();
                Ok(())
            }
            served => served,
        };
        if *drain.fault_link.borrow() == number {
            drain.fault_link_down();
        }
        finish(&link, &served);
        served
    };
    let served: Result<()> = served.await;
    if let Err(error) = served {
        greeting::tell_end("link for faults", address, &error);
    }
}

/// Ends a link in order where all was said.
fn finish(link: &Link, served: &Result<()>) {
    if served.is_ok() {
        link.close(CODE_DONE, "drained");
    }
}

/// Waits until a link with a higher number is there.
pub(crate) async fn replaced(counter: &watch::Sender<u64>, number: u64) {
    if counter.subscribe().wait_for(|current| *current != number).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits until nothing is missing any more.
pub(crate) async fn over(stage: &mut watch::Receiver<Stage>) {
    // The sender lives as long as the drain.
    let _ = stage.wait_for(|stage| *stage != Stage::Draining).await;
}

/// Sends urgent requests, and at the end the news that all is there; returns only when the link fails.
async fn ask(drain: &Drain, mut sender: Sender, number: u64) -> Result<()> {
    let mut stage = drain.stage.subscribe();
    loop {
        tokio::select! {
            biased;
            () = drain.asked.notified() => match drain.take_urgent(number) {
                Some(requests) => send_requests(&mut sender, requests).await?,
                // Whoever is replaced is ended.
                None => return std::future::pending().await,
            },
            () = over(&mut stage) => break,
        }
    }
    // The watcher says so in any case, and lives as long as the drain.
    let ended = is_departed(drain)
        && drain.ended.subscribe().wait_for(Option::is_some).await.is_ok_and(|ended| *ended == Some(true));
    say(&mut sender, 0, &drained(&drain.report(), ended)).await?;
    // The acknowledgement comes on the other half.
    std::future::pending().await
}

fn drained(report: &DrainReport, departed: bool) -> Drained {
    Drained {
        faults: report.faults,
        p50_us: report.p50_us,
        p99_us: report.p99_us,
        drain_us: report.drain_us,
        pages: report.pages,
        departed,
    }
}

/// Sends requests in one go.
pub(crate) async fn send_requests(sender: &mut Sender, requests: Vec<Request>) -> Result<()> {
    if requests.is_empty() {
        return Ok(());
    }
    let frames: Vec<_> = requests
        .into_iter()
        .map(|Request { id, range }| {
            let pages = u32::try_from(range.pages()).unwrap_or(u32::MAX);
            let message = PageRequest { id, space: 0, address: range.start(), pages };
            let payload = Bytes::from(message.encode_to_vec());
            (FrameHeader::message(PageRequest::TYPE as u32, id, payload.len() as u32), Some(payload))
        })
        .collect();
    Ok(sender.send_frames(frames).await?)
}

/// A userfaultfd as the runtime polls it.
struct Polled(Arc<Userfaultfd>);

impl AsRawFd for Polled {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Has the runtime poll a descriptor.
#[expect(
    deprecated,
    reason = "its successor is unsafe; what is polled here keeps its one descriptor as long as it lives"
)]
fn poll<T: AsRawFd>(inner: T) -> std::io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(inner, Interest::READABLE)
}

/// Watches the spaces of a drain, new ones too, until it is over.
async fn watch_spaces(drain: Arc<Drain>) {
    let mut stage = drain.stage.subscribe();
    let mut watched = 0;
    loop {
        while watched < drain.space_count() {
            if let Some(uffd) = drain.userfaultfd(watched) {
                tokio::spawn(watch_space(drain.clone(), watched, uffd));
            }
            watched += 1;
        }
        tokio::select! {
            () = drain.born.notified() => {}
            () = over(&mut stage) => return,
        }
    }
}

async fn watch_space(drain: Arc<Drain>, index: usize, uffd: Arc<Userfaultfd>) {
    let mut stage = drain.stage.subscribe();
    let polled = match poll(Polled(uffd)) {
        Ok(polled) => polled,
        Err(error) => {
            tracing::error!(migration = %drain.id, %error, "cannot poll a userfaultfd; the program stalls");
            return;
        }
    };
    // What was there before anybody polled is found at once; later the descriptor tells.
    if let Err(error) = attend(&drain, index).await {
        tracing::error!(migration = %drain.id, error = %chain(&error), "cannot serve faults; the program stalls");
        return;
    }
    loop {
        let mut ready = tokio::select! {
            ready = polled.readable() => match ready {
                Ok(ready) => ready,
                Err(_) => return,
            },
            () = over(&mut stage) => return,
        };
        if let Err(error) = attend(&drain, index).await {
            tracing::error!(migration = %drain.id, error = %chain(&error), "cannot serve faults; the program stalls");
            return;
        }
        ready.clear_ready();
    }
}

async fn attend(drain: &Drain, index: usize) -> Result<()> {
    let mut tries = 0u32;
    while drain.attend(index)? == Attempt::Later {
        tries += 1;
        if tries < 20 {
            tokio::task::yield_now().await;
        } else {
            // The thread whose event was read has to run, and this one goes before it.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    Ok(())
}

/// Notices the end of the program.
async fn watch_process(drain: Arc<Drain>, pidfd: OwnedFd) {
    /// How much later than its memory a program goes.
    const MOMENT: Duration = Duration::from_millis(300);
    let mut stage = drain.stage.subscribe();
    let Ok(polled) = poll(pidfd) else {
        drain.ended.send_replace(Some(false));
        return;
    };
    let ended = tokio::select! {
        ended = polled.readable() => {
            let ended = ended.is_ok();
            if ended {
                drain.departed();
            }
            ended
        }
        // Its memory may have gone because it has ended, or because it runs another program (execve(2)).
        () = over(&mut stage) => {
            is_departed(&drain) && tokio::time::timeout(MOMENT, polled.readable()).await.is_ok_and(|ended| ended.is_ok())
        }
    };
    if ended && is_departed(&drain) {
        tracing::info!(migration = %drain.id, "the program has ended before all its pages came");
    }
    drain.ended.send_replace(Some(ended));
}

/// Whether the drain was over because the program's memory was no more.
fn is_departed(drain: &Drain) -> bool {
    matches!(&*drain.stage.borrow(), Stage::Drained(report) | Stage::Acknowledged(report) if report.departed)
}

/// An error with its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
