//! Connections alone: taken apart here and put together elsewhere, without the program that has them.
//!
//! A program hands over its own connections like this, over any way to the other host that it trusts. Packets that arrive
//! meanwhile are held back, so the peer sees a delay and nothing else; what is dropped before `give_away` goes on here.
//!
//! ```no_run
//! use godwit_network::{Delivery, Hold, Namespace};
//! use godwit_proto::{Message, wire};
//! use godwit_resources::descriptors::{Connections, Socket, put_together, take_apart, watched_by, watched_of};
//! use std::net::TcpStream;
//!
//! fn leave(stream: TcpStream, way: &mut impl Way) -> Result<(), Box<dyn std::error::Error>> {
//!     let sockets = [Socket { number: 0, file: stream.into() }];
//!     let mut hold = Hold::prepare(Namespace::current()?, "example", watched_by(&sockets)?)?;
//!     let mut connections = Connections::default();
//!     let state = take_apart(&sockets, &mut hold, &mut connections, 0)?;
//!     way.send(state.encode_to_vec());
//!     // Until here, whatever fails: what is dropped makes the connection go on where it was.
//!     way.wait_until_it_is_complete_there();
//!     hold.give_away();
//!     connections.give_away();
//!     way.let_it_live_there();
//!     connections.forget();
//!     hold.take()?.into_iter().for_each(|packet| way.send(packet));
//!     Ok(())
//! }
//!
//! fn arrive(way: &mut impl Way) -> Result<TcpStream, Box<dyn std::error::Error>> {
//!     let state = wire::Connections::decode(&*way.receive())?;
//!     let mut hold = Hold::prepare_for_arrival(Namespace::current()?, "example", watched_of(&state.sockets))?;
//!     hold.collect()?;
//!     let complete = put_together(&state)?;
//!     way.say_that_it_is_complete();
//!     let sockets = complete.wake()?;
//!     hold.deliver_here();
//!     Delivery::new()?.deliver([way.receive()]);
//!     Ok(sockets.into_iter().next().ok_or("there was none")?.into())
//! }
//! # trait Way {
//! #     fn send(&mut self, bytes: Vec<u8>);
//! #     fn receive(&mut self) -> Vec<u8>;
//! #     fn wait_until_it_is_complete_there(&mut self);
//! #     fn let_it_live_there(&mut self);
//! #     fn say_that_it_is_complete(&mut self);
//! # }
//! ```
//!
//! Needs `CAP_NET_ADMIN` and `CAP_NET_RAW`, as `TCP_REPAIR` (tcp(7)), nf_tables and packet(7) do.

use super::connection::{self, Candidate, Connections, Restored, Supply};
use super::early_connections::EarlyConnections;
use super::filter;
use super::inspect::{network_number, unshared_tables};
use super::kind::{examine_tcp, refuse, refuse_with};
use super::listener::{self, Inet};
use super::outside::holders;
use super::signed::{self, Signed};
use super::table::{Directory, Entry};
use crate::{Error, Obstacle, Result};
use godwit_kernel::Errno;
use godwit_kernel::process::pidfd_open;
use godwit_network::{Delivery, Flow, Hold, Namespace, Watched};
use godwit_proto::wire;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Most connections that are handed over together: as many as one message over a UNIX socket can have.
pub const MOST_CONNECTIONS: usize = godwit_kernel::rights::MOST;

/// A socket, and the number by which errors name it.
#[derive(Debug)]
pub struct Socket {
    /// Its number.
    pub number: i32,
    /// It itself.
    pub file: OwnedFd,
}

/// What was seen of connections that a running process has.
#[derive(Debug, Default)]
pub struct Seen {
    /// What stands in the way of handing them over.
    pub obstacles: Vec<Obstacle>,
    /// Their packets.
    pub watched: Watched,
    /// Addresses that the destination must have: `connection:10.0.0.1:80`.
    pub addresses: Vec<String>,
    /// Their sockets: number and inode.
    sockets: Vec<(i32, u64)>,
}

