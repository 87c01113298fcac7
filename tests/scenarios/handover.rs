//! The hand-over when an answer, an agent or a page server is lost: nobody guesses, everything can be gone on with, and what could
//! make two copies run is refused.

#[path = "handover/called_off.rs"]
mod called_off;
#[path = "handover/written_down.rs"]
mod written_down;

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{
    Finished, Host, Mode, PageServer, PageServerOptions, ProcView, RunningMigration, TwoHosts, Victim,
    expect_untouched, is_alive, program, wait_for, wait_until,
};
use nix::sys::signal::Signal;

/// Two hosts, a victim on one of them, and a move of it that has stopped itself.
struct Scene {
    migration: Option<RunningMigration>,
    server: PageServer,
    victim: Victim,
    before: ProcView,
    /// What stands still, as the test sees it.
    stopped: u32,
    hosts: TwoHosts,
}

/// Which program stands still at which point.
enum Still {
    Agent(&'static str),
    PageServer(&'static str),
}

impl Scene {
    fn set(still: &Still, mode: Mode, arguments: &[&str]) -> Result<Self> {
        Self::with(("memory", &["2", "32", "4"]), still, mode, arguments)
    }

    /// With another victim.
    fn with(victim: (&str, &[&str]), still: &Still, mode: Mode, arguments: &[&str]) -> Result<Self> {
        let hosts = TwoHosts::new()?;
        let there = match still {
            Still::PageServer(point) => Some(*point),
            Still::Agent(_) => None,
        };
        let options = PageServerOptions { pause_at: there, ..PageServerOptions::default() };
        let server = hosts.destination.page_server_with(&hosts.token, &options)?;
        let victim = hosts.source.victim(victim.0, victim.1)?;
        victim.expect_beats(5)?;
        let before = victim.view()?;
        let mut migrate = hosts.source.migrate(&server, victim.pid()).mode(mode).arguments(arguments);
        if let Still::Agent(point) = still {
            migrate = migrate.pause_at(point);
        }
        let migration = Some(migrate.start()?);
        let (host, name) = match still {
            Still::Agent(_) => (&hosts.source, "godwit-agent"),
            Still::PageServer(_) => (&hosts.destination, "page-server"),
        };
        let stopped = wait_for("a program that stands still", Duration::from_secs(20), || {
            let processes = host.processes()?;
            Ok(processes.iter().find(|(pid, own)| own == name && state(*pid) == Some('T')).map(|(pid, _)| *pid))
        })?;
        Ok(Self { migration, server, victim, before, stopped, hosts })
    }

    /// Has what stands still go on.
    fn go_on(&mut self) -> Result<()> {
        signal(self.stopped, Signal::SIGCONT)?;
        self.server.process().wake_launcher();
        self.migration.as_mut().context("it runs")?.process().wake_launcher();
        Ok(())
    }

    /// Has what stands still go on, and expects that the victim moves as if nothing had been.
    fn go_on_and_expect_moved(mut self) -> Result<()> {
        self.go_on()?;
        let migration = self.finish()?;
        migration.expect_moved()?;
        self.victim.follow(&self.hosts.destination, &migration)?;
        self.victim.expect_beats(10)?;
        self.victim.finish().map(drop)
    }

    /// Kills the agent that stands still, and its front.
    fn abandon(&mut self) -> Result<()> {
        self.migration.take().context("it runs")?.abandon(self.stopped)
    }

    /// Kills the page server and starts another one in its place.
    fn replace_server(&mut self) -> Result<()> {
        self.server.kill()?;
        self.start_server()
    }

    /// Starts a page server in the place of one that has ended.
    fn start_server(&mut self) -> Result<()> {
        let options = PageServerOptions { port: self.server.port(), ..PageServerOptions::default() };
        self.server = self.hosts.destination.page_server_with(&self.hosts.token, &options)?;
        Ok(())
    }

    fn finish(&mut self) -> Result<godwit_tests::Migration> {
        self.migration.take().context("it runs")?.finish()
    }

    /// Runs another `migrate` on the source.
    fn migrate(&self, arguments: &[&str]) -> Result<Finished> {
        Self::migrate_on(&self.hosts.source, arguments)
    }

    fn migrate_on(host: &Host, arguments: &[&str]) -> Result<Finished> {
        let mut command = host.command(program("migrate")?);
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        host.start_command(&mut command)?.finish(Duration::from_secs(40))
    }

    /// Runs another `migrate` and expects an exit code and words.
    fn expect(&self, arguments: &[&str], code: i32, words: &[&str]) -> Result<String> {
        Self::expect_on(&self.hosts.source, arguments, code, words)
    }

    fn expect_on(host: &Host, arguments: &[&str], code: i32, words: &[&str]) -> Result<String> {
        let finished = Self::migrate_on(host, arguments)?;
        let text = format!("{}{}", finished.stdout, finished.stderr);
        ensure!(finished.status.code() == Some(code), "{arguments:?}: {} instead of {code}: {text}", finished.status);
        for word in words {
            ensure!(text.contains(word), "{arguments:?} does not say `{word}`: {text}");
        }
        Ok(text)
    }

    /// The id of the only migration that is not over.
    fn id(&self) -> Result<String> {
        let text = self.expect(&["status", "--json"], 0, &[])?;
        let line: serde_json::Value = serde_json::from_str(text.lines().next().context("no migration is listed")?)?;
        Ok(line["migration_id"].as_str().context("an id")?.to_owned())
    }

    /// Expects the victim at the destination, alive and right, and nothing written down any more.
    fn expect_moved_by(mut self, resumed: &Finished) -> Result<()> {
        let report =
            resumed.stdout.lines().last().with_context(|| format!("a report; page server: {}", self.server.log()))?;
        let report: serde_json::Value = serde_json::from_str(report).with_context(|| report.to_owned())?;
        ensure!(report["outcome"] == "moved" && resumed.status.code() == Some(0), "{report}");
        let pid = report["dest_pid"].as_u64().context("a pid")? as u32;
        let host_pid = self.hosts.destination.host_pid(pid)?;
        self.victim.found_at(&self.hosts.destination, host_pid)?;
        self.victim.expect_beats(10)?;
        self.expect_nothing_written_down()?;
        self.victim.finish().map(drop)
    }

    fn expect_nothing_written_down(&self) -> Result<()> {
        self.expect(&["status"], 0, &["no migration is under way"])?;
        wait_until("the destination's journal to be empty", Duration::from_secs(15), || {
            let listed = self.hosts.destination.run("ls", &["-A", "/run/godwit/destination"])?;
            Ok(listed.stdout.trim().is_empty())
        })
    }

    /// Expects the victim where it was, as it was, and moves it.
    fn expect_untouched_and_move(mut self) -> Result<()> {
        expect_untouched(&self.victim, &self.before)?;
        self.victim.expect_beats(5)?;
        let migration = self.hosts.source.migrate(&self.server, self.victim.pid()).run()?;
        migration.expect_moved()?;
        self.victim.follow(&self.hosts.destination, &migration)?;
        self.expect_nothing_written_down()?;
        self.victim.finish().map(drop)
    }
}

fn state(host_pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{host_pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

fn signal(host_pid: u32, signal: Signal) -> Result<()> {
    Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(host_pid as i32), signal)?)
}

/// The decision is written down and never heard; the page server that had the copy is gone. Its successor knows that the copy never ran.
#[test]
fn a_copy_that_never_ran_gives_the_process_back() -> Result<()> {
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        let mut scene = Scene::set(&Still::Agent("decided"), mode, &[])?;
        scene.replace_server()?;
        scene.go_on()?;
        let migration = scene.finish()?;
        migration.expect(1, &["failed"])?;
        scene.expect_untouched_and_move()?;
    }
    Ok(())
}

/// The page server is killed when it is written down that the copy runs, and nothing of it has run: its successor lets it run.
#[test]
fn a_copy_that_was_granted_runs() -> Result<()> {
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        let mut scene = Scene::set(&Still::PageServer("granted"), mode, &[])?;
        scene.replace_server()?;
        let migration = scene.finish()?;
        migration.expect_moved()?;
        scene.victim.follow(&scene.hosts.destination, &migration)?;
        scene.victim.expect_beats(10)?;
        scene.expect_nothing_written_down()?;
        scene.victim.finish()?;
    }
    Ok(())
}

