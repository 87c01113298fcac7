//! Socket options as one table: read with getsockopt(2), given to the new socket where it differs.

use super::filter;
use super::kind::integer_option;
use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{read_socket_option, set_socket_option, socket_option};
use godwit_proto::image::{SkOptsEntry, SocketOption};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, LazyLock};

/// `SO_BUF_LOCK` (Linux 5.16): which buffer sizes the program chose itself.
pub(crate) const SO_BUF_LOCK: i32 = 72;
const SNDBUF_LOCKED: i32 = 1;
const RCVBUF_LOCKED: i32 = 2;
/// Longest value of any option in the table.
const MAX_VALUE: usize = 256;
/// Bytes that the options of a socket take, about.
const ROOM: usize = 2048;

/// Whose options they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sort {
    Unix,
    /// TCP of a family.
    Tcp(i32),
    /// TCP of a family, with a connection.
    Connection(i32),
    /// Datagrams and raw packets over IP of a family.
    Datagram(i32),
    Packet,
    Netlink,
    Vsock,
}

/// Options of every socket, in the order in which they are set.
const SOCKET: &[i32] = &[
    libc::SO_REUSEADDR,
    libc::SO_REUSEPORT,
    libc::SO_KEEPALIVE,
    libc::SO_OOBINLINE,
    libc::SO_DONTROUTE,
    libc::SO_BROADCAST,
    libc::SO_LINGER,
    libc::SO_RCVLOWAT,
    libc::SO_RCVTIMEO,
    libc::SO_SNDTIMEO,
    libc::SO_PASSCRED,
    libc::SO_PASSSEC,
    libc::SO_MARK,
    libc::SO_BINDTODEVICE,
    libc::SO_TIMESTAMP,
    libc::SO_TIMESTAMPNS,
    libc::SO_BUSY_POLL,
];

/// Options that have to do with single messages, and those that few programs set.
const SOCKET_OF_MESSAGES: &[i32] = &[
    libc::SO_NO_CHECK,
    libc::SO_TIMESTAMPING,
    SO_TIMESTAMP_NEW,
    SO_TIMESTAMPNS_NEW,
    SO_TIMESTAMPING_NEW,
    libc::SO_RXQ_OVFL,
    libc::SO_WIFI_STATUS,
    libc::SO_NOFCS,
    libc::SO_SELECT_ERR_QUEUE,
    libc::SO_MAX_PACING_RATE,
    libc::SO_ZEROCOPY,
    libc::SO_TXTIME,
    SO_PREFER_BUSY_POLL,
    SO_BUSY_POLL_BUDGET,
    SO_TXREHASH,
    SO_RCVMARK,
    SO_RCVPRIORITY,
    // N.B. a socket of UDP peeks from there; nothing is read before it is there.
    libc::SO_PEEK_OFF,
];
const SO_TIMESTAMP_NEW: i32 = 63;
const SO_TIMESTAMPNS_NEW: i32 = 64;
const SO_TIMESTAMPING_NEW: i32 = 65;
const SO_PREFER_BUSY_POLL: i32 = 69;
const SO_BUSY_POLL_BUDGET: i32 = 70;
const SO_TXREHASH: i32 = 74;
const SO_RCVMARK: i32 = 75;
const SO_RCVPRIORITY: i32 = 82;

/// What datagrams have besides, those of raw sockets (raw(7)) among them.
const IP_OF_MESSAGES: &[(i32, i32)] = &[
    (libc::IPPROTO_IP, libc::IP_HDRINCL),
    (libc::IPPROTO_IP, libc::IP_OPTIONS),
    (libc::IPPROTO_IP, libc::IP_RECVOPTS),
    (libc::IPPROTO_IP, libc::IP_RETOPTS),
    (libc::IPPROTO_IP, libc::IP_PKTINFO),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, libc::IP_RECVTTL),
    (libc::IPPROTO_IP, libc::IP_RECVTOS),
    (libc::IPPROTO_IP, IP_PASSSEC),
    (libc::IPPROTO_IP, libc::IP_RECVORIGDSTADDR),
    (libc::IPPROTO_IP, IP_NODEFRAG),
    (libc::IPPROTO_IP, IP_CHECKSUM),
    (libc::IPPROTO_IP, IP_RECVFRAGSIZE),
    (libc::IPPROTO_IP, IP_RECVERR_RFC4884),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_ALL),
    (libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE),
    (SOL_RAW, ICMP_FILTER),
];
const IP_PASSSEC: i32 = 18;
const IP_NODEFRAG: i32 = 22;
const IP_CHECKSUM: i32 = 23;
const IP_RECVFRAGSIZE: i32 = 25;
const IP_RECVERR_RFC4884: i32 = 26;
const IP_LOCAL_PORT_RANGE: i32 = 51;
const SOL_RAW: i32 = 255;
const ICMP_FILTER: i32 = 1;

