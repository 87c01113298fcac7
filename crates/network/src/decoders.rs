//! Everything here that reads words of others, each behind a function of bytes that changes nothing: what the fuzzer calls. Each
//! returns how much it has understood, which is what the fuzzer is guided by.

use crate::{attribute, contents, fragments, log, net_table, packet, tcp_table};
use godwit_proto::wire::NetworkNamespace;

/// Something that reads words of others.
pub type Decoder = fn(&[u8]) -> usize;

/// All of them, by name.
pub const ALL: &[(&str, Decoder)] = &[
    ("packet", packet_of_any_kind),
    ("tcp-table", |bytes| bytes.chunks(72).filter_map(tcp_table::parse).count()),
    ("packet-log", |bytes| {
        let mut packets = Vec::new();
        log::read(bytes, &mut packets);
        packets.len()
    }),
    ("attributes", |bytes| attributes(bytes, 4)),
    ("network-namespace", |bytes| {
        godwit_proto::decode::<NetworkNamespace>(bytes).map_or(0, |contents| 1 + contents::look_through(&contents))
    }),
    ("proc-net-tcp", |bytes| String::from_utf8_lossy(bytes).lines().filter_map(net_table::parse).count()),
];

fn packet_of_any_kind(bytes: &[u8]) -> usize {
    let mut whole = bytes.to_vec();
    packet::translate(&mut whole, |address| match address {
        std::net::IpAddr::V4(_) => [192, 0, 2, 1].into(),
        std::net::IpAddr::V6(_) => [0xfd; 16].into(),
    });
    usize::from(packet::read(bytes).is_some())
        + usize::from(fragments::read(bytes).is_some())
        + usize::from(packet::complete(&mut whole).is_some())
}

fn attributes(bytes: &[u8], depth: usize) -> usize {
    let nested = |attribute: attribute::Attribute<'_>| match depth {
        0 => 0,
        _ => 1 + attributes(attribute.value, depth - 1) + attribute.text().len().min(1),
    };
    attribute::read(bytes).map(nested).sum::<usize>() + attribute::without(bytes, &[1, 2]).len().min(1)
}
