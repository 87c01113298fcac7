//! Addresses of sockets as another host will have them.

use super::listener;
use godwit_network::{Datagrams, Flow, Listener, Translation, Watched};
use godwit_proto::image::{FileEntry, InetSkEntry};
use godwit_proto::wire::{self, SocketContent};
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

/// Most connections and listening sockets that are taken from a message: as many as there can be descriptors.
const MOST: usize = 1 << 20;

/// Translates the addresses that sockets among `files` have.
pub fn translate_files(files: &mut [FileEntry], translation: &Translation) {
    files
        .iter_mut()
        .filter_map(|file| file.isk.as_deref_mut())
        .for_each(|socket| translate_socket(socket, translation));
}

/// Translates the addresses of what waits in datagram sockets.
pub fn translate_contents(contents: &mut [SocketContent], translation: &Translation) {
    if translation.is_empty() {
        return;
    }
    for header in contents.iter_mut().filter_map(|content| content.header.as_mut()) {
        for address in [&mut header.source, &mut header.destination] {
            if let Some(old) = ip(address) {
                *address = octets(translation.address(old));
            }
        }
    }
}

/// Translates both addresses of a socket.
pub fn translate_socket(socket: &mut InetSkEntry, translation: &Translation) {
    if translation.is_empty() {
        return;
    }
    let mut become_another = |words: &mut Vec<u32>| {
        let Some(address) = listener::ip_of(socket.family, words) else { return };
        let new = translation.address(address);
        if new != address {
            *words = listener::words(new);
            // The interface that a link-local address is of.
            let is_link_local = matches!(new, IpAddr::V6(new) if new.is_unicast_link_local());
            if !is_link_local {
                socket.ifname = None;
            }
        }
    };
    become_another(&mut socket.src_addr);
    become_another(&mut socket.dst_addr);
}

/// Translates addresses written like `tcp:10.0.0.1:80`; others (`unix:/run/x`) stay.
///
/// # Errors
/// Two that were different and are not any more.
pub fn translate_addresses(
    addresses: &[String],
    translation: &Translation,
) -> Result<Vec<String>, Vec<(String, String)>> {
    let mut from: HashMap<String, &String> = HashMap::new();
    let mut clashes = Vec::new();
    let mut translated = Vec::with_capacity(addresses.len());
    for address in addresses {
        let new = match split(address) {
            Some((kind, at)) => format!("{kind}:{}", translation.socket_address(at)),
            None => address.clone(),
        };
        match from.get(&new) {
            // Many connections may have one address.
            Some(&other) if other != address && !address.starts_with("connection:") => {
                clashes.push((other.clone(), address.clone()));
            }
            Some(_) => {}
            None => {
                from.insert(new.clone(), address);
                translated.push(new);
            }
        }
    }
    if clashes.is_empty() { Ok(translated) } else { Err(clashes) }
}

fn split(address: &str) -> Option<(&str, SocketAddr)> {
    let (kind, at) = address.split_once(':')?;
    Some((kind, at.parse().ok()?))
}

/// All addresses of hosts that sockets use: those written like `tcp:10.0.0.1:80`, and both ends of connections.
#[must_use]
pub fn used_addresses(addresses: &[String], watched: &Watched) -> BTreeSet<IpAddr> {
    let listed = addresses.iter().filter_map(|address| split(address)).map(|(_, at)| at.ip().to_canonical());
    let flows = watched.flows.iter().chain(&watched.datagrams.flows);
    let ends = flows.flat_map(|flow| [flow.local.ip(), flow.remote.ip()]);
    listed.chain(ends).filter(|address| !address.is_unspecified()).collect()
}

/// Says for another host which packets to hold back, should they come early.
#[must_use]
pub fn watched_message(watched: &Watched, translation: &Translation) -> wire::Watched {
    let flow = |flow: &Flow| {
        let flow = translation.flow(*flow);
        wire::Flow {
            local: octets(flow.local.ip()),
            local_port: flow.local.port().into(),
            remote: octets(flow.remote.ip()),
            remote_port: flow.remote.port().into(),
        }
    };
    let listener = |listener: &Listener| wire::Listener {
        address: listener.address.map_or_else(Vec::new, |address| octets(translation.address(address))),
        port: listener.port.into(),
    };
    wire::Watched {
        flows: watched.flows.iter().map(flow).collect(),
        listeners: watched.listeners.iter().map(listener).collect(),
        datagram_flows: watched.datagrams.flows.iter().map(flow).collect(),
        datagram_ports: watched.datagrams.ports.iter().map(listener).collect(),
    }
}

/// Reads what [`watched_message`] has written; what makes no sense is left out.
#[must_use]
pub fn watched_from(message: &wire::Watched) -> Watched {
    let at = |octets: &[u8], port: u32| Some(SocketAddr::new(ip(octets)?, port.try_into().ok()?));
    let flow = |flow: &wire::Flow| {
        let (local, remote) = (at(&flow.local, flow.local_port)?, at(&flow.remote, flow.remote_port)?);
        (local.is_ipv4() == remote.is_ipv4()).then(|| Flow::new(local, remote))
    };
    let listener = |listener: &wire::Listener| {
        let address = if listener.address.is_empty() { None } else { Some(ip(&listener.address)?) };
        Some(Listener { address, port: listener.port.try_into().ok()? })
    };
    let flows = |flows: &[wire::Flow]| flows.iter().take(MOST).filter_map(flow).collect();
    let listeners = |listeners: &[wire::Listener]| listeners.iter().take(MOST).filter_map(listener).collect();
    Watched {
        flows: flows(&message.flows),
        listeners: listeners(&message.listeners),
        datagrams: Datagrams { flows: flows(&message.datagram_flows), ports: listeners(&message.datagram_ports) },
    }
}

