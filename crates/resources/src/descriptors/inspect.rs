//! Looking at the descriptors of a running process: everything that cannot be moved, and what the destination must have.

use super::datagram::{self, Takes};
use super::external::Externals;
use super::kind::{Context, Kind, PipeEnds, classify, has_two_ends, refuse};
use super::outside::holders;
use super::signed::{self, Signed};
use super::table::{Directory, Entry};
use super::tun;
use super::unix_diag::UnixDiag;
use super::unix_socket::printable;
use super::{inotify, listener, packet_socket, table};
use crate::{Error, Obstacle, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::socket_integer;
use godwit_kernel::process::{Compared, compare, pidfd_getfd, pidfd_open};
use godwit_network::{Flow, Namespace, Watched};
use godwit_proto::wire::FileFacts;
use nix::sys::stat::stat;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// What is read once, when it is needed for the first time.
#[derive(Default)]
struct Known {
    mounts: Option<inotify::Mounts>,
    signed: Option<Signed>,
    /// How many sockets share the datagrams that come to an address.
    groups: BTreeMap<SocketAddr, usize>,
}

/// What an inspection found.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Everything that cannot be moved.
    pub obstacles: Vec<Obstacle>,
    /// What moves and will not be quite as before.
    pub warnings: Vec<String>,
    /// Files that the destination must have.
    pub files: Vec<FileFacts>,
    /// Addresses that must be free there: `tcp:127.0.0.1:80`, `udp:127.0.0.1:53`, `unix:/run/x`, `unix:@abstract`; those that must
    /// be there for connections: `connection:10.0.0.1:80`; and interfaces: `interface:eth0`, `tun:tun0:tap`.
    pub listening: Vec<String>,
    /// The highest number.
    pub highest: i32,
    /// Connections and listening sockets.
    pub network: Watched,
    /// How long an answer takes, at most, over the connections that there are, with their usual variation.
    pub round_trip: Duration,
    /// Connections that cannot be moved, but left behind.
    pub tied: Vec<Obstacle>,
    /// Names of interfaces whose other ends it has, once for each.
    pub tun_files: Vec<String>,
    /// Links of pipes and sockets that no other process had open.
    exclusive: BTreeSet<Vec<u8>>,
}

/// Inspects a running process without touching it.
///
/// # Errors
/// When the process is gone or may not be looked at; obstacles are no error.
pub fn inspect(pid: i32, externals: &Externals) -> Result<Survey> {
    let directory = Directory::open(pid)?;
    let mut survey = Survey::default();
    let numbers = directory.numbers()?;
    survey.highest = numbers.last().copied().unwrap_or_default();
    let mut links = BTreeMap::new();
    for &fd in &numbers {
        if let Some(link) = directory.link(fd)? {
            links.insert(fd, link);
        }
    }
    // N.B. before any descriptor is lent to this process, or it would be found to be a holder.
    let shared = two_ended_links(pid, &links, externals);
    let outside = holders(&[pid], None, &shared);
    survey.exclusive = shared.into_iter().filter(|link| !outside.contains_key(link)).collect();
    let pidfd = pidfd_open(pid).map_err(|source| Error::call(format!("process {pid}"), "pidfd_open", source))?;
    let mut entries = Vec::new();
    for &fd in &numbers {
        entries.extend(directory.entry(pidfd.as_fd(), fd)?);
    }
    let ends = PipeEnds::of(&entries);
    let context = Context {
        sockets: socket_inodes(&entries),
        outside,
        ends,
        network: network_number(pid)?,
        place: Namespace::of_process(pid)?,
        diag: UnixDiag::of(pid),
        // The process may still accept them.
        may_have_waiting: true,
        is_stopped: false,
        examined: HashMap::new(),
    };
    survey.obstacles.extend(unshared_tables(pid)?);
    let mut known = Known::default();
    for entry in &entries {
        let noted = if externals.names(entry.fd) {
            survey.note_external(entry, externals);
            Ok(())
        } else {
            survey.note(pid, entry, &context, &mut known)
        };
        match noted {
            // The process runs: what it has closed meanwhile is no concern.
            Err(Error::Obstacle(obstacle)) if still_open(&directory, entry) => survey.obstacles.push(obstacle),
            Err(error) if still_open(&directory, entry) => return Err(error),
            _ => {}
        }
    }
    // N.B. the kernel chooses by a secret of its own.
    survey.warnings.extend(known.groups.iter().filter(|(_, count)| **count > 1).map(|(address, count)| {
        format!("{count} UDP sockets share {address} (SO_REUSEPORT): what a peer sends may come to another of them than before")
    }));
    Ok(survey)
}

