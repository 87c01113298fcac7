//! Packets held back while nobody has their connection.

use std::net::{IpAddr, SocketAddr};

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::capture::Capture;
use crate::deliver::Delivery;
use crate::error::{Error, Result};
use crate::flow::{Datagrams, Flow, Listener, Watched};
use crate::log::Log;
use crate::namespace::Namespace;
use crate::packet::{self, Packet};
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
}

impl Hold {
    /// Prepares to hold packets of `watched` back that arrive in a namespace; none is yet. `name` distinguishes it from others.
    ///
    /// # Errors
    /// When the kernel has no packet filter, or we may not change it.
    pub fn prepare(namespace: Namespace, name: &str, watched: Watched) -> Result<Self> {
        let socket = namespace.inside(|| netlink::open(NETLINK_NETFILTER))??;
        let hold = Self {
            name: format!("{}{name}", nftables::PREFIX),
            namespace,
            socket,
            watched,
            capture: None,
            stage: Stage::Prepared,
            log: None,
            holds_datagrams: false,
            fetched: Vec::new(),
            given_away: false,
        };
        hold.send("making a table", nftables::connections(&hold.name, hold.watched.flows.iter()))?;
        Ok(hold)
    }

    fn requests(&self) -> String {
        format!("{}-requests", self.name)
    }

    fn send(&self, what: &'static str, batch: nftables::Batch) -> Result<()> {
        let (bytes, sequences) = batch.finish();
        netlink::transact(&self.socket, &bytes, &sequences)
            .map_err(|source| Error::call("packet filter (nf_tables)", what, source))
    }

    /// Holds requests for new connections back from now on.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub fn hold_requests(&mut self) -> Result<()> {
        if self.stage < Stage::Requests {
            // N.B. before the filter takes effect: what arrives in between is seen twice, which TCP is used to.
            self.capture = Some(self.namespace.inside(Capture::begin)??);
            let listeners = self.watched.listeners.iter();
            self.send("holding requests back", nftables::hold_requests(&self.requests(), listeners))?;
            self.stage = Stage::Requests;
        }
        Ok(())
    }

    /// Holds everything back from now on, of the connections named before and of these.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub fn hold_everything<'a>(&mut self, flows: impl IntoIterator<Item = &'a Flow>) -> Result<()> {
        self.hold_requests()?;
        let new: Vec<Flow> = flows.into_iter().filter(|flow| self.watched.flows.insert(**flow)).copied().collect();
        if self.stage < Stage::Everything {
            self.send("holding packets back", nftables::hold_connections(&self.name, new.iter()))?;
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
        let mut packets = self.capture.as_mut().map_or(Ok(Vec::new()), |capture| capture.take(&self.watched))?;
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
                Some(Ownerless::Closing(flow)) if is_ours(&flow) => unfinished.closing += 1,
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

    /// The connections that are watched.
    pub fn flows(&self) -> impl Iterator<Item = &Flow> {
        self.watched.flows.iter()
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

    /// Says that the packets belong to another host now: they are not delivered here any more. What is sent to a group from now
    /// on reaches that host itself.
    pub fn give_away(&mut self) {
        self.given_away = true;
        match self.logged() {
            Ok(mut packets) => self.fetched.append(&mut packets),
            Err(error) => tracing::warn!(%error, "datagrams that arrived in the freeze are lost"),
        }
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
        if self.stage >= Stage::Requests {
            self.send("removing a table", nftables::remove(&self.requests()))?;
        }
        if self.holds_datagrams {
            self.send("removing a table", nftables::remove(&self.datagrams()))?;
        }
        self.send("removing a table", nftables::remove(&self.name))?;
        if self.given_away || self.stage == Stage::Prepared && !self.holds_datagrams {
            return Ok(());
        }
        let delivery = self.namespace.inside(Delivery::new)??;
        for packet in self.captured()? {
            delivery.deliver(packet);
        }
        Ok(())
    }
}

/// Connections that no descriptor leads to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unfinished {
    /// Those that were asked for and answered, and that their clients have not finished.
    pub half_open: Vec<HalfOpen>,
    /// Number of those that were closed, with something on the way that the peer has not acknowledged.
    pub closing: usize,
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
        for nonsense in ["", "1: x y 03 0:0 0 0", "1: 00:1 00:1 03 0:0 0 0", "  sl  local_address rem_address   st"] {
            assert_eq!(ownerless(nonsense), None);
        }
    }
}
