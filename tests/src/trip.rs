//! The plain journey: a victim starts, runs, moves, runs on, and says at the end that nothing was ever wrong.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::migration::Mode;
use crate::outcome::Migration;
use crate::two_hosts::TwoHosts;

/// One victim's move from the source to the destination.
#[derive(Debug, Clone)]
pub struct Trip<'a> {
    victim: &'a str,
    arguments: &'a [&'a str],
    migrate: Vec<&'a str>,
}

/// Victims whose mappings, descriptors or threads change by themselves.
const RESTLESS: [&str; 8] = ["churn", "threads", "layout", "filemap", "forker", "robust", "events", "itself"];

impl<'a> Trip<'a> {
    /// Describes the move of a victim with these arguments.
    pub fn of(victim: &'a str, arguments: &'a [&'a str]) -> Self {
        Self { victim, arguments, migrate: Vec::new() }
    }

    /// Adds words to the command line of `migrate`.
    pub fn with(mut self, arguments: &[&'a str]) -> Self {
        self.migrate.extend(arguments);
        self
    }

    /// Makes two hosts and runs the journey on them.
    ///
    /// # Errors
    /// The first thing that is not as it should be.
    pub fn run(&self, mode: Mode) -> Result<Migration> {
        self.run_on(&TwoHosts::new()?, mode)
    }

    /// Runs the journey on hosts that are there.
    ///
    /// # Errors
    /// The first thing that is not as it should be.
    pub fn run_on(&self, hosts: &TwoHosts, mode: Mode) -> Result<Migration> {
        let server = hosts.destination.page_server(&hosts.token)?;
        let mut victim = hosts.source.victim(self.victim, self.arguments)?;
        victim.expect_beats(20)?;
        let before = (!RESTLESS.contains(&self.victim)).then(|| victim.view()).transpose()?;
        let migration = hosts.source.migrate(&server, victim.pid()).mode(mode).arguments(&self.migrate).run()?;
        let journey = || format!("{} in mode {}; page server: {}", self.victim, mode.word(), server.log());
        migration.expect_moved().with_context(journey)?;
        victim.follow(&hosts.destination, &migration).with_context(journey)?;
        victim.expect_beats(20).with_context(journey)?;
        if let Some(before) = before {
            victim.view()?.expect_copy_of(&before).with_context(journey)?;
        }
        victim.go()?;
        std::thread::sleep(Duration::from_millis(300));
        victim.expect_beats(20).with_context(journey)?;
        victim.finish().with_context(journey)?;
        Ok(migration)
    }
}
