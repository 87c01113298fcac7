use godwit_kernel::Errno;

/// Why a process could not be rebuilt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The stub could not be driven.
    #[error(transparent)]
    Tracee(#[from] godwit_tracee::Error),
    /// A resource could not be rebuilt.
    #[error(transparent)]
    Resource(#[from] godwit_resources::Error),
    /// A stub could not be created.
    #[error("creating a process with pid {pid}: {source}")]
    Birth {
        /// Wanted pid.
        pid: i32,
        /// Cause.
        source: Errno,
    },
    /// A system call failed.
    #[error("{resource}: {what}: {source}")]
    Call {
        /// Which resource.
        resource: String,
        /// What was attempted.
        what: &'static str,
        /// Cause.
        source: std::io::Error,
    },
    /// A state message contradicts itself or this host.
    #[error("{resource}: {text}")]
    State {
        /// Which resource.
        resource: String,
        /// What is wrong.
        text: String,
    },
    /// Pages arrived for memory that the process does not have.
    #[error("pages for {address:#x} in space {space}, where nothing is mapped")]
    Unmapped {
        /// Space of the frame.
        space: u32,
        /// Address in it.
        address: u64,
    },
}

impl Error {
    /// Whether it is that the process has ended, or a thread of it.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        use godwit_tracee::Error::Gone;
        matches!(self, Self::Tracee(Gone(_)) | Self::Resource(godwit_resources::Error::Tracee(Gone(_))))
    }

    /// Whether an id that it has to have is taken here.
    #[must_use]
    pub fn is_id_taken(&self) -> bool {
        let is_taken = |errno: &Errno| matches!(errno, Errno::EEXIST | Errno::EINVAL);
        match self {
            Self::Birth { source, .. } | Self::Tracee(godwit_tracee::Error::Remote { source, .. }) => is_taken(source),
            _ => false,
        }
    }

    /// Whether that of a thread that came up late is.
    #[must_use]
    pub fn is_thread_taken(&self) -> bool {
        self.is_id_taken() && self.to_string().starts_with("creating thread")
    }

    pub(crate) fn call(resource: impl Into<String>, what: &'static str, source: impl Into<std::io::Error>) -> Self {
        Self::Call { resource: resource.into(), what, source: source.into() }
    }

    pub(crate) fn state(resource: impl Into<String>, text: impl Into<String>) -> Self {
        Self::State { resource: resource.into(), text: text.into() }
    }
}