const IPV6_OF_MESSAGES: &[(i32, i32)] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
    (libc::IPPROTO_IPV6, IPV6_MULTICAST_ALL),
    (libc::IPPROTO_IPV6, libc::IPV6_ROUTER_ALERT),
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    (libc::IPPROTO_IPV6, IPV6_RECVERR_RFC4884),
    (libc::IPPROTO_IPV6, libc::IPV6_HDRINCL),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_HOPOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_RTHDRDSTOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVRTHDR),
    (libc::IPPROTO_IPV6, libc::IPV6_RTHDR),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVDSTOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPATHMTU),
    (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (libc::IPPROTO_IPV6, IPV6_FLOWINFO),
    (libc::IPPROTO_IPV6, IPV6_FLOWINFO_SEND),
    (libc::IPPROTO_IPV6, libc::IPV6_AUTOFLOWLABEL),
    (libc::IPPROTO_IPV6, libc::IPV6_ADDR_PREFERENCES),
    (libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR),
    (libc::IPPROTO_IPV6, IPV6_RECVFRAGSIZE),
    (libc::IPPROTO_IPV6, IPV6_FREEBIND),
    (libc::IPPROTO_ICMPV6, ICMP6_FILTER),
    (SOL_RAW, IPV6_CHECKSUM),
];
const IPV6_CHECKSUM: i32 = 7;
const IPV6_FLOWINFO: i32 = 11;
const IPV6_MULTICAST_ALL: i32 = 29;
const IPV6_RECVERR_RFC4884: i32 = 31;
const IPV6_FLOWINFO_SEND: i32 = 33;
const IPV6_RECVFRAGSIZE: i32 = 77;
pub(crate) const IPV6_FREEBIND: i32 = 78;
const ICMP6_FILTER: i32 = 1;

const UDP_LEVEL: &[(i32, i32)] = &[
    (libc::IPPROTO_UDP, libc::UDP_CORK),
    (libc::IPPROTO_UDP, libc::UDP_NO_CHECK6_TX),
    (libc::IPPROTO_UDP, libc::UDP_NO_CHECK6_RX),
    (libc::IPPROTO_UDP, libc::UDP_SEGMENT),
    (libc::IPPROTO_UDP, libc::UDP_GRO),
    (libc::IPPROTO_UDPLITE, UDPLITE_SEND_CSCOV),
    (libc::IPPROTO_UDPLITE, UDPLITE_RECV_CSCOV),
    (libc::IPPROTO_UDPLITE, libc::UDP_CORK),
];
const UDPLITE_SEND_CSCOV: i32 = 10;
const UDPLITE_RECV_CSCOV: i32 = 11;

/// Options of packet sockets (packet(7)). N.B. the version before what depends on it.
const PACKET_LEVEL: &[(i32, i32)] = &[
    (libc::SOL_PACKET, libc::PACKET_VERSION),
    (libc::SOL_PACKET, libc::PACKET_RESERVE),
    (libc::SOL_PACKET, libc::PACKET_AUXDATA),
    (libc::SOL_PACKET, libc::PACKET_ORIGDEV),
    (libc::SOL_PACKET, libc::PACKET_VNET_HDR),
    (libc::SOL_PACKET, libc::PACKET_COPY_THRESH),
    (libc::SOL_PACKET, libc::PACKET_TIMESTAMP),
    (libc::SOL_PACKET, PACKET_LOSS),
    (libc::SOL_PACKET, PACKET_TX_HAS_OFF),
    (libc::SOL_PACKET, PACKET_QDISC_BYPASS),
    (libc::SOL_PACKET, PACKET_IGNORE_OUTGOING),
    (libc::SOL_PACKET, PACKET_VNET_HDR_SZ),
];
const PACKET_LOSS: i32 = 14;
const PACKET_TX_HAS_OFF: i32 = 19;
const PACKET_QDISC_BYPASS: i32 = 20;
const PACKET_IGNORE_OUTGOING: i32 = 23;
const PACKET_VNET_HDR_SZ: i32 = 24;

