//! A page server that can have no more descriptors. N.B. alone in its program: the limit is the whole program's.

use godwit_proto::image::InetSkEntry;
use godwit_proto::wire::{ExpectedConnection, OptionSet, Streams};
use godwit_resources::descriptors::Ahead;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::fs::File;

/// Descriptors that may be open, a few more than there are.
const LIMIT: u64 = 40;

#[test]
fn sockets_that_are_only_expected_give_way() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, LIMIT, most).unwrap();
    let inet = InetSkEntry {
        family: libc::AF_INET as u32,
        r#type: libc::SOCK_STREAM as u32,
        proto: libc::IPPROTO_TCP as u32,
        state: 7,
        src_addr: vec![0],
        ..InetSkEntry::default()
    };
    let one = ExpectedConnection { socket: Some(inet.clone()), option_set: 0 };
    let mut ahead = Ahead::default();
    let expected = vec![one; LIMIT as usize];
    ahead.add(Streams { expected, option_sets: vec![OptionSet::default()], ..Streams::default() }).unwrap();
    let mut others: Vec<File> = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        others.push(file);
    }
    assert!(others.len() > 20, "only {} descriptors were left to others", others.len());

    // What is needed is another matter.
    let needed = || Streams { sockets: vec![inet.clone()], ..Streams::default() };
    let refused = ahead.add(needed()).unwrap_err().to_string();
    assert!(refused.contains("EMFILE"), "{refused}");
    others.clear();
    ahead.add(needed()).unwrap();
    assert!(!ahead.is_empty());
}
