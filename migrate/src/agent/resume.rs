//! Going on with a migration whose agent is gone, or whose link was: from what was written down, without any of its memory.

use super::drain::lost;
use super::handover::resume_link;
use super::stop::{Result, Stop};
use super::wire::{Answer, Counterpart, Wire};
use super::{milliseconds, way_on};
use crate::cancel::Cancel;
use crate::event::{Event, Faults};
use crate::journal::{self, Facts, SourceEntry};
use crate::report::{Failure, Outcome, Report, SourceState};
use crate::request::Request;
use godwit_fault::{FrozenProcess, MigrationId, PageSource};
use godwit_kernel::process::kill;
use godwit_network::{Address, Announcer, Namespace, Silence, give_routes};
use godwit_proto::wire as messages;
use godwit_resources::descriptors::wake_connections;
use godwit_resources::memory::aio;
use godwit_session::Phase;
use godwit_session::decision::{Source, SourceEvent, SourceRecord, SourceStep, ToDestination, Verdict};
use godwit_tracee::ledger::{Afterwards, Mended};
use godwit_tracee::{Extent, Tracee};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest wait for a verdict.
const ANSWER: Duration = Duration::from_secs(5);
/// Time between two calls of a destination that does not answer.
const PAUSE: Duration = Duration::from_millis(300);
/// Time that an ended process has to go.
const TO_GO: Duration = Duration::from_secs(10);

/// What the user wants gone on with.
#[derive(Clone, Debug)]
pub struct Resumption {
    /// The migration, or the first digits of its id.
    pub id: String,
    /// Where it is written down.
    pub state_directory: PathBuf,
    /// How long the destination is called.
    pub reconnect_for: Duration,
    /// What is known of it by who has seen it begin.
    pub so_far: Option<Report>,
    /// When the first thread was stopped, where no copy is known to run since.
    pub frozen_since: Option<Instant>,
}

/// A migration as it was left.
pub(super) struct Left<'a> {
    entry: Option<SourceEntry>,
    facts: Facts,
    id: MigrationId,
    side: Source,
    reconnect_for: Duration,
    state_directory: PathBuf,
    wire: Option<Wire>,
    welcome: messages::Welcome,
    cancel: &'a Cancel,
    events: &'a mut dyn FnMut(Event),
    report: Report,
    frozen_since: Option<Instant>,
    /// Whether the process was let go on here.
    goes_on: bool,
}

/// Goes on with a migration and says what came of it.
///
/// # Errors
/// In words, when there is nothing to go on with.
pub fn resume(
    wish: &Resumption,
    events: &mut dyn FnMut(Event),
    cancel: &Cancel,
) -> std::result::Result<Report, String> {
    let journal = journal::open(&wish.state_directory).map_err(|error| error.to_string())?;
    let entry = journal::find_patiently(&journal, &wish.id).map_err(|error| error.to_string())?;
    let entry = entry.ok_or_else(|| {
        let status = journal::command("status", &wish.state_directory);
        format!("no migration {} is written down here; {status} lists those that are", wish.id)
    })?;
    let started = Instant::now();
    let mut left = Left::new(entry, wish.reconnect_for, events, cancel);
    if let Some(so_far) = &wish.so_far {
        left.report.clone_from(so_far);
    }
    left.frozen_since = wish.frozen_since;
    let outcome = left.go_on();
    left.conclude(outcome);
    left.report.total_ms += milliseconds(started.elapsed());
    Ok(left.report)
}

/// Lets a process go on that an agent has left before anything was decided, and tells the destination if it can be reached.
///
/// # Errors
/// In words, when it cannot be.
pub fn let_go_on(entry: SourceEntry) -> std::result::Result<(), String> {
    with_left(entry, |left| {
        left.settle_locally()?;
        // Without this word the copy there waits until its patience ends.
        if let Err(stop) = left.say_abort() {
            tracing::debug!(?stop, "the destination does not hear that it is called off");
        }
        Ok(())
    })
}

