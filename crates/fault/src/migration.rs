//! One migration's drain, as both threads of the service share it.
//!
//! Everything that changes lies behind one lock, held for a few dozen microseconds at most: a fault is waiting for it. The
//! thread that fills in the background steps back when the other one wants it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_carry::Party;
use godwit_kernel::uffd::Userfaultfd;
use godwit_pages::{PAGE_SIZE, PageRange, PageSet};
use tokio::sync::{Notify, watch};

use crate::error::{MigrationId, Result};
use crate::handle::DrainReport;
use crate::latency::Latency;
use crate::ledger::{Ledger, Lineage, Subject};
use crate::pending::Pending;
use crate::queue::{Pace, Queue, Request};
use crate::second_holder::{ForkedHolder, SecondHolder, has_ended};
use crate::service::AtEnd;
use crate::space::{Attempt, News, Space};

/// Pages that are filled under one hold of the lock.
const PAGES_PER_HOLD: u64 = 16;
/// A fault that is open for longer than this does not hold the background up any more: its link may be lost.
const PATIENCE: Duration = Duration::from_millis(20);

/// How far a drain is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Stage {
    /// Pages are missing.
    Draining,
    /// All is there; the userfaultfds are closed; the source has yet to be told.
    Drained(DrainReport),
    /// The source knows.
    Acknowledged(DrainReport),
}

/// A drain.
pub(crate) struct Drain {
    pub(crate) id: MigrationId,
    /// Who may send its pages.
    pub(crate) party: Party,
    core: Mutex<Core>,
    /// Threads of the service that want the lock for a fault.
    urgent: AtomicUsize,
    /// There is something in the outbox.
    pub(crate) asked: Notify,
    /// The background lane may go on.
    pub(crate) proceed: Notify,
    /// There are new spaces to watch.
    pub(crate) born: Notify,
    pub(crate) stage: watch::Sender<Stage>,
    /// Whether the program itself had ended when the drain was over, once that is known.
    pub(crate) ended: watch::Sender<Option<bool>>,
    /// Number of the current link of each lane; a newer one takes over.
    pub(crate) fault_link: watch::Sender<u64>,
    pub(crate) drain_link: watch::Sender<u64>,
}

/// What changes.
pub(crate) struct Core {
    pub(crate) spaces: Vec<Space>,
    queue: Queue,
    outbox: VecDeque<Request>,
    latency: Latency,
    faults_linked: bool,
    holes: u64,
    started: Instant,
    departed: bool,
    holder: Option<Box<dyn SecondHolder>>,
    at_end: Option<AtEnd>,
    /// The program, where its holder is to be replaced should that be killed.
    pidfd: Option<OwnedFd>,
}

impl Drain {
    pub(crate) fn new(
        subject: Subject,
        spaces: Vec<Space>,
        holder: Box<dyn SecondHolder>,
        pace: Pace,
        (at_end, pidfd): (Option<AtEnd>, Option<OwnedFd>),
    ) -> Self {
        Self {
            id: subject.id,
            party: subject.party,
            core: Mutex::new(Core {
                spaces,
                queue: Queue::new(pace),
                outbox: VecDeque::new(),
                latency: Latency::default(),
                faults_linked: false,
                holes: 0,
                started: Instant::now(),
                departed: false,
                holder: Some(holder),
                at_end,
                pidfd,
            }),
            urgent: AtomicUsize::new(0),
            asked: Notify::new(),
            proceed: Notify::new(),
            born: Notify::new(),
            stage: watch::Sender::new(Stage::Draining),
            ended: watch::Sender::new(None),
            fault_link: watch::Sender::new(0),
            drain_link: watch::Sender::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock before the background does.
    fn lock_first(&self) -> MutexGuard<'_, Core> {
        self.urgent.fetch_add(1, Ordering::SeqCst);
        let core = self.lock();
        self.urgent.fetch_sub(1, Ordering::SeqCst);
        core
    }

    /// Takes the lock when no fault wants it.
    fn lock_last(&self) -> MutexGuard<'_, Core> {
        while self.urgent.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        self.lock()
    }

    /// Wakes those whose faults a predecessor read but did not answer.
    pub(crate) fn wake_all(&self) {
        self.lock().spaces.iter().for_each(Space::wake_all);
    }

    /// Notes in the ledgers who serves.
    pub(crate) fn own(&self, owner: u64) {
        self.lock().spaces.iter().for_each(|space| space.ledger.own(owner));
    }

