//! The command line of `page-server`.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};
use godwit_carry::{DEFAULT_CONFIG_DIR, DEFAULT_PORT, HostPort};
use godwit_journal::DEFAULT_STATE_DIRECTORY;

use crate::policy::{Ids, Policy, bytes};

const ABOUT: &str = "Receives running processes from other hosts";

const DETAILS: &str = "\
Listens for `migrate` on other hosts. Each process that comes is built here while
it still runs there, written straight into its final place, and set going when
the other host gives it away. When a move fails before that, nothing of it
remains here. Many processes may come at once. Needs root.";

const EPILOGUE: &str = "\
Who may call:
  The hosts that this one trusts (`migrate hosts`); all others are refused before anything else is said. `page-server invite`
  prints a code, good once for ten minutes, that enrols another host: there, `migrate trust CODE`. The list may change while
  this program runs. With --token-file it goes by a secret instead, for scripts: both ends know the same file of at least 32
  bytes, which never travels. /etc/godwit/token is used without being named as long as no host is trusted. To make one:
    install -d -m 700 /etc/godwit && (umask 077; head -c 32 /dev/urandom > /etc/godwit/token)
  and copy it to the other host by a way you trust. SECURITY.md says what a host that may call can do.

Ports:
  UDP: the one of --listen (7477 by default) and the two above it, for page faults and for the rest of the pages.

Processes that came:
  keep running when page-server ends, unless pages of theirs are still missing: then they wait for the next page server, and
  for `migrate` to go on. Told to end, this one takes no new ones and waits for those under way; where a source is gone, ten
  seconds for it to come back once that is noticed. With --lazy-socket a separate `lazy-pages daemon` serves the pages, and
  may be restarted at any time.

Connections alone:
  `migrate connection` hands connections of a process to another program, here the one that listens on the UNIX stream
  socket of --hand-over-to. For each hand-over it is called once, and told in lines of text:
    it receives   {\"version\": 1, \"migration\": ID, \"label\": TEXT, \"pid\": N, \"comm\": NAME,
                   \"connections\": [{\"local\": ADDR:PORT, \"peer\": ADDR:PORT, \"fd\": N}, ...]}
                  on one line, with the sockets in the same order (SCM_RIGHTS), not to be used yet
    it answers    accept, or: refuse REASON. It has two seconds
    it receives   commit: they are its own. An end instead: nothing came of it, and they are to be closed
  It is also called and told nothing, when a source asks whether somebody listens.

Exit codes:
  0  ended as asked: by SIGTERM, SIGHUP or Ctrl-C, or after one process with --once
  1  cannot listen, cannot use the token or this host's key, or with --once: the process did not come
  2  wrong usage

Examples:
  page-server
  page-server invite --address receiver.example
  page-server --listen 192.0.2.2:7000 --token-file /root/token
  page-server --listen '[2001:db8::2]:7477' --once --json
  lazy-pages daemon --socket /run/godwit/lazy.sock &
  page-server --lazy-socket /run/godwit/lazy.sock";

const INVITE_ABOUT: &str = "Invites another host: prints a code for `migrate trust` there";

const INVITE_DETAILS: &str = "\
Prints a code that enrols one other host, once, for some minutes: the two hosts
trust each other from then on. The page server that answers may run already; it
needs the same --config-dir, and must not go by a token (--token-file).
The code is a secret until it was used. Tell it to nobody else.";

/// What `page-server` was called with.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "page-server", version, about = ABOUT, long_about = DETAILS, after_long_help = EPILOGUE,
    after_help = "`--help` says more: who may call, ports, exit codes, examples.",
    args_conflicts_with_subcommands = true, disable_help_subcommand = true
)]
pub struct Arguments {
    /// Something else than to receive
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Where to listen: an address of this host and a UDP port; the two ports above it are used too
    #[arg(long, value_name = "ADDR:PORT", default_value_t = everywhere(), value_parser = listen_address)]
    pub listen: SocketAddr,
    /// Go by a secret shared with the sources instead of the hosts' keys: a file of at least 32 bytes that only its owner can read
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Where this host's key and the hosts that it trusts are
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_CONFIG_DIR)]
    pub config_dir: PathBuf,
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
    /// Take processes of these users only; what runs as root, or has capabilities, or files open that the user may not open here, needs
    /// 0 to be among them. Numbers or ranges, may be given several times [default: anybody's]
    #[arg(long, value_name = "UID[-UID][,UID...]", value_delimiter = ',')]
    pub allow_uid: Vec<Ids>,
    /// Take processes in these groups, too, not only in those that their users are in here
    #[arg(long, value_name = "GID[-GID][,GID...]", value_delimiter = ',', requires = "allow_uid")]
    pub allow_gid: Vec<Ids>,
    /// Take processes only that can gain no privileges by set-user-ID programs (PR_SET_NO_NEW_PRIVS)
    #[arg(long)]
    pub require_no_new_privs: bool,
    /// Take processes with no more memory than this, such as 4G [default: any]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub max_memory: Option<u64>,
    /// Take no more than N processes at the same time, until they have all their memory [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub max_migrations: Option<u16>,
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

