//! Collecting the descriptor table of a stopped process.
//!
//! Which numbers share an open file description is found by kcmp(2), which orders them; only those are compared that could
//! be one (same inode, flags and offset).

use super::alone::Socket;
use super::connection::{self, Candidate, Connections};
use super::early_connections::EarlyConnections;
use super::external::Externals;
use super::inspect::{Survey, network_number, outside_of, socket_inodes, unshared_tables};
use super::kind::{self, Context, Kind, PipeEnds, classify, has_two_ends};
use super::listener::Inet;
use super::table::{Directory, Entry, Numbers};
use super::unix_diag::UnixDiag;
use super::{
    Descriptors, alone, closing, datagram, datagram_hold, epoll, event, inotify, listener, netlink_socket, object,
    packet_socket, pipe, regular, timer, tun, unix_socket, vsock,
};
use crate::{Error, Obstacle, Result, parallel};
use godwit_kernel::process::{Compared, compare};
use godwit_network::{Flow, Hold, Namespace};
use godwit_proto::image::{FdTypes, FdinfoEntry, FileEntry, InetSkEntry};
use godwit_proto::wire::{SharedObject, Streams};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

/// The stopped process, and what is known of it already.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Its id.
    pub pid: i32,
    /// A descriptor that refers to it.
    pub pidfd: BorrowedFd<'a>,
    /// What it says of its descriptors itself; may be empty.
    pub numbers: &'a Numbers,
    /// What the inspection found.
    pub survey: &'a Survey,
    /// The user's choices.
    pub externals: &'a Externals,
    /// Options of connections that were read before.
    pub early: &'a EarlyConnections,
    /// When the clocks of the process were read that the destination is told: times left count from here.
    pub at: Instant,
}

/// Says which shared object (by its number, never 0) holds the content of a file without a path. The description comes from
/// [`super::shared_object`]; device and inode identify the file.
pub(crate) type Objects<'a> = &'a mut dyn FnMut(SharedObject, BorrowedFd<'_>) -> Result<u32>;

/// What is done about connections: their packets are held back before the first of them is taken apart.
pub struct Taking<'a> {
    /// Holds packets back; without it there can be no connections but those that stay behind.
    pub hold: Option<&'a mut Hold>,
    /// Whether connections stay behind, and the process has closed sockets instead.
    pub close: bool,
    /// Says what stands in the way of connections that came up since the inspection, given all.
    pub objection: &'a dyn Fn(&HashSet<Flow>) -> Option<Obstacle>,
    /// The connections that were taken apart.
    pub connections: &'a mut Connections,
    /// Connections without a descriptor that move along ([`take_over`](super::take_over)).
    pub closed: &'a [Socket],
    /// Whether connections that nobody has accepted yet are left behind.
    pub skip_in_flight: bool,
    /// Is told of connections as they are taken apart, and first of the sockets that have to be there before them.
    pub tell: &'a mut dyn FnMut(Streams),
}

impl Taking<'_> {
    /// Holds packets of all connections among TCP sockets back.
    fn hold_back<'b>(&mut self, sockets: impl Iterator<Item = &'b Inet>) -> Result<()> {
        if self.close {
            return Ok(());
        }
        let sockets = sockets.filter(|socket| !socket.is_mptcp());
        let flows: HashSet<Flow> = sockets.filter_map(|socket| Some(Flow::new(socket.address, socket.peer?))).collect();
        if flows.is_empty() {
            // N.B. a request that is not finished by now must not be any more.
            let abandons = |hold: &&mut &mut godwit_network::Hold| hold.abandons();
            return self.hold.as_mut().filter(abandons).map_or(Ok(()), |hold| Ok(hold.hold_everything(&[])?));
        }
        if let Some(obstacle) = (self.objection)(&flows) {
            return Err(Error::Obstacle(obstacle));
        }
        let Some(hold) = &mut self.hold else {
            let text = "they came up since the process was looked at; nothing is prepared for them";
            return Err(Error::Obstacle(Obstacle::new("TCP connections", text, "try again")));
        };
        Ok(hold.hold_everything(&flows)?)
    }

    /// Looks at the connections that are taken along without a descriptor, and holds their packets back, too. Those that have ended by
    /// now are left out.
    fn closed(&mut self) -> Result<Vec<(Entry, Inet)>> {
        let entries = alone::entries(self.closed)?;
        let look = |entry: &Entry| Ok(listener::tcp(entry)?.filter(|inet| connection::is_connection(inet.state)));
        let looked = entries.iter().map(look).collect::<Result<Vec<_>>>()?;
        let flow = |inet: &Inet| Some(Flow::new(inet.address, inet.peer?));
        let flows: HashSet<Flow> = looked.iter().flatten().filter_map(flow).collect();
        if let (Some(hold), false) = (&mut self.hold, flows.is_empty()) {
            hold.hold_everything(&flows)?;
        }
        // N.B. again: from now on none of them ends.
        let looked = entries.into_iter().map(|entry| Ok((look(&entry)?, entry))).collect::<Result<Vec<_>>>()?;
        Ok(looked.into_iter().filter_map(|(inet, entry)| Some((entry, inet?))).collect())
    }

    /// Holds back what arrives for UDP sockets, as far as that can be done.
    fn hold_datagrams(&mut self, entries: &[&Entry], place: &Namespace) -> Result<()> {
        let Some(hold) = &mut self.hold else { return Ok(()) };
        let datagrams = place.inside(|| datagram_hold::of(entries))??;
        if !hold.hold_datagrams(&datagrams)? && !datagrams.is_empty() {
            tracing::debug!("datagrams that arrive in the freeze are lost");
        }
        Ok(())
    }
}

