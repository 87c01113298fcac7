//! Packets held back while nobody has their connection.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::capture::Capture;
use crate::deliver::Delivery;
use crate::error::{Error, Result};
use crate::flow::{Datagrams, Flow, Listener, Watched};
use crate::log::Log;
use crate::namespace::Namespace;
use crate::nftables::{Place, ToListeners};
use crate::packet::{self, Arrival, Packet};
use crate::{net_table, netlink, nftables, tcp_table, turn_away};

/// A client that hears nothing asks again after a second.
const SOONER_THAN_ASKED_AGAIN: Duration = Duration::from_millis(500);

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
    capture: Option<Capture>,
    /// Whether packets are collected.
    collects: bool,
    /// Where requests come that are held back, if the kernel can do that: those and no others.
    requests_log: Option<Log>,
    /// When requests were taken: one that is logged may be seen by the packet socket, too.
    opened: HashMap<Flow, Instant>,
    /// Whether there are requests that nobody waits for any more.
    abandons: bool,
    stage: Stage,
    /// Where datagrams come that are held back, if the kernel can do that.
    log: Option<Log>,
    holds_datagrams: bool,
    /// Datagrams that were fetched already.
    fetched: Vec<Packet>,
    /// Whether the packets belong to another host now.
    given_away: bool,
    /// Whether those that it is delivered to are running.
    receivers_run: bool,
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
        hold.send("holding requests back", hold.to_hold_requests(None))?;
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
            collects: false,
            requests_log: None,
            opened: HashMap::new(),
            abandons: false,
            stage: Stage::Prepared,
            log: None,
            holds_datagrams: false,
            fetched: Vec::new(),
            given_away: false,
            receivers_run: false,
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
        if !self.collects {
            self.prepare_capture()?.begin()?;
            self.collects = true;
        }
        Ok(())
    }

    fn prepare_capture(&mut self) -> Result<&Capture> {
        Ok(match &mut self.capture {
            Some(capture) => capture,
            none => none.insert(self.namespace.inside(Capture::prepare)??),
        })
    }

    /// Holds requests for new connections back from now on.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub fn hold_requests(&mut self) -> Result<()> {
        if self.stage < Stage::Requests {
            self.prepare_capture()?;
            if !self.hold_logged_requests() {
                // N.B. before the filter takes effect: what arrives in between is seen twice.
                self.collect()?;
                self.send("holding requests back", self.to_hold_requests(None))?;
            }
            self.stage = Stage::Requests;
        }
        Ok(())
    }

    fn to_hold_requests(&self, group: Option<u16>) -> nftables::Batch {
        let listeners = self.watched.listeners.iter();
        nftables::hold_listeners(&self.requests(), listeners, ToListeners::Requests { group }, self.place)
    }

    /// Holds requests back by a filter that logs them: of each it is known then which kernel has seen it. Returns whether it can be done.
    fn hold_logged_requests(&mut self) -> bool {
        let begun = self.namespace.inside(Log::begin).and_then(|begun| begun);
        let held = begun.and_then(|log| {
            self.send("logging requests", self.to_hold_requests(Some(log.group)))?;
            Ok(log)
        });
        match held {
            Ok(log) => self.requests_log = Some(log),
            Err(error) => tracing::debug!(%error, "requests that are held back are told by when they come"),
        }
        self.requests_log.is_some()
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
            if !self.is_destination {
                // N.B. before the filter takes effect: what arrives in between is seen twice, which TCP is used to.
                self.collect()?;
            }
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
        let requests =
            self.requests_log.as_mut().map_or(Ok(Vec::new()), |log| self.namespace.inside(|| log.take())?)?;
        let (watched, follows, opened) = (&self.watched, self.follows, &mut self.opened);
        let now = Instant::now();
        let mut is_new = |flow: &Flow| {
            opened.insert(*flow, now).is_none_or(|before| now.duration_since(before) >= SOONER_THAN_ASKED_AGAIN)
        };
        let mut wanted = |arrival: &Arrival| match arrival.opens {
            // N.B. one whose answer was heard after all, or that is made already, must not be made anew.
            true => !watched.flows.contains(&arrival.flow) && watched.takes(&arrival.flow) && is_new(&arrival.flow),
            false => watched.has(&arrival.flow, follows),
        };
        let mut packets = requests;
        packets.retain(|packet| packet::read(&packet.bytes).as_ref().is_some_and(&mut wanted));
        packets.append(&mut self.capture.as_mut().map_or(Ok(Vec::new()), |capture| capture.take(&mut wanted))?);
        packets.append(&mut self.fetched);
        packets.extend(self.logged()?);
        Ok(packets)
    }

    /// What the kernel has still to do with connections to the listeners by itself, without a descriptor of any process.
    #[must_use]
    pub fn unfinished(&self) -> Unfinished {
        let mut unfinished = Unfinished::default();
        for one in self.ownerless(HALF_OPEN | CLOSING) {
            match one {
                Ownerless::HalfOpen(one) => unfinished.half_open.push(one),
                Ownerless::Closing(flow) => unfinished.closing.push(flow),
            }
        }
        unfinished
    }

    /// Connections to the listeners that were closed, with something on the way that the peer has not acknowledged.
    #[must_use]
    pub fn closing(&self) -> Vec<Flow> {
        let flow = |one| match one {
            Ownerless::Closing(flow) => Some(flow),
            Ownerless::HalfOpen(_) => None,
        };
        self.ownerless(CLOSING).into_iter().filter_map(flow).collect()
    }

    fn ownerless(&self, states: u32) -> Vec<Ownerless> {
        let lines = self.namespace.inside(|| tcp_table::read(states)).unwrap_or_default();
        let found = lines.iter().filter_map(ownerless);
        found.filter(|one| self.watched.takes(one.flow())).collect()
    }

    /// Ends the connections to the listeners that are complete and that no program has accepted; their peers hear of it. Where there are
    /// others than `own`, which wait for another program at the same address, none is. Gives how many were.
    ///
    /// # Errors
    /// Where the kernel cannot do that.
    pub fn turn_away_waiting(&self, own: u32) -> Result<usize> {
        const ESTABLISHED: u8 = 1;
        const CLOSE_WAIT: u8 = 8;
        self.namespace.inside(|| {
            let lines = tcp_table::read(1 << ESTABLISHED | 1 << CLOSE_WAIT).into_iter().filter(|line| line.inode == 0);
            let flows = lines.map(|line| Flow::new(line.local, line.remote)).filter(|flow| self.watched.takes(flow));
            let flows: Vec<Flow> = flows.collect();
            if flows.len() == own as usize { turn_away::reset(&flows) } else { Ok(0) }
        })?
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
        self.abandons = true;
        let flows = half_open.iter().map(|one| &one.flow);
        self.send("abandoning requests", nftables::hold_more(&self.name, flows))
    }

    /// Whether there are requests that were abandoned.
    #[must_use]
    pub fn abandons(&self) -> bool {
        self.abandons
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
        self.receivers_run = true;
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
        let flows = self.watched.flows.clone();
        let mut delivery = self.namespace.inside(|| Ok(Delivery::new()?.knowing(flows)))??;
        if self.receivers_run {
            delivery = delivery.patiently();
        }
        let packets = self.captured()?;
        let all = packets.len();
        let delivered = delivery.deliver(packets);
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

impl Unfinished {
    /// Whether a client that needs no longer than `to_answer` may be about to finish a request.
    #[must_use]
    pub fn is_any_on_the_way(&self, to_answer: Duration) -> bool {
        self.half_open.iter().any(|one| one.since_answer < to_answer)
    }
}

/// A connection that was asked for and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HalfOpen {
    flow: Flow,
    /// Since it was answered last, to some hundredths of a second: an answer that is not heard is given again after a second.
    pub since_answer: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ownerless {
    HalfOpen(HalfOpen),
    Closing(Flow),
}

impl Ownerless {
    fn flow(&self) -> &Flow {
        match self {
            Self::HalfOpen(one) => &one.flow,
            Self::Closing(flow) => flow,
        }
    }
}

/// States (tcp_states.h) of connections that were asked for.
const SYN_RECV: u8 = 3;
const HALF_OPEN: u32 = 1 << SYN_RECV;
/// Of those that were closed here and not acknowledged.
const FIN_WAIT1: u8 = 4;
const LAST_ACK: u8 = 9;
const BOTH_CLOSING: u8 = 11;
const CLOSING: u32 = 1 << FIN_WAIT1 | 1 << LAST_ACK | 1 << BOTH_CLOSING;

/// A connection without an owner, if that is what a line is about.
fn ownerless(line: &net_table::Line) -> Option<Ownerless> {
    /// Until an answer is given again; each time twice as long.
    const FIRST_TIMEOUT: Duration = Duration::from_secs(1);
    const MOST_TIMEOUTS: u32 = 8;
    let flow = Flow::new(line.local, line.remote);
    match line.state {
        SYN_RECV => {
            let timeout = |repetitions: u32| FIRST_TIMEOUT * 2u32.pow(repetitions);
            // N.B. not every time that has run out is counted: an answer may not be given again while the program wants data first.
            let counted = line.repetitions.min(MOST_TIMEOUTS);
            let timeouts = (counted..MOST_TIMEOUTS).map(timeout).find(|timeout| *timeout >= line.expires_in);
            let timeout = timeouts.unwrap_or(timeout(MOST_TIMEOUTS));
            Some(Ownerless::HalfOpen(HalfOpen { flow, since_answer: timeout.saturating_sub(line.expires_in) }))
        }
        FIN_WAIT1 | LAST_ACK | BOTH_CLOSING => (line.inode == 0).then_some(Ownerless::Closing(flow)),
        _ => None,
    }
}

/// Lists connections that programs in the calling thread's network namespace have by one of these addresses, and that are not among
/// `known`, nor have come to a listening socket that is.
#[must_use]
pub fn others_at(addresses: &[IpAddr], known: &Watched) -> Vec<Flow> {
    let flows = tcp_table::read(tcp_table::ALL).into_iter().filter_map(|line| owned(&line));
    flows.filter(|flow| addresses.contains(&flow.local.ip()) && !known.has(flow, true)).collect()
}

/// A connection with an owner, if that is what a line is about.
fn owned(line: &net_table::Line) -> Option<Flow> {
    const LISTENING: u8 = 10;
    (line.state != LISTENING && line.inode != 0).then_some(Flow::new(line.local, line.remote))
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Err(error) = self.let_go() {
            tracing::warn!(%error, "packets that were held back are left to be sent again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_without_an_owner_are_found() {
        let read = |text: &str| net_table::parse(text).unwrap();
        let line = "   7: 64004D0A:1838 03004D0A:B2A6 03 00000000:00000000 01:0000002A 00000000     0        0 0 1 0";
        let flow = Flow::new("10.77.0.100:6200".parse().unwrap(), "10.77.0.3:45734".parse().unwrap());
        let half_open = |milliseconds| {
            Some(Ownerless::HalfOpen(HalfOpen { flow, since_answer: Duration::from_millis(milliseconds) }))
        };
        assert_eq!(ownerless(&read(line)), half_open(580));
        assert_eq!(ownerless(&read(&line.replace("2A 00000000", "2A 00000001"))), half_open(1580));
        // Whatever the kernel may count one day.
        assert_eq!(ownerless(&read(&line.replace("2A 00000000", "FFFF 00000000"))), half_open(0));
        assert_eq!(ownerless(&read(&line.replace("2A 00000000", "2A FFFFFFFF"))), half_open(255_580));
        let mapped = line.replace("64004D0A", "0000000000000000FFFF000064004D0A");
        let mapped = mapped.replace("03004D0A", "0000000000000000FFFF000003004D0A");
        assert_eq!(ownerless(&read(&mapped)), half_open(580));
        assert_eq!(ownerless(&read(&line.replace(" 03 ", " 01 "))), None);
        let line = "   2: 64004D0A:1838 03004D0A:B2A6 04 00000001:00000000 01:0000002A 00000000     0        0 0 1 0";
        let with_owner = line.replace("0        0 0 1 0", "0        0 7 1 0");
        assert_eq!(ownerless(&read(line)), Some(Ownerless::Closing(flow)));
        assert_eq!(ownerless(&read(&with_owner)), None);
        assert_eq!(owned(&read(line)), None);
        assert_eq!(owned(&read(&with_owner)), Some(flow));
        assert_eq!(owned(&read(&with_owner.replace(" 04 ", " 0A "))), None);
    }
}
