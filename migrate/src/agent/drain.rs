//! Post-copy: the stopped process serves the pages that the running one still lacks.

use super::stop::{Result, Stop};
use super::{Agent, milliseconds};
use crate::event::{Event, Faults};
use godwit_fault::{FrozenProcess, MigrationId, PageSource};
use std::net::SocketAddr;
use std::time::Instant;

impl Agent<'_> {
    /// Serves pages until the destination says that it has all of them, then ends the source's copy.
    pub(super) fn drain(&mut self) -> Result<()> {
        let frozen = self.frozen.as_ref().expect("stopped before");
        if !frozen.missing.is_empty() {
            self.emit(Event::phase("drain"));
            let started = Instant::now();
            let report = self.page_source()?.run(FrozenProcess::open(self.request.pid).map_err(|error| lost(&error))?);
            let report = report.map_err(|error| lost(&error))?;
            let faults =
                Faults { count: report.faults, p50_us: report.p50_us as f64, p99_us: report.p99_us as f64 };
            self.report.drain_ms = milliseconds(started.elapsed());
            self.report.faults = faults;
            self.report.pages_sent += report.pages;
            let drain_ms = self.report.drain_ms;
            self.emit(Event::Drained { drain_ms, faults });
        }
        self.let_go();
        Ok(())
    }

    fn page_source(&self) -> Result<PageSource> {
        let host = self.wire().peer().ip();
        let port = |port: u32| {
            u16::try_from(port).map_err(|_| Stop::Unknown("the page server named an impossible port".to_owned()))
        };
        let faults = SocketAddr::new(host, port(self.welcome.fault_port)?);
        let drain = SocketAddr::new(host, port(self.welcome.drain_port)?);
        let token = self.token.clone().expect("loaded in the first phase");
        Ok(PageSource::new(faults, drain, token, MigrationId(self.migration_id)))
    }
}

/// The program runs at the destination and waits for pages that only this host has.
fn lost(error: &dyn std::error::Error) -> Stop {
    Stop::Unknown(format!("the process runs at the destination, but not all of its pages are there yet: {error}"))
}
