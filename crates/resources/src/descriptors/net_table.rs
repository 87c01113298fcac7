//! What the tables of sockets below /proc/PID/net say that are alike: tcp, udp and udplite, and those of IPv6 (proc_pid_net(5)).

use std::net::{IpAddr, SocketAddr};

/// A socket as a line of such a table has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    /// As in tcp_states.h.
    pub(super) state: u8,
    /// 0: no program has it any more.
    pub(super) inode: u64,
}

/// The sockets of some tables, of the network namespace of a process (or `thread-self`). A table that is not there has none.
pub(super) fn read<'a>(process: &'a str, tables: &'a [&str]) -> impl Iterator<Item = Line> + 'a {
    tables.iter().flat_map(move |table| {
        let text = std::fs::read_to_string(format!("/proc/{process}/net/{table}")).unwrap_or_default();
        text.lines().filter_map(parse).collect::<Vec<_>>()
    })
}

/// Reads a line; `None` for the first one, which names the columns.
pub(super) fn parse(line: &str) -> Option<Line> {
    let columns: Vec<&str> = line.split_whitespace().collect();
    let &[_, local, remote, state, _, _, _, _, _, inode, ..] = columns.as_slice() else { return None };
    let state = u8::from_str_radix(state, 16).ok()?;
    Some(Line { local: address(local)?, remote: address(remote)?, state, inode: inode.parse().ok()? })
}

fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let octets: Vec<u8> = (0..address.len() / 8).map(|index| word(index * 8)).collect::<Option<Vec<_>>>()?.concat();
    let address = match octets.len() {
        4 => IpAddr::V4(<[u8; 4]>::try_from(octets).ok()?.into()),
        _ => IpAddr::V6(<[u8; 16]>::try_from(octets).ok()?.into()),
    };
    Some(SocketAddr::new(address, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_found() {
        let title =
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref";
        assert_eq!(parse(title), None);
        let line = "  11: 0100007F:9C40 0A00000A:0050 02 00000000:00000001 01:00000064 00000000     0        0 34567 2 0 200 0 0 10 -1";
        let [local, remote] = ["127.0.0.1:40000", "10.0.0.10:80"].map(|text| text.parse().unwrap());
        assert_eq!(parse(line), Some(Line { local, remote, state: 2, inode: 34567 }));
        let line =
            "1: 00000000000000000000000001000000:0001 000000FD000000000000000001000000:1F90 0A 0:0 0:0 0 0 0 7 1";
        assert_eq!(parse(line).unwrap().remote, "[fd00::1]:8080".parse().unwrap());
        for nonsense in ["1: x y", "a b:1F90", &line.replace("0A ", "GG "), &line.replace("000000FD", "")] {
            assert_eq!(parse(nonsense), None, "{nonsense}");
        }
    }
}
