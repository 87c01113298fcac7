//! One cell: the fault at the point, what came of it, and the way out.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::copies::{Copy, Doing, Home};
use super::fault::Fault;
use super::known;
use super::point::Point;
use super::stage::Stage;
use crate::migration::Mode;
use crate::outcome::Migration;
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
    /// It is held at the source, there is no other copy.
    Held(WayOut),
    /// It runs at the destination, and the copy at the source is held.
    RunsThere(WayOut),
    /// It stalls at the destination, for pages that the copy at the source has, which is held.
    Stalls(WayOut),
}

/// What was seen of a cell that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// What became of the victim.
    pub became: Became,
    /// Whether an entry stays in the destination's journal, see [`known::last_word_may_be_lost`].
    pub entry_stays: bool,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.became, if self.entry_stays { "*" } else { "" })
    }
}

/// What `migrate resume` made of it, when the fault was mended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WayOut {
    /// Nothing was decided that could be gone on with: the second attempt succeeded.
    Again,
    /// It runs at the source; the second attempt succeeded.
    RunsOn,
    /// It runs at the destination, and nowhere else.
    Moved,
}

impl fmt::Display for Became {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Moved => f.write_str("moved"),
            Self::RunsOn => f.write_str("runs on"),
            Self::Held(way_out) => write!(f, "held > {way_out}"),
            Self::RunsThere(way_out) => write!(f, "runs there > {way_out}"),
            Self::Stalls(way_out) => write!(f, "stalls there > {way_out}"),
        }
    }
}

impl fmt::Display for WayOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Again => "again",
            Self::RunsOn => "runs on",
            Self::Moved => "moved",
        })
    }
}

/// Where the one copy is that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    /// It runs here and is nowhere else.
    Here,
    /// It is held here and is nowhere else.
    HeldHere,
    /// It runs there and is nowhere else.
    There,
    /// It runs there, and what is here is held.
    ThereAndHeldHere,
}

/// Time in which a program that does not stall makes some heartbeats.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

impl Cell {
    /// Runs it on hosts of its own.
    ///
    /// # Errors
    /// What does not hold.
    pub fn run(self) -> Result<Seen> {
        match self.run_once() {
            Err(error) if known::has_ended_the_copy(self.fault, &error) => self.run_once(),
            seen => seen,
        }
    }

    fn run_once(self) -> Result<Seen> {
        let mut stage = Stage::set(self.point, self.fault, self.mode)?;
        let stopped = stage.stopped(self.point.program())?;
        self.fault.happen(&mut stage, stopped)?;
        let migration = stage.migration.take().context("it was started")?.finish()?;
        let story =
            |stage: &Stage| format!("{}; page server: {}; {:?}", migration.text(), stage.server.log(), stage.copies());
        let became = self.pass(&mut stage, &migration).with_context(|| story(&stage))?;
        stage.victim.expect_beats(10).with_context(|| story(&stage))?;
        stage.victim.signal(Signal::SIGTERM)?;
        stage.victim.expect_verdict().with_context(|| story(&stage))?;
        let story = story(&stage);
        let may_stay = known::last_word_may_be_lost(self.fault);
        let entry_stays = stage.clear(may_stay).with_context(|| format!("it {became}; {story}"))?;
        Ok(Seen { became, entry_stays })
    }

    /// What comes after the fault: how it stands, and the way to where it shall be.
    fn pass(self, stage: &mut Stage, migration: &Migration) -> Result<Became> {
        if self.fault == Fault::MemoryFull {
            // The kernel may have ended it for memory's sake; a service manager starts it again.
            stage.need_page_server()?;
        }
        let stand = stand(&stage.settle()?)?;
        let said = migration.code();
        let is_true = match stand {
            Stand::Here => said.is_none_or(|code| code == 1),
            Stand::There => said.is_none_or(|code| code == 0),
            Stand::HeldHere | Stand::ThereAndHeldHere => said.is_none_or(|code| code == 3),
        };
        ensure!(is_true, "migrate says {said:?}, and it is {stand:?}");
        let stalls = stand == Stand::ThereAndHeldHere && stage.victim.expect_beats_within(3, SIGN_OF_LIFE).is_err();
        if stand == Stand::Here {
            expect_untouched(&stage.victim, &stage.untouched)?;
        }
        self.fault.mend(stage)?;
        let became = match stand {
            Stand::Here => Became::RunsOn,
            Stand::There => Became::Moved,
            Stand::HeldHere => Became::Held(stage.way_out()?),
            Stand::ThereAndHeldHere if stalls => Became::Stalls(stage.way_out()?),
            Stand::ThereAndHeldHere => Became::RunsThere(stage.way_out()?),
        };
        match became {
            Became::RunsOn | Became::Held(WayOut::Again | WayOut::RunsOn) => {
                self.move_again(stage).with_context(|| format!("the second attempt; it {became}"))?;
            }
            _ => {
                let copies = stage.settle()?;
                let [Copy { home: Home::Destination, doing: Doing::Runs, host_pid }] = copies[..] else {
                    bail!("it {became}, and then it is not one copy that runs there: {copies:?}");
                };
                stage.victim.found_at(&stage.hosts.destination, host_pid)?;
            }
        }
        Ok(became)
    }

    fn move_again(self, stage: &mut Stage) -> Result<()> {
        stage.need_page_server()?;
        let migration = stage.hosts.source.migrate(&stage.server, stage.victim.pid()).mode(self.mode).run()?;
        migration.expect_moved()?;
        stage.victim.follow(&stage.hosts.destination, &migration)
    }
}

/// Says how it stands.
fn stand(copies: &[Copy]) -> Result<Stand> {
    match copies {
        [Copy { home: Home::Destination, doing: Doing::Runs, .. }] => Ok(Stand::There),
        [Copy { home: Home::Source, doing: Doing::Runs, .. }] => Ok(Stand::Here),
        [Copy { home: Home::Source, doing: Doing::Held, .. }] => Ok(Stand::HeldHere),
        [first, second] => {
            let (here, there) = if first.home == Home::Source { (first, second) } else { (second, first) };
            ensure!(
                (here.home, there.home) == (Home::Source, Home::Destination) && here.doing == Doing::Held,
                "two copies: {copies:?}"
            );
            Ok(Stand::ThereAndHeldHere)
        }
        [] => bail!("the process is lost"),
        _ => bail!("this is not one copy that runs or is held: {copies:?}"),
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}, {}", self.mode.word(), self.point.title(), self.fault.title())
    }
}