/// An agent that is killed alone has a successor, which goes on with what is decided.
#[test]
fn an_agent_that_is_killed_has_a_successor() -> Result<()> {
    for (point, mode) in [("decided", Mode::PreCopy), ("drain", Mode::PostCopy)] {
        let mut scene = Scene::set(&Still::Agent(point), mode, &[])?;
        signal(scene.stopped, Signal::SIGKILL)?;
        let migration = scene.finish()?;
        migration.expect_moved().with_context(|| scene.server.log())?;
        let text = migration.text();
        ensure!(text.contains("another one goes on"), "{text}");
        // Whoever follows the events sees one move.
        let events: Vec<serde_json::Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let times: Vec<f64> = events.iter().filter_map(|event| event["at_ms"].as_f64()).collect();
        ensure!(times.len() > 5 && times.is_sorted(), "time runs back: {text}");
        ensure!(events.iter().any(|event| event["event"] == "running"), "it is not said to run: {text}");
        scene.victim.follow(&scene.hosts.destination, &migration)?;
        scene.victim.expect_beats(10)?;
        scene.expect_nothing_written_down()?;
        scene.victim.finish()?;
    }
    Ok(())
}

/// So has its successor, as far as anybody has the patience: in the end there is a report, and it is true.
#[test]
fn a_successor_that_is_killed_has_one_too() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("drain"), Mode::PostCopy, &[])?;
    let mut last = scene.stopped;
    signal(last, Signal::SIGKILL)?;
    let mut killed = 0;
    while killed < 2 && scene.migration.as_mut().context("it runs")?.ended()?.is_none() {
        let agents = scene.hosts.source.processes()?;
        if let Some((agent, _)) = agents.into_iter().find(|(pid, name)| name == "godwit-agent" && *pid != last) {
            killed += u32::from(signal(agent, Signal::SIGKILL).is_ok());
            last = agent;
        }
    }
    let migration = scene.finish()?;
    migration.expect_moved().with_context(|| format!("{killed} were killed; {}", scene.server.log()))?;
    ensure!(killed > 0, "no successor was there for long enough: {}", migration.text());
    scene.victim.follow(&scene.hosts.destination, &migration)?;
    scene.victim.expect_beats(10)?;
    scene.expect(&["status"], 0, &["no migration is under way"])?;
    scene.victim.finish().map(drop)
}

