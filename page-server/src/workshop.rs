//! The thread that builds one process: takes frames in order, answers, and ends with a running process or with nothing.

use crate::addresses::{self, Coming};
use crate::arrivals::Arrivals;
use crate::handing::Handing;
use crate::launching::Launching;
use crate::network::{self, OwnNetwork};
use crate::policy::{Guard, TooMuch};
use crate::standing::{Facts, Hands, Standing};
use crate::streams::Streams;
use anyhow::{Context as _, Result, anyhow, bail};
use godwit_carry::Frame;
use godwit_journal::{Journal, ProcessName};
use godwit_kernel::pause;
use godwit_kernel::sched::{self, Attributes};
use godwit_network::{Flow, Namespace};
use godwit_pages::PageSet;
use godwit_proto::image::InetSkEntry;
use godwit_proto::wire::{self, FailureCode, MessageType};
use godwit_proto::{Message, Typed, decode};
use godwit_rebuild::{Builder, Clocks, Launch, Missing, Plan};
use godwit_resources::{Obstacle, descriptors, host};
use godwit_session::decision::{self, DestinationEvent, ToDestination};
use godwit_session::{Destination, Received};
use godwit_stream::{Scratch, decode_message, decode_pages};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;

/// What the workshop is handed.
#[derive(Debug)]
pub(crate) enum Work {
    /// A frame from the source.
    Frame(Frame),
    /// The source is gone.
    Lost(String),
    /// It has not come back, on any link since the one of this number.
    Away(u64),
}

/// A message for the source, encoded.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) kind: MessageType,
    pub(crate) bytes: Vec<u8>,
}

impl Reply {
    pub(crate) fn of<M: Message + Typed>(message: &M) -> Self {
        Self { kind: M::TYPE, bytes: message.encode_to_vec() }
    }
}

/// What the workshop asks the rest of the page server for while it works.
pub(crate) trait Faults: Send {
    /// Takes over the memory that a process will wait for, before the process runs.
    fn adopt(&mut self, pid: i32, missing: Missing) -> Result<()>;

    /// Whether a separate daemon does.
    fn has_daemon(&self) -> bool;
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
        /// Whether the source may still send packets for connections, and for which as far as that is known.
        expects_packets: bool,
        flows: HashSet<Flow>,
        /// The network namespace that is only the process's own.
        network: Option<Namespace>,
    },
    /// A program of this host has the connections.
    HandedOver {
        /// How many.
        connections: usize,
        /// Which.
        flows: HashSet<Flow>,
    },
    /// Nothing is left of it.
    Abandoned(String),
}

/// What a workshop is for.
pub(crate) struct Commission {
    /// How the hand-over stands.
    pub(crate) standing: Arc<Standing>,
    /// Where that is written down.
    pub(crate) journal: Journal,
    /// The source.
    pub(crate) from: SocketAddr,
    /// What the user asked for there.
    pub(crate) options: wire::Options,
    /// What this host lets others send.
    pub(crate) guard: Guard,
    /// Packets that come before their connections.
    pub(crate) arrivals: Arrivals,
    /// The program that takes connections alone.
    pub(crate) handing: Handing,
}

struct Workshop<'a> {
    standing: Arc<Standing>,
    journal: Journal,
    from: SocketAddr,
    guard: Guard,
    faults: &'a mut dyn Faults,
    options: wire::Options,
    state: Destination,
    builder: Option<Builder>,
    /// The copy, as no other is called.
    process: Option<ProcessName>,
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
    /// From when the process's state has come until it runs.
    hurry: Option<Hurry>,
    handing: Handing,
    // N.B. last: what was held back is let go when nothing is left that could answer it.
    arrivals: Arrivals,
}