impl Arguments {
    /// What others may send.
    pub fn policy(&self) -> Policy {
        Policy {
            users: self.allow_uid.clone(),
            groups: self.allow_gid.clone(),
            no_new_privs: self.require_no_new_privs,
            max_memory: self.max_memory,
            max_migrations: self.max_migrations.map(usize::from),
        }
    }
}

/// Something else than to receive.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Invites another host.
    #[command(about = INVITE_ABOUT, long_about = INVITE_DETAILS)]
    Invite(InviteArguments),
}

/// What an invitation needs to know.
#[derive(Args, Clone, Debug)]
pub struct InviteArguments {
    /// How long the code is good: a number with s, m or h
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub valid: Duration,
    /// Where the other host is to call this one [default: an address of this host, and port 7477]
    #[arg(long, value_name = "HOST[:PORT]", value_parser = host_and_port)]
    pub address: Option<HostPort>,
    /// Where this host's key and the hosts that it trusts are
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_CONFIG_DIR)]
    pub config_dir: PathBuf,
}

/// Takes `90s`, `10m` or `1h`; at most a day.
fn duration(text: &str) -> Result<Duration, String> {
    let expected = || "expected a number with s, m or h, such as 10m; at most 24h".to_owned();
    let unit = text.strip_suffix(['s', 'm', 'h']).ok_or_else(expected)?;
    let number: u64 = unit.parse().map_err(|_| expected())?;
    let seconds = match text.as_bytes().last() {
        Some(b'h') => number.checked_mul(3600),
        Some(b'm') => number.checked_mul(60),
        _ => Some(number),
    };
    seconds.filter(|seconds| (1..=86_400).contains(seconds)).map(Duration::from_secs).ok_or_else(expected)
}

fn host_and_port(text: &str) -> Result<HostPort, String> {
    match HostPort::parse(text, DEFAULT_PORT) {
        Ok(parsed) if parsed.port() == 0 => Err("port 0 is no place to call".to_owned()),
        Ok(parsed) => Ok(parsed),
        Err(error) => Err(error.to_string()),
    }
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
        assert_eq!((arguments.token_file, arguments.config_dir), (None, PathBuf::from("/etc/godwit")));
        assert!(arguments.lazy_socket.is_none() && !arguments.once && !arguments.json && arguments.verbose == 0);
    }

    #[test]
    fn limits_are_taken() {
        let policy =
            parse("--allow-uid 1000,2000-2999 --allow-uid 33 --allow-gid 4 --max-memory 2G --max-migrations 3")
                .unwrap()
                .policy();
        assert_eq!((policy.users.len(), policy.groups.len()), (3, 1));
        assert_eq!((policy.max_memory, policy.max_migrations), (Some(2 << 30), Some(3)));
        assert!(!policy.admits_root() && parse("").unwrap().policy().admits_root());
        for words in ["--allow-uid x", "--allow-gid 4", "--max-memory 0", "--max-migrations 0", "--max-memory 1.5G"] {
            assert_eq!(parse(words).expect_err(words).exit_code(), 2, "{words}");
        }
    }

    #[test]
    fn invitations_are_described() {
        let invite = |words: &str| match parse(words).unwrap().command {
            Some(Command::Invite(arguments)) => arguments,
            None => panic!("{words}"),
        };
        let usual = invite("invite");
        assert_eq!((usual.valid, usual.address), (Duration::from_secs(600), None));
        let other = invite("invite --valid 90s --address receiver.example --config-dir d");
        assert_eq!((other.valid, other.address.unwrap().port()), (Duration::from_secs(90), 7477));
        for words in
            ["invite --valid 10", "invite --valid 0m", "invite --valid 25h", "invite --address :1", "--once invite"]
        {
            assert_eq!(parse(words).expect_err(words).exit_code(), 2, "{words}");
        }
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
