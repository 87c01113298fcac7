//! Packets that come before their connections do: the network may send them here already, and this host, which has the address
//! and no such connection yet, would answer with a reset. They are held back until the connections live.

use crate::addresses::Coming;
use anyhow::{Context as _, Result};
use godwit_network::{Flow, Hold, Namespace, Tracking, Watched};
use godwit_resources::{LEAVE_BEHIND, Obstacle};
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

/// What all migrations hold back. A source that left without a word is only noticed after a while; should it come again
/// meanwhile, the packets are those of its new migration.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holds(Arc<Mutex<Vec<Weak<Held>>>>);

type Held = Mutex<Option<Kept>>;

/// What is kept from the kernel, and what its packet filter is told meanwhile. Both end together: whoever comes again begins anew.
#[derive(Debug)]
struct Kept {
    hold: Hold,
    tracking: Option<Tracking>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Holds {
    /// Has others let go of what is `wanted`.
    fn take_over(&self, wanted: &Watched, own: &Arc<Held>) {
        let mut holds = lock(&self.0);
        holds.retain(|held| held.strong_count() > 0);
        let others = holds.iter().filter_map(Weak::upgrade).filter(|held| !Arc::ptr_eq(held, own));
        for other in others {
            let mut held = lock(&other);
            if held.as_ref().is_some_and(|kept| kept.hold.watched().overlaps(wanted)) {
                tracing::info!("packets for connections are held back anew: their process comes once more");
                *held = None;
            }
        }
    }

    fn add(&self, held: &Arc<Held>) {
        lock(&self.0).push(Arc::downgrade(held));
    }
}

/// What is held back for one migration, once it is.
#[derive(Debug)]
pub(crate) struct Arrivals {
    name: String,
    holds: Holds,
    held: Arc<Held>,
    /// Whether other sockets have, or may have, their addresses here: what is tracked of connections is not all theirs.
    among_others: bool,
}

impl Arrivals {
    /// Nothing yet; `name` distinguishes the migration from others.
    pub(crate) fn new(name: String, holds: Holds) -> Self {
        let held = Arc::default();
        holds.add(&held);
        Self { name, holds, held, among_others: false }
    }

    /// Says that they come to a network that others have, too, and not to one that was made for them with what is tracked there.
    pub(crate) fn come_among_others(&mut self) {
        self.among_others = true;
    }

    /// Names what stands in the way of holding packets back, where connections come to addresses that this host has already.
    pub(crate) fn check(&self, addresses: &[String], coming: &[IpAddr]) -> Option<Obstacle> {
        let local = |address: &String| address.strip_prefix("connection:")?.parse::<SocketAddr>().ok();
        if addresses.iter().filter_map(local).all(|local| coming.contains(&local.ip().to_canonical())) {
            return None;
        }
        let error = self.make(Watched::default()).err()?;
        let text = format!("the destination cannot hold packets back that come before the connections: {error}");
        let remedy = format!("have nf_tables there, or {LEAVE_BEHIND}");
        Some(Obstacle::new("connections", text, remedy))
    }

    /// Keeps what is to come from the kernel, as far as it is known, from now on. The addresses that are `coming` are not here
    /// before the connections are.
    pub(crate) fn prepare(&mut self, watched: Watched, coming: &[Coming]) -> Result<()> {
        if watched.is_empty() {
            return Ok(());
        }
        self.holds.take_over(&watched, &self.held);
        let needed = watched.flows.iter().any(|flow| !coming.iter().any(|coming| coming.ip == flow.local.ip()));
        match self.make(watched) {
            Ok(hold) => {
                let tracking =
                    self.among_others.then(|| begin_tracking(coming).inspect_err(report)).and_then(Result::ok);
                *lock(&self.held) = Some(Kept { hold, tracking });
            }
            Err(error) if needed => return Err(error).context("holding packets back that come early"),
            // All that is lost is that clients who call too early have to call again.
            Err(error) => tracing::warn!(%error, "what comes early is not held back"),
        }
        Ok(())
    }

    /// Has this host's packet filter know the connections that are to live here: as it is told, or as established ones.
    pub(crate) fn track(&mut self, told: &[Vec<u8>], coming: &[Coming]) {
        let coming: Vec<IpAddr> = coming.iter().map(|coming| coming.ip).collect();
        if let Some(Kept { hold, tracking: Some(tracking) }) = &mut *lock(&self.held)
            && let Err(error) = tracking.arriving(hold.watched(), told, &coming)
        {
            report(&error);
        }
    }

    /// N.B. where the calling thread is, which is where the process will be.
    fn make(&self, watched: Watched) -> godwit_network::Result<Hold> {
        Hold::prepare_for_arrival(Namespace::current()?, &self.name, watched)
    }

    /// Collects what comes from now on.
    pub(crate) fn collect(&mut self) -> Result<()> {
        match &mut *lock(&self.held) {
            Some(kept) => kept.hold.collect().context("collecting packets that come early"),
            None => Ok(()),
        }
    }

    /// Adds what came up since.
    pub(crate) fn add(&mut self, watched: Watched, coming: &[Coming]) -> Result<()> {
        if lock(&self.held).is_none() {
            self.prepare(watched.clone(), coming)?;
        }
        self.holds.take_over(&watched, &self.held);
        if let Some(Kept { hold, .. }) = &mut *lock(&self.held) {
            hold.add_listeners(watched.listeners)
                .and_then(|()| hold.hold_everything(&watched.flows))
                .context("holding packets back that come early")?;
        }
        self.collect()
    }

    /// Delivers what has come: the connections live. Somebody else does it, for whoever calls this has packets of the source to
    /// deliver, which are older. Gives the connections.
    pub(crate) fn deliver(&mut self) -> HashSet<Flow> {
        let Some(Kept { hold, mut tracking }) = lock(&self.held).take() else { return HashSet::new() };
        let connections = hold.watched().flows.clone();
        if let Some(tracking) = &mut tracking {
            tracking.have_come();
        }
        let started = Instant::now();
        let delivering = std::thread::Builder::new().name("early packets".to_owned()).spawn(move || {
            hold.deliver_here();
            tracing::debug!(after_us = started.elapsed().as_micros() as u64, "what came early is delivered");
            // N.B. now: it looks which connections are still there.
            drop(tracking);
        });
        if let Err(error) = delivering {
            tracing::warn!(%error, "what came early has to be sent again");
        }
        connections
    }
}

/// Forgets what may be tracked of addresses that are coming: they may have lived here before.
fn begin_tracking(coming: &[Coming]) -> godwit_network::Result<Tracking> {
    let tracking = Tracking::of(Namespace::current()?)?;
    let is_coming = |ip: IpAddr| coming.iter().any(|coming| coming.ip == ip);
    if !coming.is_empty() {
        tracking.forget(|flow| is_coming(flow.local.ip()))?;
    }
    Ok(tracking)
}

fn report(error: &godwit_network::Error) {
    tracing::warn!(%error, "a stateful packet filter may stop packets of the connections");
}
