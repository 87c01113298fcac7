//! TCP connections, taken apart and put together again by repair mode (tcp(7), `TCP_REPAIR`).
//!
//! In repair mode a socket tells its sequence numbers and queues, sends nothing, and when it is closed nobody hears of it. A new
//! one in repair mode takes all of that and is connected without a packet. What the kernel lets nobody set comes about by
//! itself once it runs: congestion window, round-trip times, segments beyond a gap.
//!
//! A socket is put into repair mode when nothing of it can change any more: the process is stopped and its packets are held back
//! (`godwit_network`). [`Connections`] takes all of them out of it again unless the move is done.
//!
//! The end of a stream has a sequence number, too, but is in no queue. What this end has sent is shut down once more, and the
//! peer is used to hearing of it twice; what the peer has sent is delivered as the packet it was. So is a byte that the peer has called
//! urgent: the kernel hears of that only from a packet. Of urgent bytes on their way to the peer it tells nobody: they arrive as
//! ordinary ones if they have to be sent again.

mod apart;
mod together;
mod window;

pub(crate) use apart::{Candidate, collect};
pub(crate) use together::{Restored, Supply};

use window::Window;

use super::kind::refuse;
use super::{listener, table};
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{disconnect, set_socket_option, socket_integer, socket_option};
use godwit_kernel::process::{pidfd_getfd, pidfd_open};
use godwit_kernel::rescuer::{Endangered, Rescuer};
use godwit_network::has;
use nix::sys::socket::{MsgFlags, Shutdown, SockaddrStorage, getsockname, recv, shutdown};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
const TCP_ULP: i32 = 31;

const REPAIR_ON: i32 = 1;
/// Out of repair mode, with a packet that has the peer say how it stands.
const REPAIR_OFF: i32 = 0;
/// Out of repair mode without a packet.
const REPAIR_OFF_SILENT: i32 = -1;
const RECEIVE_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;

const OPTION_TIMESTAMPS: u8 = 1;
const OPTION_SACK: u8 = 2;
const OPTION_WINDOW_SCALE: u8 = 4;

/// Bytes of `struct tcp_info` that are of use.
const INFO_SIZE: usize = 148;

/// States of `enum tcp_state` in which there is a peer.
mod state {
    pub(crate) const ESTABLISHED: u8 = 1;
    pub(super) const SYN_SENT: u8 = 2;
    pub(super) const FIN_WAIT1: u8 = 4;
    pub(super) const FIN_WAIT2: u8 = 5;
    pub(super) const CLOSE_WAIT: u8 = 8;
    pub(super) const LAST_ACK: u8 = 9;
    pub(super) const CLOSING: u8 = 11;
}
pub(crate) use state::ESTABLISHED;
use state::{CLOSE_WAIT, CLOSING, FIN_WAIT1, FIN_WAIT2, LAST_ACK, SYN_SENT};

/// Whether a socket in this state has a peer.
pub(crate) fn is_connection(state: u8) -> bool {
    matches!(state, ESTABLISHED | SYN_SENT | FIN_WAIT1 | FIN_WAIT2 | CLOSE_WAIT | LAST_ACK | CLOSING)
}

/// Whether it is one whose peer has not answered yet.
pub(crate) fn is_asked_for(state: u8) -> bool {
    state == SYN_SENT
}

/// Whether it was shut down for sending and its peer may lack something of what was sent.
pub(crate) fn is_closing(state: u8) -> bool {
    matches!(state, FIN_WAIT1 | LAST_ACK | CLOSING)
}

/// Whether the peer has said that it will send no more.
fn end_was_received(state: u8) -> bool {
    matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING)
}

/// Whether this end has been shut down for sending.
fn end_was_sent(state: u8) -> bool {
    matches!(state, FIN_WAIT1 | FIN_WAIT2 | CLOSING | LAST_ACK)
}

/// Refuses connections that cannot be taken apart.
pub(crate) fn verdict(entry: &table::Entry) -> Result<()> {
    let what = || format!("TCP connection {}", listener::ends(entry));
    let protocol = socket_option(entry.file.as_fd(), libc::IPPROTO_TCP, TCP_ULP, 16).unwrap_or_default();
    if protocol.iter().any(|&byte| byte != 0) {
        let name = String::from_utf8_lossy(&protocol);
        return refuse(entry, &what(), &format!("the kernel speaks {} on it", name.trim_end_matches('\0')));
    }
    if urgent_waits(entry.file.as_fd()) && !can_look_behind(entry.file.as_fd()) {
        return refuse_urgent(entry);
    }
    Ok(())
}

