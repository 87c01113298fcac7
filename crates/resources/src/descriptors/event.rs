//! Counters (eventfd(2)) and readers of signals (signalfd(2)).

use super::fdinfo::FdInfo;
use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::{Errno, events};
use godwit_proto::image::{EventfdFileEntry, FdTypes, FileEntry, SignalfdEntry};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::os::fd::OwnedFd;

/// Reads a hexadecimal field that must be there.
pub(crate) fn hexadecimal(entry: &Entry, info: &FdInfo, field: &str) -> Result<u64> {
    info.value(field)
        .and_then(|value| u64::from_str_radix(value, 16).ok())
        .ok_or_else(|| Error::state(entry.name(), format!("fdinfo has no {field}")))
}

/// Gives a new descriptor the status flags of the old one.
pub(crate) fn set_status(file: &OwnedFd, flags: u32) -> Result<(), Errno> {
    let flags = OFlag::from_bits_truncate(flags as i32) & (OFlag::O_NONBLOCK | OFlag::O_APPEND | OFlag::O_DIRECT);
    if flags.is_empty() { Ok(()) } else { fcntl(file, FcntlArg::F_SETFL(flags)).map(drop) }
}

/// Collects a counter.
pub(crate) fn collect_eventfd(entry: &Entry, id: u32) -> Result<FileEntry> {
    let message = EventfdFileEntry {
        id,
        flags: entry.info.status_flags() as u32,
        counter: hexadecimal(entry, &entry.info, "eventfd-count")?,
        semaphore: Some(entry.info.value("eventfd-semaphore").is_some_and(|value| value != "0")),
        ..EventfdFileEntry::default()
    };
    Ok(FileEntry { r#type: FdTypes::Eventfd as i32, id, efd: Some(message.into()), ..FileEntry::default() })
}

/// Makes a counter again.
pub(crate) fn rebuild_eventfd(message: &EventfdFileEntry) -> Result<OwnedFd> {
    let failed = |what| move |source| Error::call("eventfd", what, source);
    let semaphore = if message.semaphore == Some(true) { libc::EFD_SEMAPHORE } else { 0 };
    let file = events::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK | semaphore).map_err(failed("eventfd"))?;
    if message.counter != 0 {
        nix::unistd::write(&file, &message.counter.to_ne_bytes()).map_err(failed("write"))?;
    }
    let flags = OFlag::from_bits_truncate(message.flags as i32) & OFlag::O_NONBLOCK;
    fcntl(&file, FcntlArg::F_SETFL(flags)).map_err(failed("F_SETFL"))?;
    Ok(file)
}

/// Collects a reader of signals.
pub(crate) fn collect_signalfd(entry: &Entry, id: u32) -> Result<FileEntry> {
    let message = SignalfdEntry {
        id,
        flags: entry.info.status_flags() as u32,
        sigmask: hexadecimal(entry, &entry.info, "sigmask")?,
        ..SignalfdEntry::default()
    };
    Ok(FileEntry { r#type: FdTypes::Signalfd as i32, id, sgfd: Some(message.into()), ..FileEntry::default() })
}

/// Makes a reader of signals again: whose signals depends on who reads.
pub(crate) fn rebuild_signalfd(message: &SignalfdEntry) -> Result<OwnedFd> {
    let failed = |source| Error::call("signalfd", "signalfd4", source);
    let file = events::signalfd(message.sigmask, libc::SFD_CLOEXEC).map_err(failed)?;
    set_status(&file, message.flags).map_err(failed)?;
    Ok(file)
}
