//! What this host lets others send: whose processes, how large, how many at a time.
//!
//! The source is told by the answer to its probe, before the process is touched; and because a source may say one thing then and
//! another thing later, what is built is looked at again. Without limits a host that is trusted may send anything.
//!
//! Where root is not among the users allowed, a process must neither have capabilities nor come by what it could not open itself:
//! the page server opens files as root, and would do so in its name. What is looked at is the path, as that user, shortly before it
//! is opened; see SECURITY.md for what that leaves.

use crate::room;
use anyhow::{Result, anyhow, bail};
use godwit_kernel::privileges;
use godwit_pages::{PAGE_SIZE, PageRange, PageSet};
use godwit_proto::image::{CredsEntry, FileEntry, MmEntry};
use godwit_proto::wire::{self, SharedObject};
use godwit_resources::{Obstacle, credentials};
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::unistd::{AccessFlags, Gid, Uid, User, faccessat};
use std::collections::{BTreeSet, HashMap};
use std::ffi::CString;
use std::path::Path;
use std::str::FromStr;

/// Set-user-ID and set-group-ID.
const SETS_IDS: u32 = 0o6000;
/// Scheduling before everybody else. sched(7)
const REAL_TIME: [u32; 3] = [libc::SCHED_FIFO as u32, libc::SCHED_RR as u32, libc::SCHED_DEADLINE as u32];

/// Numbers of users or groups, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    first: u32,
    last: u32,
}

impl FromStr for Ids {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| text.parse().map_err(|_| "expected a number, or two with a hyphen between");
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let ids = Self { first: number(first)?, last: number(last)? };
        if ids.first <= ids.last { Ok(ids) } else { Err("the range ends before it begins") }
    }
}

/// What is allowed. By default everything is.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Whose processes may come; anybody's if empty.
    pub users: Vec<Ids>,
    /// Groups that they may be in beside those that these users are in here.
    pub groups: Vec<Ids>,
    /// Whether they must have given up gaining privileges by execve(2).
    pub no_new_privs: bool,
    /// Bytes of memory that one of them may bring.
    pub max_memory: Option<u64>,
    /// How many may come at the same time.
    pub max_migrations: Option<usize>,
}

impl Policy {
    /// Says whether root's processes may come, with all that they can do anyway.
    #[must_use]
    pub fn admits_root(&self) -> bool {
        self.users.is_empty() || contains(&self.users, 0)
    }

    /// Lists what a process asks for and does not get.
    fn check(&self, facts: &wire::ProcessFacts) -> Vec<Obstacle> {
        let mut obstacles = self.check_credentials(&facts.credentials);
        if facts.credentials.is_empty() && self.looks_at_credentials() {
            let text = "the source does not say whose it is, and the page server wants to know";
            obstacles.push(Obstacle::new("credentials", text, "run the same release on both hosts"));
        }
        if let Some(most) = self.max_memory.filter(|most| facts.memory_bytes > *most) {
            obstacles.push(too_large(facts.memory_bytes, most));
        }
        obstacles.extend(room::obstacle(facts.memory_bytes));
        if let (false, Some(creds)) = (self.admits_root(), facts.credentials.first()) {
            if facts.oom_score_adj < 0 {
                obstacles.push(not_for_users("oom_score_adj", "being spared when memory is short"));
            }
            let wanted = facts.files.iter().map(|file| {
                let access = match (file.directory, file.writable) {
                    (true, _) => AccessFlags::X_OK,
                    (false, true) => AccessFlags::W_OK,
                    (false, false) => AccessFlags::R_OK,
                };
                (file.path.clone(), access)
            });
            obstacles.extend(denied(creds, wanted.collect()));
        }
        obstacles
    }

    fn looks_at_credentials(&self) -> bool {
        !self.users.is_empty() || self.no_new_privs
    }

    fn check_credentials(&self, all: &[CredsEntry]) -> Vec<Obstacle> {
        let mut obstacles = Vec::new();
        let mut say = |resource: String, text: &str, remedy: &str| {
            let obstacle = Obstacle::new(resource, text, remedy);
            if !obstacles.contains(&obstacle) {
                obstacles.push(obstacle);
            }
        };
        for creds in all {
            if !self.users.is_empty() {
                let users: BTreeSet<u32> = [creds.uid, creds.euid, creds.suid, creds.fsuid].into();
                let text = "the page server does not take processes of this user";
                for user in users.iter().filter(|user| !contains(&self.users, **user)) {
                    say(format!("user {user}"), text, "start the page server with this user in --allow-uid");
                }
                for group in self.strange_groups(&users, creds) {
                    let text = "the page server does not take processes in this group: its users are not in it there";
                    say(format!("group {group}"), text, "start the page server with this group in --allow-gid");
                }
            }
            if !self.admits_root() && credentials::held(creds) != 0 {
                let which = format!("capabilities {:#x}", credentials::held(creds));
                let text = "the page server takes processes without capabilities only";
                say(which, text, "start the page server with 0 in --allow-uid");
            }
            if self.no_new_privs && creds.no_new_privs != Some(1) {
                let text = "it could gain privileges by set-user-ID programs, and the page server wants that given up";
                say("no_new_privs".to_owned(), text, "run it below setpriv --no-new-privs");
            }
        }
        obstacles
    }