const NETLINK_LEVEL: &[(i32, i32)] = &[
    (libc::SOL_NETLINK, libc::NETLINK_PKTINFO),
    (libc::SOL_NETLINK, libc::NETLINK_BROADCAST_ERROR),
    (libc::SOL_NETLINK, libc::NETLINK_NO_ENOBUFS),
    (libc::SOL_NETLINK, libc::NETLINK_LISTEN_ALL_NSID),
    (libc::SOL_NETLINK, libc::NETLINK_CAP_ACK),
    (libc::SOL_NETLINK, NETLINK_EXT_ACK),
    (libc::SOL_NETLINK, NETLINK_GET_STRICT_CHK),
];
const NETLINK_EXT_ACK: i32 = 11;
const NETLINK_GET_STRICT_CHK: i32 = 12;

/// Sizes of buffers and the time that connecting may take (vsock(7)). N.B. the largest size before the size.
const VSOCK_LEVEL: &[(i32, i32)] =
    &[(libc::AF_VSOCK, 2), (libc::AF_VSOCK, 1), (libc::AF_VSOCK, 0), (libc::AF_VSOCK, 8)];

const IP_LEVEL: &[(i32, i32)] = &[
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (libc::IPPROTO_IP, libc::IP_MINTTL),
];

const IPV6_LEVEL: &[(i32, i32)] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
];

const TCP_LEVEL: &[(i32, i32)] = &[
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_CORK),
    (libc::IPPROTO_TCP, libc::TCP_MAXSEG),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_SYNCNT),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (libc::IPPROTO_TCP, libc::TCP_FASTOPEN),
    (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
];

/// What else a TCP socket has, on whatever level.
const OF_TCP: &[(i32, i32)] = &[
    (libc::SOL_SOCKET, libc::SO_DEBUG),
    (libc::SOL_SOCKET, libc::SO_RXQ_OVFL),
    (libc::SOL_SOCKET, libc::SO_WIFI_STATUS),
    (libc::SOL_SOCKET, libc::SO_SELECT_ERR_QUEUE),
    (libc::SOL_SOCKET, libc::SO_PREFER_BUSY_POLL),
    (libc::SOL_SOCKET, libc::SO_BUSY_POLL_BUDGET),
    (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE),
    (libc::SOL_SOCKET, libc::SO_ZEROCOPY),
    (libc::SOL_SOCKET, libc::SO_TXTIME),
    (libc::SOL_SOCKET, SO_TXREHASH),
    (libc::SOL_SOCKET, SO_RCVMARK),
    (libc::SOL_SOCKET, SO_RCVPRIORITY),
    (libc::SOL_SOCKET, libc::SO_PEEK_OFF),
    // N.B. the new ones after the old: each says which of the two formats counts.
    (libc::SOL_SOCKET, libc::SO_TIMESTAMPING),
    (libc::SOL_SOCKET, SO_TIMESTAMP_NEW),
    (libc::SOL_SOCKET, SO_TIMESTAMPNS_NEW),
    (libc::SOL_SOCKET, SO_TIMESTAMPING_NEW),
    (libc::IPPROTO_IP, libc::IP_OPTIONS),
    (libc::IPPROTO_IP, libc::IP_PKTINFO),
    (libc::IPPROTO_IP, libc::IP_RECVTTL),
    (libc::IPPROTO_IP, libc::IP_RECVTOS),
    (libc::IPPROTO_IP, libc::IP_RECVOPTS),
    (libc::IPPROTO_IP, libc::IP_RETOPTS),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, IP_RECVERR_RFC4884),
    (libc::IPPROTO_IP, libc::IP_RECVORIGDSTADDR),
    (libc::IPPROTO_IP, libc::IP_CHECKSUM),
    (libc::IPPROTO_IP, libc::IP_PASSSEC),
    (libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE),
    (libc::IPPROTO_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS),
    (libc::IPPROTO_TCP, libc::TCP_SAVE_SYN),
    (libc::IPPROTO_TCP, libc::TCP_INQ),
    (libc::IPPROTO_TCP, TCP_TX_DELAY),
    (libc::IPPROTO_TCP, TCP_RTO_MAX_MS),
    (libc::IPPROTO_TCP, TCP_RTO_MIN_US),
    (libc::IPPROTO_TCP, TCP_DELACK_MAX_US),
    (libc::IPPROTO_TCP, libc::TCP_QUICKACK),
];

