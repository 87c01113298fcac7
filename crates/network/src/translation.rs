//! Addresses that become others on the way, for networks that translate them (NAT, load balancers).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use crate::flow::Flow;
use crate::packet;

/// Which addresses become which others. Each is translated once: two may change places.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Translation(HashMap<IpAddr, IpAddr>);

impl Translation {
    /// Makes a translation of pairs, old address first.
    ///
    /// # Errors
    /// Says what is wrong with a pair: two families, an address that is none of a single host, or one named twice.
    pub fn new(pairs: impl IntoIterator<Item = (IpAddr, IpAddr)>) -> Result<Self, String> {
        let mut map = HashMap::new();
        for (old, new) in pairs {
            if old.is_ipv4() != new.is_ipv4() {
                return Err(format!("{old} and {new} are of two families"));
            }
            if let Some(odd) = [old, new].into_iter().find(|one| one.is_unspecified() || one.is_multicast()) {
                return Err(format!("{odd} is no address of one host"));
            }
            if map.insert(old, new).is_some_and(|before| before != new) {
                return Err(format!("{old} cannot become two addresses"));
            }
        }
        Ok(Self(map))
    }

    /// Whether nothing is translated.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Old addresses and what they become.
    pub fn pairs(&self) -> impl Iterator<Item = (IpAddr, IpAddr)> {
        self.0.iter().map(|(&old, &new)| (old, new))
    }

    /// What an address becomes; one that is not named stays. An IPv4 address in the guise of an IPv6 one keeps it.
    #[must_use]
    pub fn address(&self, address: IpAddr) -> IpAddr {
        match (address, self.0.get(&address.to_canonical())) {
            (_, None) => address,
            (IpAddr::V6(_), Some(IpAddr::V4(new))) => new.to_ipv6_mapped().into(),
            (_, Some(&new)) => new,
        }
    }

    /// As [`Translation::address`], for one with a port.
    #[must_use]
    pub fn socket_address(&self, mut address: SocketAddr) -> SocketAddr {
        let new = self.address(address.ip());
        if new != address.ip() {
            address.set_ip(new);
        }
        address
    }

    /// What a connection is at the other host.
    #[must_use]
    pub fn flow(&self, flow: Flow) -> Flow {
        Flow { local: self.socket_address(flow.local), remote: self.socket_address(flow.remote) }
    }

    /// Translates both addresses of a packet, from its IP header on. Its checksums are right afterwards if they were before
    /// (RFC 1624), and wrong if they were.
    pub fn packet(&self, bytes: &mut [u8]) {
        if !self.is_empty() {
            packet::translate(bytes, |address| self.address(address));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn only_what_is_named_becomes_another() {
        let pairs = [("10.0.0.1", "10.9.0.1"), ("10.0.0.2", "10.0.0.1"), ("fd00::1", "fd09::1")];
        let translation = Translation::new(pairs.map(|(old, new)| (ip(old), ip(new)))).unwrap();
        for (old, new) in [
            ("10.0.0.1", "10.9.0.1"),
            ("10.0.0.2", "10.0.0.1"),
            ("10.0.0.3", "10.0.0.3"),
            ("::ffff:10.0.0.1", "::ffff:10.9.0.1"),
            ("fd00::1", "fd09::1"),
            ("::", "::"),
        ] {
            assert_eq!(translation.address(ip(old)), ip(new));
        }
        let flow = Flow::new("10.0.0.1:80".parse().unwrap(), "10.0.0.2:9".parse().unwrap());
        let there = Flow::new("10.9.0.1:80".parse().unwrap(), "10.0.0.1:9".parse().unwrap());
        assert_eq!(translation.flow(flow), there);
    }

    #[test]
    fn nonsense_is_refused() {
        for pairs in [
            &[("10.0.0.1", "fd00::1")][..],
            &[("0.0.0.0", "10.0.0.1")],
            &[("10.0.0.1", "224.0.0.1")],
            &[("10.0.0.1", "10.0.0.2"), ("10.0.0.1", "10.0.0.3")],
        ] {
            assert!(Translation::new(pairs.iter().map(|(old, new)| (ip(old), ip(new)))).is_err(), "{pairs:?}");
        }
    }
}