fn still_open(directory: &Directory, entry: &Entry) -> bool {
    matches!(directory.link(entry.fd), Ok(Some(link)) if link == entry.link)
}

/// Reports threads with a descriptor table of their own (clone(2) without `CLONE_FILES`, unshare(2)).
pub(crate) fn unshared_tables(pid: i32) -> Result<Vec<Obstacle>> {
    let path = format!("/proc/{pid}/task");
    let threads = std::fs::read_dir(&path).map_err(|source| Error::Proc { path: path.into(), source })?;
    let tids = threads.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let differs = |tid: &i32| matches!(compare(pid, *tid, Compared::Descriptors), Ok(order) if order.is_ne());
    let apart = tids.filter(differs).filter(|tid| {
        // A thread that is ending has no table any more; it is gone when looked at again.
        std::thread::sleep(std::time::Duration::from_millis(2));
        differs(tid)
    });
    Ok(apart.map(|tid| Obstacle::new(format!("thread {tid}"), "it has a descriptor table of its own", "")).collect())
}

/// The links of all pipes, named pipes and sockets.
fn two_ended_links(pid: i32, links: &BTreeMap<i32, Vec<u8>>, externals: &Externals) -> BTreeSet<Vec<u8>> {
    let mode = |fd: i32| stat(format!("/proc/{pid}/fd/{fd}").as_str()).map_or(0, |stat| stat.st_mode);
    links
        .iter()
        .filter(|(fd, _)| !externals.names(**fd))
        .filter(|(fd, link)| has_two_ends(link, if link.starts_with(b"/") { mode(**fd) } else { 0 }))
        .map(|(_, link)| link.clone())
        .collect()
}

/// The number of the network namespace of process `pid`; 0 where the kernel gives none.
pub(crate) fn network_number(pid: i32) -> Result<u64> {
    match Namespace::of_process(pid)?.cookie() {
        Err(godwit_network::Error::Call { source: Errno::ENOPROTOOPT, .. }) => Ok(0),
        number => Ok(number?),
    }
}

/// One number for each socket.
pub(crate) fn socket_inodes(entries: &[Entry]) -> BTreeMap<u32, i32> {
    let sockets = entries.iter().filter(|entry| entry.link.starts_with(b"socket:["));
    sockets.map(|entry| (entry.stat.st_ino as u32, entry.fd)).collect()
}

/// Who else holds the two-ended files of a stopped process; only those are looked for that the survey does not know.
pub(crate) fn outside_of(
    pid: i32,
    survey: &Survey,
    links: impl Iterator<Item = Vec<u8>>,
) -> HashMap<Vec<u8>, super::outside::Holder> {
    let unknown: BTreeSet<Vec<u8>> = links.filter(|link| !survey.exclusive.contains(link)).collect();
    // What is lent to this process at the moment it does not hold for itself.
    let own = std::fs::read_link("/proc/self").ok().and_then(|link| link.to_str()?.parse().ok());
    // N.B. the rescuer has what this process has.
    holders(&[pid, own.unwrap_or(pid)], own, &unknown)
}

impl Survey {
    fn note_external(&mut self, entry: &Entry, externals: &Externals) {
        let Some(file) = externals.replacement(entry.fd, entry.info.flags) else { return };
        if file.flags as i32 & libc::O_CREAT == 0 {
            self.add_file(FileFacts { path: file.name, writable: true, ..FileFacts::default() });
        } else if let Some(parent) = Path::new(&file.name).parent() {
            self.add_file(FileFacts {
                path: parent.to_string_lossy().into_owned(),
                directory: true,
                writable: true,
                mode: libc::S_IFDIR,
                ..FileFacts::default()
            });
        }
    }

