//! Private memory: anonymous and file mappings.

use std::io::Write;

use godwit_pages::{PAGE_SIZE, PageRange, PageSet};
use godwit_track::{Changes, EveryPage, SoftDirty, Tracker, VmaKind, populated};

use crate::victim::{Copy, Victim, can_track, finish, pages, vma};

const PAGES: u64 = 16;

/// A victim with one anonymous mapping whose pages 0..8 are written, reported once.
struct Anonymous {
    victim: Victim,
    tracker: Box<dyn Tracker>,
    range: PageRange,
    copy: Copy,
}

impl Anonymous {
    fn start() -> Self {
        let mut victim = Victim::start();
        let tracker = Box::new(victim.tracker());
        Self::tracked_by(victim, tracker)
    }

    fn tracked_by(mut victim: Victim, mut tracker: Box<dyn Tracker>) -> Self {
        // Followed by a mapping of another kind, so that it neither merges nor grows in place.
        let reserved = victim.run(&format!("reserve {}", 2 * PAGES));
        let range = victim.range(&format!("anonymous-at {reserved} {PAGES}"), PAGES);
        victim.run(&format!("fill {} 8 7", range.start()));
        let vmas = [vma(range, VmaKind::PrivateAnonymous)];
        tracker.arm(&vmas).unwrap();
        let mut copy = Copy::default();
        let changes = tracker.collect(&vmas).unwrap();
        assert_eq!(changes.dirty, pages(range, &[0, 1, 2, 3, 4, 5, 6, 7]));
        assert!(changes.absent.is_empty());
        copy.apply(&victim, &changes);
        Self { victim, tracker, range, copy }
    }

    fn page(&self, index: u64) -> u64 {
        self.range.start() + index * PAGE_SIZE
    }

    fn collect(&mut self) -> Changes {
        let changes = self.tracker.collect(&[vma(self.range, VmaKind::PrivateAnonymous)]).unwrap();
        self.copy.apply(&self.victim, &changes);
        changes
    }

    fn finish(&mut self) -> Changes {
        let vmas = [vma(self.range, VmaKind::PrivateAnonymous)];
        finish(&self.victim, self.tracker.as_mut(), &mut self.copy, &vmas, &[])
    }
}

#[test]
fn only_what_was_written_is_reported_once() {
    if !can_track() {
        return;
    }
    let mut t = Anonymous::start();
    assert_eq!(t.collect(), Changes::default());
    t.victim.run(&format!("poke {} 1", t.page(2)));
    t.victim.run(&format!("poke {} 1", t.page(12)));
    assert_eq!(t.collect().dirty, pages(t.range, &[2, 12]));
    assert_eq!(t.collect(), Changes::default());
    t.victim.run(&format!("poke {} 1", t.page(3)));
    assert_eq!(t.finish().dirty, pages(t.range, &[3]));
    assert_eq!(t.finish().dirty, pages(t.range, &[3]), "the last report changes nothing");
    assert_eq!(t.collect().dirty, pages(t.range, &[3]));
}

#[test]
fn writes_by_the_kernel_count() {
    if !can_track() {
        return;
    }
    let mut t = Anonymous::start();
    t.victim.run(&format!("kernel-write {} 9", t.page(5)));
    assert_eq!(t.collect().dirty, pages(t.range, &[5]));
    let byte = godwit_kernel::memory::write(t.victim.pid(), t.page(6), &[3]).unwrap();
    assert_eq!(byte, 1);
    assert_eq!(t.finish().dirty, pages(t.range, &[6]));
}

#[test]
fn dropped_anonymous_pages_become_absent() {
    if !can_track() {
        return;
    }
    let mut t = Anonymous::start();
    t.victim.run(&format!("madvise {} 2 4", t.page(0)));
    t.victim.run(&format!("madvise {} 1 4", t.page(7)));
    // Read again: the page of zeros is as good as a hole.
    t.victim.run(&format!("peek {}", t.page(1)));
    let changes = t.collect();
    assert_eq!((changes.dirty, changes.absent), (PageSet::new(), pages(t.range, &[0, 1, 7])));
    t.victim.run(&format!("poke {} 5", t.page(1)));
    t.victim.run(&format!("madvise {} 1 4", t.page(3)));
    let changes = t.finish();
    assert_eq!((changes.dirty, changes.absent), (pages(t.range, &[1]), pages(t.range, &[3])));
}

