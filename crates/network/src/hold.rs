//! Packets held back while nobody has their connection.

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::capture::Capture;
use crate::deliver::Delivery;
use crate::error::{Error, Result};
use crate::flow::{Flow, Listener, Watched};
use crate::namespace::Namespace;
use crate::nftables::{ToListeners, Ways};
use crate::packet::Arrival;
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
    /// Whether the packets belong to another host now.
    given_away: bool,
    ways: Ways,
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
        Self::make(namespace, format!("{}{name}", nftables::PREFIX), watched, Ways::Both)
    }

    /// As [`Hold::prepare`], at the host where the connections are to live: packets that arrive too early are kept from the
    /// kernel from now on, and from [`Hold::collect`] on they are not lost. They are delivered here only if it comes to that
    /// ([`Hold::deliver_here`]). Nothing that leaves is held back, for the connections begin to speak before it is over.
    ///
    /// # Errors
    /// As [`Hold::prepare`].
    pub fn prepare_for_arrival(namespace: Namespace, name: &str, watched: Watched) -> Result<Self> {
        let name = format!("{}{name}-arriving", nftables::PREFIX);
        let mut hold = Self::make(namespace, name, watched, Ways::Arriving)?;
        hold.given_away = true;
        let listeners = hold.watched.listeners.iter();
        hold.send(
            "holding requests back",
            nftables::hold_listeners(&hold.requests(), listeners, ToListeners::Requests),
        )?;
        hold.stage = Stage::Requests;
        hold.hold_everything(&[])?;
        Ok(hold)
    }

    fn make(namespace: Namespace, name: String, watched: Watched, ways: Ways) -> Result<Self> {
        let socket = namespace.inside(|| netlink::open(NETLINK_NETFILTER))??;
        let hold = Self {
            name,
            namespace,
            socket,
            watched,
            capture: None,
            stage: Stage::Prepared,
            given_away: false,
            ways,
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
            let batch = nftables::hold_listeners(&self.requests(), listeners, ToListeners::Requests);
            self.send("holding requests back", batch)?;
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
            self.send("holding packets back", nftables::hold_connections(&self.name, new.iter(), self.ways))?;
            self.stage = Stage::Everything;
        } else if !new.is_empty() {
            self.send("holding packets back", nftables::hold_more(&self.name, new.iter()))?;
        }
        Ok(())
    }

    fn captured(&mut self) -> Result<Vec<Vec<u8>>> {
        let (watched, follows) = (&self.watched, self.follows);
        let wanted = |arrival: &Arrival| watched.has(&arrival.flow, arrival.opens || follows);
        self.capture.as_mut().map_or(Ok(Vec::new()), |capture| capture.take(wanted))
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
            let batch = nftables::hold_listeners(&self.following(), listeners, ToListeners::Everything);
            self.send("holding packets to listeners back", batch)?;
            self.follows = true;
        }
        Ok(())
    }

    /// Says that the packets belong to another host now: they are not delivered here any more.
    pub fn give_away(&mut self) {
        self.given_away = true;
    }

    /// Says that the packets belong to this host after all.
    pub fn take_back(&mut self) {
        self.given_away = false;
    }

    /// Takes the packets that arrived since the last time, to be delivered elsewhere, and not here any more.
    ///
    /// # Errors
    /// When they cannot be received.
    pub fn take(&mut self) -> Result<Vec<Vec<u8>>> {
        self.given_away = true;
        self.captured()
    }

    fn let_go(&mut self) -> Result<()> {
        let started = std::time::Instant::now();
        // N.B. all at once: where connections live already, they hear nothing until it is done.
        let mut tables = vec![self.name.clone()];
        tables.extend((self.stage >= Stage::Requests).then(|| self.requests()));
        tables.extend(self.follows.then(|| self.following()));
        self.send("removing tables", nftables::remove(&tables))?;
        if self.given_away || self.stage == Stage::Prepared {
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

impl Drop for Hold {
    fn drop(&mut self) {
        if let Err(error) = self.let_go() {
            tracing::warn!(%error, "packets that were held back are left to be sent again");
        }
    }
}