/// Connections and listening sockets among the sockets of messages.
pub fn watched_of<'a>(sockets: impl IntoIterator<Item = &'a InetSkEntry>) -> Watched {
    let mut watched = Watched::default();
    for socket in sockets {
        if listener::is_connection(socket) {
            let ends = listener::source_of(socket).zip(listener::peer_of(socket));
            watched.flows.extend(ends.map(|(local, remote)| Flow::new(local, remote)));
        } else {
            watched.listeners.extend(listener::listener_of(socket));
        }
    }
    watched
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn ip(octets: &[u8]) -> Option<IpAddr> {
    match octets.len() {
        4 => Some(<[u8; 4]>::try_from(octets).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(octets).ok()?.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translation() -> Translation {
        let pairs = [("10.0.0.1", "10.9.0.1"), ("10.0.0.2", "10.9.0.1"), ("fe80::1", "fd09::1")];
        Translation::new(pairs.map(|(old, new)| (old.parse().unwrap(), new.parse().unwrap()))).unwrap()
    }

    #[test]
    fn addresses_of_sockets_become_others() {
        let at = |text: &str| listener::words(text.parse().unwrap());
        let mut socket = InetSkEntry {
            family: libc::AF_INET6 as u32,
            src_addr: at("::ffff:10.0.0.1"),
            dst_addr: at("::ffff:10.0.0.7"),
            ..InetSkEntry::default()
        };
        translate_socket(&mut socket, &translation());
        assert_eq!((socket.src_addr, socket.dst_addr), (at("::ffff:10.9.0.1"), at("::ffff:10.0.0.7")));
        let mut socket = InetSkEntry {
            family: libc::AF_INET6 as u32,
            src_addr: at("fe80::1"),
            dst_addr: at("fe80::2"),
            ifname: Some("eth0".into()),
            ..InetSkEntry::default()
        };
        translate_socket(&mut socket, &translation());
        assert_eq!((socket.src_addr, socket.ifname), (at("fd09::1"), None));
    }

    #[test]
    fn clashes_are_found() {
        let words = |list: &[&str]| list.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let good =
            words(&["tcp:10.0.0.1:80", "tcp:10.0.0.2:81", "unix:/run/x", "connection:10.0.0.1:80", "tcp:0.0.0.0:1"]);
        let there = ["tcp:10.9.0.1:80", "tcp:10.9.0.1:81", "unix:/run/x", "connection:10.9.0.1:80", "tcp:0.0.0.0:1"];
        assert_eq!(translate_addresses(&good, &translation()), Ok(words(&there)));
        let bad = words(&["tcp:10.0.0.1:80", "tcp:10.0.0.2:80"]);
        assert_eq!(translate_addresses(&bad, &translation()), Err(vec![(bad[0].clone(), bad[1].clone())]));
        let many = words(&["connection:10.0.0.1:80", "connection:10.0.0.2:80"]);
        assert_eq!(translate_addresses(&many, &translation()), Ok(words(&["connection:10.9.0.1:80"])));
    }

    #[test]
    fn what_is_watched_travels() {
        let flow = Flow::new("10.0.0.1:80".parse().unwrap(), "10.0.0.7:9".parse().unwrap());
        let watched = Watched {
            flows: [flow].into(),
            listeners: [
                Listener { address: Some("10.0.0.1".parse().unwrap()), port: 80 },
                Listener { address: None, port: 81 },
            ]
            .into(),
            datagrams: Datagrams {
                flows: [Flow::new("[fe80::1]:81".parse().unwrap(), "[fe80::7]:9".parse().unwrap())].into(),
                ports: [Listener { address: None, port: 82 }].into(),
            },
        };
        let arrived = watched_from(&watched_message(&watched, &translation()));
        assert!(arrived.flows.contains(&Flow::new("10.9.0.1:80".parse().unwrap(), flow.remote)));
        assert!(arrived.listeners.contains(&Listener { address: Some("10.9.0.1".parse().unwrap()), port: 80 }));
        assert!(arrived.listeners.contains(&Listener { address: None, port: 81 }));
        let local: Vec<_> = arrived.datagrams.flows.iter().map(|flow| flow.local.to_string()).collect();
        assert_eq!(local, ["[fd09::1]:81"]);
        assert_eq!(arrived.datagrams.ports, watched.datagrams.ports);
        let nonsense = wire::Watched {
            flows: vec![wire::Flow { local: vec![1; 4], local_port: 70_000, remote: vec![1; 5], remote_port: 1 }],
            listeners: vec![wire::Listener { address: vec![1; 3], port: 1 }],
            ..wire::Watched::default()
        };
        assert!(watched_from(&nonsense).is_empty());
    }
}
