//! The freeze: from stopping the first thread until the process runs at the destination, or runs on here.
//!
//! Everything that can be done before is done before; nothing is drawn; no file is read that walks page tables. The process's
//! memory is looked at last, because collecting its state makes system calls inside it.

use super::memory::{Memory, Slowly, Stopped, ranges};
use super::stop::{Result, Stop};
use super::{Agent, milliseconds};
use crate::event::Event;
use crate::request::{DEFAULT_DOWNTIME_TARGET_MS, OnTimeout, Request};
use godwit_kernel::process::pidfd_open;
use godwit_network::Translation;
use godwit_pages::{PageRange, PageSet};
use godwit_proto::image::{AioRingEntry, CoreEntry, SeccompMode};
use godwit_proto::wire as messages;
use godwit_resources::descriptors::Connections;
use godwit_resources::memory::{Marks, aio};
use godwit_resources::restart::SleepWatch;
use godwit_resources::signals::Waiting;
use godwit_resources::{descriptors, identity, threads};
use godwit_session::Phase;
use godwit_tracee::{Extent, Tracee};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Longest time inside the freeze that the destination may take to complete its copy, apart from taking in pages.
const READY: Duration = Duration::from_secs(3);
/// Ids of the directories among the files of the message; descriptors' files are numbered from 1.
const DIRECTORY_IDS: u32 = 0x4000_0000;
/// Bytes below a stack pointer that are sent with it: the red zone, and where interrupted calls put their times.
const BELOW_STACK_POINTER: u64 = 8192;

/// The stopped process.
#[derive(Debug)]
pub(super) struct Frozen {
    pub(super) tracee: Tracee,
    pub(super) since: Instant,
    message: messages::Final,
    /// Signals that waited when the state was read.
    waiting: Waiting,
    /// Pages that the destination will ask for.
    pub(super) missing: PageSet,
    /// Asynchronous I/O contexts that were taken from it.
    pub(super) contexts: Vec<AioRingEntry>,
    /// Connections that were taken apart.
    pub(super) connections: Connections,
    /// What the copy does not have, in words.
    pub(super) losses: Vec<String>,
}

impl Frozen {
    /// Whether job control had stopped it before.
    pub(super) fn was_stopped(&self) -> bool {
        self.tracee.threads().first().is_some_and(|leader| matches!(leader.stop, godwit_tracee::Stop::Group(_)))
    }

    /// Signals that were sent to the process since its state was read.
    pub(super) fn signals_sent_since(&self) -> Vec<messages::LateSignal> {
        self.waiting.sent_since(&self.tracee).unwrap_or_else(|error| {
            tracing::warn!(%error, "signals that came while the process stood still may be lost");
            Vec::new()
        })
    }

    /// Lets the process run on as before.
    pub(super) fn give_back(mut self) -> godwit_resources::Result<()> {
        let going = self.tracee.go_on();
        let made_again = aio::rebuild(&mut self.tracee, &self.contexts);
        drop(self.connections);
        self.tracee.release()?;
        going?;
        made_again
    }

    /// Sees to it that the process runs nothing of its own any more, whoever lets it go or continues it.
    pub(super) fn park(&mut self) -> godwit_tracee::Result<()> {
        let cores = self.message.leader.iter().chain(&self.message.threads);
        let filtered = cores
            .filter_map(|core| core.thread_core.as_ref())
            .any(|core| core.seccomp_mode.is_some_and(|mode| mode != SeccompMode::Disabled as i32));
        self.tracee.park(filtered)
    }

    /// Leaves the process stopped for good, as job control would.
    pub(super) fn hold(self) {
        self.connections.keep();
        if let Err(error) = self.tracee.release_stopped() {
            tracing::error!(%error, "the frozen process could not be left as it was");
        }
    }

    /// Ends the source's copy.
    pub(super) fn end(self) {
        self.tracee.kill();
    }
}

