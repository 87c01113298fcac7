//! The first look at a process: from outside, while it runs, changing nothing.

use super::stop::{Result, Stop};
use crate::request::Request;
use godwit_network::Translation;
use godwit_proto::image::{CoreEntry, FileEntry, PstreeEntry};
use godwit_proto::wire as messages;
use godwit_resources::descriptors::{self, Externals, Survey};
use godwit_resources::identity::{self, Numbering};
use godwit_resources::{Obstacle, files, host, memory};

/// What was seen.
#[derive(Debug)]
pub(super) struct Inspected {
    /// What stands in the way.
    pub(super) obstacles: Vec<Obstacle>,
    /// What the user should know.
    pub(super) warnings: Vec<String>,
    /// What the destination must know.
    pub(super) facts: messages::ProcessFacts,
    /// Its threads, as we see them.
    pub(super) outer_tids: Vec<i32>,
    /// Translates thread ids.
    pub(super) numbering: Numbering,
    /// Its descriptors.
    pub(super) survey: Survey,
    /// What the user wants done about them.
    pub(super) externals: Externals,
    /// How far its monotonic and boottime clocks are ahead of ours, in nanoseconds.
    ahead: (i64, i64),
}

/// Clocks closer than this are the same clock: the measurement is no better.
const SAME_CLOCK_NS: i64 = 2_000_000;

/// The process that a thread is of, unless it leads it.
fn process_of_thread(tid: i32) -> Option<u64> {
    let process = godwit_tracee::read_status(tid).ok()?.number("Tgid")?;
    (process != tid as u64).then_some(process)
}

/// Looks at a process.
///
/// # Errors
/// When there is no such process.
pub(super) fn look_at(request: &Request) -> Result<Inspected> {
    let pid = request.pid;
    if !std::path::Path::new(&format!("/proc/{pid}")).exists() {
        return Err(Stop::Refused(vec![Obstacle::new(format!("process {pid}"), "there is no such process", "")]));
    }
    if let Some(process) = process_of_thread(pid) {
        let text = format!("is a thread of process {process}, which moves with all of them");
        return Err(Stop::Refused(vec![Obstacle::new(format!("thread {pid}"), text, "name the process")]));
    }
    let identity = identity::inspect(pid)?;
    let externals = Externals::parse(&request.external)?;
    let mut survey = descriptors::inspect(pid, &externals)?;
    let mut facts = messages::ProcessFacts::default();
    identity.facts.fill(&mut facts);
    let mut obstacles = identity.obstacles;
    obstacles.append(&mut survey.obstacles);
    let mut warnings = identity.warnings;
    warnings.append(&mut survey.warnings);
    obstacles.extend(memory::inspect(pid)?);
    obstacles.extend(godwit_resources::filesystem::executable_obstacle(facts.exe.as_bytes()));
    (facts.sysv_ids, facts.sysv_keys) = memory::segments::attached(pid)?.into_iter().unzip();
    facts.aio_rings = memory::aio::ring_lengths(pid)?;
    facts.files.extend(files::mapped(pid)?);
    facts.files.append(&mut survey.files);
    Ok(Inspected {
        obstacles,
        warnings,
        facts,
        outer_tids: identity.facts.outer_tids,
        numbering: identity.numbering,
        survey,
        externals,
        ahead: (identity.facts.monotonic_ahead_ns, identity.facts.boottime_ahead_ns),
    })
}

impl Inspected {
    /// What the destination must add to its clocks (monotonic, boottime) so that the process sees them go on.
    pub(super) fn clock_offsets(&self, theirs: &messages::ClockPong) -> (i64, i64) {
        // Both of our clocks are read together; the round trip's middle is the moment the answer belongs to.
        let boottime_behind = host::clock_ns(libc::CLOCK_BOOTTIME) - host::clock_ns(libc::CLOCK_MONOTONIC);
        // N.B. these are the peer's words: they may be any number.
        let monotonic = theirs.sent_ns.saturating_sub(theirs.monotonic_ns).saturating_add(self.ahead.0);
        let boottime = (theirs.sent_ns.saturating_add(boottime_behind).saturating_sub(theirs.boottime_ns))
            .saturating_add(self.ahead.1);
        let significant = monotonic.saturating_abs() > SAME_CLOCK_NS || boottime.saturating_abs() > SAME_CLOCK_NS;
        if significant { (monotonic, boottime) } else { (0, 0) }
    }

    /// The order to build the stub.
    pub(super) fn prepare(&self, layout: messages::Layout, translation: &Translation) -> messages::Prepare {
        const EXE_FILE_ID: u32 = u32::MAX;
        let facts = &self.facts;
        let exe = FileEntry {
            r#type: godwit_proto::image::FdTypes::Reg.into(),
            id: EXE_FILE_ID,
            reg: Some(Box::new(godwit_proto::image::RegFileEntry {
                id: EXE_FILE_ID,
                name: facts.exe.clone(),
                ..Default::default()
            })),
            ..FileEntry::default()
        };
        let mut mm = layout.mm;
        if let Some(mm) = &mut mm {
            mm.exe_file_id = EXE_FILE_ID;
        }
        messages::Prepare {
            leader: Some(CoreEntry::default()),
            tids: facts.tids.iter().copied().filter(|&tid| tid != facts.pid).collect(),
            mm,
            objects: layout.objects,
            process: Some(PstreeEntry { pid: facts.pid, ..PstreeEntry::default() }),
            files: vec![exe],
            seccomp: None,
            monotonic_offset_ns: facts.monotonic_offset_ns,
            boottime_offset_ns: facts.boottime_offset_ns,
            highest_descriptor: u32::try_from(self.survey.highest).unwrap_or_default(),
            watched: Some(descriptors::watched_message(&self.survey.network, translation)),
        }
    }
}
