//! Who a process is among others: its numbers, namespaces, relatives, tracer and label; and whether that lets it move.
//!
//! Everything here is read from /proc of a process that runs undisturbed. All obstacles are listed, not just the first.
//! Descriptors and memory are inspected by the modules that own them.

pub(crate) mod namespaces;
pub(crate) mod numbers;
mod relatives;

pub use numbers::{Group, Numbering};
pub(crate) use relatives::processes;

use crate::filesystem::{self, Place};
use crate::{Obstacle, Result, credentials, limits, scheduling};
use godwit_proto::image::CredsEntry;
use godwit_proto::wire::{ProcessFacts, ResourceLimit};
use godwit_tracee::{Status, read_status};
use std::os::unix::ffi::OsStrExt;

/// `PF_KTHREAD` in the flags of proc_pid_stat(5).
const KERNEL_THREAD: u64 = 0x0020_0000;
/// `e_ident[EI_CLASS]` of a 64-bit program.
const ELF_CLASS_64: u8 = 2;

/// What a look at a running process yields.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// What keeps it from being moved.
    pub obstacles: Vec<Obstacle>,
    /// What will be different afterwards, one sentence each.
    pub warnings: Vec<String>,
    /// What the destination must know.
    pub facts: Facts,
    /// Translates thread ids.
    pub numbering: Numbering,
}

/// Facts about a running process.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Process id as it sees it itself.
    pub pid: i32,
    /// Its thread ids as it sees them itself, the leader's first.
    pub tids: Vec<i32>,
    /// The same threads as this process sees them.
    pub outer_tids: Vec<i32>,
    /// Name in listings.
    pub comm: String,
    /// Program file.
    pub exe: Vec<u8>,
    /// Working and root directory.
    pub place: Place,
    /// Resource limits.
    pub limits: Vec<ResourceLimit>,
    /// CPUs that its threads may use.
    pub cpus: Vec<u32>,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Who its threads are, each combination once.
    pub credentials: Vec<CredsEntry>,
    /// /proc/PID/oom_score_adj.
    pub oom_score_adj: i32,
    /// Bytes of its memory that have content of their own, as far as the kernel has counted.
    pub memory_bytes: u64,
    /// How far its CLOCK_MONOTONIC is ahead of this process's, in nanoseconds.
    pub monotonic_ahead_ns: i64,
    /// How far its CLOCK_BOOTTIME is ahead of this process's, in nanoseconds.
    pub boottime_ahead_ns: i64,
}

impl Facts {
    /// Fills in what a probe says of the process itself.
    pub fn fill(&self, facts: &mut ProcessFacts) {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        facts.pid = self.pid as u32;
        facts.tids = self.tids.iter().map(|&tid| tid as u32).collect();
        facts.exe = text(&self.exe);
        facts.cwd = text(&self.place.cwd);
        facts.root = text(&self.place.root);
        facts.limits = self.limits.clone();
        facts.affinity_cpus = self.cpus.clone();
        facts.oom_score_adj = self.oom_score_adj;
        facts.comm = self.comm.clone();
        facts.uid = self.uid;
        facts.gid = self.gid;
        facts.memory_bytes = self.memory_bytes;
        facts.credentials.clone_from(&self.credentials);
    }
}

/// Looks once more when a process is stopped: it may have forked since.
///
/// # Errors
/// [`crate::Error::Obstacle`] when it has children.
pub fn look_again(tracee: &godwit_tracee::Tracee) -> Result<()> {
    relatives::refuse_children(tracee.pid(), tracee.threads().iter().map(|thread| thread.tid))
}

