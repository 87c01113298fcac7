//! The hand-over, as this side does it: what [`decision::Source`] says, step by step, and the destination asked again where
//! its answer was lost.

use super::stop::{Result, Stop};
use super::wire::{Answer, Counterpart, Wire};
use super::{Agent, milliseconds};
use crate::event::Event;
use crate::journal::{self, Earlier, Facts};
use crate::report::SourceState;
use godwit_journal::ProcessName;
use godwit_kernel::pause;
use godwit_proto::wire as messages;
use godwit_resources::Obstacle;
use godwit_session::decision::{self, SourceEvent, SourceRecord, SourceStep, ToDestination, Verdict};
use godwit_tracee::is_parked;
use nix::errno::Errno;
use std::time::{Duration, Instant};

/// Wait for the word that the process runs before the destination is asked on another link: nothing is left to do there by then but to
/// let go.
const RUNNING: Duration = Duration::from_secs(3);
/// Longest wait for a greeting or a verdict on a link that was made anew.
const ANSWER: Duration = Duration::from_secs(5);
/// Time between two calls of a destination that does not answer.
const PAUSE: Duration = Duration::from_millis(200);

/// What helps where nothing can be written down.
const ANOTHER_PLACE: &str = "--state-dir names another place for it, in memory if possible";

impl From<godwit_journal::Error> for Stop {
    fn from(error: godwit_journal::Error) -> Self {
        Self::with_remedy("journal", error.to_string(), ANOTHER_PLACE)
    }
}

