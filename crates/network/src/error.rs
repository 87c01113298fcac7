//! What can go wrong.

use godwit_kernel::Errno;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, with what it was about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call failed.
    #[error("{resource}: {what}: {source}")]
    Call {
        /// What it was about: an address, an interface, the packet filter.
        resource: String,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: Errno,
    },
    /// The kernel answered what cannot be understood.
    #[error("{resource}: {text}")]
    Answer {
        /// What was asked.
        resource: String,
        /// What is wrong with the answer.
        text: String,
    },
}

impl Error {
    pub(crate) fn call(resource: impl Into<String>, what: &'static str, source: Errno) -> Self {
        Self::Call { resource: resource.into(), what, source }
    }

    pub(crate) fn io(resource: impl Into<String>, what: &'static str, source: &std::io::Error) -> Self {
        Self::call(resource, what, source.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
    }
}
