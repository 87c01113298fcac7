//! TCP sockets with keys by which their segments are signed (`TCP_MD5SIG`, RFC 2385; `TCP_AO_ADD_KEY`, RFC 5925). Without its
//! keys a socket would be deaf to its peers.
//!
//! No call on a socket tells its MD5 keys, but the kernel's list of sockets does, all at once, to those with `CAP_NET_ADMIN`.
//! Sockets that are not bound are in no list.

use super::sock_diag;
use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::socket_option;
use godwit_network::Namespace;
use std::collections::BTreeSet;
use std::os::fd::AsFd;

/// Linux 6.7.
const TCP_AO_INFO: i32 = 40;
/// Longer than `struct tcp_ao_info_opt`.
const AO_INFO_SIZE: usize = 64;

/// The sockets of a network namespace that have MD5 keys, by inode.
#[derive(Debug)]
pub(crate) struct Signed(BTreeSet<u32>);

impl Signed {
    /// Lists them. Takes some microseconds for each TCP socket of the namespace, whoever has it.
    ///
    /// # Errors
    /// When the kernel cannot be asked; one that has no such list counts as having no keys.
    pub(crate) fn list(place: &Namespace) -> Result<Self> {
        let list = |family: i32| match sockets_with_keys(family) {
            Err(Error::Call { source: Errno::ENOENT, .. }) => {
                tracing::debug!("this kernel does not list TCP sockets (tcp_diag): keys of TCP_MD5SIG are not noticed");
                Ok(Vec::new())
            }
            listed => listed,
        };
        let inodes = place.inside(|| Ok::<_, Error>([list(libc::AF_INET)?, list(libc::AF_INET6)?].concat()))??;
        Ok(Self(inodes.into_iter().collect()))
    }

    /// By which option the segments of a TCP socket are signed, if they are.
    pub(crate) fn by(&self, entry: &Entry) -> Option<&'static str> {
        if self.0.contains(&(entry.stat.st_ino as u32)) {
            return Some("TCP_MD5SIG");
        }
        let info = socket_option(entry.file.as_fd(), libc::IPPROTO_TCP, TCP_AO_INFO, AO_INFO_SIZE);
        info.is_ok().then_some("TCP_AO_ADD_KEY")
    }
}

/// What stands in the way of moving a socket that is signed by an option.
pub(crate) fn reason(option: &str) -> String {
    format!("its segments are signed ({option}), and their keys would stay behind")
}

fn sockets_with_keys(family: i32) -> Result<Vec<u32>> {
    /// Bytes of `struct inet_diag_msg`, and where in it the inode is.
    const MESSAGE: usize = 72;
    const INODE: usize = 68;
    const MD5SIG: u16 = 18;
    /// `1 << (INET_DIAG_INFO - 1)`: keys are told with what else costs the kernel something.
    const INFO: u8 = 1 << 1;
    let mut question = vec![family as u8, libc::IPPROTO_TCP as u8, INFO, 0];
    question.extend(u32::MAX.to_ne_bytes());
    question.extend([0; 48]);
    let listed = sock_diag::list("TCP sockets", &question, MESSAGE)?;
    let keyed = listed.iter().filter(|socket| socket.attribute(MD5SIG).is_some());
    Ok(keyed.filter_map(|socket| socket.word(INODE)).collect())
}