#[test]
fn freed_pages_keep_or_lose_their_content_but_never_lie() {
    if !can_track() {
        return;
    }
    let mut t = Anonymous::start();
    t.victim.run(&format!("madvise {} 4 8", t.page(0)));
    t.finish();
    t.victim.run(&format!("poke {} 5", t.page(1)));
    t.finish();
}

#[test]
fn new_and_replaced_mappings_are_reported_whole() {
    if !can_track() {
        return;
    }
    let mut t = Anonymous::start();
    let born = t.victim.range(&format!("anonymous {PAGES}"), PAGES);
    t.victim.run(&format!("fill {} 3 9", born.start()));
    // Replaces pages 2..5 of the tracked mapping: the middle of it is not registered any more.
    t.victim.run(&format!("anonymous-at {} 3", t.page(2)));
    t.victim.run(&format!("poke {} 9", t.page(3)));
    t.victim.run(&format!("poke {} 9", t.page(7)));
    let vmas = [vma(t.range, VmaKind::PrivateAnonymous), vma(born, VmaKind::PrivateAnonymous)];
    let changes = t.tracker.collect(&vmas).unwrap();
    t.copy.apply(&t.victim, &changes);
    // What shares a range with something that is not registered is not believed to be unwritten.
    assert_eq!(changes.dirty, pages(t.range, &[0, 1, 3, 5, 6, 7]).union(&pages(born, &[0, 1, 2])));
    assert_eq!(changes.absent, pages(t.range, &[2, 4]));
    t.victim.run(&format!("poke {} 8", born.start()));
    let changes = finish(&t.victim, t.tracker.as_mut(), &mut t.copy, &vmas, &[]);
    assert_eq!(changes.dirty, pages(born, &[0]));
}

/// UFFDIO_REGISTER splits mappings, and mremap(2) refuses to take one that is two for the whole.
#[test]
fn a_mapping_that_replaces_smaller_ones_stays_whole() {
    if !can_track() {
        return;
    }
    let mut victim = Victim::start();
    let mut tracker = victim.tracker();
    // Neighbours that are so small that they go along, and larger ones.
    for slot_pages in [16, 100] {
        let arena = victim.range(&format!("reserve {}", 9 * slot_pages), 9 * slot_pages);
        let place = |slot: u64| arena.start() + slot * slot_pages * PAGE_SIZE;
        // Before or behind one, between two and over both, over all.
        for (slot, slots) in [(0, 2), (1, 2), (2, 2), (2, 3), (3, 2), (4, 2), (5, 2), (0, 8)] {
            victim.run(&format!("munmap {} {}", arena.start(), 8 * slot_pages));
            for old in [0, 1, 3, 4, 6, 7] {
                victim.run(&format!("anonymous-at {} {slot_pages}", place(old)));
                // Else the kernel would join the two.
                victim.run(&format!("mprotect {} {slot_pages} {}", place(old), if old % 3 == 0 { 3 } else { 7 }));
            }
            let listed = victim.anonymous_mappings(arena);
            assert_eq!(listed.len(), 6);
            tracker.collect(&listed).unwrap();
            let pages = slots * slot_pages;
            victim.run(&format!("anonymous-at {} {pages}", place(slot)));
            victim.run(&format!("fill {} {pages} 7", place(slot)));
            if slot % 2 == 0 {
                tracker.arm(&listed).unwrap();
            } else {
                tracker.collect(&listed).unwrap();
            }
            // Fails with EFAULT across mappings.
            let moved = victim.run(&format!("mremap {} {pages} {}", place(slot), 16 * slot_pages));
            victim.run(&format!("munmap {moved} {}", 16 * slot_pages));
        }
    }
}

