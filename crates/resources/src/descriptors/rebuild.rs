//! Making the descriptor table again: every file is opened or made here once, sent to the stub, and put under its numbers.
//!
//! The stub has one descriptor, the courier's socket, so files arrive under the lowest numbers there are. They are sent in the
//! order of the lowest number that each is to have; the k-th then arrives at or below that number, and moving them from the
//! last to the first never hits one that has not been moved yet.

use super::ahead::{self, Ahead};
use super::connection::Restored;
use super::courier::{Courier, MAX_IN_MESSAGE};
use super::filter::Gate;
use super::socket_file::SocketFile;
use super::tun::Kept;
use super::unix_socket::{ESTABLISHED, End};
use super::{
    Clocks, Descriptors, closing, collect::by_id, datagram, epoll, event, inotify, listener, netlink_socket,
    packet_socket, pipe, regular, timer, tun, unix_socket, vsock,
};
use crate::timers::ClockQuestions;
use crate::{Error, Result, parallel};
use godwit_network::Delivery;
use godwit_proto::image::{FdTypes, FdinfoEntry, FileEntry, PipeEntry};
use godwit_proto::wire::{PipeContent, SocketContent};
use godwit_tracee::{Batch, Tracee};
use nix::sys::resource::{Resource, getrlimit};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// Largest number of descriptors that is accepted (the default of fs.nr_open).
const MAX_DESCRIPTORS: usize = 1 << 20;
/// The one flag that a number has, as dup3(2) takes it.
const CLOSE_ON_EXEC: u64 = libc::O_CLOEXEC as u64;
/// Messages on their way at one time; more might not fit the socket's buffer.
const MAX_MESSAGES: usize = 64;

/// What rebuilding needs besides the messages.
pub struct Destination<'a> {
    /// Yields a descriptor of the shared object with a number.
    pub objects: &'a dyn Fn(u32) -> Option<BorrowedFd<'a>>,
    /// The process's own clocks at the moment that the descriptors were collected.
    pub collected: Clocks,
}

impl std::fmt::Debug for Destination<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Destination").field("collected", &self.collected).finish_non_exhaustive()
    }
}

/// What a rebuilt table leaves to be done when the process is about to run. Dropped unsettled, it takes back what it left in
/// the file system.
#[must_use = "socket files get their paths only when it is settled"]
#[derive(Debug, Default)]
pub struct Rebuilt {
    socket_files: Vec<SocketFile>,
    connections: Vec<Restored>,
    /// By what they were woken, once they are.
    woken_by: Option<Delivery>,
    gates: Vec<Gate>,
    interfaces: Vec<Kept>,
}

impl Rebuilt {
    /// Lets sockets of datagrams take what they are sent from now on. Where something may arrive before it is settled, it is
    /// lost otherwise.
    pub fn let_datagrams_in(&mut self) {
        for gate in self.gates.drain(..) {
            if let Err(error) = gate.open() {
                tracing::warn!(%error, "a socket takes nothing");
            }
        }
    }

    /// Has socket files take their paths for good, and lets datagrams in and connections live. One that cannot go on (its peer is
    /// gone, there is no way to it) is the program's to find out: it would have been where it came from.
    ///
    /// # Errors
    /// When a path has become unusable; the others are settled all the same.
    pub fn settle(&mut self) -> Result<()> {
        self.let_datagrams_in();
        self.interfaces.iter().for_each(Kept::settle);
        let files = self.socket_files.drain(..).map(SocketFile::settle).fold(Ok(()), Result::and);
        if self.connections.is_empty() {
            return files;
        }
        let delivery = self.woken_by.insert(Delivery::new()?);
        for woken in parallel::map(&self.connections, |connection| connection.wake(delivery)) {
            if let Err(error) = woken {
                tracing::warn!(%error, "a connection does not go on");
            }
        }
        files
    }

    /// Has connections learn what they have to know before their peers are heard. For when the process runs: it need not wait for that.
    pub fn inform_connections(self) {
        if let Some(delivery) = &self.woken_by {
            parallel::map(&self.connections, |connection| connection.inform(delivery));
        }
        close_later(self.connections);
    }
}

/// Closes sockets while others go on: the process waits, closing many takes a while, and nobody waits for that.
fn close_later(sockets: impl Send + 'static) {
    if let Err(error) = std::thread::Builder::new().name("closing".to_owned()).spawn(move || drop(sockets)) {
        tracing::debug!(%error, "closing sockets at once");
    }
}

