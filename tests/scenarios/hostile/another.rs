//! A host that is trusted, too, and knows the id of another one's migration: it learns nothing, changes nothing, and the migration ends
//! well. The same towards the source, where another host answers in the place of the one that has the process.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use godwit_carry::{Credentials, HostKey, Peer as Trusted, Peers, Permission, Profile};
use godwit_proto::wire::{self, MessageType, Role};
use godwit_tests::{
    Finished, Mode, PageServer, PageServerOptions, Peer, RunningMigration, TwoHosts, Victim, is_alive, program,
    wait_for, wait_until,
};
use nix::sys::signal::Signal;

/// Three hosts by their keys, all of which trust each other; the third has no programs of its own.
struct Scene {
    hosts: TwoHosts,
    server: PageServer,
    victim: Victim,
    migration: Option<RunningMigration>,
}

const NAMES: [&str; 3] = ["source", "destination", "third"];

impl Scene {
    fn config(hosts: &TwoHosts, name: &str) -> PathBuf {
        hosts.directory().join(format!("config-{name}"))
    }

    /// Begins a move, which stops itself at a point if it is to.
    fn set(mode: Mode, rate: Option<&str>, pause_at: Option<&'static str>) -> Result<Self> {
        let hosts = match rate {
            Some(rate) => TwoHosts::builder().rate(rate).build()?,
            None => TwoHosts::new()?,
        };
        for own in NAMES {
            let list = Peers::in_directory(&Self::config(&hosts, own));
            for other in NAMES.into_iter().filter(|other| *other != own) {
                let key = HostKey::load_or_create(&Self::config(&hosts, other))?;
                list.add(&Trusted::new(other, key.fingerprint(), None, Permission::Both, "test")?)?;
            }
        }
        let server = Self::server(&hosts, "destination", None)?;
        let victim = hosts.source.victim("memory", &["2", "32", "4"])?;
        victim.expect_beats(3)?;
        let config = Self::config(&hosts, "source").display().to_string();
        let migrate = hosts.source.migrate_to(&server.address, victim.pid()).mode(mode);
        let mut migrate = migrate.arguments(&["--config-dir", &config]);
        if let Some(point) = pause_at {
            migrate = migrate.pause_at(point);
        }
        let migration = Some(migrate.start()?);
        Ok(Self { hosts, server, victim, migration })
    }

    /// A page server with somebody's key.
    fn server(hosts: &TwoHosts, name: &str, port: Option<u16>) -> Result<PageServer> {
        let options =
            PageServerOptions { config_dir: Some(Self::config(hosts, name)), port, ..PageServerOptions::default() };
        hosts.destination.page_server_with(&hosts.token, &options)
    }

    /// Ends the page server, and starts one with somebody's key in its place.
    fn replace_server(&mut self, name: &str) -> Result<()> {
        self.server.kill()?;
        self.server = Self::server(&self.hosts, name, self.server.port())?;
        Ok(())
    }

    fn migrate(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = self.hosts.source.command(program("migrate")?);
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.hosts.source.start_command(&mut command)?.finish(Duration::from_secs(40))
    }

    /// The id of the only migration that is not over.
    fn id(&self) -> Result<String> {
        let listed = self.migrate(&["status", "--json"])?;
        let line = listed.stdout.lines().next().context("no migration is listed")?;
        let line: serde_json::Value = serde_json::from_str(line)?;
        Ok(line["migration_id"].as_str().context("an id")?.to_owned())
    }

    /// The agent, when it has stopped itself.
    fn stopped(&self) -> Result<u32> {
        let state = |pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            stat.rsplit_once(')')?.1.trim_start().chars().next()
        };
        wait_for("the agent to stand still", Duration::from_secs(20), || {
            let processes = self.hosts.source.processes()?;
            Ok(processes.into_iter().find(|(pid, name)| name == "godwit-agent" && state(*pid) == Some('T')))
        })
        .map(|(pid, _)| pid)
    }

    /// Has the third host try everything that an id is good for, and expects that it hears what it hears of an id that never was.
    fn intrude(&self, id: &str) -> Result<()> {
        let address: SocketAddr = self.server.address.parse()?;
        let config = Self::config(&self.hosts, "third");
        let id = decoded(id)?;
        self.hosts.source.converse(Duration::from_secs(60), move || async move {
            let intruder = Intruder { address, who: Credentials::choose(&config, None)? };
            let heard = intruder.try_everything(id).await?;
            let unknown = intruder.try_everything([0x5a; 16]).await?;
            ensure!(heard == unknown, "it learns something: {heard:?} instead of {unknown:?}");
            Ok(())
        })?;
        let words = "somebody else than its sender";
        wait_until("the page server to say so", Duration::from_secs(5), || Ok(self.server.log().contains(words)))
            .with_context(|| self.server.log())
    }

    /// Expects the victim at the destination, right, and that nothing is written down any more.
    fn expect_moved_to(mut self, pid: u32) -> Result<()> {
        let host_pid = self.hosts.destination.host_pid(pid)?;
        self.victim.found_at(&self.hosts.destination, host_pid)?;
        self.victim.expect_beats(10)?;
        wait_until("the destination's journal to be empty", Duration::from_secs(15), || {
            let listed = self.hosts.destination.run("ls", &["-A", "/run/godwit/destination"])?;
            Ok(listed.stdout.trim().is_empty())
        })?;
        self.victim.finish().map(drop)
    }

    fn expect_moved(mut self) -> Result<()> {
        let migration = self.migration.take().context("it runs")?.finish()?;
        migration.expect_moved().with_context(|| self.server.log())?;
        let pid = migration.number("/dest_pid")? as u32;
        self.expect_moved_to(pid)
    }

    fn resume(self, id: &str) -> Result<()> {
        let resumed = self.migrate(&["resume", id, "--json"])?;
        let report = resumed.stdout.lines().last().context("a report")?;
        let report: serde_json::Value = serde_json::from_str(report).with_context(|| report.to_owned())?;
        ensure!(report["outcome"] == "moved" && resumed.status.code() == Some(0), "{report}; {}", self.server.log());
        let pid = report["dest_pid"].as_u64().context("a pid")? as u32;
        self.expect_moved_to(pid)
    }
}

