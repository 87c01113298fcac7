//! Epoll instances. A watch remembers the number that its file had when it was added; the number may lead elsewhere since, or
//! nowhere. Which file it is kcmp(2) tells, and the stub adds each watch under its old number.

use super::event::set_status;
use super::kind::refuse;
use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::{Errno, process};
use godwit_proto::image::{EventpollFileEntry, EventpollTfdEntry, FdTypes, FileEntry};
use godwit_tracee::Batch;
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;

/// What is known of the process's descriptors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known<'a> {
    /// Each number's file.
    pub(crate) ids: &'a BTreeMap<i32, u32>,
    /// The numbers that lead to each inode.
    pub(crate) inodes: &'a HashMap<u64, Vec<i32>>,
    /// One number of each socket's inode.
    pub(crate) sockets: &'a BTreeMap<u32, i32>,
}

/// Collects an instance.
pub(crate) fn collect(pid: i32, entry: &Entry, id: u32, known: Known<'_>) -> Result<FileEntry> {
    let mut seen: HashMap<u32, u32> = HashMap::new();
    let mut watches = Vec::new();
    for line in entry.info.values("tfd") {
        let mut watch = parse(line.trim_start())
            .ok_or_else(|| Error::state(entry.name(), format!("cannot make sense of {line:?}")))?;
        let which = seen.entry(watch.tfd).or_default();
        let fd = watched(pid, entry, &watch, *which, known)?;
        *which += 1;
        watch.id = id;
        watch.file_id = known.ids.get(&fd).copied();
        watches.push(watch);
    }
    let flags = entry.info.status_flags() as u32;
    let message = EventpollFileEntry { id, flags, tfd: watches, ..EventpollFileEntry::default() };
    Ok(FileEntry { r#type: FdTypes::Eventpoll as i32, id, epfd: Some(message.into()), ..FileEntry::default() })
}

/// Finds a number of the process that leads to the watched file.
fn watched(pid: i32, entry: &Entry, watch: &EventpollTfdEntry, which: u32, known: Known<'_>) -> Result<i32> {
    let Known { ids, inodes, sockets } = known;
    let inode = watch.inode.unwrap_or_default();
    // A socket is one file. kcmp(2) would go through all watches for each of them.
    if let Some(&[only]) = inodes.get(&inode).map(Vec::as_slice)
        && sockets.get(&(inode as u32)) == Some(&only)
    {
        return Ok(only);
    }
    let is = |fd: i32| match process::epoll_watches(pid, fd, entry.fd, watch.tfd, which) {
        Err(Errno::EBADF | Errno::ENOENT) => Ok(false),
        other => other.map_err(entry.error("kcmp")),
    };
    let own = watch.tfd as i32;
    if ids.contains_key(&own) && is(own)? {
        return Ok(own);
    }
    for &fd in watch.inode.and_then(|inode| inodes.get(&inode)).into_iter().flatten() {
        if is(fd)? {
            return Ok(fd);
        }
    }
    refuse(entry, "epoll", &format!("it watches a file, once fd {own}, that the process has no descriptor of any more"))
}

/// Parses `5 events: 19 data: 45 pos:0 ino:61 sdev:9`, what follows `tfd:`.
pub(super) fn parse(line: &str) -> Option<EventpollTfdEntry> {
    let (tfd, rest) = line.split_once(char::is_whitespace)?;
    let mut watch = EventpollTfdEntry { tfd: tfd.trim().parse().ok()?, ..EventpollTfdEntry::default() };
    let (mut events, mut data) = (None, None);
    let mut words = rest.split_whitespace();
    while let Some(word) = words.next() {
        let (key, value) = word.split_once(':')?;
        let value = if value.is_empty() { words.next()? } else { value };
        let hexadecimal = || u64::from_str_radix(value, 16).ok();
        match key {
            "events" => events = hexadecimal(),
            "data" => data = hexadecimal(),
            "pos" => watch.pos = value.parse::<i64>().ok().map(|pos| pos as u64),
            "ino" => watch.inode = hexadecimal(),
            "sdev" => watch.dev = hexadecimal().and_then(|dev| u32::try_from(dev).ok()),
            _ => (),
        }
    }
    (watch.events, watch.data) = (u32::try_from(events?).ok()?, data?);
    Some(watch)
}

/// Makes an instance that watches nothing yet.
pub(crate) fn rebuild(message: &EventpollFileEntry) -> Result<OwnedFd> {
    let failed = |source| Error::call("epoll", "epoll_create1", source);
    let instance = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?.0;
    set_status(&instance, message.flags).map_err(failed)?;
    Ok(instance)
}

/// Adds the calls by which the stub watches what `epoll`, its descriptor, watched. `numbers` maps each file to a number that it
/// has in the stub; `occupied` are the numbers in use, `spare` is one that is not.
pub(crate) fn watch_all(
    batch: &mut Batch,
    epoll: i32,
    message: &EventpollFileEntry,
    numbers: &HashMap<u32, Vec<i32>>,
    occupied: &BTreeMap<i32, u64>,
    spare: i32,
) -> Result<()> {
    for watch in &message.tfd {
        let missing = || Error::state(format!("fd {epoll} (epoll)"), format!("no file for watch {}", watch.tfd));
        let tfd = i32::try_from(watch.tfd).map_err(|_| missing())?;
        let of_file = watch.file_id.map(|id| numbers.get(&id).ok_or_else(missing)).transpose()?;
        let mut bytes = watch.events.to_le_bytes().to_vec();
        bytes.extend(watch.data.to_le_bytes());
        let event = batch.data(&bytes);
        let what = format!("watching fd {tfd} in epoll fd {epoll}");
        let add = |batch: &mut Batch, instance: i32| {
            let arguments = [instance.into(), libc::EPOLL_CTL_ADD.into(), tfd.into(), event.into()];
            batch.call(what, libc::SYS_epoll_ctl, &arguments);
        };
        let now_has_it = of_file.is_none_or(|numbers| numbers.contains(&tfd));
        match (now_has_it, of_file.and_then(|numbers| numbers.first())) {
            (true, _) | (false, None) => add(batch, epoll),
            (false, Some(&elsewhere)) => {
                lend_number(batch, elsewhere, tfd, epoll, occupied, spare, add);
            }
        }
    }
    Ok(())
}

/// Gives the file at number `from` the number `tfd` for the length of one call.
fn lend_number(
    batch: &mut Batch,
    from: i32,
    tfd: i32,
    epoll: i32,
    occupied: &BTreeMap<i32, u64>,
    spare: i32,
    add: impl FnOnce(&mut Batch, i32),
) {
    let dup3 = |batch: &mut Batch, old: i32, new: i32, flags: u64| {
        batch.call("lending a descriptor number", libc::SYS_dup3, &[old.into(), new.into(), flags.into()]);
    };
    let close = |batch: &mut Batch, fd: i32| {
        batch.call("closing a lent number", libc::SYS_close, &[fd.into()]);
    };
    let aside = occupied.get(&tfd);
    if aside.is_some() {
        dup3(batch, tfd, spare, libc::O_CLOEXEC as u64);
    }
    dup3(batch, from, tfd, libc::O_CLOEXEC as u64);
    // The instance itself may be what stands at that number.
    add(batch, if epoll == tfd { spare } else { epoll });
    match aside {
        Some(&flags) => {
            dup3(batch, spare, tfd, flags);
            close(batch, spare);
        }
        None => close(batch, tfd),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_parsed() {
        let watch = parse("5 events: 80000019 data:     deadbeefcafe  pos:0 ino:61 sdev:9").unwrap();
        assert_eq!((watch.tfd, watch.events, watch.data), (5, 0x8000_0019, 0xdead_beef_cafe));
        assert_eq!((watch.inode, watch.dev), (Some(0x61), Some(9)));
        for wrong in ["", "5", "5 events:", "x events: 1 data: 2", "5 events: 1", "5 events: zz data: 1"] {
            assert!(parse(wrong).is_none(), "{wrong}");
        }
    }
}
