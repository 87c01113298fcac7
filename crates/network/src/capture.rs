//! Seeing packets arrive, whatever the packet filter makes of them.

use std::os::fd::{AsRawFd, OwnedFd};

use godwit_kernel::Errno;
use godwit_kernel::packet::{Protocol, arrivals};
use nix::sys::socket::{MsgFlags, recv};

use crate::deliver::SPOKEN;
use crate::error::{Error, Result};
use crate::packet::{self, Arrival, Packet};

/// Room for packets that nobody has fetched yet: some hundredths of a second at full rate.
const BUFFER_BYTES: i32 = 32 << 20;
/// Longest packet: IP's own limit, and what a receiving interface joins may be somewhat longer.
const LONGEST: usize = 128 << 10;

/// Sees every TCP packet that arrives from when it is made on, but for what is said in a peer's place ([`crate::stand_in`]).
#[derive(Debug)]
pub(crate) struct Capture {
    sockets: [OwnedFd; 2],
    buffer: Vec<u8>,
}

impl Capture {
    pub(crate) fn begin() -> Result<Self> {
        let open = |protocol| {
            arrivals(protocol, SPOKEN, BUFFER_BYTES)
                .map_err(|source| Error::call("packet socket", "opening it", source))
        };
        Ok(Self { sockets: [open(Protocol::TcpOverIpv4)?, open(Protocol::TcpOverIpv6)?], buffer: vec![0; LONGEST] })
    }

    /// Fetches what has arrived since the last time and is `wanted`.
    pub(crate) fn take(&mut self, wanted: impl Fn(&Arrival) -> bool) -> Result<Vec<Packet>> {
        let mut taken = Vec::new();
        for socket in &self.sockets {
            loop {
                match recv(socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                    Ok(length) => {
                        let bytes = &self.buffer[..length];
                        if packet::read(bytes).as_ref().is_some_and(&wanted) {
                            taken.push(bytes.to_vec().into());
                        }
                    }
                    Err(Errno::EAGAIN) => break,
                    Err(Errno::EINTR | Errno::ENETDOWN) => {}
                    Err(source) => return Err(Error::call("packet socket", "receiving", source)),
                }
            }
        }
        Ok(taken)
    }
}
