//! Connections that the packet filter tracks (nf_conntrack): with them, rules that know established connections and
//! translated addresses go on to fit.

mod entry;

use std::collections::HashSet;
use std::net::IpAddr;

use godwit_kernel::Errno;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::address::addresses;
use crate::attribute::find;
use crate::error::{Error, Result};
use crate::flow::{Flow, Listener, Watched};
use crate::namespace::Namespace;
use crate::translation::Translation;
use crate::{netlink, tcp_table};
use entry::{Entry, HEADER, Key, established};

const SUBSYSTEM: u16 = 1 << 8;
const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const GET_STATISTICS: u16 = SUBSYSTEM | 5;

/// Lists what is tracked.
pub(crate) fn read(socket: &Socket) -> Result<Vec<Vec<u8>>> {
    // N.B. the list is made by going through the table of all namespaces, which takes milliseconds; counting does not.
    if count(socket) == Some(0) {
        return Ok(Vec::new());
    }
    match netlink::list(socket, GET, &[0; HEADER]) {
        Ok(told) => Ok(told.into_iter().filter(|told| told.kind == NEW).map(|told| told.content).collect()),
        // A kernel that tracks nothing.
        Err(Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EINVAL) => Ok(Vec::new()),
        Err(source) => Err(Error::call("tracked connections", "listing them", source)),
    }
}

/// Number of connections that a namespace tracks; none where the kernel cannot do that.
pub(crate) fn count(socket: &Socket) -> Option<u32> {
    const ENTRIES: u16 = 1;
    let answer = netlink::ask_one(socket, GET_STATISTICS, &[0; HEADER]).ok()?;
    find(answer.content.get(HEADER..)?, ENTRIES)?.value.try_into().ok().map(u32::from_be_bytes)
}

/// Connections of which what is tracked was told, and will not change as long as they live; or that are not tracked.
#[derive(Debug, Default)]
pub(crate) struct Settled(HashSet<Key>);

impl Settled {
    pub(crate) fn learn(&mut self, content: &[u8]) {
        if let Some(entry) = Entry::read(content).filter(Entry::is_settled) {
            self.0.extend(entry.key_behind());
        }
    }

    fn has(&self, key: Key) -> bool {
        self.0.contains(&key) || self.0.contains(&key.turned())
    }

    /// Asks what is tracked of connections that are not settled.
    fn ask(&mut self, socket: &Socket, keys: impl Iterator<Item = Key>) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        for key in keys {
            if self.has(key) {
                continue;
            }
            match netlink::ask_one(socket, GET, &key.question().0) {
                Ok(told) if told.kind == NEW => {
                    self.learn(&told.content);
                    found.push(told.content);
                }
                // One of TCP that is not tracked will not be: asking once more costs the freeze something.
                Err(Errno::ENOENT) if key.is_tcp => drop(self.0.insert(key)),
                _ => {}
            }
        }
        found
    }
}

/// Asks what is tracked of TCP connections that are not settled.
pub(crate) fn ask<'a>(socket: &Socket, settled: &mut Settled, flows: impl Iterator<Item = &'a Flow>) -> Vec<Vec<u8>> {
    settled.ask(socket, flows.copied().map(Key::tcp))
}

/// Has a namespace track these; what it knows of one already is replaced. One that is not taken is found again by its next packet,
/// or not: the number of those is told.
pub(crate) fn make(socket: &Socket, tracked: &[Vec<u8>]) {
    let entries: Vec<Entry<'_>> = tracked.iter().filter_map(|content| Entry::read(content)).collect();
    let messages: Vec<Vec<u8>> = entries.iter().map(Entry::message).collect();
    let displaced = |at: usize| entries[at].displacement();
    let taken = replace(socket, &messages, displaced).iter().filter(|taken| **taken).count();
    report(tracked.len() - taken, tracked.len());
}

fn report(failed: usize, of: usize) {
    if failed > 0 {
        tracing::warn!(failed, of, "tracked connections that this host does not take");
    }
}

/// Has a namespace track what messages tell, instead of what it tracks in their place. Says of each whether it does.
fn replace(socket: &Socket, messages: &[Vec<u8>], displaced: impl Fn(usize) -> Vec<u8>) -> Vec<bool> {
    let make = |messages: &[Vec<u8>]| netlink::tell_all(socket, NEW, NLM_F_CREATE | NLM_F_EXCL, messages);
    let mut made = make(messages);
    let known: Vec<usize> = (0..messages.len()).filter(|&at| made[at] == Err(Errno::EEXIST)).collect();
    let old: Vec<Vec<u8>> = known.iter().map(|&at| displaced(at)).collect();
    netlink::tell_all(socket, DELETE, 0, &old);
    let again: Vec<Vec<u8>> = known.iter().map(|&at| messages[at].clone()).collect();
    for (at, result) in known.into_iter().zip(make(&again)) {
        made[at] = result;
    }
    for errno in made.iter().filter_map(|result| result.err()) {
        tracing::debug!(%errno, "a tracked connection is not taken");
    }
    made.iter().map(Result::is_ok).collect()
}