/// Whether a byte waits that the peer has called urgent, and that is not one like any other (`SO_OOBINLINE`).
fn urgent_waits(socket: BorrowedFd<'_>) -> bool {
    let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(socket.as_raw_fd(), &mut [0], flags) == Ok(1)
}

/// Whether what is unread can be looked at from a place on, and so behind an urgent byte (`SO_PEEK_OFF` of TCP, Linux 6.9).
fn can_look_behind(socket: BorrowedFd<'_>) -> bool {
    socket_option(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 4).is_ok()
}

/// Refuses a connection with a byte in it that its peer has called urgent, where older kernels do not let anybody read all.
fn refuse_urgent<T>(entry: &table::Entry) -> Result<T> {
    let what = format!("TCP connection {}", listener::ends(entry));
    refuse(entry, &what, "urgent data waits in it, and this kernel lets nobody look behind it")
}

/// Sockets of the source in repair mode. Dropped, they leave it; they also do when this program is killed.
#[derive(Debug, Default)]
pub struct Connections {
    sockets: Vec<Arc<OwnedFd>>,
    /// For each of them, under which number it is here and whether its port may be shared.
    endangered: Vec<Endangered>,
    rescuer: Option<Rescuer>,
    round_trip: Duration,
    /// Sockets whose connections stay behind, as they were.
    left_behind: Vec<Arc<OwnedFd>>,
}

impl Connections {
    /// Prepares for about so many, which saves time later. To be called by the thread that will stop their process: they are
    /// rescued when it ends.
    ///
    /// # Errors
    /// When no rescuer can be forked.
    pub fn prepare(room: usize) -> Result<Self> {
        let mut none = Self::default();
        none.rescuer = Some(Self::rescuer(room)?);
        Ok(none)
    }

    fn rescuer(room: usize) -> Result<Rescuer> {
        Rescuer::spawn(room).map_err(|source| Error::call("connections", "forking their rescuer", source))
    }

    /// Takes note of a socket that is about to enter repair mode, and of its `SO_REUSEADDR`: leaving that mode takes it away.
    fn note(&mut self, entry: &table::Entry, reuse: i32) {
        self.endangered.push(Endangered { socket: entry.file.as_raw_fd(), reuse });
        self.sockets.push(Arc::clone(&entry.file));
    }

    /// Takes note of a connection that stays behind.
    pub(super) fn leave_behind(&mut self, entry: &table::Entry) {
        self.left_behind.push(Arc::clone(&entry.file));
    }

    /// Has the sockets rescued should this program die.
    fn protect(&mut self) -> Result<()> {
        if self.endangered.is_empty() {
            return Ok(());
        }
        let prepared = self.rescuer.take().filter(|rescuer| rescuer.answer_for(&self.endangered).is_ok());
        let rescuer = match prepared {
            Some(rescuer) => rescuer,
            None => {
                let rescuer = Self::rescuer(self.endangered.len())?;
                rescuer
                    .answer_for(&self.endangered)
                    .map_err(|source| Error::call("connections", "telling their rescuer", source))?;
                rescuer
            }
        };
        self.rescuer = Some(rescuer);
        Ok(())
    }

    /// Says that from now on the connections live elsewhere: they are not taken out of repair mode any more, whatever happens.
    pub fn give_away(&self) {
        if let Some(rescuer) = &self.rescuer {
            rescuer.dismiss();
        }
    }

    /// The longest time that a packet of theirs takes to the peer and back, as the kernel has measured it.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Number of connections.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sockets.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sockets.is_empty()
    }

    /// Has this host forget the connections, without a word to their peers: they live elsewhere. Whoever still has one of the
    /// sockets finds it as if the peer had closed it: the end of the file, nothing more can be sent, no address of a peer. The peers of
    /// connections that stay behind are told that they end, where their address has left: closing them would not reach the peers.
    pub fn forget(mut self) {
        for socket in self.left_behind.drain(..) {
            if let Err(errno) = end(socket.as_fd()) {
                tracing::debug!(%errno, "the peer of a connection that stays behind hears of it when it speaks");
            }
        }
        for (socket, Endangered { reuse, .. }) in self.sockets.drain(..).zip(self.endangered.drain(..)) {
            if let Err(errno) = close_in_silence(socket.as_fd(), reuse) {
                tracing::debug!(%errno, "a connection that has moved is kept until its socket is closed");
            }
        }
    }

    /// Leaves the sockets as they are, in repair mode: it is not known where their connections live.
    pub fn keep(mut self) {
        self.endangered.clear();
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        for (socket, Endangered { reuse, .. }) in self.sockets.iter().zip(&self.endangered) {
            let reuse = reuse.to_ne_bytes();
            let off = set(socket.as_fd(), TCP_REPAIR, REPAIR_OFF_SILENT)
                .and_then(|()| set_socket_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &reuse));
            if let Err(errno) = off {
                tracing::error!(%errno, "a connection could not be given back as it was");
            }
        }
    }
}