/// Looks at connections of a running process without touching it.
///
/// # Errors
/// When the process is gone or may not be looked at; obstacles are no error.
pub fn look_at_connections(pid: i32, numbers: &[i32]) -> Result<Seen> {
    let directory = Directory::open(pid)?;
    let mut seen = Seen { obstacles: unshared_tables(pid)?, ..Seen::default() };
    let mut links = BTreeSet::new();
    for &number in numbers {
        links.extend(directory.link(number)?.filter(|link| link.starts_with(b"socket:[")));
    }
    // N.B. before any is lent to this process.
    let outside = holders(&[pid], None, &links);
    let network = network_number(pid)?;
    let signed = Signed::list(&Namespace::of_process(pid)?)?;
    let pidfd = pidfd_open(pid).map_err(|source| Error::call(format!("process {pid}"), "pidfd_open", source))?;
    for &number in numbers {
        let Some(entry) = directory.entry(pidfd.as_fd(), number)? else {
            seen.obstacles.push(Obstacle::new(format!("fd {number}"), "the process has no such descriptor", ""));
            continue;
        };
        let looked = match outside.get(&entry.link) {
            Some(holder) => {
                let text = format!("process {}, {}, has this socket, too, and would lose it", holder.pid, holder.comm);
                refuse_with(&entry, &entry.target(), &text, "have it closed there".to_owned())
            }
            None => refuse_signed(&entry, &signed).and_then(|()| examine(&entry, network)),
        };
        match looked {
            Ok((flow, address)) if seen.watched.flows.insert(flow) => {
                seen.addresses.extend(Some(address).filter(|address| !seen.addresses.contains(address)));
                seen.sockets.push((number, entry.stat.st_ino));
            }
            Ok(_) => {
                let text = "it is the connection of another descriptor that was named";
                seen.obstacles.push(Obstacle::new(format!("fd {number}"), text, "name one of them"));
            }
            Err(Error::Obstacle(obstacle)) => seen.obstacles.push(obstacle),
            Err(error) => return Err(error),
        }
    }
    Ok(seen)
}

fn refuse_signed(entry: &Entry, signed: &Signed) -> Result<()> {
    match signed.by(entry) {
        Some(option) => refuse(entry, &format!("TCP connection {}", listener::ends(entry)), &signed::reason(option)),
        None => Ok(()),
    }
}

fn examine(entry: &Entry, network: u64) -> Result<(Flow, String)> {
    let (inet, flow) = connected(entry, network)?;
    filter::collect(entry)?;
    Ok((flow, inet.needed_address(entry).unwrap_or_default()))
}

/// A socket that has a connection.
fn connected(entry: &Entry, network: u64) -> Result<(Inet, Flow)> {
    let inet = match examine_tcp(entry, network, None)? {
        Some(inet) => inet,
        None => return refuse(entry, &entry.target(), "it is no TCP socket"),
    };
    if inet.is_mptcp() {
        let what = format!("MPTCP socket {}", listener::ends(entry));
        return refuse(entry, &what, "connections of MPTCP cannot be handed over");
    }
    match inet.peer {
        Some(peer) if !connection::is_asked_for(inet.state) => {
            let flow = Flow::new(inet.address, peer);
            Ok((inet, flow))
        }
        Some(_) => refuse(entry, &entry.target(), "its connection is only asked for, and nobody has answered"),
        None => refuse(entry, &entry.target(), "it has no connection"),
    }
}

impl Seen {
    /// Lends the sockets, of which the process must still have the same.
    ///
    /// # Errors
    /// [`Error::Obstacle`] when it has not.
    pub fn lend(&self, pid: i32) -> Result<Vec<Socket>> {
        let directory = Directory::open(pid)?;
        let pidfd = pidfd_open(pid).map_err(|source| Error::call(format!("process {pid}"), "pidfd_open", source))?;
        let lend = |&(number, inode): &(i32, u64)| {
            let entry = directory.entry(pidfd.as_fd(), number)?.filter(|entry| entry.stat.st_ino == inode);
            let gone = || Obstacle::new(format!("fd {number}"), "the process has closed it in this moment", "");
            let entry = entry.ok_or_else(|| Error::Obstacle(gone()))?;
            Ok(Socket { number, file: duplicate(&entry.file, number)? })
        };
        self.sockets.iter().map(lend).collect()
    }
}

/// The number of the network namespace that a socket is of: for who lends a socket it is where it is.
fn own_network(entry: &Entry) -> Result<u64> {
    match Namespace::cookie_of(entry.file.as_fd()) {
        // Before Linux 5.14 nobody can tell.
        Err(Errno::ENOPROTOOPT) => Ok(0),
        number => number.map_err(entry.error("SO_NETNS_COOKIE")),
    }
}

pub(super) fn entries(sockets: &[Socket]) -> Result<Vec<Entry>> {
    let entry = |socket: &Socket| Entry::of_socket(socket.number, duplicate(&socket.file, socket.number)?);
    sockets.iter().map(entry).collect()
}

fn duplicate(file: &OwnedFd, number: i32) -> Result<OwnedFd> {
    file.try_clone().map_err(|error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE));
        Error::call(format!("fd {number}"), "duplicating it", errno)
    })
}