/// Rebuilds a descriptor table in a stub that has no descriptors but the courier's. Connections are among what was told of `ahead`.
///
/// # Errors
/// Names the file or address that could not be had; the stub is then of no further use.
pub fn rebuild(
    stub: &mut Tracee,
    courier: &mut Courier,
    descriptors: &Descriptors,
    mut ahead: Ahead,
    destination: &Destination<'_>,
) -> Result<Rebuilt> {
    let plan = Plan::new(&descriptors.fdinfo)?;
    let (made, connections) = ahead.take_made();
    let mut datagrams: HashMap<u32, Vec<&SocketContent>> = HashMap::new();
    for content in descriptors.sockets.iter().filter(|content| content.header.is_some()) {
        datagrams.entry(content.entry.as_ref().map_or(0, |entry| entry.id_for)).or_default().push(content);
    }
    let delivery = if datagrams.is_empty() { None } else { Some(Delivery::new()?) };
    let mut workshop = Workshop {
        descriptors,
        destination,
        made,
        datagrams,
        delivery,
        rebuilt: Rebuilt { connections, ..Rebuilt::default() },
    };
    workshop.make_all(&plan, &mut ahead)?;
    let needless = ahead.take_blanks();
    if !needless.is_empty() {
        close_later(needless);
    }
    let mut placement = Placement { courier, plan: &plan, stub };
    let (numbers, now) = placement.hand_over(&workshop.made)?;
    placement.place(&numbers, descriptors, destination, &now)?;
    Ok(workshop.rebuilt)
}

/// Looks at a descriptor table as [`rebuild`] does before it makes anything.
pub(super) fn check(fdinfo: &[FdinfoEntry]) -> Result<usize> {
    Plan::new(fdinfo).map(|plan| plan.order.len())
}

/// Which numbers each file has.
struct Plan {
    /// Number to flags for dup3(2).
    flags: BTreeMap<RawFd, u64>,
    /// File to its numbers, ascending.
    numbers: HashMap<u32, Vec<RawFd>>,
    /// Files by their lowest number.
    order: Vec<u32>,
}

impl Plan {
    fn new(fdinfo: &[FdinfoEntry]) -> Result<Self> {
        if fdinfo.len() > MAX_DESCRIPTORS {
            return Err(Error::state("descriptors", format!("{} are too many", fdinfo.len())));
        }
        let mut owners = BTreeMap::new();
        let mut plan = Self { flags: BTreeMap::new(), numbers: HashMap::new(), order: Vec::new() };
        for entry in fdinfo {
            let fd = RawFd::try_from(entry.fd).ok().filter(|fd| *fd < MAX_DESCRIPTORS as RawFd);
            let fd = fd.ok_or_else(|| Error::state(format!("fd {}", entry.fd), "no such number"))?;
            if owners.insert(fd, entry.id).is_some() {
                return Err(Error::state(format!("fd {fd}"), "it is there twice"));
            }
            let close_on_exec = entry.flags & libc::FD_CLOEXEC as u32 != 0;
            plan.flags.insert(fd, if close_on_exec { CLOSE_ON_EXEC } else { 0 });
        }
        for (fd, id) in owners {
            let numbers = plan.numbers.entry(id).or_default();
            if numbers.is_empty() {
                plan.order.push(id);
            }
            numbers.push(fd);
        }
        Ok(plan)
    }

    /// A number's flags for dup3(2).
    fn flags(&self, fd: RawFd) -> u64 {
        self.flags.get(&fd).copied().unwrap_or_default()
    }

    fn lowest(&self, id: u32) -> RawFd {
        self.numbers[&id][0]
    }
}

/// Opens and makes files.
struct Workshop<'a, 'o> {
    descriptors: &'a Descriptors,
    destination: &'a Destination<'o>,
    made: HashMap<u32, Arc<OwnedFd>>,
    /// What waits in each datagram socket, by its file, and what puts it back.
    datagrams: HashMap<u32, Vec<&'a SocketContent>>,
    delivery: Option<Delivery>,
    rebuilt: Rebuilt,
}

impl<'a, 'o> Workshop<'a, 'o> {
    fn make_all(&mut self, plan: &Plan, ahead: &mut Ahead) -> Result<()> {
        let files = by_id(&self.descriptors.files);
        let waiting = ahead.waiting();
        for &id in &plan.order {
            if self.made.contains_key(&id) || waiting.contains(&id) {
                continue;
            }
            let name = || format!("fd {}", plan.lowest(id));
            let file = *files.get(&id).ok_or_else(|| Error::state(name(), format!("there is no file {id}")))?;
            let made = self.make(file, &files, plan);
            made.map_err(|error| in_context(error, &name()))?;
        }
        // N.B. last: one that shares its port with nobody must have it before its connections are there.
        let name = |id: u32| match plan.numbers.get(&id) {
            Some(numbers) => Some(format!("fd {}", numbers[0])),
            None => (id >= closing::FIRST_ID).then(|| "a closed connection".to_owned()),
        };
        for (id, (made, restored)) in ahead.make_rest(name)? {
            self.made.insert(id, made);
            self.rebuilt.connections.push(restored);
        }
        Ok(())
    }

