//! Who a thread is and what it may do: ids, groups, capability sets, securebits, no_new_privs (credentials(7), capabilities(7)).
//!
//! The kernel keeps credentials per thread, and so does this module; that all threads agree is a courtesy of libc.

use crate::{Error, Result};
use godwit_proto::image::CredsEntry;
use godwit_tracee::{Arg, Batch, Buffer, Call, Outcome, Tracee, read_status};
use std::sync::OnceLock;

/// Groups that are asked for at first; the kernel's own limit is the second number.
const GROUPS_AT_FIRST: usize = 256;
const MAX_GROUPS: usize = 65536;
/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
const PR_CAP_AMBIENT_IS_SET: u64 = 1;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;
/// `SECBIT_NO_SETUID_FIXUP`: changing user ids leaves capabilities alone.
const NO_SETUID_FIXUP: u64 = 1 << 2;

/// Capability sets of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// What it may use.
    pub permitted: u64,
    /// What it may ever gain.
    pub bounding: u64,
}

/// Reads the capability sets of a process.
///
/// # Errors
/// When it is gone.
pub fn capabilities(pid: i32) -> Result<Capabilities> {
    let status = read_status(pid)?;
    let set = |field| status.hexadecimal(field).unwrap_or(0);
    Ok(Capabilities { permitted: set("CapPrm"), bounding: set("CapBnd") })
}

/// Reads the capability sets of this process.
///
/// # Errors
/// When /proc is not there.
pub fn own_capabilities() -> Result<Capabilities> {
    capabilities(std::process::id() as i32)
}

/// Reads who the threads `tids` are from outside, each combination once. What is not in /proc, securebits above all, is left out.
#[must_use]
pub fn inspect(tids: &[i32]) -> Vec<CredsEntry> {
    let mut all: Vec<CredsEntry> = Vec::new();
    // A thread that has ended meanwhile is nobody.
    for status in tids.iter().filter_map(|&tid| read_status(tid).ok()) {
        let (users, groups) = (status.numbers("Uid"), status.numbers("Gid"));
        let id = |ids: &[u64], which: usize| ids.get(which).copied().unwrap_or(u32::MAX.into()) as u32;
        let set = |field| words(status.hexadecimal(field).unwrap_or(0));
        let creds = CredsEntry {
            uid: id(&users, 0),
            euid: id(&users, 1),
            suid: id(&users, 2),
            fsuid: id(&users, 3),
            gid: id(&groups, 0),
            egid: id(&groups, 1),
            sgid: id(&groups, 2),
            fsgid: id(&groups, 3),
            groups: status.numbers("Groups").into_iter().map(|group| group as u32).collect(),
            cap_eff: set("CapEff"),
            cap_prm: set("CapPrm"),
            cap_inh: set("CapInh"),
            cap_bnd: set("CapBnd"),
            cap_amb: set("CapAmb"),
            no_new_privs: status.number("NoNewPrivs").map(|set| set as u32),
            ..CredsEntry::default()
        };
        if !all.contains(&creds) {
            all.push(creds);
        }
    }
    all
}

/// All capabilities that credentials have now or may take up without any program's help.
#[must_use]
pub fn held(creds: &CredsEntry) -> u64 {
    set_of(&creds.cap_prm) | set_of(&creds.cap_eff) | set_of(&creds.cap_inh) | set_of(&creds.cap_amb)
}

/// The highest capability that this kernel knows.
fn last_capability() -> u64 {
    static LAST: OnceLock<u64> = OnceLock::new();
    *LAST.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap_or_default();
        text.trim().parse().unwrap_or(40).min(63)
    })
}

/// Questions about a thread's credentials, asked in a batch that it runs itself.
pub(crate) struct CredentialQuestions {
    ids: Buffer,
    fsuid: Call,
    fsgid: Call,
    capabilities: Buffer,
    bounding: Vec<Call>,
    ambient: Vec<Call>,
    securebits: Call,
    no_new_privs: Call,
    groups: Buffer,
    group_count: Call,
}