/// The same of IPv6.
const OF_TCP_OVER_IPV6: &[(i32, i32)] = &[
    (libc::IPPROTO_IPV6, IPV6_MINHOPCOUNT),
    (libc::IPPROTO_IPV6, libc::IPV6_FREEBIND),
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    (libc::IPPROTO_IPV6, IPV6_RECVERR_RFC4884),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVRTHDR),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVDSTOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPATHMTU),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR),
    (libc::IPPROTO_IPV6, IPV6_RECVFRAGSIZE),
    (libc::IPPROTO_IPV6, libc::IPV6_2292PKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_2292HOPOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_2292DSTOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_2292HOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_AUTOFLOWLABEL),
    (libc::IPPROTO_IPV6, libc::IPV6_FLOWINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_FLOWINFO_SEND),
    (libc::IPPROTO_IPV6, libc::IPV6_ADDR_PREFERENCES),
];

/// What means something only before there is a connection. Of one the kernel itself sets the processor with each packet, and
/// connecting by `TCP_FASTOPEN_CONNECT` would put off what repair mode does at once.
const OF_UNCONNECTED: &[(i32, i32)] = &[
    (libc::SOL_SOCKET, libc::SO_INCOMING_CPU),
    (libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT),
    (libc::IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE),
];

/// Numbers that the libc crate does not have.
const IPV6_MINHOPCOUNT: i32 = 73;
const TCP_FASTOPEN_KEY: i32 = 33;
const TCP_FASTOPEN_NO_COOKIE: i32 = 34;
const TCP_TX_DELAY: i32 = 37;
const TCP_RTO_MAX_MS: i32 = 44;
const TCP_RTO_MIN_US: i32 = 45;
const TCP_DELACK_MAX_US: i32 = 46;

/// Options one behind the other: level, name and length as native words, then the value. Many sockets have them alike, and
/// these compare faster than lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Packed(Vec<u8>);

/// Bytes before each value.
const HEAD: usize = 12;

impl Packed {
    fn push(&mut self, level: i32, name: i32, value: &[u8]) {
        for word in [level, name, value.len() as i32] {
            self.0.extend(word.to_ne_bytes());
        }
        self.0.extend(value);
    }

    fn iter(&self) -> impl Iterator<Item = (i32, i32, &[u8])> {
        let mut rest = self.0.as_slice();
        std::iter::from_fn(move || {
            let (head, tail) = rest.split_first_chunk::<HEAD>()?;
            let word = |at: usize| i32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            let (value, tail) = tail.split_at(word(8) as usize);
            rest = tail;
            Some((word(0), word(4), value))
        })
    }

    /// The options in their order.
    pub(crate) fn unpack(&self) -> Vec<SocketOption> {
        self.iter().map(|(level, name, value)| SocketOption { level, name, value: value.to_vec() }).collect()
    }

    /// Puts another value of the same length into a place.
    pub(crate) fn overwrite(&mut self, place: Range<usize>, value: &[u8]) {
        self.0[place].copy_from_slice(value);
    }

    /// Where the value of an option is.
    pub(crate) fn place(&self, level: i32, name: i32) -> Option<Range<usize>> {
        let mut at = 0;
        self.iter().find_map(|(its_level, its_name, value)| {
            let place = at + HEAD..at + HEAD + value.len();
            at = place.end;
            ((its_level, its_name) == (level, name)).then_some(place)
        })
    }

    /// The value of an option that is one int.
    pub(crate) fn integer(&self, level: i32, name: i32) -> Option<i32> {
        let (_, _, value) = self.iter().find(|&(at, which, _)| (at, which) == (level, name))?;
        value.try_into().map(i32::from_ne_bytes).ok()
    }

    /// Where looking at what is unread begins (`SO_PEEK_OFF`), if that is not always at its beginning.
    pub(crate) fn peek_offset(&self) -> Option<i32> {
        self.integer(libc::SOL_SOCKET, libc::SO_PEEK_OFF).filter(|&offset| offset >= 0)
    }
}

