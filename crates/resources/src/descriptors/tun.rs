//! Files of /dev/net/tun (tun(4)), the other ends of interfaces.
//!
//! In a network namespace of the process's own the interface is made again with the namespace (`godwit_network::contents`), and
//! stays there without a file until this one is attached to it. Elsewhere the destination must have one of the same name. Nobody
//! can read the filter of a tap interface, its steering program (`TUNSETSTEERINGEBPF`), or the list of `TUNSETTXFILTER`.

use super::kind::{refuse, refuse_with};
use super::table::{Directory, Entry};
use crate::{Error, Obstacle, Result};
use godwit_kernel::Errno;
use godwit_kernel::process::{Compared, compare};
use godwit_kernel::tun::{
    self, Attached, IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_PERSIST, IFF_TAP, Number, Word,
};
use godwit_network::Namespace;
use godwit_network::contents::tun_flags;
use godwit_proto::image::{FdTypes, FileEntry, TunfileEntry};
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::stat::{Mode, major, minor};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The device number of /dev/net/tun.
const DEVICE: (u64, u64) = (10, 200);

/// Whether a device is /dev/net/tun.
pub(crate) fn is_one(device: u64) -> bool {
    (major(device), minor(device)) == DEVICE
}

/// Reads what a file is attached to.
pub(crate) fn examine(entry: &Entry) -> Result<Option<Attached>> {
    tun::attached(entry.file.as_fd()).map_err(entry.error("TUNGETIFF"))
}

fn name(attached: &Attached) -> String {
    format!("{} interface {}", kind(attached.flags), attached.name)
}

fn kind(flags: u16) -> &'static str {
    if flags & IFF_TAP != 0 { "tap" } else { "tun" }
}

/// Refuses what cannot be moved. `place` is the process's network namespace.
pub(crate) fn verdict(entry: &Entry, attached: Option<&Attached>, place: &Namespace, is_stopped: bool) -> Result<()> {
    let Some(attached) = attached else { return Ok(()) };
    let what = name(attached);
    if place.inside(|| tun_flags(&attached.name))??.is_none() {
        return refuse(entry, &what, "this kernel does not say what it is like");
    }
    if tun::filter_length(entry.file.as_fd()).is_ok_and(|length| length > 0) {
        return refuse(entry, &what, "a filter is attached to it (TUNATTACHFILTER), and cannot be read");
    }
    match tun::network_namespace(entry.file.as_fd()) {
        Ok(other) if !place.is_behind(other.as_fd()) => {
            return refuse(entry, &what, "it is in another network namespace than the process");
        }
        // Before Linux 5.2 nobody can tell.
        Ok(_) | Err(Errno::EINVAL) => {}
        Err(source) => return Err(entry.error("TUNGETDEVNETNS")(source)),
    }
    // N.B. it takes long, so only before the freeze.
    if !is_stopped && let Some((pid, comm)) = other_holder(entry) {
        let text = format!("process {pid}, {comm}, has it open, too, and stays behind");
        return refuse_with(entry, &what, &text, "have it closed there".to_owned());
    }
    Ok(())
}

/// Another process that has the same open file.
fn other_holder(entry: &Entry) -> Option<(i32, String)> {
    let processes = std::fs::read_dir("/proc").ok()?;
    let own = std::process::id() as i32;
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let holder = pids.filter(|pid| ![own, entry.pid].contains(pid)).find(|&pid| {
        let Ok(directory) = Directory::open(pid) else { return false };
        let numbers = directory.numbers().unwrap_or_default();
        let same_path = |fd: &i32| directory.link(*fd).is_ok_and(|link| link.as_deref() == Some(entry.link.as_slice()));
        let is_same =
            |fd: i32| compare(entry.pid, pid, Compared::File(entry.fd, fd)).is_ok_and(std::cmp::Ordering::is_eq);
        numbers.into_iter().filter(same_path).any(is_same)
    })?;
    let comm = std::fs::read_to_string(format!("/proc/{holder}/comm")).unwrap_or_default();
    Some((holder, comm.trim().to_owned()))
}

/// How the destination is told which interface it must have, where the namespace does not move along: `tun:tun0:tap`.
pub(crate) fn needs(attached: &Attached) -> String {
    let several = if attached.flags & IFF_MULTI_QUEUE != 0 { "+queues" } else { "" };
    format!("tun:{}:{}{several}", attached.name, kind(attached.flags))
}

/// Says what is wrong at the destination with an interface that [`needs`] has named.
pub(crate) fn check(need: &str) -> Option<Obstacle> {
    let Some((name, kind)) = need.rsplit_once(':') else {
        return Some(Obstacle::new(need, "cannot be understood", ""));
    };
    let (kind, several) = kind.split_once('+').map_or((kind, ""), |(kind, _)| (kind, " multi_queue"));
    let resource = format!("{kind} interface {name}");
    let remedy = format!(
        "make it there, with its addresses and routes: ip tuntap add dev {name} mode {kind}{several}; or give the process a network \
         namespace of its own"
    );
    let fits = |flags: u16| self::kind(flags) == kind && (flags & IFF_MULTI_QUEUE != 0) != several.is_empty();
    let text = match tun_flags(name) {
        Ok(Some(flags)) if fits(flags) => return None,
        Ok(_) => "the interface of this name is of another kind at the destination",
        Err(_) => "the destination has no interface of this name",
    };
    Some(Obstacle::new(resource, text, remedy))
}

