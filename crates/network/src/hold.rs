//! Packets held back while nobody has their connection.

use std::net::{IpAddr, SocketAddr};

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::capture::Capture;
use crate::contents::tracking;
use crate::deliver::Delivery;
use crate::error::{Error, Result};
use crate::flow::{Datagrams, Flow, Listener, Watched};
use crate::log::Log;
use crate::namespace::Namespace;
use crate::nftables::{Place, ToListeners};
use crate::packet::{self, Arrival, Packet};
use crate::{netlink, nftables};

/// What is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Nothing yet.
    Prepared,
    /// Requests for new connections.
    Requests,
    /// All packets.
    Everything,
}

/// Holds packets back, in two steps. Dropped, it lets packets through again and delivers here what it has.
///
/// The tables belong to our netlink socket: the kernel removes them when it closes, however this program ends.
#[derive(Debug)]
pub struct Hold {
    name: String,
    /// Where the packets arrive.
    namespace: Namespace,
    socket: Socket,
    watched: Watched,
    /// From the first packet that is held back.
    capture: Option<Capture>,
    stage: Stage,
    /// Where datagrams come that are held back, if the kernel can do that.
    log: Option<Log>,
    holds_datagrams: bool,
    /// Datagrams that were fetched already.
    fetched: Vec<Packet>,
    /// Whether the packets belong to another host now.
    given_away: bool,
    /// Whether the connections are to live here.
    is_destination: bool,
    place: Place,
    /// Whether all packets to the listeners are held back, not only requests.
    follows: bool,
}

impl Hold {
    /// Prepares to hold packets of `watched` back, both those that arrive in a namespace and those that leave; none is yet. `name`
    /// distinguishes it from others.
    ///
    /// # Errors
    /// When the kernel has no packet filter, or we may not change it.
    pub fn prepare(namespace: Namespace, name: &str, watched: Watched) -> Result<Self> {
        Self::make(namespace, format!("{}{name}", nftables::PREFIX), watched, false)
    }

    /// As [`Hold::prepare`], at the host where the connections are to live: packets that arrive too early are kept from the
    /// kernel from now on, and from [`Hold::collect`] on they are not lost. They are delivered here only if it comes to that
    /// ([`Hold::deliver_here`]). Nothing that leaves is held back, for the connections begin to speak before it is over.
    ///
    /// # Errors
    /// As [`Hold::prepare`].
    pub fn prepare_for_arrival(namespace: Namespace, name: &str, watched: Watched) -> Result<Self> {
        let name = format!("{}{name}-arriving", nftables::PREFIX);
        let mut hold = Self::make(namespace, name, watched, true)?;
        hold.given_away = true;
        let listeners = hold.watched.listeners.iter();
        hold.send(
            "holding requests back",
            nftables::hold_listeners(&hold.requests(), listeners, ToListeners::Requests, hold.place),
        )?;
        hold.stage = Stage::Requests;
        hold.hold_everything(&[])?;
        Ok(hold)
    }

    fn make(namespace: Namespace, name: String, watched: Watched, is_destination: bool) -> Result<Self> {
        let (socket, place) = namespace.inside(|| (netlink::open(NETLINK_NETFILTER), place()))?;
        let socket = socket?;
        let hold = Self {
            name,
            namespace,
            socket,
            watched,
            capture: None,
            stage: Stage::Prepared,
            log: None,
            holds_datagrams: false,
            fetched: Vec::new(),
            given_away: false,
            is_destination,
            place,
            follows: false,
        };
        hold.send("making a table", nftables::connections(&hold.name, hold.watched.flows.iter()))?;
        Ok(hold)
    }

    fn requests(&self) -> String {
        format!("{}-requests", self.name)
    }

    fn following(&self) -> String {
        format!("{}-following", self.name)
    }

    fn send(&self, what: &'static str, batch: nftables::Batch) -> Result<()> {
        let (bytes, sequences) = batch.finish();
        netlink::transact(&self.socket, &bytes, &sequences)
            .map_err(|source| Error::call("packet filter (nf_tables)", what, source))
    }