/// Which options a socket has, in the order in which they are set.
fn wanted(sort: Sort) -> Vec<(i32, i32)> {
    let of_socket = |names: &[i32]| names.iter().map(|&name| (libc::SOL_SOCKET, name)).collect::<Vec<_>>();
    let mut wanted = of_socket(SOCKET);
    let more: &[&[(i32, i32)]] = match sort {
        Sort::Unix => &[],
        Sort::Tcp(libc::AF_INET) | Sort::Connection(libc::AF_INET) => &[&SHOWN[..1], IP_LEVEL, TCP_LEVEL, OF_TCP],
        Sort::Tcp(_) | Sort::Connection(_) => &[SHOWN, IP_LEVEL, TCP_LEVEL, OF_TCP, IPV6_LEVEL, OF_TCP_OVER_IPV6],
        Sort::Datagram(libc::AF_INET) => &[IP_LEVEL, IP_OF_MESSAGES, UDP_LEVEL],
        Sort::Datagram(_) => &[IP_LEVEL, IP_OF_MESSAGES, IPV6_LEVEL, IPV6_OF_MESSAGES, UDP_LEVEL],
        Sort::Packet => &[PACKET_LEVEL],
        Sort::Netlink => &[NETLINK_LEVEL],
        Sort::Vsock => &[VSOCK_LEVEL],
    };
    wanted.extend(more.concat());
    if !matches!(sort, Sort::Unix | Sort::Tcp(_) | Sort::Connection(_)) {
        wanted.extend(of_socket(SOCKET_OF_MESSAGES));
    }
    // N.B. last: IP_TOS changes it.
    wanted.push((libc::SOL_SOCKET, libc::SO_PRIORITY));
    wanted
}

/// As [`wanted`], of TCP only those that this kernel has: there may be many such sockets.
fn known(sort: Sort) -> Cow<'static, [(i32, i32)]> {
    type Options = LazyLock<Vec<(i32, i32)>>;
    static OVER_IPV4: Options = LazyLock::new(|| of_fresh(libc::AF_INET));
    static OVER_IPV6: Options = LazyLock::new(|| of_fresh(libc::AF_INET6));
    static CONNECTED_OVER_IPV4: Options = LazyLock::new(|| of_connections(&OVER_IPV4));
    static CONNECTED_OVER_IPV6: Options = LazyLock::new(|| of_connections(&OVER_IPV6));
    match sort {
        Sort::Tcp(libc::AF_INET) => OVER_IPV4.as_slice().into(),
        Sort::Tcp(_) => OVER_IPV6.as_slice().into(),
        Sort::Connection(libc::AF_INET) => CONNECTED_OVER_IPV4.as_slice().into(),
        Sort::Connection(_) => CONNECTED_OVER_IPV6.as_slice().into(),
        sort => wanted(sort).into(),
    }
}

/// Those of the options of TCP that a new socket knows.
fn of_fresh(family: i32) -> Vec<(i32, i32)> {
    let mut options = wanted(Sort::Tcp(family));
    let domain = if family == libc::AF_INET { AddressFamily::Inet } else { AddressFamily::Inet6 };
    if let Ok(fresh) = socket(domain, SockType::Stream, SockFlag::SOCK_CLOEXEC, None) {
        let mut value = [0; MAX_VALUE];
        options.retain(|&(level, name)| {
            let asked = read_socket_option(fresh.as_fd(), level, name, &mut value);
            !matches!(asked, Err(Errno::ENOPROTOOPT | Errno::EOPNOTSUPP))
        });
    }
    options
}

/// What a connection says of this was agreed on with its peer, and is read in repair mode.
fn of_connections(options: &[(i32, i32)]) -> Vec<(i32, i32)> {
    options.iter().copied().filter(|&option| option != (libc::IPPROTO_TCP, libc::TCP_MAXSEG)).collect()
}

/// What is on, of those that say so of what was received: each with its last value, on streams only. It cannot be set.
const SHOWN: &[(i32, i32)] =
    &[(libc::IPPROTO_IP, libc::IP_PKTOPTIONS), (libc::IPPROTO_IPV6, libc::IPV6_2292PKTOPTIONS)];