/// Collects the descriptors of a stopped process. Ids of files begin at 1 and are without gaps.
///
/// # Errors
/// [`Error::Obstacle`] for what appeared since the inspection and cannot be moved.
pub fn collect(source: &Source<'_>, objects: Objects<'_>, mut taking: Taking<'_>) -> Result<Descriptors> {
    if let Some(obstacle) = unshared_tables(source.pid)?.pop() {
        return Err(Error::Obstacle(obstacle));
    }
    let directory = Directory::open(source.pid)?;
    let network = network_number(source.pid)?;
    let numbers = match source.numbers.all() {
        none if none.is_empty() => directory.numbers()?,
        known => known,
    };
    let read = parallel::map(&numbers, |&fd| {
        let entry = match source.numbers.is_closed_on_exec(fd) {
            Some(close_on_exec) => directory.entry_knowing(source.pidfd, fd, close_on_exec, source.early)?,
            None => directory.entry(source.pidfd, fd)?,
        };
        let inet = match &entry {
            Some(entry) if !source.externals.names(fd) => kind::examine_tcp(entry, network, Some(source.early))?,
            _ => None,
        };
        Ok::<_, Error>((entry, inet))
    });
    let mut entries = Vec::with_capacity(read.len());
    let mut examined = HashMap::with_capacity(read.len());
    for read in read {
        let (Some(entry), inet) = read? else { continue };
        examined.extend(inet.map(|inet| (entry.fd, inet)));
        entries.push(entry);
    }
    taking.hold_back(examined.values())?;
    // N.B. before the first queue is looked at.
    let place = Namespace::of_process(source.pid)?;
    let others: Vec<&Entry> = entries.iter().filter(|entry| !examined.contains_key(&entry.fd)).collect();
    taking.hold_datagrams(&others, &place)?;
    let ids = assign(source, &entries)?;
    let two_ended = entries
        .iter()
        .filter(|entry| !source.externals.names(entry.fd) && has_two_ends(&entry.link, entry.stat.st_mode))
        .map(|entry| entry.link.clone());
    let context = Context {
        sockets: socket_inodes(&entries),
        outside: outside_of(source.pid, source.survey, two_ended),
        ends: PipeEnds::of(&entries),
        network,
        place,
        diag: UnixDiag::of(source.pid),
        may_have_waiting: taking.skip_in_flight,
        is_stopped: true,
        examined,
    };
    let next_id = ids.values().max().map_or(1, |last| last + 1);
    let mut collector = Collector {
        source,
        directory,
        context,
        ids,
        inodes: HashMap::new(),
        next_id,
        mounts: None,
        taking,
        candidates: Vec::new(),
    };
    for entry in &entries {
        collector.inodes.entry(entry.stat.st_ino).or_default().push(entry.fd);
    }
    collector.run(&mut entries, objects)
}