    /// Collects what is held back from now on.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW`.
    pub fn collect(&mut self) -> Result<()> {
        if self.capture.is_none() {
            self.capture = Some(self.namespace.inside(Capture::begin)??);
        }
        Ok(())
    }

    /// Holds requests for new connections back from now on.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub fn hold_requests(&mut self) -> Result<()> {
        if self.stage < Stage::Requests {
            // N.B. before the filter takes effect: what arrives in between is seen twice, which TCP is used to.
            self.collect()?;
            let listeners = self.watched.listeners.iter();
            let batch = nftables::hold_listeners(&self.requests(), listeners, ToListeners::Requests, self.place);
            self.send("holding requests back", batch)?;
            self.stage = Stage::Requests;
        }
        Ok(())
    }

    /// Holds everything back from now on, of the connections named before and of these. Of what leaves only packets with the mark
    /// [`MARK`](crate::MARK) do: what was received can be acknowledged.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub fn hold_everything<'a>(&mut self, flows: impl IntoIterator<Item = &'a Flow>) -> Result<()> {
        self.hold_requests()?;
        let new: Vec<Flow> = flows.into_iter().filter(|flow| self.watched.flows.insert(**flow)).copied().collect();
        if self.stage < Stage::Everything {
            let batch = nftables::hold_connections(&self.name, new.iter(), self.is_destination, self.place);
            self.send("holding packets back", batch)?;
            self.stage = Stage::Everything;
        } else if !new.is_empty() {
            self.send("holding packets back", nftables::hold_more(&self.name, new.iter()))?;
        }
        Ok(())
    }

    /// Prepares to hold datagrams back: what is slow about it.
    ///
    /// # Errors
    /// When the packet filter has no log; all else can be held back nevertheless.
    pub fn prepare_datagrams(&mut self) -> Result<()> {
        self.log = Some(self.namespace.inside(Log::begin)??);
        Ok(())
    }

    fn datagrams(&self) -> String {
        format!("{}-datagrams", self.name)
    }

    /// Holds datagrams back from now on: each that arrives for a socket is either in its queue or held back. Returns whether it
    /// can be done.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub fn hold_datagrams(&mut self, datagrams: &Datagrams) -> Result<bool> {
        let Some(group) = self.log.as_ref().map(|log| log.group) else { return Ok(false) };
        if !self.holds_datagrams && !datagrams.is_empty() {
            self.send("holding datagrams back", nftables::hold_datagrams(&self.datagrams(), datagrams, group))?;
            self.holds_datagrams = true;
        }
        Ok(true)
    }

    /// Goes on holding datagrams back that are sent to addresses which this host is about to lose.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub fn hold_addresses(&mut self, addresses: &[IpAddr]) -> Result<()> {
        match self.log.as_ref().map(|log| log.group) {
            Some(group) if self.holds_datagrams && !addresses.is_empty() => {
                self.send("holding datagrams back", nftables::hold_addresses(&self.datagrams(), addresses, group))
            }
            _ => Ok(()),
        }
    }

    /// What the log has. N.B. read in the namespace, where interfaces have the names that go with their numbers.
    fn logged(&mut self) -> Result<Vec<Packet>> {
        let Some(log) = &mut self.log else { return Ok(Vec::new()) };
        self.namespace.inside(|| log.take())?
    }

    fn captured(&mut self) -> Result<Vec<Packet>> {
        let (watched, follows) = (&self.watched, self.follows);
        let wanted = |arrival: &Arrival| watched.has(&arrival.flow, arrival.opens || follows);
        let mut packets = self.capture.as_mut().map_or(Ok(Vec::new()), |capture| capture.take(wanted))?;
        packets.append(&mut self.fetched);
        packets.extend(self.logged()?);
        Ok(packets)
    }

    /// What the kernel has still to do with connections to the listeners by itself, without a descriptor of any process.
    #[must_use]
    pub fn unfinished(&self) -> Unfinished {
        let is_ours = |flow: &Flow| {
            let to = |address| self.watched.listeners.contains(&Listener { address, port: flow.local.port() });
            to(None) || to(Some(flow.local.ip()))
        };
        let mut unfinished = Unfinished::default();
        let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
        let texts = self.namespace.inside(|| tables.map(|path| std::fs::read_to_string(path).unwrap_or_default()));
        for line in texts.unwrap_or_default().iter().flat_map(|text| text.lines()) {
            match ownerless(line) {
                Some(Ownerless::HalfOpen(one)) if is_ours(&one.flow) => unfinished.half_open.push(one),
                Some(Ownerless::Closing(flow)) if is_ours(&flow) => unfinished.closing.push(flow),
                _ => {}
            }
        }
        unfinished
    }

    /// Has packets of such connections dropped along with those of the others: they cannot be finished here any more, and
    /// whoever has not heard the answer asks again, there.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub fn abandon(&mut self, half_open: &[HalfOpen]) -> Result<()> {
        if half_open.is_empty() {
            return Ok(());
        }
        let flows = half_open.iter().map(|one| &one.flow);
        self.send("abandoning requests", nftables::hold_more(&self.name, flows))
    }

    /// Has the packet filter forget what it tracks (nf_conntrack) of the connections, and of all to the `addresses`: to a filter that
    /// goes by what it saw of them before, their packets make no sense once they have lived elsewhere. Gives the number of those that
    /// were tracked.
    ///
    /// # Errors
    /// When the kernel does not tell what it tracks.
    pub fn forget_tracked(&self, addresses: &[IpAddr]) -> Result<usize> {
        let ours = |flow: &Flow| self.watched.flows.contains(flow) || addresses.contains(&flow.local.ip());
        tracking::forget(&self.socket, ours)
    }

    /// The connections that are watched.
    pub fn flows(&self) -> impl Iterator<Item = &Flow> {
        self.watched.flows.iter()
    }

    /// What is held back, or is to be.
    #[must_use]
    pub fn watched(&self) -> &Watched {
        &self.watched
    }

    /// Whether requests for new connections are among what is watched.
    #[must_use]
    pub fn has_listeners(&self) -> bool {
        !self.watched.listeners.is_empty()
    }

    /// Whether UDP sockets are among what is watched.
    #[must_use]
    pub fn has_datagrams(&self) -> bool {
        self.holds_datagrams || !self.watched.datagrams.is_empty()
    }

    /// Whether connections are among what is watched.
    #[must_use]
    pub fn has_connections(&self) -> bool {
        !self.watched.flows.is_empty()
    }

    /// Says that the connections live here now: lets their packets through, and delivers those that came before. Closing its sockets
    /// takes the kernel some 10 ms more: nothing for a thread that somebody waits for.
    pub fn deliver_here(mut self) {
        self.given_away = false;
    }

    /// Holds requests to these back, too.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub fn add_listeners(&mut self, listeners: impl IntoIterator<Item = Listener>) -> Result<()> {
        let new: Vec<Listener> =
            listeners.into_iter().filter(|listener| self.watched.listeners.insert(*listener)).collect();
        if self.stage >= Stage::Requests && !new.is_empty() {
            self.send("holding requests back", nftables::more_listeners(&self.requests(), new.iter()))?;
        }
        Ok(())
    }

    /// Holds back everything that arrives for the listeners from now on, whatever connection it belongs to: they live elsewhere,
    /// and so do connections that they accept there, whose packets may still come here.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub fn hold_all_to_listeners(&mut self) -> Result<()> {
        if !self.follows && self.has_listeners() {
            let listeners = self.watched.listeners.iter();
            let batch = nftables::hold_listeners(&self.following(), listeners, ToListeners::Everything, self.place);
            self.send("holding packets to listeners back", batch)?;
            self.follows = true;
        }
        Ok(())
    }

    /// Says that the packets belong to another host now: they are not delivered here any more. What is sent to a group from now
    /// on reaches that host itself.
    pub fn give_away(&mut self) {
        self.given_away = true;
        match self.logged() {
            Ok(mut packets) => self.fetched.append(&mut packets),
            Err(error) => tracing::warn!(%error, "datagrams that arrived in the freeze are lost"),
        }
    }

    /// Says that the packets belong to this host after all.
    pub fn take_back(&mut self) {
        self.given_away = false;
    }

    /// Takes the packets that arrived since the last time, to be delivered elsewhere, and not here any more. What was sent to
    /// many hosts is among them only if it came before it was said that packets belong to the other host.
    ///
    /// # Errors
    /// When they cannot be received.
    pub fn take(&mut self) -> Result<Vec<Packet>> {
        let before = std::mem::take(&mut self.fetched);
        let for_one = |packet: &Packet| !packet::read(&packet.bytes).is_some_and(|arrival| arrival.is_for_many());
        let was_given_away = std::mem::replace(&mut self.given_away, true);
        let mut packets = self.captured()?;
        if was_given_away {
            packets.retain(for_one);
        }
        packets.splice(0..0, before);
        Ok(packets)
    }

    fn let_go(&mut self) -> Result<()> {
        let started = std::time::Instant::now();
        // N.B. all at once: where connections live already, they hear nothing until it is done.
        let mut tables = vec![self.name.clone()];
        tables.extend((self.stage >= Stage::Requests).then(|| self.requests()));
        tables.extend(self.follows.then(|| self.following()));
        tables.extend(self.holds_datagrams.then(|| self.datagrams()));
        self.send("removing tables", nftables::remove(&tables))?;
        if self.given_away || self.stage == Stage::Prepared && !self.holds_datagrams {
            return Ok(());
        }
        let delivery = self.namespace.inside(Delivery::new)??;
        let (mut delivered, mut all) = (0, 0);
        for packet in self.captured()? {
            all += 1;
            delivered += u32::from(delivery.deliver(packet));
        }
        tracing::debug!(
            delivered,
            of = all,
            after_us = started.elapsed().as_micros() as u64,
            "packets that were held back"
        );
        Ok(())
    }
}

