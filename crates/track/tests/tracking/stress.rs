//! Writers that never stop, against reports that never stop, and a comparison of every byte in the end.

use std::thread::sleep;
use std::time::{Duration, Instant};

use godwit_pages::PageRange;
use godwit_track::{TrackedVma, Tracker, VmaKind};

use crate::victim::{Copy, Victim, can_track, vma};

const PAGES: u64 = 8192;
const DURATION: Duration = Duration::from_millis(1500);

fn follow(victim: &Victim, mappings: impl Fn(&Victim) -> Vec<TrackedVma>, tracker: &mut dyn Tracker) {
    tracker.arm(&mappings(victim)).unwrap();
    let mut copy = Copy::default();
    let begin = Instant::now();
    let (mut rounds, mut sent) = (0, 0);
    while begin.elapsed() < DURATION {
        let changes = tracker.collect(&mappings(victim)).unwrap();
        copy.apply(victim, &changes);
        rounds += 1;
        sent += changes.dirty.pages();
        sleep(Duration::from_millis(1));
    }
    victim.stop();
    let vmas = mappings(victim);
    let changes = tracker.collect_final(&vmas).unwrap();
    copy.apply(victim, &changes);
    copy.assert_equal(victim, &vmas, &[]);
    assert!(rounds > 1 && sent > 0, "{rounds} rounds, {sent} pages");
}

fn scribbled(map: &str, command: &str, kind: VmaKind) {
    if !can_track() {
        return;
    }
    let mut victim = Victim::start();
    let range = victim.range(map, PAGES);
    victim.run(&format!("fill {} {PAGES} 7", range.start()));
    let mut tracker = victim.tracker();
    victim.run(&format!("{command} {} {PAGES} 2", range.start()));
    follow(&victim, |_| vec![vma(range, kind)], &mut tracker);
}

#[test]
fn anonymous_memory() {
    scribbled(&format!("anonymous {PAGES}"), "scribble", VmaKind::PrivateAnonymous);
}

#[test]
fn huge_pages() {
    scribbled(&format!("aligned {PAGES}"), "scribble", VmaKind::PrivateAnonymous);
}

#[test]
fn shared_memory() {
    scribbled(&format!("shared {PAGES} -1 0"), "scribble-shared", VmaKind::SharedMemory);
}

#[test]
fn mappings_that_come_go_and_move() {
    if !can_track() {
        return;
    }
    let mut victim = Victim::start();
    let pages = 2048;
    let arena: PageRange = victim.range(&format!("reserve {pages}"), pages);
    let mut tracker = victim.tracker();
    victim.run(&format!("churn {} {pages} 1", arena.start()));
    follow(&victim, |victim| victim.anonymous_mappings(arena), &mut tracker);
}

#[test]
fn mappings_that_grow() {
    if !can_track() {
        return;
    }
    let mut victim = Victim::start();
    let mut tracker = victim.tracker();
    victim.run("grow 0 0 2");
    let everywhere = PageRange::new(1 << 16, 1 << 47).unwrap();
    let begin = Instant::now();
    let mut turns = 0;
    while begin.elapsed() < DURATION {
        tracker.arm(&victim.anonymous_mappings(everywhere)).unwrap();
        for _ in 0..10 {
            tracker.collect(&victim.anonymous_mappings(everywhere)).unwrap();
        }
        turns += 1;
    }
    assert!(turns > 1);
    assert_eq!(victim.run("refused"), 0);
}
