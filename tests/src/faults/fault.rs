//! What happens at a point, and how it is mended.

use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;

use super::stage::Stage;
use crate::host::{Host, STATE};

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// `kill -9` of `migrate`, the process that the user started.
    MigrateKilled,
    /// `kill -9` of its child that has the victim.
    AgentKilled,
    /// `kill -9` of the page server; another is started at once.
    PageServerKilled,
    /// `kill -9` of the `lazy-pages` daemon; another is started at once.
    LazyPagesKilled,
    /// All packets are lost for 2 s.
    LinkCutFor2s,
    /// All packets are lost until all is over.
    LinkCut,
    /// What the destination sends is lost, silently.
    AnswersLost,
    /// What the source sends is lost, silently.
    RequestsLost,
    /// What the source sends is refused, with ICMP messages.
    Refused,
    /// The page server and all that it makes get no more memory.
    MemoryFull,
    /// The source has no room for its journal.
    JournalFullHere,
    /// The destination has none.
    JournalFullThere,
}

/// How long the short cut is.
const CUT: Duration = Duration::from_secs(2);
/// What a full file system is full of.
const FILLING: &str = "full";
/// The packet filter's table that makes links fail.
pub(super) const TABLE: &str = "fault";

impl Fault {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::MigrateKilled,
        Self::AgentKilled,
        Self::PageServerKilled,
        Self::LazyPagesKilled,
        Self::LinkCutFor2s,
        Self::LinkCut,
        Self::AnswersLost,
        Self::RequestsLost,
        Self::Refused,
        Self::MemoryFull,
        Self::JournalFullHere,
        Self::JournalFullThere,
    ];

    /// What heads its column.
    pub fn title(self) -> &'static str {
        match self {
            Self::MigrateKilled => "kill -9 migrate",
            Self::AgentKilled => "kill -9 its agent",
            Self::PageServerKilled => "kill -9 page-server",
            Self::LazyPagesKilled => "kill -9 lazy-pages",
            Self::LinkCutFor2s => "link cut for 2 s",
            Self::LinkCut => "link cut",
            Self::AnswersLost => "answers lost",
            Self::RequestsLost => "requests lost",
            Self::Refused => "refused (ICMP)",
            Self::MemoryFull => "memory full there",
            Self::JournalFullHere => "no room for the journal here",
            Self::JournalFullThere => "no room for the journal there",
        }
    }

    /// Lets it happen while the program of the point is stopped, and that program go on if it is there still.
    pub(super) fn happen(self, stage: &mut Stage, stopped: u32) -> Result<()> {
        match self {
            Self::MigrateKilled => crate::process::send(stage.front()?, Signal::SIGKILL)?,
            Self::AgentKilled => crate::process::send(stage.agent()?, Signal::SIGKILL)?,
            Self::PageServerKilled => stage.replace_page_server()?,
            Self::LazyPagesKilled => stage.replace_lazy_pages()?,
            Self::LinkCutFor2s | Self::LinkCut => {
                lose_incoming(&stage.hosts.source)?;
                lose_incoming(&stage.hosts.destination)?;
            }
            Self::AnswersLost => lose_incoming(&stage.hosts.source)?,
            Self::RequestsLost => lose_incoming(&stage.hosts.destination)?,
            Self::Refused => refuse_incoming(&stage.hosts.destination)?,
            Self::MemoryFull => stage.memory()?.fill()?,
            Self::JournalFullHere => fill_state(&stage.hosts.source)?,
            Self::JournalFullThere => fill_state(&stage.hosts.destination)?,
        }
        // It may be the one that has ended.
        match crate::process::send(stopped, Signal::SIGCONT) {
            Err(_) if !crate::proc_view::is_alive(stopped) => {}
            sent => sent?,
        }
        stage.wake_launchers()?;
        if self == Self::LinkCutFor2s {
            std::thread::sleep(CUT);
            self.mend(stage)?;
        }
        Ok(())
    }

    /// Puts right what is wrong with links and hosts.
    pub(super) fn mend(self, stage: &mut Stage) -> Result<()> {
        match self {
            Self::LinkCutFor2s | Self::LinkCut | Self::AnswersLost | Self::RequestsLost | Self::Refused => {
                let script = format!("nft delete table netdev {TABLE} || nft delete table inet {TABLE} || true");
                for host in [&stage.hosts.source, &stage.hosts.destination] {
                    host.run("sh", &["-c", &format!("({script}) 2> /dev/null")])?;
                }
                Ok(())
            }
            Self::MemoryFull => stage.memory()?.free(),
            Self::JournalFullHere => empty_state(&stage.hosts.source),
            Self::JournalFullThere => empty_state(&stage.hosts.destination),
            _ => Ok(()),
        }
    }
}

fn lose_incoming(host: &Host) -> Result<()> {
    let device = crate::two_hosts::INTERFACE;
    let rule = format!("type filter hook ingress device {device} priority 0; policy drop;");
    host.run("nft", &[&format!("table netdev {TABLE} {{ chain lost {{ {rule} }}; }}")]).map(drop)
}

fn refuse_incoming(host: &Host) -> Result<()> {
    let rule = "type filter hook input priority 0; meta l4proto udp reject with icmpx port-unreachable;";
    host.run("nft", &[&format!("table inet {TABLE} {{ chain refused {{ {rule} }}; }}")]).map(drop)
}

/// Leaves no room in the file system of the journal.
fn fill_state(host: &Host) -> Result<()> {
    host.run("sh", &["-c", &format!("cat /dev/zero > {STATE}/{FILLING} 2> /dev/null; test -s {STATE}/{FILLING}")])
        .map(drop)
}

fn empty_state(host: &Host) -> Result<()> {
    host.run("rm", &["-f", &format!("{STATE}/{FILLING}")]).map(drop)
}
