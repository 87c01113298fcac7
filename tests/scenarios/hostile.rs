//! Peers, page servers and processes that mean no good: each gets an error or what it asked for, nothing of them is left, and the
//! next migration is served.

#[path = "hostile/another.rs"]
mod another;
#[path = "hostile/corpus.rs"]
mod corpus;
#[path = "hostile/faults.rs"]
mod faults;
#[path = "hostile/page_server.rs"]
mod page_server;
#[path = "hostile/source.rs"]
mod source;
#[path = "hostile/tracee.rs"]
mod tracee;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use godwit_carry::Frame;
use godwit_tests::{Footprint, GoBetween, Instead, Mode, PageServer, PageServerOptions, Said, Speaker, TwoHosts};

/// Two hosts, a page server, what it holds before anybody comes, and what a source said in a migration that went well.
struct Stage {
    hosts: TwoHosts,
    server: PageServer,
    before: Footprint,
    words: Vec<Said>,
}

impl Stage {
    /// Sets it up; `arguments` are the page server's.
    fn set(arguments: &[&str]) -> Result<Self> {
        let hosts = TwoHosts::new()?;
        let arguments = arguments.iter().map(|&word| word.to_owned()).collect();
        let options = PageServerOptions { arguments, ..PageServerOptions::default() };
        let mut server = hosts.destination.page_server_with(&hosts.token, &options)?;
        let words = record(&hosts, &server, "memory", &["2", "1", "4"], Mode::StopAndCopy)?;
        let before = Footprint::of(&hosts.destination, server.process().host_pid())?;
        Ok(Self { hosts, server, before, words })
    }

    fn address(&self) -> Result<SocketAddr> {
        Ok(self.server.address.parse()?)
    }

    fn token(&self) -> PathBuf {
        self.hosts.token.path().to_owned()
    }

    /// What the source said on the control connection, in order.
    fn of_source(&self) -> Vec<Frame> {
        let control = |said: &&Said| said.by == Speaker::Source && said.port == 0;
        self.words.iter().filter(control).map(|said| said.frame.clone()).collect()
    }

    /// Expects that nothing of all visitors is left, that the page server never stumbled, and that it serves the next one.
    fn expect_unharmed(mut self) -> Result<()> {
        let log = self.server.log();
        ensure!(!log.contains("panicked"), "the page server stumbled: {log}");
        let program = self.server.process().host_pid();
        ensure!(self.server.process().ended()?.is_none(), "the page server has ended: {log}");
        self.before.expect_again(&self.hosts.destination, program).with_context(|| self.server.log())?;
        let mut victim = self.hosts.source.victim("memory", &["2", "4", "4"])?;
        victim.expect_beats(5)?;
        let migration = self.hosts.source.migrate(&self.server, victim.pid()).mode(Mode::Hybrid).run()?;
        migration.expect_moved().context("the next one")?;
        victim.follow(&self.hosts.destination, &migration)?;
        victim.expect_beats(10)?;
        victim.finish().map(drop)
    }
}

/// Moves a victim through somebody who writes down what is said; the victim is ended afterwards.
fn record(hosts: &TwoHosts, server: &PageServer, victim: &str, arguments: &[&str], mode: Mode) -> Result<Vec<Said>> {
    let between = GoBetween::stand(&hosts.source, &server.address, hosts.token.path(), |_| Instead::Same)?;
    let mut victim = hosts.source.victim(victim, arguments)?;
    victim.expect_beats(3)?;
    let migrate = hosts.source.migrate_to(&between.address, victim.pid()).token(hosts.token.path());
    let migration = migrate.mode(mode).run()?;
    migration.expect_moved().context("a migration that is written down")?;
    victim.follow(&hosts.destination, &migration)?;
    victim.expect_beats(3)?;
    victim.finish()?;
    Ok(between.said())
}
