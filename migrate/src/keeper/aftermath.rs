//! What becomes of a move whose agent was killed: the process goes on here, or another agent goes on with the hand-over, or all was over.

use std::time::{Duration, Instant};

use godwit_journal::ProcessName;
use godwit_resources::descriptors::{close_connections, wake_connections};
use godwit_session::decision::SourceRecord;
use godwit_tracee::is_parked;
use godwit_tracee::ledger::Afterwards;

use super::{Said, Witness};
use crate::agent::{self, Resumption};
use crate::event::Event;
use crate::handing::{ConnectionState, HandOver, HandOverReport};
use crate::journal::{self, Earlier, Facts};
use crate::report::{Failure, Outcome, Report, SourceState};
use crate::request::Request;

/// How a move stands whose agent was killed.
#[derive(Debug)]
pub enum Aftermath {
    /// There is nothing more to do.
    Over(Box<Report>),
    /// The hand-over is decided and not over: another agent has to go on with it.
    Decided(Box<Resumption>),
}

/// How a process was found whose agent was killed.
enum Found {
    /// It goes on here.
    GoesOn,
    /// It was given away by the migration of this id, which is not over.
    Decided(String),
    /// It is not there, and nothing is kept of it.
    Gone,
}

/// Time that whoever puts connections right has to be done.
const TO_GO: Duration = Duration::from_secs(10);

/// Looks after a process whose agent was killed by `signal`.
pub fn of_move(request: &Request, witness: &Witness, signal: i32) -> Aftermath {
    let said = witness.said();
    let mut report = Report::of_said(request, said.iter().map(|said| &said.event));
    report.total_ms = agent::milliseconds(witness.begun().elapsed());
    let runs_there = report.dest_pid.is_some();
    let mut failed = |state, text: String| {
        report.outcome = Outcome::Failed;
        report.source_state = state;
        report.error = failure(&said, text);
    };
    match pick_up(request, migration_id(&said)) {
        Ok(Found::Decided(id)) => {
            report.migration_id.clone_from(&id);
            return Aftermath::Decided(Box::new(Resumption {
                id,
                state_directory: request.state_directory.clone(),
                reconnect_for: request.reconnect_for,
                so_far: Some(report),
                frozen_since: frozen_after(&said).map(|after| witness.begun() + after),
            }));
        }
        // N.B. what is kept here is ended only when the destination has all of it.
        Ok(Found::Gone) if runs_there => {
            report.source_state = SourceState::Gone;
            if report.outcome != Outcome::Ended {
                report.outcome = Outcome::Moved;
            }
        }
        Ok(Found::Gone) => failed(SourceState::Gone, format!("{}, and the process has ended", killed(signal))),
        Ok(Found::GoesOn) => {
            failed(SourceState::RunningAsBefore, killed(signal));
            let frozen = frozen_after(&said).map(|after| (witness.begun() + after).elapsed());
            report.freeze_ms = frozen.map_or(0.0, agent::milliseconds);
        }
        Err(error) => {
            let state = state_of(request.pid);
            failed(state, format!("{}, and what it has left cannot be put right: {error}", killed(signal)));
            if state == SourceState::Gone {
                report.outcome = Outcome::Unknown;
            }
        }
    }
    Aftermath::Over(Box::new(report))
}

/// Looks after a process whose connections were being handed over when the agent was killed.
pub fn of_connections(wish: &HandOver, witness: &Witness, signal: i32) -> HandOverReport {
    let said = witness.said();
    let is_said = |event: &Event| said.iter().any(|said| said.event == *event);
    let mut report = HandOverReport::new(wish);
    report.took(witness.begun().elapsed());
    report.migration_id = migration_id(&said).unwrap_or_default().to_owned();
    let mut text = killed(signal);
    let given_away = is_said(&Event::phase("commit"));
    if is_said(&Event::Committed) {
        (report.outcome, report.connections) = (Outcome::Moved, ConnectionState::HandedOver);
    } else if given_away {
        (report.outcome, report.connections) = (Outcome::Unknown, ConnectionState::Unknown);
        text += "; the receiving program knows whether it has them";
    }
    // N.B. first: what lives there may not live here, too.
    let is_there = ProcessName::of(wish.request.pid).is_some();
    let closed = if given_away && is_there { close_connections(wish.request.pid) } else { Ok(0) };
    let closed = closed.map_err(|error| error.to_string());
    if let Err(error) = closed.and_then(|_| pick_up(&wish.request, migration_id(&said))) {
        report.outcome = Outcome::Unknown;
        text += &format!(", and the process cannot be put right: {error}");
    } else if report.outcome == Outcome::Moved {
        return report;
    }
    report.error = failure(&said, text);
    report
}

