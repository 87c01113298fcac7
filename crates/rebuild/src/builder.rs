//! The builder: one process on its way into being.

use crate::address_space::AddressSpace;
use crate::birth::{self, Clocks};
use crate::missing::{self, Missing};
use crate::objects::Objects;
use crate::{Error, Result, marks};
use godwit_pages::{PageRange, PageSet};
use godwit_proto::image::{CoreEntry, MmEntry, PstreeEntry, SeccompEntry, VmaEntry};
use godwit_proto::magics;
use godwit_proto::wire::{self, SharedObject};
use godwit_resources::descriptors::{self, Courier, Descriptors};
use godwit_resources::filesystem::Place;
use godwit_resources::memory::aio;
use godwit_resources::{threads, timers};
use godwit_tracee::{Batch, Tracee};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// Most threads that a process may ask for.
const MAX_THREADS: usize = 65_536;
/// Room for the scratch mapping, also when a large batch has made it grow.
const SCRATCH_ROOM: u64 = 4 << 20;

/// What was decided about a process before it is built.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Whether it gets a PID namespace of its own even if its ids are free.
    pub new_pid_namespace: bool,
    /// How its clocks differ from ours.
    pub clocks: Clocks,
}

/// A process being built.
#[derive(Debug)]
pub struct Builder {
    tracee: Tracee,
    courier: Courier,
    ahead: descriptors::Ahead,
    /// Ids of the threads: as the process itself sees them, as we see them.
    tids: HashMap<i32, i32>,
    pid: i32,
    space: AddressSpace,
    objects: Objects,
    filled: PageSet,
    new_pid_namespace: bool,
    exe: Option<String>,
    child: i32,
    init: birth::Init,
}

/// Where the vdso must lie: at the lowest of the areas that belong to it.
pub(crate) fn vdso_address(areas: &[VmaEntry]) -> Option<u64> {
    let special = |area: &&VmaEntry| area.status & (magics::VMA_AREA_VDSO | magics::VMA_AREA_VVAR) != 0;
    let has_code = areas.iter().any(|area| area.status & magics::VMA_AREA_VDSO != 0);
    has_code.then(|| areas.iter().filter(special).map(|area| area.start).min()).flatten()
}

impl Builder {
    /// Makes the stub: pid and tids reserved, address space laid out, nothing in it yet.
    ///
    /// # Errors
    /// When an id is out of range, a file is missing or the state makes no sense. Nothing is left behind.
    pub fn prepare(prepare: &wire::Prepare, plan: Plan) -> Result<Self> {
        let pid = prepare.process.as_ref().map_or(0, |process| process.pid) as i32;
        if pid < 2 {
            return Err(Error::state("process", format!("a process cannot have pid {pid}")));
        }
        if prepare.tids.len() >= MAX_THREADS {
            return Err(Error::state("process", format!("{} threads are too many", prepare.tids.len())));
        }
        let tids: Vec<i32> = prepare.tids.iter().map(|&tid| tid as i32).collect();
        let mm = prepare.mm.clone().unwrap_or_default();
        AddressSpace::check(&mm.vmas)?;
        let birth = birth::give_birth(pid, &tids, plan.new_pid_namespace, plan.clocks)?;
        let mut tracee = birth.tracee;
        threads::offer_to_oom_killer(tracee.pid());
        threads::prepare(&mut tracee, prepare.leader.as_ref().unwrap_or(&CoreEntry::default()))?;
        let scratch = AddressSpace::gap(&mm.vmas, SCRATCH_ROOM)
            .ok_or_else(|| Error::state("address space", "it has no room for a scratch mapping"))?;
        birth::clear(&mut tracee, scratch, vdso_address(&mm.vmas))?;
        let exe = prepare
            .files
            .iter()
            .find(|file| file.id == mm.exe_file_id)
            .and_then(|file| file.reg.as_deref())
            .map(|file| file.name.clone());
        let mut builder = Self {
            tracee,
            courier: birth.courier,
            ahead: descriptors::Ahead::default(),
            tids: birth.tids.into_iter().collect(),
            pid,
            space: AddressSpace::default(),
            objects: Objects::default(),
            filled: PageSet::new(),
            new_pid_namespace: birth.new_pid_namespace,
            exe,
            child: birth.child,
            init: birth.init,
        };
        builder.courier.make_room(&mut builder.tracee, prepare.highest_descriptor)?;
        builder.layout(&mm, &prepare.objects)?;
        builder.check_vdso(&mm)?;
        Ok(builder)
    }

