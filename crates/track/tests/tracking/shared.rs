//! Shared memory: anonymous, memfd, System V, files.

use std::io::Write;
use std::thread::sleep;
use std::time::Duration;

use godwit_pages::{PAGE_SIZE, PageRange, PageSet};
use godwit_track::{Changes, TrackedVma, Tracker, VmaKind, WpAsync, populated};

use crate::victim::{Copy, Victim, can_track, finish, pages, vma};

const PAGES: u64 = 64;

/// A victim with shared memory whose pages 0..8 are written, reported once.
struct Shared {
    victim: Victim,
    tracker: WpAsync,
    vma: TrackedVma,
    copy: Copy,
}

impl Shared {
    fn start(mut victim: Victim, range: PageRange) -> Self {
        let mut tracker = victim.tracker();
        victim.run(&format!("fill {} 8 7", range.start()));
        let vma = vma(range, VmaKind::SharedMemory);
        tracker.arm(&[vma]).unwrap();
        let mut copy = Copy::default();
        let changes = tracker.collect(&[vma]).unwrap();
        assert_eq!(changes.dirty, pages(range, &[0, 1, 2, 3, 4, 5, 6, 7]), "holes are not reported");
        copy.apply(&victim, &changes);
        Self { victim, tracker, vma, copy }
    }

    fn memfd() -> (Self, u64) {
        let mut victim = Victim::start();
        let fd = victim.run(&format!("memfd {PAGES}"));
        let range = victim.range(&format!("shared {PAGES} {fd} 0"), PAGES);
        (Self::start(victim, range), fd)
    }

    fn page(&self, index: u64) -> u64 {
        self.vma.range.start() + index * PAGE_SIZE
    }

    fn pages(&self, indices: &[u64]) -> PageSet {
        pages(self.vma.range, indices)
    }

    fn collect(&mut self) -> Changes {
        let changes = self.tracker.collect(&[self.vma]).unwrap();
        self.copy.apply(&self.victim, &changes);
        changes
    }

    fn finish(&mut self) -> Changes {
        self.victim.stop();
        let changes = self.tracker.collect_final(&[self.vma]).unwrap();
        let before = populated(self.victim.pid(), &[self.vma]).unwrap().populated;
        self.copy.apply(&self.victim, &changes);
        let after = populated(self.victim.pid(), &[self.vma]).unwrap().populated;
        assert_eq!(before, after, "reading what is reported fills no holes");
        self.copy.assert_equal(&self.victim, &[self.vma], &[]);
        self.victim.go_on();
        changes
    }
}

fn every_kind() -> Vec<Shared> {
    let mut victim = Victim::start();
    let anonymous = victim.range(&format!("shared {PAGES} -1 0"), PAGES);
    let anonymous = Shared::start(victim, anonymous);
    let mut victim = Victim::start();
    let sysv = victim.range(&format!("sysv {PAGES}"), PAGES);
    vec![anonymous, Shared::start(victim, sysv), Shared::memfd().0]
}

#[test]
fn writes_are_reported_once_whatever_the_object() {
    if !can_track() {
        return;
    }
    for mut t in every_kind() {
        let changes = t.collect();
        assert_eq!((changes.dirty, changes.absent), (PageSet::new(), PageSet::new()));
        t.victim.run(&format!("poke {} 9", t.page(3)));
        t.victim.run(&format!("poke {} 9", t.page(50)));
        t.victim.run(&format!("kernel-write {} 9", t.page(5)));
        assert_eq!(t.collect().dirty, t.pages(&[3, 5, 50]));
        t.victim.run(&format!("poke {} 8", t.page(50)));
        assert_eq!(t.finish().dirty, t.pages(&[50]));
    }
}

#[test]
fn pages_written_and_then_zapped_count() {
    if !can_track() {
        return;
    }
    for mut t in every_kind() {
        t.victim.run(&format!("poke {} 9", t.page(3)));
        t.victim.run(&format!("madvise {} 1 4", t.page(3)));
        t.victim.run(&format!("poke {} 9", t.page(40)));
        t.victim.run(&format!("madvise {} 1 4", t.page(40)));
        let changes = t.collect();
        assert_eq!((changes.dirty, changes.absent), (t.pages(&[3, 40]), PageSet::new()));
        t.victim.run(&format!("madvise {} 8 4", t.page(0)));
        let changes = t.finish();
        assert_eq!((changes.dirty, changes.absent), (PageSet::new(), PageSet::new()), "the object keeps them");
    }
}

#[test]
fn pages_punched_out_of_the_object_become_absent() {
    if !can_track() {
        return;
    }
    for mut t in every_kind() {
        t.victim.run(&format!("madvise {} 2 9", t.page(1)));
        t.victim.run(&format!("poke {} 3", t.page(2)));
        let changes = t.collect();
        assert_eq!((changes.dirty, changes.absent), (t.pages(&[2]), t.pages(&[1])));
        t.victim.run(&format!("madvise {} 1 9", t.page(4)));
        // As many pages come as go: the block count alone would not tell.
        t.victim.run(&format!("poke {} 3", t.page(30)));
        let changes = t.finish();
        assert_eq!((changes.dirty, changes.absent), (t.pages(&[30]), t.pages(&[4])));
    }
}