/// Those that say it of others.
const LEADS: &[(i32, i32)] =
    &[SHOWN[0], SHOWN[1], (libc::SOL_SOCKET, SO_TIMESTAMP_NEW), (libc::SOL_SOCKET, libc::SO_TIMESTAMPING)];

/// Which option says of another one that it is off, and comes before it. There may be many sockets, and reading an option takes as
/// long as anything does with one.
fn follows(option: (i32, i32)) -> Option<(i32, i32)> {
    let of_socket = |name| Some((libc::SOL_SOCKET, name));
    match option {
        // Stamps in nanoseconds are stamps; the new format is one of the same stamps.
        (libc::SOL_SOCKET, SO_TIMESTAMPNS_NEW) => of_socket(SO_TIMESTAMP_NEW),
        (libc::SOL_SOCKET, SO_TIMESTAMPING_NEW) => of_socket(libc::SO_TIMESTAMPING),
        (libc::IPPROTO_IP, libc::IP_PKTINFO | libc::IP_RECVTTL | libc::IP_RECVTOS) => {
            Some((libc::IPPROTO_IP, libc::IP_PKTOPTIONS))
        }
        (
            libc::IPPROTO_IPV6,
            libc::IPV6_RECVPKTINFO
            | libc::IPV6_RECVHOPLIMIT
            | libc::IPV6_RECVTCLASS
            | libc::IPV6_2292PKTINFO
            | libc::IPV6_2292HOPLIMIT,
        ) => Some((libc::IPPROTO_IPV6, libc::IPV6_2292PKTOPTIONS)),
        _ => None,
    }
}

/// Options that the kernel changes by itself.
const RESTLESS: [(i32, i32); 3] = [
    (libc::SOL_SOCKET, libc::SO_PEEK_OFF),
    (libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP),
    (libc::IPPROTO_TCP, libc::TCP_QUICKACK),
];

/// Sizes of the buffers for what is received and for what is sent, as `SO_RCVBUF` and `SO_SNDBUF` have them, by one question:
/// the array of `SK_MEMINFO_*` in linux/sock_diag.h.
fn buffers(entry: &Entry) -> Result<(u32, u32)> {
    const RECEIVE: usize = 1;
    const SEND: usize = 3;
    let mut value = [0; MAX_VALUE];
    let length = read_socket_option(entry.file.as_fd(), libc::SOL_SOCKET, libc::SO_MEMINFO, &mut value)
        .map_err(entry.error("SO_MEMINFO"))?;
    let word = |index: usize| {
        let word = value[..length].get(index * 4..index * 4 + 4).and_then(|word| word.try_into().ok());
        word.map(u32::from_ne_bytes).ok_or_else(|| Error::state(entry.name(), "SO_MEMINFO is too short"))
    };
    Ok((word(RECEIVE)?, word(SEND)?))
}

/// The options of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) packed: Arc<Packed>,
    pub(crate) basic: SkOptsEntry,
    /// Where the restless ones are.
    places: [Option<Range<usize>>; RESTLESS.len()],
}

thread_local! {
    /// What this thread has read last: most connections have the same.
    static LAST: RefCell<Arc<Packed>> = RefCell::default();
}

fn shared(packed: Packed) -> Arc<Packed> {
    LAST.with_borrow_mut(|last| {
        if **last != packed {
            *last = Arc::new(packed);
        }
        Arc::clone(last)
    })
}

impl Options {
    /// Reads them; `family` is that of the connection.
    pub(crate) fn read(entry: &Entry, family: i32) -> Result<Self> {
        let (packed, basic) = collect(entry, Sort::Connection(family))?;
        let places = RESTLESS.map(|(level, name)| packed.place(level, name));
        Ok(Self { packed: shared(packed), basic, places })
    }

