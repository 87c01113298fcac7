//! The wrapper on userfaultfds of our own process, on memory that no reference points to.

use super::*;
use std::thread;

const PAGE: u64 = 4096;

/// Anonymous memory of our own that no reference ever points to.
struct Mapping {
    start: u64,
    pages: u64,
}

impl Mapping {
    fn new(pages: u64) -> Self {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at a place of the kernel's choice disturbs nothing.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), (pages * PAGE) as usize, protection, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: start as u64, pages }
    }

    fn page(&self, index: u64) -> u64 {
        self.start + index * PAGE
    }

    fn length(&self) -> u64 {
        self.pages * PAGE
    }

    fn byte(&self, index: u64) -> u8 {
        // SAFETY: the page lies in the mapping, which lives as long as `self`.
        unsafe { std::ptr::read_volatile(self.page(index) as *const u8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        unsafe { libc::munmap(self.start as *mut c_void, self.length() as usize) };
    }
}

/// A userfaultfd of our own, or a word why there is none.
fn own(features: Features) -> Option<Userfaultfd> {
    let made = Userfaultfd::of_self().and_then(|uffd| uffd.api(features).map(|_| uffd));
    made.inspect_err(|errno| eprintln!("not checked: userfaultfd with {features:?}: {errno}")).ok()
}

fn missing(features: Features, pages: u64) -> Option<(Userfaultfd, Mapping)> {
    let (uffd, mapping) = (own(features)?, Mapping::new(pages));
    let ioctls = uffd.register(mapping.start, mapping.length(), Mode::Missing).unwrap();
    assert!(ioctls.contains(Ioctls::COPY));
    Some((uffd, mapping))
}

#[test]
fn what_is_ordinary_is_an_outcome() {
    let Some((uffd, mapping)) = missing(Features::empty(), 8) else { return };
    let two = vec![7u8; 2 * PAGE as usize];
    let copy = |page, bytes: &[u8]| uffd.copy(mapping.page(page), bytes, Wake::Now);
    assert_eq!(copy(2, &two), Ok(CopyOutcome::Copied(2 * PAGE)));
    assert_eq!(copy(2, &two), Ok(CopyOutcome::AlreadyPresent));
    assert_eq!(copy(1, &two), Ok(CopyOutcome::Retry(PAGE)), "the second page is the obstacle");
    assert_eq!(copy(7, &two), Ok(CopyOutcome::NotMapped), "half of it is behind the mapping");
    assert_eq!(uffd.copy(mapping.page(5) + 1, &two, Wake::Now), Err(Errno::EINVAL));
    assert_eq!(uffd.zeropage(mapping.page(4), PAGE, Wake::Now), Ok(CopyOutcome::Copied(PAGE)));
    assert_eq!(uffd.zeropage(mapping.page(4), PAGE, Wake::Now), Ok(CopyOutcome::AlreadyPresent));
    assert_eq!((mapping.byte(1), mapping.byte(3), mapping.byte(4)), (7, 7, 0));
    uffd.unregister(mapping.start, mapping.length()).unwrap();
    assert_eq!(copy(6, &two), Ok(CopyOutcome::NotMapped));
    assert_eq!(mapping.byte(6), 0);
}

#[test]
fn a_fault_is_reported_and_served_through_a_second_descriptor() {
    let Some((uffd, mapping)) = missing(Features::THREAD_ID, 8) else { return };
    let second = uffd.try_clone().unwrap();
    drop(uffd);
    let mut buffer = Events::with_capacity(16);
    assert!(second.read_events(&mut buffer).unwrap().is_empty(), "nothing happened and nobody waits");
    thread::scope(|scope| {
        let reader = scope.spawn(|| mapping.byte(3));
        let events = loop {
            let events = second.read_events(&mut buffer).unwrap();
            if !events.is_empty() {
                break events;
            }
            thread::yield_now();
        };
        let Event::Pagefault { address, fault, access, thread_id } = events[0] else { panic!("{events:?}") };
        assert_eq!((address, fault, access), (mapping.page(3), Fault::Missing, Access::Read));
        assert!(thread_id > 0);
        let page = [9u8; PAGE as usize];
        assert_eq!(second.copy(address, &page, Wake::Later), Ok(CopyOutcome::Copied(PAGE)));
        second.wake(address, PAGE).unwrap();
        assert_eq!(reader.join().unwrap(), 9);
    });
}

#[test]
fn dropped_and_unmapped_pages_are_events() {
    let features = Features::EVENT_REMOVE | Features::EVENT_UNMAP;
    let Some((uffd, mapping)) = missing(features, 8) else { return };
    let mut buffer = Events::with_capacity(16);
    let (start, length) = (mapping.start, mapping.length());
    thread::scope(|scope| {
        // The calls return only once their events are read.
        let caller = scope.spawn(move || {
            // SAFETY: nothing refers to the content of the mapping.
            unsafe { libc::madvise(start as *mut c_void, PAGE as usize, libc::MADV_DONTNEED) };
            drop(mapping);
        });
        let mut seen = Vec::new();
        while seen.len() < 2 {
            seen.extend(uffd.read_events(&mut buffer).unwrap());
            thread::yield_now();
        }
        caller.join().unwrap();
        assert!(matches!(seen[0], Event::Remove { start: s, end } if s == start && end == start + PAGE));
        assert!(matches!(seen[1], Event::Unmap { start: s, end } if s == start && end == start + length));
    });
}

#[test]
fn poison_and_the_api_know_their_limits() {
    let Some((uffd, mapping)) = missing(POISON, 4) else { return };
    assert_eq!(uffd.poison(mapping.page(1), PAGE, Wake::Now), Ok(CopyOutcome::Copied(PAGE)));
    assert_eq!(uffd.poison(mapping.page(1), PAGE, Wake::Now), Ok(CopyOutcome::AlreadyPresent));
    assert_eq!(uffd.api(Features::empty()), Err(Errno::EINVAL), "the API is agreed on once");
    assert_eq!(uffd.register(0x1000, PAGE, Mode::Missing), Err(Errno::EINVAL));
    let file = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(Userfaultfd::from_fd(file.into()).api(Features::empty()), Err(Errno::ENOTTY));
}