/// Lets a process go on whatever was decided: the user answers for it. Where all is over at the destination that is told.
///
/// # Errors
/// In words, when it cannot be.
pub fn thaw(entry: SourceEntry, is_over_there: bool) -> std::result::Result<(), String> {
    with_left(entry, |left| {
        left.perform(&[SourceStep::Record(SourceRecord::Stayed), SourceStep::GoOn, SourceStep::Forget])?;
        if is_over_there {
            left.say_over();
        }
        Ok(())
    })
}

/// Ends the copy that is here whatever was decided: the user answers for it. Where the destination needs nothing more that is told.
///
/// # Errors
/// In words, when it cannot be.
pub fn end(entry: SourceEntry, is_over_there: bool) -> std::result::Result<(), String> {
    with_left(entry, |left| {
        left.perform(&[SourceStep::EndCopy, SourceStep::Forget])?;
        if is_over_there {
            left.say_over();
        }
        Ok(())
    })
}

fn with_left(entry: SourceEntry, act: impl FnOnce(&mut Left<'_>) -> Result<()>) -> std::result::Result<(), String> {
    let cancel = Cancel::new().map_err(|errno| errno.to_string())?;
    let mut ignored = |_| {};
    let mut left = Left::new(entry, Duration::ZERO, &mut ignored, &cancel);
    act(&mut left).map_err(|stop| stop.text())
}

/// The page server as it was known when the move began.
fn counterpart(facts: &Facts) -> Result<Counterpart> {
    Ok(Counterpart { credentials: facts.credentials()?, party: facts.party })
}

/// What a destination says about a hand-over.
#[derive(Clone, Debug)]
pub struct Answered {
    /// How it stands.
    pub verdict: Verdict,
    /// The process there, where there is one.
    pub pid: i32,
    /// Why its copy will never run.
    pub reason: String,
    /// It has ended there before all its pages came.
    pub ended: bool,
}

impl std::fmt::Display for Answered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.verdict {
            Verdict::Unknown => f.write_str("knows nothing of it"),
            Verdict::Waiting => write!(f, "a complete copy (pid {}) waits to be let run", self.pid),
            Verdict::Runs { .. } if self.ended => {
                write!(f, "it ran there as {} and has ended before all its pages came", self.pid)
            }
            Verdict::Runs { complete: true } => write!(f, "it runs there as {}, with all its memory", self.pid),
            Verdict::Runs { complete: false } => write!(f, "it runs there as {} and still needs pages", self.pid),
            Verdict::Aborted => write!(f, "the copy never ran and never will ({})", self.reason),
        }
    }
}

/// Asks the destination how a hand-over stands.
///
/// # Errors
/// In words, when it cannot be reached.
pub fn ask(facts: &Facts, id: &str, cancel: &Cancel) -> std::result::Result<Answered, String> {
    let id = MigrationId::parse(id).ok_or("no migration has this id")?;
    let ask = || {
        let (mut wire, _) = resume_link(&facts.to, &counterpart(facts)?, id.0, cancel)?;
        wire.send(&messages::Query {})?;
        let answer = wire.receive_answer(ANSWER);
        wire.close("asked");
        answer
    };
    let Answer { verdict, pid, reason, ended } = ask().map_err(|stop: Stop| stop.text())?;
    Ok(Answered { verdict, pid, reason, ended })
}

impl<'a> Left<'a> {
    pub(super) fn new(
        entry: SourceEntry,
        reconnect_for: Duration,
        events: &'a mut dyn FnMut(Event),
        cancel: &'a Cancel,
    ) -> Self {
        let facts = entry.facts().clone();
        let request = Request { mode: facts.mode, ..Request::new(facts.process.pid, &facts.to) };
        let mut report = Report::new(&request);
        entry.id().clone_into(&mut report.migration_id);
        // An entry lies in its side's directory of the state directory.
        let entry_directory = entry.path().parent().and_then(Path::parent).map(Path::to_owned);
        Self {
            id: MigrationId::parse(entry.id()).unwrap_or(MigrationId([0; 16])),
            entry: Some(entry),
            facts,
            side: Source::default(),
            reconnect_for,
            state_directory: entry_directory.unwrap_or_default(),
            wire: None,
            welcome: messages::Welcome::default(),
            cancel,
            events,
            report,
            frozen_since: None,
            goes_on: false,
        }
    }

