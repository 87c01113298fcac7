//! Standing in for the peer of a connection that was closed with something still on its way.
//!
//! No descriptor leads to such a connection, and what is left in it the kernel gives to nobody but its peer. So the peer is cut off
//! for a moment, and the kernel hears us in its place: all that it sends is taken and acknowledged, to the end of the stream. Then
//! there is all that is needed to make the connection again in a socket that somebody has.
//!
//! What is sent must not be dropped where it leaves, for then TCP would hear that it was not. It is led to this host instead, and
//! dropped there.
//!
//! What its peer says meanwhile is kept, and said again when somebody hears it: that it takes more is said once, and who has missed that
//! has to ask, ever more seldom.
//!
//! What it has sent already, and may be lost on its way to the peer, it has to send once more. It does as soon as it is told of a
//! later segment that has arrived (RFC 2018, RFC 8985), else when its timer runs out.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use etherparse::{SlicedPacket, TcpOptionElement, TransportSlice};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::deliver::{Delivery, SPOKEN};
use crate::error::{Error, Result};
use crate::flow::Flow;
use crate::log::Log;
use crate::packet::{self, Packet, Spoken};
use crate::{netlink, nftables};

/// Longest time in which the kernel says where it stands. It answers at once, if at all.
const ANSWERED: Duration = Duration::from_millis(50);
/// Time after which a word counts as not understood, and is said again.
const SILENCE: Duration = Duration::from_millis(5);
/// Time after which a kernel that has said nothing new will not: longer than its shortest timers.
const GIVEN_UP: Duration = Duration::from_millis(2500);
/// Time that others have to be done, too, once one is: its peer is to be cut off no longer.
const TOGETHER: Duration = Duration::from_millis(50);
/// The most packets without a payload of a peer that are kept; the last ones.
const MOST_MISSED: usize = 64;
/// How often packets are looked for.
const GLANCE: Duration = Duration::from_micros(100);
/// Bytes that the kernel may send at once: a packet of that size fits a message of the log.
const AT_ONCE: u32 = 48 << 10;

/// What is known of a connection that nobody has, as the kernel lists it (sock_diag(7)) once its peer is cut off: the same before and
/// after it was asked where it stands, or it has sent more meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Sequence numbers from the oldest that the peer has not acknowledged to the end of the stream.
    pub waiting: u32,
    /// How many of them were never sent.
    pub unsent: u32,
    /// Bytes of a segment.
    pub segment: u32,
    /// Bits by which windows are shifted of which the peer tells.
    pub scale: u8,
}

/// What was left in a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remainder {
    /// Sequence number of the first byte that the peer has not acknowledged.
    pub oldest: u32,
    /// From that one on to the end of the stream.
    pub bytes: Vec<u8>,
    /// Sequence number that is expected of the peer.
    pub expected: u32,
    /// How much was offered to the peer, not scaled.
    pub window: u16,
    /// The time stamp that would be sent now, if any are.
    pub timestamp: Option<u32>,
}

/// Cuts the peers of some connections off and stands in for them. Dropped, it lets their packets through again.
#[derive(Debug)]
pub struct StandIn {
    name: String,
    /// How many tables there have been.
    tables: u32,
    /// The table is owned by it.
    socket: Socket,
    log: Log,
    delivery: Delivery,
    /// What peers have said meanwhile.
    missed: HashMap<Flow, VecDeque<Packet>>,
}

/// What the kernel has said of a connection.
#[derive(Clone, Debug)]
pub struct Said {
    sequence: u32,
    acknowledged: u32,
    window: u16,
    ends: bool,
    payload: Vec<u8>,
    /// Its own time stamp, and the last that it has seen.
    timestamps: Option<(u32, u32)>,
}

