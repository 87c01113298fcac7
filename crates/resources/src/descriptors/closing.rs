//! Connections that the program has closed and whose peers have not got everything yet: no descriptor leads to them, and the kernel
//! sends the rest by itself. They are taken over: made again in sockets that this program has, which are taken apart with all the others
//! when the process moves. There they are closed once more, and that kernel sends the rest. So it goes on here if nothing comes
//! of the move.

use super::alone::{Complete, Socket, put_together};
use super::connection::is_closing;
use super::listener::words;
use super::sock_diag::{self, Listed, word};
use crate::{Error, Result};
use godwit_kernel::descriptors::set_socket_option;
use godwit_network::{Delivery, Flow, Known, Namespace, Remainder, Said, StandIn, Talks, question};
use godwit_proto::image::{InetSkEntry, SkOptsEntry, TcpStreamEntry};
use godwit_proto::wire;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Files' ids of such connections begin here: no descriptor has any of them.
pub(crate) const FIRST_ID: u32 = 0x6000_0000;
/// Bytes of `struct inet_diag_msg`, in front of the attributes.
const MESSAGE: usize = 72;
/// How often the kernel is asked where it stands in a connection.
const ATTEMPTS: u32 = 4;
/// `INET_DIAG_INFO` and `INET_DIAG_SKMEMINFO`.
const INFO: u16 = 2;
const MEMORY: u16 = 7;

/// What the kernel lists of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Closing {
    flow: Flow,
    state: u8,
    known: Known,
    /// Options that were agreed on, and both window scales, as in `struct tcp_info`.
    options: u8,
    scales: u8,
    /// How much the peer takes, where the kernel says so (Linux 5.4).
    window: Option<u32>,
    round_trip_us: u32,
    send_buffer: u32,
    receive_buffer: u32,
}

/// Takes over those of some connections that have no descriptor. Packets to and from their peers are dropped meanwhile, for some
/// milliseconds, or as long as `patience` lasts where much has been lost on their way; `name` distinguishes it from others. Those that
/// cannot be taken over are left out.
///
/// # Errors
/// When the packet filter refuses, or the kernel lists nothing.
pub fn take_over(place: &Namespace, name: &str, flows: &[Flow], patience: Duration) -> Result<Vec<Socket>> {
    place.inside(|| {
        let (mut stand_in, asking) = (StandIn::begin(name, flows.iter())?, Delivery::new()?);
        let mut ready: Vec<(Closing, Said)> = Vec::new();
        // N.B. what it sends by itself in the moment of being asked makes the answer worthless.
        for _ in 0..ATTEMPTS {
            let before: HashMap<Flow, Closing> = list()?.into_iter().map(|closing| (closing.flow, closing)).collect();
            let is_ready = |flow: &Flow| ready.iter().any(|(closing, _)| closing.flow == *flow);
            let asked: Vec<Flow> =
                flows.iter().filter(|flow| before.contains_key(*flow) && !is_ready(flow)).copied().collect();
            if asked.is_empty() {
                break;
            }
            let mut said = stand_in.ask(&asked)?;
            let unchanged = list()?.into_iter().filter(|closing| before.get(&closing.flow) == Some(closing));
            ready.extend(unchanged.filter_map(|closing| Some((closing, said.remove(&closing.flow)?))));
        }
        let connections: Vec<_> =
            ready.iter().map(|(closing, said)| (closing.flow, closing.known, said.clone())).collect();
        let deadline = Instant::now() + patience;
        let (mut talks, mut sockets) = (Talks::new(&connections), Vec::new());
        while !talks.is_empty() {
            let mut complete = Vec::new();
            for (flow, remainder) in stand_in.take(&mut talks, deadline)? {
                let closing = ready.iter().find(|(closing, _)| closing.flow == flow);
                let made = remainder.zip(closing).map(|(remainder, (closing, _))| {
                    let Remainder { oldest, expected, window, timestamp, .. } = remainder;
                    // N.B. not as the kernel asks when it wakes one: it will soon have to ask once more where the process moves to, and would not be
                    // answered so soon.
                    let question = question(&flow, oldest, expected, window, timestamp);
                    Ok::<_, Error>((closing.make(&remainder)?.quietly(), question))
                });
                match made.transpose() {
                    Ok(made) => complete.extend(made),
                    Err(error) => tracing::warn!(%error, "the peer of a closed connection does not get the rest"),
                }
            }
            // N.B. when there are sockets for what its peer says.
            let narrowed = stand_in.narrow(talks.flows());
            if let Err(error) = &narrowed {
                tracing::warn!(%error, "they hear of their peers when all are done");
            }
            for (made, question) in complete {
                sockets.extend(made.wake()?.into_iter().map(|file| Socket { number: -1, file }));
                // N.B. at once: it may end before the others are done. As most have that a server has accepted: it could not listen here again as
                // long as they end.
                if let Some(Socket { file, .. }) = sockets.last() {
                    set_socket_option(file.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &1i32.to_ne_bytes())
                        .map_err(|source| Error::call("TCP connection", "SO_REUSEADDR", source))?;
                }
                asking.send_on(&question);
            }
            if narrowed.is_ok() {
                stand_in.catch_up(talks.flows())?;
            }
        }
        // Of those that have not even answered, too.
        stand_in.catch_up([].into_iter())?;
        Ok(sockets)
    })?
}

