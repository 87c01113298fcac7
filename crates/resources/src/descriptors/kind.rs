//! What kind of file a descriptor is, and whether it can be moved: every refusal names the descriptor and the reason.

use super::datagram::{self, Datagram};
use super::early_connections::EarlyConnections;
use super::filter;
use super::listener::{self, Inet};
use super::netlink_socket::{self, Netlink};
use super::outside::Holder;
use super::packet_socket::{self, Link};
use super::table::Entry;
use super::tun;
use super::unix_diag::UnixDiag;
use super::unix_socket::{self, Unix};
use super::vsock::{self, Vsock};
use crate::{Error, Obstacle, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{owner, owner_signal, socket_integer};
use godwit_kernel::tun::Attached;
use godwit_network::Namespace;
use nix::sys::stat::{lstat, major, minor};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

/// The kinds that can be moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Regular file, directory or device with a path, or anything opened with `O_PATH`.
    Path,
    /// Regular file whose last link is gone.
    Deleted,
    Memfd,
    Pipe,
    Fifo,
    Eventfd,
    Epoll,
    Timerfd,
    Signalfd,
    Inotify,
    Inet(Inet),
    Unix(Unix),
    Datagram(Datagram),
    Packet(Link),
    Netlink(Netlink),
    Vsock(Vsock),
    /// A file of /dev/net/tun, and what it is attached to.
    Tun(Option<Attached>),
}

/// What a verdict needs to know besides the descriptor itself.
#[derive(Debug)]
pub(crate) struct Context {
    /// Number of one descriptor for each socket inode of the process.
    pub(crate) sockets: BTreeMap<u32, i32>,
    /// Pipes, named pipes and sockets that another process has open too.
    pub(crate) outside: HashMap<Vec<u8>, Holder>,
    /// Which ends of pipes and named pipes the process has open itself.
    pub(crate) ends: PipeEnds,
    /// The number of the process's network namespace; 0 where it has none.
    pub(crate) network: u64,
    /// That namespace: interfaces have other numbers elsewhere, and other sockets are listed.
    pub(crate) place: Namespace,
    /// Where UNIX sockets are asked about; opened at the first one.
    pub(crate) diag: UnixDiag,
    /// Whether listening sockets may have connections that were not accepted yet.
    pub(crate) may_have_waiting: bool,
    /// Whether the process is stopped: what waits now waits for good.
    pub(crate) is_stopped: bool,
    /// TCP sockets that were looked at already, by number.
    pub(crate) examined: HashMap<i32, Inet>,
}

/// Refuses a descriptor.
pub(crate) fn refuse<T>(entry: &Entry, what: &str, text: &str) -> Result<T> {
    refuse_with(entry, what, text, String::new())
}

pub(crate) fn refuse_with<T>(entry: &Entry, what: &str, text: &str, remedy: String) -> Result<T> {
    Err(Error::Obstacle(Obstacle::new(format!("fd {} ({what})", entry.fd), text, remedy)))
}

/// How the user lets go of a stream that leads outside.
fn way_out(fd: i32) -> String {
    format!("give --external 'fd[{fd}]=file:/path' or --external 'fd[{fd}]=null'")
}

/// Whether the link of a descriptor names something that more processes than one can hold an end of.
pub(crate) fn has_two_ends(link: &[u8], mode: u32) -> bool {
    link.starts_with(b"pipe:[") || link.starts_with(b"socket:[") || mode & libc::S_IFMT == libc::S_IFIFO
}

/// Tells the kind of a descriptor.
///
/// # Errors
/// [`Error::Obstacle`] when it cannot be moved.
pub(crate) fn classify(entry: &Entry, context: &Context) -> Result<Kind> {
    let verdict = match context.examined.get(&entry.fd) {
        Some(inet) if inet.peer.is_some() => two_ended(entry, context, Kind::Inet(inet.clone()), "socket"),
        _ => kind(entry, context).and_then(|kind| refuse_attachments(entry).map(|()| kind)),
    };
    match verdict {
        // Whatever a standard stream leads to, it can be replaced.
        Err(Error::Obstacle(mut obstacle)) if entry.fd <= libc::STDERR_FILENO && obstacle.remedy.is_empty() => {
            obstacle.remedy = way_out(entry.fd);
            Err(Error::Obstacle(obstacle))
        }
        verdict => verdict,
    }
}