#[test]
fn moved_mappings_are_reported_whole_and_their_old_place_absent() {
    if !can_track() {
        return;
    }
    let mut t = Anonymous::start();
    let moved = t.victim.run(&format!("mremap {} {PAGES} {}", t.range.start(), 2 * PAGES));
    let old = std::mem::replace(&mut t.range, PageRange::from_pages(moved, 2 * PAGES).unwrap());
    assert_ne!(old.start(), moved);
    let changes = t.collect();
    assert_eq!(changes.dirty, pages(t.range, &[0, 1, 2, 3, 4, 5, 6, 7]));
    assert_eq!(changes.absent, pages(old, &[0, 1, 2, 3, 4, 5, 6, 7]));
    t.victim.run(&format!("poke {} 8", t.page(20)));
    assert_eq!(t.finish().dirty, pages(t.range, &[20]));
}

/// The kernel joins a mapping that is moved beside another one with it, and drops the registration of both; the protection of
/// pages stays behind and would have them look unwritten for ever.
#[test]
fn a_mapping_joined_by_a_moved_one_is_reported_whole() {
    if !can_track() {
        return;
    }
    let mut t = Anonymous::start();
    let reserved = t.victim.run(&format!("reserve {}", 2 * PAGES));
    let untouched = t.victim.range(&format!("anonymous-at {reserved} {PAGES}"), PAGES);
    let both = [vma(t.range, VmaKind::PrivateAnonymous), vma(untouched, VmaKind::PrivateAnonymous)];
    t.victim.run(&format!("poke {} 9", t.page(1)));
    let changes = t.tracker.collect(&both).unwrap();
    t.copy.apply(&t.victim, &changes);
    assert_eq!(changes.dirty, pages(t.range, &[1]));
    t.victim.run(&format!("mremap-to {} {PAGES} {}", untouched.start(), t.range.end()));
    t.victim.run(&format!("poke {} 9", t.page(3)));
    t.range = PageRange::new(t.range.start(), t.range.end() + PAGES * PAGE_SIZE).unwrap();
    assert!(t.collect().dirty.contains(t.page(3)));
    t.victim.run(&format!("poke {} 10", t.page(3)));
    assert_eq!(t.collect().dirty, pages(t.range, &[3]));
    t.victim.run(&format!("poke {} 11", t.page(5)));
    assert_eq!(t.finish().dirty, pages(t.range, &[5]));
}

#[test]
fn protection_changes_and_splits_do_not_lose_writes() {
    if !can_track() {
        return;
    }
    let mut t = Anonymous::start();
    t.victim.run(&format!("poke {} 1", t.page(4)));
    t.victim.run(&format!("mprotect {} 3 1", t.page(3)));
    t.victim.run(&format!("mprotect {} 3 3", t.page(3)));
    t.victim.run(&format!("poke {} 1", t.page(5)));
    assert_eq!(t.finish().dirty, pages(t.range, &[4, 5]));
}

#[test]
fn guard_pages_are_no_content() {
    if !can_track() {
        return;
    }
    let mut t = Anonymous::start();
    let guard = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        t.victim.run(&format!("madvise {} 2 102", t.page(6)));
    }));
    let residency = populated(t.victim.pid(), &[vma(t.range, VmaKind::PrivateAnonymous)]).unwrap();
    if guard.is_err() || residency.guards.is_empty() {
        eprintln!("not checked: this kernel does not tell guard pages");
        return;
    }
    assert_eq!(residency.guards, pages(t.range, &[6, 7]));
    assert_eq!(residency.populated, pages(t.range, &[0, 1, 2, 3, 4, 5]));
    let changes = t.collect();
    assert_eq!((changes.dirty, changes.absent), (PageSet::new(), pages(t.range, &[6, 7])));
}

#[test]
fn huge_pages_are_named() {
    if !can_track() {
        return;
    }
    let mut victim = Victim::start();
    let mut tracker = victim.tracker();
    let range = victim.range("aligned 1024", 1024);
    victim.run(&format!("fill {} 512 7", range.start()));
    let vmas = [vma(range, VmaKind::PrivateAnonymous)];
    tracker.arm(&vmas).unwrap();
    let changes = tracker.collect(&vmas).unwrap();
    assert_eq!(changes.dirty.pages(), 512);
    if changes.huge.is_empty() {
        eprintln!("not checked: no huge page was to be had");
        return;
    }
    assert_eq!(changes.huge, changes.dirty);
    let mut copy = Copy::default();
    copy.apply(&victim, &changes);
    victim.run(&format!("poke {} 9", range.start() + 5 * PAGE_SIZE));
    finish(&victim, &mut tracker, &mut copy, &vmas, &[]);
}