/// The longest freeze that the user allows. Without a limit it is as long as it is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Downtime {
    /// From when on, and how long.
    limit: Option<(Instant, Duration)>,
}

impl Downtime {
    fn begin(since: Instant, request: &Request) -> Self {
        let target = request.downtime_target.unwrap_or(Duration::from_millis(DEFAULT_DOWNTIME_TARGET_MS));
        let limit = request.downtime_limit.filter(|_| request.on_timeout == OnTimeout::Cancel);
        Self { limit: limit.map(|more| (since, target + more)) }
    }

    /// Time that is left; `None` without a limit.
    fn left(self) -> Option<Duration> {
        self.limit.map(|(since, allowed)| allowed.saturating_sub(since.elapsed()))
    }

    /// Calls the move off when the time is over.
    pub(super) fn check(self) -> Result<()> {
        let Some((since, allowed)) = self.limit else { return Ok(()) };
        let so_far = since.elapsed();
        if so_far < allowed {
            return Ok(());
        }
        let text = format!(
            "the freeze has lasted {:.0} ms and is not over; allowed are {:.0} ms",
            milliseconds(so_far),
            milliseconds(allowed)
        );
        Err(Stop::with_remedy("downtime limit", text, "allow more with --downtime-limit, or give --on-timeout force"))
    }
}