/// Looks at a running process.
///
/// # Errors
/// When it does not exist or ends meanwhile.
pub fn inspect(pid: i32) -> Result<Inspection> {
    let status = read_status(pid)?;
    let mut obstacles = Vec::new();
    let mut warnings = Vec::new();
    if is_no_program(pid, &status, &mut obstacles) {
        let (facts, numbering) = (Facts { pid, ..Facts::default() }, Numbering::default());
        return Ok(Inspection { obstacles, warnings, facts, numbering });
    }
    let mut numbering = Numbering::read(pid, &status)?;
    let (outer_tids, tids) = number_threads(pid, &mut numbering)?;
    let group = Group::read(pid)?;
    let place = filesystem::directories(pid)?;

    inspect_program(pid, &mut obstacles);
    inspect_status(pid, &status, &mut obstacles);
    namespaces::inspect(pid, tids[0], &mut obstacles)?;
    relatives::inspect(pid, &outer_tids, group.parent, &mut obstacles)?;
    for &tid in &outer_tids {
        inspect_thread(pid, tid, &mut obstacles);
    }
    obstacles.extend(filesystem::obstacles(&place));
    inspect_label(pid, &mut warnings);
    if group.terminal != 0 {
        warnings.push("it will have no controlling terminal at the destination".to_owned());
    }
    if group.session != pid {
        warnings.push("it will be the leader of a session of its own at the destination".to_owned());
    }
    let (monotonic_ahead_ns, boottime_ahead_ns) = namespaces::clocks_ahead(pid)?;
    let effective = |field: &str| status.numbers(field).get(1).copied().unwrap_or(0) as u32;
    let facts = Facts {
        pid: tids[0],
        tids,
        comm: status.text("Name").to_owned(),
        exe: std::fs::read_link(format!("/proc/{pid}/exe"))
            .map(|exe| exe.as_os_str().as_bytes().to_vec())
            .unwrap_or_default(),
        place,
        limits: limits::inspect(pid)?,
        cpus: scheduling::inspect(&outer_tids),
        credentials: credentials::inspect(&outer_tids),
        outer_tids,
        uid: effective("Uid"),
        gid: effective("Gid"),
        oom_score_adj: read(pid, "oom_score_adj").trim().parse().unwrap_or(0),
        memory_bytes: ["RssAnon", "RssShmem", "VmSwap"]
            .iter()
            .map(|field| status.number(field).unwrap_or(0).saturating_mul(1024))
            .fold(0, u64::saturating_add),
        monotonic_ahead_ns,
        boottime_ahead_ns,
    };
    Ok(Inspection { obstacles, warnings, facts, numbering })
}

/// Lists the threads of a process as we and as it itself see them; one that ends meanwhile is left out.
fn number_threads(pid: i32, numbering: &mut Numbering) -> Result<(Vec<i32>, Vec<i32>)> {
    let (mut outer, mut inner) = (Vec::new(), Vec::new());
    for tid in relatives::threads(pid)? {
        match numbering.inner(pid, tid) {
            Ok(number) => {
                outer.push(tid);
                inner.push(number);
            }
            Err(_) if tid != pid && !std::path::Path::new(&format!("/proc/{pid}/task/{tid}")).exists() => {}
            Err(error) => return Err(error),
        }
    }
    Ok((outer, inner))
}

/// Lists what this host cannot give a process, which it must know before the process is touched.
///
/// # Errors
/// When /proc is not there.
pub fn check(facts: &ProcessFacts) -> Result<Vec<Obstacle>> {
    let mut obstacles = limits::check(&facts.limits)?;
    let capabilities = crate::credentials::own_capabilities()?;
    for (capability, what) in [(6, "CAP_SETGID"), (7, "CAP_SETUID"), (8, "CAP_SETPCAP")] {
        if capabilities.permitted & 1 << capability == 0 {
            obstacles.push(Obstacle::new(
                format!("user {}", facts.uid),
                format!("the page server cannot become it without {what}"),
                "run the page server as root",
            ));
        }
    }
    for (map, id, what) in [("uid_map", facts.uid, "user"), ("gid_map", facts.gid, "group")] {
        if !namespaces::maps(&read_own(map), id) {
            let text = "does not exist in the page server's user namespace";
            obstacles.push(Obstacle::new(
                format!("{what} {id}"),
                text,
                "run the page server in the host's user namespace",
            ));
        }
    }
    Ok(obstacles)
}

/// Names the CPUs that a process may use at the source and that this host does not have.
///
/// # Errors
/// When /proc is not there.
pub fn missing_cpus(facts: &ProcessFacts) -> Result<Vec<u32>> {
    let available = scheduling::available_cpus()?;
    Ok(facts.affinity_cpus.iter().copied().filter(|cpu| !available.contains(cpu)).collect())
}

fn read(pid: i32, file: &str) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default()
}

fn read_own(file: &str) -> String {
    std::fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default()
}

