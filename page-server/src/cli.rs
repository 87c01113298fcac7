//! The command line of `page-server`.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgAction, Parser};
use godwit_carry::DEFAULT_PORT;
use godwit_journal::DEFAULT_STATE_DIRECTORY;

const ABOUT: &str = "Receives running processes from other hosts";

const DETAILS: &str = "\
Listens for `migrate` on other hosts. Each process that comes is built here while
it still runs there, written straight into its final place, and set going when
the other host gives it away. When a move fails before that, nothing of it
remains here. Many processes may come at once. Needs root.";

const EPILOGUE: &str = "\
Token:
  Both ends prove to each other that they know the same file of at least 32 bytes. It never travels; who does not know it
  is refused before anything else is said. To make one:
    install -d -m 700 /etc/godwit && (umask 077; head -c 32 /dev/urandom > /etc/godwit/token)
  and copy it to the other host by a way you trust.

Ports:
  UDP: the one of --listen (7477 by default) and the two above it, for page faults and for the rest of the pages.

Processes that came:
  keep running when page-server ends, unless pages of theirs are still missing: then they wait for a page server that has
  them. With --lazy-socket a separate `lazy-pages daemon` serves the pages, and may be restarted at any time.

Connections alone:
  `migrate connection` hands connections of a process to another program, here the one that listens on the UNIX stream
  socket of --hand-over-to. For each hand-over it is called once, and told in lines of text:
    it receives   {\"version\": 1, \"migration\": ID, \"label\": TEXT, \"pid\": N, \"comm\": NAME,
                   \"connections\": [{\"local\": ADDR:PORT, \"peer\": ADDR:PORT, \"fd\": N}, ...]}
                  on one line, with the sockets in the same order (SCM_RIGHTS), not to be used yet
    it answers    accept, or: refuse REASON. It has two seconds
    it receives   commit: they are its own. An end instead: nothing came of it, and they are to be closed

Exit codes:
  0  ended as asked: by SIGTERM or Ctrl-C, or after one process with --once
  1  cannot listen, cannot read the token, or with --once: the process did not come
  2  wrong usage

Examples:
  page-server
  page-server --listen 192.0.2.2:7000 --token-file /root/token
  page-server --listen '[2001:db8::2]:7477' --once --json
  lazy-pages daemon --socket /run/godwit/lazy.sock &
  page-server --lazy-socket /run/godwit/lazy.sock";

/// Where both ends look for the token unless told otherwise.
const DEFAULT_TOKEN_FILE: &str = "/etc/godwit/token";

/// What `page-server` was called with.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "page-server", version, about = ABOUT, long_about = DETAILS, after_long_help = EPILOGUE,
    after_help = "`--help` says more: token, ports, exit codes, examples."
)]
pub struct Arguments {
    /// Where to listen: an address of this host and a UDP port; the two ports above it are used too
    #[arg(long, value_name = "ADDR:PORT", default_value_t = everywhere(), value_parser = listen_address)]
    pub listen: SocketAddr,
    /// The secret shared with the other hosts: a file of at least 32 bytes that only its owner can read
    #[arg(long, value_name = "FILE", default_value = DEFAULT_TOKEN_FILE)]
    pub token_file: PathBuf,
    /// Hand page faults to the `lazy-pages daemon` that listens on this UNIX socket, instead of serving them here
    #[arg(long, value_name = "PATH")]
    pub lazy_socket: Option<PathBuf>,
    /// Hand connections that come alone to the program that listens on this UNIX socket
    #[arg(long, value_name = "PATH")]
    pub hand_over_to: Option<PathBuf>,
    /// Where hand-overs are written down for as long as they are not over; on a file system in memory
    #[arg(long = "state-dir", value_name = "DIRECTORY", default_value = DEFAULT_STATE_DIRECTORY)]
    pub state_directory: PathBuf,
    /// Give a source up that, before it has given its process away, says nothing whole for so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..))]
    pub patience: u64,
    /// Receive one process, then end
    #[arg(long)]
    pub once: bool,
    /// Write one JSON object a line to standard output
    #[arg(long)]
    pub json: bool,
    /// Log to standard error: -v what happens, -vv details, -vvv everything
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}

/// All addresses of this host, IPv4 ones too.
fn everywhere() -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, DEFAULT_PORT).into()
}

/// Takes `ADDR:PORT` or `ADDR`, IPv6 addresses in brackets or bare; the ports above it must exist.
fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let address = match text.parse::<SocketAddr>() {
        Ok(address) => address,
        Err(_) => {
            let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
            let address =
                bare.parse().map_err(|_| "expected ADDR:PORT, such as 192.0.2.2:7477 or [::]:7477".to_owned())?;
            SocketAddr::new(address, DEFAULT_PORT)
        }
    };
    match address.port() {
        1..=65533 => Ok(address),
        _ => Err("the port has to be one of 1 to 65533: the two above it are used too".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once("page-server").chain(words.split_whitespace()))
    }

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn nothing_is_required() {
        let arguments = parse("").unwrap();
        assert_eq!(arguments.listen.to_string(), "[::]:7477");
        assert_eq!(arguments.token_file, PathBuf::from("/etc/godwit/token"));
        assert!(arguments.lazy_socket.is_none() && !arguments.once && !arguments.json && arguments.verbose == 0);
    }

    #[test]
    fn everything_is_taken() {
        let arguments =
            parse("--listen 10.0.0.2:9 --token-file t --lazy-socket s --hand-over-to h --once --json -vvv").unwrap();
        assert_eq!(arguments.listen.to_string(), "10.0.0.2:9");
        assert_eq!(arguments.lazy_socket, Some("s".into()));
        assert_eq!(arguments.hand_over_to, Some("h".into()));
        assert!(arguments.once && arguments.json);
        assert_eq!(arguments.verbose, 3);
    }

    #[test]
    fn addresses_come_in_several_forms() {
        for (text, address) in
            [("10.0.0.2", "10.0.0.2:7477"), ("::1", "[::1]:7477"), ("[::1]", "[::1]:7477"), ("[::1]:5", "[::1]:5")]
        {
            assert_eq!(parse(&format!("--listen {text}")).unwrap().listen.to_string(), address);
        }
        for text in ["host:1", "10.0.0.2:0", "10.0.0.2:65534", "10.0.0.2:70000", "7477", "[10.0.0.2"] {
            assert_eq!(parse(&format!("--listen {text}")).expect_err(text).exit_code(), 2, "{text}");
        }
    }

    #[test]
    fn help_is_complete() {
        let help = Arguments::command().render_long_help().to_string();
        for word in [
            "--listen",
            "--token-file",
            "--lazy-socket",
            "--hand-over-to",
            "--once",
            "--json",
            "--verbose",
            "7477",
            "Exit codes",
            "Examples",
        ] {
            assert!(help.contains(word), "{word} is not in:\n{help}");
        }
    }
}