    /// Pid of the stub as the process itself will see it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.tracee.pid()
    }

    /// Whether it got a PID namespace of its own.
    #[must_use]
    pub fn has_new_pid_namespace(&self) -> bool {
        self.new_pid_namespace
    }

    /// Follows a change of layout.
    ///
    /// # Errors
    /// When the layout is not one that a process can have, or a file is not here.
    pub fn layout(&mut self, mm: &MmEntry, objects: &[SharedObject]) -> Result<()> {
        self.objects.follow(objects)?;
        self.space.reconcile(&mut self.tracee, &mm.vmas, &self.objects)
    }

    fn check_vdso(&self, mm: &MmEntry) -> Result<()> {
        let here = godwit_tracee::read_maps(self.tracee.pid())?;
        let special = magics::VMA_AREA_VDSO | magics::VMA_AREA_VVAR;
        if vdso_address(&mm.vmas).is_none() {
            return Ok(());
        }
        for area in mm.vmas.iter().filter(|area| area.status & special != 0) {
            let same = |vma: &godwit_tracee::Vma| vma.start == area.start && vma.end == area.end;
            if !here.iter().any(same) {
                return Err(Error::state(area.name().to_owned(), "this kernel lays it out differently"));
            }
        }
        Ok(())
    }

    /// Writes pages.
    ///
    /// # Errors
    /// [`Error::Unmapped`] where the process has nothing mapped.
    pub fn write_pages(&mut self, space: u32, address: u64, bytes: &[u8]) -> Result<()> {
        if space != 0 {
            return self.objects.get(space)?.write(address, bytes);
        }
        let range = PageRange::enclosing(address, address.saturating_add(bytes.len() as u64))
            .ok_or(Error::Unmapped { space, address })?;
        self.space.write(&self.tracee, &self.objects, address, bytes)?;
        self.filled.insert(range);
        Ok(())
    }

    /// Forgets pages that have no content at the source any more; `ranges` are pairs of start and number of pages.
    ///
    /// # Errors
    /// When they cannot be dropped.
    pub fn drop_pages(&mut self, space: u32, ranges: impl Iterator<Item = (u64, u64)>) -> Result<()> {
        let mut batch = Batch::new();
        for (start, pages) in ranges {
            let range = PageRange::from_pages(start, pages)
                .map_err(|error| Error::state("pages to be dropped", error.to_string()))?;
            if space != 0 {
                self.objects.get(space)?.punch(range.start(), range.len())?;
                continue;
            }
            // What was unmapped since is gone already.
            for part in self.filled.intersect_range(range).iter() {
                for (area, start, end) in self.space.pieces(part.start(), part.end()) {
                    match area.object.filter(|_| area.flags as i32 & libc::MAP_SHARED != 0) {
                        Some(number) => {
                            self.objects.get(number)?.punch(area.pgoff + (start - area.start), end - start)?
                        }
                        None => {
                            let advice = [start.into(), (end - start).into(), libc::MADV_DONTNEED.into()];
                            batch.call("dropping pages", libc::SYS_madvise, &advice);
                        }
                    }
                }
            }
            self.filled.remove(range);
        }
        if !batch.is_empty() {
            self.tracee.run(batch)?;
        }
        Ok(())
    }

    /// Makes connections that the source has taken apart, while it goes on with others. What cannot be made yet is made at the end.
    ///
    /// # Errors
    /// When this program can have no more sockets.
    pub fn make_ahead(&mut self, streams: wire::Streams) -> Result<()> {
        Ok(self.ahead.add(streams)?)
    }

    /// Whether it has connections, as far as is known.
    #[must_use]
    pub fn has_connections(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Completes the process: everything but letting it run.
    ///
    /// # Errors
    /// When a resource cannot be made here. Nothing is left behind.
    pub fn finish(mut self, mut state: wire::Final) -> Result<Launch> {
        let mm = state.mm.take().unwrap_or_default();
        let (place, seccomp, process) = surroundings(&state)?;
        // N.B. moved, not copied: there may be very many descriptors.
        let held = Descriptors {
            fdinfo: std::mem::take(&mut state.descriptors),
            files: std::mem::take(&mut state.files),
            pipes: std::mem::take(&mut state.pipes),
            sockets: std::mem::take(&mut state.sockets),
            losses: Vec::new(),
        };
        let state = &state;
        let leader = state.leader.as_ref().ok_or_else(|| Error::state("process", "nothing about its leader"))?;
        self.layout(&mm, &state.objects)?;
        let outer = self.follow_threads(state)?;
        self.objects.finish()?;
        self.space.lock(&mut self.tracee)?;
        self.install_guards(&ranges(&state.guards)?)?;
        marks::set(&mut self.tracee, &mm, self.exe.as_deref())?;
        let rebuilt_descriptors = self.rebuild_descriptors(&held, clocks(state))?;
        // N.B. while the memory that polls are described in is there.
        aio::rebuild(&mut self.tracee, &mm.aios)?;
        self.lock_future(&mm)?;
        let missing = self.take_away_missing(state)?;
        self.courier.close(&mut self.tracee)?;
        let image = threads::Image {
            leader,
            threads: &state.threads,
            tids: &state.tids,
            process: &process,
            seccomp: &seccomp,
            place: &place,
            dumpable: mm.dumpable.unwrap_or(1),
            thp_disabled: mm.thp_disabled.unwrap_or(false),
            clocks: clocks(state),
        };
        let rebuilt = threads::rebuild(&mut self.tracee, image, &outer)?;
        let missing = missing.map(|missing| missing.register(&mut self.tracee)).transpose()?;
        self.tracee.drop_scratch()?;
        for (core, &tid) in std::iter::once(leader).chain(&state.threads).zip(&outer) {
            let last = threads::final_state(&self.tracee, tid, core, rebuilt)?;
            self.tracee.set_state(tid, &last)?;
        }
        Ok(Launch {
            tracee: self.tracee,
            objects: self.objects,
            descriptors: rebuilt_descriptors,
            leader: leader.clone(),
            draining: missing.is_some(),
            missing,
            child: self.child,
            init: self.init,
            huge: ranges(&state.huge)?,
        })
    }

    /// Makes and ends threads until the stub has those that the process had when it was stopped.
    /// Returns their ids as we see them, the leader's first, then in the order of the message.
    fn follow_threads(&mut self, state: &wire::Final) -> Result<Vec<i32>> {
        let wanted: Vec<i32> = std::iter::once(self.pid).chain(state.tids.iter().map(|&tid| tid as i32)).collect();
        if wanted.len() > MAX_THREADS || state.threads.len() != state.tids.len() {
            return Err(Error::state("threads", "the lists of threads do not fit together"));
        }
        let ended: Vec<i32> = self.tids.keys().copied().filter(|tid| !wanted.contains(tid)).collect();
        for tid in ended {
            if let Some(ours) = self.tids.remove(&tid) {
                self.tracee.end_thread(ours)?;
            }
        }
        let mut outer = Vec::with_capacity(wanted.len());
        for tid in wanted {
            outer.push(match self.tids.entry(tid) {
                Entry::Occupied(entry) => *entry.get(),
                Entry::Vacant(entry) => *entry.insert(self.tracee.spawn_thread(tid)?),
            });
        }
        Ok(outer)
    }

    fn rebuild_descriptors(&mut self, held: &Descriptors, collected: timers::Clocks) -> Result<descriptors::Rebuilt> {
        let objects = &self.objects;
        let lend = |number| objects.descriptor(number);
        let destination = descriptors::Destination { objects: &lend, collected };
        let ahead = std::mem::take(&mut self.ahead);
        Ok(descriptors::rebuild(&mut self.tracee, &mut self.courier, held, ahead, &destination)?)
    }

    /// Has mappings still to come locked in memory (mlockall(2)).
    fn lock_future(&mut self, mm: &MmEntry) -> Result<()> {
        let Some(flags) = mm.lock_future else { return Ok(()) };
        let mut batch = Batch::new();
        batch.call("mlockall", libc::SYS_mlockall, &[flags.into()]);
        self.tracee.run(batch)?;
        Ok(())
    }

    /// Makes pages fault when touched again (madvise(2), `MADV_GUARD_INSTALL`, Linux 6.13).
    fn install_guards(&mut self, guards: &PageSet) -> Result<()> {
        const MADV_GUARD_INSTALL: i32 = 102;
        let mut batch = Batch::new();
        for range in guards.iter() {
            let arguments = [range.start().into(), range.len().into(), MADV_GUARD_INSTALL.into()];
            batch.call(format!("installing guard pages at {:#x}", range.start()), libc::SYS_madvise, &arguments);
        }
        if !batch.is_empty() {
            self.tracee.run(batch)?;
        }
        Ok(())
    }

    fn take_away_missing(&mut self, state: &wire::Final) -> Result<Option<Missing>> {
        let mut pages = PageSet::new();
        for part in &state.missing {
            if part.space != 0 {
                return Err(Error::state("missing pages", "only pages of the address space can be sent later"));
            }
            pages.insert_all(&ranges(&part.ranges)?);
        }
        if pages.is_empty() {
            return Ok(None);
        }
        missing::prepare(&mut self.tracee, &self.space, pages).map(Some)
    }
}