/// The report of a move with which a successor could not go on; none where nobody has seen it begin.
pub fn cut_short(wish: &Resumption, why: &str) -> Option<Report> {
    let so_far = wish.so_far.clone()?;
    let id = wish.id.get(..8).unwrap_or(&wish.id);
    let remedy = format!("{} says how it stands", journal::command(&format!("status {id}"), &wish.state_directory));
    let (phase, resource) = ("resume".to_owned(), "godwit-agent".to_owned());
    let error = Some(Failure { phase, resource, text: why.to_owned(), remedy });
    let source_state = state_of(so_far.source_pid);
    Some(Report { outcome: Outcome::Unknown, source_state, error, ..so_far })
}

/// The state of a process that is in nobody's hands and was not let go on.
fn state_of(pid: i32) -> SourceState {
    let is_there = ProcessName::of(pid).is_some_and(|process| !process.is_over());
    if is_there { SourceState::Frozen } else { SourceState::Gone }
}

/// Lets a process go on that was left undecided by the migration of an id; without one the agent has not touched it.
///
/// # Errors
/// In words, when it cannot be put right.
fn pick_up(request: &Request, id: Option<&str>) -> Result<Found, String> {
    let journal = journal::open(&request.state_directory).map_err(|error| error.to_string())?;
    let Some(process) = ProcessName::of(request.pid).filter(|process| !process.is_over()) else {
        journal::sweep(&journal, &request.state_directory);
        return match id.map(|id| journal.peek::<SourceRecord, Facts>(id)).transpose() {
            Ok(Some(Some((SourceRecord::Decided | SourceRecord::Given, _)))) => {
                Ok(Found::Decided(id.unwrap_or_default().to_owned()))
            }
            Ok(_) => Ok(Found::Gone),
            Err(error) => Err(error.to_string()),
        };
    };
    let begun = Instant::now();
    let earlier = loop {
        match journal::earlier(&journal, &process).map_err(|error| error.to_string())? {
            // N.B. who puts connections right when an agent is killed has its descriptors for that moment, and with them the lock.
            Some(Earlier::UnderWay(..)) if begun.elapsed() < TO_GO => std::thread::sleep(Duration::from_millis(2)),
            earlier => break earlier,
        }
    };
    match earlier {
        Some(Earlier::Left(entry)) => agent::let_go_on(*entry).map(|()| Found::GoesOn),
        Some(Earlier::Decided(found) | Earlier::UnderWay(found, true)) if id == Some(&*found) => {
            Ok(Found::Decided(found))
        }
        Some(Earlier::Decided(found) | Earlier::UnderWay(found, true)) => {
            Err(format!("it was given away by migration {} before, which is not over", &found[..8]))
        }
        Some(Earlier::UnderWay(found, false)) if id == Some(&*found) => Err(format!(
            "another program is at work on migration {}; {} lets the process go on once it is not",
            &found[..8],
            journal::command(&format!("cancel {}", &found[..8]), &request.state_directory)
        )),
        // It is in somebody else's hands, or was not touched.
        Some(Earlier::UnderWay(..)) => Ok(Found::GoesOn),
        None if id.is_none() => Ok(Found::GoesOn),
        None if is_parked(request.pid) => Err(journal::given_away(&journal)),
        None => {
            // N.B. before it goes on: its program must not come upon connections that the agent has left in repair mode.
            if let Err(error) = wake_connections(request.pid) {
                tracing::warn!(%error, "connections of a process whose agent was killed");
            }
            let mended = journal::mend(&request.state_directory, &process, Afterwards::GoesOn);
            mended.map(|_| Found::GoesOn).map_err(|error| error.to_string())
        }
    }
}