    /// Groups that none of the users is in here, and that were not allowed.
    fn strange_groups(&self, users: &BTreeSet<u32>, creds: &CredsEntry) -> Vec<u32> {
        let wanted: BTreeSet<u32> =
            [creds.gid, creds.egid, creds.sgid, creds.fsgid].into_iter().chain(creds.groups.iter().copied()).collect();
        let mut strange: Vec<u32> = wanted.into_iter().filter(|group| !contains(&self.groups, *group)).collect();
        // Root is in all groups by its capabilities, if it may come at all.
        if users.contains(&0) && contains(&self.users, 0) {
            return Vec::new();
        }
        if !strange.is_empty() {
            // N.B. not those of root: who is not allowed lends nobody a group.
            let known: BTreeSet<u32> =
                users.iter().filter(|user| **user != 0).flat_map(|user| groups_here(*user)).collect();
            strange.retain(|group| !known.contains(group));
        }
        strange
    }
}

/// The groups that a user is in at this host; where nobody knows the user, the one of its own number.
fn groups_here(user: u32) -> Vec<u32> {
    let Ok(Some(entry)) = User::from_uid(Uid::from_raw(user)) else { return vec![user] };
    let name = CString::new(entry.name).unwrap_or_default();
    let all = nix::unistd::getgrouplist(&name, entry.gid).unwrap_or_else(|_| vec![entry.gid]);
    all.into_iter().map(Gid::as_raw).collect()
}

fn contains(ranges: &[Ids], id: u32) -> bool {
    ranges.iter().any(|range| (range.first..=range.last).contains(&id))
}

const LARGER: &str = "start the page server with a larger --max-memory";

/// More memory has come than is allowed.
#[derive(Debug, thiserror::Error)]
#[error("memory: it has more than the {} MiB that the page server takes (--max-memory)", most >> 20)]
pub(crate) struct TooMuch {
    most: u64,
}

impl TooMuch {
    /// What can be done about it.
    pub(crate) const REMEDY: &str = LARGER;
}

fn too_large(bytes: u64, most: u64) -> Obstacle {
    Obstacle::new(
        "memory",
        format!("it has {} MiB, and the page server takes {} MiB at most", bytes >> 20, most >> 20),
        LARGER,
    )
}

fn not_for_users(resource: &str, what: &str) -> Obstacle {
    let text = format!("the page server takes processes without privileges only, and {what} is one");
    Obstacle::new(resource, text, "start the page server with 0 in --allow-uid")
}

/// Names the files that somebody with these credentials may not open like this.
fn denied(creds: &CredsEntry, wanted: Vec<(String, AccessFlags)>) -> Vec<Obstacle> {
    let (user, group, groups) = (creds.fsuid, creds.fsgid, creds.groups.clone());
    // N.B. a thread of its own: it becomes that user and does not come back.
    let looking = std::thread::spawn(move || -> Result<Vec<String>, nix::Error> {
        privileges::act_as(user, group, &groups)?;
        let refused = |(path, access): &(String, AccessFlags)| {
            faccessat(AT_FDCWD, path.as_str(), *access, AtFlags::AT_EACCESS) == Err(nix::Error::EACCES)
        };
        Ok(wanted.into_iter().filter(refused).map(|(path, _)| path).collect())
    });
    let remedy = "give the user access to it, or start the page server with 0 in --allow-uid";
    match looking.join() {
        Ok(Ok(paths)) => paths
            .into_iter()
            .map(|path| Obstacle::new(path, format!("user {user} may not open it there"), remedy))
            .collect(),
        Ok(Err(errno)) => {
            vec![Obstacle::new(format!("user {user}"), format!("the page server cannot act as it: {errno}"), "")]
        }
        Err(_) => vec![Obstacle::new(format!("user {user}"), "the page server cannot act as it", "")],
    }
}

