//! Programs whose fault service was killed, and who serves them next.
//!
//! Their holders are found by name; the ledger says which process served them. A holder counts as left behind when that process is gone and
//! the holder lives in this process's network namespace, where the sources call.

use std::path::Path;

use godwit_kernel::Errno;

use crate::error::{Error, MigrationId, Result};
use crate::ledger::Ledger;
use crate::second_holder::{Held, Left, find_holders, recover};

/// What is left of a service: the holder's process id and what it holds.
pub(crate) struct Orphan {
    pub(crate) holder: i32,
    pub(crate) left: Left,
}

/// A number for process `pid`, which no later process of the same pid has; 0 when it is gone.
pub(crate) fn identity(pid: u32) -> u64 {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return 0 };
    // The name may hold anything; what follows its closing parenthesis is fixed. proc_pid_stat(5), field 22.
    let after = stat.rfind(')').map_or("", |end| &stat[end + 1..]);
    let state = after.split_ascii_whitespace().next();
    let started: u64 = after.split_ascii_whitespace().nth(19).and_then(|field| field.parse().ok()).unwrap_or(0);
    if matches!(state, Some("Z" | "X") | None) { 0 } else { u64::from(pid) << 40 | (started & ((1 << 40) - 1)) }
}

/// Tells whether the process with such a number lives.
fn lives(owner: u64) -> bool {
    owner != 0 && identity((owner >> 40) as u32) == owner
}

/// What a process wants to be to a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Who serves its pages.
    Owner,
    /// Who keeps its userfaultfd beside a daemon.
    Keeper,
}

/// Finds what is left of those that played a part and died, and claims it for this process.
pub(crate) fn claim_all(part: Part) -> std::io::Result<Vec<Orphan>> {
    let ours = std::fs::read_link("/proc/self/ns/net")?;
    let mut orphans = Vec::new();
    for holder in find_holders()? {
        let theirs = std::fs::read_link(Path::new("/proc").join(holder.to_string()).join("ns/net"));
        if theirs.ok().as_ref() != Some(&ours) {
            continue;
        }
        match claim(holder, part) {
            Ok(Some(left)) => orphans.push(Orphan { holder, left }),
            Ok(None) => {}
            Err(error) => tracing::warn!(holder, %error, "cannot look into a process that holds userfaultfds"),
        }
    }
    Ok(orphans)
}

/// Whether some program of a migration lacks pages on this host, whoever serves it: it, or a child that it has forked. As far as that can be
/// told; what cannot be looked into may be of any.
///
/// # Errors
/// When /proc cannot be read.
pub fn lacks_pages(id: MigrationId) -> std::io::Result<bool> {
    let lacks = |held: Held| match Ledger::open(held.ledger) {
        Ok((ledger, _)) => ledger.subject().id == id && ledger.missing_pages() > 0,
        Err(_) => true,
    };
    let is_of_it = |holder: i32| match recover(holder) {
        Ok(left) => left.held.into_iter().any(lacks),
        Err(Error::Holder { source: Errno::ESRCH, .. }) => false,
        Err(_) => true,
    };
    Ok(find_holders()?.into_iter().any(is_of_it))
}

fn claim(holder: i32, part: Part) -> Result<Option<Left>> {
    let left = recover(holder)?;
    let Some(first) = left.held.first() else { return Ok(None) };
    let copied = first.ledger.try_clone();
    let ledger = copied.map_err(|source| Error::Holder { operation: "asking", source: errno(&source) })?;
    let own = identity(std::process::id());
    let is_ours = match part {
        Part::Owner => Ledger::claim(ledger, own, lives)?,
        Part::Keeper => Ledger::claim_keeping(ledger, own, lives)?,
    };
    Ok(is_ours.then_some(left))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
}
