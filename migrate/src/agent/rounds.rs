//! Pre-copy: rounds of changed pages while the process runs.

use super::memory::{Slowly, Stopped, ranges};
use super::stop::{Result, Stop};
use super::{Agent, PATIENCE, milliseconds};
use crate::event::{Event, Progress, Round};
use crate::request::OnTimeout;
use godwit_pages::PageSet;
use godwit_proto::wire as messages;
use godwit_session::{Decision, Phase, Round as Figures};
use std::time::{Duration, Instant};

/// What is written in so short a time may be sent inside the freeze.
const UNNOTICED: Duration = Duration::from_millis(20);
/// Pages that are dropped in a millisecond or two.
const WORTH_DROPPING: u64 = 1024;
/// Least time between two reports of progress.
const REPORT_EVERY: Duration = Duration::from_millis(100);

impl Agent<'_> {
    /// Sends rounds until they have done their part. Pages found changed after the last one stay in `unsent`.
    pub(super) fn rounds(&mut self) -> Result<()> {
        let mut number = 0;
        let mut last: Option<(Round, Instant)> = None;
        loop {
            if self.is_forced() {
                self.deadline = None;
                self.emit(Event::warning("the time given by --timeout has passed; the process is handed over now"));
                return Ok(());
            }
            self.check_wish()?;
            self.memory().follow_layout(if number < 2 { Slowly::Yes } else { Slowly::No })?;
            let mut memory = self.memory.take().expect("opened before the rounds");
            let wire = self.wire.as_ref().expect("connected in the first phase");
            let found = memory
                .send_layout(wire)
                .and_then(|()| memory.changed(wire, Stopped::No, &mut self.unsent, &mut self.sleep_watch));
            self.memory = Some(memory);
            let changed = found?;
            let pages = changed.pages();
            if let Some((mut round, ended)) = last.take() {
                let interval = Duration::from_secs_f64(round.elapsed_ms / 1e3) + ended.elapsed();
                self.dirty_rate = pages as f64 / interval.as_secs_f64();
                round.dirty_pages = pages;
                self.emit(Event::Round(round));
            }
            let later = match self.mode.has(Phase::Drain) {
                true => self.memory().can_follow_later(&changed),
                false => PageSet::new(),
            };
            self.unsent = changed;
            match self.convergence.next(pages, later.pages()) {
                Decision::Freeze => {
                    self.drop_ahead(number, &later)?;
                    if self.is_ready_for_freeze() {
                        return Ok(());
                    }
                    let begun = Instant::now();
                    self.prepare_freeze()?;
                    if begun.elapsed() < UNNOTICED {
                        return Ok(());
                    }
                    self.convergence.has_waited();
                    continue;
                }
                Decision::OutOfReach => {
                    let left = self.convergence.time_for(pages);
                    let text = format!(
                        "after {number} rounds {pages} pages are still written each round; sending them would freeze the \
                         process for {:.0} ms, the target is {:.0} ms",
                        milliseconds(left),
                        milliseconds(self.request.downtime_target.unwrap_or_default())
                    );
                    return Err(Stop::with_remedy(
                        "downtime target",
                        text,
                        "use --mode hybrid, or allow more with --downtime-target",
                    ));
                }
                Decision::SendRound => {}
            }
            number += 1;
            self.report.rounds = number;
            last = Some((self.send_round(number)?, Instant::now()));
        }
    }

    /// Whether the time is over, and the user wants the hand-over now.
    fn is_forced(&self) -> bool {
        let is_late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        is_late && self.request.on_timeout == OnTimeout::Force
    }

    fn send_round(&mut self, number: u32) -> Result<Round> {
        self.emit(Event::round(number));
        let started = Instant::now();
        let bytes_before = self.wire().bytes_sent();
        let changed = std::mem::take(&mut self.unsent);
        let total = changed.pages();
        let mut memory = self.memory.take().expect("opened before the rounds");
        let mut done = 0;
        let mut reported = started;
        let wire = self.wire.take().expect("connected in the first phase");
        // A round that has begun is sent, whatever the time.
        let forces = self.request.on_timeout == OnTimeout::Force;
        let mut between = |pages: u64| {
            done += pages;
            if reported.elapsed() >= REPORT_EVERY {
                reported = Instant::now();
                let elapsed = started.elapsed().as_secs_f64();
                let rate = done as f64 / elapsed;
                (self.events)(Event::Progress(Progress {
                    phase: "round".into(),
                    round: number,
                    pages_done: done,
                    pages_total: total,
                    bytes_on_wire: wire.bytes_sent(),
                    rate_bytes_per_s: rate * 4096.0,
                    dirty_rate_pages_per_s: self.dirty_rate,
                    eta_ms: (rate > 0.0).then(|| (total - done) as f64 / rate * 1e3),
                }));
            }
            if self.cancel.is_cancelled() {
                return Err(Stop::Cancelled);
            }
            match self.deadline {
                Some(deadline) if Instant::now() >= deadline && !forces => Err(Stop::late()),
                _ => Ok(()),
            }
        };
        let sent = memory.send_pages(&wire, &changed, Stopped::No, &mut between);
        let objects = sent.and_then(|()| memory.send_objects(&wire));
        self.memory = Some(memory);
        self.wire = Some(wire);
        let pages = total + objects?;
        self.end_round(number, PATIENCE.max(started.elapsed() * 2))?;
        let elapsed = started.elapsed();
        self.convergence.sent(Figures { pages, elapsed });
        tracing::debug!(round = number, pages, ?elapsed, "round sent");
        Ok(Round {
            number,
            pages,
            bytes: self.wire().bytes_sent() - bytes_before,
            dirty_pages: 0,
            elapsed_ms: milliseconds(elapsed),
        })
    }

    /// Waits until all that was sent is in place.
    fn end_round(&self, number: u32, patience: Duration) -> Result<()> {
        self.wire().send(&messages::RoundEnd { round: number, last: false })?;
        let ack = self.wire().receive_before(patience, self.time_left().or(Some(patience)), Some(self.cancel));
        if ack.is_err() {
            self.check_wish_to_stop()?;
        }
        let ack: messages::RoundAck = ack?;
        if ack.round != number {
            return Err(Stop::failed("page server", format!("acknowledged round {} instead of {number}", ack.round)));
        }
        Ok(())
    }

    /// Has the destination drop what it has of pages that will follow after the freeze, as far as they are known: where there are many that
    /// takes longer than all else that a freeze holds.
    fn drop_ahead(&self, number: u32, later: &PageSet) -> Result<()> {
        if later.pages() <= self.convergence.freeze_budget().max(WORTH_DROPPING) {
            return Ok(());
        }
        let started = Instant::now();
        self.wire().send(&messages::Drop { space: 0, ranges: ranges(later) })?;
        self.end_round(number, PATIENCE)?;
        tracing::debug!(pages = later.pages(), after = ?started.elapsed(), "pages that follow later are dropped there");
        Ok(())
    }
}