/// Looks at a TCP socket, and at what a verdict on a connection needs; `None` for what is none. Done for many at once, before
/// [`classify`] says what remains to be said. A filter that cannot be read is refused when it is collected.
///
/// # Errors
/// [`Error::Obstacle`] when it is a connection that cannot be moved.
pub(crate) fn examine_tcp(entry: &Entry, network: u64, early: Option<&EarlyConnections>) -> Result<Option<Inet>> {
    // There may be very many, and each question takes as long as any other.
    let early = early.filter(|early| early.network() == network && entry.info.flags & libc::O_PATH == 0);
    if let Some(known) = early.and_then(|early| early.known(&entry.stat)) {
        let inet = listener::examine_known(entry, &known.inet)?;
        if inet.peer.is_some() {
            refuse_attachments(entry)?;
        }
        return Ok(Some(inet));
    }
    let Some(inet) = listener::tcp(entry)? else { return Ok(None) };
    refuse_foreign(entry, network)?;
    if inet.peer.is_some() {
        refuse_attachments(entry)?;
        listener::verdict(entry, &inet, false)?;
    }
    Ok(Some(inet))
}

/// Refuses a socket of another network namespace than that of its process, of which `network` is the number.
fn refuse_foreign(entry: &Entry, network: u64) -> Result<()> {
    match Namespace::cookie_of(entry.file.as_fd()) {
        // Before Linux 5.14 nobody can tell.
        Err(Errno::ENOPROTOOPT) => Ok(()),
        Ok(own) if own == network => Ok(()),
        Ok(_) => refuse(entry, &entry.target(), "it belongs to another network namespace than its process"),
        Err(source) => Err(entry.error("SO_NETNS_COOKIE")(source)),
    }
}

/// Refuses what hangs on a descriptor and cannot follow it.
fn refuse_attachments(entry: &Entry) -> Result<()> {
    if let Some(lock) = entry.info.value("lock") {
        let what = match lock.split_whitespace().nth(1) {
            Some("POSIX") => "a POSIX lock",
            Some("OFDLCK") => "an open file description lock",
            Some("FLOCK") => "a lock (flock)",
            _ => "a lock or lease",
        };
        let text = format!("{what} is held on it, which cannot move along");
        let remedy = "have the process give it up; if it holds it for moments only, run the same command again";
        return refuse_with(entry, &entry.target(), &text, remedy.to_owned());
    }
    if entry.info.flags & libc::O_PATH != 0 {
        return Ok(());
    }
    let (_, pid) = owner(entry.file.as_fd()).map_err(entry.error("F_GETOWN_EX"))?;
    let signal = owner_signal(entry.file.as_fd()).map_err(entry.error("F_GETSIG"))?;
    if entry.info.flags & libc::O_ASYNC != 0 || pid != 0 || signal != 0 {
        return refuse(entry, &entry.target(), &format!("it sends signals when ready (F_SETOWN to {pid}, O_ASYNC)"));
    }
    Ok(())
}

fn kind(entry: &Entry, context: &Context) -> Result<Kind> {
    let link = entry.link.as_slice();
    if let Some(name) = link.strip_prefix(b"anon_inode:") {
        return anonymous(entry, name);
    }
    if link.starts_with(b"pipe:[") {
        return two_ended(entry, context, Kind::Pipe, "pipe");
    }
    if link.starts_with(b"socket:[") {
        return socket(entry, context);
    }
    if !link.starts_with(b"/") {
        let text = match link.split(|byte| *byte == b':').next() {
            Some(b"pidfd") => "descriptors of processes (pidfd) cannot be moved",
            Some(b"mnt" | b"net" | b"pid" | b"user" | b"uts" | b"ipc" | b"time" | b"cgroup") => {
                "descriptors of namespaces cannot be moved"
            }
            _ => "this kind of descriptor cannot be moved",
        };
        return refuse(entry, &entry.target(), text);
    }
    with_path(entry, context)
}

fn anonymous(entry: &Entry, name: &[u8]) -> Result<Kind> {
    let text = match name {
        b"[eventfd]" => return Ok(Kind::Eventfd),
        b"[eventpoll]" => return Ok(Kind::Epoll),
        b"[timerfd]" => return Ok(Kind::Timerfd),
        b"[signalfd]" => return Ok(Kind::Signalfd),
        b"inotify" => return Ok(Kind::Inotify),
        b"[io_uring]" => "io_uring instances cannot be moved",
        b"[fanotify]" => "fanotify instances cannot be moved",
        b"[userfaultfd]" => "a program that handles its own page faults (userfaultfd) cannot be moved",
        b"[perf_event]" => "performance counters cannot be moved",
        b"[pidfd]" => "descriptors of processes (pidfd) cannot be moved",
        name if name.starts_with(b"bpf") => "BPF objects cannot be moved",
        _ => "this kind of descriptor cannot be moved",
    };
    refuse(entry, &entry.target(), text)
}

