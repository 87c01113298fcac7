//! The packet filter (nf_tables, nft(8)): what the kernel lists of it is what makes it again.

use godwit_kernel::Errno;
use godwit_proto::wire::FilterObject;
use netlink_sys::Socket;

use super::Objection;
use crate::attribute::{Attributes, find, without};
use crate::error::{Error, Result};
use crate::netlink;
use crate::nftables::{self, Batch, SUBSYSTEM};

/// Bytes of `struct nfgenmsg`.
const HEADER: usize = 4;
/// Longest batch.
const LONGEST: usize = 64 << 20;

/// One kind of object: messages that make and list it, and what the list says that is not to be told back.
#[derive(Clone, Copy, Debug)]
struct Kind {
    new: u16,
    get: u16,
    left_out: &'static [u16],
}

const TABLES: Kind = Kind { new: SUBSYSTEM, get: SUBSYSTEM | 1, left_out: &[3, 4, 5, 7] };
const CHAINS: Kind = Kind { new: SUBSYSTEM | 3, get: SUBSYSTEM | 4, left_out: &[2, 6, 9] };
const RULES: Kind = Kind { new: SUBSYSTEM | 6, get: SUBSYSTEM | 7, left_out: &[3, 6, 8] };
const SETS: Kind = Kind { new: SUBSYSTEM | 9, get: SUBSYSTEM | 10, left_out: &[14, 16, 19, 20] };
const ELEMENTS: Kind = Kind { new: SUBSYSTEM | 12, get: SUBSYSTEM | 13, left_out: &[] };
const OBJECTS: Kind = Kind { new: SUBSYSTEM | 18, get: SUBSYSTEM | 19, left_out: &[5, 6, 7] };
const FLOW_TABLES: Kind = Kind { new: SUBSYSTEM | 22, get: SUBSYSTEM | 23, left_out: &[4, 5, 6] };
/// The order in which they can be made.
const ORDER: [Kind; 7] = [TABLES, CHAINS, OBJECTS, SETS, FLOW_TABLES, ELEMENTS, RULES];

const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const SET_NAME: u16 = 2;
const SET_ID: u16 = 10;
/// `NFT_TABLE_F_OWNER` and `NFT_TABLE_F_PERSIST`.
const OWNED: u32 = 2 | 4;

/// Reads everything, in the order in which it can be made.
pub(super) fn read(socket: &Socket) -> Result<Vec<FilterObject>> {
    let failed = |source| Error::call("packet filter (nf_tables)", "listing it", source);
    let mut objects = Vec::new();
    let mut sets = Vec::new();
    for kind in ORDER {
        let questions = if kind.new == ELEMENTS.new { std::mem::take(&mut sets) } else { vec![vec![0; HEADER]] };
        for question in questions {
            let told = match netlink::list(socket, kind.get, &question) {
                // A kernel without a packet filter, or without objects of this kind.
                Err(Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EINVAL) if objects.is_empty() => continue,
                outcome => outcome.map_err(failed)?,
            };
            for told in told.iter().filter(|told| told.kind == kind.new && !is_ours(&told.content)) {
                if kind.new == SETS.new {
                    sets.extend(question_for_elements(&told.content));
                }
                objects.extend(
                    settled(kind, &told.content).map(|content| FilterObject { kind: kind.new.into(), content }),
                );
            }
        }
    }
    Ok(objects)
}

/// Whether an object is in a table by which packets are held back.
fn is_ours(content: &[u8]) -> bool {
    let name = content.get(HEADER..).and_then(|attributes| find(attributes, TABLE_NAME));
    name.is_some_and(|name| name.value.starts_with(nftables::PREFIX.as_bytes()))
}

fn question_for_elements(set: &[u8]) -> Option<Vec<u8>> {
    let (header, attributes) = set.split_at_checked(HEADER)?;
    let mut question = Attributes(header.to_vec());
    question.copy(&find(attributes, TABLE_NAME)?);
    question.copy(&find(attributes, SET_NAME)?);
    Some(question.0)
}

fn settled(kind: Kind, content: &[u8]) -> Option<Vec<u8>> {
    let (header, attributes) = content.split_at_checked(HEADER)?;
    let mut settled = vec![header[0], 0, 0, 0];
    if kind.new == TABLES.new {
        let flags = find(attributes, TABLE_FLAGS)?.value.try_into().map_or(0, u32::from_be_bytes);
        settled.extend(without(attributes, &[kind.left_out, &[TABLE_FLAGS]].concat()));
        let mut rest = Attributes(settled);
        rest.number(TABLE_FLAGS, flags & !OWNED);
        return Some(rest.0);
    }
    settled.extend(without(attributes, kind.left_out));
    Some(settled)
}

/// Reads an object as one of every kind.
pub(super) fn read_as_any(content: &[u8]) -> usize {
    let kinds = ORDER.iter().filter(|kind| settled(**kind, content).is_some());
    kinds.count() + usize::from(is_ours(content)) + usize::from(question_for_elements(content).is_some())
}

/// Has a namespace that has `has` have `wanted`, all at once.
pub(super) fn follow(socket: &Socket, has: &[FilterObject], wanted: &[FilterObject]) -> Result<()> {
    if has == wanted {
        return Ok(());
    }
    let failed = |what| move |source| Error::call("packet filter of the process's network namespace", what, source);
    let mut batch = Batch::begin();
    for table in has.iter().filter(|object| object.kind == u32::from(TABLES.new)) {
        batch.remove_table(&table.content);
    }
    let mut sets = 0;
    for object in wanted {
        let Some(kind) = ORDER.iter().find(|kind| u32::from(kind.new) == object.kind) else {
            return Err(failed("making it again")(Errno::EBADMSG));
        };
        let Some(mut content) = settled(*kind, &object.content).filter(|content| !is_ours(content)) else { continue };
        if kind.new == SETS.new {
            sets += 1;
            let mut numbered = Attributes(content);
            numbered.number(SET_ID, sets);
            content = numbered.0;
        }
        batch.make(kind.new, &content);
        if batch.len() > LONGEST {
            return Err(failed("making it again")(Errno::E2BIG));
        }
    }
    netlink::transact_long(socket, batch).map_err(failed("making it again"))
}

/// Names what a filter of the older kind (iptables with its own tables) has, which cannot be read here.
pub(super) fn objections(pid: i32) -> Vec<Objection> {
    let tables = ["ip_tables_names", "ip6_tables_names", "arp_tables_names"];
    let used = |name: &&str| {
        std::fs::read_to_string(format!("/proc/{pid}/net/{name}")).is_ok_and(|names| !names.trim().is_empty())
    };
    let object = |name: &str| Objection {
        resource: format!("packet filter ({name})"),
        text: "its rules are of the older kind, which cannot be made again".to_owned(),
        remedy: "use nft or iptables-nft in the process's network namespace".to_owned(),
    };
    tables.into_iter().filter(used).map(object).collect()
}