/// One that is killed when all is over, or before anything is decided, has its front say so.
#[test]
fn an_agent_that_is_killed_early_or_late_is_spoken_for() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("done"), Mode::Hybrid, &[])?;
    signal(scene.stopped, Signal::SIGKILL)?;
    let migration = scene.finish()?;
    migration.expect_moved()?;
    scene.victim.follow(&scene.hosts.destination, &migration)?;
    // N.B. the destination may not have heard the last word.
    scene.expect(&["status"], 0, &["no migration is under way"])?;
    scene.victim.finish()?;
    for point in ["round", "collect"] {
        let mut scene = Scene::set(&Still::Agent(point), Mode::PreCopy, &[])?;
        signal(scene.stopped, Signal::SIGKILL)?;
        let migration = scene.finish()?;
        migration.expect(1, &["failed"])?;
        ensure!(migration.text().contains("was killed (signal 9)"), "{}", migration.text());
        scene.expect_untouched_and_move()?;
    }
    Ok(())
}

/// The agent is killed behind the decision, and its front: the process stays frozen, what could harm is refused, and `resume` brings it to its end.
#[test]
fn an_agent_killed_behind_the_decision_is_gone_on_with() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("decided"), Mode::PreCopy, &[])?;
    let id = scene.id()?;
    scene.expect(&["resume", &id], 1, &["in use"])?;
    scene.expect(&["resolve", &id, "--thaw"], 1, &["at work"])?;
    scene.abandon()?;
    ensure!(state(scene.victim.host_pid()) == Some('T'), "it is not frozen: {:?}", state(scene.victim.host_pid()));
    let short = &id[..8];
    scene.expect(&["status", short], 0, &["decided", "nobody is at work on it", "waits to be let run"])?;
    scene.expect(&["resolve", short], 0, &["--thaw: refused", "--kill: refused", "migrate resume"])?;
    scene.expect(&["resolve", short, "--thaw"], 1, &["--allow-two-copies"])?;
    scene.expect(&["resolve", short, "--kill"], 1, &["--allow-loss"])?;
    scene.expect(&["cancel", short], 1, &["decided"])?;
    let again = scene.hosts.source.migrate(&scene.server, scene.victim.pid()).run()?;
    again.expect(3, &["refused"])?;
    for words in ["migrate resume", "kept frozen"] {
        ensure!(again.text().contains(words), "{}", again.text());
    }
    let resumed = scene.migrate(&["resume", short, "--json"]).with_context(|| scene.server.log())?;
    scene.expect_moved_by(&resumed)
}