impl StandIn {
    /// Begins to stand in for the peers of `flows` in the network namespace of the calling thread. `name` distinguishes it from others.
    ///
    /// # Errors
    /// When the packet filter refuses, or has no log.
    pub fn begin<'a>(name: &str, flows: impl Iterator<Item = &'a Flow> + Clone) -> Result<Self> {
        // N.B. one that is taken over may end before all that its peer has said is delivered.
        let (log, delivery) = (Log::begin()?, Delivery::with_mark(SPOKEN)?.knowing(flows.clone().copied().collect()));
        let socket = cut_off(&format!("{name}-closing-0"), flows.clone(), log.group)?;
        let missed = flows.map(|flow| (*flow, VecDeque::new())).collect();
        Ok(Self { name: name.to_owned(), tables: 1, socket, log, delivery, missed })
    }

    /// Goes on with these alone: the others hear of their peers again.
    ///
    /// # Errors
    /// As [`StandIn::begin`].
    pub fn narrow<'a>(&mut self, flows: impl Iterator<Item = &'a Flow>) -> Result<()> {
        // N.B. before the other one goes: they are never without.
        self.socket = cut_off(&format!("{}-closing-{}", self.name, self.tables), flows, self.log.group)?;
        self.tables += 1;
        Ok(())
    }

    /// Says to the kernel what peers have said meanwhile, but of these connections. It has to be able to hear it again.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn catch_up<'a>(&mut self, but: impl Iterator<Item = &'a Flow>) -> Result<()> {
        self.listen()?;
        let still: HashSet<&Flow> = but.collect();
        for (_, packets) in self.missed.extract_if(|flow, _| !still.contains(flow)) {
            self.delivery.deliver(packets);
        }
        Ok(())
    }

    /// Takes what was logged: what the kernel has said, and aside what peers have.
    fn listen(&mut self) -> Result<Vec<(Flow, Said)>> {
        let mut heard = Vec::new();
        for packet in self.log.take()? {
            let Some(arrival) = packet::read(&packet.bytes) else { continue };
            match self.missed.get_mut(&arrival.flow) {
                // N.B. it comes again, and to a closed connection there is nothing to send.
                Some(_) if !is_bare(&packet.bytes) => {}
                Some(missed) => {
                    if missed.len() == MOST_MISSED {
                        missed.pop_front();
                    }
                    missed.push_back(packet);
                }
                None => heard.extend(Said::read(&packet.bytes)),
            }
        }
        Ok(heard)
    }

    /// Has the kernel say where it stands in each of some connections: it answers what makes no sense.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn ask(&mut self, flows: &[Flow]) -> Result<HashMap<Flow, Said>> {
        let deadline = Instant::now() + ANSWERED;
        // N.B. without a payload it would be answered twice a second at most (tcp_invalid_ratelimit of ip-sysctl.rst).
        let nonsense = Spoken { sequence: 0x676f_6477, acknowledged: 0x6974_0000, payload: b"?", ..Spoken::default() };
        let mut answers: HashMap<Flow, Said> = HashMap::new();
        self.listen()?;
        let mut asked: Option<Instant> = None;
        let mut is_last = false;
        // N.B. once more when all have answered: what was told last counts.
        while !is_last {
            is_last = answers.len() == flows.len() || Instant::now() >= deadline;
            if !is_last && asked.is_none_or(|asked| asked.elapsed() >= SILENCE) {
                for flow in flows.iter().filter(|flow| !answers.contains_key(*flow)) {
                    self.delivery.say(packet::spoken(flow, &nonsense));
                }
                asked = Some(Instant::now());
            }
            for (flow, said) in self.listen()? {
                if said.payload.is_empty() && !said.ends && flows.contains(&flow) {
                    match answers.entry(flow) {
                        // N.B. when it asks its peer for more room it tells of an earlier place.
                        Entry::Occupied(answer) if !is_later(said.sequence, answer.get().sequence) => {}
                        Entry::Occupied(mut answer) => drop(answer.insert(said)),
                        Entry::Vacant(place) => drop(place.insert(said)),
                    }
                }
            }
            std::thread::sleep(GLANCE);
        }
        Ok(answers)
    }

    /// Takes all that is left in connections of which the kernel has said where it stands, until some are done, and gives these: the
    /// kernel has then forgotten them. `None` for one whose remainder cannot be had, as over an interface that takes packets of 64 KiB, or
    /// not before the `deadline`: it goes on as before, or if some of that is taken already has ended.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn take(&mut self, talks: &mut Talks, deadline: Instant) -> Result<Vec<(Flow, Option<Remainder>)>> {
        let mut first: Option<Instant> = None;
        loop {
            for (flow, said) in self.listen()? {
                if let Some(talk) = talks.0.iter_mut().find(|talk| talk.flow == flow) {
                    talk.hear(&said);
                }
            }
            let now = Instant::now();
            let mut is_over = true;
            for talk in talks.0.iter_mut() {
                if talk.is_over(now) {
                    first.get_or_insert(now);
                    continue;
                }
                is_over = false;
                if let Some(word) = talk.next_word(now) {
                    self.delivery.say(packet::spoken(&talk.flow, &word));
                }
            }
            let is_late = now >= deadline;
            if is_over || is_late || first.is_some_and(|first| now - first >= TOGETHER) {
                let done = talks.0.extract_if(.., |talk| is_late || talk.is_over(now));
                return Ok(done.map(|talk| (talk.flow, talk.end(&self.delivery))).collect());
            }
            std::thread::sleep(GLANCE);
        }
    }
}

