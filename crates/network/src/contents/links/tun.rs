//! Interfaces whose other end is a file (tun(4)). Netlink tells of them and does not make them: whoever opens /dev/net/tun does.

use std::fs::OpenOptions;
use std::os::fd::AsFd;

use godwit_kernel::tun::{
    IFF_MULTI_QUEUE, IFF_NO_PI, IFF_PERSIST, IFF_TAP, IFF_TUN, IFF_VNET_HDR, Word, attach, choose_index, tell,
};

use super::{Link, failed, here};
use crate::attribute::{Attribute, find};
use crate::contents::Objection;
use crate::error::{Error, Result};

pub(super) const KIND: &str = "tun";
/// What makes such interfaces.
const DEVICE: &str = "/dev/net/tun";

/// `IFLA_TUN_*`.
mod attribute {
    pub(super) const OWNER: u16 = 1;
    pub(super) const GROUP: u16 = 2;
    pub(super) const TYPE: u16 = 3;
    pub(super) const PI: u16 = 4;
    pub(super) const VNET_HDR: u16 = 5;
    pub(super) const PERSIST: u16 = 6;
    pub(super) const MULTI_QUEUE: u16 = 7;
    pub(super) const QUEUES: u16 = 8;
    pub(super) const SWITCHED_OFF: u16 = 9;
}

/// `IFF_LOWER_UP`: a file is attached.
const LOWER_UP: u32 = 0x1_0000;

/// What is special about such an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tun {
    flags: u16,
    owner: Option<u32>,
    group: Option<u32>,
    /// Files that are attached, as far as that is told.
    files: Option<u32>,
}

impl Tun {
    /// Reads it from what is said of an interface; `None` for any other kind, and where the kernel does not say what type it is.
    pub(super) fn of(link: &Link) -> Option<Self> {
        let byte = |kind| find(&link.data, kind).and_then(|attribute| attribute.value.first().copied());
        let number = |kind| find(&link.data, kind).as_ref().and_then(Attribute::native);
        let kind = u16::from(byte(attribute::TYPE).filter(|_| link.is(KIND))?);
        let has = |kind, flag| if byte(kind).unwrap_or(0) != 0 { flag } else { 0 };
        let no_pi = if byte(attribute::PI).unwrap_or(0) == 0 { IFF_NO_PI } else { 0 };
        let flags = kind & (IFF_TUN | IFF_TAP)
            | no_pi
            | has(attribute::VNET_HDR, IFF_VNET_HDR)
            | has(attribute::PERSIST, IFF_PERSIST)
            | has(attribute::MULTI_QUEUE, IFF_MULTI_QUEUE);
        let queues =
            number(attribute::QUEUES).map(|on| on.saturating_add(number(attribute::SWITCHED_OFF).unwrap_or(0)));
        let one = || u32::from(flags & IFF_PERSIST == 0 || link.flags & LOWER_UP != 0);
        let files = if flags & IFF_MULTI_QUEUE != 0 { queues } else { Some(one()) };
        Some(Self { flags, owner: number(attribute::OWNER), group: number(attribute::GROUP), files })
    }

    /// What keeps it from being made again; the process has so many `files` of it.
    pub(super) fn objection(&self, files: usize) -> Option<String> {
        let text = "another program has the file that is its other end, and stays behind";
        self.files.is_some_and(|all| all as usize > files).then(|| text.to_owned())
    }

    /// Makes the interface in the calling thread's namespace. It stays without a file: whoever had one gets it later.
    pub(super) fn make(&self, link: &Link) -> Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(DEVICE);
        let file = file.map_err(|error| Error::io(DEVICE, "opening it", &error))?;
        let fd = file.as_fd();
        choose_index(fd, link.index).map_err(failed(link, "choosing its number"))?;
        attach(fd, &link.name, self.flags & !IFF_PERSIST).map_err(failed(link, "making it"))?;
        let words = [(Word::Owner, self.owner), (Word::Group, self.group), (Word::Persistent, Some(1))];
        words.into_iter().try_for_each(|(word, value)| {
            value.map_or(Ok(()), |value| tell(fd, word, value)).map_err(failed(link, "saying whose it is"))
        })
    }
}

/// The flags (`IFF_TUN` and so on, without those that only files have) of the interface called `name` of the calling thread's namespace; `None` for
/// one of another kind.
///
/// # Errors
/// `ENODEV` when there is none.
pub fn tun_flags(name: &str) -> Result<Option<u16>> {
    Ok(Tun::of(&here(name)?).map(|tun| tun.flags))
}

/// Names the first of some interfaces if this host cannot make such.
pub(in crate::contents) fn cannot_be_made_here(links: &[Link]) -> Option<Objection> {
    let first = links.iter().find(|link| link.is(KIND))?;
    let error = OpenOptions::new().read(true).write(true).open(DEVICE).err()?;
    Some(Objection {
        resource: format!("interface {}", first.name),
        text: format!("the destination cannot open {DEVICE}: {error}"),
        remedy: "have the kernel's tun module there".to_owned(),
    })
}
