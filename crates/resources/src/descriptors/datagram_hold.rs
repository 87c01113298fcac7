//! Which datagrams are held back while nobody has the sockets that take them.

use super::datagram::{self, Takes};
use super::kind::integer_option;
use super::table::Entry;
use crate::Result;
use godwit_network::{Datagrams, net_table};
use std::collections::HashSet;

/// The datagrams that UDP sockets among `entries` take, apart from those that others on this host take, too: these must not
/// miss theirs.
pub(crate) fn of(entries: &[&Entry]) -> Result<Datagrams> {
    let mut found = Vec::new();
    let mut inodes = HashSet::new();
    let mut open = HashSet::new();
    for entry in entries.iter().filter(|entry| entry.link.starts_with(b"socket:[")) {
        let option = |name| integer_option(entry, libc::SOL_SOCKET, name);
        let (family, kind, protocol) = (option(libc::SO_DOMAIN)?, option(libc::SO_TYPE)?, option(libc::SO_PROTOCOL)?);
        if protocol != libc::IPPROTO_UDP || !datagram::is_one(family, kind, protocol) {
            continue;
        }
        inodes.insert(entry.stat.st_ino);
        let Some(takes) = datagram::examine(entry, family, kind, protocol)?.takes() else { continue };
        if datagram::joins_segments(entry) {
            open.insert(port(takes));
        }
        found.push(takes);
    }
    let mut datagrams = Datagrams::default();
    if found.is_empty() {
        return Ok(datagrams);
    }
    let all = net_table::read("thread-self", &["udp", "udp6"]);
    open.extend(all.filter(|line| !inodes.contains(&line.inode)).map(|line| line.local.port()));
    for takes in found.into_iter().filter(|takes| !open.contains(&port(*takes))) {
        match takes {
            Takes::Flow(flow) => drop(datagrams.flows.insert(flow)),
            Takes::Port(port) => drop(datagrams.ports.insert(port)),
        }
    }
    Ok(datagrams)
}

fn port(takes: Takes) -> u16 {
    match takes {
        Takes::Flow(flow) => flow.local.port(),
        Takes::Port(listener) => listener.port,
    }
}
