//! Whether a TCP socket without a connection has the port that it names.
//!
//! getsockname(2) of a connection that has ended goes on naming the port that it had, which is free again unless it was asked for
//! (bind(2)): it is shared with a listener that made the connection, or any other socket may have it by now.

use super::sock_diag;
use super::table::Entry;
use crate::{Error, Result};
use godwit_network::Namespace;

/// Bytes of `struct inet_diag_msg`, and where in it the inode is.
const MESSAGE: usize = 72;
const INODE: usize = 68;
/// `TCP_BOUND_INACTIVE`, which kernels know from Linux 6.8 on; earlier ones list nothing.
const BOUND: u32 = 1 << 13;

/// Looks for a socket of TCP of a family among those that are bound and have no connection. Where the kernel cannot be asked it counts as one; before Linux 6.8 none
/// does.
///
/// # Errors
/// When its network namespace cannot be looked into.
pub(super) fn is_held(entry: &Entry, family: i32) -> Result<bool> {
    let mut question = vec![family as u8, libc::IPPROTO_TCP as u8, 0, 0];
    question.extend(BOUND.to_ne_bytes());
    question.extend([0; 48]);
    let list = || sock_diag::list("TCP sockets", &question, MESSAGE);
    let listed = Namespace::of_process(entry.pid).map_err(Error::from)?.inside(list).map_err(Error::from)?;
    Ok(listed.map_or(true, |listed| listed.iter().any(|socket| socket.word(INODE) == Some(entry.stat.st_ino as u32))))
}
