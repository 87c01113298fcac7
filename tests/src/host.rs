//! One host: namespaces kept by an `init` process that dies with the test.
//!
//! The chain `setpriv --pdeathsig` → `unshare --kill-child` → `init` ties the three together: when the thread that made
//! the host ends, for whatever reason, the kernel kills the first, then the second, then the PID namespace's init and with
//! it everything that ever ran on the host.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::binaries::launcher;
use crate::proc_view;
use crate::process::{Finished, Running};

/// Where the programs keep their journals unless told otherwise.
pub(crate) const STATE: &str = "/run/godwit";

/// Whose PID namespace a host uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PidSpace {
    /// One of its own, with its own `/proc`.
    #[default]
    Own,
    /// That of the process with this pid (in the test's namespace).
    Shared(u32),
}

/// What a host is made of.
#[derive(Debug, Clone, Default)]
pub struct HostOptions {
    /// The PID namespace.
    pub pid_space: PidSpace,
    /// Seconds added to CLOCK_MONOTONIC and CLOCK_BOOTTIME by a time namespace; none without one.
    pub clock_offsets: Option<(i64, i64)>,
    /// The pid after which the host's own namespace counts on, so that two hosts do not hand out the same pids.
    pub first_pid: u32,
    /// Directories that are a private, empty tmpfs on this host only.
    pub private: Vec<PathBuf>,
}

/// A host. Everything on it is killed when it is dropped.
#[derive(Debug)]
pub struct Host {
    name: String,
    init: Running,
    directory: PathBuf,
    own_time: bool,
    address: String,
}

impl Host {
    /// Makes a host without any network yet; `directory` is where its programs' logs go.
    ///
    /// # Errors
    /// The namespaces cannot be made, for instance without root.
    pub(crate) fn start(name: &str, directory: &Path, options: &HostOptions) -> Result<Self> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "SIGKILL"]).arg(launcher());
        if let PidSpace::Shared(pid) = options.pid_space {
            // Entering a PID namespace makes nsenter fork: the death signal has to be set again beyond it.
            command.args(["nsenter", "-p", "-m", "-t", &pid.to_string(), "setpriv", "--pdeathsig", "SIGKILL"]);
        }
        command.args(["unshare", "--net", "--mount", "--ipc", "--uts", "--fork", "--kill-child=SIGKILL"]);
        if options.pid_space == PidSpace::Own {
            command.args(["--pid", "--mount-proc"]);
        }
        if let Some((monotonic, boottime)) = options.clock_offsets {
            command.args(["--time", "--monotonic", &monotonic.to_string(), "--boottime", &boottime.to_string()]);
        }
        command.args(["--", "sh", "-c", &init_script(name, options)]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log(directory, &format!("{name}-init"))?);
        let child = command.spawn().context("setpriv cannot be started")?;
        let mut init = Running::resolve(&format!("the init of {name}"), child)?;
        let is_init = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == "sleep\n");
        let started = crate::wait_until(&format!("the host {name}"), Duration::from_secs(20), || {
            if let Some(status) = init.ended()? {
                bail!("its init ended with {status}");
            }
            Ok(is_init(init.host_pid()))
        });
        if let Err(error) = started {
            let words = fs::read_to_string(directory.join(format!("{name}-init"))).unwrap_or_default();
            bail!("{error:#}: {words}; {}", doings(init.host_pid()));
        }
        let own_time = options.clock_offsets.is_some();
        Ok(Self { name: name.to_owned(), init, directory: directory.to_owned(), own_time, address: String::new() })
    }

    /// The host's name, `source` or `destination`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The pid of the host's init as the test sees it.
    pub fn init_pid(&self) -> u32 {
        self.init.host_pid()
    }

    /// The host's address on the link to the other one.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where the logs of this host's programs are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn set_address(&mut self, address: String) {
        self.address = address;
    }

    /// A command that runs `program` on this host. Standard input is `/dev/null`.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init_pid().to_string(), "-n", "-m", "-i", "-u", "-p"]);
        if self.own_time {
            command.arg("-T");
        }
        command.arg(format!("--wdns={}", self.directory.display()));
        // No descriptor, process group or terminal leads out of the host.
        command.arg("--").arg(launcher()).arg(program).stdin(Stdio::null());
        command
    }

    /// Starts a command made by [`Host::command`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_command(&self, command: &mut Command) -> Result<Running> {
        let what = format!("{:?} on {}", command.get_args().last().unwrap_or_default(), self.name);
        let child = command.spawn().with_context(|| format!("cannot start {what}"))?;
        Running::resolve(&what, child)
    }

    /// Runs a program to its end and yields what it wrote.
    ///
    /// # Errors
    /// It could not be started, ran for more than 10 s, or ended with another status than 0.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<Finished> {
        let mut command = self.command(program);
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let finished = self.start_command(&mut command)?.finish(Duration::from_secs(10))?;
        ensure!(
            finished.status.success(),
            "{program} {arguments:?} on {} ended with {}: {}{}",
            self.name,
            finished.status,
            finished.stdout,
            finished.stderr
        );
        Ok(finished)
    }

    /// Translates a pid on this host to the one the test sees.
    ///
    /// # Errors
    /// There is no such process.
    pub fn host_pid(&self, pid: u32) -> Result<u32> {
        proc_view::pid_inside(self.init_pid(), pid).with_context(|| format!("on {}", self.name))
    }

    /// The pid on this host of a process that the test knows as `host_pid`.
    ///
    /// # Errors
    /// The process is gone or not of this host.
    pub fn pid_here(&self, host_pid: u32) -> Result<u32> {
        let depth = proc_view::namespace_pids(self.init_pid()).len();
        let pids = proc_view::namespace_pids(host_pid);
        pids.get(depth.wrapping_sub(1)).copied().with_context(|| format!("{host_pid} is no process of {}", self.name))
    }

    /// Tells whether a process runs on this host: in its network namespace, or in another one but with its mounts.
    pub fn is_home_of(&self, host_pid: u32) -> bool {
        ["net", "mnt"].iter().any(|kind| {
            match (proc_view::namespace_id(host_pid, kind), proc_view::namespace_id(self.init_pid(), kind)) {
                (Ok(theirs), Ok(ours)) => theirs == ours,
                _ => false,
            }
        })
    }
}