impl CredentialQuestions {
    pub(crate) fn ask(batch: &mut Batch) -> Self {
        let ids = batch.buffer(24);
        let id = |index: usize| Arg::Address(ids, index * 4);
        batch.call("getresuid", libc::SYS_getresuid, &[id(0), id(1), id(2)]);
        batch.call("getresgid", libc::SYS_getresgid, &[id(3), id(4), id(5)]);
        // An id that cannot be set changes nothing and returns the present one.
        let fsuid = batch.call("setfsuid", libc::SYS_setfsuid, &[u32::MAX.into()]);
        let fsgid = batch.call("setfsgid", libc::SYS_setfsgid, &[u32::MAX.into()]);
        let header = batch.data(&capability_header());
        let capabilities = batch.buffer(24);
        batch.call("capget", libc::SYS_capget, &[header.into(), capabilities.into()]);
        let mut bounding = Vec::new();
        let mut ambient = Vec::new();
        for capability in 0..=last_capability() {
            let arguments = [libc::PR_CAPBSET_READ.into(), capability.into()];
            bounding.push(batch.attempt("PR_CAPBSET_READ", libc::SYS_prctl, &arguments));
            let arguments = [libc::PR_CAP_AMBIENT.into(), PR_CAP_AMBIENT_IS_SET.into(), capability.into()];
            ambient.push(batch.attempt("PR_CAP_AMBIENT", libc::SYS_prctl, &arguments));
        }
        let securebits = batch.call("PR_GET_SECUREBITS", libc::SYS_prctl, &[libc::PR_GET_SECUREBITS.into()]);
        let no_new_privs = batch.call("PR_GET_NO_NEW_PRIVS", libc::SYS_prctl, &[libc::PR_GET_NO_NEW_PRIVS.into()]);
        let (groups, group_count) = ask_groups(batch, GROUPS_AT_FIRST);
        Self { ids, fsuid, fsgid, capabilities, bounding, ambient, securebits, no_new_privs, groups, group_count }
    }

    /// Interprets the answers; asks `tracee` again in thread `tid` when it is in an unusual number of groups.
    pub(crate) fn answer(self, outcome: &Outcome, tracee: &mut Tracee, tid: i32) -> Result<CredsEntry> {
        let number = |call: Call| outcome.result(call).unwrap_or(0);
        let id = |index: usize| outcome.half(self.ids, index * 4);
        let capability = |index: usize| outcome.half(self.capabilities, index * 4);
        let set = |calls: &[Call]| {
            let bits = calls.iter().enumerate().filter(|&(_, &call)| number(call) == 1);
            words(bits.fold(0u64, |set, (capability, _)| set | 1 << capability))
        };
        let groups = match outcome.result(self.group_count) {
            Ok(count) => group_list(outcome.bytes(self.groups), count as usize),
            Err(_) => {
                let mut batch = Batch::new();
                let (groups, count) = ask_groups(&mut batch, MAX_GROUPS);
                let outcome = tracee.run_in(tid, batch)?;
                let count = outcome
                    .result(count)
                    .map_err(|source| Error::call(format!("thread {tid}"), "reading its groups", source))?;
                group_list(outcome.bytes(groups), count as usize)
            }
        };
        Ok(CredsEntry {
            uid: id(0),
            euid: id(1),
            suid: id(2),
            gid: id(3),
            egid: id(4),
            sgid: id(5),
            fsuid: number(self.fsuid) as u32,
            fsgid: number(self.fsgid) as u32,
            // The kernel's order: effective, permitted, inheritable; low words, then high words.
            cap_eff: vec![capability(0), capability(3)],
            cap_prm: vec![capability(1), capability(4)],
            cap_inh: vec![capability(2), capability(5)],
            cap_bnd: set(&self.bounding),
            cap_amb: set(&self.ambient),
            secbits: number(self.securebits) as u32,
            no_new_privs: Some(number(self.no_new_privs) as u32),
            groups,
            ..CredsEntry::default()
        })
    }
}

fn capability_header() -> [u8; 8] {
    let mut header = [0; 8];
    header[..4].copy_from_slice(&CAPABILITY_VERSION.to_le_bytes());
    header
}

fn ask_groups(batch: &mut Batch, room: usize) -> (Buffer, Call) {
    let groups = batch.buffer(room * 4);
    (groups, batch.attempt("getgroups", libc::SYS_getgroups, &[room.into(), groups.into()]))
}

fn group_list(bytes: &[u8], count: usize) -> Vec<u32> {
    bytes.chunks_exact(4).take(count).map(|group| u32::from_le_bytes(group.try_into().expect("four bytes"))).collect()
}

/// A set as the messages carry it.
fn words(set: u64) -> Vec<u32> {
    vec![set as u32, (set >> 32) as u32]
}

/// A set from a message; words that are missing are empty.
fn set_of(words: &[u32]) -> u64 {
    let word = |index: usize| u64::from(words.get(index).copied().unwrap_or(0));
    word(0) | word(1) << 32
}

