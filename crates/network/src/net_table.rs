//! What the tables of sockets below /proc/PID/net say that are alike: tcp, udp and udplite, and those of IPv6 (proc_pid_net(5)).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// `USER_HZ`: what the kernel counts times by that it tells.
const TICKS_PER_SECOND: u64 = 100;

/// Those of TCP.
pub const TCP: [&str; 2] = ["tcp", "tcp6"];

/// A socket as a line of such a table has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its own address, as it says.
    pub local: SocketAddr,
    /// The other end's.
    pub remote: SocketAddr,
    /// As in tcp_states.h.
    pub state: u8,
    /// Until its timer expires.
    pub expires_in: Duration,
    /// How often it has sent something again.
    pub repetitions: u32,
    /// 0: no program has it any more, or not yet.
    pub inode: u64,
}

/// The sockets of some tables, of the network namespace of a process (or `thread-self`). A table that is not there has none.
pub fn read<'a>(process: &'a str, tables: &'a [&str]) -> impl Iterator<Item = Line> + 'a {
    tables.iter().flat_map(move |table| {
        let text = std::fs::read_to_string(format!("/proc/{process}/net/{table}")).unwrap_or_default();
        text.lines().filter_map(parse).collect::<Vec<_>>()
    })
}

/// Reads a line; `None` for the first one, which names the columns.
pub(crate) fn parse(line: &str) -> Option<Line> {
    let columns: Vec<&str> = line.split_whitespace().collect();
    let &[_, local, remote, state, _, timer, repetitions, _, _, inode, ..] = columns.as_slice() else { return None };
    let (_, ticks) = timer.split_once(':')?;
    let ticks = u64::from_str_radix(ticks, 16).ok()?;
    Some(Line {
        local: address(local)?,
        remote: address(remote)?,
        state: u8::from_str_radix(state, 16).ok()?,
        expires_in: Duration::from_millis(ticks.saturating_mul(1000 / TICKS_PER_SECOND)),
        repetitions: u32::from_str_radix(repetitions, 16).ok()?,
        inode: inode.parse().ok()?,
    })
}

/// Reads an address, words of the host's order, and a port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    let address = match address.len() {
        8 => IpAddr::from(word(0)?),
        32 => IpAddr::from(<[u8; 16]>::try_from([word(0)?, word(1)?, word(2)?, word(3)?].concat()).ok()?),
        _ => return None,
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
        let line = "  11: 0100007F:9C40 0A00000A:0050 02 00000000:00000001 01:00000064 00000002     0        0 34567 2 0 200 0 0 10 -1";
        let [local, remote] = ["127.0.0.1:40000", "10.0.0.10:80"].map(|text| text.parse().unwrap());
        let expires_in = Duration::from_secs(1);
        assert_eq!(parse(line), Some(Line { local, remote, state: 2, expires_in, repetitions: 2, inode: 34567 }));
        let line =
            "1: 00000000000000000000000001000000:0001 000000FD000000000000000001000000:1F90 0A 0:0 0:0 0 0 0 7 1";
        assert_eq!(parse(line).unwrap().remote, "[fd00::1]:8080".parse().unwrap());
        for nonsense in ["", "1: x y", "a b:1F90", &line.replace("0A ", "GG "), &line.replace("000000FD", "")] {
            assert_eq!(parse(nonsense), None, "{nonsense}");
        }
        for nonsense in ["1: 00:1 00:1 03 0:0 0:0 0 0 0 7", "1: 0100007F:1 0100007F:1 03 0:0 0 0 0 0 7"] {
            assert_eq!(parse(nonsense), None, "{nonsense}");
        }
    }
}
