//! Whose sockets are in the way: for words to people, so what cannot be found out is left unsaid.

use super::outside::holders;
use super::requirements::bound_path;
use super::unix_socket::LISTEN;
use godwit_network::{Flow, net_table};
use std::collections::{BTreeSet, HashMap};

/// Names who has a port, in `tables` of this network namespace: ` by process 4711, nginx`; nothing where nobody is found.
pub(super) fn by_port(tables: &[&str], port: u16) -> String {
    let found: Vec<_> = net_table::read("thread-self", tables).filter(|line| line.local.port() == port).collect();
    // Who listens is in the way, rather than a connection of its.
    let listens = found.iter().any(|line| line.state == LISTEN);
    let of_interest = found.iter().filter(|line| (line.state == LISTEN) == listens);
    let inodes: BTreeSet<u64> = of_interest.map(|line| line.inode).collect();
    if !found.is_empty() && inodes.iter().all(|&inode| inode == 0) {
        return ", by connections that have been closed and are kept for a minute".to_owned();
    }
    by(inodes)
}

/// As [`by_port`], of a UNIX socket's name, `@` first if it is abstract.
pub(super) fn by_name(name: &str) -> String {
    const INODE: usize = 6;
    let text = std::fs::read("/proc/thread-self/net/unix").unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let inode = |line: &str| line.split_whitespace().nth(INODE)?.parse().ok();
    by(text.lines().filter(|line| bound_path(line) == Some(name)).filter_map(inode).collect())
}

fn by(inodes: BTreeSet<u64>) -> String {
    let names = names(inodes);
    names.into_values().min().map_or_else(String::new, |(pid, comm)| format!(" by process {pid}, {comm}"))
}

/// A process that has a socket, by the socket's inode.
fn names(inodes: BTreeSet<u64>) -> HashMap<u64, (i32, String)> {
    let link = |inode: u64| format!("socket:[{inode}]").into_bytes();
    let links: BTreeSet<Vec<u8>> = inodes.iter().map(|&inode| link(inode)).collect();
    let found = holders(&[], None, &links);
    let name = |inode| found.get(&link(inode)).map(|holder| (inode, (holder.pid, holder.comm.clone())));
    inodes.into_iter().filter_map(name).collect()
}

/// Names who has the other ends of TCP connections of a process, where they are in the same network namespace: `process 4711, redis-server`.
#[must_use]
pub fn other_ends(pid: i32, flows: &[Flow]) -> HashMap<Flow, String> {
    let process = pid.to_string();
    let wanted: HashMap<Flow, Flow> = flows.iter().map(|flow| (Flow::new(flow.remote, flow.local), *flow)).collect();
    let end = |line: net_table::Line| Some((line.inode, *wanted.get(&Flow::new(line.local, line.remote))?));
    let found: HashMap<u64, Flow> = net_table::read(&process, &["tcp", "tcp6"]).filter_map(end).collect();
    let names = names(found.keys().copied().collect());
    names.into_iter().map(|(inode, (pid, comm))| (found[&inode], format!("process {pid}, {comm}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn who_has_an_address_is_named() {
        let own = format!(" by process {}, ", std::process::id());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(by_port(&["tcp", "tcp6"], port).starts_with(&own));
        drop(listener);
        assert_eq!(by_port(&["tcp", "tcp6"], port), "");
        let name = format!("@godwit-whose-{}", std::process::id());
        use std::os::linux::net::SocketAddrExt;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name[1..]).unwrap();
        let _socket = std::os::unix::net::UnixDatagram::bind_addr(&address).unwrap();
        assert!(by_name(&name).starts_with(&own));
        assert_eq!(by_name("@no such name"), "");
    }

    #[test]
    fn connections_that_were_closed_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        // Who closes first keeps its end.
        drop(listener.accept().unwrap());
        drop((client, listener));
        assert!(by_port(&["tcp"], address.port()).contains("have been closed"));
    }

    #[test]
    fn other_ends_are_named() {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let flow = Flow::new(client.local_addr().unwrap(), client.peer_addr().unwrap());
        let (accepted, _) = listener.accept().unwrap();
        let own = std::process::id();
        let named = other_ends(own as i32, &[flow]);
        assert!(named[&flow].starts_with(&format!("process {own}, ")), "{named:?}");
        drop(accepted);
        assert_eq!(other_ends(own as i32, &[Flow::new(flow.local, "192.0.2.1:9".parse().unwrap())]).len(), 0);
    }
}
