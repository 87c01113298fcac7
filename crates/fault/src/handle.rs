//! One program's drain, as the one who started it sees it: a report, and the wait for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::error::{Error, MigrationId, Result};
use crate::ledger::Ledger;
use crate::migration::{Drain, Stage};

/// How a drain went.
#[derive(Clone, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct DrainReport {
    /// Faults on pages that were at the source.
    pub faults: u64,
    /// Microseconds from reading of a fault to its page being in place: median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// The longest.
    pub longest_us: u64,
    /// Faults on pages that had no content at the source either.
    pub holes: u64,
    /// Pages that were put in place.
    pub pages: u64,
    /// Microseconds from the beginning of the drain to its end.
    pub drain_us: u64,
    /// Bytes that the source has sent for it, everything inside UDP. Only the source knows.
    #[serde(default)]
    pub bytes_sent: u64,
    /// The program ended before all its pages had come.
    pub departed: bool,
    /// The source knows that its copy is not needed any more.
    pub acknowledged: bool,
}

/// One program's drain. Dropping it does not end the drain.
#[derive(Clone, Debug)]
pub struct DrainHandle {
    id: MigrationId,
    stage: watch::Receiver<Stage>,
    stop: watch::Receiver<bool>,
    place: Place,
}

/// Who drains.
#[derive(Clone, Debug)]
enum Place {
    Here(Arc<Drain>),
    /// A daemon; its ledger says how far it is.
    Daemon(Arc<Ledger>),
}

impl DrainHandle {
    pub(crate) fn here(drain: Arc<Drain>, stop: watch::Receiver<bool>) -> Self {
        Self { id: drain.id, stage: drain.stage.subscribe(), stop, place: Place::Here(drain) }
    }

    pub(crate) fn at_daemon(ledger: Arc<Ledger>, stage: watch::Receiver<Stage>, stop: watch::Receiver<bool>) -> Self {
        Self { id: ledger.subject().id, stage, stop, place: Place::Daemon(ledger) }
    }

    /// Waits until all pages are there and the source knows it, or could not be told for half a minute. For plain threads.
    ///
    /// # Errors
    /// [`Error::ServiceEnded`] when the service was ended before.
    pub fn wait(&self) -> Result<DrainReport> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.map_err(|source| Error::Thread { name: "waiting", source })?;
        runtime.block_on(self.finished())
    }

    /// Waits as [`Self::wait`] does, in a task.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub async fn finished(&self) -> Result<DrainReport> {
        const ACKNOWLEDGEMENT: Duration = Duration::from_secs(30);
        let (mut stage, mut stop) = (self.stage.clone(), self.stop.clone());
        tokio::select! {
            drained = stage.wait_for(|stage| *stage != Stage::Draining) => drop(drained.map_err(|_| Error::ServiceEnded)?),
            _ = stop.wait_for(|stop| *stop) => return Err(Error::ServiceEnded),
        }
        let acknowledged = stage.wait_for(|stage| matches!(stage, Stage::Acknowledged(_)));
        tokio::select! {
            // Not acknowledged in time: the report says so.
            _ = tokio::time::timeout(ACKNOWLEDGEMENT, acknowledged) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        Ok(self.progress())
    }

    /// Waits until all pages are there, whether or not the source knows. The program is then on its own.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub async fn drained(&self) -> Result<DrainReport> {
        let (mut stage, mut stop) = (self.stage.clone(), self.stop.clone());
        tokio::select! {
            drained = stage.wait_for(|stage| *stage != Stage::Draining) => drop(drained.map_err(|_| Error::ServiceEnded)?),
            _ = stop.wait_for(|stop| *stop) => return Err(Error::ServiceEnded),
        }
        Ok(self.progress())
    }

    /// Waits until not one page has come for as long as `quiet`, and gives how many are missing then.
    pub async fn stalled(&self, quiet: Duration) -> u64 {
        let mut missing = self.missing_pages();
        loop {
            tokio::time::sleep(quiet).await;
            let before = std::mem::replace(&mut missing, self.missing_pages());
            if missing == before {
                return missing;
            }
        }
    }

    /// How it stands now. Of a daemon only pages are known before the end.
    #[must_use]
    pub fn progress(&self) -> DrainReport {
        match (&*self.stage.borrow(), &self.place) {
            (Stage::Drained(report) | Stage::Acknowledged(report), _) => report.clone(),
            (Stage::Draining, Place::Here(drain)) => drain.report(),
            (Stage::Draining, Place::Daemon(ledger)) => {
                DrainReport { pages: ledger.filled(), ..DrainReport::default() }
            }
        }
    }

    /// Pages that are missing still.
    #[must_use]
    pub fn missing_pages(&self) -> u64 {
        match &self.place {
            Place::Here(drain) => drain.missing_pages(),
            Place::Daemon(ledger) => ledger.missing_pages(),
        }
    }

    /// The migration's id.
    #[must_use]
    pub fn id(&self) -> MigrationId {
        self.id
    }
}
