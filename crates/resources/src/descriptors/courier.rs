//! Handing open files to a stub: sent over a UNIX socket (`SCM_RIGHTS`, unix(7)) and received by remote calls.

use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_tracee::{Batch, Buffer, Call, Outcome, Tracee};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use std::collections::BTreeSet;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Most descriptors in one message (`SCM_MAX_FD`).
pub(crate) const MAX_IN_MESSAGE: usize = 253;
/// Size of `struct cmsghdr`.
const CONTROL_HEADER: usize = 16;

/// The way files go into a stub: one end here, the other the only descriptor that the stub has.
#[derive(Debug)]
pub struct Courier {
    ours: OwnedFd,
    number: RawFd,
}

/// A message that the stub is going to receive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reception {
    call: Call,
    control: Buffer,
    count: usize,
}

impl Courier {
    /// Makes a courier and the end that the stub must be born with, under the number it has here.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn pair() -> Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|source| Error::call("courier", "socketpair", source))?;
        let number = theirs.as_raw_fd();
        Ok((Self { ours, number }, theirs))
    }

    /// Number of its end inside the stub.
    #[must_use]
    pub fn number(&self) -> RawFd {
        self.number
    }

    /// Closes every descriptor of a new stub but the courier's end: it was born with copies of all of ours.
    ///
    /// # Errors
    /// When the stub is gone.
    pub fn isolate(&self, stub: &mut Tracee) -> Result<()> {
        let mut batch = Batch::new();
        if self.number > 0 {
            let below = [0.into(), (self.number - 1).into(), 0.into()];
            batch.call("close_range", libc::SYS_close_range, &below);
        }
        let above = [(self.number + 1).into(), u32::MAX.into(), 0.into()];
        batch.call("close_range", libc::SYS_close_range, &above);
        stub.run(batch)?;
        Ok(())
    }

    /// Makes a new stub's table large enough for numbers up to `highest`. Growing it takes time, and most where threads share it.
    ///
    /// # Errors
    /// When the stub is gone.
    pub fn make_room(&self, stub: &mut Tracee, highest: u32) -> Result<()> {
        let mut batch = Batch::new();
        // What it may not have, it will be told inside the freeze.
        let beyond = u64::from(highest).max(self.number as u64) + 1;
        batch.attempt(
            "making room for descriptors",
            libc::SYS_dup3,
            &[self.number.into(), beyond.into(), libc::O_CLOEXEC.into()],
        );
        batch.attempt("making room for descriptors", libc::SYS_close, &[beyond.into()]);
        stub.run(batch)?;
        Ok(())
    }

    /// Adds the calls that move its end to the lowest number that is not among `wanted`.
    pub(crate) fn make_way(&mut self, batch: &mut Batch, wanted: &BTreeSet<RawFd>) {
        if !wanted.contains(&self.number) {
            return;
        }
        let free = (0..).find(|fd| !wanted.contains(fd)).unwrap_or_default();
        let arguments = [self.number.into(), free.into(), libc::O_CLOEXEC.into()];
        batch.call("moving the courier's socket", libc::SYS_dup3, &arguments);
        batch.call("moving the courier's socket", libc::SYS_close, &[self.number.into()]);
        self.number = free;
    }

    /// Sends at most [`MAX_IN_MESSAGE`] files.
    pub(crate) fn send(&self, files: &[BorrowedFd<'_>]) -> Result<()> {
        let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let failed = |source: Errno| Error::call("courier", "sending descriptors", source);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.ours.as_raw_fd(), &[IoSlice::new(b"f")], &rights, flags, None).map_err(failed)?;
        Ok(())
    }

    /// Adds the call that receives one message of `count` files, which are all closed on exec or all kept.
    pub(crate) fn receive(&self, batch: &mut Batch, count: usize, close_on_exec: bool) -> Reception {
        const HEADER: usize = 56;
        let control_length = CONTROL_HEADER + (count * 4).next_multiple_of(8);
        let byte = batch.buffer(1);
        let control = batch.buffer(control_length);
        let piece = batch.data(&[0u64, 1].map(u64::to_le_bytes).concat());
        batch.pointer(piece, 0, byte);
        // struct msghdr: name, its length, pieces, their number, control, its length, flags
        let header = batch.data(&[0u64, 0, 0, 1, 0, control_length as u64, 0].map(u64::to_le_bytes).concat());
        const _: () = assert!(HEADER == 7 * 8);
        batch.pointer(header, 16, piece);
        batch.pointer(header, 32, control);
        let flags = libc::MSG_DONTWAIT | if close_on_exec { libc::MSG_CMSG_CLOEXEC } else { 0 };
        let arguments = [self.number.into(), header.into(), flags.into()];
        let call = batch.call("receiving descriptors", libc::SYS_recvmsg, &arguments);
        Reception { call, control, count }
    }

    /// The numbers under which the files of a message arrived, in their order.
    pub(crate) fn received(outcome: &Outcome, reception: Reception) -> Result<Vec<RawFd>> {
        let Reception { call, control, count } = reception;
        let lost =
            || Error::state("courier", "the stub did not receive all descriptors; is its limit of open files too low?");
        let length = outcome.word(control, 0) as usize;
        if outcome.result(call) != Ok(1) || length != CONTROL_HEADER + count * 4 {
            return Err(lost());
        }
        Ok((0..count).map(|index| outcome.half(control, CONTROL_HEADER + index * 4) as RawFd).collect())
    }

    /// Adds the call that closes its end in the stub; nothing can be handed over afterwards.
    pub fn add_close(self, batch: &mut Batch) {
        batch.call("closing the courier's socket", libc::SYS_close, &[self.number.into()]);
    }

    /// Closes its end in the stub.
    ///
    /// # Errors
    /// When the stub is gone.
    pub fn close(self, stub: &mut Tracee) -> Result<()> {
        let mut batch = Batch::new();
        self.add_close(&mut batch);
        stub.run(batch)?;
        Ok(())
    }
}
