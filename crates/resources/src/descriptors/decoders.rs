//! What reads words of others about descriptors: see [`crate::decoders`].

use super::{
    Externals, datagram_queue, direct, epoll, fdinfo::FdInfo, inotify, multicast, rebuild, requirements, sock_diag,
    translated, unix_diag,
};
use godwit_kernel::socket::Received;
use godwit_proto::image::InetSkEntry;
use godwit_proto::wire::{Final, Prepare};

/// /proc/PID/fdinfo/FD, whatever kind of descriptor it is about.
pub(crate) fn descriptor(text: &str) -> usize {
    let Ok(info) = FdInfo::parse(text.to_owned()) else { return 0 };
    let epolls = info.values("tfd").filter_map(epoll::parse).count();
    let watches = info.lines("inotify ").filter_map(inotify::parse).count();
    1 + epolls + watches + usize::from(info.status_flags() != 0)
}

/// /proc/PID/mountinfo.
pub(crate) fn mounts(text: &str) -> usize {
    let points = text.lines().filter_map(|line| line.split(' ').nth(4)).map(inotify::unescape);
    direct::direct_mounts(text).len() + points.count()
}

/// Tables below /proc/PID/net.
pub(crate) fn tables(text: &str) -> usize {
    multicast::parse_four(text).len()
        + multicast::parse_six(text).len()
        + text.lines().filter_map(requirements::bound_path).count()
}

/// Answers of sock_diag(7).
pub(crate) fn diagnosis(bytes: &[u8]) -> usize {
    let mut listed = Vec::new();
    let lengths = [4, 56, 72];
    let complete = lengths.iter().filter(|&&length| sock_diag::read(bytes, length, &mut listed).is_ok()).count();
    complete + listed.len() + usize::from(unix_diag::read_answer(bytes).is_ok())
}

/// A received datagram's sender, control messages and content: the first two bytes are the lengths of the former.
pub(crate) fn datagram(bytes: &[u8]) -> usize {
    let Some((&[name, control], rest)) = bytes.split_first_chunk::<2>() else { return 0 };
    let (name, rest) = rest.split_at(usize::from(name).min(rest.len()));
    let (control, content) = rest.split_at(usize::from(control).min(rest.len()));
    let mut received = Received { length: content.len(), name: name.to_vec(), ..Received::default() };
    for message in control.chunks(24) {
        let kinds = [(0, 8), (41, 50), (0, 2), (41, 52), (0, 1), (41, 67), (17, 104)];
        let kind = message.first().map_or(0, |first| usize::from(*first) % kinds.len());
        let (level, kind) = kinds[kind];
        received.control.push((level, kind, message.to_vec()));
    }
    let described = datagram_queue::header(&received).is_some();
    datagram_queue::segments(content, &received).len() + usize::from(described)
}

/// What a descriptor is to become, in the words of the command line.
pub(crate) fn externals(text: &str) -> usize {
    let choices: Vec<String> = text.lines().map(str::to_owned).collect();
    usize::from(Externals::parse(&choices).is_ok()) + translated::used_addresses(&choices, &Default::default()).len()
}

/// Everything about descriptors in a state message that is looked at before anything is made.
pub(crate) fn state(state: &Final) -> usize {
    let sockets = state.files.iter().filter_map(|file| file.isk.as_deref());
    let watched = super::watched_of(sockets.collect::<Vec<&InetSkEntry>>());
    rebuild::check(&state.descriptors).unwrap_or(0) + watched.flows.len() + watched.listeners.len()
}

/// The same of the message by which the stub is made.
pub(crate) fn order(prepare: &Prepare) -> usize {
    let watched = super::watched_from(&prepare.watched.clone().unwrap_or_default());
    watched.flows.len() + watched.listeners.len()
}
