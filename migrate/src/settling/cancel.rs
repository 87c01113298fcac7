//! `migrate cancel`: a migration is called off that is not decided.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use godwit_journal::{Journal, Side};
use godwit_session::decision::SourceRecord;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::arrived::Arrived;
use super::{CancelArguments, open, peek, print};
use crate::agent;
use crate::journal::{Facts, SourceEntry};

/// Calls a migration off that is not decided.
///
/// # Errors
/// When there is none, or it is too late.
pub fn cancel(arguments: &CancelArguments) -> Result<()> {
    if let Some(arrived) = Arrived::find(&arguments.common.state_directory, &arguments.id)? {
        return Err(arrived.at_its_source("cancel"));
    }
    let journal = open(&arguments.common.state_directory, Side::Source)?;
    let (id, state, facts) = peek(&journal, &arguments.id)?;
    let short = &id[..8];
    if matches!(state, SourceRecord::Decided | SourceRecord::Given) {
        let resolve = arguments.common.command("resolve", short);
        bail!("migration {short} is decided: the process may run at the destination; {resolve} says how it stands");
    }
    if !journal.is_in_use(&id) {
        // Nobody is at work on it any more: what is left is that the process may go on.
        let entry: SourceEntry = journal.find(&id)?.context("it is over")?;
        agent::let_go_on(entry).map_err(anyhow::Error::msg)?;
        print(&format!("migration {short} was left undecided: process {} goes on here\n", facts.process.pid));
        return Ok(());
    }
    let agent = holder_of(&journal, &id).context("the `migrate` that is at work on it cannot be found")?;
    kill(Pid::from_raw(agent), Signal::SIGINT).context("telling the `migrate` that is at work on it")?;
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while journal.is_in_use(&id) && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    match journal.peek::<SourceRecord, Facts>(&id)? {
        None if facts.process.is_there() => {
            print(&format!("migration {short} is called off: process {} runs on here\n", facts.process.pid))
        }
        None => {
            bail!("migration {short} is over, and process {} is not here: it has moved or ended", facts.process.pid)
        }
        Some(_) => bail!("it is not called off; {} says how it stands", arguments.common.command("status", short)),
    }
    Ok(())
}

/// The process that has an entry locked. proc_locks(5) names it as this PID namespace does.
fn holder_of(journal: &Journal, id: &str) -> Option<i32> {
    use std::os::unix::fs::MetadataExt;
    let inode = std::fs::metadata(journal.path(id)).ok()?.ino();
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let is_it = fields.get(1) == Some(&"FLOCK")
            && fields.get(5)?.rsplit(':').next()?.parse::<u64>().is_ok_and(|number| number == inode);
        if is_it { fields.get(4)?.parse().ok().filter(|&pid: &i32| pid > 0) } else { None }
    })
}
