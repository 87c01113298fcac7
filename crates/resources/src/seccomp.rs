//! Seccomp filters: the classic BPF programs that each thread has given up system calls with (seccomp(2)).
//!
//! A thread's filters are a chain that can only grow, and clone(2) shares it. In the message every program names the one
//! installed before it; threads with the same chain name the same program. Our own remote calls are not filtered while a
//! thread is held with PTRACE_O_SUSPEND_SECCOMP.

use crate::{Error, Obstacle, Result};
use godwit_kernel::{Errno, ptrace};
use godwit_proto::image::{SeccompEntry, SeccompFilter, ThreadCoreEntry};
use godwit_tracee::{Arg, Batch};

/// Most instructions of a program (`BPF_MAXINSNS`) and bytes of one.
const MAX_INSTRUCTIONS: usize = 4096;
const INSTRUCTION_SIZE: usize = 8;
/// Most programs that one message may hold.
const MAX_FILTERS: usize = 4096;
const FILTER_FLAG_TSYNC: u32 = 1;
const FILTER_FLAG_LOG: u32 = 2;
/// Operations that return a constant (`BPF_RET | BPF_K`), and the verdicts that need another process.
const RETURN_CONSTANT: u16 = 0x06;
const VERDICT_MASK: u32 = 0xffff_0000;
const VERDICT_NOTIFY: u32 = 0x7fc0_0000;
const VERDICT_TRACE: u32 = 0x7ff0_0000;

/// The modes of prctl(2) `PR_GET_SECCOMP`.
pub(crate) const MODE_DISABLED: u64 = 0;
/// As above.
pub(crate) const MODE_FILTER: u64 = 2;

/// Reads the filters of stopped thread `tid` into `all`; returns the number of the newest.
pub(crate) fn collect(tid: i32, all: &mut SeccompEntry) -> Result<Option<u32>> {
    let mut newest = None;
    let resource = || format!("seccomp filter of thread {tid}");
    for index in 0..MAX_FILTERS {
        let program = match ptrace::seccomp_filter(tid, index) {
            Ok(program) => program,
            Err(Errno::ENOENT) => return Ok(newest),
            Err(source) => return Err(Error::call(resource(), "reading it", source)),
        };
        let flags = match ptrace::seccomp_filter_flags(tid, index as u64) {
            Ok(flags) => flags as u32,
            Err(Errno::ENOENT) => return Ok(newest),
            Err(source) => return Err(Error::call(resource(), "reading its flags", source)),
        };
        if let Some(text) = depends_on_others(&program) {
            return Err(Error::Obstacle(Obstacle::new(resource(), text, "")));
        }
        let entry = SeccompFilter { filter: program.concat(), prev: newest, flags: Some(flags) };
        let found = all.seccomp_filters.iter().position(|known| *known == entry);
        newest = Some(found.unwrap_or_else(|| {
            all.seccomp_filters.push(entry);
            all.seccomp_filters.len() - 1
        }) as u32);
    }
    Err(Error::state(resource(), "more filters than can be moved"))
}

/// Says whether a program asks another process for verdicts, which would stay behind.
fn depends_on_others(program: &[[u8; INSTRUCTION_SIZE]]) -> Option<&'static str> {
    program.iter().find_map(|instruction| {
        let operation = u16::from_le_bytes([instruction[0], instruction[1]]);
        let value = u32::from_le_bytes([instruction[4], instruction[5], instruction[6], instruction[7]]);
        match (operation, value & VERDICT_MASK) {
            (RETURN_CONSTANT, VERDICT_NOTIFY) => Some("asks another process for verdicts (SECCOMP_RET_USER_NOTIF)"),
            (RETURN_CONSTANT, VERDICT_TRACE) => Some("asks a tracer for verdicts (SECCOMP_RET_TRACE)"),
            _ => None,
        }
    })
}

