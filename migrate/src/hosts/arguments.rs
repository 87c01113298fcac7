//! The command lines of `migrate hosts` and `migrate trust`.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use godwit_carry::{DEFAULT_CONFIG_DIR, Fingerprint, Permission};

pub(crate) const TRUST_ABOUT: &str =
    "Accepts the invitation of a page server: the two hosts trust each other from then on";

pub(crate) const TRUST_DETAILS: &str = "\
Accepts an invitation: `page-server invite` on the other host prints a code, and
this command, here, calls that host and enrols each in the other's list. The code
is good once, for some minutes. It carries the other host's fingerprint, so nobody
in between can take that host's place.";

pub(crate) const TRUST_EPILOGUE: &str = "\
What it permits:
  Processes may go both ways: from here to there, and from there to here if a page-server runs here. A host that sends a process
  decides what runs where it arrives, as any user there and root unless the page server is told otherwise (--allow-uid).
  With --one-way only from here to there.

The code is a secret until it was used. As an argument other users of this host may see it for the moment of the call; `-` reads
it from standard input.

Exit codes:
  0  enrolled
  1  not enrolled: the code has a typing error, was used or has expired, or the host does not answer
  2  wrong usage

Examples:
  migrate trust 04ah...
  ssh receiver.example page-server invite | migrate trust -";

pub(crate) const HOSTS_ABOUT: &str = "Lists the hosts that this one trusts, adds and revokes some";

pub(crate) const HOSTS_DETAILS: &str = "\
Shows the fingerprint of this host, and the hosts that it trusts. A change takes
effect at once: no program has to be started anew. What is under way when a host
is revoked may end.";

pub(crate) const HOSTS_EPILOGUE: &str = "\
Permissions, as this host sees them:
  both       processes may go both ways
  sending    from here to there only
  receiving  from there to here only

Exit codes:
  0  done
  1  there is no such host, or the list cannot be read or written
  2  wrong usage

Examples:
  migrate hosts
  migrate hosts --json
  migrate hosts revoke host-b
  migrate hosts add 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 --name host-c --permit sending";

/// The code of an invitation, as it was typed. Not shown.
#[derive(Clone)]
pub struct CodeText(pub(crate) String);

impl CodeText {
    fn new(text: &str) -> Result<Self, std::convert::Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for CodeText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CodeText(redacted)")
    }
}

/// What accepting an invitation needs to know.
#[derive(Args, Debug)]
pub struct TrustArguments {
    /// What `page-server invite` has printed on the other host; - reads it from standard input
    #[arg(value_name = "CODE", value_parser = CodeText::new)]
    pub code: CodeText,
    /// Permit moves from here to there only, in both lists
    #[arg(long)]
    pub one_way: bool,
    /// What this host is called in the other one's list [default: its host name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Where this host's key and the hosts that it trusts are
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_CONFIG_DIR)]
    pub config_dir: PathBuf,
    /// Write one JSON object to standard output
    #[arg(long)]
    pub json: bool,
}

/// What the list of hosts needs to know.
#[derive(Args, Debug)]
pub struct HostsArguments {
    /// Something else than to list them
    #[command(subcommand)]
    pub change: Option<Change>,
    /// Where this host's key and the hosts that it trusts are
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_CONFIG_DIR, global = true)]
    pub config_dir: PathBuf,
    /// Write one JSON object to standard output
    #[arg(long, global = true)]
    pub json: bool,
}

/// A change of the list.
#[derive(Debug, Subcommand)]
pub enum Change {
    /// Trust a host no more
    Revoke {
        /// Its name; its fingerprint, or the first eight digits or more of that
        #[arg(value_name = "NAME|FINGERPRINT")]
        host: String,
    },
    /// Trust a host whose fingerprint is known for certain
    Add {
        /// What `migrate hosts` shows there
        #[arg(value_name = "FINGERPRINT")]
        fingerprint: Fingerprint,
        /// What it is called here [default: the first digits of the fingerprint]
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// Which way processes may go: both, sending, receiving
        #[arg(long, value_name = "WHAT", default_value = "both")]
        permit: Permission,
    },
}
