//! The thread that builds one process: takes frames in order, answers, and ends with a running process or with nothing.

use crate::addresses::{self, Coming};
use crate::arrivals::Arrivals;
use crate::handing::Handing;
use crate::network::{self, OwnNetwork};
use crate::streams::Streams;
use anyhow::{Context as _, Result, anyhow, bail};
use godwit_carry::Frame;
use godwit_network::Namespace;
use godwit_pages::PageSet;
use godwit_proto::image::InetSkEntry;
use godwit_proto::wire::{self, FailureCode, MessageType};
use godwit_proto::{Message, Typed};
use godwit_rebuild::{Builder, Clocks, Launch, Missing, Plan};
use godwit_resources::{Obstacle, descriptors, host};
use godwit_session::{Destination, Received};
use godwit_stream::{Scratch, decode_message, decode_pages};
use std::time::Instant;
use tokio::sync::mpsc;

/// What the workshop is handed.
#[derive(Debug)]
pub(crate) enum Work {
    /// A frame from the source.
    Frame(Frame),
    /// The source is gone.
    Lost(String),
}

/// A message for the source, encoded.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) kind: MessageType,
    pub(crate) bytes: Vec<u8>,
}

impl Reply {
    fn of<M: Message + Typed>(message: &M) -> Self {
        Self { kind: M::TYPE, bytes: message.encode_to_vec() }
    }
}

/// What the workshop asks the rest of the page server for while it works.
pub(crate) trait Faults: Send {
    /// Takes over the memory that a process will wait for, before the process runs.
    fn adopt(&mut self, pid: i32, missing: Missing) -> Result<()>;
}

/// How the work ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The process runs here.
    Running {
        /// Its pid as we see it.
        pid: i32,
        /// Whether pages are still to come.
        draining: bool,
        /// The child of ours to wait for: the process, or the init of its PID namespace.
        child: i32,
        /// What huge pages mapped at the source.
        huge: PageSet,
        /// Whether the source may still send packets for connections.
        expects_packets: bool,
        /// The network namespace that is only the process's own.
        network: Option<Namespace>,
    },
    /// A program of this host has the connections.
    HandedOver {
        /// How many.
        connections: usize,
    },
    /// Nothing is left of it.
    Abandoned(String),
}

struct Workshop<'a> {
    replies: mpsc::UnboundedSender<Reply>,
    faults: &'a mut dyn Faults,
    options: wire::Options,
    state: Destination,
    builder: Option<Builder>,
    ready: Option<Launch>,
    addresses: Vec<Coming>,
    /// What the process's own network namespace is like, and that namespace.
    network_facts: Option<wire::NetworkNamespace>,
    network: Option<OwnNetwork>,
    id: String,
    streams: Streams,
    scratch: Scratch,
    pages: u64,
    expects_packets: bool,
    phase: &'static str,
    handing: Handing,
    // N.B. last: what was held back is let go when nothing is left that could answer it.
    arrivals: Arrivals,
}

/// Works until the process runs or the migration is off. To be called on a thread of its own, which must not be used again.
pub(crate) fn work(
    queue: &mut mpsc::Receiver<Work>,
    replies: mpsc::UnboundedSender<Reply>,
    options: wire::Options,
    faults: &mut dyn Faults,
    id: String,
    (arrivals, handing): (Arrivals, Handing),
) -> Outcome {
    let addresses = addresses::parse(&options.addresses);
    let mut workshop = Workshop {
        replies,
        faults,
        options,
        state: Destination::default(),
        builder: None,
        ready: None,
        addresses,
        network_facts: None,
        network: None,
        id,
        streams: Streams::default(),
        scratch: Scratch::new(),
        pages: 0,
        expects_packets: false,
        phase: "negotiate",
        handing,
        arrivals,
    };
    while let Some(work) = queue.blocking_recv() {
        let frame = match work {
            Work::Frame(frame) => frame,
            Work::Lost(why) => return Outcome::Abandoned(why),
        };
        match workshop.handle(frame) {
            Ok(None) => {}
            Ok(Some(outcome)) => return outcome,
            Err(error) => {
                let text = format!("{error:#}");
                workshop.fail(&error, &text);
                return Outcome::Abandoned(text);
            }
        }
    }
    Outcome::Abandoned("the source is gone".to_owned())
}