/// Somebody continues the process that is kept frozen, as a service manager does with what it wants to end: it does not run, and what is
/// gone on with is what was given away.
#[test]
fn one_that_is_continued_does_not_run() -> Result<()> {
    let plain: (&str, &[&str]) = ("memory", &["2", "32", "4"]);
    let filtered: (&str, &[&str]) = ("credentials", &["uid=1000", "seccomp=1"]);
    for (victim, point, mode) in
        [(plain, "decided", Mode::PreCopy), (plain, "drain", Mode::PostCopy), (filtered, "decided", Mode::PreCopy)]
    {
        let mut scene = Scene::with(victim, &Still::Agent(point), mode, &[])?;
        let id = scene.id()?;
        scene.abandon()?;
        let pid = scene.victim.host_pid();
        wait_until("it to be frozen", Duration::from_secs(5), || Ok(state(pid) == Some('T')))?;
        let beats = scene.victim.status()?.beats;
        for of_interest in [Signal::SIGTERM, Signal::SIGCONT] {
            signal(pid, of_interest)?;
        }
        wait_until("it to be continued", Duration::from_secs(5), || Ok(state(pid) != Some('T')))?;
        std::thread::sleep(Duration::from_millis(300));
        let state = state(pid);
        // N.B. where the copy at the destination runs already, it notices a second one by itself.
        let is_still = point == "drain" || scene.victim.status()?.beats == beats;
        ensure!(is_still && matches!(state, Some('S' | 'R')), "it runs, or was not continued: {state:?}");
        // Nor can it be moved as if nobody had given it away, by whoever does not know of that.
        let elsewhere = scene.hosts.source.directory().join("elsewhere");
        let arguments = ["--state-dir", elsewhere.to_str().context("a path")?];
        let again = scene.hosts.source.migrate(&scene.server, scene.victim.pid()).arguments(&arguments).run()?;
        again.expect(3, &["refused"])?;
        ensure!(again.text().contains("another state directory"), "{}", again.text());
        let resumed = scene.migrate(&["resume", &id, "--json"])?;
        scene.expect_moved_by(&resumed)?;
    }
    Ok(())
}

/// The agent and its front are killed while the destination still needs pages: the program waits for them, and goes on when they come.
#[test]
fn a_drain_is_gone_on_with() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("drain"), Mode::PostCopy, &[])?;
    let id = scene.id()?;
    scene.abandon()?;
    scene.expect(&["resolve", &id[..8]], 0, &["still needs pages", "--kill: refused", "--thaw: refused"])?;
    // The page server, too: what serves the pages there is another one then.
    scene.replace_server()?;
    let resumed = scene.migrate(&["resume", &id, "--json"])?;
    scene.expect_moved_by(&resumed)
}