/// Where packets are kept from the kernel in the calling thread's network namespace.
///
/// A bridge may have the packet filter look at what comes in by its ports (`bridge-nf-call-iptables`, the default where the module
/// `br_netfilter` is loaded, as container engines do): what is dropped before routing is dropped there, and never reaches the
/// bridge's own interface, where it is collected.
fn place() -> Place {
    let is_on = |what: &str| {
        let path = format!("/proc/sys/net/bridge/bridge-nf-call-{what}");
        std::fs::read_to_string(path).is_ok_and(|value| value.trim() != "0")
    };
    if is_on("iptables") || is_on("ip6tables") { Place::AfterRouting } else { Place::BeforeRouting }
}

/// Connections that no descriptor leads to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unfinished {
    /// Those that were asked for and answered, and that their clients have not finished.
    pub half_open: Vec<HalfOpen>,
    /// Those that were closed, with something on the way that the peer has not acknowledged.
    pub closing: Vec<Flow>,
}

/// A connection that was asked for and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HalfOpen {
    flow: Flow,
    /// Whether the answer has been given more than once: it comes again after a second.
    pub is_repeated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ownerless {
    HalfOpen(HalfOpen),
    Closing(Flow),
}

/// Reads a line of /proc/net/tcp or tcp6 (proc_pid_net(5)) that is about a connection without an owner.
fn ownerless(line: &str) -> Option<Ownerless> {
    const SYN_RECV: &str = "03";
    const FIN_WAIT1: &str = "04";
    const LAST_ACK: &str = "09";
    const CLOSING: &str = "0B";
    let mut columns = line.split_whitespace().skip(1);
    let (local, remote, state) = (columns.next()?, columns.next()?, columns.next()?);
    if !matches!(state, SYN_RECV | FIN_WAIT1 | LAST_ACK | CLOSING) {
        return None;
    }
    let flow = Flow::new(end(local)?, end(remote)?);
    let repetitions = u32::from_str_radix(columns.nth(2)?, 16).ok()?;
    if state == SYN_RECV {
        return Some(Ownerless::HalfOpen(HalfOpen { flow, is_repeated: repetitions > 0 }));
    }
    let inode = columns.nth(2)?;
    (inode == "0").then_some(Ownerless::Closing(flow))
}