    fn record(&self) -> SourceRecord {
        self.entry.as_ref().map_or(SourceRecord::Undecided, |entry| entry.state())
    }

    /// What needs nobody else: what was left undecided, or settled.
    fn settle_locally(&mut self) -> Result<()> {
        let (side, steps) = Source::restarted(self.record());
        self.side = side;
        self.perform(steps)
    }

    fn go_on(&mut self) -> Result<()> {
        self.settle_locally()?;
        if !self.side.is_decided() {
            return Ok(());
        }
        let asked_from = Instant::now();
        let mut said = String::new();
        loop {
            let lost = match self.ask_and_act() {
                Ok(()) => return Ok(()),
                Err(stop @ Stop::Unknown(_)) => return Err(stop),
                // It is settled, and not as wished.
                Err(stop) if !self.side.is_decided() => return Err(stop),
                Err(stop) => stop,
            };
            if asked_from.elapsed() >= self.reconnect_for || self.cancel.is_cancelled() {
                return Err(Stop::Unknown(format!(
                    "the destination was called for {} s: {}",
                    self.reconnect_for.as_secs(),
                    lost.text()
                )));
            }
            let why = lost.text();
            if why != said {
                (self.events)(Event::warning(format!(
                    "{why}; it is called again for {} s",
                    self.reconnect_for.saturating_sub(asked_from.elapsed()).as_secs()
                )));
                said = why;
            }
            self.cancel.wait(PAUSE);
        }
    }

    fn ask_and_act(&mut self) -> Result<()> {
        let known = counterpart(&self.facts)?;
        let (wire, welcome) = resume_link(&self.facts.to, &known, self.id.0, self.cancel)?;
        (self.wire, self.welcome) = (Some(wire), welcome);
        let steps = self.side.on(SourceEvent::Linked);
        self.perform(steps)?;
        let mut answer = self.answer()?;
        if answer.verdict == Verdict::Waiting {
            let steps = self.side.on(SourceEvent::Answer(answer.verdict));
            self.perform(steps)?;
            answer = self.answer()?;
        }
        if let Verdict::Runs { .. } = answer.verdict {
            self.report.dest_pid = Some(answer.pid);
            if answer.ended {
                self.report.outcome = Outcome::Ended;
                (self.events)(Event::Ended);
                if self.facts.process.is_there() {
                    // N.B. kept: somebody may have ended a copy there that could not go on, and this is all that is left.
                    return Ok(());
                }
            } else {
                let freeze_ms = self.frozen_since.take().map_or(0.0, |since| milliseconds(since.elapsed()));
                self.report.freeze_ms += freeze_ms;
                (self.events)(Event::Running { dest_pid: answer.pid, freeze_ms });
            }
        }
        let steps = self.side.on(SourceEvent::Answer(answer.verdict));
        self.perform(steps)?;
        match answer.verdict {
            Verdict::Unknown => Err(Stop::Unknown(
                "the destination knows nothing of it, or nothing that this host may know: its journal was lost, or it was begun \
                 under another key or token"
                    .to_owned(),
            )),
            Verdict::Aborted => Err(Stop::failed("destination", answer.reason)),
            _ => Ok(()),
        }
    }

    fn answer(&self) -> Result<Answer> {
        self.wire.as_ref().expect("called just before").receive_answer(ANSWER)
    }