#[test]
fn punching_and_truncating_through_the_descriptor_shows() {
    if !can_track() {
        return;
    }
    let (mut t, fd) = Shared::memfd();
    t.victim.run(&format!("punch {fd} 0 {PAGE_SIZE}"));
    assert_eq!(t.collect().absent, t.pages(&[0]));
    t.victim.run(&format!("truncate {fd} {}", 4 * PAGE_SIZE));
    t.victim.run(&format!("truncate {fd} {}", PAGES * PAGE_SIZE));
    assert_eq!(t.finish().absent, t.pages(&[4, 5, 6, 7]));
}

#[test]
fn writes_through_a_descriptor_make_the_object_suspect() {
    if !can_track() {
        return;
    }
    let (mut t, fd) = Shared::memfd();
    sleep(Duration::from_millis(60));
    t.collect();
    sleep(Duration::from_millis(60));
    assert_eq!(t.collect(), Changes::default(), "an object at rest is above suspicion");
    t.victim.run(&format!("pwrite {fd} {} 9", 3 * PAGE_SIZE));
    t.victim.run(&format!("poke {} 9", t.page(5)));
    let changes = t.collect();
    assert_eq!((&changes.dirty, &changes.suspect), (&t.pages(&[5]), &t.pages(&[0, 1, 2, 3, 4, 6, 7])));
    sleep(Duration::from_millis(60));
    // Just written: its time might not move again. After that it is at rest.
    assert!(!t.collect().suspect.is_empty());
    assert_eq!(t.collect(), Changes::default());
    t.victim.run(&format!("pwrite {fd} {} 9", 20 * PAGE_SIZE));
    let changes = t.finish();
    assert_eq!((changes.dirty, changes.suspect.pages()), (t.pages(&[20]), 8));
    assert_eq!(t.finish().suspect.pages(), 8, "the last report changes nothing");
}

#[test]
fn objects_without_a_descriptor_are_above_suspicion() {
    if !can_track() {
        return;
    }
    for mut t in every_kind().drain(..2) {
        t.victim.run(&format!("poke {} 9", t.page(5)));
        t.collect();
        t.victim.run(&format!("poke {} 8", t.page(5)));
        assert_eq!(t.finish().suspect, PageSet::new());
    }
}

#[test]
fn two_mappings_of_parts_of_one_object() {
    if !can_track() {
        return;
    }
    let mut victim = Victim::start();
    let fd = victim.run(&format!("memfd {PAGES}"));
    let low = victim.range(&format!("shared 16 {fd} 0"), 16);
    let high = victim.range(&format!("shared 16 {fd} {}", 8 * PAGE_SIZE), 16);
    let vmas =
        [vma(low, VmaKind::SharedMemory), TrackedVma { offset: 8 * PAGE_SIZE, ..vma(high, VmaKind::SharedMemory) }];
    let mut tracker = victim.tracker();
    victim.run(&format!("fill {} 2 7", high.start()));
    tracker.arm(&vmas).unwrap();
    let mut copy = Copy::default();
    let changes = tracker.collect(&vmas).unwrap();
    assert_eq!(changes.dirty, pages(low, &[8, 9]).union(&pages(high, &[0, 1])));
    copy.apply(&victim, &changes);
    // Each mapping has its own bits: a write through one is reported there, which names the same page of the object.
    victim.run(&format!("poke {} 5", high.start() + 9 * PAGE_SIZE));
    let changes = tracker.collect(&vmas).unwrap();
    assert_eq!(changes.dirty, pages(high, &[9]));
}

#[test]
fn shared_file_mappings() {
    if !can_track() {
        return;
    }
    let content = vec![5u8; (PAGES * PAGE_SIZE) as usize];
    let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.write_all(&content).unwrap();
    let mut victim = Victim::start();
    let mut tracker = victim.tracker();
    let range = victim.range(&format!("file {PAGES} 1 0 {}", file.path().display()), PAGES);
    let vmas = [vma(range, VmaKind::SharedFile)];
    victim.run(&format!("poke {} 9", range.start()));
    tracker.arm(&vmas).unwrap();
    let mut copy = Copy::default();
    let changes = tracker.collect(&vmas).unwrap();
    assert!(changes.dirty.contains(range.start()));
    copy.apply(&victim, &changes);
    victim.run(&format!("poke {} 9", range.start() + 40 * PAGE_SIZE));
    victim.run(&format!("madvise {} 1 4", range.start() + 40 * PAGE_SIZE));
    let changes = finish(&victim, &mut tracker, &mut copy, &vmas, &content);
    assert_eq!((changes.dirty, changes.absent), (pages(range, &[40]), PageSet::new()));
}
