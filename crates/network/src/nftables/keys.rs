//! Sets of keys, by which packets are known: who they are from and to.

use std::net::IpAddr;

const NFPROTO_IPV4: u8 = 2;
pub(super) const NFPROTO_IPV6: u8 = 10;

/// A set of keys: its name, and how a packet's key is loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Set {
    pub(super) name: &'static str,
    pub(super) id: u32,
    pub(super) protocol: Option<u8>,
    pub(super) fields: &'static [Field],
    /// The same for packets that leave.
    pub(super) reversed: &'static [Field],
}

/// Bytes of a packet's network (false) or transport header (true).
#[derive(Clone, Copy, Debug)]
pub(super) struct Field {
    pub(super) transport: bool,
    pub(super) offset: u32,
    pub(super) length: u32,
}

const fn network(offset: u32, length: u32) -> Field {
    Field { transport: false, offset, length }
}

const SOURCE_PORT: Field = Field { transport: true, offset: 0, length: 2 };
const DESTINATION_PORT: Field = Field { transport: true, offset: 2, length: 2 };
const SOURCE4: Field = network(12, 4);
const DESTINATION4: Field = network(16, 4);
const SOURCE6: Field = network(8, 16);
const DESTINATION6: Field = network(24, 16);

pub(super) const FLOWS4: Set = Set {
    name: "flows4",
    id: 1,
    protocol: Some(NFPROTO_IPV4),
    fields: &[SOURCE4, SOURCE_PORT, DESTINATION4, DESTINATION_PORT],
    reversed: &[DESTINATION4, DESTINATION_PORT, SOURCE4, SOURCE_PORT],
};
pub(super) const FLOWS6: Set = Set {
    name: "flows6",
    id: 2,
    protocol: Some(NFPROTO_IPV6),
    fields: &[SOURCE6, SOURCE_PORT, DESTINATION6, DESTINATION_PORT],
    reversed: &[DESTINATION6, DESTINATION_PORT, SOURCE6, SOURCE_PORT],
};
pub(super) const LISTENERS4: Set = Set {
    name: "listeners4",
    id: 3,
    protocol: Some(NFPROTO_IPV4),
    fields: &[DESTINATION4, DESTINATION_PORT],
    reversed: &[],
};
pub(super) const LISTENERS6: Set = Set {
    name: "listeners6",
    id: 4,
    protocol: Some(NFPROTO_IPV6),
    fields: &[DESTINATION6, DESTINATION_PORT],
    reversed: &[],
};
pub(super) const PORTS: Set = Set { name: "ports", id: 5, protocol: None, fields: &[DESTINATION_PORT], reversed: &[] };

pub(super) const ADDRESSES4: Set =
    Set { name: "addresses4", id: 6, protocol: Some(NFPROTO_IPV4), fields: &[DESTINATION4], reversed: &[] };
pub(super) const ADDRESSES6: Set =
    Set { name: "addresses6", id: 7, protocol: Some(NFPROTO_IPV6), fields: &[DESTINATION6], reversed: &[] };

pub(super) fn add_address(key: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => key.extend(address.octets()),
        IpAddr::V6(address) => key.extend(address.octets()),
    }
}

/// A port, padded to a register.
pub(super) fn add_port(key: &mut Vec<u8>, port: u16) {
    key.extend(port.to_be_bytes());
    key.extend([0; 2]);
}