    /// The same as they are now, if nobody has set any since they were read; `None` if they must be read again.
    pub(crate) fn renewed(&self, entry: &Entry) -> Result<Option<Self>> {
        let mut packed = Arc::clone(&self.packed);
        let mut value = [0; MAX_VALUE];
        for ((level, name), place) in RESTLESS.into_iter().zip(&self.places) {
            // Where looking ahead is off it stays so.
            if name == libc::SO_PEEK_OFF && place.clone().is_some_and(|place| packed.0[place] == (-1i32).to_ne_bytes())
            {
                continue;
            }
            let now = read_socket_option(entry.file.as_fd(), level, name, &mut value);
            let renewed = match (now, place.clone()) {
                (Ok(length), Some(place)) if place.len() == length => {
                    if packed.0[place.clone()] != value[..length] {
                        Arc::make_mut(&mut packed).overwrite(place, &value[..length]);
                    }
                    true
                }
                (Err(_), None) => true,
                _ => false,
            };
            if !renewed {
                return Ok(None);
            }
        }
        let (so_rcvbuf, so_sndbuf) = buffers(entry)?;
        let basic = SkOptsEntry { so_sndbuf, so_rcvbuf, ..self.basic.clone() };
        Ok(Some(Self { packed, basic, places: self.places.clone() }))
    }
}