/// Lists the connections of the calling thread's network namespace that nobody has and that have something on their way.
fn list() -> Result<Vec<Closing>> {
    const INODE: usize = 68;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let extensions = 1 << (INFO - 1) | 1 << (MEMORY - 1);
        let mut request = vec![family as u8, libc::IPPROTO_TCP as u8, extensions, 0];
        let states: u32 = (0..32u8).filter(|&state| is_closing(state)).map(|state| 1 << state).sum();
        request.extend(states.to_ne_bytes());
        request.extend([0; 48]);
        let listed = sock_diag::list("closed connections", &request, MESSAGE)?;
        found.extend(listed.iter().filter(|one| one.word(INODE) == Some(0)).filter_map(Closing::read));
    }
    Ok(found)
}

impl Closing {
    fn read(listed: &Listed) -> Option<Self> {
        const WAITING: usize = 60;
        let end = |port: usize, address: usize| {
            let port = u16::from_be_bytes(listed.message.get(port..port + 2)?.try_into().ok()?);
            let octets = listed.message.get(address..address + 16)?;
            let ip = match i32::from(*listed.message.first()?) {
                libc::AF_INET => IpAddr::from(<[u8; 4]>::try_from(&octets[..4]).ok()?),
                _ => IpAddr::from(<[u8; 16]>::try_from(octets).ok()?),
            };
            Some(SocketAddr::new(ip, port))
        };
        let (info, memory) = (listed.attribute(INFO)?, listed.attribute(MEMORY)?);
        let scales = *info.get(6)?;
        Some(Self {
            flow: Flow::new(end(4, 8)?, end(6, 24)?),
            state: *listed.message.get(1)?,
            known: Known {
                waiting: listed.word(WAITING)?,
                unsent: word(info, 144)?,
                segment: word(info, 16)?,
                scale: scales & 15,
            },
            options: *info.get(5)?,
            scales,
            window: word(info, 228),
            round_trip_us: word(info, 68)?,
            send_buffer: word(memory, 12)?,
            receive_buffer: word(memory, 4)?,
        })
    }

    /// Makes it again, in repair mode.
    fn make(&self, left: &Remainder) -> Result<Complete> {
        /// What time stamps take of a segment.
        const TIMESTAMPS: u32 = 12;
        let Self { flow, known, .. } = *self;
        if matches!(flow.local.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local()) {
            return Err(Error::state("TCP connection", "it has a link-local address"));
        }
        let unsent = known.unsent.saturating_sub(1).min(left.bytes.len() as u32);
        let receive_scale = u32::from(self.scales >> 4);
        let entry = TcpStreamEntry {
            inq_seq: left.expected,
            outq_len: left.bytes.len() as u32,
            // The end of the stream is the last to be sent.
            outq_seq: left.oldest.wrapping_add(known.waiting),
            unsq_len: Some(unsent),
            opt_mask: self.options.into(),
            snd_wscale: (self.scales & 15).into(),
            rcv_wscale: Some(receive_scale),
            mss_clamp: known.segment + if left.timestamp.is_some() { TIMESTAMPS } else { 0 },
            // N.B. the lowest bit says something else there: that time is counted in microseconds (Linux 6.7).
            timestamp: left.timestamp.map(|timestamp| timestamp.wrapping_add(1) & !1),
            snd_wl1: Some(left.expected.wrapping_sub(1)),
            snd_wnd: self.window,
            // N.B. at least: no segment is longer than half of it, unless all are short.
            max_window: self.window.map(|window| window.max(known.segment.saturating_mul(2))),
            rcv_wnd: Some(u32::from(left.window) << receive_scale),
            rcv_wup: Some(left.expected),
            ..TcpStreamEntry::default()
        };
        let family = if flow.local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let socket = InetSkEntry {
            id: FIRST_ID,
            family: family as u32,
            r#type: libc::SOCK_STREAM as u32,
            proto: libc::IPPROTO_TCP as u32,
            state: self.state.into(),
            src_port: flow.local.port().into(),
            dst_port: flow.remote.port().into(),
            src_addr: words(flow.local.ip()),
            dst_addr: words(flow.remote.ip()),
            opts: SkOptsEntry { so_sndbuf: self.send_buffer, so_rcvbuf: self.receive_buffer, ..SkOptsEntry::default() },
            ..InetSkEntry::default()
        };
        let content = wire::StreamContent {
            id: FIRST_ID,
            entry: Some(entry),
            sent: left.bytes.clone(),
            round_trip_us: self.round_trip_us,
            ..wire::StreamContent::default()
        };
        let streams = wire::Streams {
            streams: vec![content],
            option_sets: vec![wire::OptionSet::default()],
            ..wire::Streams::default()
        };
        put_together(&wire::Connections { sockets: vec![socket], streams: Some(streams) })
    }
}
