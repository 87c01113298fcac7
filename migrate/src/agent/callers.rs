//! Clients that are about to connect, and connections that nobody has accepted: no descriptor leads to them.
//!
//! Requests for new connections are held back before the freeze, and the process gets a moment to accept those that are complete, for
//! nothing puts them into a queue again.

use super::Agent;
use super::closed::{Closed, LEISURE, TO_GIVE_AWAY_QUICKLY};
use super::network::{GLANCE, Network, send_tracked};
use super::stop::{Result, Stop};
use crate::event::Event;
use godwit_network::{Hold, Unfinished};
use godwit_resources::descriptors::waiting_connections;
use std::time::{Duration, Instant};

/// Time that a process has to accept what waits in its queues.
const TO_ACCEPT: Duration = Duration::from_millis(500);
/// Longest time that clients have to finish what they have begun, and to get what was sent before a connection was closed: by then
/// what they have not heard has come once more.
const TO_FINISH: Duration = Duration::from_secs(1);
/// Time that a client has to answer where nobody knows how far away any is, and least time where somebody does.
const TO_ANSWER: Duration = Duration::from_millis(300);
const LEAST_TO_ANSWER: Duration = Duration::from_millis(100);
/// What is added to round trips: the client's own time, and ticks in which kernels tell theirs.
const LEEWAY: Duration = Duration::from_millis(50);
/// Longest wait for a moment in which no client is about to finish a request.
const TO_LULL: Duration = Duration::from_millis(500);

impl Network {
    /// Ends connections that the process has not accepted, if they are to be lost, in the last moment in which their peers can be told.
    pub(super) fn turn_away_waiting(&self, pid: i32) {
        let Some(hold) = self.hold.as_ref().filter(|_| self.leaves_waiting) else { return };
        let ended = waiting_connections(pid).map_err(Stop::from).and_then(|own| Ok(hold.turn_away_waiting(own.count)?));
        match ended {
            Ok(0) => tracing::warn!(
                "clients whose connections were not accepted are not told: another program listens there, too"
            ),
            Ok(ended) => tracing::debug!(ended, "connections that were not accepted"),
            Err(error) => {
                tracing::warn!(error = error.text(), "clients whose connections were not accepted are not told")
            }
        }
    }
}