/// Reads an address, words of the host's order, and a port.
fn end(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    let ip = match address.len() {
        8 => IpAddr::from(word(0)?),
        32 => IpAddr::from(<[u8; 16]>::try_from([word(0)?, word(1)?, word(2)?, word(3)?].concat()).ok()?),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Lists connections that programs in the calling thread's network namespace have by one of these addresses, and that are not among
/// `known`, nor have come to a listening socket that is.
#[must_use]
pub fn others_at(addresses: &[IpAddr], known: &Watched) -> Vec<Flow> {
    let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
    let texts = tables.map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let flows = texts.iter().flat_map(|text| text.lines()).filter_map(owned);
    flows.filter(|flow| addresses.contains(&flow.local.ip()) && !known.has(flow, true)).collect()
}

/// Reads a line of the same tables that is about a connection with an owner.
fn owned(line: &str) -> Option<Flow> {
    const LISTENING: &str = "0A";
    let mut columns = line.split_whitespace().skip(1);
    let (local, remote, state) = (columns.next()?, columns.next()?, columns.next()?);
    let inode = columns.nth(5)?;
    (state != LISTENING && inode != "0").then_some(Flow::new(end(local)?, end(remote)?))
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Err(error) = self.let_go() {
            tracing::warn!(%error, "packets that were held back are left to be sent again");
        }
    }
}

/// Reads all lines of such a table.
pub(crate) fn read_table(text: &str) -> usize {
    text.lines().filter_map(ownerless).count() + text.lines().filter_map(owned).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_without_an_owner_are_found() {
        let line = "   7: 64004D0A:1838 03004D0A:B2A6 03 00000000:00000000 01:0000002A 00000001     0        0 0 1 0";
        let flow = Flow::new("10.77.0.100:6200".parse().unwrap(), "10.77.0.3:45734".parse().unwrap());
        let half_open = |is_repeated| Some(Ownerless::HalfOpen(HalfOpen { flow, is_repeated }));
        assert_eq!(ownerless(line), half_open(true));
        let line =
            "0: 0000000000000000FFFF000064004D0A:1838 0000000000000000FFFF000003004D0A:B2A6 03 0:0 01:2A 00000000 0";
        assert_eq!(ownerless(line), half_open(false));
        assert_eq!(ownerless(&line.replace(" 03 ", " 01 ")), None);
        let line = "   2: 64004D0A:1838 03004D0A:B2A6 04 00000001:00000000 01:0000002A 00000000     0        0 0 1 0";
        assert_eq!(ownerless(line), Some(Ownerless::Closing(flow)));
        assert_eq!(ownerless(&line.replace("0        0 0 1 0", "0        0 7 1 0")), None);
        assert_eq!(owned(line), None);
        assert_eq!(owned(&line.replace("0        0 0 1 0", "0        0 7 1 0")), Some(flow));
        assert_eq!(owned(&line.replace(" 04 ", " 0A ").replace("0        0 0 1 0", "0        0 7 1 0")), None);
        for nonsense in ["", "1: x y 03 0:0 0 0", "1: 00:1 00:1 03 0:0 0 0", "  sl  local_address rem_address   st"] {
            assert_eq!(ownerless(nonsense), None);
            assert_eq!(owned(nonsense), None);
        }
    }
}
