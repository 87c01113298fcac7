//! The command line of `migrate`: what it takes, what it says about itself, and the [`Request`] it makes of it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};
use godwit_carry::{DEFAULT_CONFIG_DIR, DEFAULT_PORT, HostPort};
use godwit_journal::DEFAULT_STATE_DIRECTORY;

use crate::handing::HandOver;
use crate::hosts::{
    HOSTS_ABOUT, HOSTS_DETAILS, HOSTS_EPILOGUE, HostsArguments, TRUST_ABOUT, TRUST_DETAILS, TRUST_EPILOGUE,
    TrustArguments,
};
use crate::request::{
    DEFAULT_MAX_ROUNDS, DEFAULT_RECONNECT_FOR, Joint, MapAddress, Mode, MoveAddress, OnTimeout, Request,
};
use crate::settling::{CancelArguments, ResolveArguments, ResumeArguments, StatusArguments};

const ABOUT: &str = "Moves a running process to another host while it runs";

const DETAILS: &str = "\
Moves a running process, with all its threads, memory and open files, to a host
where a page-server listens. The program notices nothing but a short pause.
Until the hand-over is settled, any failure and Ctrl-C leave it running here as
before.

The other host needs the same files at the same paths; what is missing, and
whatever else stands in the way, is listed before the process is touched.";

const EPILOGUE: &str = "\
Hosts:
  Both ends prove who they are, and each has the other in its list. To enrol two hosts: `page-server invite` on the one that
  receives, then `migrate trust CODE` here; `migrate hosts` lists and revokes. For scripts, both may instead know the same file of
  at least 32 bytes (--token-file, at both ends); it never travels. /etc/godwit/token is used without being named as long as
  no host is trusted. To make one:
    install -d -m 700 /etc/godwit && (umask 077; head -c 32 /dev/urandom > /etc/godwit/token)
  and copy it to the other host by a way you trust.

Standard streams:
  A terminal, or a pipe to another program, stays where it is, so a process that has one open is refused. Ways out:
    --external 'fd[1]=file:/path'   the descriptor becomes that file at the destination, opened for appending
    --external 'fd[0]=null'         the descriptor becomes /dev/null

Ports:
  UDP 7477 by default, and the two above it (7478 and 7479: faults and the rest of the pages).

Exit codes:
  0  moved
  1  refused, failed or cancelled; the process runs here as before
  2  wrong usage
  3  the outcome is unknown, or the move broke off after the hand-over: the copy here is kept frozen. Never let it run
     unless you are certain that the other one does not
  4  moved, and ended at the destination before all its pages had come

Examples:
  On the host that receives:
    page-server --listen 192.0.2.2:7477
  On the host that has the process:
    migrate --to 192.0.2.2 4711
    migrate --to receiver.example:7000 \"$(pidof redis-server)\" --mode pre-copy --downtime-target 20
    migrate --to 192.0.2.2 4711 --move-addr 192.0.2.100/eth0
    migrate --to 192.0.2.2 4711 --net veth=br0
    migrate --to 192.0.2.2 4711 --map-addr 10.0.1.5=10.0.2.5
    migrate --to '[2001:db8::2]' 4711 --json --timeout 60 --external 'fd[1]=file:/var/log/job'
  Connections alone, to a program there (page-server --hand-over-to PATH):
    migrate connection --to 192.0.2.2 4711 9 --map-addr 10.0.1.5=10.0.2.5
  See it work, on this machine alone:
    migrate demo";

const CONNECTION_ABOUT: &str = "Hands TCP connections of a process to a program on another host; the process goes on";

const CONNECTION_DETAILS: &str = "\
Hands established TCP connections of a running process to a program on another
host, where a page-server was started with --hand-over-to. The process is
stopped for the moment; afterwards it goes on, and finds these descriptors as if
their peers had closed them: the end of the file, and nothing more can be sent.
The peers notice nothing but a short delay.

Until the receiving program has the connections and wants them, any failure and
Ctrl-C leave them to the process as they were.";

const CONNECTION_EPILOGUE: &str = "\
Addresses:
  A connection keeps its addresses, so the destination must have them: --move-addr has one move along, --map-addr changes
  one where the network translates. What the network still sends here is sent after the connections for --forward seconds.

What the process has read and not answered, or keeps in its own buffers, does not travel: hand over connections that are
at rest, or tell the receiving program by --label where things stand.

