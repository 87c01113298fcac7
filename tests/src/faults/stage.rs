//! Two hosts with everything that a cell needs on them.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::cell::WayOut;
use super::copies::{self, Copy, Doing};
use super::fault::Fault;
use super::point::{Point, Program};
use super::traces::Traces;
use crate::agents::{LazyPages, PageServer, PageServerOptions};
use crate::binaries::program;
use crate::memory_group::MemoryGroup;
use crate::migration::{Mode, RunningMigration};
use crate::proc_view::{self, ProcView};
use crate::two_hosts::TwoHosts;
use crate::victim::Victim;

/// The names that the programs of the engine have in `/proc/PID/comm`.
const PROGRAMS: [&str; 3] = ["migrate", "godwit-agent", "page-server"];

/// Seconds for which a lost link is called again: shorter than a link that is cut stays cut.
const RECONNECT_S: &str = "4";

/// The stage of one cell.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) victim: Victim,
    pub(super) migration: Option<RunningMigration>,
    pub(super) server: PageServer,
    options: PageServerOptions,
    lazy_pages: Option<LazyPages>,
    /// What the victim was like before it was touched.
    pub(super) untouched: ProcView,
    before: [Traces; 2],
    // N.B. last but one: the others are on them.
    pub(super) hosts: TwoHosts,
    memory: Option<MemoryGroup>,
}

impl Stage {
    /// Makes everything and starts the migration.
    pub(super) fn set(point: Point, fault: Fault, mode: Mode) -> Result<Self> {
        let hosts = TwoHosts::new()?;
        let before = [Traces::of(&hosts.source)?, Traces::of(&hosts.destination)?];
        let mut options = PageServerOptions::default();
        let mut lazy_pages = None;
        if fault == Fault::LazyPagesKilled {
            let socket = hosts.directory().join("lazy.socket");
            lazy_pages = Some(hosts.destination.lazy_pages(&hosts.token, &socket)?);
            options.lazy_socket = Some(socket);
        }
        options.pause_at = (point.program() == Program::PageServer).then(|| point.name());
        let mut server = hosts.destination.page_server_with(&hosts.token, &options)?;
        options.pause_at = None;
        options.port = server.port();
        let memory =
            (fault == Fault::MemoryFull).then(|| MemoryGroup::around(server.process().host_pid())).transpose()?;
        let victim = hosts.source.victim("memory", &["1", "16", "4"])?;
        victim.expect_beats(5)?;
        let untouched = victim.view()?;
        let mut migrate = hosts.source.migrate(&server, victim.pid()).mode(mode).limit(Duration::from_secs(90));
        migrate = migrate.arguments(&["--reconnect-for", RECONNECT_S]);
        if point.program() == Program::Migrate {
            migrate = migrate.pause_at(point.name());
        }
        let migration = Some(migrate.start()?);
        Ok(Self { victim, migration, server, options, lazy_pages, untouched, before, hosts, memory })
    }