/// A file that was collected, and what does not go with it.
pub(crate) struct Collected {
    pub(crate) file: FileEntry,
    pub(crate) loss: Option<String>,
}

/// Collects one. To be called inside its network namespace.
pub(crate) fn collect(entry: &Entry, attached: Option<&Attached>, id: u32) -> Result<Collected> {
    let path = String::from_utf8_lossy(&entry.link).into_owned();
    let mut message =
        TunfileEntry { id, flags: Some(entry.info.status_flags() as u32), path: Some(path), ..TunfileEntry::default() };
    let mut loss = None;
    if let Some(attached) = attached {
        let fd = entry.file.as_fd();
        let number = |number: Number, what| match number.of(fd) {
            Err(Errno::EINVAL) => Ok(None),
            read => read.map(Some).map_err(entry.error(what)),
        };
        message.netdev = Some(attached.name.clone());
        message.detached = Some(attached.flags & IFF_DETACH_QUEUE != 0);
        let told = tun_flags(&attached.name)?.unwrap_or(IFF_NO_PI);
        message.interface_flags = Some((attached.flags & !IFF_NO_PI | told & IFF_NO_PI).into());
        message.send_buffer = number(Number::SendBuffer, "TUNGETSNDBUF")?;
        message.header_size = number(Number::HeaderSize, "TUNGETVNETHDRSZ")?;
        message.little_endian = number(Number::LittleEndian, "TUNGETVNETLE")?.map(|value| value != 0);
        message.big_endian = number(Number::BigEndian, "TUNGETVNETBE")?.map(|value| value != 0);
        let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
        let offloads = any.and_then(|any| tun::offloads(any.as_fd(), &attached.name));
        message.offloads = Some(offloads.map_err(entry.error("SIOCETHTOOL"))?);
        let mut polled = [PollFd::new(fd, PollFlags::POLLIN)];
        let waits = poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        loss = waits.then(|| format!("packets that wait in {} are lost", name(attached)));
    }
    let file = FileEntry { r#type: FdTypes::Tunf as i32, id, tunf: Some(message.into()), ..FileEntry::default() };
    Ok(Collected { file, loss })
}

/// An interface that stays without its file, until the process runs.
#[derive(Debug)]
pub(crate) struct Kept(Arc<OwnedFd>);

impl Kept {
    /// Has it go with its file.
    pub(crate) fn settle(&self) {
        if let Err(errno) = tun::tell(self.0.as_fd(), Word::Persistent, 0) {
            tracing::warn!(%errno, "an interface will stay when its program has ended");
        }
    }
}

/// Makes one again: attached to the interface, which must be here. With it comes what is left to do when the process runs.
///
/// # Errors
/// When there is no such interface, or another program is attached to it.
pub(crate) fn rebuild(message: &TunfileEntry) -> Result<(Arc<OwnedFd>, Option<Kept>)> {
    let path = message.path.as_deref().unwrap_or("/dev/net/tun");
    let flags = OFlag::from_bits_truncate(message.flags() as i32) & (OFlag::O_ACCMODE | OFlag::O_NONBLOCK);
    let made =
        open(path, flags | OFlag::O_CLOEXEC, Mode::empty()).map_err(|source| Error::call(path, "open", source))?;
    let found = nix::sys::stat::fstat(&made).map_err(|source| Error::call(path, "fstat", source))?;
    if found.st_mode & libc::S_IFMT != libc::S_IFCHR || !is_one(found.st_rdev) {
        return Err(Error::state(path, "it is another device at the destination"));
    }
    let Some(netdev) = message.netdev.as_deref() else { return Ok((Arc::new(made), None)) };
    let resource = format!("interface {netdev}");
    let failed = |what| {
        let resource = resource.clone();
        move |source| Error::call(resource, what, source)
    };
    // N.B. attaching to one that is not there would make it.
    nix::net::if_::if_nametoindex(netdev).map_err(failed("looking it up"))?;
    let interface_flags = message.interface_flags() as u16;
    let fd = made.as_fd();
    tun::attach(fd, netdev, interface_flags & !(IFF_PERSIST | IFF_DETACH_QUEUE)).map_err(failed("attaching to it"))?;
    let numbers = [
        (Number::SendBuffer, message.send_buffer),
        (Number::HeaderSize, message.header_size),
        (Number::LittleEndian, message.little_endian.map(i32::from)),
        (Number::BigEndian, message.big_endian.map(i32::from)),
    ];
    for (number, value) in numbers {
        let Some(value) = value.filter(|value| number.of(fd) != Ok(*value)) else { continue };
        number.set(fd, value).map_err(failed("setting what its file says"))?;
    }
    tun::tell(fd, Word::Offloads, message.offloads()).map_err(failed("TUNSETOFFLOAD"))?;
    if message.detached() {
        tun::switch_off(fd).map_err(failed("TUNSETQUEUE"))?;
    }
    let made = Arc::new(made);
    let kept = (interface_flags & IFF_PERSIST == 0).then(|| Kept(Arc::clone(&made)));
    Ok((made, kept))
}