impl Agent<'_> {
    /// Stops all threads. The process goes on once more for a moment where it has closed connections in the last one: what is left in
    /// these has to be taken over while their peers are not held back.
    pub(super) fn freeze(&mut self) -> Result<()> {
        /// A program may go on closing some.
        const STOPS: usize = 4;
        self.check_wish_to_stop()?;
        if !self.is_ready_for_freeze() {
            self.prepare_freeze()?;
        }
        // N.B. before new clients have to wait.
        self.look_early()?;
        self.hold_requests()?;
        let mut closed = self.closed.take().unwrap_or_default();
        let (begun, mut stops) = (Instant::now(), 1);
        let (tracee, since) = loop {
            let mut unfinished = self.await_unfinished(&mut closed, begun)?;
            let (tracee, since) = self.stop()?;
            let mut lately = if self.request.tcp_close { Vec::new() } else { self.network.closed_lately(&closed) };
            if lately.is_empty() || stops == STOPS {
                unfinished.closing.append(&mut lately);
                self.warn_of(&unfinished);
                break (tracee, since);
            }
            tracee.release()?;
            self.end_hurry();
            self.emit(Event::Thawed);
            tracing::debug!(stops, connections = lately.len(), "closed in the last moment");
            self.check_wish_to_stop()?;
            stops += 1;
        };
        self.report.freeze.stop = milliseconds(since.elapsed());
        self.downtime = Downtime::begin(since, self.request);
        self.network.early_connections.settle();
        let message = messages::Final::default();
        self.frozen = Some(Frozen {
            waiting: Waiting::default(),
            tracee,
            since,
            message,
            missing: PageSet::new(),
            contexts: Vec::new(),
            connections: std::mem::take(&mut self.network.connections),
            losses: Vec::new(),
        });
        Ok(())
    }

    fn stop(&mut self) -> Result<(Tracee, Instant)> {
        let pid = self.request.pid;
        let inspected = self.inspected.as_ref().expect("looked at in the first phase");
        self.memory.as_mut().expect("opened before").look_for_guards()?;
        self.sleep_watch.sample(pid, &inspected.outer_tids);
        self.emit(Event::Frozen);
        self.ordinary_scheduling = godwit_kernel::sched::run_first().ok();
        let since = Instant::now();
        let mut tracee = Tracee::freeze(pid, Extent::AllThreads)?;
        // N.B. what the destination has prepared is for the program that was looked at.
        if self.has_other_program() {
            return Err(Stop::other_program());
        }
        self.sleep_watch.settle(&mut tracee)?;
        Ok((tracee, since))
    }

    /// Does what may take a while and has to be done shortly before the freeze, while the process runs: what it writes meanwhile is for
    /// one more round.
    ///
    /// # Errors
    /// When the fault service cannot be reached.
    pub(super) fn prepare_freeze(&mut self) -> Result<()> {
        if self.mode.has(Phase::Drain) {
            self.call_fault_service()?;
        }
        let closed = self.look_for_closed();
        self.await_lull();
        self.closed = Some(closed);
        Ok(())
    }

    pub(super) fn is_ready_for_freeze(&self) -> bool {
        self.closed.is_some()
    }

    /// Looks at connections as they are, and has the destination expect them.
    fn look_early(&mut self) -> Result<()> {
        let wire = self.wire.as_ref().expect("connected in the first phase");
        let (mut told, translation) = (Ok(()), &self.network.translation);
        self.network
            .early_connections
            .read(self.request.pid, &mut |streams| send_next(wire, translation, streams, &mut told))?;
        told
    }

    /// Reads everything but the content of memory.
    pub(super) fn collect(&mut self) -> Result<()> {
        let started = Instant::now();
        let frozen = self.frozen.as_mut().expect("stopped in the phase before");
        let memory = self.memory.as_mut().expect("opened before");
        let inspected = self.inspected.as_mut().expect("looked at in the first phase");
        identity::look_again(&frozen.tracee)?;
        // N.B. before memory is looked at: devices write into it until then.
        aio::take_all(&mut frozen.tracee, &mut frozen.contexts)?;
        let read_at = Instant::now();
        let state = threads::collect(&mut frozen.tracee, &mut inspected.numbering, &self.sleep_watch)?;
        let pidfd =
            pidfd_open(self.request.pid).map_err(|errno| Stop::failed("process", format!("pidfd_open: {errno}")))?;
        let numbers = descriptors::Numbers::of(&mut frozen.tracee, self.network.early_connections.descriptors())?;
        let source = descriptors::Source {
            pid: self.request.pid,
            pidfd: pidfd.as_fd(),
            numbers: &numbers,
            survey: &inspected.survey,
            externals: &inspected.externals,
            early: &self.network.early_connections,
            at: read_at,
        };
        let objects = &mut memory.reader.objects;
        let mut hold = self.network.hold.take();
        let network = &self.network;
        let wire = self.wire.as_ref().expect("connected in the first phase");
        let sent_before = wire.bytes_sent();
        let mut told = Ok(());
        let mut tell = |streams| send_next(wire, &network.translation, streams, &mut told);
        let taking = descriptors::Taking {
            hold: hold.as_mut(),
            close: self.request.tcp_close,
            objection: &|flows| network.objection(flows, &inspected.survey.network.flows),
            connections: &mut frozen.connections,
            closed: &network.closed,
            // What is closed anyway need not wait to be accepted first.
            skip_in_flight: self.request.skip_in_flight || self.request.tcp_close,
            tell: &mut tell,
        };
        let held = descriptors::collect(&source, &mut |object, fd| objects.admit_described(object, fd), taking);
        self.network.hold = hold;
        let mut held = held?;
        told?;
        descriptors::translate_files(&mut held.files, &self.network.translation);
        descriptors::translate_contents(&mut held.sockets, &self.network.translation);
        self.frozen_bytes = wire.bytes_sent() - sent_before;
        frozen.waiting = Waiting::of(state.tids(), &state.leader, &state.threads);
        let message = &mut frozen.message;
        let (fs, directories) = state.place.to_messages(DIRECTORY_IDS);
        let mut files = held.files;
        files.extend(directories);
        message.tids = state.tids().to_vec();
        message.leader = Some(state.leader);
        message.threads = state.threads;
        message.process = Some(state.process);
        message.seccomp = Some(state.seccomp);
        message.fs = Some(fs);
        message.descriptors = held.fdinfo;
        message.files = files;
        message.pipes = held.pipes;
        message.sockets = held.sockets;
        frozen.losses = held.losses;
        // N.B. behind the descriptors: packets are held back by now, and nothing is tracked any more.
        message.network = self.network.own_now()?;
        message.tracked = self.network.tracked();
        message.collected_monotonic_ns = state.clocks.monotonic_ns;
        message.collected_boottime_ns = state.clocks.boottime_ns;
        message.collected_realtime_ns = state.clocks.realtime_ns;
        let (dumpable, thp_disabled) = (state.dumpable, state.thp_disabled);
        let marks = Marks::of(&mut frozen.tracee)?;
        // N.B. the scratch mapping is gone before the layout is read, or it would travel along.
        frozen.tracee.drop_scratch()?;
        if !frozen.connections.is_empty() {
            // N.B. should this agent die, they are put right before the process goes on: a program must not come upon them now.
            frozen.tracee.stop_if_abandoned()?;
        }
        memory.follow_layout(Slowly::No)?;
        marks.apply(&mut memory.layout.mm);
        memory.layout.mm.aios.clone_from(&frozen.contexts);
        memory.layout.mm.dumpable = Some(dumpable);
        memory.layout.mm.thp_disabled = Some(thp_disabled);
        self.report.freeze.collect = milliseconds(started.elapsed());
        Ok(())
    }

    /// Sends what was written since the last round: content as far as it fits the freeze, addresses for the rest.
    pub(super) fn final_round(&mut self) -> Result<()> {
        let started = Instant::now();
        let deadline = self.time_left().map(|left| started + left);
        let frozen = self.frozen.as_mut().expect("stopped before");
        let memory = self.memory.as_mut().expect("opened before");
        let wire = self.wire.as_ref().expect("connected in the first phase");
        memory.send_layout(wire)?;
        let mut now = memory.changed(wire, Stopped::Yes, &mut self.unsent, &mut self.sleep_watch)?;
        if self.mode.has(Phase::Drain) {
            let later = split(memory, &now, &frozen.message, self.convergence.freeze_budget(), self.report.rounds > 0);
            now.remove_all(&later);
            frozen.missing = later;
        }
        self.frozen_pages = now.pages();
        let (cancel, downtime) = (self.cancel, self.downtime);
        memory.send_pages(wire, &now, Stopped::Yes, &mut |_| match deadline {
            _ if cancel.is_cancelled() => Err(Stop::Cancelled),
            Some(deadline) if Instant::now() >= deadline => Err(Stop::late()),
            _ => downtime.check(),
        })?;
        memory.send_objects(wire)?;
        let described = memory.describe()?;
        (frozen.message.huge, frozen.message.guards) = memory.peculiar();
        frozen.message.mm = described.mm;
        frozen.message.objects = described.objects;
        if !frozen.missing.is_empty() {
            frozen.message.missing = vec![messages::PageRanges { space: 0, ranges: ranges(&frozen.missing) }];
        }
        wire.send(&frozen.message)?;
        self.report.freeze.final_round = milliseconds(started.elapsed());
        Ok(())
    }

    /// Waits until the destination's copy is complete.
    pub(super) fn await_ready(&mut self) -> Result<()> {
        let started = Instant::now();
        let pages = self.frozen_pages + self.frozen_bytes.div_ceil(godwit_pages::PAGE_SIZE);
        let limit = READY + self.convergence.time_for(pages) * 3;
        let longest = self.downtime.left().into_iter().chain(self.time_left()).min();
        let ready = self.wire().receive_before(limit, longest, Some(self.cancel));
        self.downtime.check()?;
        if ready.is_err() {
            self.check_wish_to_stop()?;
        }
        let ready: messages::Ready = ready?;
        tracing::debug!(ready.rebuild_us, "the copy is complete");
        self.report.freeze.rebuild = milliseconds(started.elapsed());
        if let Some(serving) = &self.serving {
            serving.begin();
        }
        Ok(())
    }

    /// Goes back to how this thread was scheduled before the freeze.
    pub(super) fn end_hurry(&mut self) {
        if let Some(before) = self.ordinary_scheduling.take()
            && let Err(errno) = godwit_kernel::sched::set_attributes(0, &before)
        {
            tracing::debug!(%errno, "keeping the priority of the freeze");
        }
    }

    /// Ends the source's copy; the destination has all of it.
    pub(super) fn let_go(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            frozen.end();
        }
    }
}

