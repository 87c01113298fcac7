//! What a host proves itself by, and what it wants proved: host keys and the list of those that are trusted, or a shared token.

use std::path::Path;

use crate::error::Result;
use crate::host_key::HostKey;
use crate::lasting::Lasting;
use crate::peers::Peers;
use crate::token::Token;

/// Where a host's key, its list of peers and its token are unless told otherwise.
pub const DEFAULT_CONFIG_DIR: &str = "/etc/godwit";
/// The token's file in that directory.
const TOKEN_FILE: &str = "token";

/// This host's key and those that it trusts.
#[derive(Clone, Debug)]
pub struct Hosts {
    /// What it proves itself by.
    pub key: HostKey,
    /// Whom it trusts; looked at anew by every handshake.
    pub peers: Peers,
}

impl Hosts {
    /// Loads what a configuration directory has; the key is made where there is none.
    ///
    /// # Errors
    /// When the key cannot be used.
    pub fn load(configuration: &Path) -> Result<Self> {
        Ok(Self { key: HostKey::load_or_create(configuration)?, peers: Peers::in_directory(configuration) })
    }
}

/// How the two ends of a link know each other. Both must do it in the same way.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// By a secret that both have.
    Token(Token),
    /// By their keys, which each has in its list.
    Hosts(Hosts),
    /// By the token until the list has somebody, from then on by keys alone.
    Undecided(Hosts, Token),
}

impl Credentials {
    /// Chooses: a token that was asked for; otherwise host keys; and the token of the configuration directory, if there is one,
    /// only for as long as no host is trusted.
    ///
    /// # Errors
    /// When the token or this host's key cannot be used.
    pub fn choose(configuration: &Path, token_file: Option<&Path>) -> Result<Self> {
        if let Some(file) = token_file {
            return Ok(Self::Token(Token::load(file)?));
        }
        let default = configuration.join(TOKEN_FILE);
        let token = default.exists().then(|| Token::load(&default)).transpose();
        let peers = Peers::in_directory(configuration);
        match (Hosts::load(configuration), token) {
            (Ok(hosts), Ok(Some(token))) => Ok(Self::Undecided(hosts, token)),
            (Ok(hosts), Ok(None)) => Ok(Self::Hosts(hosts)),
            // A token that nobody needs any more.
            (Ok(hosts), Err(_)) if !peers.is_empty() => Ok(Self::Hosts(hosts)),
            (_, Err(error)) => Err(error),
            (Err(error), Ok(Some(token))) if peers.is_empty() => {
                tracing::warn!(%error, "this host has no key; it is known by its token alone");
                Ok(Self::Token(token))
            }
            (Err(error), Ok(_)) => Err(error),
        }
    }

    /// Gives the token, where it is what counts now.
    pub(crate) fn current_token(&self) -> Option<&Token> {
        match self {
            Self::Token(token) => Some(token),
            Self::Hosts(_) => None,
            Self::Undecided(hosts, token) => hosts.peers.is_empty().then_some(token),
        }
    }

    /// Gives what outlives this program.
    pub(crate) fn lasting(&self) -> Lasting {
        match self {
            Self::Token(token) => token.lasting(),
            Self::Hosts(hosts) | Self::Undecided(hosts, _) => hosts.key.lasting(),
        }
    }

    /// Gives the keys, where there are any.
    pub fn hosts(&self) -> Option<&Hosts> {
        match self {
            Self::Token(_) => None,
            Self::Hosts(hosts) | Self::Undecided(hosts, _) => Some(hosts),
        }
    }
}

impl From<Token> for Credentials {
    fn from(token: Token) -> Self {
        Self::Token(token)
    }
}

impl From<&Token> for Credentials {
    fn from(token: &Token) -> Self {
        Self::Token(token.clone())
    }
}

impl From<&Credentials> for Credentials {
    fn from(credentials: &Credentials) -> Self {
        credentials.clone()
    }
}

impl From<Hosts> for Credentials {
    fn from(hosts: Hosts) -> Self {
        Self::Hosts(hosts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fingerprint::Fingerprint;
    use crate::peers::{Peer, Permission};
    use std::os::unix::fs::PermissionsExt;

    fn token_in(directory: &Path) -> std::path::PathBuf {
        let path = directory.join(TOKEN_FILE);
        std::fs::write(&path, [7; 32]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    #[test]
    fn a_token_counts_when_asked_for_or_until_somebody_is_trusted() {
        let directory = tempfile::tempdir().unwrap();
        let choose = |token: Option<&Path>| Credentials::choose(directory.path(), token).unwrap();
        assert!(choose(None).current_token().is_none());
        let token = token_in(directory.path());
        let chosen = choose(None);
        assert!(chosen.current_token().is_some() && chosen.hosts().is_some());
        let peers = Peers::in_directory(directory.path());
        let peer = Peer::new("b", Fingerprint::of(b"b"), None, Permission::Both, "test").unwrap();
        peers.add(&peer).unwrap();
        assert!(chosen.current_token().is_none(), "the list is looked at once only");
        assert!(choose(Some(&token)).current_token().is_some());
        peers.remove(peer.fingerprint).unwrap();
        assert!(chosen.current_token().is_some());
        std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(Credentials::choose(directory.path(), None).unwrap_err().to_string().contains("0644"));
        assert!(Credentials::choose(directory.path(), Some(Path::new("/nonexistent"))).is_err());
    }

    #[test]
    fn secrets_are_not_shown() {
        let directory = tempfile::tempdir().unwrap();
        token_in(directory.path());
        let shown = format!("{:?}", Credentials::choose(directory.path(), None).unwrap());
        assert!(shown.contains("redacted") && !shown.contains('\u{7}') && !shown.contains("7, 7"), "{shown}");
    }
}