/// For each pipe whether the process has its reading and its writing end.
#[derive(Debug, Default)]
pub(crate) struct PipeEnds(HashMap<Vec<u8>, (bool, bool)>);

impl PipeEnds {
    pub(crate) fn of(entries: &[Entry]) -> Self {
        let mut ends: HashMap<Vec<u8>, (bool, bool)> = HashMap::new();
        for entry in entries.iter().filter(|entry| entry.file_type() == libc::S_IFIFO) {
            let (reads, writes) = ends.entry(entry.link.clone()).or_default();
            let mode = entry.info.flags & libc::O_ACCMODE;
            *reads |= mode != libc::O_WRONLY;
            *writes |= mode != libc::O_RDONLY;
        }
        Self(ends)
    }

    /// Whether somebody who cannot be seen from here (another PID namespace) has the end that the process lacks: the pipe
    /// itself says whether it has readers and writers (poll(2), `POLLERR` and `POLLHUP`).
    fn has_hidden_partner(&self, entry: &Entry) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let alone = match self.0.get(&entry.link) {
            Some((true, false)) => PollFlags::POLLHUP,
            Some((false, true)) => PollFlags::POLLERR,
            _ => return false,
        };
        let mut poller = [PollFd::new(entry.file.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT)];
        let polled = poll(&mut poller, PollTimeout::ZERO);
        polled.is_ok() && !poller[0].revents().unwrap_or(PollFlags::empty()).contains(alone)
    }
}

fn two_ended(entry: &Entry, context: &Context, kind: Kind, what: &str) -> Result<Kind> {
    match context.outside.get(&entry.link) {
        None if matches!(kind, Kind::Pipe) && context.ends.has_hidden_partner(entry) => refuse_with(
            entry,
            &format!("{what} that leads outside"),
            "a process that cannot be seen from here has its other end open, and stays behind",
            way_out(entry.fd),
        ),
        None => Ok(kind),
        Some(Holder { pid, comm }) => refuse_with(
            entry,
            &format!("{what} shared with process {pid}, {comm}"),
            "another process has it or its other end open, and stays behind",
            if entry.file_type() == libc::S_IFIFO { way_out(entry.fd) } else { String::new() },
        ),
    }
}

fn with_path(entry: &Entry, context: &Context) -> Result<Kind> {
    if std::str::from_utf8(&entry.link).is_err() {
        return refuse(entry, &entry.target(), "its path is not UTF-8");
    }
    if entry.info.flags & libc::O_PATH != 0 {
        return reachable(entry, Kind::Path);
    }
    match entry.file_type() {
        libc::S_IFREG if entry.link.starts_with(b"/memfd:") && entry.stat.st_nlink == 0 => Ok(Kind::Memfd),
        libc::S_IFREG if entry.link.starts_with(b"/secretmem") => {
            refuse(entry, "secret memory", "memfd_secret cannot be moved")
        }
        libc::S_IFREG if is_message_queue(entry) => {
            refuse(entry, "POSIX message queue", "message queues cannot be moved")
        }
        libc::S_IFREG if entry.stat.st_nlink == 0 => Ok(Kind::Deleted),
        libc::S_IFREG | libc::S_IFDIR => reachable(entry, Kind::Path),
        libc::S_IFIFO => two_ended(entry, context, Kind::Fifo, &entry.target()).and_then(|kind| reachable(entry, kind)),
        libc::S_IFCHR => device(entry, context),
        libc::S_IFBLK => refuse(entry, &entry.target(), "block devices cannot be moved"),
        _ => refuse(entry, &entry.target(), "this kind of descriptor cannot be moved"),
    }
}

/// Whether it is a queue of mq_overview(7), which looks like a regular file.
fn is_message_queue(entry: &Entry) -> bool {
    const MQUEUE_MAGIC: i64 = 0x1980_0202;
    nix::sys::statfs::fstatfs(&entry.file).is_ok_and(|system| system.filesystem_type().0 == MQUEUE_MAGIC)
}