/// The programs that end in number `newest`, oldest first.
pub(crate) fn chain(all: &SeccompEntry, newest: u32) -> Result<Vec<&SeccompFilter>> {
    let mut chain = Vec::new();
    let mut next = Some(newest);
    while let Some(index) = next {
        let filter = all
            .seccomp_filters
            .get(index as usize)
            .ok_or_else(|| Error::state("seccomp filters", format!("no filter {index}")))?;
        // N.B. an index that does not decrease could go in circles.
        if filter.prev.is_some_and(|previous| previous >= index) {
            return Err(Error::state("seccomp filters", format!("filter {index} precedes itself")));
        }
        if filter.filter.is_empty()
            || filter.filter.len() % INSTRUCTION_SIZE != 0
            || filter.filter.len() > MAX_INSTRUCTIONS * INSTRUCTION_SIZE
        {
            return Err(Error::state("seccomp filters", format!("filter {index} has {} bytes", filter.filter.len())));
        }
        chain.push(filter);
        next = filter.prev;
    }
    chain.reverse();
    Ok(chain)
}

/// For whom filters are installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The thread that makes the call.
    Thread,
    /// All threads of the process at once, which share the programs then (`SECCOMP_FILTER_FLAG_TSYNC`).
    Process,
}

/// Whether all threads have the same chain, so that one installation serves all.
pub(crate) fn scope<'a>(mut threads: impl Iterator<Item = &'a ThreadCoreEntry>) -> Scope {
    let first = threads.next().map(|core| core.seccomp_filter);
    if threads.all(|core| Some(core.seccomp_filter) == first) { Scope::Process } else { Scope::Thread }
}

/// Adds the calls that install a thread's filters. It must still have CAP_SYS_ADMIN, or no_new_privs would have to be set.
pub(crate) fn install(batch: &mut Batch, all: &SeccompEntry, core: &ThreadCoreEntry, scope: Scope) -> Result<()> {
    let Some(newest) = core.seccomp_filter else { return Ok(()) };
    let sync = if scope == Scope::Process { FILTER_FLAG_TSYNC } else { 0 };
    for filter in chain(all, newest)? {
        let instructions = batch.data(&filter.filter);
        let mut program = [0; 16];
        program[..2].copy_from_slice(&((filter.filter.len() / INSTRUCTION_SIZE) as u16).to_le_bytes());
        let program = batch.data(&program);
        batch.pointer(program, 8, instructions);
        let flags = filter.flags.unwrap_or(0) & FILTER_FLAG_LOG | sync;
        let arguments: [Arg; 3] = [libc::SECCOMP_SET_MODE_FILTER.into(), flags.into(), program.into()];
        batch.call("installing a seccomp filter", libc::SYS_seccomp, &arguments);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(prev: Option<u32>) -> SeccompFilter {
        SeccompFilter { filter: vec![6, 0, 0, 0, 0, 0, 0xff, 0x7f], prev, flags: Some(0) }
    }

    #[test]
    fn a_chain_is_followed_to_its_beginning_only() {
        let good = SeccompEntry { seccomp_filters: vec![filter(None), filter(Some(0)), filter(Some(1))] };
        assert_eq!(chain(&good, 2).unwrap().len(), 3);
        assert!(chain(&good, 3).is_err());
        for prev in [0, 1, 7] {
            let circular = SeccompEntry { seccomp_filters: vec![filter(Some(prev))] };
            assert!(chain(&circular, 0).is_err());
        }
    }

    #[test]
    fn verdicts_of_others_are_found() {
        assert!(depends_on_others(&[[6, 0, 0, 0, 0, 0, 0xff, 0x7f]]).is_none());
        assert!(depends_on_others(&[[6, 0, 0, 0, 0, 0, 0xc0, 0x7f]]).is_some());
        assert!(depends_on_others(&[[6, 0, 0, 0, 1, 0, 0xf0, 0x7f]]).is_some());
    }
}
