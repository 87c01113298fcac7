//! Packet filters as strict as hosts have them.

use anyhow::Result;

use crate::Host;

/// Only what belongs to known connections comes in or goes out, and new ones to a server's port, and moves; and what `more` lets out. What
/// a connection was like before is not guessed from its packets.
///
/// # Errors
/// The filter cannot be set up.
pub fn stand_strict_guard(host: &Host, port: u16, more: &str) -> Result<()> {
    let rules = format!(
        "table inet guard {{
            chain in {{
                type filter hook input priority filter; policy drop;
                ct state invalid drop
                ct state established,related accept
                iif lo accept
                meta l4proto {{ icmp, ipv6-icmp }} accept
                tcp dport {port} ct state new accept
                udp dport 7477-7489 accept
            }}
            chain out {{
                type filter hook output priority filter; policy drop;
                ct state invalid drop
                ct state established,related accept
                oif lo accept
                meta l4proto {{ icmp, ipv6-icmp }} accept
                udp dport 7477-7489 accept
                {more}
            }}
        }}"
    );
    host.run("nft", &[&rules])?;
    host.run("sysctl", &["-q", "-w", "net.netfilter.nf_conntrack_tcp_loose=0"]).map(drop)
}