    /// Puts another second holder in the place of one that was killed.
    pub(crate) fn see_to_holder(&self) {
        let mut core = self.lock_last();
        let is_gone = core.holder.as_ref().is_some_and(|holder| !holder.is_there());
        // N.B. it leaves by itself when the program has ended, unless a child that it has forked lacks pages.
        let stays = |pidfd: &&OwnedFd| core.spaces.len() > 1 || !has_ended(pidfd.as_fd());
        let Some(pidfd) = core.pidfd.as_ref().filter(|_| is_gone).filter(stays) else { return };
        let pairs = core.spaces.iter().map(|space| (space.uffd.as_fd(), space.ledger.as_fd()));
        match ForkedHolder::of_all(pidfd.as_fd(), pairs) {
            Ok(holder) => {
                tracing::warn!(migration = %self.id, "the process that held userfaultfds beside this one is gone; another one does");
                // N.B. it is a zombie until somebody waits for it.
                let _ = core.holder.replace(Box::new(holder)).map(SecondHolder::release);
            }
            Err(error) => tracing::warn!(migration = %self.id, %error, "nobody holds userfaultfds beside this process"),
        }
    }

    /// Number of spaces so far.
    pub(crate) fn space_count(&self) -> usize {
        self.lock().spaces.len()
    }

    /// The userfaultfd of a space, while the drain lasts.
    pub(crate) fn userfaultfd(&self, index: usize) -> Option<Arc<Userfaultfd>> {
        self.lock().spaces.get(index).map(|space| space.uffd.clone())
    }

    /// Reads and follows the events of one space. `Later` asks to be called again soon.
    pub(crate) fn attend(&self, index: usize) -> Result<Attempt> {
        let mut core = self.lock_first();
        let before = core.spaces.len();
        let attempt = core.attend(index, Instant::now());
        self.tell(core, before);
        attempt
    }

    /// Lets go, and tells whom it concerns what was found to be done; there were so many spaces before.
    fn tell(&self, core: MutexGuard<'_, Core>, before: usize) {
        let asked = !core.outbox.is_empty();
        let complete = core.is_complete();
        let born = core.spaces.len() > before;
        drop(core);
        if asked {
            self.asked.notify_one();
        }
        if born {
            self.born.notify_one();
        }
        if complete {
            self.complete();
        }
    }

