//! The pure parts against plain models, and the ledger against both.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use godwit_carry::Party;
use godwit_fault::MigrationId;
use godwit_fault::ledger::{Ledger, Lineage, Subject};
use godwit_fault::pending::Pending;
use godwit_fault::queue::{Pace, Queue, Request};
use godwit_pages::{PAGE_SIZE, PageRange, PageSet};
use proptest::prelude::*;

/// Pages that the models deal with.
const SPACE: u64 = 96;

fn range(first: u64, pages: u64) -> PageRange {
    PageRange::from_pages(first * PAGE_SIZE, pages).unwrap()
}

/// What the program does.
#[derive(Clone, Debug)]
enum Deed {
    Settle(u64, u64),
    Drop(u64, u64),
    Remap(u64, u64, u64),
}

fn deed() -> impl Strategy<Value = Deed> {
    let run = (0..SPACE, 1..12u64);
    prop_oneof![
        run.clone().prop_map(|(first, pages)| Deed::Settle(first, pages)),
        run.clone().prop_map(|(first, pages)| Deed::Drop(first, pages)),
        (run, 0..SPACE).prop_map(|((first, pages), to)| Deed::Remap(first, pages, to)),
    ]
}

/// Page here to page at the source, of those that are missing.
type Model = BTreeMap<u64, u64>;

fn model_follows(model: &mut Model, deed: &Deed) {
    match *deed {
        Deed::Settle(first, pages) => model.retain(|_, source| !(first..first + pages).contains(source)),
        Deed::Drop(first, pages) => model.retain(|here, _| !(first..first + pages).contains(here)),
        Deed::Remap(first, pages, to) => {
            if first < to + pages && to < first + pages {
                return;
            }
            model.retain(|here, _| !(to..to + pages).contains(here));
            let moved: Vec<_> = model.range(first..first + pages).map(|(&here, &source)| (here, source)).collect();
            for (here, source) in moved {
                model.remove(&here);
                model.insert(here - first + to, source);
            }
        }
    }
}

fn agree(pending: &Pending, model: &Model) {
    let limit = 2 * SPACE;
    for page in 0..limit {
        let found = pending.source_of(page * PAGE_SIZE + 17).map(|source| source / PAGE_SIZE);
        assert_eq!(found, model.get(&page).copied(), "page {page}");
    }
    assert_eq!(pending.pages(), model.len() as u64);
    let mut wanted: Vec<(u64, u64)> = Vec::new();
    for segment in pending.wanted(range(0, limit)) {
        for index in 0..segment.here.pages() {
            wanted.push((segment.here.start() / PAGE_SIZE + index, segment.source / PAGE_SIZE + index));
        }
    }
    wanted.sort_unstable();
    assert_eq!(wanted, model.iter().map(|(&here, &source)| (here, source)).collect::<Vec<_>>());
}

proptest! {
    #[test]
    fn pending_follows_whatever_the_program_does(
        first in prop::collection::vec((0..SPACE, 1..20u64), 0..6),
        deeds in prop::collection::vec(deed(), 0..24),
    ) {
        let missing: PageSet = first.iter().map(|&(first, pages)| range(first, pages)).collect();
        let mut model: Model = missing.iter().flat_map(PageRange::page_addresses).map(|a| (a / PAGE_SIZE, a / PAGE_SIZE)).collect();
        let mut pending = Pending::new(missing);
        let subject = Subject { id: MigrationId([3; 16]), pid: 1, lineage: Lineage::Moved, party: Party::TokenHolders };
        let ledger = Ledger::create(subject, &pending).unwrap();
        for (event, deed) in (1..).zip(&deeds) {
            match *deed {
                Deed::Settle(first, pages) => {
                    pending.settle(range(first, pages));
                    ledger.settle(range(first, pages));
                }
                Deed::Drop(first, pages) => {
                    pending.drop_here(range(first, pages)).iter().for_each(|dropped| ledger.settle(dropped));
                }
                Deed::Remap(first, pages, to) => {
                    pending.remap(range(first, pages), to * PAGE_SIZE).iter().for_each(|lost| ledger.settle(lost));
                    if event % 3 == 0 {
                        pending.prune();
                    }
                    ledger.relocate(&pending, event);
                }
            }
            model_follows(&mut model, deed);
            agree(&pending, &model);
        }
        // A successor knows all of it.
        let (successor, inherited) = Ledger::open(ledger.as_fd().try_clone_to_owned().unwrap()).unwrap();
        agree(&inherited, &model);
        prop_assert_eq!(successor.subject(), subject);
        prop_assert_eq!(successor.missing_pages(), model.len() as u64);
    }

    /// Faults and background together ask for every missing page, for none that is not missing, and for none twice on one lane.
    #[test]
    fn the_queue_asks_for_everything_once(
        first in prop::collection::vec((0..SPACE, 1..20u64), 1..6),
        faults in prop::collection::vec(0..SPACE, 0..20),
        quiet in any::<bool>(),
    ) {
        let mut missing: PageSet = first.iter().map(|&(first, pages)| range(first, pages)).collect();
        let whole = missing.clone();
        let pace = Pace { timid: (3, 9), bold: (7, 30), ..Pace::default() };
        let mut queue = Queue::new(pace);
        let mut now = Instant::now();
        let mut open: Vec<Request> = Vec::new();
        let mut asked: [BTreeSet<u64>; 2] = Default::default();
        let mut faults = faults.into_iter();
        loop {
            now += if quiet { pace.quiet } else { Duration::from_micros(10) };
            if let Some(page) = faults.next().filter(|page| missing.contains(page * PAGE_SIZE))
                && let Some(request) = queue.fault(now, page * PAGE_SIZE, &missing)
            {
                prop_assert!(request.range.start() == page * PAGE_SIZE);
                note(&mut asked[0], &whole, request)?;
                open.push(request);
            }
            prop_assert!(queue.background(now, 1, &missing).is_none());
            let mut under_way = 0;
            while let Some(request) = queue.background(now, 0, &missing) {
                note(&mut asked[1], &whole, request)?;
                under_way += request.range.pages();
                prop_assert!(under_way <= 30);
                open.push(request);
            }
            if open.is_empty() {
                break;
            }
            // Answered in the order asked, in two parts where there are two pages.
            let request = open.remove(0);
            for part in request.range.chunks(request.range.pages().div_ceil(2)) {
                missing.remove(part);
                prop_assert!(queue.arrived(request.id, part));
            }
            prop_assert!(!queue.arrived(request.id, request.range));
        }
        prop_assert!(missing.is_empty());
        prop_assert_eq!(queue.background_open(), 0);
    }
}

