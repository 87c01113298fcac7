//! Why a migration ends early.

use godwit_carry::with_causes;
use godwit_kernel::Errno;
use godwit_proto::wire;
use godwit_resources::Obstacle;
use godwit_session::Phase;

/// The end of a migration before its goal.
#[derive(Debug)]
pub(super) enum Stop {
    /// Things stand in the way; nothing was touched.
    Refused(Vec<Obstacle>),
    /// Something went wrong.
    Failed(Box<Trouble>),
    /// The user asked for it.
    Cancelled,
    /// The decision was sent and no answer came. The source is kept frozen.
    Unknown(String),
}

/// What went wrong, on what.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    pub(super) resource: String,
    pub(super) text: String,
    pub(super) remedy: String,
    /// Where it went wrong, if not in the phase this side was in.
    pub(super) phase: Option<String>,
    /// The process ended by itself.
    pub(super) process_gone: bool,
    /// The destination has said so.
    pub(super) said_by_peer: bool,
}

pub(super) type Result<T, E = Stop> = std::result::Result<T, E>;

impl Stop {
    pub(super) fn failed(resource: impl Into<String>, text: impl Into<String>) -> Self {
        Self::Failed(Box::new(Trouble { resource: resource.into(), text: text.into(), ..Trouble::default() }))
    }

    /// The time that the user has given is over.
    pub(super) fn timed_out(remedy: &str) -> Self {
        Self::with_remedy("time limit", "the time given by --timeout has passed", remedy)
    }

    /// As [`Self::timed_out`], where the clock can also force a move to its end.
    pub(super) fn late() -> Self {
        Self::timed_out("allow more with --timeout, or give --on-timeout force")
    }

    pub(super) fn with_remedy(resource: impl Into<String>, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Failed(Box::new(Trouble {
            resource: resource.into(),
            text: text.into(),
            remedy: remedy.into(),
            ..Trouble::default()
        }))
    }

    /// There is no such process, or no longer.
    pub(super) fn gone(pid: i32) -> Self {
        // Its parent is told of it as long as it has not asked (wait(2)).
        let is_zombie = std::path::Path::new(&format!("/proc/{pid}")).exists();
        let text = if is_zombie { "it has ended (zombie)" } else { "there is no such process" };
        Self::Failed(Box::new(Trouble {
            resource: format!("process {pid}"),
            text: text.to_owned(),
            process_gone: true,
            ..Trouble::default()
        }))
    }

    /// What was looked at is not there any more.
    pub(super) fn other_program() -> Self {
        let text = "it has ended, or another program runs in it now (execve(2))";
        Self::with_remedy("process", text, "if it is there, run the same command again")
    }

    /// What the destination reported.
    pub(super) fn by_peer(failure: wire::Failure) -> Self {
        Self::Failed(Box::new(Trouble {
            resource: shortened(failure.resource),
            text: shortened(failure.text),
            remedy: shortened(failure.remedy),
            phase: (!failure.phase.is_empty()).then(|| shortened(failure.phase)),
            process_gone: false,
            said_by_peer: true,
        }))
    }

    /// What happened, on one line.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Refused(_) => "refused".to_owned(),
            Self::Cancelled => "cancelled".to_owned(),
            Self::Unknown(text) => text.clone(),
            Self::Failed(trouble) if trouble.remedy.is_empty() => format!("{}: {}", trouble.resource, trouble.text),
            Self::Failed(trouble) => format!("{}: {}; {}", trouble.resource, trouble.text, trouble.remedy),
        }
    }

    /// Calls the migration off in words for the destination.
    pub(super) fn abort(&self, phase: Phase) -> wire::Abort {
        let text = self.text();
        let error = wire::Failure { phase: phase.to_string(), text, ..wire::Failure::default() };
        wire::Abort { phase: phase.to_string(), error: Some(error) }
    }
}

/// What stands in the way at the destination, as far as anybody would read.
pub(super) fn obstacles(reply: wire::ProbeReply) -> impl Iterator<Item = Obstacle> {
    const MOST: usize = 1000;
    let plain = |obstacle: wire::Obstacle| {
        let wire::Obstacle { resource, text, remedy } = obstacle;
        Obstacle::new(shortened(resource), shortened(text), shortened(remedy))
    };
    reply.obstacles.into_iter().take(MOST).map(plain)
}

/// A peer's words, no more of them than anybody would read.
pub(super) fn shortened(mut text: String) -> String {
    const LONGEST: usize = 4096;
    if let Some((end, _)) = text.char_indices().nth(LONGEST) {
        text.truncate(end);
        text.push('…');
    }
    text
}

impl From<godwit_tracee::Error> for Stop {
    fn from(error: godwit_tracee::Error) -> Self {
        let process_gone = matches!(error, godwit_tracee::Error::Gone(_));
        Self::Failed(Box::new(Trouble {
            resource: "process".to_owned(),
            text: with_causes(&error),
            process_gone,
            ..Trouble::default()
        }))
    }
}

impl From<godwit_resources::Error> for Stop {
    fn from(error: godwit_resources::Error) -> Self {
        match error {
            godwit_resources::Error::Tracee(error) => error.into(),
            godwit_resources::Error::Obstacle(obstacle) => {
                Self::with_remedy(obstacle.resource, obstacle.text, obstacle.remedy)
            }
            other => Self::failed("process", with_causes(&other)),
        }
    }
}

impl From<godwit_network::Error> for Stop {
    fn from(error: godwit_network::Error) -> Self {
        Self::failed("network", with_causes(&error))
    }
}

impl From<godwit_track::Error> for Stop {
    fn from(error: godwit_track::Error) -> Self {
        // What was tracked is a memory that nobody has any more.
        if matches!(&error, godwit_track::Error::Scan { source, .. } if source.errno == Errno::ESRCH) {
            return Self::other_program();
        }
        Self::failed("dirty-page tracking", with_causes(&error))
    }
}

impl From<godwit_carry::Error> for Stop {
    fn from(error: godwit_carry::Error) -> Self {
        Self::with_remedy("link", with_causes(&error), error.remedy().unwrap_or_default())
    }
}