    /// Fills pages that came in answer to request `id`: what `range` at the source holds, `None` for zeros.
    pub(crate) async fn place(&self, lane: LaneName, id: u64, range: PageRange, content: Option<&[u8]>) -> Result<()> {
        for part in range.chunks(PAGES_PER_HOLD) {
            let offset = (part.start() - range.start()) as usize;
            let bytes = content.map(|content| &content[offset..offset + part.len() as usize]);
            let mut tries = 0u32;
            while self.place_part(lane, part, bytes)? == Attempt::Later {
                // The thread whose event was read has yet to run before the kernel fills again.
                tries += 1;
                if tries < 20 {
                    tokio::task::yield_now().await;
                } else {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
        self.lock().queue.arrived(id, range);
        self.proceed.notify_one();
        Ok(())
    }

    fn place_part(&self, lane: LaneName, part: PageRange, bytes: Option<&[u8]>) -> Result<Attempt> {
        let mut core = match lane {
            LaneName::Faults => self.lock_first(),
            LaneName::Background => self.lock_last(),
        };
        let before = core.spaces.len();
        let attempt = core.place(part, bytes);
        // N.B. faults were read with the events in the way, and nobody else reads them.
        self.tell(core, before);
        attempt
    }

    /// A link for faults is there: everything that waits is asked for again.
    pub(crate) fn fault_link_up(&self) -> u64 {
        let mut core = self.lock();
        // N.B. with the lock: a link that this one replaces takes nothing more, or it would be asked for where nobody hears.
        let number = next(&self.fault_link);
        core.ask_again();
        core.faults_linked = true;
        drop(core);
        self.asked.notify_one();
        number
    }

    /// The link for faults is lost.
    pub(crate) fn fault_link_down(&self) {
        self.lock().faults_linked = false;
        self.proceed.notify_one();
    }

    /// A link for the background is there.
    pub(crate) fn drain_link_up(&self) -> u64 {
        let mut core = self.lock();
        // N.B. with the lock, as above.
        let number = next(&self.drain_link);
        core.queue.forget_background();
        drop(core);
        self.proceed.notify_one();
        number
    }

    /// Takes what is to be asked for at once on the link of this number; `None` if another has taken its place.
    pub(crate) fn take_urgent(&self, number: u64) -> Option<Vec<Request>> {
        let mut core = self.lock_first();
        if *self.fault_link.borrow() != number {
            // What woke the old one is the new one's.
            self.asked.notify_one();
            return None;
        }
        Some(core.outbox.drain(..).collect())
    }

    /// Takes what is to be asked for in the background on the link of this number, and says when to look again if that depends on
    /// time; `None` if another has taken its place.
    pub(crate) fn take_background(&self, number: u64) -> Option<(Vec<Request>, Option<Instant>)> {
        let mut core = self.lock_last();
        if *self.drain_link.borrow() != number {
            self.proceed.notify_one();
            return None;
        }
        Some(core.background(Instant::now()))
    }

    /// The program has ended.
    pub(crate) fn departed(&self) {
        let mut core = self.lock();
        if let Some(space) = core.spaces.first_mut() {
            space.depart();
        }
        core.departed = true;
        let complete = core.is_complete();
        drop(core);
        if complete {
            self.complete();
        }
    }

    /// Lets go: nothing is missing any more.
    fn complete(&self) {
        let mut core = self.lock();
        // N.B. both threads may come here; one of them takes the holder. Said twice, the end would hide that the source knows of it.
        let Some(holder) = core.holder.take() else { return };
        let report = core.report();
        let at_end = core.at_end.take();
        // N.B. before the last copy is closed: should this program be killed, nobody could tell afterwards that nothing was missing.
        drop(core);
        if let Some(at_end) = at_end {
            at_end.tell(report.departed);
        }
        let mut core = self.lock();
        // N.B. nothing is missing, so the zeros that threads read once the last copy is closed are the right content.
        core.spaces.clear();
        core.outbox.clear();
        drop(core);
        if let Err(error) = holder.release() {
            tracing::warn!(migration = %self.id, %error, "the second holder did not leave in order");
        }
        tracing::debug!(
            migration = %self.id,
            pages = report.pages,
            faults = report.faults,
            p50_us = report.p50_us,
            p99_us = report.p99_us,
            drain_us = report.drain_us,
            "all pages are there"
        );
        self.stage.send_replace(Stage::Drained(report));
    }

    /// The source has let go of its copy.
    pub(crate) fn acknowledged(&self) {
        self.stage.send_modify(|stage| {
            if let Stage::Drained(report) = stage {
                *stage = Stage::Acknowledged(DrainReport { acknowledged: true, ..report.clone() });
            }
        });
    }

    /// How it stands.
    pub(crate) fn report(&self) -> DrainReport {
        match &*self.stage.borrow() {
            Stage::Drained(report) | Stage::Acknowledged(report) => report.clone(),
            Stage::Draining => self.lock().report(),
        }
    }

    /// Pages that are missing still.
    pub(crate) fn missing_pages(&self) -> u64 {
        self.lock().spaces.iter().map(|space| space.pending.pages()).sum()
    }
}

fn next(counter: &watch::Sender<u64>) -> u64 {
    let mut number = 0;
    counter.send_modify(|current| {
        *current += 1;
        number = *current;
    });
    number
}

/// On which link pages came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LaneName {
    Faults,
    Background,
}

impl Core {
    fn is_complete(&self) -> bool {
        self.spaces.iter().all(Space::is_complete)
    }

    fn attend(&mut self, index: usize, now: Instant) -> Result<Attempt> {
        let Some(space) = self.spaces.get_mut(index) else { return Ok(Attempt::Done) };
        if space.departed {
            return Ok(Attempt::Done);
        }
        let News { faults, children } = space.read_events()?;
        let again = std::mem::take(&mut space.retry);
        for (uffd, pending) in children {
            self.take_in(index, uffd, pending)?;
        }
        let mut attempt = Attempt::Done;
        for address in again.into_iter().chain(faults) {
            if self.fault(index, address - address % PAGE_SIZE, now)? == Attempt::Later {
                attempt = Attempt::Later;
            }
        }
        Ok(attempt)
    }

    /// Fills pages of all spaces.
    fn place(&mut self, part: PageRange, bytes: Option<&[u8]>) -> Result<Attempt> {
        let mut attempt = Attempt::Done;
        for index in 0..self.spaces.len() {
            let placed = self.spaces[index].place(part, bytes, &mut self.latency)?;
            if placed == Attempt::Later || !self.spaces[index].retry.is_empty() {
                // The event in the way may be about this very range.
                let attended = self.attend(index, Instant::now())?;
                if [placed, attended].contains(&Attempt::Later) {
                    attempt = Attempt::Later;
                }
            }
        }
        Ok(attempt)
    }

    fn fault(&mut self, index: usize, page: u64, now: Instant) -> Result<Attempt> {
        let space = &mut self.spaces[index];
        let Some(source) = space.pending.source_of(page) else {
            self.holes += 1;
            return space.fill_hole(page);
        };
        space.waiting.entry(page).or_insert(now);
        let request = self.queue.fault(now, source, space.pending.missing());
        if self.faults_linked {
            self.outbox.extend(request);
        }
        Ok(Attempt::Done)
    }

    /// Begins to serve a forked child, which lacks what its parent lacked.
    fn take_in(&mut self, parent: usize, uffd: Userfaultfd, pending: Pending) -> Result<()> {
        let subject = Subject { lineage: Lineage::Forked, ..self.spaces[parent].ledger.subject() };
        let ledger = Ledger::create(subject, &pending)?;
        if let Some(Err(error)) = self.holder.as_ref().map(|holder| holder.hold_child(uffd.as_fd(), ledger.as_fd())) {
            tracing::warn!(migration = %subject.id, %error, "nobody else holds the userfaultfd of a forked child");
        }
        tracing::debug!(migration = %subject.id, pages = pending.pages(), "the program forked");
        crate::service::unblock(subject.id, &uffd)?;
        self.spaces.push(Space::new(uffd, pending, ledger));
        Ok(())
    }

    fn ask_again(&mut self) {
        self.queue.forget_urgent();
        self.outbox.clear();
        let now = Instant::now();
        for space in &self.spaces {
            for &page in space.waiting.keys() {
                if let Some(source) = space.pending.source_of(page) {
                    self.outbox.extend(self.queue.fault(now, source, space.pending.missing()));
                }
            }
        }
    }

    fn background(&mut self, now: Instant) -> (Vec<Request>, Option<Instant>) {
        const AT_ONCE: usize = 64;
        let waiting = if self.faults_linked { self.recent_faults(now) } else { 0 };
        let mut requests = Vec::new();
        for space in self.spaces.iter().filter(|space| !space.departed) {
            while requests.len() < AT_ONCE
                && let Some(request) = self.queue.background(now, waiting, space.pending.missing())
            {
                requests.push(request);
            }
        }
        let look_again = if waiting > 0 { Some(now + PATIENCE) } else { self.queue.quiet_at(now) };
        (requests, look_again)
    }

    fn recent_faults(&self, now: Instant) -> usize {
        let open = self.spaces.iter().flat_map(|space| space.waiting.values());
        open.filter(|since| now.saturating_duration_since(**since) < PATIENCE).count()
    }

    fn report(&self) -> DrainReport {
        DrainReport {
            bytes_sent: 0,
            faults: self.latency.count(),
            p50_us: self.latency.quantile_us(0.5),
            p99_us: self.latency.quantile_us(0.99),
            longest_us: self.latency.longest_us(),
            holes: self.holes,
            pages: self.spaces.iter().map(|space| space.ledger.filled()).sum(),
            drain_us: u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX),
            departed: self.departed || self.spaces.first().is_some_and(|space| space.departed),
            acknowledged: false,
        }
    }
}

impl std::fmt::Debug for Drain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Drain").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Lists what a migration lacks at first.
pub(crate) fn initial(missing: PageSet) -> Pending {
    Pending::new(missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Lineage;
    use godwit_kernel::uffd::{Features, Mode};

    /// A holder in whose release the other thread comes upon the end, too.
    struct Interrupted(Arc<std::sync::OnceLock<Arc<Drain>>>);

    impl SecondHolder for Interrupted {
        fn hold_child(&self, _: std::os::fd::BorrowedFd<'_>, _: std::os::fd::BorrowedFd<'_>) -> Result<()> {
            Ok(())
        }

        fn is_there(&self) -> bool {
            true
        }

        fn release(self: Box<Self>) -> Result<()> {
            let drain = self.0.get().unwrap();
            drain.complete();
            assert_eq!(*drain.stage.borrow(), Stage::Draining, "it is over when the holder has let go");
            Ok(())
        }
    }

    #[test]
    fn the_end_is_told_once() {
        let subject = Subject { id: MigrationId([1; 16]), pid: 1, lineage: Lineage::Moved, party: Party::TokenHolders };
        let found = Arc::new(std::sync::OnceLock::new());
        let drain = Arc::new(Drain::new(
            subject,
            Vec::new(),
            Box::new(Interrupted(found.clone())),
            Pace::default(),
            (None, None),
        ));
        found.set(drain.clone()).unwrap();
        drain.complete();
        drain.acknowledged();
        drain.complete();
        assert!(matches!(*drain.stage.borrow(), Stage::Acknowledged(_)), "what the source knows stays known");
        assert!(drain.report().acknowledged);
    }

    /// The first whole page in a buffer, and memory behind it that nobody has touched.
    fn untouched(buffer: &[u8]) -> u64 {
        (buffer.as_ptr() as u64).next_multiple_of(PAGE_SIZE) + PAGE_SIZE
    }

    /// Events come to whoever is there first: to the background, too, which they are in the way of. What it reads with them is done.
    #[tokio::test]
    async fn the_background_does_what_is_read_with_events() {
        const LARGE: usize = 64 << 20;
        /// Until threads stand where they are to stand.
        const MOMENT: Duration = Duration::from_millis(100);
        const PATIENCE: Duration = Duration::from_secs(5);
        let Ok(uffd) = Userfaultfd::of_self() else { return eprintln!("not checked: needs root") };
        uffd.api(Features::EVENT_UNMAP).unwrap();
        let (gone, wanted) = (vec![0u8; LARGE], Arc::new(vec![0u8; LARGE]));
        let first = untouched(&wanted);
        for start in [untouched(&gone), first] {
            uffd.register(start, 16 * PAGE_SIZE, Mode::Missing).unwrap();
        }
        let (hole, fault, other) = (first, first + PAGE_SIZE, first + 2 * PAGE_SIZE);
        let missing: PageSet = [PageRange::new(fault, other + PAGE_SIZE).unwrap()].into_iter().collect();
        let pending = Pending::new(missing);
        let subject = Subject { id: MigrationId([1; 16]), pid: 1, lineage: Lineage::Moved, party: Party::TokenHolders };
        let ledger = Ledger::create(subject, &pending).unwrap();
        let spaces = vec![Space::new(uffd, pending, ledger)];
        let drain = Drain::new(subject, spaces, Box::new(NoHolder), Pace::default(), (None, None));
        let number = drain.fault_link_up();
        drain.asked.notified().await;
        assert_eq!(drain.take_urgent(number), Some(Vec::new()));

        let unmaps = std::thread::spawn(move || drop(gone));
        let reads = |page: u64| {
            let (wanted, offset) = (Arc::clone(&wanted), (page - wanted.as_ptr() as u64) as usize);
            std::thread::spawn(move || *std::hint::black_box(&wanted[offset]))
        };
        let (reads_hole, reads_fault) = (reads(hole), reads(fault));
        tokio::time::sleep(MOMENT).await;
        let page = [7; PAGE_SIZE as usize];
        let place = |lane, page_at| drain.place(lane, 1, PageRange::page_at(page_at).unwrap(), Some(&page));
        tokio::time::timeout(PATIENCE, place(LaneName::Background, other)).await.unwrap().unwrap();
        assert_eq!(drain.missing_pages(), 1);
        let asked = tokio::time::timeout(PATIENCE, drain.asked.notified()).await;
        assert!(asked.is_ok(), "nobody asks for what a thread waits for");
        let requests = drain.take_urgent(number).unwrap();
        assert_eq!(requests.iter().map(|request| request.range.start()).collect::<Vec<_>>(), [fault]);
        place(LaneName::Faults, fault).await.unwrap();
        unmaps.join().unwrap();
        assert_eq!((reads_hole.join().unwrap(), reads_fault.join().unwrap()), (0, 7));
        assert!(matches!(*drain.stage.borrow(), Stage::Drained(_)));
    }

    struct NoHolder;

    impl SecondHolder for NoHolder {
        fn hold_child(&self, _: std::os::fd::BorrowedFd<'_>, _: std::os::fd::BorrowedFd<'_>) -> Result<()> {
            Ok(())
        }

        fn is_there(&self) -> bool {
            true
        }

        fn release(self: Box<Self>) -> Result<()> {
            Ok(())
        }
    }
}
