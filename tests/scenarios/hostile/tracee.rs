//! A process that does, at any instant of its migration, what a migration would rather not meet: it has moved and is right, or it
//! runs here and is right, or it ended by its own doing. Never two copies, never one that stands still.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use godwit_fuzz::Chance;
use godwit_tests::{
    LazyPages, Migration, Mode, PageServer, PageServerOptions, TwoHosts, Victim, is_alive, wait_for, wait_until,
};
use nix::sys::signal::Signal;

/// How often each combination is tried; `GODWIT_REPETITIONS` is another number.
fn repetitions() -> usize {
    std::env::var("GODWIT_REPETITIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

struct Scene {
    hosts: TwoHosts,
    server: PageServer,
    there: usize,
    here: usize,
    chance: Chance,
    /// What came of the attempts: moved, stayed, ended.
    tally: [usize; 3],
}

impl Scene {
    fn set() -> Result<Self> {
        let hosts = TwoHosts::new()?;
        let server = hosts.destination.page_server(&hosts.token)?;
        let (there, here) = (hosts.destination.processes()?.len(), hosts.source.processes()?.len());
        let chance = Chance::new(u64::from(std::process::id()));
        Ok(Self { hosts, server, there, here, chance, tally: [0; 3] })
    }

    fn wait(&mut self, most: Duration) {
        std::thread::sleep(Duration::from_micros(self.chance.below(most.as_micros() as usize) as u64));
    }

    /// Moves a process that does such things, after a moment.
    fn try_with(&mut self, deeds: &[&str], mode: Mode) -> Result<()> {
        let seed = format!("seed={}", self.chance.below(1 << 30));
        let victim = self.hosts.source.victim("moody", &[deeds, &[&seed]].concat())?;
        victim.go()?;
        self.wait(Duration::from_millis(30));
        let running = self.hosts.source.migrate(&self.server, victim.pid()).mode(mode).start()?;
        let migration = running.finish()?;
        self.judge(victim, &migration, deeds.contains(&"end")).with_context(|| {
            format!("{deeds:?} {mode:?} {seed}: {}; page server: {}", migration.text(), self.server.log())
        })
    }

    /// What has become of it; `may_end`: whether it may have ended by its own doing.
    fn judge(&mut self, mut victim: Victim, migration: &Migration, may_end: bool) -> Result<()> {
        ensure!(!migration.text().contains("panicked"), "the source stumbled");
        match migration.outcome()? {
            "moved" => {
                self.tally[0] += 1;
                wait_until("the source's copy to be gone", Duration::from_secs(10), || {
                    Ok(!is_alive(victim.host_pid()))
                })?;
                match victim.follow(&self.hosts.destination, migration) {
                    Ok(()) => self.expect_right(victim, may_end)?,
                    // It has ended there meanwhile.
                    Err(error) => ensure!(may_end && self.is_alone_there()?, "{error:#}"),
                }
            }
            "ended" if may_end => {
                self.tally[2] += 1;
                wait_until("the source's copy to be gone", Duration::from_secs(10), || {
                    Ok(!is_alive(victim.host_pid()))
                })?;
            }
            "failed" | "refused" if is_alive(victim.host_pid()) => {
                self.tally[1] += 1;
                let status = std::fs::read_to_string(format!("/proc/{}/status", victim.host_pid())).unwrap_or_default();
                ensure!(!status.contains("TracerPid:\t") || status.contains("TracerPid:\t0\n"), "traced: {status}");
                ensure!(!status.contains("State:\tT") && !status.contains("State:\tt"), "stopped: {status}");
                self.expect_right(victim, may_end)?;
            }
            "failed" | "refused" if may_end => {
                self.tally[2] += 1;
                let log = victim.log();
                ensure!(!log.contains("error: "), "it was wrong before it ended: {log}");
            }
            other => bail!("the outcome is {other}"),
        }
        self.expect_empty()
    }

    /// Expects that it goes on and is right, or ends by its own doing where it may.
    fn expect_right(&self, victim: Victim, may_end: bool) -> Result<()> {
        let first = victim.status().ok();
        let moved_on = wait_until("it to go on", Duration::from_secs(15), || {
            let is_there = is_alive(victim.host_pid());
            ensure!(is_there || may_end, "it has ended");
            Ok(!is_there || victim.status().ok() != first)
        });
        moved_on.with_context(|| victim.log())?;
        let log = victim.log();
        ensure!(!log.contains("error: "), "{log}");
        if !is_alive(victim.host_pid()) {
            ensure!(victim.signal(Signal::SIGCONT).is_err(), "a zombie");
            return Ok(());
        }
        match victim.finish() {
            Ok(_) => Ok(()),
            // N.B. one that ends by its own doing may do so before it hears that it should.
            Err(error) if error.to_string().contains("ESRCH") => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn is_alone_there(&self) -> Result<bool> {
        Ok(self.hosts.destination.processes()?.len() == self.there)
    }

    /// Expects that neither host has a process more than in the beginning.
    fn expect_empty(&self) -> Result<()> {
        let gone = wait_until("everything to be gone", Duration::from_secs(10), || {
            Ok(self.is_alone_there()? && self.hosts.source.processes()?.len() == self.here)
        });
        gone.with_context(|| format!("{:?}, {:?}", self.hosts.source.processes(), self.hosts.destination.processes()))
    }
}

#[test]
fn deeds_at_any_instant() -> Result<()> {
    let mut scene = Scene::set()?;
    let moods: [&[&str]; 5] = [
        &["unmap", "threads", "signals", "credentials", "descriptors"],
        &["fork", "rarely"],
        &["fork", "unmap"],
        &["exec", "unmap"],
        &["exec", "fork", "threads", "descriptors"],
    ];
    for _ in 0..repetitions() {
        for deeds in moods {
            for mode in [Mode::Hybrid, Mode::PreCopy, Mode::PostCopy] {
                scene.try_with(deeds, mode)?;
            }
        }
    }
    eprintln!("moved, stayed, ended: {:?}", scene.tally);
    ensure!(scene.tally[0] > 0, "nothing was moved: {:?}", scene.tally);
    Ok(())
}

/// It executes another program when all is prepared for the one that was looked at, which is not what would be found then.
#[test]
fn another_program_before_the_freeze() -> Result<()> {
    let mut scene = Scene::set()?;
    for mode in [Mode::Hybrid, Mode::PreCopy, Mode::PostCopy, Mode::StopAndCopy] {
        let victim = scene.hosts.source.victim("moody", &["exec"])?;
        let vdso = || -> Result<Option<String>> {
            let maps = std::fs::read_to_string(format!("/proc/{}/maps", victim.host_pid()))?;
            Ok(maps.lines().find(|line| line.ends_with("[vdso]")).map(str::to_owned))
        };
        let before = vdso()?;
        let running = scene.hosts.source.migrate(&scene.server, victim.pid()).mode(mode).pause_at("freeze").start()?;
        let agent = wait_for("the agent to stand still", Duration::from_secs(20), || {
            let processes = scene.hosts.source.processes()?;
            let agents = processes.iter().filter(|(_, name)| name == "godwit-agent").map(|(pid, _)| *pid);
            let stopped = |pid: &u32| {
                std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") T "))
            };
            Ok(agents.into_iter().find(stopped))
        })?;
        victim.go()?;
        wait_until("it to execute another program", Duration::from_secs(20), || {
            let now = vdso()?;
            Ok(now.is_some() && now != before)
        })?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(agent as i32), Signal::SIGCONT)?;
        running.process().wake_launcher();
        let migration = running.finish()?;
        migration.expect(1, &["failed"]).with_context(|| format!("{mode:?}"))?;
        ensure!(migration.text().contains("execve"), "{mode:?}: {}", migration.text());
        scene.judge(victim, &migration, false).with_context(|| format!("{mode:?}: {}", migration.text()))?;
    }
    Ok(())
}

/// It ends by its own doing.
#[test]
fn an_end_at_any_instant() -> Result<()> {
    let mut scene = Scene::set()?;
    for _ in 0..4 * repetitions() {
        for mode in [Mode::Hybrid, Mode::PostCopy] {
            scene.try_with(&["end", "unmap"], mode)?;
        }
    }
    eprintln!("moved, stayed, ended: {:?}", scene.tally);
    Ok(())
}

/// Somebody kills it.
#[test]
fn killed_at_any_instant() -> Result<()> {
    let mut scene = Scene::set()?;
    for _ in 0..6 * repetitions() {
        for mode in [Mode::PreCopy, Mode::StopAndCopy] {
            let mut victim = scene.hosts.source.victim("memory", &["4", "8", "4"])?;
            let running = scene.hosts.source.migrate(&scene.server, victim.pid()).mode(mode).start()?;
            scene.wait(Duration::from_millis(120));
            // N.B. it may have left already; then what is killed is a copy that was given away.
            let _ = victim.signal(Signal::SIGKILL);
            let migration = running.finish()?;
            let story = || format!("{mode:?}: {}; page server: {}", migration.text(), scene.server.log());
            match migration.outcome()? {
                "moved" => {
                    victim.follow(&scene.hosts.destination, &migration).with_context(story)?;
                    victim.expect_beats(5).with_context(story)?;
                    victim.finish().with_context(story)?;
                    scene.tally[0] += 1;
                }
                "failed" | "refused" => {
                    wait_until("the end of it", Duration::from_secs(5), || Ok(!is_alive(victim.host_pid())))
                        .with_context(story)?;
                    scene.tally[2] += 1;
                }
                other => bail!("the outcome is {other}: {}", story()),
            }
            scene.expect_empty().with_context(story)?;
        }
    }
    eprintln!("moved, stayed, ended: {:?}", scene.tally);
    Ok(())
}

/// What befalls a copy that runs at the destination while its pages are still on their way.
#[derive(Clone, Copy, Debug)]
enum Blow {
    /// Somebody kills it there.
    Kill,
    /// It does such things itself.
    Deeds(&'static [&'static str]),
}

