//! Frames that arrive at an interface without anybody having sent them there: bpf(2), `BPF_PROG_TEST_RUN` on live frames
//! (Documentation/bpf/bpf_prog_run.rst, Linux 5.18). Layouts are those of linux/bpf.h.

use crate::check;
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const PROG_LOAD: i32 = 5;
const PROG_TEST_RUN: i32 = 10;
const PROG_TYPE_XDP: u32 = 6;
const XDP_PASS: i32 = 2;
const LIVE_FRAMES: u32 = 2;

#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    result: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    processor: u32,
    batch_size: u32,
    padding: u32,
}

/// A `struct xdp_md`.
#[repr(C)]
#[derive(Default)]
struct Context {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_interface: u32,
    receive_queue: u32,
    egress_interface: u32,
}

/// Loads a program that has every frame go on its way, for [`have_arrive`].
///
/// # Errors
/// `EPERM` without `CAP_BPF` and `CAP_NET_ADMIN`, `ENOSYS` where the kernel has no bpf(2).
pub fn load_passing() -> Result<OwnedFd, Errno> {
    const MOVE_IMMEDIATE: u8 = 0xb7;
    const EXIT: u8 = 0x95;
    let program = [
        Instruction { code: MOVE_IMMEDIATE, registers: 0, offset: 0, immediate: XDP_PASS },
        Instruction { code: EXIT, registers: 0, offset: 0, immediate: 0 },
    ];
    let license = c"Apache-2.0";
    let load = Load {
        kind: PROG_TYPE_XDP,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        name: *b"godwit_passing\0\0",
        ..Load::default()
    };
    // SAFETY: `load` and what it points to live until the call returns, and its size is given.
    let fd = check(unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Has a frame, from its Ethernet header on, arrive at an interface of the calling thread's network namespace. What becomes of it there is
/// settled when the call returns, as a rule, and not told.
///
/// # Errors
/// `EINVAL` when it is longer than about 3 KiB, or the kernel is older than Linux 5.18; `ENODEV` for an interface that is not there.
pub fn have_arrive(program: BorrowedFd<'_>, frame: &[u8], interface: u32) -> Result<(), Errno> {
    let length = u32::try_from(frame.len()).map_err(|_| Errno::EINVAL)?;
    let context = Context { data_end: length, ingress_interface: interface, ..Context::default() };
    let run = TestRun {
        program: program.as_raw_fd() as u32,
        data_size_in: length,
        data_in: frame.as_ptr() as u64,
        repeat: 1,
        context_size_in: size_of::<Context>() as u32,
        context_in: &raw const context as u64,
        flags: LIVE_FRAMES,
        batch_size: 1,
        ..TestRun::default()
    };
    // SAFETY: `run` and what it points to live until the call returns; nothing is asked to be written.
    check(unsafe { libc::syscall(libc::SYS_bpf, PROG_TEST_RUN, &raw const run, size_of::<TestRun>()) }).map(drop)
}
