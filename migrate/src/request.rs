//! What the user wants moved, where to, and how. The command line makes one; the agent takes it.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use godwit_carry::{Credentials, DEFAULT_CONFIG_DIR};
use godwit_journal::DEFAULT_STATE_DIRECTORY;
use serde::{Deserialize, Serialize};

/// How many rounds there are at most unless told otherwise.
pub const DEFAULT_MAX_ROUNDS: u32 = 30;
/// How long packets are sent after connections whose addresses are mapped, unless told otherwise: the network has that long to
/// send them elsewhere by itself.
pub const DEFAULT_FORWARD: Duration = Duration::from_secs(5);
/// The freeze that rounds aim at unless told otherwise, in milliseconds.
pub const DEFAULT_DOWNTIME_TARGET_MS: u64 = 10;

/// How long a link that was lost is made anew unless told otherwise.
pub const DEFAULT_RECONNECT_FOR: Duration = Duration::from_secs(60);

/// What happens when a time that the user gave is over.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// The move is called off; the process runs on here
    #[default]
    Cancel,
    /// The process is frozen and handed over now, however long that takes
    Force,
}

/// When memory travels, as seen from the freeze.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Rounds while the process runs, until they stop paying; what is left follows after the freeze, touched pages first
    #[default]
    Hybrid,
    /// Rounds while the process runs; what is left is sent inside the freeze, and nothing is missing after it
    PreCopy,
    /// Nothing before the freeze; every page follows after it, touched pages first
    PostCopy,
    /// Everything inside the freeze
    StopAndCopy,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hybrid => "hybrid",
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
            Self::StopAndCopy => "stop-and-copy",
        })
    }
}

/// One move.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Request {
    /// The process, as this PID namespace calls it.
    pub pid: i32,
    /// The page server: `HOST[:PORT]`.
    pub to: String,
    /// The file with a secret that both hosts share, where they are to go by that.
    pub token_file: Option<PathBuf>,
    /// Where this host's key and the hosts that it trusts are.
    pub config_dir: PathBuf,
    /// When memory travels.
    pub mode: Mode,
    /// Rounds before the freeze, at most.
    pub max_rounds: u32,
    /// Rounds end when what is left could be sent in this time; without post-copy, a move that cannot meet it is called off.
    /// Without a wish [`DEFAULT_DOWNTIME_TARGET_MS`] is aimed at and not insisted on.
    pub downtime_target: Option<Duration>,
    /// How much longer than the target a freeze may last before it is called off; as long as it is without it.
    pub downtime_limit: Option<Duration>,
    /// How long everything before the commit may take; no limit without it.
    pub timeout: Option<Duration>,
    /// What happens when one of these times is over.
    pub on_timeout: OnTimeout,
    /// How long a link that was lost is made anew before the outcome counts as unknown.
    pub reconnect_for: Duration,
    /// Where the hand-over is written down.
    pub state_directory: PathBuf,
    /// What becomes of descriptors that lead outside: `fd[1]=file:/path`, `fd[0]=null`.
    pub external: Vec<String>,
    /// Build in a new PID namespace even when the pids are free.
    pub new_pid_namespace: bool,
    /// Addresses of this host that move along.
    pub move_addresses: Vec<MoveAddress>,
    /// Where interfaces that lead out of the process's own network namespace lead to at the destination.
    pub joints: Vec<Joint>,
    /// Addresses that sockets have otherwise at the destination.
    pub map_addresses: Vec<MapAddress>,
    /// How long packets that still come here are sent after their connections; until none come for a moment where it is not said
    /// and no addresses are mapped.
    pub forward: Option<Duration>,
    /// Leave connections behind, closed, instead of moving them.
    pub tcp_close: bool,
    /// Lose connections that nobody has accepted, instead of calling the move off.
    pub skip_in_flight: bool,
}

/// An address that moves along.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MoveAddress {
    /// The address.
    pub address: IpAddr,
    /// The destination's interface that gets it; one of the same name as here where none is given.
    pub device: Option<String>,
}

impl FromStr for MoveAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, device) = text.split_once('/').map_or((text, None), |(address, device)| (address, Some(device)));
        let address = address.parse().map_err(|_| format!("{address} is no IP address"))?;
        if device.is_some_and(|device| device.is_empty() || device.parse::<u8>().is_ok()) {
            return Err("behind the slash stands an interface of the destination, as in 10.0.0.5/eth0".to_owned());
        }
        Ok(Self { address, device: device.map(str::to_owned) })
    }
}

/// Where an interface that leads out of a network namespace leads to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Joint {
    /// The interface; none where only one leads out.
    pub interface: Option<String>,
    /// Where to.
    pub kind: JointKind,
}

/// The ways in which a network namespace is joined to a host's network.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum JointKind {
    /// A veth into this bridge.
    Veth(String),
    /// A macvlan of this interface.
    Macvlan(String),
    /// The namespace of this name, which is there already.
    Namespace(String),
}

impl FromStr for Joint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "expected [INTERFACE:]veth=BRIDGE, [INTERFACE:]macvlan=DEV or ns:NAME".to_owned();
        let named = |name: &str| if name.is_empty() { Err(expected()) } else { Ok(name.to_owned()) };
        let Some((left, name)) = text.split_once('=') else {
            let name = text.strip_prefix("ns:").ok_or_else(expected)?;
            return Ok(Self { interface: None, kind: JointKind::Namespace(named(name)?) });
        };
        let (interface, kind) = left.rsplit_once(':').map_or((None, left), |(interface, kind)| (Some(interface), kind));
        let kind = match kind {
            "veth" => JointKind::Veth(named(name)?),
            "macvlan" => JointKind::Macvlan(named(name)?),
            _ => return Err(expected()),
        };
        Ok(Self { interface: interface.map(named).transpose()?, kind })
    }
}

/// An address that is another one at the destination.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MapAddress {
    /// As sockets have it here.
    pub old: IpAddr,
    /// As they have it there.
    pub new: IpAddr,
}

impl FromStr for MapAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (old, new) = text.split_once('=').ok_or("expected OLD=NEW, such as 10.0.0.5=10.9.0.5")?;
        let address = |text: &str| text.parse().map_err(|_| format!("{text} is no IP address"));
        let (old, new) = (address(old)?, address(new)?);
        godwit_network::Translation::new([(old, new)])?;
        Ok(Self { old, new })
    }
}

impl Request {
    /// Chooses how the hosts know each other.
    ///
    /// # Errors
    /// When the token or this host's key cannot be used.
    pub fn credentials(&self) -> godwit_carry::Result<Credentials> {
        Credentials::choose(&self.config_dir, self.token_file.as_deref())
    }

    /// Describes the move of a process with everything else as the command line has it by default.
    pub fn new(pid: i32, to: impl Into<String>) -> Self {
        Self {
            pid,
            to: to.into(),
            token_file: None,
            config_dir: DEFAULT_CONFIG_DIR.into(),
            mode: Mode::default(),
            max_rounds: DEFAULT_MAX_ROUNDS,
            downtime_target: None,
            downtime_limit: None,
            timeout: None,
            on_timeout: OnTimeout::default(),
            reconnect_for: DEFAULT_RECONNECT_FOR,
            state_directory: DEFAULT_STATE_DIRECTORY.into(),
            external: Vec::new(),
            new_pid_namespace: false,
            move_addresses: Vec::new(),
            joints: Vec::new(),
            map_addresses: Vec::new(),
            forward: None,
            tcp_close: false,
            skip_in_flight: false,
        }
    }
}