    fn note(&mut self, pid: i32, entry: &Entry, context: &Context, known: &mut Known) -> Result<()> {
        match classify(entry, context)? {
            Kind::Path | Kind::Fifo => self.add_file(facts(entry)),
            Kind::Tun(attached) => {
                self.add_file(facts(entry));
                self.add_address(attached.as_ref().map(tun::needs));
                self.tun_files.extend(attached.map(|attached| attached.name));
            }
            Kind::Inotify => {
                let mounts = match &mut known.mounts {
                    Some(mounts) => mounts,
                    none => none.insert(inotify::Mounts::read(pid)?),
                };
                for path in inotify::paths(entry, mounts)? {
                    self.add_watched(path);
                }
            }
            Kind::Inet(inet) => {
                if inet.peer.is_some() {
                    self.round_trip = self.round_trip.max(listener::round_trip(entry));
                }
                self.add_address(inet.needed_address(entry));
                self.add_address(datagram::device_of(entry).map(|name| format!("interface:{name}")));
                let signed = match &mut known.signed {
                    Some(signed) => signed,
                    none => none.insert(Signed::list(&context.place)?),
                };
                let reason = signed.by(entry).map(signed::reason);
                if let Some(reason) = reason.as_ref().filter(|_| inet.peer.is_none()) {
                    return refuse(entry, &format!("{} socket {}", inet.name(), inet.address), reason);
                }
                match inet.tie(entry).or_else(|| Some(inet.obstacle(entry, &reason?))) {
                    Some(obstacle) => self.tied.push(obstacle),
                    None => self.network.flows.extend(inet.peer.map(|peer| Flow::new(inet.address, peer))),
                }
                self.network.listeners.extend(inet.listener());
            }
            Kind::Datagram(found) => {
                self.add_addresses(context.place.inside(|| found.needs(entry))??);
                if let Some(address) = found.group(entry) {
                    *known.groups.entry(address).or_default() += 1;
                }
                match found.takes().filter(|_| !datagram::joins_segments(entry)) {
                    Some(Takes::Flow(flow)) => drop(self.network.datagrams.flows.insert(flow)),
                    Some(Takes::Port(port)) => drop(self.network.datagrams.ports.insert(port)),
                    None => {}
                }
            }
            Kind::Packet(link) => {
                self.add_addresses(context.place.inside(|| packet_socket::needs(entry, &link))??);
            }
            Kind::Netlink(netlink) => self.add_address(netlink.needs()),
            Kind::Vsock(vsock) => self.add_address(vsock.needs()),
            Kind::Unix(unix) if !unix.name.is_empty() => {
                self.add_address(Some(format!("unix:{}", printable(&unix.name))));
            }
            _ => {}
        }
        Ok(())
    }

    fn add_address(&mut self, address: Option<String>) {
        self.listening.extend(address.filter(|address| !self.listening.contains(address)));
    }

    fn add_addresses(&mut self, addresses: Vec<String>) {
        addresses.into_iter().for_each(|address| self.add_address(Some(address)));
    }

    fn add_file(&mut self, file: FileFacts) {
        match self.files.iter_mut().find(|known| known.path == file.path) {
            Some(known) => known.writable |= file.writable,
            None => self.files.push(file),
        }
    }

    /// A watched file may change: only its type must be the same.
    fn add_watched(&mut self, path: String) {
        if let Ok(found) = stat(path.as_str()) {
            let directory = found.st_mode & libc::S_IFMT == libc::S_IFDIR;
            self.add_file(FileFacts { path, mode: found.st_mode, directory, writable: true, ..FileFacts::default() });
        }
    }
}

fn facts(entry: &table::Entry) -> FileFacts {
    let path = Path::new(OsStr::from_bytes(&entry.link)).to_string_lossy().into_owned();
    let flags = entry.info.flags;
    FileFacts {
        path,
        size: entry.stat.st_size as u64,
        writable: flags & libc::O_ACCMODE != libc::O_RDONLY,
        mode: entry.stat.st_mode,
        directory: entry.file_type() == libc::S_IFDIR,
        rdev: entry.stat.st_rdev,
        ..FileFacts::default()
    }
}

/// Connections that wait to be accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitingConnections {
    /// How many.
    pub count: u32,
    /// Whether a queue takes no more: the kernel does not hear then that a client has finished its request.
    pub is_full: bool,
}

/// Connections that wait for a stopped or running process to accept them.
///
/// # Errors
/// When the process is gone or may not be looked at.
pub fn waiting_connections(pid: i32) -> Result<WaitingConnections> {
    let directory = Directory::open(pid)?;
    let pidfd = pidfd_open(pid).map_err(|source| Error::call(format!("process {pid}"), "pidfd_open", source))?;
    let mut waiting = WaitingConnections::default();
    for fd in directory.numbers()? {
        // N.B. there may be thousands of other sockets, and new requests are held back meanwhile.
        let file = match pidfd_getfd(pidfd.as_fd(), fd) {
            Ok(file) if socket_integer(file.as_fd(), libc::SOL_SOCKET, libc::SO_ACCEPTCONN) == Ok(1) => file,
            // The process runs: it may have closed it.
            Ok(_) | Err(Errno::EBADF) => continue,
            Err(source) => return Err(Error::call(format!("fd {fd}"), "pidfd_getfd", source)),
        };
        let (count, backlog) = listener::waiting(&Entry::of_socket(fd, file)?)?;
        waiting.count += count;
        waiting.is_full |= count > backlog;
    }
    Ok(waiting)
}