/// Whether a packet of TCP says something and sends nothing.
fn is_bare(packet: &[u8]) -> bool {
    let transport = SlicedPacket::from_ip(packet).ok().and_then(|sliced| sliced.transport);
    matches!(transport, Some(TransportSlice::Tcp(tcp)) if tcp.payload().is_empty())
}

/// Whether a sequence number is behind another one (RFC 9293, section 3.4).
fn is_later(one: u32, other: u32) -> bool {
    (one.wrapping_sub(other) as i32) > 0
}

/// Makes the table.
fn cut_off<'a>(name: &str, flows: impl Iterator<Item = &'a Flow>, group: u16) -> Result<Socket> {
    let socket = netlink::open(NETLINK_NETFILTER)?;
    let (bytes, sequences) = nftables::stand_in(&format!("{}{name}", nftables::PREFIX), flows, group).finish();
    netlink::transact(&socket, &bytes, &sequences)
        .map_err(|source| Error::call("packet filter (nf_tables)", "standing in for peers", source))?;
    Ok(socket)
}

/// Connections from which the kernel is made to give away what is left in them.
#[derive(Debug)]
pub struct Talks(Vec<Talk>);

impl Talks {
    /// Of these.
    #[must_use]
    pub fn new(connections: &[(Flow, Known, Said)]) -> Self {
        Self(connections.iter().map(Talk::new).collect())
    }

    /// Those that are not over.
    pub fn flows(&self) -> impl Iterator<Item = &Flow> {
        self.0.iter().map(|talk| &talk.flow)
    }

    /// Whether all are over.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What is said to the kernel of one connection, and heard from it.
#[derive(Debug)]
struct Talk {
    flow: Flow,
    known: Known,
    /// Where it stands.
    heard: Said,
    taken: Taken,
    /// When it was spoken to, and how much was taken by then.
    spoken: Option<(Instant, usize)>,
    /// When something came last.
    news: Instant,
}

impl Talk {
    fn new((flow, known, said): &(Flow, Known, Said)) -> Self {
        let mut talk = Self {
            flow: *flow,
            known: *known,
            heard: said.clone(),
            taken: Taken::default(),
            spoken: None,
            news: Instant::now(),
        };
        // N.B. what was sent ends where the next packet would begin.
        talk.taken.oldest = said.sequence.wrapping_sub(talk.in_flight());
        talk
    }

    /// Sequence numbers of what was sent and not acknowledged when the peer was cut off.
    fn in_flight(&self) -> u32 {
        self.known.waiting.saturating_sub(self.known.unsent)
    }

    /// Whether all is taken, or nothing more is to be expected.
    fn is_over(&self, now: Instant) -> bool {
        let is_usable = self.known.segment > 0 && self.known.segment <= AT_ONCE;
        !is_usable || self.taken.is_whole() || now.saturating_duration_since(self.news) >= GIVEN_UP
    }

    fn hear(&mut self, said: &Said) {
        let before = self.taken.bytes.len();
        self.taken.add(said);
        if self.taken.bytes.len() > before {
            self.news = Instant::now();
        }
        if said.timestamps.is_some() {
            self.heard.timestamps = said.timestamps;
        }
    }

    /// What there is to say now, if anything: something has come, or nothing for a while.
    fn next_word(&mut self, now: Instant) -> Option<Spoken> {
        let is_told = |(at, taken): (Instant, usize)| taken == self.taken.bytes.len() && now - at < SILENCE;
        if self.spoken.is_some_and(is_told) {
            return None;
        }
        self.spoken = Some((now, self.taken.bytes.len()));
        let heard = &self.heard;
        Some(Spoken {
            sequence: heard.acknowledged,
            // N.B. the end of the stream is never acknowledged: the connection would be forgotten, or wait for another.
            acknowledged: self.taken.oldest.wrapping_add(self.taken.bytes.len() as u32),
            window: AT_ONCE.checked_shr(self.known.scale.into()).map_or(1, |window| window.max(1) as u16),
            timestamps: heard.timestamps.map(|(theirs, seen)| (seen, theirs)),
            later: self.taken.later(self.in_flight(), self.known.segment),
            ..Spoken::default()
        })
    }

