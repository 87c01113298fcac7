//! Which packets are meant.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

/// A TCP connection, or what a connected UDP socket takes, as the host that has it sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
}

/// A listening TCP socket, or a UDP socket that takes datagrams from anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Listener {
    /// Its address; `None` where it takes what is sent to any.
    pub address: Option<IpAddr>,
    /// Its port.
    pub port: u16,
}

/// Connections and listening sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watched {
    /// Connections.
    pub flows: HashSet<Flow>,
    /// Sockets that take new ones.
    pub listeners: HashSet<Listener>,
    /// What arrives for UDP sockets.
    pub datagrams: Datagrams,
}

/// Datagrams that UDP sockets take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Datagrams {
    /// Those of connected sockets.
    pub flows: HashSet<Flow>,
    /// Those of all others that have a port.
    pub ports: HashSet<Listener>,
}

impl Datagrams {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty() && self.ports.is_empty()
    }
}

impl Flow {
    /// Makes a flow whose addresses are as packets have them: IPv4 addresses in the guise of IPv6 ones are not.
    #[must_use]
    pub fn new(local: SocketAddr, remote: SocketAddr) -> Self {
        Self { local: plain(local), remote: plain(remote) }
    }
}

/// Takes away what a packet does not have: the guise of IPv6, and the scope.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

impl Watched {
    /// Whether there is nothing to be watched.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty() && self.listeners.is_empty() && self.datagrams.is_empty()
    }

    /// Whether a socket takes what is sent to any address of its host.
    #[must_use]
    pub fn takes_any_address(&self) -> bool {
        self.listeners.iter().chain(&self.datagrams.ports).any(|listener| listener.address.is_none())
    }

    /// Whether something is in both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        !self.flows.is_disjoint(&other.flows) || !self.listeners.is_disjoint(&other.listeners)
    }

    /// Whether a packet that arrived belongs to a connection, or opens one (`opens`: it has SYN without ACK).
    pub(crate) fn has(&self, flow: &Flow, opens: bool) -> bool {
        self.flows.contains(flow) || opens && self.takes(flow)
    }

    /// Whether a connection would be one to a listening socket.
    pub(crate) fn takes(&self, flow: &Flow) -> bool {
        let to = |address| self.listeners.contains(&Listener { address, port: flow.local.port() });
        to(None) || to(Some(flow.local.ip()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_watched_is_had() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let flow = |local, remote| Flow::new(at(local), at(remote));
        let watched = Watched {
            flows: [flow("[::ffff:10.0.0.1]:80", "[::ffff:10.0.0.9]:4000")].into(),
            listeners: [
                Listener { address: None, port: 22 },
                Listener { address: Some("10.0.0.1".parse().unwrap()), port: 80 },
            ]
            .into(),
            ..Watched::default()
        };
        assert!(watched.has(&flow("10.0.0.1:80", "10.0.0.9:4000"), false));
        assert!(!watched.has(&flow("10.0.0.1:80", "10.0.0.9:4001"), false));
        assert!(watched.has(&flow("10.0.0.1:80", "10.0.0.9:4001"), true));
        assert!(!watched.has(&flow("10.0.0.2:80", "10.0.0.9:4001"), true));
        assert!(watched.has(&flow("[fd00::1]:22", "[fd00::2]:4"), true));
    }
}
