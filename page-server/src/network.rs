//! The network namespace of a process that has one of its own: made again here, or one that was prepared, and silent until
//! the process runs.

use anyhow::{Context as _, Result};
use godwit_network::contents::{self, Announcement, Furnished, Objection};
use godwit_network::{Namespace, Silence};
use godwit_proto::wire::network_joint::Kind;
use godwit_proto::wire::{NetworkJoint, NetworkNamespace, ProcessFacts};
use godwit_resources::Obstacle;
use std::net::IpAddr;

/// The namespace of a process on its way.
#[derive(Debug)]
pub(crate) struct OwnNetwork {
    place: Place,
    /// Where this program is at home.
    home: Namespace,
    silence: Silence,
}

#[derive(Debug)]
enum Place {
    Made(Box<Furnished>),
    Prepared(Namespace),
}

/// The name of the namespace that was prepared for the process, if one was.
fn prepared(joints: &[NetworkJoint]) -> Option<&str> {
    joints.iter().find(|joint| joint.kind() == Kind::Namespace).map(|joint| joint.name.as_str())
}

/// Lists what stands in the way of a process here. What it must find in its network is looked for where it will be.
pub(crate) fn check(facts: &ProcessFacts, joints: &[NetworkJoint], moved: &[IpAddr]) -> Vec<Obstacle> {
    let Some(contents) = &facts.network else { return godwit_rebuild::check(facts, moved) };
    let prepared = prepared(joints);
    let (place, moved) = match prepared {
        Some(name) => (Namespace::named(name), Vec::new()),
        None => (Namespace::create(), contents::addresses(contents)),
    };
    let look = |place: Namespace| {
        let down = if prepared.is_some() { contents::down_in_prepared(&place, contents)? } else { Vec::new() };
        Ok((down, place.inside(|| godwit_rebuild::check(facts, &moved))?))
    };
    let mut obstacles: Vec<Obstacle> = contents::missing_here(contents, joints).into_iter().map(obstacle).collect();
    match place.and_then(look) {
        Ok((down, more)) => {
            obstacles.extend(down.into_iter().map(obstacle));
            obstacles.extend(more);
        }
        Err(error) => obstacles.push(Obstacle::new("network namespace", error.to_string(), "")),
    }
    obstacles
}

fn obstacle(objection: Objection) -> Obstacle {
    Obstacle::new(objection.resource, objection.text, objection.remedy)
}

impl OwnNetwork {
    /// Makes the namespace, or finds it, silences it, and puts the calling thread into it. `id` distinguishes the migration.
    ///
    /// # Errors
    /// When this host does not take something of it.
    pub(crate) fn enter(contents: &NetworkNamespace, joints: &[NetworkJoint], id: &str) -> Result<Self> {
        let home = Namespace::current()?;
        let id = id.get(..8).unwrap_or(id);
        let (place, silence) = match prepared(joints) {
            Some(name) => {
                let namespace = Namespace::named(name)?;
                let silence = Silence::impose(&namespace, id)?;
                (Place::Prepared(namespace), silence)
            }
            None => {
                let namespace = Namespace::create()?;
                // N.B. before anything is in it: two hosts have these addresses for a while. And for good: should this program be
                // killed, the namespace outlives it for a moment, in which it would answer with resets.
                let silence = Silence::impose_for_good(&namespace, id)?;
                let furnished = Furnished::make(namespace, contents, joints, &format!("gw{id}"))?;
                (Place::Made(Box::new(furnished)), silence)
            }
        };
        let own = Self { place, home, silence };
        own.namespace().enter()?;
        Ok(own)
    }

    /// Whether it was there before the process.
    pub(crate) fn is_prepared(&self) -> bool {
        matches!(self.place, Place::Prepared(_))
    }

    fn namespace(&self) -> &Namespace {
        match &self.place {
            Place::Made(furnished) => furnished.namespace(),
            Place::Prepared(namespace) => namespace,
        }
    }

    /// Where this program is at home.
    pub(crate) fn home(&self) -> &Namespace {
        &self.home
    }

    /// Follows what has changed since, and tracks the connections that were tracked.
    ///
    /// # Errors
    /// When this host does not take something of it.
    pub(crate) fn complete(&mut self, contents: &NetworkNamespace) -> Result<()> {
        if let Place::Made(furnished) = &mut self.place {
            furnished.follow(contents).context("following changes of the network")?;
            furnished.track(contents);
        }
        Ok(())
    }

    /// Lets it speak, and tells everybody that its addresses are here.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub(crate) fn open(&self) -> Result<Option<Announcement>> {
        self.silence.end()?;
        if let Place::Prepared(namespace) = &self.place {
            contents::plug_in_prepared(namespace, &self.home)?;
        }
        let announced = contents::announce(self.namespace());
        Ok(announced.inspect_err(|error| tracing::warn!(%error, "neighbours are not told of addresses")).ok())
    }

    /// Gives the namespace out of hand: the process has it now.
    pub(crate) fn into_namespace(self) -> Namespace {
        match self.place {
            Place::Made(furnished) => furnished.into_namespace(),
            Place::Prepared(namespace) => namespace,
        }
    }
}