/// How a copy that lacked pages was met, and what came of it.
struct Drains {
    scene: Scene,
    /// Blows that came while pages were missing.
    in_time: usize,
}

impl Drains {
    /// A link that is slow enough for somebody to be in time; faults served by the page server, or by a daemon of their own.
    fn set(has_daemon: bool) -> Result<(Self, Option<LazyPages>)> {
        let hosts = TwoHosts::builder().rate("300mbit").build()?;
        let socket = hosts.directory().join("lazy.sock");
        let daemon = has_daemon.then(|| hosts.destination.lazy_pages(&hosts.token, &socket)).transpose()?;
        let options = PageServerOptions { lazy_socket: has_daemon.then_some(socket), ..PageServerOptions::default() };
        let server = hosts.destination.page_server_with(&hosts.token, &options)?;
        let (there, here) = (hosts.destination.processes()?.len(), hosts.source.processes()?.len());
        let chance = Chance::new(u64::from(std::process::id()));
        Ok((Self { scene: Scene { hosts, server, there, here, chance, tally: [0; 3] }, in_time: 0 }, daemon))
    }

    fn strike(&mut self, blow: Blow) -> Result<()> {
        let scene = &mut self.scene;
        let seed = format!("seed={}", scene.chance.below(1 << 30));
        let victim = match blow {
            Blow::Kill => scene.hosts.source.victim("memory", &["4", "24", "4"])?,
            Blow::Deeds(deeds) => scene.hosts.source.victim("moody", &[deeds, &["ballast", &seed]].concat())?,
        };
        if matches!(blow, Blow::Deeds(_)) {
            victim.go()?;
        }
        let mut running = scene.hosts.source.migrate(&scene.server, victim.pid()).mode(Mode::PostCopy).start()?;
        let is_running = |event: &serde_json::Value| event["event"] == "running";
        // N.B. one that ends by its own doing may do so before it has left.
        let left = running.wait_for_event("it to run there", is_running);
        if let (Blow::Kill, Ok(event)) = (blow, &left) {
            scene.wait(Duration::from_millis(500));
            let pid = event["dest_pid"].as_u64().context("a pid")? as u32;
            let host_pid = scene.hosts.destination.host_pid(pid)?;
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(host_pid as i32), Signal::SIGKILL)?;
            self.in_time += usize::from(running.ended()?.is_none());
        }
        let migration = running.finish()?;
        let story = format!("{blow:?} {seed}: {}; page server: {}", migration.text(), self.scene.server.log());
        if let Blow::Deeds(deeds) = blow {
            self.in_time += usize::from(left.is_ok());
            return self.scene.judge(victim, &migration, deeds.contains(&"end")).context(story);
        }
        // Its pages are of no use to anybody, and the source is told so. All of them may have come before.
        let outcome = migration.outcome().with_context(|| story.clone())?;
        ensure!(matches!((outcome, migration.code()), ("ended", Some(4)) | ("moved", Some(0))), "{story}");
        ensure!(!migration.text().contains("panicked"), "{story}");
        wait_until("the source's copy to be gone", Duration::from_secs(10), || Ok(!is_alive(victim.host_pid())))?;
        self.scene.tally[2] += 1;
        self.scene.expect_empty().context(story)
    }

    /// Expects that whoever serves pages never stumbled, and serves the next one.
    fn finish(mut self, mut daemon: Option<LazyPages>) -> Result<()> {
        eprintln!("moved, stayed, ended: {:?}, {} in time", self.scene.tally, self.in_time);
        ensure!(self.in_time > 0, "no blow came in time");
        let log = self.scene.server.log() + &daemon.as_ref().map(LazyPages::log).unwrap_or_default();
        ensure!(!log.contains("panicked"), "{log}");
        ensure!(self.scene.server.process().ended()?.is_none(), "the page server has ended: {log}");
        if let Some(daemon) = &mut daemon {
            ensure!(daemon.process().ended()?.is_none(), "the daemon has ended: {log}");
        }
        let hosts = &self.scene.hosts;
        let left = |host: &godwit_tests::Host, side: &str| -> Result<String> {
            Ok(host.run("sh", &["-c", &format!("ls -A /run/godwit/{side}")])?.stdout)
        };
        wait_until("nothing to be written down any more", Duration::from_secs(15), || {
            Ok(left(&hosts.source, "source")?.is_empty() && left(&hosts.destination, "destination")?.is_empty())
        })
        .with_context(|| {
            format!("{:?} {:?}", left(&hosts.source, "source"), left(&hosts.destination, "destination"))
        })?;
        let mut victim = hosts.source.victim("memory", &["2", "8", "4"])?;
        let migration = hosts.source.migrate(&self.scene.server, victim.pid()).mode(Mode::PostCopy).run()?;
        migration.expect_moved().with_context(|| self.scene.server.log())?;
        victim.follow(&hosts.destination, &migration)?;
        victim.expect_beats(5)?;
        victim.finish().map(drop)
    }
}

/// Somebody kills the copy while its pages are fetched.
#[test]
fn killed_in_its_drain() -> Result<()> {
    for has_daemon in [false, true] {
        let (mut drains, daemon) = Drains::set(has_daemon)?;
        for _ in 0..5 * repetitions() {
            drains.strike(Blow::Kill)?;
        }
        drains.finish(daemon).with_context(|| format!("a daemon: {has_daemon}"))?;
    }
    Ok(())
}

/// The copy executes another program, unmaps memory, forks or ends while its pages are fetched.
#[test]
fn deeds_in_its_drain() -> Result<()> {
    const MOODS: [&[&str]; 5] = [
        &["exec", "unmap"],
        &["unmap", "threads"],
        &["exec", "fork", "rarely"],
        &["end", "unmap"],
        &["end", "exec", "fork"],
    ];
    for has_daemon in [false, true] {
        let (mut drains, daemon) = Drains::set(has_daemon)?;
        for _ in 0..repetitions() {
            for deeds in MOODS {
                drains.strike(Blow::Deeds(deeds))?;
            }
        }
        drains.finish(daemon).with_context(|| format!("a daemon: {has_daemon}"))?;
    }
    Ok(())
}