/// A page set out of a message.
pub(crate) fn ranges(message: &[wire::Range]) -> Result<PageSet> {
    let range = |range: &wire::Range| PageRange::from_pages(range.start, range.pages);
    message
        .iter()
        .map(range)
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| Error::state("pages", error.to_string()))
}

/// The process's clocks when its timers were read.
fn clocks(state: &wire::Final) -> timers::Clocks {
    timers::Clocks {
        monotonic_ns: state.collected_monotonic_ns,
        boottime_ns: state.collected_boottime_ns,
        realtime_ns: state.collected_realtime_ns,
    }
}

/// What surrounds the threads, out of the message.
fn surroundings(state: &wire::Final) -> Result<(Place, SeccompEntry, PstreeEntry)> {
    let fs = state.fs.as_ref().ok_or_else(|| Error::state("process", "nothing about its directories"))?;
    let place = Place::from_messages(fs, &state.files)?;
    let process = state.process.clone().ok_or_else(|| Error::state("process", "no numbers"))?;
    Ok((place, state.seccomp.clone().unwrap_or_default(), process))
}

/// A complete process that does not run yet.
#[derive(Debug)]
pub struct Launch {
    tracee: Tracee,
    /// Kept until the process runs, so that a failure before still removes what they made.
    objects: Objects,
    missing: Option<Missing>,
    draining: bool,
    descriptors: descriptors::Rebuilt,
    leader: CoreEntry,
    child: i32,
    init: birth::Init,
    huge: PageSet,
}

