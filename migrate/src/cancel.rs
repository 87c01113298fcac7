//! The wish to stop: a flag that is set once, by Ctrl-C or by a limit, and a descriptor to sleep on.
//!
//! It says nothing about what has been stopped: the agent looks at it where stopping is safe, and past the commit no more.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::watch;

/// A flag that goes up once and stays up; copies share it.
#[derive(Clone, Debug)]
pub struct Cancel(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// For tasks to wait on.
    raised: watch::Sender<bool>,
    /// Nobody waits for the outcome any more.
    abandoned: AtomicBool,
    /// Readable as soon as the flag is up. Nobody reads it, so it stays so for everyone who polls.
    event: EventFd,
}

impl Cancel {
    /// Makes a flag that is down.
    ///
    /// # Errors
    /// No descriptor is left: eventfd(2).
    pub fn new() -> Result<Self, Errno> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Inner { raised: watch::Sender::new(false), abandoned: AtomicBool::new(false), event })))
    }

    /// Raises the flag; says whether it was down before.
    pub fn cancel(&self) -> bool {
        let first = !self.0.raised.send_replace(true);
        if first {
            // It can only fail when the counter is full, and this is its first and last increment.
            let _ = self.0.event.write(1);
        }
        first
    }

    /// Raises the flag because nobody waits for the outcome any more: what is decided is brought to its end all the same.
    pub fn abandon(&self) {
        if !self.is_cancelled() {
            self.0.abandoned.store(true, Ordering::Release);
            self.cancel();
        }
    }

    /// Tells whether the flag is up by somebody's wish.
    pub fn is_wished(&self) -> bool {
        self.is_cancelled() && !self.0.abandoned.load(Ordering::Acquire)
    }

    /// Tells whether the flag is up.
    pub fn is_cancelled(&self) -> bool {
        *self.0.raised.borrow()
    }

    /// Sleeps until the flag is up or the time has passed; says whether it is up.
    pub fn wait(&self, limit: Duration) -> bool {
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        // A signal ends the sleep early, as any spurious wake-up may: callers look again anyway.
        let _ = poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], limit);
        self.is_cancelled()
    }

    /// Waits until the flag is up.
    pub async fn cancelled(&self) {
        // The sender lives in `self`, so that it cannot be gone.
        let _ = self.0.raised.subscribe().wait_for(|raised| *raised).await;
    }
}

impl AsFd for Cancel {
    /// Lends the descriptor that becomes readable with the flag, for poll(2). It must not be read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_goes_up_once_for_all_copies() {
        let flag = Cancel::new().unwrap();
        let copy = flag.clone();
        assert!(!copy.wait(Duration::ZERO));
        assert!(flag.cancel());
        assert!(!copy.cancel());
        assert!(copy.is_cancelled() && copy.wait(Duration::from_secs(3600)));
    }

    #[tokio::test]
    async fn a_task_wakes_up() {
        let flag = Cancel::new().unwrap();
        let copy = flag.clone();
        let raiser = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(10));
            copy.cancel();
        });
        tokio::time::timeout(Duration::from_secs(10), flag.cancelled()).await.unwrap();
        raiser.join().unwrap();
    }
}