    pub(super) fn perform(&mut self, steps: &'static [SourceStep]) -> Result<()> {
        for step in steps {
            match *step {
                SourceStep::Record(state) => {
                    if let Some(entry) = &mut self.entry {
                        entry.record(state)?;
                    }
                }
                SourceStep::Secure | SourceStep::Hold => {}
                SourceStep::Send(word) => self.say(word)?,
                SourceStep::GoOn => {
                    give_back(&self.facts, &self.state_directory)?;
                    self.goes_on = true;
                }
                SourceStep::Serve => {
                    let steps = self.serve()?;
                    self.perform(steps)?;
                }
                SourceStep::EndCopy => self.end_copy()?,
                SourceStep::Forget => {
                    journal::forget_ledger(&self.state_directory, &self.facts.process);
                    if let Some(entry) = self.entry.take() {
                        entry.remove()?;
                    }
                }
            }
        }
        Ok(())
    }

    fn say(&mut self, word: ToDestination) -> Result<()> {
        // What is over is told to whom it may concern, if that is easy.
        if matches!(word, ToDestination::Over | ToDestination::Abort) && self.wire.is_none() {
            return Ok(());
        }
        let wire = self.wire.as_ref().expect("called before anything is said");
        match word {
            ToDestination::Commit => wire.send(&messages::Commit::default()),
            ToDestination::Query => wire.send(&messages::Query {}),
            ToDestination::Over => wire.send(&messages::Over {}),
            ToDestination::Abort => Ok(()),
        }
    }

    fn call(&self) -> Result<Wire> {
        Ok(resume_link(&self.facts.to, &counterpart(&self.facts)?, self.id.0, self.cancel)?.0)
    }

    /// Without this word the destination keeps what is written down for a day.
    fn say_over(&self) {
        if let Err(stop) = self.call().and_then(|mut wire| wire.send(&messages::Over {}).map(|()| wire.close("over"))) {
            tracing::debug!(?stop, "the destination does not hear that it is over");
        }
    }

    fn say_abort(&mut self) -> Result<()> {
        let mut wire = self.call()?;
        wire.send(&Stop::Cancelled.abort(Phase::Freeze))?;
        wire.close("called off");
        Ok(())
    }

    /// Serves pages until the destination has all of them.
    fn serve(&mut self) -> Result<&'static [SourceStep]> {
        (self.events)(Event::phase("drain"));
        let started = Instant::now();
        let pid = self.facts.process.pid;
        if !self.facts.process.is_there() {
            return Err(Stop::Unknown("the destination lacks pages, and the process that had them is gone".to_owned()));
        }
        let reader = FrozenProcess::open(pid).map_err(|error| Stop::failed("process", error.to_string()))?;
        let mut peer = self.wire.as_ref().expect("called before").peer();
        let mut at = |port: u32| {
            peer.set_port(u16::try_from(port).unwrap_or_default());
            peer
        };
        let (faults, drain) = (at(self.welcome.fault_port), at(self.welcome.drain_port));
        let mut source = PageSource::new(faults, drain, (self.facts.credentials()?, self.facts.party), self.id);
        source.give_up_after = self.reconnect_for;
        let served = source.run(reader).map_err(|error| match error {
            // How it stands there is asked again.
            unknown @ godwit_fault::Error::NotDrained { .. } => Stop::failed("fault service", unknown.to_string()),
            error => lost(&error),
        })?;
        let faults = Faults { count: served.faults, p50_us: served.p50_us as f64, p99_us: served.p99_us as f64 };
        self.report.drain_ms += milliseconds(started.elapsed());
        self.report.faults = faults;
        self.report.pages_sent += served.pages;
        self.report.bytes_on_wire += served.bytes_sent;
        if served.departed {
            self.report.outcome = Outcome::Ended;
            (self.events)(Event::Ended);
        } else {
            (self.events)(Event::Drained { drain_ms: self.report.drain_ms, faults });
        }
        Ok(self.side.on(SourceEvent::Complete))
    }

    /// Ends the copy that is left here. Its connections are in repair mode: nobody hears of it.
    fn end_copy(&self) -> Result<()> {
        let process = &self.facts.process;
        if !process.is_there() {
            return Ok(());
        }
        kill(process.pid, libc::SIGKILL).map_err(|errno| Stop::failed("process", format!("ending it: {errno}")))?;
        let deadline = Instant::now() + TO_GO;
        while process.is_there() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn conclude(&mut self, outcome: Result<()>) {
        if let Some(mut wire) = self.wire.take() {
            self.report.bytes_on_wire += wire.bytes_sent();
            wire.close("over");
        }
        let failure = |resource: &str, text: String, remedy: String| {
            Some(Failure { phase: "resume".to_owned(), resource: resource.to_owned(), text, remedy })
        };
        let again = format!("run `migrate --to {} {}` again", self.facts.to, self.facts.process.pid);
        self.report.source_state = if self.facts.process.is_there() { SourceState::Frozen } else { SourceState::Gone };
        match outcome {
            Ok(()) if self.goes_on => {
                self.report.outcome = Outcome::Failed;
                self.report.source_state = SourceState::RunningAsBefore;
                self.report.error =
                    failure("hand-over", "nothing was decided; the process goes on here".to_owned(), again);
            }
            Ok(()) if self.report.outcome == Outcome::Ended => {}
            Ok(()) => self.report.outcome = Outcome::Moved,
            Err(Stop::Unknown(text)) => {
                self.report.outcome = Outcome::Unknown;
                let remedy = way_on(&self.report.migration_id, self.report.source_state, &self.state_directory);
                self.report.error = failure("hand-over", text, remedy);
            }
            Err(stop) if self.goes_on => {
                self.report.outcome = Outcome::Failed;
                self.report.source_state = SourceState::RunningAsBefore;
                self.report.error = match stop {
                    Stop::Failed(trouble) => failure(&trouble.resource, trouble.text, again),
                    other => failure("destination", other.text(), again),
                };
            }
            Err(stop) => {
                self.report.outcome = Outcome::Unknown;
                self.report.error = failure("hand-over", stop.text(), String::new());
            }
        }
    }
}