Exit codes:
  0  handed over
  1  refused, failed or cancelled; the connections are the process's as before
  2  wrong usage
  3  the outcome is unknown: the process has them no more

Examples:
  On the host that receives, beside a program that listens on /run/taker.sock:
    page-server --hand-over-to /run/taker.sock
  On the host that has the process:
    migrate connection --to 192.0.2.2 4711 9
    migrate connection --to 192.0.2.2 4711 9,12 --map-addr 10.0.1.5=10.0.2.5 --label 'room 7'";

const DEMO_ABOUT: &str =
    "Shows a move on this machine: two hosts out of namespaces, a real worker, there and back (root)";

const DEMO_DETAILS: &str = "\
Makes two hosts out of namespaces on this machine, starts a worker on one of
them that keeps rewriting its memory and comparing all of it, moves it to the
other host and back, and shows how long each freeze was and that nothing was
wrong. Everything is removed in the end, also after Ctrl-C.
Needs root, and ip(8), unshare(1) and nsenter(1).";

const DEMO_EPILOGUE: &str = "\
Exit codes:
  0  both moves succeeded and no check failed
  1  anything else
  2  wrong usage

Examples:
  migrate demo
  migrate demo --memory 1024";

/// What `migrate` was called with.
#[derive(Debug, Parser)]
#[command(
    name = "migrate", version, about = ABOUT, long_about = DETAILS, after_long_help = EPILOGUE,
    after_help = "`--help` says more: hosts, modes, exit codes, examples.",
    args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, disable_help_subcommand = true
)]
pub struct Arguments {
    /// Something else than a move
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The move
    #[command(flatten)]
    pub departure: Option<DepartureArguments>,
}

/// Something else than a move.
#[derive(Debug, Subcommand)]
pub enum Command {
    #[command(about = CONNECTION_ABOUT, long_about = CONNECTION_DETAILS, after_long_help = CONNECTION_EPILOGUE)]
    /// Hands connections over.
    Connection(ConnectionArguments),
    /// Goes on with a migration whose link or agent was lost behind the decision
    Resume(ResumeArguments),
    /// Lists migrations that are not over, with what the other host says of them
    Status(StatusArguments),
    /// Calls a migration off that is not decided
    Cancel(CancelArguments),
    /// Says how a hand-over stands that nobody is at work on, and thaws or ends the frozen process
    Resolve(ResolveArguments),
    #[command(about = HOSTS_ABOUT, long_about = HOSTS_DETAILS, after_long_help = HOSTS_EPILOGUE)]
    /// Lists the hosts that are trusted.
    Hosts(HostsArguments),
    #[command(about = TRUST_ABOUT, long_about = TRUST_DETAILS, after_long_help = TRUST_EPILOGUE)]
    /// Accepts an invitation.
    Trust(TrustArguments),
    #[command(about = DEMO_ABOUT, long_about = DEMO_DETAILS, after_long_help = DEMO_EPILOGUE)]
    /// Shows a move on this machine.
    Demo(DemoArguments),
    /// Keeps one of the demo's hosts alive.
    #[command(hide = true)]
    DemoHost(DemoHostArguments),
    /// The program that the demo moves.
    #[command(hide = true)]
    DemoWorker(DemoWorkerArguments),
}

