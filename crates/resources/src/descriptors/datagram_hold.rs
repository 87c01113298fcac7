//! Which datagrams are held back while nobody has the sockets that take them.

use super::datagram::{self, Takes};
use super::kind::integer_option;
use super::table::Entry;
use crate::Result;
use godwit_network::Datagrams;
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
    let text = |name| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    open.extend(["udp", "udp6"].iter().flat_map(|name| foreign_ports(&text(name), &inodes)));
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

/// Ports of sockets in a list (proc_pid_net(5): udp, udp6) whose inode numbers are not among `own`.
pub(super) fn foreign_ports(text: &str, own: &HashSet<u64>) -> HashSet<u16> {
    const LOCAL: usize = 1;
    const INODE: usize = 9;
    let port = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let inode: u64 = columns.get(INODE)?.parse().ok()?;
        let (_, port) = columns.get(LOCAL)?.rsplit_once(':')?;
        if own.contains(&inode) { None } else { u16::from_str_radix(port, 16).ok() }
    };
    text.lines().filter_map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_others_are_found() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref\n\
            11: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 555 2 x 0\n\
            12: 00000000:14E9 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 556 2 x 0\n";
        assert_eq!(foreign_ports(text, &[555].into()), [5353].into());
        assert!(foreign_ports("a b\nc", &HashSet::new()).is_empty());
    }
}