/// Takes the TCP sockets of a stopped process out of repair mode, in which a program that is gone has left them; gives their number.
///
/// # Errors
/// When its descriptors cannot be looked at.
pub fn wake_connections(pid: i32) -> Result<usize> {
    each_in_repair_mode(pid, |socket| set(socket, TCP_REPAIR, REPAIR_OFF_SILENT))
}

/// Closes them, and nobody hears of it: a program that is gone has given them away.
///
/// # Errors
/// As [`wake_connections`].
pub fn close_connections(pid: i32) -> Result<usize> {
    /// What it was nobody knows any more: in repair mode it is another one.
    const REUSE: i32 = 1;
    each_in_repair_mode(pid, |socket| close_in_silence(socket, REUSE))
}

fn each_in_repair_mode(pid: i32, act: impl Fn(BorrowedFd<'_>) -> Result<(), Errno>) -> Result<usize> {
    let failed = |what: &'static str| move |source: Errno| Error::call("connections", what, source);
    let pidfd = pidfd_open(pid).map_err(failed("finding the process"))?;
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .map_err(|error| failed("listing descriptors")(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))))?;
    let (mut number_of_them, mut first_error) = (0, None);
    for entry in entries.flatten() {
        let is_socket =
            std::fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().starts_with("socket:"));
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let (true, Some(number)) = (is_socket, number) else { continue };
        let Ok(socket) = pidfd_getfd(pidfd.as_fd(), number) else { continue };
        if socket_integer(socket.as_fd(), libc::IPPROTO_TCP, TCP_REPAIR) == Ok(REPAIR_ON) {
            match act(socket.as_fd()) {
                Ok(()) => number_of_them += 1,
                // N.B. the others have to go on all the same.
                Err(errno) => first_error = first_error.or(Some(errno)),
            }
        }
    }
    first_error.map_or(Ok(number_of_them), |errno| Err(failed("taking one out of repair mode")(errno)))
}

/// Ends a connection whose address is not here any more (`IP_TRANSPARENT`, ip(7)). Another one ends with the last who has it.
fn end(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    let local = getsockname::<SockaddrStorage>(socket.as_raw_fd())?;
    if listener::socket_address(&local).is_none_or(|local| has(local.ip().to_canonical()).unwrap_or(false)) {
        return Ok(());
    }
    for (level, name) in [(libc::IPPROTO_IP, libc::IP_TRANSPARENT), (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT)] {
        // One of them is of another family.
        let _ = set_socket_option(socket, level, name, &1i32.to_ne_bytes());
    }
    shutdown(socket.as_raw_fd(), Shutdown::Both)
}

fn close_in_silence(socket: BorrowedFd<'_>, reuse: i32) -> Result<(), Errno> {
    // N.B. in repair mode, where no reset is sent.
    disconnect(socket)?;
    set(socket, TCP_REPAIR, REPAIR_OFF_SILENT)?;
    set_socket_option(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, &reuse.to_ne_bytes())?;
    // Reading it takes it away: the program is to see an end, not an error.
    socket_option(socket, libc::SOL_SOCKET, libc::SO_ERROR, 4)?;
    match shutdown(socket.as_raw_fd(), Shutdown::Both) {
        // The kernel says so and does it all the same.
        Err(Errno::ENOTCONN) => Ok(()),
        done => done,
    }
}

fn set(socket: BorrowedFd<'_>, name: i32, value: i32) -> Result<(), Errno> {
    set_socket_option(socket, libc::IPPROTO_TCP, name, &value.to_ne_bytes())
}

fn get(socket: BorrowedFd<'_>, name: i32) -> Result<u32, Errno> {
    socket_integer(socket, libc::IPPROTO_TCP, name).map(|value| value as u32)
}