/// The policy, as one migration is held to it.
#[derive(Debug)]
pub(crate) struct Guard {
    policy: Policy,
    /// Who the process said it was.
    credentials: Vec<CredsEntry>,
    /// What has been written so far, in each space.
    written: HashMap<u32, PageSet>,
}

impl Guard {
    pub(crate) fn new(policy: Policy) -> Self {
        Self { policy, credentials: Vec::new(), written: HashMap::new() }
    }

    /// Looks at a process that might come.
    pub(crate) fn probe(&mut self, facts: &wire::ProcessFacts) -> Vec<Obstacle> {
        self.credentials.clone_from(&facts.credentials);
        self.policy.check(facts)
    }

    /// Looks at an address space before it is made.
    ///
    /// # Errors
    /// When it has what the policy forbids.
    pub(crate) fn layout(&self, mm: &MmEntry, objects: &[SharedObject]) -> Result<()> {
        if self.policy.admits_root() {
            return Ok(());
        }
        for object in objects {
            if object.mode & SETS_IDS != 0 || [object.uid, object.creator_uid].iter().any(|user| !self.allows(*user)) {
                bail!("{}: its owner or mode is not allowed by the page server (--allow-uid)", object.path);
            }
        }
        let read_write = |path: &str, writes: bool| {
            let access = if writes { AccessFlags::R_OK | AccessFlags::W_OK } else { AccessFlags::R_OK };
            (path.to_owned(), access)
        };
        let named = mm.vmas.iter().filter(|vma| vma.flags as i32 & libc::MAP_ANONYMOUS == 0);
        let writes = |flags: u32| flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
        let mapped = named.map(|vma| read_write(vma.name(), writes(vma.fdflags())));
        let shared = objects.iter().filter(|object| object.kind() == wire::shared_object::Kind::File);
        self.may_open(mapped.chain(shared.map(|object| read_write(&object.path, true))).collect())
    }