impl Launch {
    /// Its pid as we see it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.tracee.pid()
    }

    /// The child of ours to wait for: the process itself, or the init of its PID namespace.
    #[must_use]
    pub fn child(&self) -> i32 {
        self.child
    }

    /// Takes the memory that it will wait for, to be handed to who serves faults before it runs.
    pub fn take_missing(&mut self) -> Option<Missing> {
        self.missing.take()
    }

    /// What huge pages mapped at the source: see [`crate::make_huge`].
    pub fn take_huge(&mut self) -> PageSet {
        std::mem::take(&mut self.huge)
    }

    /// Whether it will wait for pages.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Lets its sockets take datagrams, which must not be on their way to two hosts any more.
    pub fn let_datagrams_in(&mut self) {
        self.descriptors.let_datagrams_in();
    }

    /// Has it, and the init of its PID namespace, live on should this program be killed: stopped, until it is continued.
    /// Dropping this handle still ends both.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn free(&mut self) -> Result<()> {
        // The init needs nothing: it lives for as long as it has children.
        Ok(self.tracee.free()?)
    }

    /// Lets it run, and come upon the signals that were sent to it meanwhile. From here on it is a process of its own, whatever goes wrong.
    /// Gives what its connections are yet to be informed by.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn launch(mut self, late: &[wire::LateSignal]) -> Result<descriptors::Rebuilt> {
        if let Err(error) = self.descriptors.settle() {
            tracing::warn!(%error, "a socket of the process is not what it was");
        }
        threads::stop_again(&self.tracee, &self.leader)?;
        godwit_resources::signals::send_late(self.tracee.pid(), late);
        self.tracee.launch()?;
        self.init.keep();
        self.objects.keep();
        Ok(self.descriptors)
    }
}