fn decoded(id: &str) -> Result<[u8; 16]> {
    let number = u128::from_str_radix(id, 16).with_context(|| id.to_owned())?;
    Ok(number.to_be_bytes())
}

/// A host that means no good.
struct Intruder {
    address: SocketAddr,
    who: Credentials,
}

impl Intruder {
    async fn call(&self, port: u16, role: Role, id: [u8; 16]) -> Result<Peer> {
        let address = SocketAddr::new(self.address.ip(), self.address.port() + port);
        let profile = if role == Role::Faults { Profile::Faults } else { Profile::Bulk };
        let mut peer = Peer::call_as(address, &self.who, profile).await?;
        let hello = wire::Hello {
            oldest_version: 1,
            newest_version: 1,
            migration_id: id.to_vec(),
            role: role.into(),
            resume: role == Role::Control,
            ..wire::Hello::default()
        };
        peer.say(&hello).await?;
        Ok(peer)
    }

    /// Asks, decides, ends and calls off; then offers pages. Gives what was heard.
    async fn try_everything(&self, id: [u8; 16]) -> Result<Vec<String>> {
        let mut heard = Vec::new();
        for word in
            [MessageType::Query, MessageType::Commit, MessageType::Abort, MessageType::Packets, MessageType::Over]
        {
            let mut peer = self.call(0, Role::Control, id).await?;
            peer.hear_of(MessageType::Welcome).await?;
            peer.say_bytes(word as u32, Vec::new()).await?;
            peer.say(&wire::Query {}).await?;
            let verdict: wire::Verdict = godwit_proto::decode(&peer.hear_of(MessageType::Verdict).await?.payload)?;
            ensure!(verdict.standing() == wire::verdict::Standing::Unknown, "{word:?}: {verdict:?}");
            heard.push(format!("{word:?}: {verdict:?}"));
            peer.link.close(0, "enough");
        }
        for (port, role) in [(1, Role::Faults), (2, Role::Drain)] {
            let farewell = self.call(port, role, id).await?.farewell().await?;
            ensure!(farewell.failure.is_some() && !farewell.replies.contains(&MessageType::Welcome), "{farewell:?}");
            heard.push(format!("{role:?}: {farewell:?}"));
        }
        Ok(heard)
    }
}

#[test]
fn on_anothers_live_drain() -> Result<()> {
    let mut scene = Scene::set(Mode::PostCopy, Some("80mbit"), None)?;
    let migration = scene.migration.as_mut().context("it runs")?;
    migration.wait_for_phase("drain")?;
    let id = scene.id()?;
    scene.intrude(&id)?;
    let is_drained = scene.migration.as_mut().context("it runs")?.ended()?.is_some();
    ensure!(!is_drained, "the drain was over before anybody could disturb it");
    scene.expect_moved()
}

/// The copy is complete and waits for the decision, which only the source may say.
#[test]
fn on_anothers_complete_copy() -> Result<()> {
    let scene = Scene::set(Mode::PreCopy, None, Some("decided"))?;
    let agent = scene.stopped()?;
    let id = scene.id()?;
    scene.intrude(&id)?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(agent as i32), Signal::SIGCONT)?;
    scene.migration.as_ref().context("it runs")?.process().wake_launcher();
    scene.expect_moved()
}

/// What is bound to whom outlives both programs.
#[test]
fn on_anothers_drain_after_everything_was_killed() -> Result<()> {
    let mut scene = Scene::set(Mode::PostCopy, None, Some("drain"))?;
    let agent = scene.stopped()?;
    let id = scene.id()?;
    scene.migration.take().context("it runs")?.abandon(agent)?;
    scene.replace_server("destination")?;
    scene.intrude(&id)?;
    scene.resume(&id)
}

/// Another host, trusted as well, answers where the process was given to: it is told nothing and believed nothing.
#[test]
fn another_page_server_in_the_place_of_the_right_one() -> Result<()> {
    for (point, mode) in [("drain", Mode::PostCopy), ("committed", Mode::PreCopy)] {
        let mut scene = Scene::set(mode, None, Some(point))?;
        let agent = scene.stopped()?;
        let id = scene.id()?;
        scene.migration.take().context("it runs")?.abandon(agent)?;
        scene.replace_server("third")?;
        let refused = scene.migrate(&["resume", &id, "--reconnect-for", "1"])?;
        let text = format!("{}{}", refused.stdout, refused.stderr);
        ensure!(refused.status.code() == Some(3), "{point}: {}: {text}", refused.status);
        ensure!(text.contains("another host answers there"), "{point}: {text}");
        if !is_alive(scene.victim.host_pid()) {
            bail!("{point}: the copy here was ended on a stranger's word");
        }
        scene.replace_server("destination")?;
        scene.resume(&id).with_context(|| point)?;
    }
    Ok(())
}
