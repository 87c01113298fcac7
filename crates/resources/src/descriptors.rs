//! The descriptor table: which open file descriptions a process holds, under which numbers, and in which state.
//!
//! At the source everything is seen from outside: /proc tells the kind, pidfd_getfd(2) lends the open file description,
//! kcmp(2) tells which numbers share one. Nothing read this way changes what the process will find: pipes are read by
//! tee(2), sockets by peeking. At the destination this process opens or makes every file once and hands it to the stub
//! over a UNIX socket, so what was one open file description is one again. What depends on who does it (epoll_ctl(2) with the
//! number it is done under, timerfd_settime(2) with the clocks it is done by) is done by the stub itself, remotely.
//!
//! The content of files without a path (memfd, deleted) is not handled here: it travels as memory, and a callback ties
//! such a descriptor to its shared object.
//!
//! Leans on pidfd_getfd(2) (Linux 5.6) and on kcmp(2) with `KCMP_EPOLL_TFD` (4.13).

mod ahead;
mod alone;
mod closing;
mod collect;
mod connection;
mod courier;
mod datagram;
mod datagram_hold;
mod datagram_queue;
pub(crate) mod decoders;
mod direct;
mod early_connections;
mod epoll;
mod event;
mod external;
mod fdinfo;
mod filter;
mod held_port;
mod inotify;
mod inspect;
mod interface_options;
mod kind;
mod listener;
mod multicast;
mod netlink_socket;
mod object;
mod option_sets;
mod outside;
mod packet_socket;
mod pipe;
mod rebuild;
mod regular;
mod requirements;
mod signed;
mod sock_diag;
mod socket_file;
mod socket_options;
mod table;
mod timer;
mod translated;
mod tun;
mod unix_diag;
mod unix_socket;
mod vsock;
mod whose;

pub use ahead::Ahead;
pub use alone::{Complete, MOST_CONNECTIONS, Seen, Socket, look_at_connections, put_together, take_apart, watched_by};
pub use closing::take_over;
pub use collect::{Source, Taking, collect};
pub use connection::{Connections, close_connections, wake_connections};
pub use courier::Courier;
pub use direct::may_read_directly;
pub use early_connections::EarlyConnections;
pub use external::Externals;
pub use inspect::{Survey, WaitingConnections, inspect, waiting_connections};
pub use object::shared_object;
pub use rebuild::{Destination, Rebuilt, rebuild};
pub use requirements::{check_addresses, check_files};
pub use table::Numbers;
pub use translated::{
    translate_addresses, translate_contents, translate_files, translate_socket, used_addresses, watched_from,
    watched_message, watched_of,
};
pub use whose::other_ends;

pub use crate::timers::Clocks;

use godwit_proto::image::{FdinfoEntry, FileEntry};
use godwit_proto::wire::{PipeContent, SocketContent};

/// The descriptor table of a stopped process in messages: all but connections, which are told of as they are taken apart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Descriptors {
    /// One for each number, ascending.
    pub fdinfo: Vec<FdinfoEntry>,
    /// One for each open file description but connections, and for the path of each named pipe.
    pub files: Vec<FileEntry>,
    /// What waits in pipes; of a pipe in packet mode one for each packet.
    pub pipes: Vec<PipeContent>,
    /// What waits in sockets, in order.
    pub sockets: Vec<SocketContent>,
    /// What is lost on the way, in words.
    pub losses: Vec<String>,
}