/// Adds the calls that give the running thread, which is root with the capabilities `have`, the credentials of `creds`.
///
/// N.B. the order. User ids change under SECBIT_NO_SETUID_FIXUP, or they would take the capabilities for the rest along.
/// Inheritable comes before the bounding set, which limits what may become inheritable; ambient before the securebits,
/// which may forbid to raise any; capabilities are given up last.
pub(crate) fn set(batch: &mut Batch, creds: &CredsEntry, have: Capabilities) -> Result<()> {
    if creds.groups.len() > MAX_GROUPS {
        return Err(Error::state("credentials", format!("{} groups", creds.groups.len())));
    }
    let inheritable = set_of(&creds.cap_inh);
    let permitted = set_of(&creds.cap_prm);
    let beyond = permitted & !have.permitted;
    if beyond != 0 {
        let text = format!("needs capabilities {beyond:#x}, which the page server does not have itself");
        return Err(Error::state("credentials", text));
    }
    set_securebits(batch, NO_SETUID_FIXUP);
    set_capabilities(batch, have.permitted, have.permitted, inheritable);
    let ambient = |operation: u64, capability: u64| [libc::PR_CAP_AMBIENT.into(), operation.into(), capability.into()];
    batch.call("clearing ambient capabilities", libc::SYS_prctl, &ambient(PR_CAP_AMBIENT_CLEAR_ALL, 0));
    for capability in members(set_of(&creds.cap_amb)) {
        let what = format!("raising ambient capability {capability}");
        batch.call(what, libc::SYS_prctl, &ambient(PR_CAP_AMBIENT_RAISE, capability));
    }
    set_ids(batch, creds);
    for capability in members(have.bounding & !set_of(&creds.cap_bnd)) {
        let arguments = [libc::PR_CAPBSET_DROP.into(), capability.into()];
        batch.call(format!("dropping capability {capability}"), libc::SYS_prctl, &arguments);
    }
    set_securebits(batch, creds.secbits.into());
    if creds.no_new_privs == Some(1) {
        batch.call("setting no_new_privs", libc::SYS_prctl, &[libc::PR_SET_NO_NEW_PRIVS.into(), 1u64.into()]);
    }
    set_capabilities(batch, set_of(&creds.cap_eff), permitted, inheritable);
    Ok(())
}

fn members(set: u64) -> impl Iterator<Item = u64> {
    (0..=last_capability()).filter(move |capability| set >> capability & 1 != 0)
}

fn set_securebits(batch: &mut Batch, bits: u64) {
    batch.call("setting securebits", libc::SYS_prctl, &[libc::PR_SET_SECUREBITS.into(), bits.into()]);
}

fn set_capabilities(batch: &mut Batch, effective: u64, permitted: u64, inheritable: u64) {
    let header = batch.data(&capability_header());
    let sets = [effective, permitted, inheritable];
    let low = sets.iter().map(|set| *set as u32);
    let high = sets.iter().map(|set| (*set >> 32) as u32);
    let bytes: Vec<u8> = low.chain(high).flat_map(u32::to_le_bytes).collect();
    let data = batch.data(&bytes);
    let what = format!("setting capabilities (permitted {permitted:#x}, inheritable {inheritable:#x})");
    batch.call(what, libc::SYS_capset, &[header.into(), data.into()]);
}

fn set_ids(batch: &mut Batch, creds: &CredsEntry) {
    let groups: Vec<u8> = creds.groups.iter().flat_map(|group| group.to_le_bytes()).collect();
    let groups = batch.data(&groups);
    batch.call("setting groups", libc::SYS_setgroups, &[creds.groups.len().into(), groups.into()]);
    let arguments = [creds.gid.into(), creds.egid.into(), creds.sgid.into()];
    batch.call("setting group ids", libc::SYS_setresgid, &arguments);
    batch.call("setting group ids", libc::SYS_setfsgid, &[creds.fsgid.into()]);
    let arguments = [creds.uid.into(), creds.euid.into(), creds.suid.into()];
    batch.call("setting user ids", libc::SYS_setresuid, &arguments);
    batch.call("setting user ids", libc::SYS_setfsuid, &[creds.fsuid.into()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_own_credentials_are_those_of_the_kernel() {
        let own = inspect(&[std::process::id() as i32, std::process::id() as i32]);
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].euid, nix::unistd::geteuid().as_raw());
        assert_eq!(own[0].egid, nix::unistd::getegid().as_raw());
        assert_eq!(set_of(&own[0].cap_prm), own_capabilities().unwrap().permitted);
        assert_eq!(inspect(&[i32::MAX]), []);
    }

    #[test]
    fn sets_survive_their_words() {
        let set = 0x0000_01ff_feff_ffff;
        assert_eq!(set_of(&words(set)), set);
        assert_eq!(set_of(&[]), 0);
        assert_eq!(members(0b1010_0001).collect::<Vec<_>>(), [0, 5, 7]);
    }
}