impl Host {
    /// Everything that runs on this host, as the test sees it: pid and name.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn processes(&self) -> Result<Vec<(u32, String)>> {
        let mut processes = Vec::new();
        for pid in proc_view::processes()? {
            if self.is_home_of(pid)
                && proc_view::is_alive(pid)
                && let Ok(name) = fs::read_to_string(format!("/proc/{pid}/comm"))
            {
                processes.push((pid, name.trim().to_owned()));
            }
        }
        Ok(processes)
    }

    /// Connects to a port of this host's own loopback address.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(&self, port: u16) -> Result<TcpStream> {
        self.connect_to(SocketAddr::from(([127, 0, 0, 1], port)))
    }

    /// Connects from this host to an address.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect_to(&self, address: SocketAddr) -> Result<TcpStream> {
        self.on_its_network(move || Ok(TcpStream::connect(address)?))
    }

    /// Listens at an address of this host.
    ///
    /// # Errors
    /// The host does not have it, or it is in use.
    pub fn listen(&self, address: &'static str) -> Result<TcpListener> {
        self.on_its_network(move || Ok(TcpListener::bind(address)?))
    }

    /// Opens a UDP socket at an address of this host.
    ///
    /// # Errors
    /// The host does not have it, or it is in use.
    pub fn udp(&self, address: &'static str) -> Result<UdpSocket> {
        self.on_its_network(move || Ok(UdpSocket::bind(address)?))
    }

    /// Runs something in this host's network namespace.
    ///
    /// # Errors
    /// Its own, or that the host is gone.
    pub fn on_its_network<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        let namespace = fs::File::open(format!("/proc/{}/ns/net", self.init_pid()))?;
        // A thread may change its network namespace for itself; a socket stays in the one it was born in.
        let working = std::thread::spawn(move || -> Result<T> {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
            work()
        });
        working.join().map_err(|_| anyhow::anyhow!("a thread on the network of {} panicked", self.name))?
    }
}

/// What a process and its children are at: name, state and where in the kernel they wait, innermost last.
fn doings(pid: u32) -> String {
    let read = |pid: u32, name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let state = |status: &str| status.lines().find(|line| line.starts_with("State:")).unwrap_or_default().to_owned();
    let mut text = String::new();
    for pid in std::iter::once(pid).chain(proc_view::children(pid)) {
        text += &format!(
            "{pid} {}: {}, {}; ",
            read(pid, "cmdline").replace('\0', " "),
            state(&read(pid, "status")),
            read(pid, "stack").replace('\n', " ")
        );
    }
    text
}

/// Opens a log file for a standard stream.
pub(crate) fn log(directory: &Path, name: &str) -> Result<fs::File> {
    let path = directory.join(name);
    fs::File::options().create(true).append(true).open(&path).with_context(|| path.display().to_string())
}

/// The shell script that becomes a host's init. It ignores SIGCHLD, so that orphans leave no zombies and their pids are free.
fn init_script(name: &str, options: &HostOptions) -> String {
    let mut script = String::from("set -e; ip link set lo mtu 65536 up; ");
    script += &format!("hostname {name}; ");
    // What hosts write down is their own.
    script += &format!("mkdir -p {STATE}; mount -t tmpfs -o size=4m,mode=700 godwit-state {STATE}; ");
    for directory in &options.private {
        script += &format!("mount -t tmpfs -o size=256m godwit-private '{}'; ", directory.display());
    }
    if options.pid_space == PidSpace::Own && options.first_pid > 0 {
        script += &format!("echo {} > /proc/sys/kernel/ns_last_pid; ", options.first_pid);
    }
    script + "exec env --ignore-signal=CHLD sleep infinity"
}
