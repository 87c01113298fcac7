//! The process under test, and a copy of its memory that is kept up to date by nothing but a tracker's reports.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use godwit_kernel::uffd::Userfaultfd;
use godwit_kernel::{memory, process};
use godwit_pages::{PAGE_SIZE, PageRange, PageSet};
use godwit_track::{Changes, Kind, REQUIRED_FEATURES, TrackedVma, Tracker, VmaKind, WpAsync, probe};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// Tells whether write-protection tracking can be tested here; says so where it cannot.
pub(crate) fn can_track() -> bool {
    let kind = probe(std::process::id().cast_signed()).unwrap();
    if kind != Kind::WpAsync {
        eprintln!("not checked: this kernel's best tracker is {kind}");
    }
    kind == Kind::WpAsync
}

/// Compiles the victim where its source is newer; several test processes may do so at once.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tracking/victim.c"));
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let program = folder.join("track-victim");
        let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
        if modified(&program) <= modified(source) {
            let fresh = folder.join(format!("track-victim-{}", std::process::id()));
            let status = Command::new("cc").args(["-O1", "-pthread", "-o"]).arg(&fresh).arg(source).status();
            assert!(status.expect("a C compiler, cc").success());
            std::fs::rename(fresh, &program).unwrap();
        }
        program
    })
}

/// A running victim; killed and reaped when dropped.
pub(crate) struct Victim {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Victim {
    pub(crate) fn start() -> Self {
        let mut child =
            Command::new(program()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the victim starts");
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, input, output }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Has a command done; returns its number.
    pub(crate) fn run(&mut self, command: &str) -> u64 {
        writeln!(self.input, "{command}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        let (number, errno) = answer.trim().split_once(' ').expect("an answer");
        let number: i64 = number.parse().unwrap();
        assert_ne!(number, -1, "{command}: errno {errno}");
        number.cast_unsigned()
    }

    pub(crate) fn range(&mut self, command: &str, pages: u64) -> PageRange {
        PageRange::from_pages(self.run(command), pages).unwrap()
    }

    /// Fetches a userfaultfd that the victim creates.
    pub(crate) fn userfaultfd(&mut self) -> Userfaultfd {
        let number = self.run("userfaultfd").try_into().unwrap();
        let pidfd = process::pidfd_open(self.pid()).unwrap();
        let uffd = Userfaultfd::from_fd(process::pidfd_getfd(pidfd.as_fd(), number).unwrap());
        uffd.api(REQUIRED_FEATURES).unwrap();
        uffd
    }

    pub(crate) fn tracker(&mut self) -> WpAsync {
        let uffd = self.userfaultfd();
        WpAsync::new(self.pid(), uffd).unwrap()
    }

    pub(crate) fn stop(&self) {
        let pid = Pid::from_raw(self.pid());
        kill(pid, Signal::SIGSTOP).unwrap();
        waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
    }

    pub(crate) fn go_on(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGCONT).unwrap();
    }

    /// Reads pages, as a mover would; `None` where nothing is mapped (any more).
    pub(crate) fn read(&self, range: PageRange) -> Option<Vec<u8>> {
        let mut buffer = vec![0; range.len() as usize];
        let read = memory::read(self.pid(), range.start(), &mut buffer).ok()?;
        (read == buffer.len()).then_some(buffer)
    }

    /// Lists the writable mappings inside `range`, all of them taken for anonymous, as they are now.
    pub(crate) fn anonymous_mappings(&self, range: PageRange) -> Vec<TrackedVma> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        let bounds = |line: &str| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            let hex = |text| u64::from_str_radix(text, 16).ok();
            Some((hex(start)?, hex(end)?))
        };
        let (mut found, mut before) = (Vec::<TrackedVma>::new(), 0);
        let mut listed = false;
        for line in maps.lines() {
            let Some((start, end)) = bounds(line) else { continue };
            if let Some(last) = found.last_mut().filter(|_| listed) {
                last.room = PageRange::new(last.room.start(), start.max(last.range.end())).unwrap();
            }
            listed = line.contains(" rw") && start >= range.start() && end <= range.end();
            if listed {
                let own = PageRange::new(start, end).unwrap();
                let room = PageRange::new(before.min(start), end).unwrap();
                found.push(TrackedVma { room, ..vma(own, VmaKind::PrivateAnonymous) });
            }
            before = end;
        }
        found
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a destination would hold: pages sent, less pages said to be absent.
#[derive(Default)]
pub(crate) struct Copy {
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Copy {
    /// Follows a report, reading the dirty pages from the victim.
    pub(crate) fn apply(&mut self, victim: &Victim, changes: &Changes) {
        assert!(changes.dirty.intersection(&changes.absent).is_empty());
        assert!(changes.huge.subtract(&changes.dirty).is_empty());
        assert!(changes.suspect.intersection(&changes.dirty.union(&changes.absent)).is_empty());
        for page in changes.absent.iter().flat_map(PageRange::page_addresses) {
            self.pages.remove(&page);
        }
        for range in changes.dirty.union(&changes.suspect).iter() {
            for page in range.page_addresses() {
                match victim.read(PageRange::from_pages(page, 1).unwrap()) {
                    Some(content) => self.pages.insert(page, content),
                    None => self.pages.remove(&page),
                };
            }
        }
    }

    /// Compares with the (stopped) victim page by page; `fresh` is what a page without content of its own shows.
    pub(crate) fn assert_equal(&self, victim: &Victim, vmas: &[TrackedVma], fresh: &[u8]) {
        let mut wrong = PageSet::new();
        for vma in vmas {
            for page in vma.range.page_addresses() {
                let range = PageRange::from_pages(page, 1).unwrap();
                let offset = (vma.offset + page - vma.range.start()) as usize;
                let default = fresh.get(offset..offset + PAGE_SIZE as usize).unwrap_or(&[0; PAGE_SIZE as usize]);
                let copied = self.pages.get(&page).map_or(default, Vec::as_slice);
                if victim.read(range).as_deref() != Some(copied) {
                    wrong.insert(range);
                }
            }
        }
        assert!(wrong.is_empty(), "{} pages differ: {wrong:?}", wrong.pages());
    }
}

/// Makes the last report of a stopped victim, follows it, compares, and lets the victim go on.
pub(crate) fn finish(
    victim: &Victim,
    tracker: &mut dyn Tracker,
    copy: &mut Copy,
    vmas: &[TrackedVma],
    fresh: &[u8],
) -> Changes {
    victim.stop();
    let changes = tracker.collect_final(vmas).unwrap();
    copy.apply(victim, &changes);
    copy.assert_equal(victim, vmas, fresh);
    victim.go_on();
    changes
}

/// Picks pages of a range by index.
pub(crate) fn pages(range: PageRange, indices: &[u64]) -> PageSet {
    indices.iter().map(|index| PageRange::from_pages(range.start() + index * PAGE_SIZE, 1).unwrap()).collect()
}

pub(crate) fn vma(range: PageRange, kind: VmaKind) -> TrackedVma {
    TrackedVma { range, room: range, kind, offset: 0 }
}
