//! Where a service is: "HOST[:PORT]" as people write it, and the ports that belong together.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};

use crate::error::{Error, Result};

/// The page server's port unless another is given.
pub const DEFAULT_PORT: u16 = 7477;
/// What is added to the page server's port for the fault service.
pub const FAULT_PORT_OFFSET: u16 = 1;
/// What is added to the page server's port for the drain.
pub const DRAIN_PORT_OFFSET: u16 = 2;

/// One of the services that live on neighbouring ports of one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Control and pages, on the base port.
    Pages,
    /// Page faults.
    Faults,
    /// The rest of the pages, after the move.
    Drain,
}

impl Service {
    /// Gives the service's port beside a page server on `base`; 0 (any free port) stays 0.
    ///
    /// # Errors
    /// When it would be past 65535.
    pub fn port(self, base: u16) -> Result<u16> {
        let offset = match self {
            Self::Pages => 0,
            Self::Faults => FAULT_PORT_OFFSET,
            Self::Drain => DRAIN_PORT_OFFSET,
        };
        if base == 0 {
            return Ok(0);
        }
        base.checked_add(offset).ok_or(Error::Port { port: base })
    }

    /// Gives the service's address beside a page server at `base`.
    ///
    /// # Errors
    /// As [`Self::port`].
    pub fn address(self, mut base: SocketAddr) -> Result<SocketAddr> {
        base.set_port(self.port(base.port())?);
        Ok(base)
    }
}

/// A host, by name or number, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    host: String,
    port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl HostPort {
    /// Takes `HOST`, `HOST:PORT`, `[IPV6]`, `[IPV6]:PORT` or a bare IPv6 address apart.
    ///
    /// # Errors
    /// When it is none of them.
    pub fn parse(text: &str, default_port: u16) -> Result<Self> {
        let wrong = |reason| Error::Address { text: text.chars().take(300).collect(), reason };
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, after) = rest.split_once(']').ok_or_else(|| wrong("\"]\" is missing"))?;
            if !is_ipv6(host) {
                return Err(wrong("only an IPv6 address stands in brackets"));
            }
            let port = match after {
                "" => None,
                _ => Some(after.strip_prefix(':').ok_or_else(|| wrong("\":PORT\" is expected after \"]\""))?),
            };
            (host, port)
        } else if is_ipv6(text) {
            (text, None)
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        if host.is_empty() || host.len() > 255 {
            return Err(wrong("the host is empty or too long"));
        }
        if host.chars().any(|character| character.is_whitespace() || character.is_control() || character == '/') {
            return Err(wrong("the host is not a name"));
        }
        let port = match port {
            None => default_port,
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse().map_err(|_| wrong("the port is not one of 1 to 65535"))?
            }
            Some(_) => return Err(wrong("the port is not a number")),
        };
        Ok(Self { host: host.to_owned(), port })
    }

    /// Gives the host as it was written, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Gives the port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Looks the host up, by getaddrinfo(3): at least one address, in the order of preference.
    ///
    /// # Errors
    /// When there is none.
    pub async fn resolve(&self) -> Result<Vec<SocketAddr>> {
        let failed = |source| Error::Resolve { host: self.host.clone(), source };
        let found = tokio::net::lookup_host((self.host.as_str(), self.port)).await;
        let addresses: Vec<SocketAddr> = found.map_err(|source| failed(Some(source)))?.collect();
        if addresses.is_empty() { Err(failed(None)) } else { Ok(addresses) }
    }
}

/// Resolves `HOST[:PORT]` to at least one address, in the order of preference.
///
/// # Errors
/// When the text is not of that form or the host does not resolve.
pub async fn resolve(text: &str, default_port: u16) -> Result<Vec<SocketAddr>> {
    HostPort::parse(text, default_port)?.resolve().await
}

/// Says whether `text` is an IPv6 address, with or without a zone.
fn is_ipv6(text: &str) -> bool {
    let address = text.split_once('%').map_or(text, |(address, _)| address);
    address.parse::<Ipv6Addr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<(String, u16)> {
        HostPort::parse(text, DEFAULT_PORT).ok().map(|parsed| (parsed.host, parsed.port))
    }

    #[test]
    fn all_the_forms_are_understood() {
        let ok = |text, host: &str, port| assert_eq!(parsed(text), Some((host.to_owned(), port)), "{text}");
        ok("example", "example", 7477);
        ok("example:1", "example", 1);
        ok("10.0.0.1", "10.0.0.1", 7477);
        ok("10.0.0.1:65535", "10.0.0.1", 65535);
        ok("::1", "::1", 7477);
        ok("[::1]", "::1", 7477);
        ok("[::1]:80", "::1", 80);
        ok("fe80::1%eth0", "fe80::1%eth0", 7477);
        ok("[fe80::1%2]:9", "fe80::1%2", 9);
    }

    #[test]
    fn nothing_else_is() {
        for text in
            ["", ":1", "a:", "a:x", "a:65536", "a:-1", "a:+1", "a:1:2", "[::1", "[::1]80", "[a]:1", "a b", "a/b"]
        {
            // "a:" has an empty port, which is no number.
            assert_eq!(parsed(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_shown_parses_again() {
        for text in ["example:1", "[::1]:80", "10.0.0.1:7477"] {
            assert_eq!(HostPort::parse(text, 5).unwrap().to_string(), text);
        }
    }

    #[test]
    fn services_are_neighbours() {
        assert_eq!(Service::Faults.port(DEFAULT_PORT).unwrap(), 7478);
        assert_eq!(Service::Drain.port(DEFAULT_PORT).unwrap(), 7479);
        assert_eq!(Service::Drain.port(0).unwrap(), 0);
        assert!(Service::Drain.port(65534).is_err());
        let base: SocketAddr = "[::1]:7000".parse().unwrap();
        assert_eq!(Service::Faults.address(base).unwrap().to_string(), "[::1]:7001");
    }

    #[tokio::test]
    async fn numbers_resolve_to_themselves() {
        assert_eq!(resolve("127.0.0.1", 9).await.unwrap(), ["127.0.0.1:9".parse().unwrap()]);
        assert_eq!(resolve("[::1]:8", 9).await.unwrap(), ["[::1]:8".parse().unwrap()]);
    }
}