/// A page server that is told to end answers a source that comes back, and nobody who comes anew; it ends when nobody sends pages that a
/// copy lacks, and the next one goes on.
#[test]
fn a_page_server_ends_while_a_copy_lacks_pages() -> Result<()> {
    for comes_back in [true, false] {
        let mut scene = Scene::set(&Still::Agent("drain"), Mode::PostCopy, &[])?;
        let id = scene.id()?;
        scene.abandon()?;
        let server = scene.server.process().host_pid();
        signal(server, Signal::SIGTERM)?;
        let ended = || wait_until("the page server to end", Duration::from_secs(30), || Ok(!is_alive(server)));
        let other = scene.hosts.source.victim("memory", &["2", "32", "4"])?;
        let before = other.view()?;
        let refused = scene.hosts.source.migrate(&scene.server, other.pid()).run()?;
        ensure!(refused.text().contains("told to end"), "{}", refused.text());
        expect_untouched(&other, &before)?;
        if !comes_back {
            ended()?;
            scene.start_server()?;
        }
        let resumed = scene.migrate(&["resume", &id, "--json"])?;
        scene.expect_moved_by(&resumed)?;
        if comes_back {
            ended()?;
        }
    }
    Ok(())
}

/// Nor does it wait for long for the decision of a source whose link is lost: the copy is ended, and the source is told so by the next one.
#[test]
fn a_page_server_ends_while_a_copy_waits_for_the_decision() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("decided"), Mode::PreCopy, &[])?;
    let id = scene.id()?;
    scene.abandon()?;
    let server = scene.server.process().host_pid();
    signal(server, Signal::SIGTERM)?;
    // A link counts as lost after 10 s, and a source has as many to come back.
    wait_until("the page server to end", Duration::from_secs(30), || Ok(!is_alive(server)))?;
    scene.start_server()?;
    scene.expect(&["resume", &id], 1, &["running as before"])?;
    scene.expect_untouched_and_move()
}

/// What has the pages is ended in the drain: that is told at once, and what is left can be resolved on both hosts.
#[test]
fn pages_that_are_lost_in_the_drain_are_told_of() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("drain"), Mode::PostCopy, &[])?;
    let id = scene.id()?;
    signal(scene.victim.host_pid(), Signal::SIGKILL)?;
    scene.go_on()?;
    let begun = std::time::Instant::now();
    let migration = scene.finish()?;
    ensure!(migration.code() == Some(3), "{}", migration.text());
    ensure!(begun.elapsed() < Duration::from_secs(10), "told after {:?}: {}", begun.elapsed(), migration.text());
    for words in
        ["runs at the destination", "which had them, is gone", "Here it is gone", "--allow-loss` at the destination"]
    {
        ensure!(migration.text().contains(words), "{words} is not in {}", migration.text());
    }
    scene.expect(&["resume", &id], 3, &["Here it is gone"])?;
    end_by_hand(&scene, &id)?;
    scene.expect(&["resolve", &id, "--kill", "--allow-loss"], 0, &[])?;
    scene.expect(&["status"], 0, &["no migration is under way"]).map(drop)
}

/// All who hold the missing pages of a copy are killed, and the kernel gives it zeros in their place: it is ended, that is told, and what was given
/// away is kept.
#[test]
fn a_copy_whose_missing_pages_nobody_holds_is_ended() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("drain"), Mode::PostCopy, &[])?;
    let id = scene.id()?;
    let copy = scene.hosts.destination.host_pid(scene.victim.pid())?;
    let processes = scene.hosts.destination.processes()?;
    let holder = processes.iter().find(|(_, name)| name == "godwit-holder").context("nobody else holds them")?.0;
    let server = scene.server.process().host_pid();
    // N.B. in one moment: who is left alone may see to another one.
    for pid in [holder, server] {
        signal(pid, Signal::SIGKILL)?;
    }
    scene.server.kill()?;
    Scene::expect_on(&scene.hosts.destination, &["status", &id], 0, &["lacks pages"])?;
    scene.start_server()?;
    scene.go_on()?;
    let migration = scene.finish()?;
    ensure!(migration.code() == Some(4), "{}", migration.text());
    ensure!(!is_alive(copy), "it goes on with zeros: {}", scene.server.log());
    ensure!(scene.server.log().contains("zeros"), "{}", scene.server.log());
    ensure!(state(scene.victim.host_pid()) == Some('T'), "it is not kept: {}", migration.text());
    scene.expect(&["resolve", &id, "--thaw"], 1, &["--allow-two-copies"])?;
    scene.expect(&["resolve", &id, "--thaw", "--allow-two-copies"], 0, &["goes on here"])?;
    // N.B. its verdict would tell of the zeros that its copy has read.
    let pid = scene.victim.host_pid();
    wait_until("it to go on", Duration::from_secs(5), || Ok(state(pid).is_some_and(|state| state != 'T')))
}

