//! Packets held back while nobody has their connection.

use std::net::IpAddr;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::capture::Capture;
use crate::deliver::Delivery;
use crate::error::{Error, Result};
use crate::flow::{Datagrams, Flow, Watched};
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

    /// Number of connections to the listeners that were asked for and answered, and that their clients have not finished
    /// (`SYN_RECV` in /proc/net/tcp, proc_pid_net(5)).
    #[must_use]
    pub fn half_open(&self) -> usize {
        const LOCAL: usize = 1;
        const STATE: usize = 3;
        const SYN_RECV: &str = "03";
        let is_ours = |line: &str| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            let port = columns.get(LOCAL).and_then(|local| local.rsplit_once(':'));
            let port = port.and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
            columns.get(STATE) == Some(&SYN_RECV) && self.watched.listeners.iter().any(|one| Some(one.port) == port)
        };
        let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
        let texts = self.namespace.inside(|| tables.map(|path| std::fs::read_to_string(path).unwrap_or_default()));
        let count = |text: &String| text.lines().filter(|line| is_ours(line)).count();
        texts.unwrap_or_default().iter().map(count).sum()
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

impl Drop for Hold {
    fn drop(&mut self) {
        if let Err(error) = self.let_go() {
            tracing::warn!(%error, "packets that were held back are left to be sent again");
        }
    }
}