#[test]
fn hugetlb_pages_are_tracked_whole() {
    let free = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = free.lines().find_map(|line| line.strip_prefix("HugePages_Free:")).map(str::trim);
    if !can_track() || free.and_then(|free| free.parse().ok()).unwrap_or(0) < 3 {
        eprintln!("not checked: no three hugetlb pages are free");
        return;
    }
    // MAP_PRIVATE and MAP_SHARED.
    for (flags, kind) in [(2, VmaKind::PrivateHugetlb), (1, VmaKind::SharedHugetlb)] {
        let mut victim = Victim::start();
        let mut tracker = victim.tracker();
        let range = victim.range(&format!("hugetlb 1536 {flags}"), 1536);
        let (first, second) = (range.split_at(range.start() + (2 << 20)).unwrap().0, range.start() + (2 << 20));
        victim.run(&format!("poke {} 9", first.start()));
        let vmas = [vma(range, kind)];
        tracker.arm(&vmas).unwrap();
        let mut copy = Copy::default();
        let changes = tracker.collect(&vmas).unwrap();
        assert_eq!((&changes.dirty, &changes.huge), (&first.into(), &first.into()));
        copy.apply(&victim, &changes);
        assert_eq!(tracker.collect(&vmas).unwrap(), Changes::default());
        victim.run(&format!("poke {} 9", second + 5 * PAGE_SIZE));
        let changes = finish(&victim, &mut tracker, &mut copy, &vmas, &[]);
        assert_eq!(changes.dirty, PageRange::from_pages(second, 512).unwrap().into());
    }
}

/// A file of the test's own whose page n is filled with n + 1, and that content.
fn numbered_file() -> (tempfile::NamedTempFile, Vec<u8>) {
    let content: Vec<u8> = (0..PAGES).flat_map(|page| [page as u8 + 1; PAGE_SIZE as usize]).collect();
    let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.write_all(&content).unwrap();
    (file, content)
}

#[test]
fn private_file_pages_count_once_written_and_revert_when_dropped() {
    if !can_track() {
        return;
    }
    let (file, content) = numbered_file();
    let mut victim = Victim::start();
    let mut tracker = victim.tracker();
    let range = victim.range(&format!("file {PAGES} 2 0 {}", file.path().display()), PAGES);
    let page = |index: u64| range.start() + index * PAGE_SIZE;
    let vmas = [vma(range, VmaKind::PrivateFile)];
    let mut copy = Copy::default();
    for index in 0..6 {
        victim.run(&format!("poke {} 99", page(index)));
    }
    victim.run(&format!("peek {}", page(10)));
    tracker.arm(&vmas).unwrap();
    let changes = tracker.collect(&vmas).unwrap();
    assert_eq!(changes.dirty, pages(range, &[0, 1, 2, 3, 4, 5]), "the file's own pages need no sending");
    copy.apply(&victim, &changes);

    // Dropped: left alone, read again, written again. None of the first two counts as written in the kernel.
    victim.run(&format!("madvise {} 3 4", page(0)));
    assert_eq!(victim.run(&format!("peek {}", page(1))), 2);
    victim.run(&format!("poke {} 55", page(2)));
    victim.run(&format!("poke {} 66", page(10)));
    let changes = tracker.collect(&vmas).unwrap();
    assert_eq!((&changes.dirty, &changes.absent), (&pages(range, &[2, 10]), &pages(range, &[0, 1])));
    copy.apply(&victim, &changes);
    assert_eq!(populated(victim.pid(), &vmas).unwrap().populated, pages(range, &[2, 3, 4, 5, 10]));

    victim.run(&format!("madvise {} 1 4", page(3)));
    victim.run(&format!("poke {} 77", page(0)));
    let changes = finish(&victim, &mut tracker, &mut copy, &vmas, &content);
    assert_eq!((changes.dirty, changes.absent), (pages(range, &[0]), pages(range, &[3])));
}