    fn make(&mut self, file: &'a FileEntry, files: &HashMap<u32, &'a FileEntry>, plan: &Plan) -> Result<()> {
        let kind = FdTypes::try_from(file.r#type).unwrap_or(FdTypes::Und);
        let lacking = || Error::state(format!("file {}", file.id), format!("its part of type {kind:?} is not there"));
        let made = match kind {
            FdTypes::Reg => {
                let reg = file.reg.as_deref().ok_or_else(lacking)?;
                match reg.object {
                    Some(object) => regular::rebuild_on(self.object(object)?, reg.flags, reg.pos, &reg.name)?,
                    None => regular::rebuild(reg)?,
                }
            }
            FdTypes::Memfd => {
                let memfd = file.memfd.as_deref().ok_or_else(lacking)?;
                regular::rebuild_on(self.object(memfd.inode_id)?, memfd.flags, memfd.pos, "memfd")?
            }
            FdTypes::Pipe => return self.make_pipe(file.pipe.as_deref().ok_or_else(lacking)?.pipe_id, plan),
            FdTypes::Fifo => return self.make_fifo(file.fifo.as_deref().ok_or_else(lacking)?.pipe_id, files, plan),
            FdTypes::Eventfd => event::rebuild_eventfd(file.efd.as_deref().ok_or_else(lacking)?)?,
            FdTypes::Signalfd => event::rebuild_signalfd(file.sgfd.as_deref().ok_or_else(lacking)?)?,
            FdTypes::Timerfd => timer::rebuild(file.tfd.as_deref().ok_or_else(lacking)?)?,
            FdTypes::Eventpoll => epoll::rebuild(file.epfd.as_deref().ok_or_else(lacking)?)?,
            FdTypes::Inotify => inotify::rebuild(file.ify.as_deref().ok_or_else(lacking)?)?,
            FdTypes::Inetsk => {
                let message = file.isk.as_deref().ok_or_else(lacking)?;
                if datagram::is_described(message) {
                    let content = self.datagrams.get(&file.id).map(Vec::as_slice).unwrap_or_default();
                    let (made, gate) = datagram::rebuild(message, content, self.delivery.as_ref())?;
                    self.rebuilt.gates.push(gate);
                    made
                } else if listener::is_connection(message) {
                    return Err(Error::state("TCP connection", "nothing about its stream"));
                } else {
                    ahead::make(message)?
                }
            }
            FdTypes::Packetsk => {
                let (made, gate) = packet_socket::rebuild(file.psk.as_deref().ok_or_else(lacking)?)?;
                self.rebuilt.gates.push(gate);
                made
            }
            FdTypes::Netlinksk => netlink_socket::rebuild(file.nlsk.as_deref().ok_or_else(lacking)?)?,
            FdTypes::Vsocksk => vsock::rebuild(file.vsk.as_deref().ok_or_else(lacking)?)?,
            FdTypes::Tunf => {
                let (made, kept) = tun::rebuild(file.tunf.as_deref().ok_or_else(lacking)?)?;
                self.rebuilt.interfaces.extend(kept);
                self.made.insert(file.id, made);
                return Ok(());
            }
            FdTypes::Unixsk => return self.make_unix(file, plan, lacking),
            _ => {
                return Err(Error::state(
                    format!("file {}", file.id),
                    format!("files of type {kind:?} are unknown here"),
                ));
            }
        };
        self.made.insert(file.id, Arc::new(made));
        Ok(())
    }

    fn object(&self, number: u32) -> Result<BorrowedFd<'o>> {
        (self.destination.objects)(number)
            .ok_or_else(|| Error::state(format!("shared object {number}"), "it has not been announced"))
    }