/// Reads the options of a socket: all in one list, and those that have a field of their own once more; its filter, too.
pub(crate) fn collect(entry: &Entry, sort: Sort) -> Result<(Packed, SkOptsEntry)> {
    let mut options = Packed(Vec::with_capacity(ROOM));
    let mut value = [0; MAX_VALUE];
    let mut off = Vec::new();
    for &(level, name) in known(sort).iter() {
        if follows((level, name)).is_some_and(|lead| off.contains(&lead)) {
            continue;
        }
        // An option that this kind of socket does not have has no value to keep.
        let Ok(length) = read_socket_option(entry.file.as_fd(), level, name, &mut value) else { continue };
        if LEADS.contains(&(level, name)) && value[..length].iter().all(|&byte| byte == 0) {
            off.push((level, name));
        }
        if !SHOWN.contains(&(level, name)) {
            options.push(level, name, &value[..length]);
        }
    }
    let send_buffer = integer_option(entry, libc::SOL_SOCKET, libc::SO_SNDBUF)?;
    let receive_buffer = integer_option(entry, libc::SOL_SOCKET, libc::SO_RCVBUF)?;
    let buffers_locked = integer_option(entry, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(SNDBUF_LOCKED | RCVBUF_LOCKED);
    // The kernel sizes the buffers of connections itself unless told otherwise, by rules of the host.
    let sizes_itself = matches!(sort, Sort::Tcp(_) | Sort::Connection(_));
    let mut buffers = vec![];
    if !sizes_itself || buffers_locked & SNDBUF_LOCKED != 0 {
        buffers.push((libc::SO_SNDBUF, send_buffer));
    }
    if !sizes_itself || buffers_locked & RCVBUF_LOCKED != 0 {
        buffers.push((libc::SO_RCVBUF, receive_buffer));
    }
    buffers.push((SO_BUF_LOCK, buffers_locked));
    for (name, value) in buffers {
        options.push(libc::SOL_SOCKET, name, &value.to_ne_bytes());
    }
    let so_filter = filter::collect(entry)?;
    if !so_filter.is_empty() || !sizes_itself {
        let lock = filter::lock(entry.file.as_fd());
        lock.into_iter().for_each(|locked| options.push(libc::SOL_SOCKET, filter::SO_LOCK_FILTER, &locked));
    }
    let basic = SkOptsEntry {
        so_filter,
        so_sndbuf: send_buffer as u32,
        so_rcvbuf: receive_buffer as u32,
        so_buf_lock: Some(buffers_locked as u32),
        ..SkOptsEntry::default()
    };
    Ok((options, basic))
}

/// Adds what a TCP socket has only before it has a connection.
pub(crate) fn collect_unconnected(entry: &Entry, options: &mut Packed) {
    let read = |level, name| socket_option(entry.file.as_fd(), level, name, MAX_VALUE);
    for &(level, name) in OF_UNCONNECTED {
        if let Ok(value) = read(level, name) {
            options.push(level, name, &value);
        }
    }
    // Clients have cookies that were made with this key, be it the socket's own or that of the host.
    let takes_early_data = read(libc::IPPROTO_TCP, libc::TCP_FASTOPEN).is_ok_and(|value| value != [0; 4]);
    if takes_early_data && let Ok(key) = read(libc::IPPROTO_TCP, TCP_FASTOPEN_KEY) {
        options.push(libc::IPPROTO_TCP, TCP_FASTOPEN_KEY, &key);
    }
}

/// Gives a new socket the options of the old one.
pub(crate) fn apply(socket: BorrowedFd<'_>, options: &[SocketOption], resource: &str) -> Result<()> {
    for option in options {
        apply_one(socket, option).map_err(|source| {
            Error::call(format!("{resource}, option {}:{}", option.level, option.name), "setsockopt", source)
        })?;
    }
    Ok(())
}

/// As [`apply`], for who has the better name for what went wrong and knows that the socket has others.
pub(crate) fn set_all(socket: BorrowedFd<'_>, options: &[SocketOption]) -> Result<(), Errno> {
    options.iter().try_for_each(|option| set_one(socket, option))
}

/// Whether an option can be set only while there is a connection, whose bytes it numbers (`SOF_TIMESTAMPING_OPT_ID`).
pub(crate) fn needs_connection(option: &SocketOption) -> bool {
    const NUMBERED: i32 = 1 << 7;
    let stamps = option.level == libc::SOL_SOCKET && matches!(option.name, libc::SO_TIMESTAMPING | SO_TIMESTAMPING_NEW);
    stamps && option.value.first_chunk().is_some_and(|word| i32::from_ne_bytes(*word) & NUMBERED != 0)
}

/// Whether a socket has an option set to a value.
pub(crate) fn has(socket: BorrowedFd<'_>, option: &SocketOption) -> bool {
    socket_option(socket, option.level, option.name, MAX_VALUE).as_ref() == Ok(&option.value)
}

fn apply_one(socket: BorrowedFd<'_>, option: &SocketOption) -> Result<(), Errno> {
    if has(socket, option) { Ok(()) } else { set_one(socket, option) }
}

fn set_one(socket: BorrowedFd<'_>, option: &SocketOption) -> Result<(), Errno> {
    let SocketOption { level, name, ref value } = *option;
    // The lock of a filter comes after the filter.
    if (level, name) == (libc::SOL_SOCKET, filter::SO_LOCK_FILTER) {
        return Ok(());
    }
    if level == libc::SOL_SOCKET && matches!(name, libc::SO_SNDBUF | libc::SO_RCVBUF) {
        let bytes = value.as_slice().try_into().map_err(|_| Errno::EINVAL)?;
        return set_buffer(socket, name, i32::from_ne_bytes(bytes));
    }
    match set_socket_option(socket, level, name, value) {
        // Kernels before 5.16 always keep a chosen size.
        Err(Errno::ENOPROTOOPT) if level == libc::SOL_SOCKET && name == SO_BUF_LOCK => Ok(()),
        // Any other way of avoiding congestion keeps the connection going.
        Err(Errno::ENOENT) if level == libc::IPPROTO_TCP && name == libc::TCP_CONGESTION => {
            let algorithm = String::from_utf8_lossy(value);
            tracing::warn!(algorithm = algorithm.trim_end_matches('\0'), "this host has not this congestion control");
            Ok(())
        }
        outcome => outcome,
    }
}

/// Sets a buffer to the size that getsockopt(2) shall return: twice what is asked for. The limits of the host do not apply.
pub(crate) fn set_buffer(socket: BorrowedFd<'_>, name: i32, size: i32) -> Result<(), Errno> {
    let forced = if name == libc::SO_SNDBUF { libc::SO_SNDBUFFORCE } else { libc::SO_RCVBUFFORCE };
    set_socket_option(socket, libc::SOL_SOCKET, forced, &(size / 2).to_ne_bytes())
}

/// Makes room for so many bytes in the send buffer.
pub(crate) fn set_send_buffer(socket: BorrowedFd<'_>, size: i32) -> Result<(), Errno> {
    set_buffer(socket, libc::SO_SNDBUF, size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_out_again() {
        let mut packed = Packed::default();
        packed.push(1, 2, b"value");
        packed.push(-3, 4, b"");
        let option = |level, name, value: &[u8]| SocketOption { level, name, value: value.to_vec() };
        assert_eq!(packed.unpack(), [option(1, 2, b"value"), option(-3, 4, b"")]);
        assert_eq!(packed.place(1, 2).map(|place| &packed.0[place]), Some(&b"value"[..]));
        assert_eq!((packed.place(-3, 4).map(|place| place.len()), packed.place(1, 4)), (Some(0), None));
        assert_eq!(Packed::default().unpack(), []);
    }
}