fn plain(obstacle: Obstacle) -> wire::Obstacle {
    wire::Obstacle { resource: obstacle.resource, text: obstacle.text, remedy: obstacle.remedy }
}

impl Workshop<'_> {
    fn reply<M: Message + Typed>(&self, message: &M) {
        // A source that is gone is noticed by the reading side.
        let _ = self.replies.send(Reply::of(message));
    }

    fn fail(&self, error: &anyhow::Error, text: &str) {
        let code = if error.downcast_ref::<godwit_session::OutOfOrder>().is_some() {
            FailureCode::Protocol
        } else {
            FailureCode::System
        };
        self.reply(&wire::Failure {
            phase: self.phase.to_owned(),
            resource: "destination".to_owned(),
            text: text.to_owned(),
            remedy: String::new(),
            code: code.into(),
        });
    }

    fn builder(&mut self) -> Result<&mut Builder> {
        self.builder.as_mut().ok_or_else(|| anyhow!("no process is being built"))
    }

    fn handle(&mut self, frame: Frame) -> Result<Option<Outcome>> {
        let Some(kind) = frame.message_type() else {
            self.state = self.state.after(Received::Pages)?;
            self.write_pages(frame)?;
            return Ok(None);
        };
        let bytes = decode_message(&frame.header, frame.payload)?;
        let kind = MessageType::try_from(kind as i32).map_err(|_| anyhow!("message of unknown type {kind}"))?;
        let received = match kind {
            MessageType::ClockPing => Received::ClockPing,
            MessageType::Probe => Received::Probe,
            MessageType::Prepare => Received::Prepare,
            MessageType::Layout => Received::Layout,
            MessageType::Drop => Received::Drop,
            MessageType::RoundEnd => Received::RoundEnd,
            MessageType::Streams => Received::Streams,
            MessageType::Final => Received::Final,
            MessageType::Commit => Received::Commit,
            MessageType::Offer => Received::Offer,
            MessageType::HandOver => Received::HandOver,
            MessageType::Abort => Received::Abort,
            other => bail!("a source does not send {other:?}"),
        };
        self.state = self.state.after(received)?;
        match received {
            Received::ClockPing => self.clocks(&wire::ClockPing::decode(bytes)?),
            Received::Probe => self.probe(&wire::Probe::decode(bytes)?),
            Received::Prepare => self.prepare(&wire::Prepare::decode(bytes)?)?,
            Received::Layout => self.layout(&wire::Layout::decode(bytes)?)?,
            Received::Drop => self.drop_pages(&wire::Drop::decode(bytes)?)?,
            Received::RoundEnd => {
                let round = wire::RoundEnd::decode(bytes)?.round;
                self.reply(&wire::RoundAck { round, pages_written: self.pages });
            }
            Received::Streams => {
                // The first comes when the process is about to be stopped.
                self.arrivals.collect()?;
                self.streams.add(wire::Streams::decode(bytes)?)?;
            }
            Received::Final => self.finish(&wire::Final::decode(bytes)?)?,
            Received::Offer => self.offer(wire::Offer::decode(bytes)?)?,
            Received::HandOver => self.hand_over(wire::HandOver::decode(bytes)?)?,
            Received::Commit if self.handing.is_ready() => return self.commit_connections().map(Some),
            Received::Commit => return self.commit().map(Some),
            Received::Abort => {
                let abort = wire::Abort::decode(bytes)?;
                let why = abort.error.map_or_else(String::new, |error| error.text);
                return Ok(Some(Outcome::Abandoned(format!("called off by the source in {}: {why}", abort.phase))));
            }
            // Packets come when there is no workshop any more.
            Received::Pages | Received::Packets => {}
        }
        Ok(None)
    }

    fn clocks(&self, ping: &wire::ClockPing) {
        self.reply(&wire::ClockPong {
            sent_ns: ping.sent_ns,
            monotonic_ns: host::clock_ns(libc::CLOCK_MONOTONIC),
            boottime_ns: host::clock_ns(libc::CLOCK_BOOTTIME),
        });
    }

    fn probe(&mut self, probe: &wire::Probe) {
        self.phase = "probe";
        let facts = probe.process.clone().unwrap_or_default();
        let moved: Vec<_> = self.addresses.iter().map(|coming| coming.ip).collect();
        let mut obstacles = network::check(&facts, &self.options.joints, &moved);
        obstacles.extend(addresses::check(&self.options.addresses, &self.addresses));
        obstacles.extend(self.arrivals.check(&facts.listening, &moved));
        let obstacles = obstacles.into_iter().map(plain).collect();
        self.network_facts.clone_from(&facts.network);
        let taken = |pid: &u32| std::path::Path::new(&format!("/proc/{pid}")).exists();
        self.reply(&wire::ProbeReply { obstacles, pid_free: !facts.tids.iter().any(taken) });
    }

    fn prepare(&mut self, prepare: &wire::Prepare) -> Result<()> {
        self.phase = "prepare";
        let started = Instant::now();
        let plan = Plan {
            new_pid_namespace: self.options.new_pid_namespace,
            clocks: Clocks { monotonic_ns: prepare.monotonic_offset_ns, boottime_ns: prepare.boottime_offset_ns },
        };
        if let Some(contents) = &self.network_facts {
            let own = OwnNetwork::enter(contents, &self.options.joints, &self.id);
            self.network = Some(own.context("making its network namespace")?);
        }
        let builder = Builder::prepare(prepare, plan).context("building the stub")?;
        let (pid, new_pid_namespace) = (builder.pid(), builder.has_new_pid_namespace());
        let watched = descriptors::watched_from(&prepare.watched.clone().unwrap_or_default());
        self.arrivals.prepare(watched, &self.addresses)?;
        self.builder = Some(builder);
        self.reply(&wire::Prepared {
            pid: pid as u32,
            new_pid_namespace,
            elapsed_us: started.elapsed().as_micros() as u64,
        });
        tracing::info!(pid, new_pid_namespace, "the stub stands");
        Ok(())
    }

    fn layout(&mut self, layout: &wire::Layout) -> Result<()> {
        self.phase = "round";
        let mm = layout.mm.clone().unwrap_or_default();
        Ok(self.builder()?.layout(&mm, &layout.objects)?)
    }

    fn write_pages(&mut self, frame: Frame) -> Result<()> {
        let header = frame.header;
        let pages = decode_pages(&header, frame.payload, &mut self.scratch)?;
        self.pages += u64::from(header.pages);
        let builder = self.builder.as_mut().ok_or_else(|| anyhow!("no process is being built"))?;
        Ok(builder.write_pages(header.space, header.address, &pages)?)
    }

    fn drop_pages(&mut self, drop: &wire::Drop) -> Result<()> {
        let ranges = drop.ranges.iter().map(|range| (range.start, range.pages));
        Ok(self.builder()?.drop_pages(drop.space, ranges)?)
    }

    fn finish(&mut self, last: &wire::Final) -> Result<()> {
        self.phase = "rebuild";
        let started = Instant::now();
        if let Err(errno) = godwit_kernel::sched::run_first() {
            tracing::debug!(%errno, "completing the process with ordinary priority");
        }
        let builder = self.builder.take().ok_or_else(|| anyhow!("no process is being built"))?;
        let streams = std::mem::take(&mut self.streams).into_whole();
        let is_datagram = |socket: &InetSkEntry| socket.r#type == libc::SOCK_DGRAM as u32;
        let has_datagrams = last.files.iter().filter_map(|file| file.isk.as_ref()).any(is_datagram);
        self.expects_packets =
            !streams.streams.is_empty() || has_datagrams || !self.addresses.is_empty() || self.network.is_some();
        if let (Some(own), Some(contents)) = (&mut self.network, &last.network) {
            own.complete(contents)?;
        }
        // N.B. before there is a socket that could take a request.
        let watched = descriptors::watched_of(last.files.iter().filter_map(|file| file.isk.as_ref()));
        self.arrivals.add(watched, &self.addresses)?;
        let mut launch = builder.finish(last, streams)?;
        if let Some(missing) = launch.take_missing() {
            let (pid, faults) = (launch.pid(), &mut *self.faults);
            // N.B. what the fault service makes is not to live in the process's network.
            let adopted = match &self.network {
                Some(own) => own.home().inside(|| faults.adopt(pid, missing))?,
                None => faults.adopt(pid, missing),
            };
            adopted.context("handing missing pages to the fault service")?;
        }
        self.ready = Some(launch);
        self.reply(&wire::Ready { rebuild_us: started.elapsed().as_micros() as u64 });
        self.phase = "commit";
        Ok(())
    }

    /// Looks whether connections alone could come; from then on their packets are held back.
    fn offer(&mut self, mut offer: wire::Offer) -> Result<()> {
        self.phase = "probe";
        let coming: Vec<_> = self.addresses.iter().map(|coming| coming.ip).collect();
        let watched = descriptors::watched_from(&offer.watched.take().unwrap_or_default());
        let mut obstacles = descriptors::check_addresses(&offer.addresses, &coming);
        obstacles.extend(addresses::check(&self.options.addresses, &self.addresses));
        obstacles.extend(self.arrivals.check(&offer.addresses, &coming));
        obstacles.extend(self.handing.offer(offer));
        if obstacles.is_empty() {
            self.arrivals.prepare(watched, &self.addresses)?;
        }
        let obstacles = obstacles.into_iter().map(plain).collect();
        self.reply(&wire::ProbeReply { obstacles, pid_free: false });
        Ok(())
    }

    fn hand_over(&mut self, message: wire::HandOver) -> Result<()> {
        self.phase = "rebuild";
        let started = Instant::now();
        self.arrivals.add(descriptors::watched_of(&message.sockets), &self.addresses)?;
        self.handing.hand_over(message, std::mem::take(&mut self.streams).into_whole())?;
        self.reply(&wire::Ready { rebuild_us: started.elapsed().as_micros() as u64 });
        self.phase = "commit";
        Ok(())
    }

    /// N.B. what fails here is answered by a failure, and the source goes on: nothing may live by then.
    fn commit_connections(&mut self) -> Result<Outcome> {
        let started = Instant::now();
        let complete = self.handing.take()?;
        let arrived = addresses::arrive(&self.addresses)?;
        let sockets = complete.wake()?;
        arrived.keep();
        self.reply(&wire::Running { pid: 0, commit_us: 0, resume_us: started.elapsed().as_micros() as u64 });
        self.handing.tell();
        self.arrivals.deliver();
        let connections = sockets.len();
        tracing::info!(connections, "handed over");
        Ok(Outcome::HandedOver { connections })
    }

    fn commit(&mut self) -> Result<Outcome> {
        let started = Instant::now();
        let mut launch = self.ready.take().ok_or_else(|| anyhow!("nothing is ready to run"))?;
        let (pid, child, draining) = (launch.pid(), launch.child(), launch.is_draining());
        let huge = launch.take_huge();
        // N.B. before anything is sent here: what a closed gate keeps out is lost.
        launch.let_datagrams_in();
        // N.B. before connections live: what they send comes from these addresses.
        let arrived = addresses::arrive(&self.addresses)?;
        let announcement = self.network.as_ref().map(OwnNetwork::open).transpose()?.flatten();
        launch.launch()?;
        arrived.keep();
        if let Some(announcement) = announcement {
            addresses::repeat(move || announcement.tell());
        }
        let resume_us = started.elapsed().as_micros() as u64;
        self.reply(&wire::Running { pid: pid as u32, commit_us: 0, resume_us });
        self.arrivals.deliver();
        tracing::info!(pid, resume_us, "the process runs here");
        let network = self.network.take().map(OwnNetwork::into_namespace);
        Ok(Outcome::Running { pid, draining, child, huge, expects_packets: self.expects_packets, network })
    }
}