    fn contents(&self, pipe_id: u32) -> Vec<&'a PipeContent> {
        let of_pipe = |content: &&PipeContent| content.entry.as_ref().is_some_and(|entry| entry.pipe_id == pipe_id);
        self.descriptors.pipes.iter().filter(of_pipe).collect()
    }

    fn make_pipe(&mut self, pipe_id: u32, plan: &Plan) -> Result<()> {
        let ends: Vec<&PipeEntry> = self
            .descriptors
            .files
            .iter()
            .filter(|file| file.r#type == FdTypes::Pipe as i32 && plan.numbers.contains_key(&file.id))
            .filter_map(|file| file.pipe.as_deref())
            .filter(|end| end.pipe_id == pipe_id && plan.numbers.contains_key(&end.id))
            .collect();
        let made = pipe::rebuild(&ends, &self.contents(pipe_id))?;
        self.made.extend(ends.iter().map(|end| end.id).zip(made.into_iter().map(Arc::new)));
        Ok(())
    }

    fn make_fifo(&mut self, pipe_id: u32, files: &HashMap<u32, &'a FileEntry>, plan: &Plan) -> Result<()> {
        let mut ids = Vec::new();
        let mut opens = Vec::new();
        let mut path = None;
        for file in &self.descriptors.files {
            let Some(fifo) = file.fifo.as_deref().filter(|fifo| fifo.pipe_id == pipe_id) else { continue };
            if !plan.numbers.contains_key(&file.id) {
                continue;
            }
            let reg = fifo.regf_id.and_then(|id| files.get(&id)).and_then(|file| file.reg.as_deref());
            let reg = reg.ok_or_else(|| Error::state("named pipe", "it has no path"))?;
            ids.push(file.id);
            opens.push(reg.flags as i32);
            path.get_or_insert(&reg.name);
        }
        let path = path.ok_or_else(|| Error::state("named pipe", "nobody has it open"))?;
        let made = pipe::rebuild_fifo(path, &opens, &self.contents(pipe_id))?;
        self.made.extend(ids.into_iter().zip(made.into_iter().map(Arc::new)));
        Ok(())
    }

    fn make_unix(&mut self, file: &'a FileEntry, plan: &Plan, lacking: impl Fn() -> Error) -> Result<()> {
        let message = file.usk.as_deref().ok_or_else(lacking)?;
        let status = |made: &OwnedFd, flags| {
            event::set_status(made, flags).map_err(|source| Error::call("UNIX socket", "F_SETFL", source))
        };
        if message.peer == 0 && message.state != u32::from(ESTABLISHED) {
            let (made, socket_file) = unix_socket::rebuild_single(message)?;
            status(&made, message.flags)?;
            self.rebuilt.socket_files.extend(socket_file);
            self.made.insert(file.id, Arc::new(made));
            return Ok(());
        }
        let mut sockets = self.descriptors.files.iter().filter_map(|file| file.usk.as_deref());
        let peer = sockets.find(|other| message.peer != 0 && other.ino == message.peer && other.peer == message.ino);
        let peer = peer.filter(|peer| plan.numbers.contains_key(&peer.id) && peer.id != message.id);
        if message.peer != 0 && peer.is_none() {
            return Err(Error::state("UNIX socket", "its peer is not there"));
        }
        let content = |id: u32| {
            let of_socket = self.descriptors.sockets.iter();
            let of_socket =
                of_socket.filter(move |content| content.entry.as_ref().is_some_and(|entry| entry.id_for == id));
            of_socket.map(|content| content.data.as_slice()).collect()
        };
        let first = End { message, content: content(file.id) };
        let second = peer.map(|peer| End { message: peer, content: content(peer.id) });
        let (made, other) = unix_socket::rebuild_pair(&first, second.as_ref())?;
        status(&made, message.flags)?;
        self.made.insert(file.id, Arc::new(made));
        if let (Some(made), Some(peer)) = (other, peer) {
            status(&made, peer.flags)?;
            self.made.insert(peer.id, Arc::new(made));
        }
        Ok(())
    }
}

/// Says which descriptor an error is about.
fn in_context(error: Error, name: &str) -> Error {
    match error {
        Error::Call { resource, what, source } => {
            Error::Call { resource: format!("{name} ({resource})"), what, source }
        }
        Error::State { resource, text } => Error::State { resource: format!("{name} ({resource})"), text },
        other => other,
    }
}

/// Puts made files under their numbers in the stub.
struct Placement<'a> {
    courier: &'a mut Courier,
    plan: &'a Plan,
    stub: &'a mut Tracee,
}

