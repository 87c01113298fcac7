//! Handing connections over without their process, which is stopped from the moment that they are taken apart until it is
//! settled where they live.
//!
//! It could not be let go on earlier: a program that goes on sees its connection closed, and nothing could give it back.

use super::freeze::send_streams;
use super::network::{Network, send_tracked};
use super::stop::{Result, Stop};
use super::wire::Wire;
use super::{PATIENCE, milliseconds, random_id};
use crate::cancel::Cancel;
use crate::event::Event;
use crate::handing::{ConnectionState, HandOver, HandOverReport};
use crate::journal;
use crate::report::{Failure, Outcome};
use crate::request::DEFAULT_FORWARD;
use godwit_journal::ProcessName;
use godwit_network::{Hold, Namespace};
use godwit_proto::wire as messages;
use godwit_resources::descriptors::{
    Connections, Seen, Survey, look_at_connections, take_apart, translate_socket, watched_message,
};
use godwit_resources::restart::SleepWatch;
use godwit_resources::{Obstacle, host};
use godwit_session::Phase;
use godwit_tracee::{Extent, Tracee};
use std::time::{Duration, Instant};

/// Longest time that the destination may take until the receiving program wants the connections.
const READY: Duration = Duration::from_secs(5);
/// Longest wait for the word that they live.
const RUNNING: Duration = Duration::from_secs(5);

/// One hand-over under way.
struct Handing<'a> {
    wish: &'a HandOver,
    events: &'a mut dyn FnMut(Event),
    cancel: &'a Cancel,
    deadline: Option<Instant>,
    report: HandOverReport,
    phase: Phase,
    seen: Seen,
    stopped: Option<Stopped>,
    /// The process, once it is to be stopped.
    process: Option<ProcessName>,
    network: Network,
    wire: Option<Wire>,
}

/// The stopped process.
struct Stopped {
    // N.B. before the process: it must not come upon a connection that was taken apart.
    connections: Connections,
    tracee: Tracee,
    since: Instant,
    given_away: bool,
}

/// Hands connections over and says what came of it.
pub fn hand_over(wish: &HandOver, events: &mut dyn FnMut(Event), cancel: &Cancel) -> HandOverReport {
    let started = Instant::now();
    let mut handing = Handing {
        wish,
        events,
        cancel,
        deadline: wish.request.timeout.map(|limit| started + limit),
        report: HandOverReport::new(wish),
        phase: Phase::Negotiate,
        seen: Seen::default(),
        stopped: None,
        process: None,
        network: Network::default(),
        wire: None,
    };
    let outcome = handing.go_through();
    handing.conclude(outcome);
    handing.report.took(started.elapsed());
    handing.report
}