/// What is to be told of an agent that was killed.
pub fn killed(signal: i32) -> String {
    format!("it was killed (signal {signal})")
}

fn failure(said: &[Said], text: String) -> Option<Failure> {
    let phase = said.iter().rev().find_map(|said| match &said.event {
        Event::Phase { phase, .. } => Some(phase.to_string()),
        _ => None,
    });
    let phase = phase.unwrap_or_default();
    Some(Failure { phase, resource: "godwit-agent".to_owned(), text, remedy: String::new() })
}

fn migration_id(said: &[Said]) -> Option<&str> {
    said.iter().find_map(|said| match &said.event {
        Event::Named { migration_id } => Some(&**migration_id),
        _ => None,
    })
}

/// When the freeze began that was not over.
fn frozen_after(said: &[Said]) -> Option<Duration> {
    let last =
        said.iter().rev().find(|said| matches!(said.event, Event::Frozen | Event::Thawed | Event::Running { .. }));
    last.filter(|said| said.event == Event::Frozen).map(|said| said.after)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pid that nobody has.
    fn gone() -> (Request, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let request = Request { state_directory: directory.path().to_owned(), ..Request::new(i32::MAX, "there") };
        (request, directory)
    }

    fn witness(said: &[Event]) -> Witness {
        let witness = Witness::new().unwrap();
        said.iter().for_each(|event| witness.note(event));
        witness
    }

    fn report(said: &[Event]) -> Report {
        let (request, _directory) = gone();
        match of_move(&request, &witness(said), 9) {
            Aftermath::Over(report) => *report,
            Aftermath::Decided(_) => panic!("nothing is written down"),
        }
    }

    #[test]
    fn one_that_was_said_to_run_there_has_moved() {
        let running = [Event::Named { migration_id: "12".repeat(16) }, Event::Running { dest_pid: 7, freeze_ms: 1.5 }];
        let moved = report(&running);
        assert_eq!((moved.outcome, moved.source_state, moved.exit_code()), (Outcome::Moved, SourceState::Gone, 0));
        assert_eq!((moved.dest_pid, moved.freeze_ms), (Some(7), 1.5));
        let [named, runs] = running;
        assert_eq!(report(&[named, runs, Event::Ended]).exit_code(), 4);
    }

    #[test]
    fn a_freeze_counts_until_it_is_over() {
        let frozen = |said: &[Event]| frozen_after(&witness(said).said()).is_some();
        assert!(frozen(&[Event::Frozen, Event::Thawed, Event::Frozen, Event::phase("commit")]));
        assert!(!frozen(&[Event::Frozen, Event::Thawed]) && !frozen(&[]));
        assert!(!frozen(&[Event::Frozen, Event::Running { dest_pid: 7, freeze_ms: 1.5 }]));
    }

    #[test]
    fn one_that_was_not_has_ended() {
        let ended = report(&[Event::phase("round")]);
        assert_eq!((ended.outcome, ended.source_state), (Outcome::Failed, SourceState::Gone));
        assert_eq!(ended.error.unwrap().phase, "round");
    }

    #[test]
    fn connections_are_unknown_from_the_word_on_and_until_the_answer() {
        let (request, _directory) = gone();
        let wish = HandOver { request, descriptors: vec![3], label: String::new() };
        let of = |said: &[Event]| of_connections(&wish, &witness(said), 9);
        assert_eq!(of(&[Event::Frozen]).connections, ConnectionState::AsBefore);
        assert_eq!(of(&[Event::Frozen, Event::phase("commit")]).exit_code(), 3);
        let handed = of(&[Event::Frozen, Event::phase("commit"), Event::Committed]);
        assert_eq!((handed.connections, handed.error), (ConnectionState::HandedOver, None));
    }
}
