//! The moment in which a complete copy becomes a process: its addresses, its network and itself, in this order.

use crate::addresses::{self, Coming};
use crate::network::OwnNetwork;
use crate::standing::Hands;
use anyhow::{Result, anyhow};
use godwit_kernel::pause;
use godwit_proto::wire;
use godwit_rebuild::Launch;
use godwit_resources::descriptors;
use std::time::Instant;

/// The hands that let a complete copy go.
pub(crate) struct Launching<'a> {
    launch: Option<Launch>,
    addresses: &'a [Coming],
    network: Option<&'a OwnNetwork>,
    arrived: Option<addresses::Arrived>,
    announcement: Option<godwit_network::contents::Announcement>,
    late_signals: &'a [wire::LateSignal],
    started: Instant,
    launched: Option<descriptors::Rebuilt>,
}

impl<'a> Launching<'a> {
    /// `late_signals`: what was sent to the process while it stood still at the source.
    pub(crate) fn new(
        launch: Launch,
        addresses: &'a [Coming],
        network: Option<&'a OwnNetwork>,
        late_signals: &'a [wire::LateSignal],
    ) -> Self {
        Self {
            launch: Some(launch),
            addresses,
            network,
            arrived: None,
            announcement: None,
            late_signals,
            started: Instant::now(),
            launched: None,
        }
    }

    /// What is left to be done about the descriptors of the process, if it runs.
    pub(crate) fn into_launched(self) -> Option<descriptors::Rebuilt> {
        self.launched
    }
}

impl Hands for Launching<'_> {
    fn free(&mut self) -> Result<()> {
        let launch = self.launch.as_mut().ok_or_else(|| anyhow!("there is no copy"))?;
        // N.B. before anything is sent here: what a closed gate keeps out is lost.
        launch.let_datagrams_in();
        // N.B. before connections live: what they send comes from these addresses.
        self.arrived = Some(addresses::arrive(self.addresses)?);
        self.announcement = self.network.map(OwnNetwork::open).transpose()?.flatten();
        Ok(launch.free()?)
    }

    fn release(&mut self) {
        let Some(launch) = self.launch.take() else { return };
        pause::at("granted");
        match launch.launch(self.late_signals) {
            Ok(rebuilt) => self.launched = Some(rebuilt),
            // It is written down that it runs: it has ended.
            Err(error) => tracing::error!(%error, "the process ended in the moment in which it was let go"),
        }
        if let Some(arrived) = self.arrived.take() {
            arrived.keep();
        }
        if let Some(announcement) = self.announcement.take() {
            addresses::repeat(move || announcement.tell());
        }
        pause::at("running");
    }

    fn kill(&mut self) {
        self.arrived = None;
        self.launch = None;
    }

    fn running(&self) -> Option<wire::Running> {
        let resume_us = self.started.elapsed().as_micros() as u64;
        Some(wire::Running { resume_us, ..wire::Running::default() })
    }
}