/// Who holds the missing pages of a copy beside those that bring them is killed: there is another one in its place, should they be killed, too.
#[test]
fn a_holder_that_is_killed_is_replaced() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("drain"), Mode::PostCopy, &[])?;
    let holder = |scene: &Scene| -> Result<Option<u32>> {
        let processes = scene.hosts.destination.processes()?;
        let holders = processes.iter().filter(|(_, name)| name == "godwit-holder").map(|(pid, _)| *pid);
        Ok(holders.filter(|pid| is_alive(*pid)).max())
    };
    let first = holder(&scene)?.context("nobody else holds them")?;
    signal(first, Signal::SIGKILL)?;
    wait_for("another holder", Duration::from_secs(5), || Ok(holder(&scene)?.filter(|pid| *pid != first)))
        .with_context(|| scene.server.log())?;
    scene.replace_server()?;
    scene.go_on()?;
    let migration = scene.finish()?;
    migration.expect_moved().with_context(|| scene.server.log())?;
    scene.victim.follow(&scene.hosts.destination, &migration)?;
    scene.victim.expect_beats(10)?;
    wait_until("no holder to be left", Duration::from_secs(5), || Ok(holder(&scene)?.is_none()))?;
    // N.B. not what is written down: the last word may go to the page server that was killed.
    scene.victim.finish().map(drop)
}

/// What is sent to the process while it stands still reaches it at the destination.
#[test]
fn signals_that_come_inside_the_freeze_are_not_lost() -> Result<()> {
    let frozen = |mode| Scene::set(&Still::Agent("rebuild"), mode, &[]);
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        for signals in [&[Signal::SIGSTOP][..], &[Signal::SIGSTOP, Signal::SIGCONT]] {
            let mut scene = frozen(mode)?;
            for of_interest in signals {
                signal(scene.victim.host_pid(), *of_interest)?;
            }
            scene.go_on()?;
            let migration = scene.finish()?;
            migration.expect_moved()?;
            scene.victim.follow(&scene.hosts.destination, &migration)?;
            if signals.len() == 1 {
                let pid = scene.victim.host_pid();
                wait_until("it to be stopped", Duration::from_secs(5), || Ok(state(pid) == Some('T')))?;
                signal(pid, Signal::SIGCONT)?;
            }
            scene.victim.expect_beats(10)?;
            scene.victim.finish()?;
        }
    }
    let mut scene = frozen(Mode::PreCopy)?;
    signal(scene.victim.host_pid(), Signal::SIGHUP)?;
    scene.go_on()?;
    scene.finish()?.expect_moved()?;
    let there = || scene.hosts.destination.host_pid(scene.victim.pid());
    wait_until("it to end", Duration::from_secs(5), || Ok(there().map_or(true, |pid| state(pid) == Some('Z'))))
}

/// Whoever moves a process already is named to others, also to one who looks in another state directory.
#[test]
fn two_do_not_move_one_process() -> Result<()> {
    let scene = Scene::set(&Still::Agent("round"), Mode::PreCopy, &[])?;
    let elsewhere = scene.hosts.source.directory().join("elsewhere");
    for (arguments, words) in [
        (&[][..], "is under way"),
        (&["--state-dir", elsewhere.to_str().context("a path")?], "another `migrate` is about to move it"),
    ] {
        let other = scene.hosts.source.migrate(&scene.server, scene.victim.pid()).arguments(arguments).run()?;
        other.expect(1, &["refused"])?;
        ensure!(other.text().contains(words), "{}", other.text());
    }
    scene.go_on_and_expect_moved()
}