/// What a move needs to know.
#[derive(Args, Debug)]
pub struct DepartureArguments {
    /// Where to: the host that runs page-server. Without a port: 7477
    #[arg(long, value_name = "HOST[:PORT]", value_parser = host_and_port)]
    pub to: String,
    /// The process to move
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: i32,
    /// Go by a secret shared with the other host instead of the hosts' keys: a file of at least 32 bytes that only its owner can
    /// read
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Where this host's key and the hosts that it trusts are
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_CONFIG_DIR)]
    pub config_dir: PathBuf,
    /// When memory travels
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    pub mode: Mode,
    /// End the rounds after N of them, converged or not
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_ROUNDS, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_rounds: u32,
    /// The longest freeze in milliseconds: rounds go on until what is left fits it, and where they do not get there the move is called
    /// off; --mode stop-and-copy has no rounds that could tell: there it is only what --downtime-limit is added to [default: 10 is aimed
    /// at, not insisted on]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub downtime_target: Option<u64>,
    /// Call a freeze off that lasts more than MS milliseconds longer than the target [default: no limit]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(0..=3_600_000))]
    pub downtime_limit: Option<u64>,
    /// Call the move off when the hand-over is not settled after S seconds [default: no limit]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub timeout: Option<u64>,
    /// What to do when --timeout or --downtime-limit is over
    #[arg(long, value_enum, value_name = "WHAT", default_value_t)]
    pub on_timeout: OnTimeout,
    /// Make a link that was lost anew for S seconds before the outcome counts as unknown
    #[arg(long, value_name = "S", default_value_t = DEFAULT_RECONNECT_FOR.as_secs(), value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub reconnect_for: u64,
    /// Where the hand-over is written down for as long as it is not over; on a file system in memory
    #[arg(long = "state-dir", value_name = "DIRECTORY", default_value = DEFAULT_STATE_DIRECTORY)]
    pub state_directory: PathBuf,
    /// What a descriptor that leads outside becomes: 'fd[N]=file:/path' or 'fd[N]=null'. May be given several times
    #[arg(long, value_name = "SPEC", value_parser = external)]
    pub external: Vec<String>,
    /// Give the process a PID namespace of its own at the destination even when its pids are free there
    #[arg(long = "new-pidns")]
    pub new_pid_namespace: bool,
    /// Have an address of this host move along, to an interface of the destination; without one, to that of the same name as
    /// here. May be given several times
    #[arg(long = "move-addr", value_name = "ADDR[/DEV]")]
    pub move_addresses: Vec<MoveAddress>,
    /// How the process's own network namespace is joined to the destination's network: by a veth into a bridge, as a macvlan of
    /// an interface, or by a namespace that is prepared there. May be given for several interfaces
    #[arg(
        long = "net",
        value_name = "[IFACE:]veth=BRIDGE|[IFACE:]macvlan=DEV|ns:NAME",
        conflicts_with = "move_addresses"
    )]
    pub joints: Vec<Joint>,
    /// Change an address of its sockets on the way, for networks that translate addresses; both ends of connections are looked at.
    /// May be given several times
    #[arg(long = "map-addr", value_name = "OLD=NEW")]
    pub map_addresses: Vec<MapAddress>,
    /// Send packets that still come here after the process for S seconds: the time that the network has to send them there by
    /// itself [default: 5 with --map-addr, else until none come]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub forward: Option<u64>,
    /// Move TCP connections (the default)
    #[arg(long, conflicts_with = "tcp_close")]
    pub tcp_established: bool,
    /// Leave TCP connections behind: their peers are told, and the process has closed sockets instead
    #[arg(long)]
    pub tcp_close: bool,
    /// Lose connections that the process has not accepted yet, instead of calling the move off
    #[arg(long)]
    pub skip_in_flight: bool,
    /// Write one JSON object a line to standard output: events, and last a report
    #[arg(long)]
    pub json: bool,
    /// Log to standard error: -v what happens, -vv details, -vvv everything
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}

/// What handing connections over needs to know.
#[derive(Args, Debug)]
pub struct ConnectionArguments {
    /// Where to: the host that runs page-server --hand-over-to. Without a port: 7477
    #[arg(long, value_name = "HOST[:PORT]", value_parser = host_and_port)]
    pub to: String,
    /// The process that has the connections
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: i32,
    /// The connections: numbers of descriptors
    #[arg(value_name = "FD[,FD...]", required = true, value_delimiter = ',', value_parser = clap::value_parser!(i32).range(0..))]
    pub descriptors: Vec<i32>,
    /// What the receiving program is told
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub label: String,
    /// Go by a secret shared with the other host instead of the hosts' keys: a file of at least 32 bytes that only its owner can
    /// read
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Where this host's key and the hosts that it trusts are
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_CONFIG_DIR)]
    pub config_dir: PathBuf,
    /// Where it is written down what is to be put right, should this program be killed; on a file system in memory
    #[arg(long = "state-dir", value_name = "DIRECTORY", default_value = DEFAULT_STATE_DIRECTORY)]
    pub state_directory: PathBuf,
    /// Have an address of this host move along, as with a process. May be given several times
    #[arg(long = "move-addr", value_name = "ADDR[/DEV]")]
    pub move_addresses: Vec<MoveAddress>,
    /// Change an address of the connections on the way, as with a process. May be given several times
    #[arg(long = "map-addr", value_name = "OLD=NEW")]
    pub map_addresses: Vec<MapAddress>,
    /// Send packets that still come here after the connections for S seconds [default: 5, with --move-addr until none come]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub forward: Option<u64>,
    /// Give up when it is not settled after S seconds [default: no limit]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub timeout: Option<u64>,
    /// Write one JSON object a line to standard output: events, and last a report
    #[arg(long)]
    pub json: bool,
    /// Log to standard error: -v what happens, -vv details, -vvv everything
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}

