//! Ending connections of others with a reset: `SOCK_DESTROY` of sock_diag(7), which `ss --kill` uses.

use std::net::IpAddr;

use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use crate::error::{Error, Result};
use crate::flow::Flow;
use crate::netlink;

const SOCK_DESTROY: u16 = 21;

/// Ends TCP connections in the calling thread's network namespace; their peers hear of it. Gives how many there were.
///
/// # Errors
/// Where the kernel cannot do that (`CONFIG_INET_DIAG_DESTROY`), or we may not.
pub(crate) fn reset(flows: &[Flow]) -> Result<usize> {
    let socket = netlink::open(NETLINK_SOCK_DIAG)?;
    let mut ended = 0;
    for flow in flows {
        match netlink::transact(&socket, &netlink::encode(SOCK_DESTROY, netlink::ACKNOWLEDGE, &question(flow)), &[1]) {
            Ok(()) => ended += 1,
            // It has ended by itself.
            Err(godwit_kernel::Errno::ENOENT) => {}
            Err(source) => return Err(Error::call("connection", "SOCK_DESTROY", source)),
        }
    }
    Ok(ended)
}

/// A `struct inet_diag_req_v2` (linux/inet_diag.h).
fn question(flow: &Flow) -> Vec<u8> {
    /// `INET_DIAG_NOCOOKIE`: whichever socket has these ends.
    const ANY: [u8; 8] = [0xff; 8];
    let family = if flow.local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut question = vec![family as u8, libc::IPPROTO_TCP as u8, 0, 0];
    question.extend(u32::MAX.to_ne_bytes());
    question.extend(flow.local.port().to_be_bytes());
    question.extend(flow.remote.port().to_be_bytes());
    for end in [flow.local, flow.remote] {
        let mut address = match end.ip() {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        address.resize(16, 0);
        question.extend(address);
    }
    question.extend([0; 4]);
    question.extend(ANY);
    question
}