    /// Has the kernel forget the connection, as its peer could, and gives what was left in it.
    fn end(self, delivery: &Delivery) -> Option<Remainder> {
        let (is_over, heard) = (self.taken.is_whole(), self.heard);
        if !is_over {
            tracing::debug!(flow = ?self.flow, known = ?self.known, taken = self.taken.bytes.len(), "it is not given away");
            if self.taken.bytes.is_empty() {
                return None;
            }
        }
        // N.B. where not all was taken the peer lacks what was acknowledged in its place, and is not to wait for it.
        let end = Spoken { sequence: heard.acknowledged, resets: true, ..Spoken::default() };
        delivery.say(packet::spoken(&self.flow, &end));
        // The end of the stream counts, too.
        let is_right = self.taken.bytes.len() as u64 + 1 == u64::from(self.known.waiting);
        if is_over && !is_right {
            tracing::warn!(flow = ?self.flow, known = ?self.known, taken = self.taken.bytes.len(), "not all was given away");
        }
        (is_over && is_right).then_some(Remainder {
            oldest: self.taken.oldest,
            bytes: self.taken.bytes,
            expected: heard.acknowledged,
            window: heard.window,
            timestamp: heard.timestamps.map(|(theirs, _)| theirs),
        })
    }
}

impl Said {
    /// Reads a packet, and whose it is.
    fn read(packet: &[u8]) -> Option<(Flow, Self)> {
        let Flow { local: remote, remote: local } = packet::read(packet)?.flow;
        let TransportSlice::Tcp(tcp) = SlicedPacket::from_ip(packet).ok()?.transport? else { return None };
        let timestamps = tcp.options_iterator().find_map(|option| match option {
            Ok(TcpOptionElement::Timestamp(own, seen)) => Some((own, seen)),
            _ => None,
        });
        let said = || Self {
            sequence: tcp.sequence_number(),
            acknowledged: tcp.acknowledgment_number(),
            window: tcp.window_size(),
            ends: tcp.fin(),
            payload: tcp.payload().to_vec(),
            timestamps,
        };
        (!tcp.rst()).then(|| (Flow { local, remote }, said()))
    }
}

/// What was taken so far.
#[derive(Debug, Default)]
struct Taken {
    oldest: u32,
    /// Without a gap.
    bytes: Vec<u8>,
    /// Behind a gap, by their place.
    later: BTreeMap<usize, Vec<u8>>,
    /// Where the stream ends.
    end: Option<usize>,
}

impl Taken {
    /// The most that there can be in front of a byte: what is farther is older.
    const FARTHEST: u32 = 1 << 30;

    fn add(&mut self, said: &Said) {
        let distance = said.sequence.wrapping_sub(self.oldest);
        let (at, skipped) = if distance < Self::FARTHEST {
            (distance as usize, 0)
        } else {
            // It begins with what was acknowledged.
            (0, distance.wrapping_neg() as usize)
        };
        if skipped > said.payload.len() {
            return;
        }
        let payload = &said.payload[skipped..];
        if said.ends {
            self.end = Some(at + payload.len());
        }
        if !payload.is_empty() {
            self.later.insert(at, payload.to_vec());
        }
        while let Some(next) = self.later.first_entry().filter(|next| *next.key() <= self.bytes.len()) {
            let (at, piece) = next.remove_entry();
            let known = self.bytes.len() - at;
            self.bytes.extend(piece.get(known..).unwrap_or_default());
        }
    }

    fn is_whole(&self) -> bool {
        self.end == Some(self.bytes.len())
    }

    /// What to say has arrived although it has not, so that what was sent before it is sent again: the last segment that was on its way.
    fn later(&self, in_flight: u32, segment: u32) -> Option<(u32, u32)> {
        let from = in_flight.checked_sub(segment)?;
        let is_behind_a_gap = (self.bytes.len() as u64) < u64::from(from);
        is_behind_a_gap.then(|| (self.oldest.wrapping_add(from), self.oldest.wrapping_add(in_flight)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_put_in_order() {
        let said = |sequence: u32, payload: &[u8], ends| Said {
            sequence,
            acknowledged: 0,
            window: 0,
            ends,
            payload: payload.to_vec(),
            timestamps: None,
        };
        let oldest = u32::MAX - 1;
        let at = |offset: u32| oldest.wrapping_add(offset);
        let mut taken = Taken { oldest, ..Taken::default() };
        taken.add(&said(at(4), b"ef", true));
        assert!(!taken.is_whole());
        taken.add(&said(oldest.wrapping_sub(2), b"..ab", false));
        taken.add(&said(oldest.wrapping_sub(9), b"old", false));
        assert_eq!(taken.bytes, b"ab");
        taken.add(&said(at(1), b"bcde", false));
        assert!(taken.is_whole() && taken.bytes == b"abcdef");
        assert_eq!((taken.later(6, 2), taken.later(9, 2)), (None, Some((at(7), at(9)))));
        assert_eq!(taken.later(1, 2), None);
    }
}