fn note(asked: &mut BTreeSet<u64>, whole: &PageSet, request: Request) -> Result<(), TestCaseError> {
    prop_assert!(whole.covers(request.range));
    for address in request.range.page_addresses() {
        prop_assert!(asked.insert(address), "{:#x} twice", address);
    }
    Ok(())
}

#[test]
fn a_run_of_faults_fetches_ahead() {
    let missing = PageSet::from(range(0, 1000));
    let mut queue = Queue::new(Pace::default());
    let now = Instant::now();
    let first = queue.fault(now, 0, &missing).unwrap();
    assert_eq!(first.range.pages(), 1);
    let second = queue.fault(now, first.range.end(), &missing).unwrap();
    assert!(second.range.pages() > 1);
    let third = queue.fault(now, second.range.end(), &missing).unwrap();
    assert!(third.range.pages() > second.range.pages());
    // Elsewhere it begins anew.
    assert_eq!(queue.fault(now, 700 * PAGE_SIZE, &missing).unwrap().range.pages(), 1);
    // The background goes on beside it.
    let later = now + Pace::default().quiet;
    assert_eq!(queue.background(later, 0, &missing).unwrap().range.start(), 701 * PAGE_SIZE);
}

#[test]
fn what_is_no_ledger_is_refused() {
    let pending = Pending::new(PageSet::from(range(5, 100)));
    let subject = Subject { id: MigrationId([3; 16]), pid: 1, lineage: Lineage::Moved, party: Party::TokenHolders };
    let good = || Ledger::create(subject, &pending).unwrap().as_fd().try_clone_to_owned().unwrap();
    assert!(Ledger::open(good()).is_ok());
    // Every word of its beginning in turn, set to several wrong values: an error or a ledger, never a panic.
    for word in 0..16u64 {
        for value in [0, 1, 7, u64::MAX, 1 << 40] {
            let fd = good();
            nix::sys::uio::pwrite(&fd, &value.to_le_bytes(), word as i64 * 8).unwrap();
            let opened = Ledger::open(fd);
            assert!(word > 1 || (word, value) == (1, 1) || opened.is_err());
        }
    }
    assert!(Ledger::open(std::fs::File::open("/dev/null").unwrap().into()).is_err());
}

/// Two threads move what they have, one of them to where the other has just been: the kernel calls that place unmapped later.
#[test]
fn what_comes_to_a_place_that_is_called_unmapped_later_stays_wanted() {
    let range = |first: u64, pages: u64| PageRange::from_pages(first * PAGE_SIZE, pages).unwrap();
    let mut pending = Pending::new([range(10, 4), range(20, 4)].into_iter().collect());
    pending.remap(range(10, 4), 30 * PAGE_SIZE);
    pending.remap(range(20, 4), 10 * PAGE_SIZE);
    assert!(pending.unmap_here(range(10, 4)).is_empty(), "what has come there is lost");
    assert!(pending.unmap_here(range(20, 4)).is_empty());
    assert_eq!(pending.source_of(10 * PAGE_SIZE), Some(20 * PAGE_SIZE));
    assert_eq!(pending.source_of(33 * PAGE_SIZE), Some(13 * PAGE_SIZE));
    let child = pending.of_child();
    assert_eq!(pending.unmap_here(range(10, 4)).pages(), 4, "this time it is");
    assert_eq!((pending.pages(), child.pages()), (4, 8));
    // What stays mapped where it was (MREMAP_DONTUNMAP) is not called unmapped before something else comes there.
    pending.remap(range(30, 4), 40 * PAGE_SIZE);
    assert!(pending.unmap_here(range(30, 1)).is_empty());
    pending.remap(range(40, 4), 30 * PAGE_SIZE);
    assert_eq!(pending.unmap_here(range(30, 4)).pages(), 4);
    assert!(pending.is_empty());
    // A third one moves over what has come there: of two that look the same the first is about that.
    let mut pending = Pending::new([range(10, 4), range(20, 4), range(50, 4)].into_iter().collect());
    pending.remap(range(10, 4), 30 * PAGE_SIZE);
    pending.remap(range(20, 4), 10 * PAGE_SIZE);
    assert!(pending.unmap_here(range(10, 4)).is_empty());
    assert_eq!(pending.remap(range(50, 4), 10 * PAGE_SIZE).pages(), 4, "what was there before is gone");
    assert!(pending.unmap_here(range(10, 4)).is_empty());
    assert_eq!(pending.source_of(10 * PAGE_SIZE), Some(50 * PAGE_SIZE));
}