impl Agent<'_> {
    /// Sees to it that no earlier migration of the process is under way or decided. Before the destination is called: a later attempt
    /// replaces an earlier one there.
    pub(super) fn look_for_earlier(&mut self) -> Result<()> {
        let journal = journal::open(&self.request.state_directory)?;
        journal::sweep(&journal, &self.request.state_directory);
        let process = ProcessName::of(self.request.pid).ok_or_else(|| Stop::gone(self.request.pid))?;
        match journal::earlier(&journal, &process)? {
            None if is_parked(self.request.pid) => {
                self.report.source_state = SourceState::Frozen;
                Err(Stop::Refused(vec![Obstacle::new(
                    self.process(),
                    journal::given_away(&journal),
                    journal::ELSEWHERE,
                )]))
            }
            None => self.claim(),
            Some(Earlier::Left(entry)) => {
                tracing::info!(id = entry.id(), "an earlier migration was left undecided; the process goes on");
                super::resume::let_go_on(*entry).map_err(|text| Stop::failed("earlier migration", text))?;
                self.claim()
            }
            Some(Earlier::UnderWay(id, true)) => {
                self.report.source_state = SourceState::Frozen;
                let text = format!("it was given away by migration {id}, which another `migrate` brings to its end");
                let remedy = format!("{} says how it stands", self.command("status", &id));
                Err(Stop::Refused(vec![Obstacle::new(self.process(), text, remedy)]))
            }
            Some(Earlier::UnderWay(id, false)) => {
                let text = format!("migration {id} of it is under way");
                let remedy = format!("{} calls that off", self.command("cancel", &id));
                Err(Stop::Refused(vec![Obstacle::new(self.process(), text, remedy)]))
            }
            Some(Earlier::Decided(id)) => {
                self.report.source_state = SourceState::Frozen;
                let text = format!("it was given away by migration {id}, which is not over: it is kept frozen");
                let (resume, resolve) = (self.command("resume", &id), self.command("resolve", &id));
                let remedy = format!("{resume} goes on with it, {resolve} says how it stands");
                Err(Stop::Refused(vec![Obstacle::new(self.process(), text, remedy)]))
            }
        }
    }

    /// Sees to it that no other `migrate` moves the process.
    fn claim(&mut self) -> Result<()> {
        self.claim = Some(journal::claim(self.request.pid).map_err(|errno| match errno {
            Errno::EWOULDBLOCK => Stop::Refused(vec![Obstacle::new(
                self.process(),
                "another `migrate` is about to move it",
                format!("{} lists what is under way", journal::command("status", &self.request.state_directory)),
            )]),
            Errno::ESRCH => Stop::gone(self.request.pid),
            errno => Stop::failed("process", format!("claiming it: {errno}")),
        })?);
        Ok(())
    }

    /// What to type about a migration.
    fn command(&self, word: &str, id: &str) -> String {
        journal::command(&format!("{word} {}", &id[..8]), &self.request.state_directory)
    }

    /// Makes an entry of the migration before the process is touched.
    pub(super) fn open_journal(&mut self) -> Result<()> {
        let journal = journal::open(&self.request.state_directory)?;
        journal.tidy();
        let facts =
            Facts::of(self.request, self.counterpart().party).ok_or_else(|| Stop::failed("process", "it has ended"))?;
        journal::begin_ledger(&self.request.state_directory, &facts.process).map_err(|error| {
            let text = format!("cannot write to {}: {error}", self.request.state_directory.display());
            Stop::with_remedy("journal", text, ANOTHER_PLACE)
        })?;
        let process = facts.process.clone();
        let reserved = journal.reserve(&self.report.migration_id);
        match reserved.and_then(|room| room.publish(SourceRecord::Undecided, facts)) {
            Ok(book) => {
                self.book = Some(book);
                // N.B. now, for by this name others find what is written down.
                self.emit(Event::Named { migration_id: self.report.migration_id.clone() });
                Ok(())
            }
            Err(error) => {
                journal::end_ledger(&self.request.state_directory, &process);
                Err(error.into())
            }
        }
    }

    fn process(&self) -> String {
        format!("process {}", self.request.pid)
    }

    /// Gives the process away.
    pub(super) fn commit(&mut self) -> Result<()> {
        self.check_wish_to_stop()?;
        self.downtime.check()?;
        self.look_for_waiting()?;
        let started = Instant::now();
        let frozen = self.frozen.as_mut().expect("stopped before");
        // N.B. now, for later one that stops it is not told from ours.
        let mut stops = frozen.signals_sent_since();
        // N.B. before it is written down: should this agent die from then on, its tracees would otherwise wake up.
        frozen.tracee.stop_if_abandoned()?;
        self.network.turn_away_waiting(self.request.pid);
        self.network.take_addresses(&self.report.migration_id[..8])?;
        frozen.connections.give_away();
        if let Some(hold) = &mut self.network.hold {
            // N.B. before the word is out: what is sent to many hosts from now on reaches the other one itself.
            hold.give_away();
        }
        if let Some(book) = &mut self.book {
            let mut undo = self.network.undo();
            undo.keep_contexts(&frozen.contexts);
            undo.was_stopped = frozen.was_stopped();
            if undo != book.facts().undo {
                let facts = Facts { undo, ..book.facts().clone() };
                book.amend(facts)?;
            }
        }
        frozen.tracee.give_away();
        // N.B. before as well: a SIGCONT ends a stop, and there would be two of it.
        frozen.park()?;
        // N.B. what comes from now on comes to a process that is given away.
        self.late_signals = frozen.signals_sent_since();
        stops.retain(|signal| godwit_resources::signals::is_stop(signal) && !self.late_signals.contains(signal));
        self.late_signals.append(&mut stops);
        let steps = self.side.on(SourceEvent::Ready);
        self.perform(steps)?;
        self.report.freeze.commit = milliseconds(started.elapsed());
        self.decided_at = Some(Instant::now());
        self.settle()
    }

    /// Waits for the destination's answer, and asks again on other links as long as the user allows.
    fn settle(&mut self) -> Result<()> {
        let mut lost = match self.wire().receive_answer(RUNNING) {
            Ok(answer) => return self.take(answer),
            Err(stop) => stop,
        };
        let asked_from = Instant::now();
        let limit = self.request.reconnect_for;
        self.emit(Event::warning(format!(
            "no answer came to the hand-over ({}); asking the destination what became of it, for up to {} s",
            lost.text(),
            limit.as_secs()
        )));
        while asked_from.elapsed() < limit && !self.cancel.is_wished() {
            match self.ask() {
                Ok(answer) => return self.take(answer),
                Err(stop) => lost = stop,
            }
            std::thread::sleep(PAUSE);
        }
        Err(Stop::Unknown(lost.text()))
    }

    /// Calls the destination on a new link and hears how the hand-over stands; where the copy waits for the decision it is told once more.
    pub(super) fn ask(&mut self) -> Result<Answer> {
        let known = self.counterpart();
        let (wire, welcome) = resume_link(&self.request.to, known, self.migration_id, self.cancel)?;
        if let Some(old) = self.wire.replace(wire) {
            self.report.bytes_on_wire += old.bytes_sent();
        }
        self.welcome = welcome;
        let steps = self.side.on(SourceEvent::Linked);
        self.perform(steps)?;
        let answer = self.wire().receive_answer(ANSWER)?;
        if answer.verdict != Verdict::Waiting {
            return Ok(answer);
        }
        let steps = self.side.on(SourceEvent::Answer(answer.verdict));
        self.perform(steps)?;
        self.wire().receive_answer(ANSWER)
    }

    /// Acts on the destination's answer.
    fn take(&mut self, answer: Answer) -> Result<()> {
        let Answer { verdict, pid, reason, .. } = answer;
        if let Verdict::Runs { .. } = verdict {
            self.runs_there(pid);
        }
        let verdict = match verdict {
            // What it needs is known here, too.
            Verdict::Runs { .. } => Verdict::Runs { complete: !self.is_missing_pages() },
            other => other,
        };
        let steps = self.side.on(SourceEvent::Answer(verdict));
        self.perform(steps)?;
        match verdict {
            Verdict::Runs { .. } => Ok(()),
            Verdict::Aborted => {
                let reason = if reason.is_empty() { "its copy never ran".to_owned() } else { reason };
                Err(Stop::failed("destination", reason))
            }
            Verdict::Unknown => Err(Stop::Unknown("the destination knows nothing of it".to_owned())),
            Verdict::Waiting => Err(Stop::Unknown("the destination waits and takes no decision".to_owned())),
        }
    }

    /// What follows from knowing that the process runs at the destination.
    fn runs_there(&mut self, pid: i32) {
        let frozen = self.frozen.as_mut().expect("stopped before");
        let freeze = frozen.since.elapsed();
        self.report.freeze.resume = self.decided_at.map_or(0.0, |decided| milliseconds(decided.elapsed()));
        self.report.freeze_ms = milliseconds(freeze);
        self.report.dest_pid = Some(pid);
        self.end_hurry();
        self.emit(Event::Committed);
        self.emit(Event::Running { dest_pid: pid, freeze_ms: milliseconds(freeze) });
        if let Some(target) = self.request.downtime_target.filter(|&target| freeze > target) {
            self.emit(Event::warning(format!(
                "the freeze lasted {:.0} ms, which is more than the {:.0} ms that were wished for",
                milliseconds(freeze),
                milliseconds(target)
            )));
        }
        let mut losses = Vec::new();
        let mut round_trip = Duration::ZERO;
        let forward = self.request.forward;
        let wire = self.wire.as_ref().filter(|wire| self.network.begin_forwarding(wire, forward).is_ok());
        if let Some(frozen) = &mut self.frozen {
            let connections = std::mem::take(&mut frozen.connections);
            round_trip = connections.round_trip();
            connections.forget();
            losses = std::mem::take(&mut frozen.losses);
        }
        if !self.is_missing_pages() {
            self.serving = None;
        }
        if let Some(wire) = wire {
            self.network.forward(wire, forward, round_trip, self.cancel);
        }
        self.network.forget_tracked();
        self.leave_network();
        for loss in losses {
            self.emit(Event::warning(loss));
        }
        if let Some(memory) = &self.memory {
            // Only now: the walk takes time that would have been part of the freeze.
            self.report.pages_total = memory.populated_pages().unwrap_or(0);
        }
    }

    /// The destination has all pages.
    pub(super) fn complete(&mut self) {
        let steps = self.side.on(SourceEvent::Complete);
        // What is written down by now can only be removed.
        let _ = self.perform(steps);
    }

    /// Does what the hand-over calls for.
    ///
    /// # Errors
    /// When something cannot be written down or said. Steps that let the process go on are left to [`Agent::call_off`].
    pub(super) fn perform(&mut self, steps: &'static [SourceStep]) -> Result<()> {
        for (index, step) in steps.iter().enumerate() {
            match *step {
                SourceStep::Record(state) => {
                    if let Some(book) = &mut self.book
                        && let Err(error) = book.record(state)
                    {
                        if state == SourceRecord::Decided {
                            // N.B. nothing was said yet.
                            self.side = decision::Source::Undecided;
                            return Err(error.into());
                        }
                        tracing::warn!(%error, ?state, "the hand-over is not written down");
                    }
                }
                // Done before it is asked for: it may fail.
                SourceStep::Secure => {}
                SourceStep::Send(ToDestination::Commit) => {
                    pause::at("decided");
                    let commit = messages::Commit { late_signals: self.late_signals.clone() };
                    if let Err(stop) = self.wire().send(&commit) {
                        tracing::debug!(?stop, "the decision may not have been heard");
                    }
                    pause::when_sent("committed");
                }
                SourceStep::Send(ToDestination::Query) => self.wire().send(&messages::Query {})?,
                SourceStep::Send(ToDestination::Over) => self.say_over(),
                SourceStep::Send(ToDestination::Abort) => {}
                SourceStep::GoOn => {
                    self.todo = &steps[index..];
                    return Ok(());
                }
                SourceStep::Serve | SourceStep::Hold => {}
                SourceStep::EndCopy => self.let_go(),
                SourceStep::Forget => self.forget(),
            }
        }
        Ok(())
    }

    /// Removes what was written down.
    pub(super) fn forget(&mut self) {
        let Some(book) = self.book.take() else { return };
        journal::end_ledger(&self.request.state_directory, &book.facts().process);
        if let Err(error) = book.remove() {
            tracing::warn!(%error, "a migration that is over stays in the journal");
        }
    }

    /// Says that nothing more needs to be known here; once more on another link if this one is lost.
    fn say_over(&mut self) {
        let is_said = self.wire.as_ref().is_some_and(|wire| wire.is_up() && wire.send(&messages::Over {}).is_ok());
        if is_said {
            return;
        }
        match resume_link(&self.request.to, self.counterpart(), self.migration_id, self.cancel) {
            Ok((mut wire, _)) => {
                let _ = wire.send(&messages::Over {});
                wire.close("over");
            }
            Err(stop) => tracing::debug!(?stop, "the destination keeps what it has written down"),
        }
    }
}

