//! The engine's daemons on a host: `page-server` and `lazy-pages daemon`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::binaries::program;
use crate::deadline::wait_until;
use crate::host::{Host, log};
use crate::process::Running;
use crate::two_hosts::Token;

/// Numbers the daemons of one test: their log files must not mix.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// How long a daemon may take until it listens.
const START: Duration = Duration::from_secs(10);

/// A page server uses its port and the two above it.
const FIRST_PORT: u32 = 7477;

/// The variable that names the point at which a program stops itself.
pub(crate) const PAUSE_AT: &str = "GODWIT_PAUSE_AT";

/// What a page server is started with beside its address and token.
#[derive(Debug, Clone, Default)]
pub struct PageServerOptions {
    /// `--lazy-socket`.
    pub lazy_socket: Option<PathBuf>,
    /// Where it listens instead of at its host's address.
    pub listen: Option<String>,
    /// The port, of the three that it uses the first, instead of one that no other of this test has.
    pub port: Option<u16>,
    /// The point at which it stops itself, see CONTRIBUTING.md.
    pub pause_at: Option<&'static str>,
    /// `--config-dir`; it goes by host keys then, not by the token.
    pub config_dir: Option<PathBuf>,
    /// Anything else.
    pub arguments: Vec<String>,
}

/// A `page-server` that listens on a host.
#[derive(Debug)]
pub struct PageServer {
    running: Running,
    /// Address and port, as `migrate --to` wants them.
    pub address: String,
    /// The token file it was started with.
    pub token: Token,
    log: PathBuf,
}

/// A `lazy-pages daemon` that listens on a UNIX socket of a host.
#[derive(Debug)]
pub struct LazyPages {
    running: Running,
    /// The socket's path.
    pub socket: PathBuf,
    log: PathBuf,
}

impl Host {
    /// Starts a page server with default options and waits until it listens.
    ///
    /// # Errors
    /// It is not built, ended, or did not listen in time.
    pub fn page_server(&self, token: &Token) -> Result<PageServer> {
        self.page_server_with(token, &PageServerOptions::default())
    }

    /// Starts a page server and waits until it listens.
    ///
    /// # Errors
    /// It is not built, ended, or did not listen in time.
    pub fn page_server_with(&self, token: &Token, options: &PageServerOptions) -> Result<PageServer> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let listen = options.listen.as_deref().unwrap_or(self.address());
        let port = options.port.map_or(FIRST_PORT + number * 10, u32::from);
        let address = format!("{listen}:{port}");
        let name = format!("page-server-{number}");
        let mut command = self.command(program("page-server")?);
        command.args(["--listen", &address]).args(&options.arguments);
        match &options.config_dir {
            Some(directory) => command.arg("--config-dir").arg(directory),
            None => command.arg("--token-file").arg(token.path()),
        };
        if let Some(socket) = &options.lazy_socket {
            command.arg("--lazy-socket").arg(socket);
        }
        command.envs(options.pause_at.map(|point| (PAUSE_AT, point)));
        let (running, log) = start_daemon(self, command, &name)?;
        Ok(PageServer { running, address, token: token.clone(), log })
    }

    /// Starts a fault daemon on the UNIX socket `socket` and waits until it listens.
    ///
    /// # Errors
    /// It is not built, ended, or did not listen in time.
    pub fn lazy_pages(&self, token: &Token, socket: &Path) -> Result<LazyPages> {
        self.lazy_pages_by(&["--token-file".as_ref(), token.path()], socket)
    }

    /// Starts a fault daemon that goes by the host keys in `config_dir`.
    ///
    /// # Errors
    /// It is not built, ended, or did not listen in time.
    pub fn lazy_pages_of(&self, config_dir: &Path, socket: &Path) -> Result<LazyPages> {
        self.lazy_pages_by(&["--config-dir".as_ref(), config_dir], socket)
    }

    fn lazy_pages_by(&self, identity: &[&Path], socket: &Path) -> Result<LazyPages> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut command = self.command(program("lazy-pages")?);
        command.args(["daemon", "--socket"]).arg(socket).args(identity);
        let (running, log) = start_daemon(self, command, &format!("lazy-pages-{number}"))?;
        Ok(LazyPages { running, socket: socket.to_owned(), log })
    }
}

impl PageServer {
    /// Ends it at once, as a crash would.
    ///
    /// # Errors
    /// It had ended before.
    pub fn kill(&mut self) -> Result<()> {
        self.running.signal(Signal::SIGKILL)?;
        self.running.wait(Duration::from_secs(5)).map(drop)
    }

    /// The first of the three ports that it uses.
    pub fn port(&self) -> Option<u16> {
        self.address.rsplit_once(':')?.1.parse().ok()
    }

    /// The process, to signal it or to wait for its end.
    pub fn process(&mut self) -> &mut Running {
        &mut self.running
    }

    /// Everything it wrote so far.
    pub fn log(&self) -> String {
        read(&self.log)
    }
}

impl LazyPages {
    /// Ends it at once, as a crash would.
    ///
    /// # Errors
    /// It had ended before.
    pub fn kill(&mut self) -> Result<()> {
        self.running.signal(Signal::SIGKILL)?;
        self.running.wait(Duration::from_secs(5)).map(drop)
    }

    /// The process, to signal it or to wait for its end.
    pub fn process(&mut self) -> &mut Running {
        &mut self.running
    }

    /// Everything it wrote so far.
    pub fn log(&self) -> String {
        read(&self.log)
    }
}

/// Starts a daemon whose output goes to a file, and waits for the line in which it says that it listens.
fn start_daemon(host: &Host, mut command: std::process::Command, name: &str) -> Result<(Running, PathBuf)> {
    let directory = host.directory();
    command.stdin(Stdio::null()).stdout(log(directory, name)?).stderr(log(directory, name)?);
    let path = directory.join(name);
    let mut running = host.start_command(&mut command).with_context(|| format!("{name} on {}", host.name()))?;
    wait_until(&format!("{name} to listen"), START, || {
        if read(&path).to_ascii_lowercase().contains("listen") {
            return Ok(true);
        }
        match running.ended()? {
            Some(status) => bail!("{name} ended with {status}: {}", read(&path)),
            None => Ok(false),
        }
    })
    .with_context(|| format!("it wrote: {}", read(&path)))?;
    Ok((running, path))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