/// What of a namespace's tracked connections goes with sockets that leave it or come to it, by addresses that other sockets there have,
/// too. What is made here is forgotten again unless its connection has come.
#[derive(Debug)]
pub struct Tracking {
    namespace: Namespace,
    socket: Socket,
    settled: Settled,
    /// Whether all was listed once, and whether that found some that are not found by their ends.
    is_listed: bool,
    is_worth_listing: bool,
    /// Those that were told of, or made up.
    known: HashSet<Key>,
    made: HashSet<Key>,
    have_come: bool,
}

impl Tracking {
    /// Prepares to ask and tell.
    ///
    /// # Errors
    /// When there is no netlink(7) socket to be had.
    pub fn of(namespace: Namespace) -> Result<Self> {
        let socket = namespace.inside(|| netlink::open(NETLINK_NETFILTER))??;
        Ok(Self {
            namespace,
            socket,
            settled: Settled::default(),
            is_listed: false,
            is_worth_listing: false,
            known: HashSet::new(),
            made: HashSet::new(),
            have_come: false,
        })
    }

    /// What is tracked of these sockets and was not told before, or may have changed since, under the addresses that they will have. What
    /// unconnected UDP sockets talk to is only looked at the first time, which takes milliseconds, and longer the more is tracked.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn leaving(&mut self, watched: &Watched, addresses: &Translation) -> Result<Vec<Vec<u8>>> {
        if count(&self.socket).is_none_or(|tracked| tracked == 0) {
            return Ok(Vec::new());
        }
        let flows = watched.flows.iter().copied().map(Key::tcp);
        let keys = flows.chain(watched.datagrams.flows.iter().copied().map(Key::udp));
        let asked = keys.clone().filter(|key| !self.settled.has(*key)).count();
        let mut found = self.settled.ask(&self.socket, keys);
        // Those in a zone, and those that were called by another port, are not found by their ends.
        let is_first = !std::mem::replace(&mut self.is_listed, true);
        let lacks_some = found.len() < asked;
        if is_first && !watched.datagrams.ports.is_empty() || lacks_some && (is_first || self.is_worth_listing) {
            let key_of = |content: &Vec<u8>| Entry::read(content).and_then(|entry| entry.key_behind());
            let known: HashSet<Key> = found.iter().filter_map(key_of).flat_map(|key| [key, key.turned()]).collect();
            let is_ours = |key: Key| !known.contains(&key) && (is_of(key, watched) || is_of(key.turned(), watched));
            let before = found.len();
            found.extend(read(&self.socket)?.into_iter().filter(|content| key_of(content).is_some_and(is_ours)));
            let is_tcp = |content: &Vec<u8>| key_of(content).is_some_and(|key| key.is_tcp);
            self.is_worth_listing |= found[before..].iter().any(is_tcp);
        }
        if addresses.is_empty() {
            return Ok(found);
        }
        // N.B. what is translated by the filter reads differently afterwards; of such a one this gives nothing.
        let elsewhere = |content: &Vec<u8>| Entry::read(content)?.message_elsewhere(addresses);
        Ok(found.iter().filter_map(elsewhere).collect())
    }

    /// Tracks what was tracked of these sockets where they come from, and their connections as established ones where nothing was told of
    /// them; nothing if this namespace tracks none. What is told of others is left out.
    ///
    /// # Errors
    /// When the addresses of the namespace cannot be listed.
    pub fn arriving(&mut self, watched: &Watched, told: &[Vec<u8>], coming: &[IpAddr]) -> Result<()> {
        let is_known = told.is_empty() && watched.flows.iter().all(|flow| self.known.contains(&Key::tcp(*flow)));
        if is_known || count(&self.socket).is_none_or(|tracked| tracked == 0) {
            return Ok(());
        }
        let (here, timeout) = self.namespace.inside(|| (addresses(), timeout_of_established()))?;
        let mut here = here?;
        here.extend(coming);
        let mut keys = Vec::new();
        let (mut messages, mut displaced) = (Vec::new(), Vec::new());
        for entry in told.iter().filter_map(|content| Entry::read(content)) {
            let is_one = |key: &Key| here.contains(&key.flow.local.ip()) && is_of(*key, watched);
            // What was called must be this host's, too: it is not to be had by who has the connection alone.
            let is_here = entry.key().is_some() || entry.called().is_some_and(|address| here.contains(&address));
            let key = entry.key_behind().filter(|_| is_here);
            let key = key.and_then(|key| [key, key.turned()].into_iter().find(is_one));
            if let Some((key, message)) = key.zip(entry.message_elsewhere(&Translation::default())) {
                keys.push(key);
                messages.push(message);
                displaced.push(entry.displacement());
            }
        }
        self.known.extend(&keys);
        for flow in &watched.flows {
            if self.known.insert(Key::tcp(*flow)) {
                keys.push(Key::tcp(*flow));
                messages.push(established(*flow, watched.takes(flow), timeout));
                displaced.push(Key::tcp(*flow).question().0);
            }
        }
        let taken = replace(&self.socket, &messages, |at| displaced[at].clone());
        self.made.extend(keys.iter().zip(&taken).filter(|(_, taken)| **taken).map(|(key, _)| *key));
        tracing::debug!(told = told.len(), tracked = self.made.len(), "tracked connections");
        report(taken.iter().filter(|taken| !**taken).count(), taken.len());
        Ok(())
    }

    /// Says that the sockets are here.
    pub fn have_come(&mut self) {
        self.have_come = true;
    }

    /// Has the namespace forget what it tracks of TCP connections that are `ours`, whichever end has called: to a filter that goes by what
    /// it saw of them before, their packets make no sense once they have lived elsewhere. Where addresses or ports are translated nothing
    /// is forgotten: that is somebody else's business.
    ///
    /// # Errors
    /// When the kernel does not tell what it tracks.
    pub fn forget(&self, ours: impl Fn(&Flow) -> bool) -> Result<()> {
        let is_ours = |key: Key| key.is_tcp && (ours(&key.flow) || ours(&key.turned().flow));
        self.remove(|entry| entry.key().is_some_and(is_ours))
    }

    fn remove(&self, is_meant: impl Fn(&Entry<'_>) -> bool) -> Result<()> {
        let tracked = read(&self.socket)?;
        let meant = tracked.iter().filter_map(|content| Entry::read(content)).filter(is_meant);
        let messages: Vec<Vec<u8>> = meant.map(|entry| entry.removal()).collect();
        for result in netlink::tell_all(&self.socket, DELETE, 0, &messages) {
            match result {
                // Or it has ended by itself.
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(source) => return Err(Error::call("tracked connections", "forgetting one", source)),
            }
        }
        Ok(())
    }

    /// Has forgotten what was made for connections that have not come, or have ended before.
    fn tidy(&self) -> Result<()> {
        if self.made.is_empty() {
            return Ok(());
        }
        let live: HashSet<Flow> = if self.have_come {
            let lines = self.namespace.inside(|| tcp_table::read(tcp_table::ALL))?;
            lines.iter().map(|line| Flow::new(line.local, line.remote)).collect()
        } else {
            HashSet::new()
        };
        let stays = |key: &Key| if key.is_tcp { live.contains(&key.flow) } else { self.have_come };
        let over: HashSet<Key> = self.made.iter().filter(|key| !stays(key)).copied().collect();
        if over.is_empty() {
            return Ok(());
        }
        let is_over = |key: Key| over.contains(&key) || over.contains(&key.turned());
        self.remove(|entry| entry.key_behind().is_some_and(is_over))
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        if let Err(error) = self.tidy() {
            tracing::warn!(%error, "connections are tracked that are not here, until their time is over");
        }
    }
}