/// Finds out whether there is anything to inspect at all.
fn is_no_program(pid: i32, status: &Status, obstacles: &mut Vec<Obstacle>) -> bool {
    let name = format!("process {pid} ({})", status.text("Name"));
    let leader = status.number("Tgid").map(|tgid| tgid as i32);
    let flags = read(pid, "stat").rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(6)?.parse::<u64>().ok());
    if leader != Some(pid) {
        let remedy = format!("name the process: {}", leader.unwrap_or(0));
        obstacles.push(Obstacle::new(name, "is a thread of another process", remedy));
    } else if flags.unwrap_or(0) & KERNEL_THREAD != 0 {
        obstacles.push(Obstacle::new(name, "is a thread of the kernel", ""));
    } else if pid == std::process::id() as i32 {
        obstacles.push(Obstacle::new(name, "is this program itself", ""));
    } else if matches!(status.state(), 'Z' | 'X') {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        let text = if threads > 1 { "its main thread has ended while others run" } else { "has ended (zombie)" };
        obstacles.push(Obstacle::new(name, text, ""));
    } else {
        return false;
    }
    true
}

fn inspect_program(pid: i32, obstacles: &mut Vec<Obstacle>) {
    use std::io::Read;
    let mut identification = [0; 5];
    let opened = std::fs::File::open(format!("/proc/{pid}/exe"));
    let read = opened.and_then(|mut exe| exe.read_exact(&mut identification));
    if read.is_ok() && identification.starts_with(b"\x7fELF") && identification[4] != ELF_CLASS_64 {
        obstacles.push(Obstacle::new(format!("process {pid}"), "is a 32-bit program", "move a 64-bit build of it"));
    }
}

fn inspect_status(pid: i32, status: &Status, obstacles: &mut Vec<Obstacle>) {
    let name = || format!("process {pid}");
    match status.number("TracerPid") {
        None | Some(0) => {}
        Some(tracer) => obstacles.push(Obstacle::new(
            name(),
            format!("is traced by process {tracer} ({})", read(tracer as i32, "comm").trim()),
            "detach the debugger",
        )),
    }
    if status.text("x86_Thread_features").split_whitespace().any(|feature| feature == "shstk") {
        let remedy = "run it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off";
        obstacles.push(Obstacle::new(name(), "uses a shadow stack", remedy));
    }
    if status.number("CoreDumping").unwrap_or(0) != 0 {
        obstacles.push(Obstacle::new(name(), "is dumping core", ""));
    }
}

fn inspect_thread(pid: i32, tid: i32, obstacles: &mut Vec<Obstacle>) {
    // A thread that has ended meanwhile is no obstacle.
    let Ok(status) = read_status(tid) else { return };
    let name = || if tid == pid { format!("process {pid}") } else { format!("thread {tid}") };
    if status.number("Seccomp") == Some(1) {
        obstacles.push(Obstacle::new(name(), "is in strict seccomp mode", ""));
    }
    if status.state() == 'D' && blocked_for_long(tid) {
        obstacles.push(Obstacle::new(
            name(),
            format!("is blocked inside the kernel ({})", read(tid, "wchan")),
            "wait until its device or file server answers",
        ));
    }
}

/// Whether a thread stays in one and the same uninterruptible sleep. A thread that waits for its disk again and again is
/// busy, not blocked: it stops between two waits.
fn blocked_for_long(tid: i32) -> bool {
    const LOOKS: u32 = 25;
    const EVERY: std::time::Duration = std::time::Duration::from_millis(20);
    let sleep = || {
        let status = read_status(tid).ok().filter(|status| status.state() == 'D')?;
        status.number("voluntary_ctxt_switches")
    };
    let Some(first) = sleep() else { return false };
    (0..LOOKS).all(|_| {
        std::thread::sleep(EVERY);
        sleep() == Some(first)
    })
}

/// Security modules have their own ideas of who may do what; labels are not moved.
fn inspect_label(pid: i32, warnings: &mut Vec<String>) {
    let label = |text: String| text.trim_end_matches(['\n', '\0']).to_owned();
    let (theirs, ours) = (label(read(pid, "attr/current")), label(read_own("attr/current")));
    if theirs != ours && !theirs.is_empty() && theirs != "unconfined" {
        warnings.push(format!("its security label {theirs:?} is not moved"));
    }
}
