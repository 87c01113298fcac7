//! Which message a destination may receive when. Anything else ends the migration before it can do harm.

use std::fmt;

/// Kinds of message that a source sends on the control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Received {
    /// Asks for the clocks.
    ClockPing,
    /// Facts of the process.
    Probe,
    /// Builds the stub.
    Prepare,
    /// The layout changed.
    Layout,
    /// Pages.
    Pages,
    /// Pages that are gone.
    Drop,
    /// End of a round.
    RoundEnd,
    /// What waits in connections.
    Streams,
    /// State collected inside the freeze.
    Final,
    /// The decision.
    Commit,
    /// Packets for connections that have moved.
    Packets,
    /// Connections alone are to come, to a program.
    Offer,
    /// Their sockets.
    HandOver,
    /// Calls it off.
    Abort,
}

/// How far a destination has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Destination {
    /// Version and identity are settled.
    #[default]
    Negotiated,
    /// The process was looked at and found movable.
    Probed,
    /// The stub is there and is being filled.
    Filling,
    /// Connections alone are to come, and were found movable.
    Offered,
    /// The stub is complete and stopped, or the sockets are; only the decision is missing.
    Ready,
    /// The process runs here, or the connections live.
    Committed,
    /// Called off; nothing is left.
    Aborted,
}

/// A message that may not come now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct OutOfOrder {
    /// How far the destination had come.
    pub state: Destination,
    /// What it received.
    pub received: Received,
}

impl fmt::Display for OutOfOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "message {:?} is out of order: the destination is {:?}", self.received, self.state)
    }
}

impl Destination {
    /// The state after a message.
    ///
    /// # Errors
    /// [`OutOfOrder`] when it may not come now; the state stays.
    pub fn after(self, received: Received) -> Result<Self, OutOfOrder> {
        use Received::{
            Abort, ClockPing, Commit, Drop, Final, HandOver, Layout, Offer, Packets, Pages, Prepare, Probe, RoundEnd,
            Streams,
        };
        match (self, received) {
            (Self::Negotiated | Self::Probed, ClockPing) => Ok(self),
            (Self::Negotiated, Probe) => Ok(Self::Probed),
            (Self::Probed, Prepare) => Ok(Self::Filling),
            (Self::Filling, Layout | Pages | Drop | RoundEnd | Streams) => Ok(Self::Filling),
            (Self::Filling, Final) => Ok(Self::Ready),
            (Self::Negotiated, Offer) => Ok(Self::Offered),
            (Self::Offered, Streams) => Ok(Self::Offered),
            (Self::Offered, HandOver) => Ok(Self::Ready),
            (Self::Ready, Commit) => Ok(Self::Committed),
            (Self::Committed, Packets) => Ok(Self::Committed),
            (Self::Negotiated | Self::Probed | Self::Filling | Self::Offered | Self::Ready, Abort) => Ok(Self::Aborted),
            _ => Err(OutOfOrder { state: self, received }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const ALL: [Received; 14] = [
        Received::ClockPing,
        Received::Probe,
        Received::Prepare,
        Received::Layout,
        Received::Pages,
        Received::Drop,
        Received::RoundEnd,
        Received::Streams,
        Received::Packets,
        Received::Final,
        Received::Commit,
        Received::Offer,
        Received::HandOver,
        Received::Abort,
    ];

    #[test]
    fn commit_is_possible_only_once_and_only_when_ready() {
        let mut seen = HashSet::from([Destination::default()]);
        let mut todo = vec![Destination::default()];
        while let Some(state) = todo.pop() {
            for received in ALL {
                if let Ok(next) = state.after(received) {
                    let commits = next == Destination::Committed && state != next;
                    assert_eq!(commits, received == Received::Commit);
                    assert!(received != Received::Commit || state == Destination::Ready);
                    if seen.insert(next) {
                        todo.push(next);
                    }
                }
            }
        }
        assert_eq!(seen.len(), 7, "every state is reachable");
    }

    #[test]
    fn connections_alone_and_processes_do_not_mix() {
        use Received::{Final, HandOver, Offer, Pages, Prepare, Probe, Streams};
        let offered = Destination::default().after(Offer).unwrap();
        for received in [Offer, Probe, Prepare, Pages, Final] {
            assert!(offered.after(received).is_err());
        }
        assert_eq!(offered.after(Streams).unwrap().after(HandOver), Ok(Destination::Ready));
        let filling = Destination::default().after(Probe).unwrap().after(Prepare).unwrap();
        assert!(filling.after(HandOver).is_err() && filling.after(Offer).is_err());
    }

    #[test]
    fn nothing_follows_the_end() {
        for received in ALL {
            // Packets that arrived at the source are sent after the connections that they belong to.
            assert_eq!(Destination::Committed.after(received).is_ok(), received == Received::Packets);
            assert!(Destination::Aborted.after(received).is_err());
        }
    }
}