impl Placement<'_> {
    /// Sends all files; returns the numbers they arrived under with their flags, in the plan's order, and the stub's clocks.
    fn hand_over(&mut self, made: &HashMap<u32, Arc<OwnedFd>>) -> Result<(Vec<(RawFd, u64)>, Clocks)> {
        let mut files = Vec::with_capacity(self.plan.order.len());
        for id in &self.plan.order {
            let file = made.get(id).ok_or_else(|| Error::state(format!("file {id}"), "it was not made"))?;
            files.push(file.as_fd());
        }
        let wanted: BTreeSet<RawFd> = self.plan.flags.keys().copied().collect();
        let mut batch = Batch::new();
        self.allow_numbers(&mut batch, &wanted);
        self.courier.make_way(&mut batch, &wanted);
        let mut clocks = Some(ClockQuestions::ask(&mut batch));
        let mut now = None;
        let mut numbers = Vec::with_capacity(files.len());
        let ids = self.plan.order.chunks(MAX_IN_MESSAGE);
        let mut messages = files.chunks(MAX_IN_MESSAGE).zip(ids).peekable();
        while now.is_none() || messages.peek().is_some() {
            let mut receptions = Vec::new();
            for (message, ids) in messages.by_ref().take(MAX_MESSAGES) {
                self.courier.send(message)?;
                // Most servers have all their connections alike.
                let flags =
                    if ids.iter().all(|&id| self.plan.flags(self.plan.lowest(id)) == 0) { 0 } else { CLOSE_ON_EXEC };
                receptions.push((self.courier.receive(&mut batch, message.len(), flags != 0), flags));
            }
            let outcome = self.stub.run(std::mem::take(&mut batch))?;
            now = now.or_else(|| clocks.take().map(|clocks| clocks.answer(&outcome)));
            for (reception, flags) in receptions {
                numbers.extend(Courier::received(&outcome, reception)?.into_iter().map(|number| (number, flags)));
            }
        }
        Ok((numbers, now.unwrap_or_default()))
    }

    /// Raises the stub's limit of open files where a number lies above it; its own limit is set later, as it was.
    fn allow_numbers(&self, batch: &mut Batch, wanted: &BTreeSet<RawFd>) {
        let highest = wanted.last().map_or(0, |fd| *fd as u64 + 2);
        let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
        if soft < highest && soft < hard {
            let limit = batch.data(&[hard, hard].map(u64::to_le_bytes).concat());
            let arguments = [0u64.into(), libc::RLIMIT_NOFILE.into(), limit.into(), 0u64.into()];
            batch.call("raising the limit of open files", libc::SYS_prlimit64, &arguments);
        }
    }

    fn place(
        &mut self,
        arrived: &[(RawFd, u64)],
        descriptors: &Descriptors,
        destination: &Destination<'_>,
        now: &Clocks,
    ) -> Result<()> {
        let mut batch = Batch::new();
        self.add_moves(&mut batch, arrived)?;
        let mut occupied = self.plan.flags.clone();
        occupied.insert(self.courier.number(), libc::O_CLOEXEC as u64);
        let spare = (0..).find(|fd| !occupied.contains_key(fd)).unwrap_or_default();
        for file in &descriptors.files {
            let Some(fd) = self.plan.numbers.get(&file.id).map(|numbers| numbers[0]) else { continue };
            if let Some(message) = &file.tfd {
                timer::set(&mut batch, fd, message, &destination.collected, now)?;
            }
            if let Some(message) = &file.epfd {
                epoll::watch_all(&mut batch, fd, message, &self.plan.numbers, &occupied, spare)?;
            }
        }
        self.stub.run(batch)?;
        Ok(())
    }

    fn add_moves(&self, batch: &mut Batch, arrived: &[(RawFd, u64)]) -> Result<()> {
        let flags = |fd: RawFd| self.plan.flags(fd);
        let dup3 = |batch: &mut Batch, from: RawFd, to: RawFd| {
            batch.call(format!("placing fd {to}"), libc::SYS_dup3, &[from.into(), to.into(), flags(to).into()]);
        };
        for (&id, &(from, has)) in self.plan.order.iter().zip(arrived).rev() {
            let to = self.plan.lowest(id);
            if from > to {
                return Err(Error::state(format!("fd {to}"), "the stub has descriptors that it should not have"));
            }
            if from != to {
                dup3(batch, from, to);
                batch.call("closing a number in passing", libc::SYS_close, &[from.into()]);
            } else if flags(to) != has {
                let arguments = [to.into(), libc::F_SETFD.into(), 0u64.into()];
                batch.call(format!("placing fd {to}"), libc::SYS_fcntl, &arguments);
            }
        }
        for numbers in self.plan.numbers.values() {
            for &other in &numbers[1..] {
                dup3(batch, numbers[0], other);
            }
        }
        Ok(())
    }
}
