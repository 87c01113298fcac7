//! The command line of `lazy-pages`.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};
use godwit_carry::{DEFAULT_CONFIG_DIR, DEFAULT_PORT, Service};

const ABOUT: &str = "Fetches the pages of programs that moved here before their pages";

const DETAILS: &str = "\
After a post-copy move a program runs here while some of its pages are still at
the source. This daemon fetches a page when it is touched, and the rest in the
background. It may be restarted or killed at any time: the page server keeps the
programs' userfaultfds too, so they wait for the next daemon and go on.";

const EPILOGUE: &str = "\
Ports:
  UDP: the one of --listen (7478 by default) for page faults, and the one above it for the rest of the pages. The page
  server asks for them and tells the sources. A daemon that takes the place of another must listen on the same ports.

Ending it:
  SIGTERM, SIGHUP and Ctrl-C end it at once. Programs that lack pages then stall where they need them, until another daemon is
  started on the same socket and ports within the time that their sources wait (a minute). None of them ever reads a page that
  was made up. The socket's file stays; the next daemon replaces it.

Who may call:
  The hosts that the page server trusts, or those that know the token: start both programs with the same --config-dir and
  --token-file.

Exit codes:
  0  ended by SIGTERM, SIGHUP or Ctrl-C
  1  cannot listen, or cannot use the token or this host's key
  2  wrong usage

Examples:
  lazy-pages daemon --socket /run/godwit/lazy.sock
  page-server --lazy-socket /run/godwit/lazy.sock
  lazy-pages daemon --socket /run/godwit/lazy.sock --listen '[2001:db8::2]:7000' --token-file /root/token --json";

/// What `lazy-pages` was called with.
#[derive(Clone, Debug, Parser)]
#[command(name = "lazy-pages", version, about = ABOUT, long_about = DETAILS, after_long_help = EPILOGUE)]
#[command(after_help = "`--help` says more: ports, how to end it, exit codes, examples.")]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What `lazy-pages` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Serve the programs that a page server hands over
    #[command(long_about = DETAILS, after_long_help = EPILOGUE)]
    Daemon(DaemonArguments),
}

/// What `lazy-pages daemon` was called with.
#[derive(Clone, Debug, Args)]
pub struct DaemonArguments {
    /// The UNIX socket where `page-server --lazy-socket` hands programs over; made here
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Where sources call: an address of this host and a UDP port; the port above it is used too
    #[arg(long, value_name = "ADDR:PORT", default_value_t = everywhere(), value_parser = listen_address)]
    pub listen: SocketAddr,
    /// Go by a secret shared with the sources instead of the hosts' keys: a file of at least 32 bytes that only its owner can read
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Where this host's key and the hosts that it trusts are: the directory that page-server uses
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_CONFIG_DIR)]
    pub config_dir: PathBuf,
    /// Write one JSON object a line to standard output
    #[arg(long)]
    pub json: bool,
    /// Log to standard error: -v what happens, -vv details, -vvv everything
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}

/// All addresses of this host, IPv4 ones too.
fn everywhere() -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, Service::Faults.port(DEFAULT_PORT).unwrap_or(DEFAULT_PORT)).into()
}

/// Takes `ADDR:PORT`; the port above must exist.
fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        text.parse().map_err(|_| "expected ADDR:PORT, such as 192.0.2.2:7478 or [2001:db8::2]:7478".to_owned())?;
    match drain_address(address) {
        Some(_) => Ok(address),
        None => Err("the port above it does not exist".to_owned()),
    }
}

/// Where sources call for the rest of the pages: the port above, or any free one for port 0.
pub(crate) fn drain_address(mut faults: SocketAddr) -> Option<SocketAddr> {
    if faults.port() != 0 {
        faults.set_port(faults.port().checked_add(1)?);
    }
    Some(faults)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
        let parsed = Arguments::try_parse_from(["lazy-pages", "daemon", "--socket", "/run/x"]).unwrap();
        let Command::Daemon(arguments) = parsed.command;
        assert_eq!(arguments.listen.to_string(), "[::]:7478");
        assert_eq!(drain_address(arguments.listen).unwrap().port(), 7479);
        assert!(Arguments::try_parse_from(["lazy-pages", "daemon"]).is_err());
        let wrong = ["lazy-pages", "daemon", "--socket", "x", "--listen", "[::]:65535"];
        assert!(Arguments::try_parse_from(wrong).is_err());
    }
}