/// Whether some sockets have it: a connection, or datagrams.
fn is_of(key: Key, watched: &Watched) -> bool {
    match key.is_tcp {
        true => watched.flows.contains(&key.flow),
        false => watched.datagrams.flows.contains(&key.flow) || is_of_unconnected(key, watched),
    }
}

/// Whether it is what an unconnected UDP socket talks to, in either direction.
fn is_of_unconnected(key: Key, watched: &Watched) -> bool {
    let takes = |flow: &Flow| {
        let to = |address| watched.datagrams.ports.contains(&Listener { address, port: flow.local.port() });
        to(None) || to(Some(flow.local.ip()))
    };
    !key.is_tcp && (takes(&key.flow) || takes(&key.turned().flow))
}

/// How long an established connection is tracked, in seconds, in the calling thread's network namespace.
fn timeout_of_established() -> u32 {
    const USUAL: u32 = 5 * 24 * 3600;
    let path = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(USUAL)
}

/// Reads what is said of a tracked connection, and changes nothing: for [`crate::decoders`]. Gives the length of the message that has
/// another kernel track it.
pub(crate) fn look_through(content: &[u8]) -> Option<usize> {
    let entry = Entry::read(content)?;
    let elsewhere = entry.message_elsewhere(&Translation::default()).map_or(0, |message| message.len());
    Some(entry.message().len() + elsewhere + usize::from(entry.key().is_some() || entry.key_behind().is_some()))
}