/// A copy that still lacks pages is not moved on: what is missing would be taken for empty.
#[test]
fn what_lacks_pages_is_not_moved_on() -> Result<()> {
    let scene = Scene::set(&Still::Agent("drain"), Mode::PostCopy, &[])?;
    let server = scene.hosts.source.page_server(&scene.hosts.token)?;
    for mode in [Mode::Hybrid, Mode::PreCopy, Mode::PostCopy, Mode::StopAndCopy] {
        let on = scene.hosts.destination.migrate(&server, scene.victim.pid()).mode(mode).run()?;
        on.expect(1, &["refused"])?;
        ensure!(on.text().contains("not all of it is here"), "{}", on.text());
    }
    scene.go_on_and_expect_moved()
}

/// The agent and its front are killed in the drain, and the copy is ended there before all its pages are: that is told, also by a page server that begins
/// anew, and what is left here is not taken for needless.
#[test]
fn a_copy_that_ended_in_the_drain_is_told_of() -> Result<()> {
    for by_hand in [true, false] {
        let mut scene = Scene::set(&Still::Agent("drain"), Mode::PostCopy, &[])?;
        let id = scene.id()?;
        scene.abandon()?;
        let said = "has ended before all its pages came";
        let told = |scene: &Scene| {
            let text = || scene.expect(&["status", &id], 0, &[said]);
            wait_until("it to be told", Duration::from_secs(5), || Ok(text().is_ok()))
                .with_context(|| format!("{:?}", text()))
        };
        if by_hand {
            end_by_hand(&scene, &id)?;
            told(&scene)?;
            scene.server.kill()?;
        } else {
            // While no page server is there to see it.
            scene.server.kill()?;
            signal(scene.hosts.destination.host_pid(scene.victim.pid())?, Signal::SIGKILL)?;
        }
        scene.start_server()?;
        told(&scene)?;
        scene.expect(&["resolve", &id], 0, &[said, "--kill: refused", "--thaw: refused"])?;
        scene.expect(&["resolve", &id, "--kill"], 1, &["--allow-loss"])?;
        // Nor is it ended by who goes on with it.
        scene.expect(&["resume", &id], 4, &["is kept here", "resolve"])?;
        ensure!(is_alive(scene.victim.host_pid()), "what was left of it is gone");
        let arguments = ["resolve", &id, "--kill", "--allow-loss", "--json"];
        scene.expect(&arguments, 0, &["\"done\":\"ended\"", &id])?;
        ensure!(!is_alive(scene.victim.host_pid()), "it is still there");
        scene.expect_nothing_written_down()?;
        let over = || Scene::expect_on(&scene.hosts.destination, &["status"], 0, &["no migration is under way"]);
        wait_until("the destination to know", Duration::from_secs(5), || Ok(over().is_ok()))
            .with_context(|| format!("{:?}", over()))?;
    }
    Ok(())
}

/// The process is killed while it is kept, so nothing can be let go on, and the migration is not forgotten for that.
#[test]
fn nothing_is_let_go_on_that_is_gone() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("drain"), Mode::PostCopy, &[])?;
    let id = scene.id()?;
    scene.abandon()?;
    signal(scene.victim.host_pid(), Signal::SIGKILL)?;
    wait_until("it to be gone", Duration::from_secs(5), || Ok(!is_alive(scene.victim.host_pid())))?;
    scene.expect(&["resolve", &id], 0, &["--thaw: refused: the process is gone here"])?;
    scene.expect(&["resolve", &id, "--thaw", "--allow-two-copies"], 1, &["the process is gone here"])?;
    scene.expect(&["status", &id], 0, &[&id[..8]])?;
    scene.expect(&["resolve", &id, "--kill"], 1, &["needs pages that nobody has any more"])?;
    end_by_hand(&scene, &id)?;
    // Now there is nothing left to be lost.
    wait_until("it to be known", Duration::from_secs(5), || {
        Ok(scene.expect(&["resolve", &id, "--kill"], 0, &["gone here", "forgotten"]).is_ok())
    })?;
    scene.expect_nothing_written_down()?;
    // Nor does the page server wait for anybody.
    let server = scene.server.process().host_pid();
    signal(server, Signal::SIGTERM)?;
    wait_until("the page server to end", Duration::from_secs(5), || Ok(!is_alive(server)))
}

