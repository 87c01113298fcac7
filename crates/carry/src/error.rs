//! What can go wrong with a link, told apart by what the caller can do about it.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use quinn::{ConnectionError, ReadError, TransportErrorCode, WriteError};

use crate::fingerprint::Fingerprint;

/// Close code: everything was said.
pub const CODE_DONE: u32 = 0;
/// Close code: the token was not proven. Codes below this one are the application's.
pub const CODE_AUTH_FAILED: u32 = 0x4700;
/// Close code: no common protocol version.
pub const CODE_VERSION: u32 = 0x4701;
/// Close code: the peer sent what is no frame.
pub const CODE_PROTOCOL: u32 = 0x4702;

/// The step in which a link is made.
pub(crate) const CONNECTING: &str = "connecting";

/// Bytes of a peer's closing words that are kept.
const REASON_BYTES: usize = 256;

/// Says why there is no link, or none any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A token was wrong or missing, here or there.
    #[error("{address}: refused: {reason}")]
    Refused {
        /// The peer.
        address: SocketAddr,
        /// Which proof failed.
        reason: String,
    },
    /// The peer's key is not in the list of trusted hosts.
    #[error("{address}: refused: {reason}; its fingerprint is {fingerprint}")]
    Untrusted {
        /// The peer.
        address: SocketAddr,
        /// What its key is known by.
        fingerprint: Box<Fingerprint>,
        /// Whether it is unknown, or known for something else.
        reason: &'static str,
        /// What admits it.
        command: String,
    },
    /// This host's key is not in the peer's list of trusted hosts.
    #[error("{address}: refused: that host does not trust this one for what it wants; the fingerprint here is {own}")]
    NotTrusted {
        /// The peer.
        address: SocketAddr,
        /// What this host's key is known by.
        own: Box<Fingerprint>,
        /// What admits this host, over there.
        command: String,
    },
    /// A host that answers an invitation's call is another one than that which invited.
    #[error("{address}: refused: the code is of the host with fingerprint {expected}, and this one has {presented}")]
    Impostor {
        /// The host that was called.
        address: SocketAddr,
        /// Whose code it is.
        expected: Box<Fingerprint>,
        /// Who answered.
        presented: Box<Fingerprint>,
    },
    /// One end goes by a token and the other one by host keys.
    #[error("{address}: refused: {reason}")]
    Modes {
        /// The peer.
        address: SocketAddr,
        /// Who does what.
        reason: &'static str,
    },
    /// A TLS handshake was given up.
    #[error("{address}: the TLS handshake was given up {} with alert {alert}", if *by_peer { "there" } else { "here" })]
    Alert {
        /// The peer.
        address: SocketAddr,
        /// Its number: RFC 8446 section 6.
        alert: u8,
        /// Whether the peer gave up.
        by_peer: bool,
    },
    /// The peer speaks another version of the protocol.
    #[error("{address}: no common protocol version: {reason}")]
    Version {
        /// The peer.
        address: SocketAddr,
        /// Both versions.
        reason: String,
    },
    /// The peer closed the link on purpose.
    #[error("the peer closed the link (code {code}): {reason}")]
    PeerClosed {
        /// One of the `CODE_` constants or the application's.
        code: u64,
        /// The peer's words, cut and cleaned of control characters.
        reason: String,
    },
    /// This side closed the link.
    #[error("the link was closed by this side")]
    Closed,
    /// The peer was not heard for too long.
    #[error("{address}: timed out {during}")]
    TimedOut {
        /// The peer.
        address: SocketAddr,
        /// In which step.
        during: &'static str,
    },
    /// The connection broke.
    #[error("{address}: the connection is lost")]
    Lost {
        /// The peer.
        address: SocketAddr,
        /// How.
        #[source]
        source: io::Error,
    },
    /// The peer sent what is no frame; the link was closed over it.
    #[error("{address}: protocol violated: {what}")]
    Protocol {
        /// The peer.
        address: SocketAddr,
        /// How.
        what: String,
    },
    /// A frame handed over for sending is not a valid one.
    #[error("frame cannot be sent")]
    Frame(#[from] godwit_stream::Error),
    /// The token file cannot be used.
    #[error("token file {}: {reason}", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: String,
        /// From the system, when it failed.
        #[source]
        source: Option<io::Error>,
    },
    /// A file of the configuration directory cannot be used.
    #[error("{}: {reason}", path.display())]
    ConfigFile {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: String,
        /// From the system, when it failed.
        #[source]
        source: Option<io::Error>,
    },
    /// Text is no code of an invitation.
    #[error("this is not the code of an invitation: {reason}")]
    Code {
        /// What is wrong with it. The code itself is a secret.
        reason: &'static str,
    },
    /// A host cannot be called this.
    #[error("{name:?} cannot be a host's name: letters, digits and .-_:[]% only")]
    HostName {
        /// What was given, cut.
        name: String,
    },
    /// A token of too few bytes.
    #[error("a token has at least {} bytes, this one {length}", crate::token::SHORTEST)]
    TokenLength {
        /// Bytes given.
        length: usize,
    },
    /// Text is no `HOST[:PORT]`.
    #[error("{text:?} is not HOST[:PORT]: {reason}")]
    Address {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A host name did not resolve.
    #[error("{host} does not resolve to an address")]
    Resolve {
        /// The name.
        host: String,
        /// From the resolver, when it failed rather than found nothing.
        #[source]
        source: Option<io::Error>,
    },
    /// A service's port would be past 65535.
    #[error("port {port} leaves no room for the services on the ports after it")]
    Port {
        /// The page server's port.
        port: u16,
    },
    /// A socket could not be set up.
    #[error("{operation} {address}")]
    Socket {
        /// What was tried.
        operation: &'static str,
        /// On which address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An endpoint was asked for outside an asynchronous runtime.
    #[error("an endpoint needs a running tokio runtime")]
    NoRuntime,
    /// The certificate or the TLS configuration could not be made.
    #[error("{operation}")]
    Tls {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// An error with all its causes, on one line, each once: some errors repeat their cause in their own words already.
#[must_use]
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |cause| cause.source()) {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
    }
    text
}

/// The crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether one host does not want the other: calling again is of no use.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Untrusted { .. } | Self::NotTrusted { .. } | Self::Modes { .. })
    }

    /// Says what to do about it, where that is known.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Untrusted { command, .. } => Some(format!(
                "`migrate hosts` there shows that host's own fingerprint; if it is this one, admit it here: {command}"
            )),
            Self::NotTrusted { command, .. } => Some(format!(
                "admit this host there: {command}; or run `page-server invite` there and `migrate trust CODE` here"
            )),
            Self::Impostor { .. } => {
                Some("compare the address, or have a new code made with `page-server invite --address`".to_owned())
            }
            Self::Modes { .. } => {
                Some("give --token-file at both ends, or at neither and enrol them (`page-server invite`)".to_owned())
            }
            Self::TimedOut { during: CONNECTING, .. } => Some(
                "see that page-server runs there, and that its three UDP ports (from 7477 on unless told otherwise) are open on the way"
                    .to_owned(),
            ),
            _ => None,
        }
    }

    /// Translates the end of a connection with the peer at `address`.
    pub(crate) fn connection(address: SocketAddr, during: &'static str, source: ConnectionError) -> Self {
        match source {
            ConnectionError::ApplicationClosed(close) => {
                Self::closed_by_peer(address, close.error_code.into_inner(), clean(&close.reason))
            }
            ConnectionError::TimedOut => Self::TimedOut { address, during },
            ConnectionError::LocallyClosed => Self::Closed,
            ConnectionError::VersionMismatch => {
                Self::Version { address, reason: "the peer speaks another version of QUIC".into() }
            }
            ConnectionError::TransportError(error) if let Some(alert) = alert(error.code) => {
                Self::Alert { address, alert, by_peer: false }
            }
            ConnectionError::ConnectionClosed(close) if let Some(alert) = alert(close.error_code) => {
                Self::Alert { address, alert, by_peer: true }
            }
            broken => Self::Lost { address, source: broken.into() },
        }
    }

    fn closed_by_peer(address: SocketAddr, code: u64, reason: String) -> Self {
        if code == u64::from(CODE_AUTH_FAILED) {
            Self::Refused { address, reason: format!("the peer says: {reason}") }
        } else if code == u64::from(CODE_VERSION) {
            Self::Version { address, reason: format!("the peer says: {reason}") }
        } else {
            Self::PeerClosed { code, reason }
        }
    }

    pub(crate) fn write(address: SocketAddr, source: WriteError) -> Self {
        match source {
            WriteError::ConnectionLost(source) => Self::connection(address, "sending", source),
            WriteError::Stopped(code) => {
                Self::PeerClosed { code: code.into_inner(), reason: "the peer reads no more".into() }
            }
            WriteError::ClosedStream => Self::Closed,
            WriteError::ZeroRttRejected => Self::Lost { address, source: source.into() },
        }
    }

    pub(crate) fn read(address: SocketAddr, source: ReadError) -> Self {
        match source {
            ReadError::ConnectionLost(source) => Self::connection(address, "receiving", source),
            ReadError::Reset(code) => {
                Self::PeerClosed { code: code.into_inner(), reason: "the peer gave up its stream".into() }
            }
            ReadError::ClosedStream => Self::Closed,
            other => Self::Lost { address, source: other.into() },
        }
    }

    pub(crate) fn tls(operation: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Tls { operation, source: source.into() }
    }
}

/// Gives the TLS alert that an error of QUIC stands for: RFC 9001 section 4.8.
fn alert(code: TransportErrorCode) -> Option<u8> {
    let code = u64::from(code).checked_sub(0x100)?;
    u8::try_from(code).ok()
}

/// Makes a peer's words fit to be printed.
pub(crate) fn clean(reason: &[u8]) -> String {
    let text = String::from_utf8_lossy(&reason[..reason.len().min(REASON_BYTES)]);
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_words_are_cut_and_cleaned() {
        assert_eq!(clean(b"bye\x1b[2J\n"), "bye [2J ");
        assert!(clean(&[0xff; 5000]).chars().count() <= REASON_BYTES);
    }
}