/// Calls a destination for a migration that began on an earlier link; it must be the one that the process was given to.
///
/// # Errors
/// When it cannot be reached, is another host, or does not greet.
pub(super) fn resume_link(
    to: &str,
    known: &Counterpart,
    id: [u8; 16],
    cancel: &crate::cancel::Cancel,
) -> Result<(Wire, messages::Welcome)> {
    let mut wire = Wire::connect(to, &known.credentials, cancel)?;
    if wire.party() != known.party {
        let (there, party) = (wire.party(), known.party);
        let text = format!("another host answers there ({there}) than the one that the process was given to ({party})");
        wire.close("another host is awaited here");
        return Err(Stop::failed(format!("page server {}", wire.peer()), text));
    }
    wire.send(&messages::Hello {
        oldest_version: 1,
        newest_version: 1,
        migration_id: id.to_vec(),
        role: messages::Role::Control.into(),
        resume: true,
        ..messages::Hello::default()
    })?;
    let welcome = wire.receive(ANSWER, None)?;
    Ok((wire, welcome))
}

/// A process's name as the destination is to know it: for as long as this host is up, no other has it.
pub(super) fn name_at_home(process: &ProcessName) -> String {
    format!("{} {} {} {}", process.boot_id, process.pid_namespace, process.pid, process.start_time)
}