impl Agent<'_> {
    /// Holds requests for new connections back from now on.
    pub(super) fn hold_requests(&mut self) -> Result<()> {
        if let Some(own) = &mut self.network.own {
            own.list_tracked()?;
        }
        let tracked = self.network.tracked();
        let Some(hold) = &mut self.network.hold else { return Ok(()) };
        hold.hold_requests()?;
        if let Some(wire) = &self.wire {
            // Packets may come there early from now on.
            send_tracked(wire, tracked)?;
        }
        Ok(())
    }

    /// Waits until connections that are complete have been accepted, and those that were closed are done or taken over; new clients have
    /// waited since `begun`. Gives what is left unfinished.
    pub(super) fn await_unfinished(&mut self, closed: &mut Closed, begun: Instant) -> Result<Unfinished> {
        let (to_answer, leisure) = (self.time_to_answer(), self.short_leisure());
        if !self.network.hold.as_ref().is_some_and(Hold::has_listeners) {
            return Ok(Unfinished::default());
        }
        let accepts_since = Instant::now();
        let mut was_full = false;
        loop {
            let hold = self.network.hold.as_mut().expect("prepared before");
            // N.B. in this order: one that is finished in between waits.
            let unfinished = hold.unfinished();
            let waiting = waiting_connections(self.request.pid)?;
            was_full |= waiting.is_full;
            let waiting = waiting.count;
            let is_late = begun.elapsed() >= TO_FINISH;
            let slow = closed.slow(&unfinished.closing, if is_late { Duration::ZERO } else { leisure });
            if !slow.is_empty() {
                // N.B. new clients wait.
                self.take_over_closed(slow, TO_GIVE_AWAY_QUICKLY);
                continue;
            }
            // A request that was answered is one of the next to wait.
            let on_the_way = unfinished.is_any_on_the_way(to_answer) || was_full && !unfinished.half_open.is_empty();
            let may_finish = (closed.is_any_new(&unfinished.closing) || on_the_way) && !is_late;
            if waiting == 0 && !may_finish {
                hold.abandon(&unfinished.half_open)?;
                tracing::debug!(took = ?begun.elapsed(), ?to_answer, "no connection is on its way to the process");
                return Ok(unfinished);
            }
            if waiting > 0 && !may_finish && accepts_since.elapsed() >= TO_ACCEPT {
                return self.leave_waiting(waiting).map(|()| Unfinished::default());
            }
            std::thread::sleep(GLANCE);
        }
    }

    /// How long a client may take to finish a request that it has got the answer to.
    fn time_to_answer(&self) -> Duration {
        let known = self.inspected.as_ref().expect("looked at in the first phase").survey.round_trip;
        if known.is_zero() { TO_ANSWER } else { (known + LEEWAY).clamp(LEAST_TO_ANSWER, TO_FINISH) }
    }

    /// Time after which a closed connection counts as one whose peer is slow, where new clients wait for that: others are done by then.
    fn short_leisure(&self) -> Duration {
        /// Acknowledgements may be put off for 40 ms.
        const LEAST: Duration = Duration::from_millis(50);
        let known = self.inspected.as_ref().expect("looked at in the first phase").survey.round_trip;
        if known.is_zero() { LEISURE } else { (known * 2 + LEAST).min(LEISURE) }
    }

    /// Waits for a moment in which nobody is about to finish a request, as long as new clients need not wait for it: most that are not
    /// finished by then never will be, and need not be waited for while they do.
    pub(super) fn await_lull(&self) {
        let to_answer = self.time_to_answer();
        let deadline = Instant::now() + TO_LULL;
        let Some(hold) = self.network.hold.as_ref().filter(|hold| hold.has_listeners()) else { return };
        while Instant::now() < deadline && hold.unfinished().is_any_on_the_way(to_answer) {
            std::thread::sleep(GLANCE);
        }
    }

    /// Looks once more, when the process is about to be given away, whether a request was finished that was not to be any more.
    ///
    /// # Errors
    /// When one was, and is not to be lost.
    pub(super) fn look_for_waiting(&mut self) -> Result<()> {
        if !self.network.hold.as_ref().is_some_and(Hold::abandons) || self.network.leaves_waiting {
            return Ok(());
        }
        match waiting_connections(self.request.pid)?.count {
            0 => Ok(()),
            waiting => self.leave_waiting(waiting),
        }
    }

    /// Says what no kernel interface lets anybody move, for it has no descriptor.
    pub(super) fn warn_of(&mut self, unfinished: &Unfinished) {
        let Unfinished { half_open, closing } = unfinished;
        if !half_open.is_empty() {
            let text = "requests for connections were answered and not finished; some clients may have to call again";
            self.emit(Event::warning(format!("{} {text}", half_open.len())));
        }
        if !closing.is_empty() {
            let text = "connections were closed before all was sent; their peers do not get the rest";
            self.emit(Event::warning(format!("{} {text}", closing.len())));
        }
    }

    fn leave_waiting(&mut self, waiting: u32) -> Result<()> {
        if !self.request.skip_in_flight && !self.request.tcp_close {
            return Err(Stop::with_remedy(
                "listening sockets",
                format!(
                    "{waiting} connections wait to be accepted, and were not within {} ms; nothing puts them into a queue again",
                    TO_ACCEPT.as_millis()
                ),
                "give --skip-in-flight to lose them",
            ));
        }
        if std::mem::replace(&mut self.network.leaves_waiting, true) {
            return Ok(());
        }
        self.emit(Event::warning(format!("{waiting} connections that were not accepted are lost")));
        Ok(())
    }
}
