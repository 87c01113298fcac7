//! What can go wrong between a missing page and its content.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use godwit_carry::Party;
use godwit_kernel::Errno;

/// This crate's errors.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A thread of the service could not be started.
    #[error("cannot start thread {name}")]
    Thread {
        /// Its name.
        name: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A socket for faults or the drain could not be opened.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: godwit_carry::Error,
    },
    /// The service has ended.
    #[error("the fault service has ended")]
    ServiceEnded,
    /// A migration of that name is being drained already.
    #[error("migration {id} is being drained already")]
    Duplicate {
        /// Its id.
        id: MigrationId,
    },
    /// A request to a userfaultfd failed in a way that is not ordinary.
    #[error("{operation} at {address:#x} of process {pid}")]
    Fill {
        /// What was asked.
        operation: &'static str,
        /// The process.
        pid: i32,
        /// Where.
        address: u64,
        /// Why.
        #[source]
        source: Errno,
    },
    /// Something about a descriptor failed.
    #[error("{operation} for migration {id}")]
    Descriptor {
        /// What was tried.
        operation: &'static str,
        /// The migration.
        id: MigrationId,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The ledger could not be made or mapped.
    #[error("{operation} the ledger of pages that are missing")]
    Ledger {
        /// What was tried.
        operation: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// What stands in a ledger cannot be.
    #[error("the ledger of pages that are missing is damaged: {what}")]
    DamagedLedger {
        /// What is wrong.
        what: &'static str,
    },
    /// The second holder could not be made or does not answer.
    #[error("{operation} the process that holds userfaultfds open")]
    Holder {
        /// What was tried.
        operation: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The socket between page server and daemon failed.
    #[error("{operation} {}", path.display())]
    Socket {
        /// What was tried.
        operation: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What came over the socket between page server and daemon makes no sense.
    #[error("{}: unexpected message: {what}", path.display())]
    Handover {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The link to the other host failed.
    #[error("link for missing pages")]
    Link(#[from] godwit_carry::Error),
    /// The other host sent pages that do not decode.
    #[error("pages from the source")]
    Pages(#[from] godwit_stream::Error),
    /// A source has called for a migration that needs no pages, or not yet.
    #[error("{address}: no such migration is being drained")]
    NotDrained {
        /// The other host.
        address: SocketAddr,
    },
    /// The other host said what it may not say now.
    #[error("{address}: protocol violated: {what}")]
    Protocol {
        /// The other host.
        address: SocketAddr,
        /// What is wrong.
        what: String,
    },
    /// Another host answers than the one that the process was given to.
    #[error(
        "{address}: another host answers there (fingerprint {presented}) than the one that the process was given to"
    )]
    AnotherHost {
        /// Where.
        address: SocketAddr,
        /// Who it is.
        presented: Party,
    },
    /// The source host was without a link for too long. The frozen copy must be kept: whether the program lacks pages is not known.
    #[error("no link to the fault service at {address} for {seconds} s; the copy here stays frozen")]
    GaveUp {
        /// The service.
        address: SocketAddr,
        /// How long it was tried.
        seconds: u64,
        /// The last failure.
        #[source]
        source: Box<Error>,
    },
    /// The frozen process has ended, and its pages with it.
    #[error("frozen process {pid}, which had them, is gone")]
    SourceGone {
        /// The process.
        pid: i32,
    },
    /// A page of the frozen process could not be read.
    #[error("cannot read {pages} pages at {address:#x} of frozen process {pid}")]
    Read {
        /// The process.
        pid: i32,
        /// Where.
        address: u64,
        /// How many.
        pages: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Whether the other host does not want this one, or is not the one that is wanted: calling again is of no use.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Link(error) => error.is_refusal(),
            Self::AnotherHost { .. } => true,
            _ => false,
        }
    }
}

/// This crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Names a migration: 16 random bytes that the source picked.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MigrationId(pub [u8; 16]);

impl MigrationId {
    /// Takes the bytes of a message; `None` unless there are 16.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Takes 32 hexadecimal digits, as they are shown.
    #[must_use]
    pub fn parse(digits: &str) -> Option<Self> {
        let digits = digits.as_bytes();
        let mut id = [0; 16];
        if digits.len() != 2 * id.len() {
            return None;
        }
        for (byte, pair) in id.iter_mut().zip(digits.chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(id))
    }
}

impl std::fmt::Display for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}