    /// Looks at files before they are opened.
    pub(crate) fn files(&self, files: &[FileEntry]) -> Result<()> {
        if self.policy.admits_root() {
            return Ok(());
        }
        let kinds = |file: &FileEntry| {
            let raw = file.isk.as_deref().is_some_and(|socket| socket.r#type == libc::SOCK_RAW as u32);
            raw || file.psk.is_some()
        };
        if files.iter().any(kinds) {
            bail!("a raw or packet socket is not allowed by the page server (--allow-uid)");
        }
        let wanted = files.iter().filter_map(|file| file.reg.as_deref()).filter(|file| file.object.is_none());
        let wanted = wanted.map(|file| {
            let flags = file.flags as i32;
            let is_path = flags & OFlag::O_PATH.bits() != 0;
            let access = match flags & libc::O_ACCMODE {
                _ if is_path => AccessFlags::F_OK,
                libc::O_WRONLY => AccessFlags::W_OK,
                libc::O_RDWR => AccessFlags::R_OK | AccessFlags::W_OK,
                _ => AccessFlags::R_OK,
            };
            let path = Path::new(&file.name);
            match path.parent() {
                // It is made, which is writing to its directory.
                Some(parent) if file.ext == Some(true) && !path.exists() => {
                    (parent.to_string_lossy().into_owned(), AccessFlags::W_OK | AccessFlags::X_OK)
                }
                _ => (file.name.clone(), access),
            }
        });
        self.may_open(wanted.collect())
    }

    fn allows(&self, user: u32) -> bool {
        self.policy.users.is_empty() || contains(&self.policy.users, user)
    }

    fn may_open(&self, wanted: Vec<(String, AccessFlags)>) -> Result<()> {
        let creds = self.credentials.first().ok_or_else(|| anyhow!("the source has not said whose the process is"))?;
        match denied(creds, wanted).first() {
            None => Ok(()),
            Some(obstacle) => bail!("{}: {}", obstacle.resource, obstacle.text),
        }
    }

    /// Counts pages before they are written.
    ///
    /// # Errors
    /// When they are more than are allowed.
    pub(crate) fn pages(&mut self, space: u32, address: u64, pages: u64) -> Result<()> {
        let Some(most) = self.policy.max_memory else { return Ok(()) };
        self.written.entry(space).or_default().insert(PageRange::from_pages(address, pages)?);
        let bytes = self.written.values().map(|set| set.pages().saturating_mul(PAGE_SIZE)).fold(0, u64::saturating_add);
        if bytes > most {
            return Err(TooMuch { most }.into());
        }
        Ok(())
    }

    /// Pages that have no content any more.
    pub(crate) fn dropped(&mut self, space: u32, ranges: impl Iterator<Item = (u64, u64)>) {
        let Some(written) = self.written.get_mut(&space) else { return };
        ranges
            .filter_map(|(start, pages)| PageRange::from_pages(start, pages).ok())
            .for_each(|range| written.remove(range));
    }

    /// Looks at the state that a process is to have, before it gets it.
    ///
    /// # Errors
    /// When it asks for more than the policy allows, whatever was said before.
    pub(crate) fn state(&mut self, last: &wire::Final) -> Result<()> {
        for range in last.missing.iter().flat_map(|missing| missing.ranges.iter().map(|range| (missing.space, range))) {
            self.pages(range.0, range.1.start, range.1.pages)?;
        }
        if !self.policy.looks_at_credentials() {
            return Ok(());
        }
        let threads = || last.leader.iter().chain(&last.threads).filter_map(|core| core.thread_core.as_ref());
        let all: Vec<CredsEntry> = threads().filter_map(|thread| thread.creds.clone()).collect();
        // Who says nothing of a thread would have it stay root.
        if all.len() != 1 + last.threads.len() {
            bail!("the source does not say whose each thread is, and the page server wants to know (--allow-uid)");
        }
        if let Some(Obstacle { resource, text, .. }) = self.policy.check_credentials(&all).into_iter().next() {
            bail!("{resource}: {text}");
        }
        if !self.policy.admits_root() {
            let ahead = |thread: &godwit_proto::image::ThreadCoreEntry| {
                thread.sched_policy.is_some_and(|policy| REAL_TIME.contains(&policy))
                    || thread.sched_nice.is_some_and(|nice| nice < 0)
            };
            if threads().any(ahead) {
                bail!("scheduling ahead of others is not allowed by the page server (--allow-uid)");
            }
            let process = last.leader.as_ref().and_then(|core| core.tc.as_ref());
            if process.is_some_and(|process| process.oom_score_adj.is_some_and(|adjusted| adjusted < 0)) {
                bail!("oom_score_adj: not allowed by the page server (--allow-uid)");
            }
        }
        // Files are opened for those whose the threads are now.
        self.credentials = all;
        self.layout(&last.mm.clone().unwrap_or_default(), &last.objects)?;
        self.files(&last.files)
    }
}

/// Takes a number of bytes: `512M`, `4G`, or a plain number.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let expected = || "expected a number of bytes, or one with K, M, G or T, such as 4G".to_owned();
    let (digits, shift) = match text.chars().last() {
        Some(unit) if unit.is_ascii_alphabetic() => {
            let shift = ["K", "M", "G", "T"].iter().position(|known| known.starts_with(unit.to_ascii_uppercase()));
            (&text[..text.len() - 1], 10 * (shift.ok_or_else(expected)? as u32 + 1))
        }
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| expected())?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn creds(user: u32, group: u32) -> CredsEntry {
        CredsEntry {
            uid: user,
            euid: user,
            suid: user,
            fsuid: user,
            gid: group,
            egid: group,
            sgid: group,
            fsgid: group,
            ..CredsEntry::default()
        }
    }

    fn users(text: &str) -> Policy {
        Policy { users: text.split(',').map(|ids| ids.parse().unwrap()).collect(), ..Policy::default() }
    }

    fn names(policy: &Policy, creds: CredsEntry) -> Vec<String> {
        policy.check_credentials(&[creds]).into_iter().map(|obstacle| obstacle.resource).collect()
    }

    #[test]
    fn sizes_and_ranges_are_read() {
        assert_eq!([bytes("1"), bytes("2k"), bytes("3G")].map(Result::unwrap), [1, 2048, 3 << 30]);
        for text in ["", "0", "G", "1X", "-1", "99999999999T", "1.5G", "ä"] {
            assert!(bytes(text).is_err(), "{text}");
        }
        assert!("5".parse::<Ids>().is_ok() && "5-7".parse::<Ids>().is_ok());
        for text in ["", "7-5", "a", "1-", "-1", "4294967296"] {
            assert!(text.parse::<Ids>().is_err(), "{text}");
        }
    }

    #[test]
    fn without_limits_anybody_comes() {
        let policy = Policy::default();
        assert!(policy.admits_root());
        assert!(names(&policy, CredsEntry { cap_eff: vec![u32::MAX; 2], ..creds(0, 0) }).is_empty());
    }

