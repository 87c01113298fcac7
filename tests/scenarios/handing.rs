//! Connections that get another address on the way: a router translates a service address to that of the host that has it. And
//! connections that are handed to another program while their process stays.

#[path = "handing/alone.rs"]
mod alone;
#[path = "handing/translated.rs"]
mod translated;

use anyhow::Result;
use godwit_tests::{Host, TwoHosts};

const PORT: u16 = 6200;

/// Addresses of one family: as the source has it, as the destination does, and as clients know it.
#[derive(Clone, Copy)]
struct Family {
    source: &'static str,
    destination: &'static str,
    service: &'static str,
    /// What nft(8) calls it.
    word: &'static str,
}

const IPV4: Family = Family { source: "10.78.1.2", destination: "10.78.2.2", service: "10.78.9.9", word: "ip" };
const IPV6: Family = Family { source: "fd78:1::2", destination: "fd78:2::2", service: "fd78:9::9", word: "ip6" };

/// Has the router translate the service address to one host's. What either of them sends comes from the service address.
fn translate(hosts: &TwoHosts, family: Family, to: &str) -> Result<()> {
    let Family { source, destination, service, word } = family;
    let script = format!(
        "table {word} service
         delete table {word} service
         table {word} service {{
           chain to {{
             type filter hook prerouting priority raw
             {word} daddr {service} {word} daddr set {to}
           }}
           chain from {{
             type filter hook postrouting priority raw
             {word} saddr {{ {source}, {destination} }} tcp sport {PORT} {word} saddr set {service}
             {word} saddr {{ {source}, {destination} }} meta l4proto udp {word} saddr set {service}
           }}
         }}"
    );
    hosts.router()?.run("nft", &[&script]).map(drop)
}

/// Tables of the packet filter on a host.
fn tables(host: &Host) -> Result<String> {
    Ok(host.run("nft", &["list", "tables"])?.stdout)
}

fn is_event(name: &'static str) -> impl Fn(&serde_json::Value) -> bool {
    move |event| event.get("event").is_some_and(|event| event == name)
}

/// When the router sends packets to the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Switch {
    /// Inside the freeze: they come before their connections.
    Early,
    /// When the process has run there for a while: they still come to the source.
    Late,
}