/// Gives each open file description an id: the numbers that share one get the same.
fn assign(source: &Source<'_>, entries: &[Entry]) -> Result<BTreeMap<i32, u32>> {
    let key = |entry: &Entry| (entry.stat.st_dev, entry.stat.st_ino, entry.info.status_flags(), entry.info.pos);
    let mut alike: Vec<_> = entries.iter().map(|entry| (key(entry), entry.fd)).collect();
    alike.sort_unstable();
    // The lowest number of each open file description stands for it.
    let mut first: BTreeMap<i32, i32> = BTreeMap::new();
    for group in alike.chunk_by(|(one, _), (other, _)| one == other).filter(|group| group.len() > 1) {
        for same in same_description(source.pid, group.iter().map(|&(_, fd)| fd).collect())? {
            let lowest = same.iter().copied().min().unwrap_or_default();
            first.extend(same.into_iter().map(|fd| (fd, lowest)));
        }
    }
    let mut ids = BTreeMap::new();
    let mut known: HashMap<(i32, Option<(String, u32)>), u32> = HashMap::new();
    for entry in entries {
        let external = source.externals.replacement(entry.fd, entry.info.flags).map(|file| (file.name, file.flags));
        let next = known.len() as u32 + 1;
        let lowest = first.get(&entry.fd).copied().unwrap_or(entry.fd);
        ids.insert(entry.fd, *known.entry((lowest, external)).or_insert(next));
    }
    Ok(ids)
}

/// Splits numbers into groups that share an open file description.
fn same_description(pid: i32, mut numbers: Vec<i32>) -> Result<Vec<Vec<i32>>> {
    let mut failure = None;
    let mut order = |a: i32, b: i32| {
        compare(pid, pid, Compared::File(a, b)).unwrap_or_else(|source| {
            failure.get_or_insert(Error::call(format!("fd {a} and fd {b}"), "kcmp", source));
            Ordering::Equal
        })
    };
    if numbers.len() > 1 {
        numbers.sort_by(|&a, &b| order(a, b));
    }
    let mut groups: Vec<Vec<i32>> = Vec::new();
    for fd in numbers {
        match groups.last_mut() {
            Some(group) if order(group[0], fd).is_eq() => group.push(fd),
            _ => groups.push(vec![fd]),
        }
    }
    failure.map_or(Ok(groups), Err)
}

struct Collector<'a, 't> {
    source: &'a Source<'a>,
    directory: Directory,
    context: Context,
    ids: BTreeMap<i32, u32>,
    inodes: HashMap<u64, Vec<i32>>,
    next_id: u32,
    mounts: Option<inotify::Mounts>,
    taking: Taking<'t>,
    /// Connections, by number and id.
    candidates: Vec<(i32, Inet, u32)>,
}

impl Collector<'_, '_> {
    fn run(&mut self, entries: &mut [Entry], objects: Objects<'_>) -> Result<Descriptors> {
        let mut collected = Descriptors::default();
        let mut files: BTreeMap<u32, i32> = BTreeMap::new();
        for entry in &mut *entries {
            let id = self.ids[&entry.fd];
            if let std::collections::btree_map::Entry::Vacant(slot) = files.entry(id) {
                let kind = self.file(entry, id, &mut collected, objects)?;
                slot.insert(kind);
            }
            collected.fdinfo.push(FdinfoEntry {
                id,
                flags: if entry.info.flags & libc::O_CLOEXEC != 0 { libc::FD_CLOEXEC as u32 } else { 0 },
                r#type: files[&id],
                fd: entry.fd as u32,
                xattr_security_selinux: None,
            });
        }
        self.pipe_contents(entries, &mut collected)?;
        self.connections(entries, &collected.files)?;
        Ok(collected)
    }

    /// Takes connections apart, those without a descriptor as well.
    fn connections(&mut self, entries: &[Entry], files: &[FileEntry]) -> Result<()> {
        let closed = self.taking.closed()?;
        if self.candidates.is_empty() && closed.is_empty() {
            return Ok(());
        }
        let by_number: HashMap<i32, &Entry> = entries.iter().map(|entry| (entry.fd, entry)).collect();
        let owned = std::mem::take(&mut self.candidates).into_iter();
        let owned = owned.map(|(fd, inet, id)| Candidate { entry: by_number[&fd], inet, id });
        let others = (closing::FIRST_ID..).zip(&closed);
        let others = others.map(|(id, (entry, inet))| Candidate { entry, inet: inet.clone(), id });
        let candidates: Vec<Candidate<'_>> = owned.chain(others).collect();
        let sockets =
            files.iter().filter_map(|file| file.isk.as_deref()).filter(|socket| listener::is_described(socket));
        let sockets: Vec<InetSkEntry> = sockets.cloned().collect();
        (self.taking.tell)(Streams { sockets, ..Streams::default() });
        connection::collect(&candidates, self.source.early, self.taking.connections, self.taking.tell)
    }