/// Stops all threads for a moment while the rounds have yet to begin or to go on.
pub(super) fn pause(pid: i32, watch: &mut SleepWatch) -> Result<Tracee> {
    let tids: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    watch.sample(pid, &tids);
    let mut tracee = Tracee::freeze(pid, Extent::AllThreads)?;
    watch.settle(&mut tracee)?;
    Ok(tracee)
}

/// Chooses what follows after the freeze. Everything that may, unless all of it fits into the freeze; never what the kernel
/// itself touches on behalf of a thread before it runs.
fn split(memory: &Memory, changed: &PageSet, state: &messages::Final, budget: u64, measured: bool) -> PageSet {
    if measured && changed.pages() <= budget {
        return PageSet::new();
    }
    let mut later = memory.can_follow_later(changed);
    for core in state.leader.iter().chain(&state.threads) {
        for page in touched_early(core) {
            later.remove(page);
        }
    }
    for &block in memory.layout.mm.aios.iter().flat_map(|context| &context.resubmit) {
        if let Some(page) = PageRange::enclosing(block, block.saturating_add(64)) {
            later.remove(page);
        }
    }
    later
}

/// Pages that a thread needs before anybody answers faults: its rseq area, its tid word, and around its stack pointer.
fn touched_early(core: &CoreEntry) -> Vec<PageRange> {
    let mut pages = Vec::new();
    let mut add = |start: u64, length: u64| {
        if start != 0 {
            pages.extend(PageRange::enclosing(start, start.saturating_add(length)));
        }
    };
    if let Some(info) = &core.thread_info {
        add(info.clear_tid_addr, 4);
        let stack = info.gpregs.sp;
        add(stack.saturating_sub(BELOW_STACK_POINTER), BELOW_STACK_POINTER + 256);
        add(info.gpregs.fs_base, 256);
    }
    for address in threads::touched(core) {
        add(address, 64);
    }
    if let Some(thread) = &core.thread_core {
        add(thread.futex_rla, 24);
    }
    pages
}

