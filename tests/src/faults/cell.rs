//! One cell: the fault at the point, what came of it, and the way out.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::copies::{Copy, Doing, Home};
use super::fault::Fault;
use super::point::Point;
use super::stage::Stage;
use crate::migration::Mode;
use crate::outcome::Migration;
use crate::proc_view;
use crate::refusal::expect_untouched;

/// A fault at a point of a migration of a mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// Where.
    pub point: Point,
    /// What.
    pub fault: Fault,
    /// Which memory travels when.
    pub mode: Mode,
}

/// What became of the victim. In each case it moved in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Became {
    /// It runs at the destination only.
    Moved,
    /// It runs at the source as before; the second attempt succeeded.
    RunsOn,
    /// It runs at the destination, and the copy at the source is held; that was ended.
    RunsThere,
    /// It is held at the source, there is no other copy; it was woken up, and the second attempt succeeded.
    Held,
    /// It stalls at the destination, and the copy at the source is held; the one there was ended, the one here woken up, and the
    /// second attempt succeeded.
    Stalls,
}

impl fmt::Display for Became {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Moved => "moved",
            Self::RunsOn => "runs on",
            Self::RunsThere => "runs there, held here > ended here",
            Self::Held => "held > woken up",
            Self::Stalls => "stalls there, held here > woken up here",
        })
    }
}

/// Longest time until both ends have noticed what is to be noticed.
const SETTLED: Duration = Duration::from_secs(40);
/// Time in which a program that does not stall makes some heartbeats.
const SIGN_OF_LIFE: Duration = Duration::from_secs(4);

impl Cell {
    /// Runs it on hosts of its own.
    ///
    /// # Errors
    /// What does not hold.
    pub fn run(self) -> Result<Became> {
        let mut stage = Stage::set(self.point, self.fault, self.mode)?;
        let stopped = stage.stopped(self.point.program())?;
        self.fault.happen(&mut stage, stopped, self.point.program())?;
        let migration = stage.migration.take().context("it was started")?.finish()?;
        let story =
            |stage: &Stage| format!("{}; page server: {}; {:?}", migration.text(), stage.server.log(), stage.copies());
        let became = settle(&stage)
            .and_then(|copies| self.judge(&mut stage, &copies, &migration))
            .with_context(|| story(&stage))?;
        self.fault.mend(&mut stage)?;
        self.bring_to_an_end(&mut stage, became).with_context(|| format!("it {became}; {}", story(&stage)))?;
        stage.victim.expect_beats(10)?;
        stage.victim.signal(Signal::SIGTERM)?;
        stage.victim.expect_verdict().with_context(|| story(&stage))?;
        let story = story(&stage);
        stage.clear().with_context(|| format!("it {became}; {story}"))?;
        Ok(became)
    }

    /// Says what became of it, and ends or wakes up what has to be.
    fn judge(self, stage: &mut Stage, copies: &[Copy], migration: &Migration) -> Result<Became> {
        let code = migration.code();
        let says = |codes: &[i32]| {
            let is_so = code.is_none_or(|code| codes.contains(&code));
            ensure!(is_so, "migrate says {code:?}");
            Ok(())
        };
        match copies {
            [Copy { home: Home::Destination, doing: Doing::Runs, host_pid }] => {
                says(&[0])?;
                stage.victim.found_at(&stage.hosts.destination, *host_pid)?;
                Ok(Became::Moved)
            }
            [Copy { home: Home::Source, doing: Doing::Runs, .. }] => {
                says(&[1])?;
                expect_untouched(&stage.victim, &stage.untouched)?;
                Ok(Became::RunsOn)
            }
            [Copy { home: Home::Source, doing: Doing::Held, .. }] => {
                says(&[3])?;
                stage.wake_up()?;
                Ok(Became::Held)
            }
            [first, second] => {
                let (here, there) = if first.home == Home::Source { (first, second) } else { (second, first) };
                ensure!(
                    here.home == Home::Source && there.home == Home::Destination,
                    "two copies in one place: {copies:?}"
                );
                ensure!(here.doing == Doing::Held && there.doing == Doing::Runs, "two copies run: {copies:?}");
                says(&[3])?;
                let one = if stage.victim.expect_beats_within(5, SIGN_OF_LIFE).is_ok() { here } else { there };
                crate::process::send(one.host_pid, Signal::SIGKILL)?;
                if one == here {
                    stage.victim.found_at(&stage.hosts.destination, there.host_pid)?;
                    return Ok(Became::RunsThere);
                }
                crate::wait_until("the stalled copy to be gone", SIGN_OF_LIFE, || {
                    Ok(!proc_view::is_alive(there.host_pid))
                })?;
                // What the other one had come to does not count any more.
                stage.victim.forget_status()?;
                stage.wake_up()?;
                Ok(Became::Stalls)
            }
            [] => bail!("the process is lost"),
            _ => bail!("this is not one copy that runs or is held: {copies:?}"),
        }
    }

    /// Moves it if it has not been moved.
    fn bring_to_an_end(self, stage: &mut Stage, became: Became) -> Result<()> {
        if matches!(became, Became::Moved | Became::RunsThere) {
            return Ok(());
        }
        stage.victim.expect_beats(5)?;
        stage.need_page_server()?;
        let migration = stage.hosts.source.migrate(&stage.server, stage.victim.pid()).mode(self.mode).run()?;
        let story = |stage: &Stage| format!("the second attempt; page server: {}", stage.server.log());
        migration.expect_moved().with_context(|| story(stage))?;
        stage.victim.follow(&stage.hosts.destination, &migration).with_context(|| story(stage))
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}, {}", self.mode.word(), self.point.title(), self.fault.title())
    }
}

/// Waits until nobody holds a process at the destination by ptrace(2) any more: it runs or it is gone. Yields all copies.
fn settle(stage: &Stage) -> Result<Vec<Copy>> {
    let deadline = Instant::now() + SETTLED;
    loop {
        let copies = stage.copies()?;
        let traced = stage.hosts.destination.processes()?.into_iter().filter(|&(pid, _)| proc_view::is_traced(pid));
        let traced: Vec<(u32, String)> = traced.collect();
        if traced.is_empty() && copies.iter().all(|copy| copy.doing != Doing::Traced) {
            return Ok(copies);
        }
        ensure!(Instant::now() < deadline, "after {SETTLED:?} something is not settled: {traced:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