/// Checks that the path leads to the file, and to nothing that belongs to one host or process.
fn reachable(entry: &Entry, kind: Kind) -> Result<Kind> {
    let of_a_process =
        entry.link.strip_prefix(b"/proc/").is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_digit));
    if of_a_process {
        return refuse(entry, &entry.target(), "it belongs to a process and is not the same at the destination");
    }
    match lstat(OsStr::from_bytes(&entry.link)) {
        Ok(stat) if stat.st_dev == entry.stat.st_dev && stat.st_ino == entry.stat.st_ino => Ok(kind),
        _ => refuse(
            entry,
            &entry.target(),
            "its path is gone, or leads to another file now, while it has links elsewhere",
        ),
    }
}

fn device(entry: &Entry, context: &Context) -> Result<Kind> {
    const MEMORY: u64 = 1;
    match (major(entry.stat.st_rdev), minor(entry.stat.st_rdev)) {
        // null, zero, full, random, urandom
        (MEMORY, 3 | 5 | 7 | 8 | 9) => reachable(entry, Kind::Path),
        (4 | 5 | 136..=143, _) => {
            refuse_with(entry, &format!("terminal {}", entry.target()), "terminals stay behind", way_out(entry.fd))
        }
        _ if tun::is_one(entry.stat.st_rdev) => {
            let attached = tun::examine(entry)?;
            tun::verdict(entry, attached.as_ref(), &context.place, context.is_stopped)?;
            reachable(entry, Kind::Tun(attached))
        }
        (major, minor) => {
            refuse(entry, &format!("device {} {major}:{minor}", entry.target()), "this device cannot be moved")
        }
    }
}

/// Reads a socket option that is one int.
pub(crate) fn integer_option(entry: &Entry, level: i32, name: i32) -> Result<i32> {
    socket_integer(entry.file.as_fd(), level, name).map_err(entry.error("getsockopt"))
}

fn socket(entry: &Entry, context: &Context) -> Result<Kind> {
    let verdict = match context.examined.get(&entry.fd) {
        Some(inet) => Kind::Inet(inet.clone()),
        None => kind_of_socket(entry, context)?,
    };
    let verdict = two_ended(entry, context, verdict, "socket")?;
    filter::collect(entry)?;
    match &verdict {
        Kind::Unix(unix) => unix_socket::verdict(entry, unix, context)?,
        Kind::Inet(inet) => listener::verdict(entry, inet, context.may_have_waiting)?,
        Kind::Datagram(datagram) => datagram::verdict(entry, datagram, context)?,
        Kind::Packet(link) => packet_socket::verdict(entry, link)?,
        Kind::Netlink(netlink) => netlink_socket::verdict(entry, netlink, context)?,
        Kind::Vsock(vsock) => vsock::verdict(entry, vsock, context.may_have_waiting)?,
        _ => {}
    }
    Ok(verdict)
}

fn kind_of_socket(entry: &Entry, context: &Context) -> Result<Kind> {
    let family = integer_option(entry, libc::SOL_SOCKET, libc::SO_DOMAIN)?;
    if family != libc::AF_UNIX {
        refuse_foreign(entry, context.network)?;
    }
    let kind = integer_option(entry, libc::SOL_SOCKET, libc::SO_TYPE)?;
    let protocol = integer_option(entry, libc::SOL_SOCKET, libc::SO_PROTOCOL)?;
    let kind = match (family, kind, protocol) {
        (libc::AF_UNIX, _, _) => Kind::Unix(unix_socket::examine(entry, kind, context)?),
        (family, kind, protocol) if listener::is_one(family, kind, protocol) => {
            Kind::Inet(listener::examine(entry, family, protocol)?)
        }
        (family, kind, protocol) if datagram::is_one(family, kind, protocol) => {
            Kind::Datagram(datagram::examine(entry, family, kind, protocol)?)
        }
        (libc::AF_NETLINK, _, _) => Kind::Netlink(netlink_socket::examine(entry, kind, protocol)?),
        (libc::AF_PACKET, _, _) => Kind::Packet(context.place.inside(|| packet_socket::examine(entry, kind))??),
        (libc::AF_VSOCK, _, _) => Kind::Vsock(vsock::examine(entry, kind)?),
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_SCTP) => {
            return refuse(entry, &format!("SCTP socket {}", listener::ends(entry)), "SCTP sockets cannot be moved");
        }
        _ => {
            let what = format!("socket of family {family}, type {kind}, protocol {protocol}");
            return refuse(entry, &what, "sockets of this family cannot be moved");
        }
    };
    Ok(kind)
}