    /// Waits until a program of the engine has stopped itself, and yields its pid as the test sees it.
    pub(super) fn stopped(&mut self, program: Program) -> Result<u32> {
        for _ in 0..1500 {
            let root = match program {
                Program::Migrate => self.migration()?.process().host_pid(),
                Program::PageServer => self.server.process().host_pid(),
            };
            if let Some(pid) = family(root).into_iter().find(|&pid| copies::state(pid).is_ok_and(|state| state == 'T'))
            {
                return Ok(pid);
            }
            if self.migration()?.ended()?.is_some() {
                bail!("migrate ended before the point: {}", self.end_of_migration()?);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("no program has stopped itself; page server: {}", self.server.log())
    }

    fn migration(&mut self) -> Result<&mut RunningMigration> {
        self.migration.as_mut().context("the migration is over")
    }

    fn end_of_migration(&mut self) -> Result<String> {
        Ok(self.migration.take().context("the migration is over")?.finish()?.text())
    }

    /// The process that was started as `migrate`.
    pub(super) fn front(&mut self) -> Result<u32> {
        Ok(self.migration()?.process().host_pid())
    }

    /// The process of `migrate` that has the victim.
    pub(super) fn agent(&mut self) -> Result<u32> {
        family(self.front()?).pop().context("migrate has ended")
    }

    /// Has the programs' launchers notice that they go on, or have ended.
    pub(super) fn wake_launchers(&mut self) -> Result<()> {
        self.server.process().wake_launcher();
        self.migration()?.process().wake_launcher();
        Ok(())
    }

    /// Kills the page server and starts another in its place.
    pub(super) fn replace_page_server(&mut self) -> Result<()> {
        self.server.kill()?;
        self.server = self.hosts.destination.page_server_with(&self.hosts.token, &self.options)?;
        Ok(())
    }

    /// Starts a page server if the one that was there has ended.
    pub(super) fn need_page_server(&mut self) -> Result<()> {
        if self.server.process().ended()?.is_some() {
            self.server = self.hosts.destination.page_server_with(&self.hosts.token, &self.options)?;
        }
        Ok(())
    }

    /// Kills the fault daemon and starts another in its place.
    pub(super) fn replace_lazy_pages(&mut self) -> Result<()> {
        let old = self.lazy_pages.as_mut().context("no fault daemon")?;
        old.kill()?;
        let socket: PathBuf = old.socket.clone();
        self.lazy_pages = Some(self.hosts.destination.lazy_pages(&self.hosts.token, &socket)?);
        Ok(())
    }

    /// The memory of the page server and its children.
    pub(super) fn memory(&mut self) -> Result<&mut MemoryGroup> {
        self.memory.as_mut().context("no memory is measured")
    }

    /// All copies of the victim.
    pub(super) fn copies(&self) -> Result<Vec<Copy>> {
        copies::find(&self.hosts.source, &self.hosts.destination, self.victim.directory())
    }

    /// Waits until it stands what became of it, and yields all copies.
    pub(super) fn settle(&self) -> Result<Vec<Copy>> {
        copies::settle(&self.hosts.source, &self.hosts.destination, self.victim.directory())
    }

    /// Goes on with a migration that was left, if one was.
    pub(super) fn way_out(&mut self) -> Result<WayOut> {
        self.need_page_server()?;
        let find = ["/run/godwit/source", "-type", "f", "-not", "-name", "*.*", "-printf", "%f"];
        let id = self.hosts.source.run("find", &find)?.stdout;
        if id.is_empty() {
            return Ok(WayOut::Again);
        }
        let mut command = self.hosts.source.command(program("migrate")?);
        command.args(["resume", &id, "--reconnect-for", "20", "--json"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let resumed = self.hosts.source.start_command(&mut command)?.finish(Duration::from_secs(60))?;
        match resumed.status.code() {
            Some(0) => Ok(WayOut::Moved),
            Some(1) if self.copies()?.iter().all(|copy| copy.doing == Doing::Runs) => Ok(WayOut::RunsOn),
            _ => bail!("migrate resume ended with {}: {}{}", resumed.status, resumed.stdout, resumed.stderr),
        }
    }

    /// Ends what still runs and expects that nothing is left, but for an entry of the destination's journal if one may stay. Says whether
    /// one does.
    pub(super) fn clear(mut self, entry_may_stay: bool) -> Result<bool> {
        // It may have stopped with a copy that was held.
        self.victim.origin().wake_launcher();
        for process in
            [Some(self.server.process()), self.lazy_pages.as_mut().map(LazyPages::process)].into_iter().flatten()
        {
            if process.ended()?.is_none() {
                process.signal(Signal::SIGTERM)?;
                // A source that left before it could be told of the last page is waited for, for half a minute.
                let status = process.wait(Duration::from_secs(40)).context("after SIGTERM")?;
                ensure!(status.success(), "a daemon ended with {status}");
            }
        }
        let entries = ["/run/godwit/destination", "-type", "f", "-printf", "%p "];
        let entries = self.hosts.destination.run("find", &entries)?.stdout;
        if entry_may_stay && !entries.is_empty() {
            // One, and of this migration or the one before it; it would hide nothing else.
            ensure!(entries.split_whitespace().count() <= 2, "entries stay in the journal: {entries}");
            self.hosts.destination.run("sh", &["-c", &format!("rm {entries}")])?;
        }
        Traces::expect_none_since(&self.hosts.source, &self.before[0])?;
        Traces::expect_none_since(&self.hosts.destination, &self.before[1])?;
        Ok(entry_may_stay && !entries.is_empty())
    }
}

/// A process and those below it that are programs of the engine, the topmost first.
pub(crate) fn family(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut next = 0;
    while let Some(&pid) = all.get(next) {
        all.extend(proc_view::children(pid));
        next += 1;
    }
    all.retain(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| PROGRAMS.contains(&name.trim())));
    all
}
