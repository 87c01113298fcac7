//! What is made of a peer's words before anything is done, each behind a function of bytes that changes nothing: what the fuzzer
//! calls. Each returns how much it has understood, which is what the fuzzer is guided by.

use crate::address_space::AddressSpace;
use crate::builder;
use godwit_proto::wire::{Final, Layout};

/// Something that reads words of others.
pub type Decoder = fn(&[u8]) -> usize;

/// All of them, by name.
pub const ALL: &[(&str, Decoder)] = &[("layouts", layouts), ("page-ranges", ranges)];

/// Two layouts, the second a change of the first: how long the first is stands in two bytes before it.
fn layouts(bytes: &[u8]) -> usize {
    let Some((length, rest)) = bytes.split_first_chunk::<2>() else { return 0 };
    let (first, second) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
    let layout = |bytes| godwit_proto::decode::<Layout>(bytes).ok().and_then(|layout| layout.mm);
    let (Some(first), Some(second)) = (layout(first), layout(second)) else { return 0 };
    let vdso = builder::vdso_address(&second.vmas).is_some();
    let calls = AddressSpace::calls_between(&first.vmas, &second.vmas);
    1 + usize::from(vdso) + calls.map_or(0, |calls| 1 + calls)
}

fn ranges(bytes: &[u8]) -> usize {
    let Ok(state) = godwit_proto::decode::<Final>(bytes) else { return 0 };
    let lists = [&state.huge, &state.guards].into_iter().chain(state.missing.iter().map(|part| &part.ranges));
    lists.filter_map(|list| builder::ranges(list).ok()).map(|set| 1 + set.pages() as usize % 7).sum()
}
