//! Connections that the process has closed and whose peers have yet to get the rest: no descriptor leads to them, and they move along.

use super::Agent;
use super::network::Network;
use godwit_network::{Flow, Hold};
use godwit_resources::descriptors;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// Time after which a closed connection counts as one whose peer takes what was sent at its leisure.
pub(super) const LEISURE: Duration = Duration::from_millis(100);
/// Longest time that it takes to take such connections over: what was lost on their way has to be sent again. And as long as new clients
/// wait for that.
const TO_GIVE_AWAY: Duration = Duration::from_secs(4);
pub(super) const TO_GIVE_AWAY_QUICKLY: Duration = Duration::from_secs(1);

/// Closed connections that were seen.
#[derive(Debug, Default)]
pub(super) struct Closed {
    since: HashMap<Flow, Instant>,
    /// What was to be taken over already.
    tried: HashSet<Flow>,
}

impl Closed {
    /// Notes those that there are `now`.
    fn see(&mut self, now: &[Flow]) {
        for flow in now {
            self.since.entry(*flow).or_insert_with(Instant::now);
        }
    }

    /// Those among the ones that there are `now` that have been seen for so long and are to be taken over; once each.
    pub(super) fn slow(&mut self, now: &[Flow], long: Duration) -> Vec<Flow> {
        self.see(now);
        let is_slow = |flow: &&Flow| self.since[*flow].elapsed() >= long && !self.tried.contains(*flow);
        let slow: Vec<Flow> = now.iter().filter(is_slow).copied().collect();
        self.tried.extend(&slow);
        slow
    }

    /// Whether there is one that may be gone soon.
    pub(super) fn is_any_new(&self, now: &[Flow]) -> bool {
        now.iter().any(|flow| !self.tried.contains(flow))
    }
}

impl Network {
    /// Connections that the stopped process closed in the moment before it was, as far as they were not known.
    pub(super) fn closed_lately(&self, closed: &Closed) -> Vec<Flow> {
        let hold = self.hold.as_ref().filter(|hold| hold.has_listeners());
        let mut flows = hold.map_or_else(Vec::new, Hold::closing);
        flows.retain(|flow| !closed.tried.contains(flow));
        flows
    }
}

impl Agent<'_> {
    /// Takes over connections that have been closed for a while, before anybody has to wait for that, and those that are closed
    /// meanwhile.
    pub(super) fn look_for_closed(&mut self) -> Closed {
        /// A program may go on closing some as long as anybody looks.
        const LOOKS: usize = 4;
        let closing = |network: &Network| network.hold.as_ref().map_or_else(Vec::new, Hold::closing);
        let mut closed = Closed::default();
        for _ in 0..LOOKS {
            closed.see(&closing(&self.network));
            if !closed.is_any_new(&closing(&self.network)) {
                break;
            }
            std::thread::sleep(LEISURE);
            let slow = closed.slow(&closing(&self.network), LEISURE);
            if slow.is_empty() {
                break;
            }
            self.take_over_closed(slow, TO_GIVE_AWAY);
        }
        closed
    }

    /// Takes over connections that the process has closed and whose peers are slow, so that they move along. Those that cannot be are told
    /// of later, if they are still there.
    pub(super) fn take_over_closed(&mut self, flows: Vec<Flow>, patience: Duration) {
        let survey = &self.inspected.as_ref().expect("looked at in the first phase").survey.network;
        let listeners = survey.listeners.iter().filter_map(|listener| listener.address);
        let known = survey.flows.iter().map(|flow| flow.local.ip()).chain(listeners).collect();
        let flows: Vec<Flow> =
            flows.into_iter().filter(|flow| self.network.is_looked_after(flow.local.ip(), &known)).collect();
        if self.request.tcp_close || flows.is_empty() {
            return;
        }
        let taken = self
            .network
            .namespace()
            .and_then(|place| Ok(descriptors::take_over(&place, &self.report.migration_id[..8], &flows, patience)?));
        match taken {
            Ok(mut sockets) => {
                tracing::debug!(taken = sockets.len(), of = flows.len(), "closed connections are taken over");
                self.network.closed.append(&mut sockets);
            }
            Err(error) => tracing::warn!(?error, "closed connections cannot be taken over"),
        }
    }
}