/// Lets a process go on that was left stopped, and gives it back what was taken.
///
/// # Errors
/// When it cannot be driven. What else goes wrong is logged: it goes on all the same.
pub(super) fn give_back(facts: &Facts, state_directory: &Path) -> Result<()> {
    let (process, undo) = (&facts.process, &facts.undo);
    if !process.is_there() {
        return Ok(());
    }
    let pid = process.pid;
    let mended = journal::mend(state_directory, process, Afterwards::StaysStopped)
        .map_err(|error| Stop::failed("process", format!("putting it right: {error}")))?;
    for address in &undo.addresses {
        if let Err(error) = give_address(address) {
            tracing::warn!(address = %address.ip, %error, "this host does not get the address back");
        }
    }
    if let Some(table) = &undo.silent_by {
        let spoken = Namespace::of_process(pid).and_then(|namespace| Silence::left(&namespace, table)?.end());
        if let Err(error) = spoken {
            tracing::warn!(table, %error, "its network namespace stays silent");
        }
    }
    let woken = wake_connections(pid)?;
    let contexts = undo.contexts();
    if !contexts.is_empty() {
        let mut tracee = Tracee::freeze(pid, Extent::AllThreads)?;
        aio::rebuild(&mut tracee, &contexts)?;
        tracee.release()?;
    }
    // N.B. one that runs is not to hear of it; one that was just put right may still be on its way into the stop.
    if !undo.was_stopped && (mended == Mended::Stopped || journal::is_stopped(pid)) {
        kill(pid, libc::SIGCONT).map_err(|errno| Stop::failed("process", format!("letting it go on: {errno}")))?;
    }
    tracing::info!(pid, connections = woken, "the process goes on here");
    Ok(())
}

fn give_address(address: &journal::Address) -> godwit_network::Result<()> {
    if godwit_network::has(address.ip)? {
        return Ok(());
    }
    let interface = godwit_network::interface(&address.device)?;
    let here = Address::from_told(&address.content, interface.index).filter(|here| here.ip() == address.ip);
    let here = here.unwrap_or_else(|| Address::new(address.ip, address.prefix_bits, interface.index));
    here.give()?;
    // N.B. one that cannot be announced has its routes all the same.
    let announced = Announcer::new().and_then(|announcer| announcer.announce(&here, &interface));
    give_routes(&address.routes).and(announced)
}
