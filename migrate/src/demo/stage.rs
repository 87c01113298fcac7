//! The demo's scenery: a directory, a token, two hosts with a page server each, and the worker. Dropping it removes all of it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use godwit_carry::DEFAULT_PORT;
use tempfile::TempDir;

use crate::cancel::Cancel;
use crate::cli::DemoArguments;
use crate::display::{Audience, Display};

use super::host::{Host, join};
use super::observation::Observation;
use super::passage::{self, Passage};
use super::{INDENT, tell};

/// One of the two hosts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Side {
    A,
    B,
}

impl Side {
    /// Its host name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::A => "host-a",
            Self::B => "host-b",
        }
    }

    /// Its address, of a network that exists between the two hosts only. RFC 5737
    fn address(self) -> &'static str {
        match self {
            Self::A => "192.0.2.1",
            Self::B => "192.0.2.2",
        }
    }

    /// The pid from which it counts on.
    fn first_pid(self) -> i32 {
        match self {
            Self::A => 1_000,
            Self::B => 2_000,
        }
    }
}

/// Two hosts and what is needed to move something between them.
#[derive(Debug)]
pub(super) struct Stage {
    // Before the directory: programs that write there are gone first.
    a: Host,
    b: Host,
    program: PathBuf,
    directory: TempDir,
}

impl Stage {
    /// Makes the hosts and starts a page server on each.
    pub(super) fn set(arguments: &DemoArguments, cancel: &Cancel) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "the demo makes namespaces, and that takes root: sudo migrate demo");
        let program = std::env::current_exe().context("the path of this program")?;
        let page_server = program.with_file_name("page-server");
        ensure!(
            page_server.is_file(),
            "there is no page-server beside this program ({}): build it with `cargo build --release`",
            page_server.display()
        );
        for (tool, package) in [("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")] {
            let found = Command::new(tool).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
            ensure!(found.is_ok(), "{tool} is missing: apt-get install {package}");
        }
        let directory =
            tempfile::Builder::new().prefix("godwit-demo-").tempdir().context("a directory for the demo")?;
        write_token(&token(directory.path()))?;
        let a = Host::start(Side::A.name(), Side::A.first_pid(), &program)?;
        let b = Host::start(Side::B.name(), Side::B.first_pid(), &program)?;
        join((&a, Side::A.address()), (&b, Side::B.address()))?;
        let mut stage = Self { a, b, program, directory };
        for side in [Side::A, Side::B] {
            ensure!(!cancel.is_cancelled(), "interrupted");
            stage
                .start_page_server(side, &page_server, arguments)
                .with_context(|| format!("page-server on {}{}", side.name(), stage.logs()))?;
        }
        Ok(stage)
    }

    /// A host's address.
    pub(super) fn address(&self, side: Side) -> &'static str {
        side.address()
    }

    /// Starts the worker on host A.
    pub(super) fn start_worker(&mut self, memory: u32, cancel: &Cancel) -> Result<Observation> {
        let directory = self.directory.path().to_owned();
        let mut command = self.a.command(&self.program);
        command.args(["demo-worker", "--memory", &memory.to_string(), "--directory"]).arg(&directory);
        command.stderr(log(&directory, "worker")?);
        self.a.start_program(command)?;
        let observation = Observation::of(&directory);
        observation.settle(1, cancel).with_context(|| format!("the worker did not start{}", self.logs()))?;
        Ok(observation)
    }

    /// Moves process `pid` from one host to the other and shows it.
    pub(super) fn migrate(
        &self,
        pid: i32,
        from: Side,
        to: Side,
        arguments: &DemoArguments,
        cancel: &Cancel,
    ) -> Result<Passage> {
        let mode = arguments.mode.to_string();
        let pid = pid.to_string();
        tell(format_args!("{INDENT}{}# migrate --to {} {pid} --mode {mode}", from.name(), to.address()));
        let mut command = self.host(from).command(&self.program);
        command
            .args(["--to", to.address(), &pid, "--mode", &mode, "--json", "--token-file"])
            .arg(token(self.directory.path()));
        command.args(verbosity(arguments));
        match arguments.verbose {
            0 => command.stderr(log(self.directory.path(), "migrate")?),
            _ => command.stderr(Stdio::inherit()),
        };
        let display = Display::start_indented(Audience::of_standard_error(arguments.verbose), to.name(), INDENT);
        passage::run(command, display, cancel)
            .with_context(|| format!("the move to {}{}{}", to.name(), self.last_words(&["migrate"]), self.logs()))
    }

    /// The last words of the page servers and the worker, for when something went wrong.
    pub(super) fn logs(&self) -> String {
        self.last_words(&["page-server-host-a", "page-server-host-b", "worker"])
    }

    fn last_words(&self, programs: &[&str]) -> String {
        let mut text = String::new();
        for name in programs {
            let log = fs::read_to_string(log_file(self.directory.path(), name)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            for line in &lines[lines.len().saturating_sub(10)..] {
                text += &format!("\n  {name}: {}", crate::display::words::printable(line));
            }
        }
        text
    }

    fn host(&self, side: Side) -> &Host {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }

    fn start_page_server(&mut self, side: Side, program: &Path, arguments: &DemoArguments) -> Result<()> {
        let mut command = self.host(side).command(program);
        command.args(["--listen", &format!("{}:{DEFAULT_PORT}", side.address()), "--token-file"]);
        command.arg(token(self.directory.path())).args(verbosity(arguments));
        command.stderr(log(self.directory.path(), &format!("page-server-{}", side.name()))?);
        let host = match side {
            Side::A => &mut self.a,
            Side::B => &mut self.b,
        };
        host.start_program(command)?;
        host.wait_for_udp(DEFAULT_PORT)
    }
}

/// The words that ask other programs for as much as the demo was asked for.
fn verbosity(arguments: &DemoArguments) -> Vec<&'static str> {
    vec!["-v"; arguments.verbose.into()]
}

fn token(directory: &Path) -> PathBuf {
    directory.join("token")
}

fn log_file(directory: &Path, name: &str) -> PathBuf {
    directory.join(name).with_extension("log")
}

fn log(directory: &Path, name: &str) -> Result<File> {
    let path = log_file(directory, name);
    File::options().create(true).append(true).open(&path).with_context(|| path.display().to_string())
}

/// Makes a new secret that only its owner can read.
fn write_token(path: &Path) -> Result<()> {
    let mut secret = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut secret)?;
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.write_all(&secret)?;
    Ok(())
}
