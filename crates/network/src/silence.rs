//! A network namespace that neither hears nor says anything: the same addresses are to live in one place at a time.

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;

use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::netlink;
use crate::nftables::{self, Batch, Ownership, PREFIX};

/// Silence of a namespace. Packet sockets still see what arrives.
#[derive(Debug)]
pub struct Silence {
    socket: Socket,
    name: String,
}

impl Silence {
    /// Silences a namespace for as long as this lives, however this program ends.
    ///
    /// # Errors
    /// When the kernel has no packet filter, or we may not change it.
    pub fn impose(namespace: &Namespace, name: &str) -> Result<Self> {
        Self::make(namespace, format!("{PREFIX}{name}"), Ownership::Ours)
    }

    /// Silences a namespace until [`Self::end`], whether this program lives or not.
    ///
    /// # Errors
    /// As [`Self::impose`].
    pub fn impose_for_good(namespace: &Namespace, name: &str) -> Result<Self> {
        Self::make(namespace, format!("{PREFIX}{name}"), Ownership::Nobodys)
    }

    /// Takes up a silence that was imposed for good by a program that is gone.
    ///
    /// # Errors
    /// When the name is none of ours, or the packet filter cannot be reached.
    pub fn left(namespace: &Namespace, table: &str) -> Result<Self> {
        if !table.starts_with(PREFIX) {
            return Err(Error::call("packet filter (nf_tables)", "finding a silence", Errno::EINVAL));
        }
        let socket = namespace.inside(|| netlink::open(NETLINK_NETFILTER))??;
        Ok(Self { socket, name: table.to_owned() })
    }

    fn make(namespace: &Namespace, name: String, ownership: Ownership) -> Result<Self> {
        let socket = namespace.inside(|| netlink::open(NETLINK_NETFILTER))??;
        let silence = Self { socket, name };
        silence.send("silencing a network namespace", nftables::silence(&silence.name, ownership))?;
        Ok(silence)
    }

    /// The name of its tables, one of family `inet` and one of `arp`.
    #[must_use]
    pub fn table(&self) -> &str {
        &self.name
    }

    fn send(&self, what: &'static str, batch: Batch) -> Result<()> {
        let (bytes, sequences) = batch.finish();
        netlink::transact(&self.socket, &bytes, &sequences)
            .map_err(|source| Error::call("packet filter (nf_tables)", what, source))
    }

    /// Lets the namespace hear and speak.
    ///
    /// # Errors
    /// When the packet filter refuses.
    pub fn end(&self) -> Result<()> {
        self.send("ending the silence of a network namespace", nftables::end_silence(&self.name))
    }
}
