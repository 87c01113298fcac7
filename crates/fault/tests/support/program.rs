//! Starts the two ends that the C program beside this file plays, and talks to them.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use godwit_kernel::process::{pidfd_getfd, pidfd_open};
use godwit_kernel::uffd::Userfaultfd;
use godwit_pages::{PageRange, PageSet};

/// Where the program keeps its memory.
pub(crate) const BASE: u64 = 0x6000_0000_0000;

/// The set of `pages` pages from page number `first` on.
pub(crate) fn pages(first: u64, pages: u64) -> PageSet {
    PageSet::from(PageRange::from_pages(BASE + first * 4096, pages).expect("a valid range"))
}

/// Compiles the program once.
fn binary() -> &'static PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let source = include_str!("program.c");
        let directory = std::env::temp_dir().join(format!("godwit-fault-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory for the test program");
        let path = directory.join("program");
        std::fs::write(directory.join("program.c"), source).expect("room for the test program");
        let compiled =
            Command::new("cc").args(["-O2", "-pthread", "-o"]).arg(&path).arg(directory.join("program.c")).status();
        assert!(compiled.expect("a C compiler").success(), "the test program does not compile");
        path
    })
}

/// One end. Killed when dropped.
pub(crate) struct End {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl End {
    fn start(role: &str, pages: u64) -> Self {
        let mut command = Command::new(binary());
        command.args([role, &pages.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the test program starts");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, input, output }
    }

    /// A source with `pages` pages of content.
    pub(crate) fn source(pages: u64) -> Self {
        let mut end = Self::start("source", pages);
        assert_eq!(end.hear(), "ready");
        end
    }

    /// A program that lacks all of its `pages` pages, and its userfaultfd, of which it keeps no copy.
    pub(crate) fn program(pages: u64) -> (Self, Userfaultfd) {
        let (mut end, number) = Self::program_with_its_userfaultfd(pages);
        let pidfd = pidfd_open(end.pid()).expect("a pidfd");
        let uffd = Userfaultfd::from_fd(pidfd_getfd(pidfd.as_fd(), number).expect("its userfaultfd"));
        assert_eq!(end.ask("close"), "ok 0");
        (end, uffd)
    }

    /// A program that lacks all of its `pages` pages and still has its userfaultfd, and that one's number.
    pub(crate) fn program_with_its_userfaultfd(pages: u64) -> (Self, i32) {
        let mut end = Self::start("program", pages);
        let line = end.hear();
        let number = line.strip_prefix("uffd ").expect(&line).parse().expect("a number");
        (end, number)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Says a line and waits for the answer.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.say(line);
        self.hear()
    }

    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("the test program listens");
    }

    pub(crate) fn hear(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the test program answers");
        line.trim_end().to_owned()
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