/// Ends the copy at the destination; nothing else can be done about it there.
fn end_by_hand(scene: &Scene, id: &str) -> Result<()> {
    let there = |arguments: &[&str], code, words: &[&str]| {
        Scene::expect_on(&scene.hosts.destination, arguments, code, words).map(drop)
    };
    there(&["resolve", id], 0, &["--kill: refused", "migrate resume"])?;
    for (command, arguments) in [("resume", &[][..]), ("cancel", &[]), ("resolve", &["--thaw"])] {
        there(&[&[command, id], arguments].concat(), 1, &["is to be run there"])?;
    }
    there(&["resolve", id, "--kill"], 1, &["--allow-loss"])?;
    there(&["resolve", id, "--kill", "--allow-loss"], 0, &["is ended here"])
}

/// The copy that is being made is ended inside the freeze: that is told, and the program runs on here.
#[test]
fn a_copy_that_ended_while_it_was_made_is_told_of() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("final-round"), Mode::PreCopy, &[])?;
    signal(scene.hosts.destination.host_pid(scene.victim.pid())?, Signal::SIGKILL)?;
    scene.go_on()?;
    let migration = scene.finish()?;
    ensure!(migration.code() == Some(1), "{}", migration.text());
    ensure!(migration.text().contains("somebody has ended the copy"), "{}", migration.text());
    scene.expect_untouched_and_move()
}

/// A page server is killed inside the freeze, and the next one is there before anybody could see that it was not: it says that it knows
/// nothing of the link.
#[test]
fn a_page_server_that_begins_anew_inside_the_freeze_is_noticed_at_once() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("final-round"), Mode::PreCopy, &[])?;
    scene.replace_server()?;
    let begun = std::time::Instant::now();
    scene.go_on()?;
    let migration = scene.finish()?;
    ensure!(migration.code() == Some(1), "{}", migration.text());
    // A link that is silent counts as lost after 10 s.
    ensure!(begun.elapsed() < Duration::from_secs(2), "noticed after {:?}: {}", begun.elapsed(), migration.text());
    scene.expect_untouched_and_move()
}

/// The link is cut when the copy runs and before that is said, for longer than it is made anew: the outcome is unknown until somebody asks.
#[test]
fn a_link_cut_for_too_long_leaves_it_frozen() -> Result<()> {
    let mut scene = Scene::set(&Still::PageServer("running"), Mode::PreCopy, &["--reconnect-for", "1"])?;
    let id = scene.id()?;
    scene.hosts.cut_link()?;
    scene.go_on()?;
    let migration = scene.finish()?;
    ensure!(migration.code() == Some(3), "{}", migration.text());
    ensure!(migration.text().contains("migrate resume"), "{}", migration.text());
    ensure!(state(scene.victim.host_pid()) == Some('T'), "it is not frozen");
    scene.expect(&["resolve", &id[..8]], 0, &["cannot be asked", "--thaw: refused"])?;
    scene.hosts.mend_link()?;
    let resumed = scene.migrate(&["resume", &id, "--json"])?;
    scene.expect_moved_by(&resumed)
}

/// Who has heard that a process has moved may move it on at once.
#[test]
fn it_is_moved_on_at_once() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let servers = [hosts.destination.page_server(&hosts.token)?, hosts.source.page_server(&hosts.token)?];
    let mut victim = hosts.source.victim("memory", &["2", "32", "4"])?;
    for (number, mode) in [Mode::PostCopy, Mode::Hybrid].into_iter().cycle().take(8).enumerate() {
        let (from, to) =
            if number % 2 == 0 { (&hosts.source, &hosts.destination) } else { (&hosts.destination, &hosts.source) };
        let migration = from.migrate(&servers[number % 2], victim.pid()).mode(mode).run()?;
        migration.expect_moved().with_context(|| format!("move {number}"))?;
        victim.follow(to, &migration)?;
    }
    victim.expect_beats(10)?;
    victim.finish().map(drop)
}