/// Works until the process runs or the migration is off. To be called on a thread of its own, which must not be used again.
pub(crate) fn work(queue: &mut mpsc::Receiver<Work>, commission: Commission, faults: &mut dyn Faults) -> Outcome {
    let Commission { standing, journal, from, options, guard, arrivals, handing } = commission;
    let id = standing.id.to_string();
    let addresses = addresses::parse(&options.addresses);
    let mut workshop = Workshop {
        standing,
        journal,
        from,
        guard,
        faults,
        options,
        state: Destination::default(),
        builder: None,
        process: None,
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
        hurry: None,
        handing,
        arrivals,
    };
    while let Some(work) = queue.blocking_recv() {
        let frame = match work {
            Work::Frame(frame) => frame,
            // N.B. the source may have decided; it will ask, on another link.
            Work::Lost(why) if workshop.waits_for_decision() => {
                tracing::warn!(why, "the copy is complete and waits for the source's decision");
                continue;
            }
            Work::Lost(why) => return workshop.give_up(why),
            Work::Away(link) if link == workshop.standing.links() && workshop.waits_for_decision() => {
                return workshop.give_up("the source has not come back to decide".to_owned());
            }
            Work::Away(_) => continue,
        };
        let handled = workshop.handle(frame);
        if workshop.standing.is_unheard() && !workshop.waits_for_decision() && !matches!(handled, Ok(Some(_))) {
            return workshop.give_up("the source does not read what it is told".to_owned());
        }
        match handled {
            Ok(None) => {}
            Ok(Some(outcome)) => return outcome,
            Err(error) => {
                let text = godwit_carry::with_causes(error.as_ref());
                workshop.fail(&error, &text);
                return workshop.give_up(text);
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
        self.standing.reply(Reply::of(message));
    }

    /// Whether only the decision is missing, and somebody may have made it.
    fn waits_for_decision(&self) -> bool {
        self.standing.side() == decision::Destination::Ready
    }

    /// Ends what there is; nothing of it has run.
    fn give_up(&mut self, why: String) -> Outcome {
        let standing = self.standing.clone();
        standing.because(&why);
        standing.on(DestinationEvent::SourceAway, &mut Dropped(self));
        Outcome::Abandoned(why)
    }

    fn fail(&self, error: &anyhow::Error, text: &str) {
        let code = if error.downcast_ref::<godwit_session::OutOfOrder>().is_some() {
            FailureCode::Protocol
        } else {
            FailureCode::System
        };
        let is_gone = error.downcast_ref::<godwit_rebuild::Error>().is_some_and(godwit_rebuild::Error::is_gone);
        // N.B. it is not our doing while there is a builder.
        let was_ended = is_gone || self.builder.is_some() && self.process.as_ref().is_some_and(ProcessName::is_over);
        let (text, remedy) = if was_ended {
            let remedy = "see the kernel's log there: it ends the copy first where memory is short";
            (format!("somebody has ended the copy that was being made: {text}"), remedy)
        } else if error.downcast_ref::<godwit_rebuild::Error>().is_some_and(godwit_rebuild::Error::is_thread_taken) {
            (text.to_owned(), "run the same command again; with --new-pidns no id is taken there")
        } else if error.downcast_ref::<TooMuch>().is_some() {
            (text.to_owned(), TooMuch::REMEDY)
        } else {
            (text.to_owned(), "")
        };
        self.reply(&wire::Failure {
            phase: self.phase.to_owned(),
            resource: "destination".to_owned(),
            text,
            remedy: remedy.to_owned(),
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
            Received::ClockPing => self.clocks(&decode::<wire::ClockPing>(&bytes)?),
            Received::Probe => self.probe(&decode::<wire::Probe>(&bytes)?),
            Received::Prepare => self.prepare(&decode::<wire::Prepare>(&bytes)?)?,
            Received::Layout => self.layout(&decode::<wire::Layout>(&bytes)?)?,
            Received::Drop => self.drop_pages(&decode::<wire::Drop>(&bytes)?)?,
            Received::RoundEnd => {
                let round = decode::<wire::RoundEnd>(&bytes)?.round;
                self.reply(&wire::RoundAck { round, pages_written: self.pages });
            }
            Received::Streams => {
                let mut streams = decode::<wire::Streams>(&bytes)?;
                let tracked = std::mem::take(&mut streams.tracked);
                // N.B. what is said of expected ones comes before requests are held back, and long before any packet could.
                if streams.expected.is_empty() {
                    self.arrivals.collect()?;
                }
                if streams == wire::Streams::default() {
                    self.arrivals.track(&tracked, &self.addresses);
                }
                self.streams.add(streams)?;
                // Connections alone are put together all at once.
                if self.builder.is_some() {
                    let complete = self.streams.take_complete();
                    self.make_ahead(complete)?;
                }
            }
            Received::Final => self.finish(decode::<wire::Final>(&bytes)?)?,
            Received::Offer => self.offer(decode::<wire::Offer>(&bytes)?)?,
            Received::HandOver => self.hand_over(decode::<wire::HandOver>(&bytes)?)?,
            Received::Commit if self.handing.is_ready() => return self.commit_connections().map(Some),
            Received::Commit => return self.commit(&decode::<wire::Commit>(&bytes)?.late_signals).map(Some),
            Received::Abort => {
                let abort = decode::<wire::Abort>(&bytes)?;
                let standing = self.standing.clone();
                standing.on(DestinationEvent::Heard(ToDestination::Abort), &mut Dropped(self));
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
        obstacles.extend(self.guard.probe(&facts));
        let obstacles = obstacles.into_iter().map(plain).collect();
        self.network_facts.clone_from(&facts.network);
        let taken = |pid: &u32| std::path::Path::new(&format!("/proc/{pid}")).exists();
        self.reply(&wire::ProbeReply { obstacles, pid_free: !facts.tids.iter().any(taken) });
    }

    fn prepare(&mut self, prepare: &wire::Prepare) -> Result<()> {
        self.phase = "prepare";
        let started = Instant::now();
        self.guard.layout(&prepare.mm.clone().unwrap_or_default(), &prepare.objects)?;
        self.guard.files(&prepare.files)?;
        self.standing.reserve(&self.journal)?;
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
        if self.network.as_ref().is_none_or(OwnNetwork::is_prepared) {
            self.arrivals.come_among_others();
        }
        self.arrivals.prepare(watched, &self.addresses)?;
        // N.B. now: looking takes time that the freeze does not have.
        self.process = ProcessName::of(pid);
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
        self.guard.layout(&mm, &layout.objects)?;
        Ok(self.builder()?.layout(&mm, &layout.objects)?)
    }

    fn write_pages(&mut self, frame: Frame) -> Result<()> {
        let header = frame.header;
        let pages = decode_pages(&header, frame.payload, &mut self.scratch)?;
        self.guard.pages(header.space, header.address, header.pages.into())?;
        self.pages += u64::from(header.pages);
        let builder = self.builder.as_mut().ok_or_else(|| anyhow!("no process is being built"))?;
        Ok(builder.write_pages(header.space, header.address, &pages)?)
    }

    fn drop_pages(&mut self, drop: &wire::Drop) -> Result<()> {
        let ranges = drop.ranges.iter().map(|range| (range.start, range.pages));
        self.guard.dropped(drop.space, ranges.clone());
        Ok(self.builder()?.drop_pages(drop.space, ranges)?)
    }

    /// Makes connections whose content is here, while the source takes others apart, and sockets for those that are expected.
    fn make_ahead(&mut self, complete: wire::Streams) -> Result<()> {
        if complete == wire::Streams::default() {
            return Ok(());
        }
        // N.B. for this moment only: pages may follow, any number of them. Nobody waits for what is only expected.
        let _hurry = complete.expected.is_empty().then(Hurry::begin);
        // N.B. before there is a socket that could take a packet.
        self.arrivals.add(descriptors::watched_of(&complete.sockets), &self.addresses)?;
        Ok(self.builder()?.make_ahead(complete)?)
    }

    fn finish(&mut self, last: wire::Final) -> Result<()> {
        self.phase = "rebuild";
        let started = Instant::now();
        self.guard.state(&last)?;
        let hurry = Hurry::begin();
        let rest = std::mem::take(&mut self.streams).into_whole();
        if let (Some(own), Some(contents)) = (&mut self.network, &last.network) {
            own.complete(contents)?;
        }
        self.make_ahead(rest)?;
        let builder = self.builder.take().ok_or_else(|| anyhow!("no process is being built"))?;
        let is_datagram = |socket: &InetSkEntry| socket.r#type == libc::SOCK_DGRAM as u32;
        let has_datagrams = last.files.iter().filter_map(|file| file.isk.as_deref()).any(is_datagram);
        self.expects_packets =
            builder.has_connections() || has_datagrams || !self.addresses.is_empty() || self.network.is_some();
        // N.B. before there is a socket that could take a request.
        let watched = descriptors::watched_of(last.files.iter().filter_map(|file| file.isk.as_deref()));
        self.arrivals.add(watched, &self.addresses)?;
        self.arrivals.track(&last.tracked, &self.addresses);
        let mut launch = builder.finish(last)?;
        if let Some(missing) = launch.take_missing() {
            let (pid, faults) = (launch.pid(), &mut *self.faults);
            // N.B. what the fault service makes is not to live in the process's network.
            let adopted = match &self.network {
                Some(own) => own.home().inside(|| faults.adopt(pid, missing))?,
                None => faults.adopt(pid, missing),
            };
            adopted.context("handing missing pages to the fault service")?;
        }
        let (pid, needs_pages) = (launch.pid(), launch.is_draining());
        self.ready = Some(launch);
        let process = self.process.clone().ok_or_else(|| anyhow!("the copy is gone"))?;
        let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
        let facts = Facts {
            process,
            command,
            from: self.from,
            party: self.standing.party,
            released: false,
            ended: false,
            has_daemon: self.faults.has_daemon(),
            needs_none: false,
        };
        let ready = wire::Ready { rebuild_us: started.elapsed().as_micros() as u64 };
        self.standing.built(facts, needs_pages, &ready)?;
        self.phase = "commit";
        // The decision is next, and nothing else.
        self.hurry = Some(hurry);
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
            self.arrivals.come_among_others();
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
        self.arrivals.track(&message.tracked, &self.addresses);
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
        let resume_us = started.elapsed().as_micros() as u64;
        self.reply(&wire::Running { resume_us, complete: true, ..wire::Running::default() });
        self.handing.tell();
        let flows = self.arrivals.deliver();
        let connections = sockets.len();
        tracing::info!(connections, "handed over");
        Ok(Outcome::HandedOver { connections, flows })
    }

    fn commit(&mut self, late_signals: &[wire::LateSignal]) -> Result<Outcome> {
        pause::at("committed");
        let mut launch = self.ready.take().ok_or_else(|| anyhow!("nothing is ready to run"))?;
        let (pid, child, draining) = (launch.pid(), launch.child(), launch.is_draining());
        let huge = launch.take_huge();
        let standing = self.standing.clone();
        let mut launching = Launching::new(launch, &self.addresses, self.network.as_ref(), late_signals);
        let side = standing.on(DestinationEvent::Heard(ToDestination::Commit), &mut launching);
        if !matches!(side, decision::Destination::Runs { .. }) {
            return Ok(Outcome::Abandoned(format!("it could not be let go: {}", standing.reason())));
        }
        // Nothing stands still any more, and the source is still to hear of it: what follows takes its turn.
        self.hurry = None;
        standing.note_released();
        if let Some(rebuilt) = launching.into_launched() {
            rebuilt.inform_connections();
        }
        let flows = self.arrivals.deliver();
        tracing::info!(pid, "the process runs here");
        let network = self.network.take().map(OwnNetwork::into_namespace);
        Ok(Outcome::Running { pid, draining, child, huge, expects_packets: self.expects_packets, flows, network })
    }
}

/// Runs ahead of others while it lives: a process stands still.
#[derive(Debug)]
struct Hurry(Option<Attributes>);

impl Hurry {
    fn begin() -> Self {
        if sched::runs_first() {
            return Self(None);
        }
        let before = sched::run_first();
        Self(before.inspect_err(|errno| tracing::debug!(%errno, "going on with ordinary priority")).ok())
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        if let Some(before) = self.0.take()
            && let Err(errno) = sched::set_attributes(0, &before)
        {
            tracing::debug!(%errno, "keeping the priority of a moment");
        }
    }
}

/// The hands of a workshop that only ends what it has.
struct Dropped<'a, 'b>(&'a mut Workshop<'b>);

impl Hands for Dropped<'_, '_> {
    fn free(&mut self) -> Result<()> {
        bail!("it is being given up")
    }

    fn release(&mut self) {}

    fn kill(&mut self) {
        self.0.builder = None;
        self.0.ready = None;
    }

    fn running(&self) -> Option<wire::Running> {
        None
    }
}
