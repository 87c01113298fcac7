//! Packets held back while nobody has their connection.

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::capture::Capture;
use crate::deliver::Delivery;
use crate::error::{Error, Result};
use crate::flow::{Flow, Watched};
use crate::{netlink, nftables};

/// What is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
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
    socket: Socket,
    watched: Watched,
    /// From the first packet that is held back.
    capture: Option<Capture>,
    stage: Stage,
    /// Whether the packets belong to another host now.
    given_away: bool,
}

impl Hold {
    /// Prepares to hold packets of `watched` back; none is yet. `name` distinguishes it from others.
    ///
    /// # Errors
    /// When the kernel has no packet filter, or we may not change it.
    pub fn prepare(name: &str, watched: Watched) -> Result<Self> {
        let socket = netlink::open(NETLINK_NETFILTER)?;
        let hold = Self {
            name: format!("godwit-{name}"),
            socket,
            watched,
            capture: None,
            stage: Stage::Prepared,
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
            self.capture = Some(Capture::begin()?);
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
    pub fn hold_everything(&mut self, flows: &[Flow]) -> Result<()> {
        self.hold_requests()?;
        let new: Vec<Flow> = flows.iter().filter(|flow| self.watched.flows.insert(**flow)).copied().collect();
        if self.stage < Stage::Everything {
            self.send("holding packets back", nftables::hold_connections(&self.name, new.iter()))?;
            self.stage = Stage::Everything;
        } else if !new.is_empty() {
            self.send("holding packets back", nftables::hold_more(&self.name, new.iter()))?;
        }
        Ok(())
    }

    fn captured(&mut self) -> Result<Vec<Vec<u8>>> {
        self.capture.as_mut().map_or(Ok(Vec::new()), |capture| capture.take(&self.watched))
    }

    /// Whether requests for new connections are among what is watched.
    #[must_use]
    pub fn has_listeners(&self) -> bool {
        !self.watched.listeners.is_empty()
    }

    /// What is held back.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Takes the packets that arrived since the last time, to be delivered elsewhere. From the first call on they are not
    /// delivered here any more.
    ///
    /// # Errors
    /// When they cannot be received.
    pub fn take(&mut self) -> Result<Vec<Vec<u8>>> {
        self.given_away = true;
        self.captured()
    }

    fn let_go(&mut self) -> Result<()> {
        if self.stage >= Stage::Requests {
            self.send("removing a table", nftables::remove(&self.requests()))?;
        }
        self.send("removing a table", nftables::remove(&self.name))?;
        if self.given_away || self.stage == Stage::Prepared {
            return Ok(());
        }
        let delivery = Delivery::new()?;
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
