//! How much the two ends of a connection take, read and set in repair mode.

use super::TCP_REPAIR_WINDOW;
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{set_socket_option, socket_option};
use std::os::fd::BorrowedFd;

/// Bytes of the structure.
const SIZE: usize = 20;

/// What each end has told the other that it takes: `struct tcp_repair_window` (linux/tcp.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// Sequence number of what came with the news of how much the peer takes.
    pub(super) sent_at: u32,
    /// How many bytes it takes.
    pub(super) to_send: u32,
    /// The most that it ever took.
    pub(super) largest: u32,
    /// How many bytes are taken here behind what is acknowledged.
    pub(super) offered: u32,
    /// Up to which sequence number that is.
    pub(super) acknowledged: u32,
}

impl Window {
    pub(super) fn read(socket: BorrowedFd<'_>) -> Result<Self, Errno> {
        let bytes = socket_option(socket, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, SIZE)?;
        let words: Vec<u32> =
            bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes"))).collect();
        let [sent_at, to_send, largest, offered, acknowledged] = words[..] else { return Err(Errno::EINVAL) };
        Ok(Self { sent_at, to_send, largest, offered, acknowledged })
    }

    pub(super) fn set(self, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        let words = [self.sent_at, self.to_send, self.largest, self.offered, self.acknowledged];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        set_socket_option(socket, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &bytes)
    }
}
