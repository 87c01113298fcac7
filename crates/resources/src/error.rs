use godwit_kernel::Errno;
use std::path::PathBuf;

/// What can go wrong with a resource.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The stopped process could not be driven.
    #[error(transparent)]
    Tracee(#[from] godwit_tracee::Error),
    /// Packets of connections could not be held back or delivered.
    #[error(transparent)]
    Network(#[from] godwit_network::Error),
    /// A file under /proc could not be read.
    #[error("{path}: {source}")]
    Proc {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A system call on a resource failed.
    #[error("{resource}: {what}: {source}")]
    Call {
        /// Which resource.
        resource: String,
        /// What was attempted.
        what: &'static str,
        /// Cause.
        source: Errno,
    },
    /// The process holds something that appeared after the inspection and cannot be moved.
    #[error("{0}")]
    Obstacle(crate::Obstacle),
    /// A state message lacks something or contradicts itself.
    #[error("state message of {resource}: {text}")]
    State {
        /// Which resource.
        resource: String,
        /// What is wrong with it.
        text: String,
    },
}

impl Error {
    /// Builds the error of a system call on a resource.
    pub fn call(resource: impl Into<String>, what: &'static str, source: Errno) -> Self {
        Self::Call { resource: resource.into(), what, source }
    }

    /// Builds the error of a state message.
    pub fn state(resource: impl Into<String>, text: impl Into<String>) -> Self {
        Self::State { resource: resource.into(), text: text.into() }
    }
}