/// Sends some connections, as the destination is to have them, unless that has failed before.
fn send_next(wire: &super::Wire, translation: &Translation, mut streams: messages::Streams, told: &mut Result<()>) {
    let expected = streams.expected.iter_mut().filter_map(|expected| expected.socket.as_mut());
    for socket in streams.sockets.iter_mut().chain(expected) {
        descriptors::translate_socket(socket, translation);
    }
    if told.is_ok() {
        *told = send_streams(wire, streams);
    }
}

/// Sends what there is in connections; long queues in pieces.
pub(super) fn send_streams(wire: &super::Wire, all: messages::Streams) -> Result<()> {
    const MESSAGE: usize = 1 << 20;
    let messages::Streams { streams, option_sets, sockets, expected, tracked } = all;
    let mut message = messages::Streams { option_sets, sockets, expected, tracked, ..messages::Streams::default() };
    let mut size = 0;
    for mut stream in streams {
        let (mut received, mut sent) = (std::mem::take(&mut stream.received), std::mem::take(&mut stream.sent));
        loop {
            let room = MESSAGE.saturating_sub(size);
            stream.received = received.drain(..received.len().min(room)).collect();
            stream.sent = sent.drain(..sent.len().min(room - stream.received.len())).collect();
            size += stream.received.len() + stream.sent.len() + 128;
            let id = stream.id;
            message.streams.push(std::mem::take(&mut stream));
            if size >= MESSAGE {
                wire.send(&std::mem::take(&mut message))?;
                size = 0;
            }
            if received.is_empty() && sent.is_empty() {
                break;
            }
            stream.id = id;
        }
    }
    if message == messages::Streams::default() { Ok(()) } else { wire.send(&message) }
}