    #[test]
    fn every_id_counts() {
        let policy = users("70001-70009");
        assert!(names(&policy, creds(70005, 70005)).is_empty());
        assert_eq!(names(&policy, creds(0, 70005)), ["user 0", "group 70005"]);
        assert_eq!(names(&policy, CredsEntry { suid: 0, ..creds(70001, 70001) }), ["user 0"]);
        assert_eq!(names(&policy, CredsEntry { fsuid: 70010, ..creds(70001, 70001) }), ["user 70010"]);
        assert_eq!(names(&policy, CredsEntry { egid: 0, ..creds(70001, 70001) }), ["group 0"]);
        assert_eq!(names(&policy, CredsEntry { groups: vec![70002], ..creds(70001, 70001) }), ["group 70002"]);
        let policy = Policy { groups: vec!["70002".parse().unwrap()], ..policy };
        assert!(names(&policy, CredsEntry { groups: vec![70002], ..creds(70001, 70001) }).is_empty());
    }

    #[test]
    fn capabilities_need_root() {
        for set in [
            CredsEntry { cap_prm: vec![1], ..creds(70001, 70001) },
            CredsEntry { cap_inh: vec![0, 1], ..creds(70001, 70001) },
            CredsEntry { cap_amb: vec![1], ..creds(70001, 70001) },
        ] {
            assert_eq!(names(&users("70001"), set.clone()).len(), 1);
            assert!(names(&users("0,70001"), set).is_empty());
        }
        // What set-user-ID programs could give is the user's anyway, unless it is to be given up.
        let usual = CredsEntry { cap_bnd: vec![u32::MAX; 2], ..creds(70001, 70001) };
        assert!(names(&users("70001"), usual.clone()).is_empty());
        let strict = Policy { no_new_privs: true, ..users("70001") };
        assert_eq!(names(&strict, usual.clone()), ["no_new_privs"]);
        assert!(names(&strict, CredsEntry { no_new_privs: Some(1), ..usual }).is_empty());
    }

    #[test]
    fn a_source_that_says_another_thing_later_is_found_out() {
        use godwit_proto::image::{CoreEntry, ThreadCoreEntry};
        let core = |creds: Option<CredsEntry>| CoreEntry {
            thread_core: Some(ThreadCoreEntry { creds, ..ThreadCoreEntry::default() }),
            ..CoreEntry::default()
        };
        let state = |leader, threads| wire::Final { leader: Some(core(leader)), threads, ..wire::Final::default() };
        let honest = creds(70001, 70001);
        let mut guard = Guard::new(users("70001"));
        assert!(
            guard.probe(&wire::ProcessFacts { credentials: vec![honest.clone()], ..Default::default() }).is_empty()
        );
        guard.state(&state(Some(honest.clone()), vec![core(Some(honest.clone()))])).unwrap();
        assert!(guard.state(&state(Some(creds(0, 0)), vec![])).is_err());
        assert!(guard.state(&state(None, vec![])).is_err());
        assert!(guard.state(&state(Some(honest.clone()), vec![core(None)])).is_err());
        assert!(guard.state(&state(Some(honest.clone()), vec![core(Some(creds(0, 0)))])).is_err());
        let file = |name: &str| {
            let reg = godwit_proto::image::RegFileEntry {
                name: name.into(),
                flags: libc::O_RDWR as u32,
                ..Default::default()
            };
            wire::Final {
                files: vec![FileEntry { reg: Some(reg.into()), ..Default::default() }],
                ..state(Some(honest.clone()), vec![])
            }
        };
        guard.state(&file("/dev/null")).unwrap();
        let error = guard.state(&file("/etc/shadow")).unwrap_err().to_string();
        assert!(error.contains("/etc/shadow"), "{error}");
        let ghost = SharedObject { mode: 0o4755, uid: 70001, creator_uid: 70001, ..SharedObject::default() };
        assert!(guard.layout(&MmEntry::default(), &[ghost]).is_err());
    }

    #[test]
    fn memory_is_counted_once_for_each_page() {
        let mut guard = Guard::new(Policy { max_memory: Some(8 * PAGE_SIZE), ..Policy::default() });
        for _ in 0..4 {
            guard.pages(0, 0, 8).unwrap();
        }
        assert!(guard.pages(1, 0, 1).is_err());
        guard.dropped(1, [(0, 1)].into_iter());
        guard.dropped(0, [(0, 4)].into_iter());
        guard.pages(1, PAGE_SIZE, 4).unwrap();
        let missing = wire::PageRanges { space: 0, ranges: vec![wire::Range { start: 0, pages: u64::MAX }] };
        assert!(guard.state(&wire::Final { missing: vec![missing], ..wire::Final::default() }).is_err());
    }
}
