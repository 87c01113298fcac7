//! The kernel interfaces that no crate offers, and the only unsafe code of the project.
//!
//! One module per kernel subject. Every function is safe to call: it takes borrowed descriptors, owned buffers and plain
//! numbers, and addresses of *another* process, which the kernel validates. Nothing here decides anything.

pub mod blob;
pub mod bpf;
pub mod calls;
pub mod child;
pub mod descriptors;
pub mod events;
pub mod filter;
pub mod holder;
pub mod inbox;
pub mod ipc;
pub mod memory;
pub mod packet;
pub mod pagemap;
pub mod pause;
pub mod privileges;
pub mod process;
pub mod ptrace;
pub mod rescuer;
pub mod rights;
pub mod sched;
pub mod shared;
pub mod socket;
pub mod stub;
pub mod tun;
pub mod uffd;

pub use nix::errno::Errno;

/// Turns the return value of a libc call (-1 and `errno` on failure) into a result.
pub(crate) fn check(ret: libc::c_long) -> Result<libc::c_long, Errno> {
    if ret == -1 { Err(Errno::last()) } else { Ok(ret) }
}