/// The packets of these connections, for [`Hold::prepare`].
///
/// # Errors
/// [`Error::Obstacle`] when one is none that can be taken apart.
pub fn watched_by(sockets: &[Socket]) -> Result<Watched> {
    let signed = Signed::list(&Namespace::current()?)?;
    let flow = |entry: &Entry| {
        refuse_signed(entry, &signed)?;
        filter::collect(entry)?;
        Ok(connected(entry, own_network(entry)?)?.1)
    };
    let flows = entries(sockets)?.iter().map(flow).collect::<Result<HashSet<_>>>()?;
    Ok(Watched { flows, ..Watched::default() })
}

/// Takes connections apart: holds their packets back and yields all that [`put_together`] needs. The sockets are in repair mode
/// afterwards, and `connections` answers for them. Nobody else may use them.
///
/// # Errors
/// [`Error::Obstacle`] when one cannot be taken apart; dropping `connections` makes them go on as before.
pub fn take_apart(sockets: &[Socket], hold: &mut Hold, connections: &mut Connections) -> Result<wire::Connections> {
    let entries = entries(sockets)?;
    let looked = entries.iter().map(|entry| connected(entry, own_network(entry)?)).collect::<Result<Vec<_>>>()?;
    let flows: HashSet<Flow> = looked.iter().map(|(_, flow)| *flow).collect();
    hold.hold_everything(&flows)?;
    let candidates: Vec<Candidate<'_>> =
        (1..).zip(entries.iter().zip(looked)).map(|(id, (entry, (inet, _)))| Candidate { entry, inet, id }).collect();
    let (mut sockets, mut streams) = (Vec::new(), wire::Streams::default());
    connection::collect(&candidates, &EarlyConnections::default(), connections, &mut |mut some| {
        sockets.append(&mut some.sockets);
        streams.streams.append(&mut some.streams);
        streams.option_sets.append(&mut some.option_sets);
    })?;
    Ok(wire::Connections { sockets, streams: Some(streams) })
}

/// Connections that are complete and do not live yet. Dropped, they are gone without a word.
#[derive(Debug)]
#[must_use = "they are gone unless they are woken"]
pub struct Complete {
    sockets: Vec<Arc<OwnedFd>>,
    restored: Vec<Restored>,
}

/// Puts connections together that [`take_apart`] took apart. Their addresses need not be here yet.
///
/// # Errors
/// `EADDRINUSE` naming the connection when this host has it already; [`Error::State`] for what makes no sense.
pub fn put_together(state: &wire::Connections) -> Result<Complete> {
    let nothing = wire::Streams::default();
    let streams = state.streams.as_ref().unwrap_or(&nothing);
    let contents: HashMap<u32, &wire::StreamContent> =
        streams.streams.iter().map(|content| (content.id, content)).collect();
    if state.sockets.len() > MOST_CONNECTIONS {
        return Err(Error::state("connections", format!("{} are too many", state.sockets.len())));
    }
    let mut all = Vec::new();
    for socket in &state.sockets {
        let name = format!("connection {}", socket.id);
        if !listener::is_connection(socket) {
            return Err(Error::state(name, "it is none"));
        }
        let content = contents.get(&socket.id).ok_or_else(|| Error::state(&name, "nothing about its stream"))?;
        all.push((name, socket, *content));
    }
    let (sockets, restored) = Supply::new(streams.option_sets.clone()).rebuild(&all)?.into_iter().unzip();
    Ok(Complete { sockets, restored })
}

impl Complete {
    /// The sockets, in the order of the state: not to be used before they are woken.
    pub fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sockets.iter().map(|socket| socket.as_fd())
    }

    /// Both ends of each, its own first, in the same order.
    pub fn ends(&self) -> impl Iterator<Item = (SocketAddr, SocketAddr)> {
        self.restored.iter().map(Restored::flow).map(|flow| (flow.local, flow.remote))
    }

    /// Has them ask nothing of their peers when they are woken: somebody else does.
    pub(super) fn quietly(mut self) -> Self {
        self.restored.iter_mut().for_each(Restored::be_quiet);
        self
    }

    /// Lets the connections live, whose addresses have to be here now. One that cannot go on (its peer is gone, there is no way to
    /// it) is its owner's to find out: it would have been where it came from.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW`, before anything is woken.
    pub fn wake(self) -> Result<Vec<OwnedFd>> {
        let delivery = Delivery::new()?;
        for restored in &self.restored {
            // N.B. first: nobody holds back here what its peer says.
            restored.inform(&delivery);
            if let Err(error) = restored.wake(&delivery) {
                tracing::warn!(%error, "a connection does not go on");
            }
        }
        // N.B. what was restored has the sockets, too, until then.
        drop(self.restored);
        Ok(self.sockets.into_iter().filter_map(Arc::into_inner).collect())
    }
}