/// What the demo needs to know.
#[derive(Args, Debug)]
pub struct DemoArguments {
    /// Memory of the worker in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(8..=1_048_576))]
    pub memory: u32,
    /// When memory travels
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    pub mode: Mode,
    /// Log to standard error: -v what happens, -vv details
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}

/// What a host of the demo needs to know.
#[derive(Args, Debug)]
pub struct DemoHostArguments {
    /// Its name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The pid after which it counts on, so that two hosts do not hand out the same ones
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub after: i32,
}

/// What the demo's worker needs to know.
#[derive(Args, Debug)]
pub struct DemoWorkerArguments {
    /// MiB to work on
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub memory: u32,
    /// Where it writes what it sees
    #[arg(long, value_name = "DIRECTORY")]
    pub directory: PathBuf,
}

impl DepartureArguments {
    /// Makes the request that the arguments describe.
    pub fn request(&self) -> Request {
        Request {
            pid: self.pid,
            to: self.to.clone(),
            token_file: self.token_file.clone(),
            config_dir: self.config_dir.clone(),
            mode: self.mode,
            max_rounds: self.max_rounds,
            downtime_target: self.downtime_target.map(Duration::from_millis),
            downtime_limit: self.downtime_limit.map(Duration::from_millis),
            timeout: self.timeout.map(Duration::from_secs),
            on_timeout: self.on_timeout,
            reconnect_for: Duration::from_secs(self.reconnect_for),
            state_directory: self.state_directory.clone(),
            external: self.external.clone(),
            new_pid_namespace: self.new_pid_namespace,
            move_addresses: self.move_addresses.clone(),
            joints: self.joints.clone(),
            map_addresses: self.map_addresses.clone(),
            forward: self.forward.map(Duration::from_secs),
            tcp_close: self.tcp_close,
            skip_in_flight: self.skip_in_flight,
        }
    }
}

impl ConnectionArguments {
    /// Makes the wish that the arguments describe.
    pub fn wish(&self) -> HandOver {
        let request = Request {
            token_file: self.token_file.clone(),
            config_dir: self.config_dir.clone(),
            state_directory: self.state_directory.clone(),
            timeout: self.timeout.map(Duration::from_secs),
            move_addresses: self.move_addresses.clone(),
            map_addresses: self.map_addresses.clone(),
            forward: self.forward.map(Duration::from_secs),
            ..Request::new(self.pid, &self.to)
        };
        HandOver { request, descriptors: self.descriptors.clone(), label: self.label.clone() }
    }
}

