//! Whether this host could take a process: asked before anything is touched.

use godwit_proto::wire::ProcessFacts;
use godwit_resources::memory::{aio, segments};
use godwit_resources::{Obstacle, descriptors, files, identity};
use std::net::IpAddr;

/// Names everything that this host lacks, not counting addresses that are `moved` along.
#[must_use]
pub fn check(facts: &ProcessFacts, moved: &[IpAddr]) -> Vec<Obstacle> {
    let mut obstacles = files::check(&facts.files);
    obstacles.extend(descriptors::check_files(&facts.files));
    obstacles.extend(descriptors::check_addresses(&facts.listening, moved));
    obstacles.extend(segments::check(&facts.sysv_ids, &facts.sysv_keys));
    obstacles.extend(aio::check(&facts.aio_rings));
    match identity::check(facts) {
        Ok(more) => obstacles.extend(more),
        Err(error) => obstacles.push(Obstacle::new("destination", format!("it cannot be examined: {error}"), "")),
    }
    obstacles
}
