//! Post-copy: the stopped process serves the pages that the running one still lacks.

use super::stop::{Result, Stop};
use super::wire::Counterpart;
use super::{Agent, milliseconds};
use crate::event::{Event, Faults};
use crate::report::Outcome;
use godwit_carry::with_causes;
use godwit_fault::{DrainReport, FrozenProcess, MigrationId, PageSource, Serving};
use godwit_session::decision::Verdict;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Time that the links for missing pages may take, on hosts that are busy with many moves at once. They are made before the freeze: a
/// firewall in between is found in time.
const LINKS: Duration = Duration::from_secs(20);

impl Agent<'_> {
    /// Serves pages until the destination says that it has all of them, then ends the source's copy.
    pub(super) fn drain(&mut self) -> Result<()> {
        if let Some(serving) = self.serving.take().filter(|_| self.is_missing_pages()) {
            self.emit(Event::phase("drain"));
            let started = Instant::now();
            let Some(report) = self.serve(serving, started)? else {
                self.emit(Event::Ended);
                self.report.outcome = Outcome::Ended;
                // N.B. kept: somebody may have ended a copy there that could not go on, and this is all that is left.
                self.frozen.take().expect("stopped before").hold();
                return Ok(());
            };
            let faults = Faults { count: report.faults, p50_us: report.p50_us as f64, p99_us: report.p99_us as f64 };
            self.report.drain_ms = milliseconds(started.elapsed());
            self.report.faults = faults;
            self.report.pages_sent += report.pages;
            self.report.bytes_on_wire += report.bytes_sent;
            let drain_ms = self.report.drain_ms;
            if report.departed {
                self.report.outcome = Outcome::Ended;
                self.emit(Event::Ended);
            } else {
                self.emit(Event::Drained { drain_ms, faults });
            }
        }
        self.complete();
        Ok(())
    }

    /// Serves pages until the destination has all of them; `None` when its copy has ended before. Where nobody there knows of them it is asked
    /// how that stands, and they are offered again.
    fn serve(&mut self, mut serving: Serving, since: Instant) -> Result<Option<DrainReport>> {
        loop {
            let error = match serving.wait() {
                Ok(report) => return Ok(Some(report)),
                Err(error) => error,
            };
            match self.ask() {
                Ok(answer) if answer.ended => return Ok(None),
                // The last word may have been lost, and nothing else.
                Ok(answer) if answer.verdict == (Verdict::Runs { complete: true }) => {
                    return Ok(Some(DrainReport::default()));
                }
                _ => {}
            }
            let is_unknown = matches!(error, godwit_fault::Error::NotDrained { .. });
            if !is_unknown || since.elapsed() >= self.request.reconnect_for || self.cancel.is_wished() {
                return Err(lost(&error));
            }
            let Ok(reader) = FrozenProcess::open(self.request.pid) else { return Err(lost(&error)) };
            serving = self.page_source()?.start(reader).map_err(|error| lost(&error))?;
        }
    }

    pub(super) fn is_missing_pages(&self) -> bool {
        self.frozen.as_ref().is_some_and(|frozen| !frozen.missing.is_empty())
    }

    /// Calls the fault service, so that its links stand when the first page is missed. For the moment before the freeze.
    pub(super) fn call_fault_service(&mut self) -> Result<()> {
        let failed = |error: &dyn std::error::Error| Stop::failed("fault service", error.to_string());
        let reader = FrozenProcess::open(self.request.pid).map_err(|error| failed(&error))?;
        let serving = self.page_source()?.start(reader).map_err(|error| failed(&error))?;
        let begun = Instant::now();
        if let Err(trouble) = serving.await_links(LINKS) {
            return Err(match trouble {
                // N.B. revoked under way, for it was welcome on the other port.
                Some(godwit_fault::Error::Link(refusal)) if refusal.is_refusal() => refusal.into(),
                Some(stranger) if stranger.is_refusal() => Stop::failed("fault service", with_causes(&stranger)),
                trouble => {
                    let why = trouble.map_or_else(String::new, |trouble| format!(" ({})", with_causes(&trouble)));
                    let seconds = begun.elapsed().as_secs();
                    let text = format!(
                        "no link to it stands after {seconds} s: pages could not follow after the hand-over{why}"
                    );
                    let remedy = "open the two UDP ports above the page server's, or use --mode pre-copy";
                    Stop::with_remedy(format!("fault service of {}", self.wire().peer().ip()), text, remedy)
                }
            });
        }
        self.serving = Some(serving);
        Ok(())
    }

    fn page_source(&self) -> Result<PageSource> {
        let at = |port: u32| {
            let port = u16::try_from(port).map_err(|_| Stop::failed("page server", "it named an impossible port"))?;
            // N.B. with its scope, without which a link-local address leads nowhere.
            let mut address = self.wire().peer();
            address.set_port(port);
            Ok::<SocketAddr, Stop>(address)
        };
        let (faults, drain) = (at(self.welcome.fault_port)?, at(self.welcome.drain_port)?);
        let Counterpart { credentials, party } = self.counterpart().clone();
        let mut source = PageSource::new(faults, drain, (credentials, party), MigrationId(self.migration_id));
        source.give_up_after = self.request.reconnect_for;
        Ok(source)
    }
}

/// The program runs at the destination and waits for pages that only this host has.
pub(super) fn lost(error: &godwit_fault::Error) -> Stop {
    let why = with_causes(error);
    Stop::Unknown(format!("the process runs at the destination, but not all of its pages are there yet: {why}"))
}
