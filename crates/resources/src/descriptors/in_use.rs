//! Who has an address that a process is to have: for words to people, so what cannot be found out is left unsaid.

use super::outside::holders;
use super::requirements::bound_path;
use std::collections::BTreeSet;

const LOCAL: usize = 1;
const STATE: usize = 3;
const INODE: usize = 9;
/// As in tcp_states.h.
const LISTEN: &str = "0A";

/// Names who has a port, in `tables` of this network namespace (below /proc/PID/net, proc_pid_net(5)): ` by process 4711, nginx`; nothing
/// where nobody is found.
pub(super) fn by_port(tables: &[&str], port: u16) -> String {
    let found: Vec<Socket> = tables.iter().flat_map(|name| sockets_at(&table(name), port)).collect();
    // Who listens is in the way, rather than a connection of its.
    let listens = found.iter().any(|socket| socket.listens);
    let inodes =
        found.iter().filter(|socket| socket.listens == listens && socket.inode != 0).map(|socket| socket.inode);
    let text = by(inodes);
    let is_closed = !found.is_empty() && found.iter().all(|socket| socket.inode == 0);
    if is_closed { ", by connections that have been closed and are kept for a minute".to_owned() } else { text }
}

/// As [`by_port`], of a UNIX socket's name, `@` first if it is abstract.
pub(super) fn by_name(name: &str) -> String {
    let inode = |line: &str| line.split_whitespace().nth(6)?.parse().ok();
    by(table("unix").lines().filter(|line| bound_path(line) == Some(name)).filter_map(inode))
}

fn table(name: &str) -> String {
    let text = std::fs::read(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    String::from_utf8_lossy(&text).into_owned()
}

#[derive(Debug, PartialEq, Eq)]
struct Socket {
    listens: bool,
    /// 0: no program has it any more.
    inode: u64,
}

/// Sockets of a table that have a port.
fn sockets_at(text: &str, port: u16) -> Vec<Socket> {
    let socket = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let (_, local) = columns.get(LOCAL)?.rsplit_once(':')?;
        let inode = columns.get(INODE)?.parse().ok()?;
        (u16::from_str_radix(local, 16) == Ok(port)).then(|| Socket { listens: columns[STATE] == LISTEN, inode })
    };
    text.lines().filter_map(socket).collect()
}

fn by(inodes: impl Iterator<Item = u64>) -> String {
    let links: BTreeSet<Vec<u8>> = inodes.map(|inode| format!("socket:[{inode}]").into_bytes()).collect();
    let found = holders(&[], None, &links);
    let first = found.values().min_by_key(|holder| holder.pid);
    first.map_or_else(String::new, |holder| format!(" by process {}, {}", holder.pid, holder.comm))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_a_port_are_found() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref\n\
            0: 0100007F:1F90 0100007F:0035 01 00000000:00000000 00:00000000 00000000     0        0 555 2 x 0\n\
            1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 556 2 x 0\n\
            2: 0100007F:1F90 0100007F:0036 06 00000000:00000000 00:00000000 00000000     0        0 0 2 x 0\n\
            3: 0100007F:0035 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 557 2 x 0\n";
        let socket = |listens, inode| Socket { listens, inode };
        assert_eq!(sockets_at(text, 8080), [socket(false, 555), socket(true, 556), socket(false, 0)]);
        assert_eq!(sockets_at("a b:1F90\n:1F90 :1F90\n", 8080), []);
    }

    #[test]
    fn who_has_an_address_is_named() {
        let own = format!(" by process {}, ", std::process::id());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(by_port(&["tcp", "tcp6"], port).starts_with(&own));
        drop(listener);
        assert_eq!(by_port(&["tcp", "tcp6"], port), "");
        let name = format!("@godwit-in-use-{}", std::process::id());
        use std::os::linux::net::SocketAddrExt;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name[1..]).unwrap();
        let _socket = std::os::unix::net::UnixDatagram::bind_addr(&address).unwrap();
        assert!(by_name(&name).starts_with(&own));
        assert_eq!(by_name("@no such name"), "");
    }
}