#[test]
fn a_second_arming_reports_everything_again() {
    if !can_track() {
        return;
    }
    let mut t = Anonymous::start();
    t.tracker.arm(&[vma(t.range, VmaKind::PrivateAnonymous)]).unwrap();
    assert_eq!(t.collect().dirty, pages(t.range, &[0, 1, 2, 3, 4, 5, 6, 7]));
    assert_eq!(t.finish(), Changes::default());
}

#[test]
fn without_a_tracker_everything_counts_and_absence_still_shows() {
    let victim = Victim::start();
    let tracker = Box::new(EveryPage::new(victim.pid()).unwrap());
    let mut t = Anonymous::tracked_by(victim, tracker);
    t.victim.run(&format!("madvise {} 1 4", t.page(0)));
    let changes = t.finish();
    assert_eq!((changes.dirty, changes.absent), (pages(t.range, &[1, 2, 3, 4, 5, 6, 7]), pages(t.range, &[0])));
}

#[test]
fn soft_dirty_bits() {
    let victim = Victim::start();
    let tracker = Box::new(SoftDirty::new(victim.pid()).unwrap());
    if std::fs::write(format!("/proc/{}/clear_refs", victim.pid()), "4").is_err() {
        eprintln!("not checked: this kernel has no soft-dirty bits");
        return;
    }
    let mut t = Anonymous::tracked_by(victim, tracker);
    // Without the bits (the file is there all the same) nothing ever counts as written after the first report.
    t.victim.run(&format!("poke {} 1", t.page(2)));
    t.victim.run(&format!("poke {} 1", t.page(12)));
    t.victim.run(&format!("madvise {} 1 4", t.page(0)));
    t.victim.stop();
    let changes = t.collect();
    t.victim.go_on();
    assert_eq!(changes.absent, pages(t.range, &[0]));
    if !changes.dirty.contains(t.page(2)) {
        assert_eq!(changes.dirty, pages(t.range, &[12]));
        eprintln!("checked in part: this kernel has no soft-dirty bits");
        return;
    }
    assert_eq!(changes.dirty, pages(t.range, &[2, 12]));
    t.finish();
}

/// Enough memory for several threads in the last report, with a mapping among it that is not registered.
#[test]
fn a_last_look_by_several_threads_sees_the_same() {
    const PAGES: u64 = (4 << 30) / PAGE_SIZE;
    const PIECE: u64 = (256 << 20) / PAGE_SIZE;
    if !can_track() {
        return;
    }
    let mut victim = Victim::start();
    let mut tracker = victim.tracker();
    let reserved = victim.run(&format!("reserve {PAGES}"));
    let range = victim.range(&format!("anonymous-at {reserved} {PAGES}"), PAGES);
    let poke = |victim: &mut Victim, indices: &[u64]| {
        for index in indices {
            victim.run(&format!("poke {} 1", range.start() + index * PAGE_SIZE));
        }
    };
    let all = [0, PIECE - 1, PIECE, 7 * PIECE + 5, PAGES - 1];
    poke(&mut victim, &all);
    let mut vmas = vec![vma(range, VmaKind::PrivateAnonymous)];
    tracker.arm(&vmas).unwrap();
    assert_eq!(tracker.collect(&vmas).unwrap().dirty, pages(range, &all));
    let again = [PIECE - 1, PIECE, 9 * PIECE, PAGES - 1];
    poke(&mut victim, &again);
    let place = victim.run("reserve 4");
    let young = victim.range(&format!("anonymous-at {place} 4"), 4);
    victim.run(&format!("fill {} 2 7", young.start()));
    vmas.push(vma(young, VmaKind::PrivateAnonymous));
    vmas.sort_by_key(|vma| vma.range.start());
    victim.stop();
    let last = tracker.collect_final(&vmas).unwrap();
    assert_eq!(last.dirty, pages(range, &again).union(&pages(young, &[0, 1])));
    assert!(last.absent.is_empty());
    victim.go_on();
}