    /// Collects one open file description; returns the number of its type. Connections are collected later, together.
    fn file(&mut self, entry: &mut Entry, id: u32, into: &mut Descriptors, objects: Objects<'_>) -> Result<i32> {
        let file = if let Some(file) = self.source.externals.replacement(entry.fd, entry.info.flags) {
            regular::message(id, file)
        } else {
            match classify(entry, &self.context)? {
                Kind::Path => regular::collect(entry, id)?,
                Kind::Deleted => regular::collect_deleted(entry, id, self.object(entry, objects)?)?,
                Kind::Memfd => regular::collect_memfd(entry, id, self.object(entry, objects)?),
                Kind::Pipe => pipe::collect(entry, id),
                Kind::Fifo => {
                    let path_id = self.next_id;
                    self.next_id += 1;
                    let [fifo, path] = pipe::collect_fifo(entry, id, path_id)?;
                    into.files.push(path);
                    fifo
                }
                Kind::Eventfd => event::collect_eventfd(entry, id)?,
                Kind::Signalfd => event::collect_signalfd(entry, id)?,
                Kind::Timerfd => timer::collect(entry, &self.directory, self.source.at, id)?,
                Kind::Epoll => {
                    let known = epoll::Known { ids: &self.ids, inodes: &self.inodes, sockets: &self.context.sockets };
                    epoll::collect(self.source.pid, entry, id, known)?
                }
                Kind::Inotify => inotify::collect(entry, id, self.mounts()?)?,
                Kind::Inet(inet) if inet.peer.is_some() && self.taking.close => {
                    self.taking.connections.leave_behind(entry);
                    listener::collect_closed(entry, &inet, id)?
                }
                Kind::Inet(inet) if inet.peer.is_some() => {
                    if let Some(obstacle) = inet.tie(entry) {
                        return Err(Error::Obstacle(obstacle));
                    }
                    self.candidates.push((entry.fd, inet, id));
                    return Ok(FdTypes::Inetsk as i32);
                }
                Kind::Inet(inet) => {
                    into.losses.extend(inet.loss(entry));
                    listener::collect(entry, &inet, id)?
                }
                Kind::Unix(unix) => {
                    let (file, content) = unix_socket::collect(entry, &unix, id)?;
                    into.sockets.extend(content);
                    file
                }
                Kind::Datagram(found) => {
                    let collected = self.context.place.inside(|| datagram::collect(entry, &found, id))??;
                    let datagram::Collected { message, content, loss } = collected;
                    into.sockets.extend(content);
                    into.losses.extend(loss);
                    listener::file(message)
                }
                Kind::Packet(link) => {
                    let collected = self.context.place.inside(|| packet_socket::collect(entry, &link, id));
                    let (file, loss) = collected??;
                    into.losses.extend(loss);
                    file
                }
                Kind::Netlink(netlink) => netlink_socket::collect(entry, &netlink, id)?,
                Kind::Vsock(vsock) => vsock::collect(entry, &vsock, id)?,
                Kind::Tun(attached) => {
                    let collected = self.context.place.inside(|| tun::collect(entry, attached.as_ref(), id))??;
                    into.losses.extend(collected.loss);
                    collected.file
                }
            }
        };
        let kind = file.r#type;
        into.files.push(file);
        Ok(kind)
    }

    fn object(&self, entry: &Entry, objects: Objects<'_>) -> Result<u32> {
        match objects(object::shared_object(entry.file.as_fd(), &entry.link)?, entry.file.as_fd())? {
            0 => Err(Error::state(entry.name(), "its content has no shared object")),
            number => Ok(number),
        }
    }

    fn mounts(&mut self) -> Result<&inotify::Mounts> {
        match &mut self.mounts {
            Some(mounts) => Ok(mounts),
            none => Ok(none.insert(inotify::Mounts::read(self.source.pid)?)),
        }
    }

    /// Collects what is inside each pipe once, through a descriptor that can read it if there is one.
    fn pipe_contents(&self, entries: &[Entry], into: &mut Descriptors) -> Result<()> {
        let mut pipes: Vec<&Entry> = entries
            .iter()
            .filter(|entry| entry.file_type() == libc::S_IFIFO && entry.info.flags & libc::O_PATH == 0)
            .filter(|entry| !self.source.externals.names(entry.fd))
            .collect();
        pipes.sort_by_key(|entry| entry.info.flags & libc::O_ACCMODE == libc::O_WRONLY);
        let mut seen = BTreeSet::new();
        for entry in pipes {
            if seen.insert((entry.stat.st_dev, entry.stat.st_ino)) {
                into.pipes.extend(pipe::collect_content(entry)?);
            }
        }
        Ok(())
    }
}

/// Finds a file by its id.
pub(crate) fn by_id(files: &[FileEntry]) -> HashMap<u32, &FileEntry> {
    files.iter().map(|file| (file.id, file)).collect()
}