/// Accepts what [`HostPort`] accepts and leaves it as it is.
fn host_and_port(text: &str) -> Result<String, String> {
    match HostPort::parse(text, DEFAULT_PORT) {
        Ok(parsed) if parsed.port() == 0 => Err("port 0 is no place to go to".to_owned()),
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Accepts `fd[N]=null` and `fd[N]=file:/absolute/path`.
fn external(text: &str) -> Result<String, String> {
    let expected = || "expected 'fd[N]=file:/path' or 'fd[N]=null'".to_owned();
    let (descriptor, target) = text.split_once('=').ok_or_else(expected)?;
    let number = descriptor.strip_prefix("fd[").and_then(|rest| rest.strip_suffix(']')).ok_or_else(expected)?;
    if !number.bytes().all(|byte| byte.is_ascii_digit()) || number.parse::<i32>().is_err() {
        return Err(format!("{number:?} is no descriptor number"));
    }
    match target.strip_prefix("file:") {
        Some(path) if path.starts_with('/') => Ok(text.to_owned()),
        Some(_) => Err("the path has to be absolute: it is opened at the destination".to_owned()),
        None if target == "null" => Ok(text.to_owned()),
        None => Err(expected()),
    }
}

#[cfg(test)]
mod tests {
    use crate::hosts::Change;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;
    use crate::request::JointKind;

    fn parse(words: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once("migrate").chain(words.split_whitespace()))
    }

    fn departure(words: &str) -> DepartureArguments {
        parse(words).unwrap().departure.unwrap()
    }

    fn refused(words: &str) -> ErrorKind {
        let error = parse(words).expect_err(words);
        assert_eq!(error.exit_code(), 2, "{words}");
        error.kind()
    }

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_move_needs_little() {
        let request = departure("--to example 42").request();
        assert_eq!(request, Request::new(42, "example"));
        assert_eq!(request.mode, Mode::Hybrid);
        assert_eq!(request.max_rounds, 30);
        assert_eq!(request.timeout, None);
        assert_eq!((request.token_file, request.config_dir), (None, PathBuf::from("/etc/godwit")));
    }

    #[test]
    fn a_move_takes_much() {
        let arguments = departure(
            "42 --to [::1]:9 --token-file t --mode pre-copy --max-rounds 3 --downtime-target 25 --timeout 7 \
             --external fd[0]=null --external fd[1]=file:/a=b --new-pidns --json -vv \
             --move-addr 10.0.0.5/eth1 --move-addr fd00::5 --tcp-established --skip-in-flight \
             --map-addr 10.0.0.6=10.9.0.6 --map-addr fd00::6=fd09::6 --forward 9 \
             --downtime-limit 50 --on-timeout force --reconnect-for 3 --state-dir /run/here",
        );
        assert!(arguments.json);
        assert_eq!(arguments.verbose, 2);
        let expected = Request {
            move_addresses: vec![
                MoveAddress { address: "10.0.0.5".parse().unwrap(), device: Some("eth1".into()) },
                MoveAddress { address: "fd00::5".parse().unwrap(), device: None },
            ],
            joints: Vec::new(),
            map_addresses: vec!["10.0.0.6=10.9.0.6".parse().unwrap(), "fd00::6=fd09::6".parse().unwrap()],
            forward: Some(Duration::from_secs(9)),
            tcp_close: false,
            skip_in_flight: true,
            pid: 42,
            to: "[::1]:9".to_owned(),
            token_file: Some("t".into()),
            config_dir: "/etc/godwit".into(),
            mode: Mode::PreCopy,
            max_rounds: 3,
            downtime_target: Some(Duration::from_millis(25)),
            downtime_limit: Some(Duration::from_millis(50)),
            timeout: Some(Duration::from_secs(7)),
            on_timeout: OnTimeout::Force,
            reconnect_for: Duration::from_secs(3),
            state_directory: "/run/here".into(),
            external: vec!["fd[0]=null".to_owned(), "fd[1]=file:/a=b".to_owned()],
            new_pid_namespace: true,
        };
        assert_eq!(arguments.request(), expected);
    }

    #[test]
    fn networks_are_joined_in_three_ways() {
        let request = departure("--to h 1 --net eth0:veth=br0 --net macvlan=eth1 --net ns:blue").request();
        let joint = |interface: Option<&str>, kind| Joint { interface: interface.map(str::to_owned), kind };
        let expected = [
            joint(Some("eth0"), JointKind::Veth("br0".into())),
            joint(None, JointKind::Macvlan("eth1".into())),
            joint(None, JointKind::Namespace("blue".into())),
        ];
        assert_eq!(request.joints, expected);
    }

    #[test]
    fn all_modes_have_their_words() {
        for mode in [Mode::Hybrid, Mode::PreCopy, Mode::PostCopy, Mode::StopAndCopy] {
            assert_eq!(departure(&format!("--to h 1 --mode {mode}")).mode, mode);
        }
        refused("--to h 1 --mode fast");
    }

    #[test]
    fn wrong_usage_is_told_apart() {
        assert_eq!(refused("--to h"), ErrorKind::MissingRequiredArgument);
        assert_eq!(refused("42"), ErrorKind::MissingRequiredArgument);
        assert_eq!(refused(""), ErrorKind::MissingRequiredArgument);
        for pid in ["0", "-1", "x", "99999999999"] {
            refused(&format!("--to h {pid}"));
        }
        for to in ["a:x", "a:0", ":1", "[::1", "a:65536"] {
            assert_eq!(refused(&format!("--to {to} 1")), ErrorKind::ValueValidation, "{to}");
        }
        for number in ["--timeout 0", "--timeout -1", "--timeout soon", "--downtime-target 0", "--max-rounds 0"] {
            refused(&format!("--to h 1 {number}"));
        }
        for address in ["10.0.0.5/24", "10.0.0.5/", "example/eth0", ""] {
            refused(&format!("--to h 1 --move-addr={address}"));
        }
        for pair in ["10.0.0.5", "10.0.0.5=", "10.0.0.5=fd00::1", "0.0.0.0=10.0.0.1", "a=b", "10.0.0.5=10.0.0.6=7"] {
            refused(&format!("--to h 1 --map-addr {pair}"));
        }
        refused("--to h 1 --tcp-close --tcp-established");
        for joint in ["veth", "veth=", "bond=x", "ns:", ":veth=br0", "eth0:ns:x"] {
            refused(&format!("--to h 1 --net={joint}"));
        }
        refused("--to h 1 --net veth=br0 --move-addr 10.0.0.5");
        for spec in [
            "fd[1]",
            "fd[]=null",
            "fd[-1]=null",
            "fd[+1]=null",
            "fd[1]=zero",
            "fd[1]=file:log",
            "1=null",
            "fd[99999999999]=null",
        ] {
            assert_eq!(refused(&format!("--to h 1 --external {spec}")), ErrorKind::ValueValidation, "{spec}");
        }
    }

    #[test]
    fn connections_go_alone() {
        let arguments = parse("connection --to h 42 7,9 --label x --map-addr 10.0.0.1=10.9.0.1 --forward 3").unwrap();
        let Some(Command::Connection(arguments)) = arguments.command else { panic!("{arguments:?}") };
        let wish = arguments.wish();
        assert_eq!((wish.descriptors, wish.label.as_str(), wish.request.pid), (vec![7, 9], "x", 42));
        assert_eq!(wish.request.forward, Some(Duration::from_secs(3)));
        assert_eq!(wish.request.map_addresses.len(), 1);
        for words in ["connection --to h 42", "connection 42 7", "connection --to h 42 x", "connection --to h 42 7,-1"]
        {
            refused(words);
        }
    }

    #[test]
    fn the_list_of_hosts_has_commands() {
        let code = "04secret";
        let arguments = parse(&format!("trust {code} --one-way --name a")).unwrap();
        assert!(!format!("{arguments:?}").contains(code), "{arguments:?}");
        assert!(matches!(arguments.command, Some(Command::Trust(TrustArguments { one_way: true, .. }))));
        let arguments = parse("hosts revoke host-b --config-dir d").unwrap();
        let Some(Command::Hosts(hosts)) = arguments.command else { panic!("{arguments:?}") };
        assert_eq!(hosts.config_dir, PathBuf::from("d"));
        assert!(matches!(hosts.change, Some(Change::Revoke { host }) if host == "host-b"));
        let fingerprint = "ab".repeat(32);
        assert!(parse(&format!("hosts add {fingerprint} --name b --permit sending")).is_ok());
        for words in ["trust", "hosts revoke", "hosts add abc"] {
            refused(words);
        }
        refused(&format!("hosts add {fingerprint} --permit all"));
    }

    #[test]
    fn the_demo_is_no_move() {
        let arguments = parse("demo").unwrap();
        assert!(arguments.departure.is_none());
        assert!(matches!(arguments.command, Some(Command::Demo(DemoArguments { memory: 256, .. }))));
        assert!(matches!(
            parse("demo --memory 512").unwrap().command,
            Some(Command::Demo(DemoArguments { memory: 512, .. }))
        ));
        refused("--to h demo");
        refused("demo --memory 0");
    }

    #[test]
    fn help_is_complete() {
        let help = Arguments::command().render_long_help().to_string();
        for word in [
            "--to",
            "PID",
            "--token-file",
            "--mode",
            "--max-rounds",
            "--downtime-target",
            "--timeout",
            "--external",
            "--new-pidns",
            "--json",
            "--verbose",
            "7477",
            "Exit codes",
            "Examples",
            "post-copy",
            "stop-and-copy",
            "demo",
        ] {
            assert!(help.contains(word), "{word} is not in:\n{help}");
        }
        assert!(!help.contains("demo-worker") && !help.contains("demo-host"));
    }
}