impl Handing<'_> {
    fn go_through(&mut self) -> Result<()> {
        self.agree()?;
        self.phase = Phase::Freeze;
        self.take_apart()?;
        self.phase = Phase::Rebuild;
        let _: messages::Ready = self.wire().receive(READY, Some(self.cancel))?;
        self.phase = Phase::Commit;
        self.commit()
    }

    fn wire(&self) -> &Wire {
        self.wire.as_ref().expect("connected in the first phase")
    }

    fn check_wish(&self) -> Result<()> {
        if self.cancel.is_cancelled() {
            return Err(Stop::Cancelled);
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(Stop::timed_out("allow more with --timeout"));
        }
        Ok(())
    }

    /// Everything that could make it fail, on both hosts and in the receiving program, before the process is touched.
    fn agree(&mut self) -> Result<()> {
        (self.events)(Event::phase("negotiate"));
        let request = &self.wish.request;
        if !std::path::Path::new(&format!("/proc/{}", request.pid)).exists() {
            let obstacle = Obstacle::new(format!("process {}", request.pid), "there is no such process", "");
            return Err(Stop::Refused(vec![obstacle]));
        }
        self.seen = look_at_connections(request.pid, &self.wish.descriptors)?;
        let mut obstacles = std::mem::take(&mut self.seen.obstacles);
        let mut survey = Survey::default();
        survey.network.clone_from(&self.seen.watched);
        survey.listening.clone_from(&self.seen.addresses);
        self.network = Network::look_at(request, &mut survey, &mut obstacles)?;
        if self.network.own_contents().is_some() {
            let remedy =
                format!("run this program there: nsenter --target {} --net migrate connection ...", request.pid);
            let text = "it has a network namespace of its own, which stays here with it";
            obstacles.push(Obstacle::new(format!("process {}", request.pid), text, remedy));
        }
        obstacles.extend(self.network.bereft().map(|which| {
            let text = "stays here and uses an address that is to move along";
            let remedy = "name all connections of that address, or give --map-addr where the network translates it";
            Obstacle::new(format!("TCP connection {which}"), text, remedy)
        }));
        let credentials = request.credentials()?;
        let id = random_id()?;
        self.report.migration_id = id.iter().map(|byte| format!("{byte:02x}")).collect();
        (self.events)(Event::Named { migration_id: self.report.migration_id.clone() });
        let wire = self.wire.insert(Wire::connect(&request.to, &credentials, self.cancel)?);
        obstacles.extend(self.network.cuts_off(wire.peer()));
        wire.send(&messages::Hello {
            oldest_version: 1,
            newest_version: 1,
            migration_id: id.to_vec(),
            role: messages::Role::Control.into(),
            host: Some(host::facts()?),
            options: Some(messages::Options { addresses: self.network.messages(), ..messages::Options::default() }),
            resume: false,
        })?;
        let _: messages::Welcome = wire.receive(PATIENCE, Some(self.cancel))?;
        self.phase = Phase::Probe;
        (self.events)(Event::phase("probe"));
        wire.send(&messages::Offer {
            addresses: self.network.addresses_there(&self.seen.addresses),
            watched: Some(watched_message(&self.seen.watched, &self.network.translation)),
            label: self.wish.label.clone(),
            pid: request.pid as u32,
            comm: std::fs::read_to_string(format!("/proc/{}/comm", request.pid)).unwrap_or_default().trim().to_owned(),
        })?;
        let reply: messages::ProbeReply = wire.receive(PATIENCE, Some(self.cancel))?;
        obstacles.extend(super::stop::obstacles(reply));
        if !obstacles.is_empty() {
            return Err(Stop::Refused(obstacles.into_iter().map(Obstacle::of_a_connection_alone).collect()));
        }
        for warning in self.network.routes_lost() {
            (self.events)(Event::warning(warning));
        }
        let mut hold = Hold::prepare(Namespace::current()?, &self.report.migration_id[..8], self.seen.watched.clone())?;
        hold.hold_requests()?;
        self.network.hold = Some(hold);
        self.network.begin_tracking()?;
        let tracked = self.network.tracked();
        // Packets may come there early from now on.
        send_tracked(self.wire(), tracked)?;
        self.check_wish()
    }

    /// Stops the process and sends what there is to know of its connections.
    fn take_apart(&mut self) -> Result<()> {
        let pid = self.wish.request.pid;
        let mut watch = SleepWatch::new();
        watch.sample(pid, &threads(pid));
        self.process = ProcessName::of(pid);
        if let Some(process) = &self.process {
            journal::begin_ledger(&self.wish.request.state_directory, process)
                .map_err(|error| Stop::failed("journal", error.to_string()))?;
        }
        let connections = Connections::prepare(self.seen.watched.flows.len())?;
        (self.events)(Event::Frozen);
        let since = Instant::now();
        let tracee = Tracee::freeze(pid, Extent::AllThreads)?;
        let stopped = self.stopped.insert(Stopped { connections, tracee, since, given_away: false });
        watch.settle(&mut stopped.tracee)?;
        let sockets = self.seen.lend(pid)?;
        let hold = self.network.hold.as_mut().expect("prepared before");
        // N.B. before: should this agent die, the process goes on as it was, and not before its connections are put right.
        stopped.tracee.put_back()?;
        stopped.tracee.stop_if_abandoned()?;
        let mut state = take_apart(&sockets, hold, &mut stopped.connections)?;
        state.sockets.iter_mut().for_each(|socket| translate_socket(socket, &self.network.translation));
        let streams = state.streams.unwrap_or_default();
        let wire = self.wire.as_ref().expect("connected in the first phase");
        send_streams(wire, streams)?;
        let descriptors = sockets.iter().map(|socket| socket.number as u32).collect();
        let tracked = self.network.tracked();
        wire.send(&messages::HandOver { sockets: state.sockets, descriptors, tracked })
    }

    /// Gives the connections away.
    fn commit(&mut self) -> Result<()> {
        self.check_wish()?;
        let stopped = self.stopped.as_mut().expect("stopped before");
        self.network.take_addresses(&self.report.migration_id[..8])?;
        stopped.connections.give_away();
        if let Some(hold) = &mut self.network.hold {
            hold.give_away();
        }
        stopped.given_away = true;
        // N.B. from here on whoever hears no more of this knows nothing for certain.
        (self.events)(Event::phase("commit"));
        let wire = self.wire.as_ref().expect("connected in the first phase");
        let answer =
            wire.send(&messages::Commit::default()).and_then(|()| wire.receive::<messages::Running>(RUNNING, None));
        match answer {
            Ok(_) => {}
            Err(Stop::Failed(trouble)) if trouble.said_by_peer => {
                // It says that nothing lives there, and nothing will.
                stopped.given_away = false;
                if let Some(hold) = &mut self.network.hold {
                    hold.take_back();
                }
                return Err(Stop::Failed(trouble));
            }
            Err(Stop::Failed(trouble)) => {
                return Err(Stop::Unknown(format!("{}: {}", trouble.resource, trouble.text)));
            }
            Err(other) => return Err(other),
        }
        (self.events)(Event::Committed);
        let round_trip = stopped.connections.round_trip();
        self.let_go_on();
        self.report.connections = ConnectionState::HandedOver;
        // Unless it learns from a moving address, the network has to be told, and that takes a while.
        let taught = self.wish.request.move_addresses.is_empty().then_some(DEFAULT_FORWARD);
        let forward = self.wish.request.forward.or(taught);
        let wire = self.wire.as_ref().expect("connected in the first phase");
        if self.network.begin_forwarding(wire, forward).is_ok() {
            self.network.forward(wire, forward, round_trip, self.cancel);
        }
        self.network.forget_tracked();
        Ok(())
    }

    /// Lets the process go on: with its connections, or with what is left of those that it has given away.
    fn let_go_on(&mut self) {
        let Some(Stopped { connections, tracee, since, given_away }) = self.stopped.take() else { return };
        if given_away {
            connections.forget();
        } else {
            drop(connections);
        }
        let released = tracee.release();
        self.report.stopped_ms = milliseconds(since.elapsed());
        (self.events)(Event::Thawed);
        if let Err(error) = released {
            (self.events)(Event::warning(format!("the process could not be given back as it was: {error}")));
        }
    }

    fn conclude(&mut self, outcome: Result<()>) {
        let given_away = self.stopped.as_ref().is_some_and(|stopped| stopped.given_away);
        self.let_go_on();
        if let Some(process) = &self.process {
            journal::end_ledger(&self.wish.request.state_directory, process);
        }
        if let Err(stop) = outcome {
            if !given_away {
                for trouble in self.network.give_back() {
                    (self.events)(Event::warning(format!("the network could not be given back as it was: {trouble}")));
                }
                if let Some(wire) = &self.wire {
                    let _ = wire.send(&stop.abort(self.phase));
                }
            }
            self.call_off(stop);
        } else {
            self.report.outcome = Outcome::Moved;
        }
        if let Some(mut wire) = self.wire.take() {
            self.report.bytes_on_wire = wire.bytes_sent();
            wire.close("over");
        }
    }

    /// Says in the report why it came to nothing.
    fn call_off(&mut self, stop: Stop) {
        let mut failure = Failure { phase: self.phase.to_string(), ..Failure::default() };
        match stop {
            Stop::Refused(obstacles) => {
                self.report.outcome = Outcome::Refused;
                self.report.obstacles = obstacles.into_iter().map(Into::into).collect();
                return;
            }
            Stop::Cancelled => {
                self.report.outcome = Outcome::Cancelled;
                return;
            }
            Stop::Failed(trouble) => {
                self.report.outcome = Outcome::Failed;
                failure.resource = trouble.resource;
                failure.text = trouble.text;
                failure.remedy = trouble.remedy;
                failure.phase = trouble.phase.unwrap_or(failure.phase);
            }
            Stop::Unknown(text) => {
                self.report.outcome = Outcome::Unknown;
                self.report.connections = ConnectionState::Unknown;
                failure.resource = "hand-over".to_owned();
                failure.text = text;
                failure.remedy = "ask the receiving program; the process here has the connections no more".to_owned();
            }
        }
        self.report.error = Some(failure);
    }
}

/// The threads of a process, as far as they can be listed.
fn threads(pid: i32) -> Vec<i32> {
    let listed = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    listed.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}
