//! The marks of an address space (code, data, heap, stack, arguments), its auxiliary vector and its executable:
//! PR_SET_MM_MAP (PR_SET_MM(2const)), the form that needs no CAP_SYS_RESOURCE.

use crate::Result;
use godwit_proto::image::MmEntry;
use godwit_tracee::{Batch, Tracee};

const PR_SET_MM_MAP: u64 = 14;
/// Size of the kernel's `struct prctl_mm_map`.
const MAP_SIZE: usize = 104;
const AUXV_OFFSET: usize = 88;
const AUXV_SIZE_OFFSET: usize = 96;
const EXE_FD_OFFSET: usize = 100;

/// Sets all marks; with `exe`, also what /proc/PID/exe shows, which no mapping of the old executable may contradict.
///
/// # Errors
/// `EINVAL` when the kernel finds the marks implausible, `ENOENT` when the executable is not here.
pub(crate) fn set(tracee: &mut Tracee, mm: &MmEntry, exe: Option<&str>) -> Result<()> {
    let mut batch = Batch::new();
    let opened = exe.map(|path| {
        let name = batch.string(path.as_bytes());
        let what = format!("opening the executable {path}");
        batch.call(what, libc::SYS_openat, &[libc::AT_FDCWD.into(), name.into(), libc::O_RDONLY.into()])
    });
    let words = [
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
    ];
    let mut map = vec![0u8; MAP_SIZE];
    for (slot, word) in map.chunks_exact_mut(8).zip(words) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    let auxv: Vec<u8> = mm.mm_saved_auxv.iter().flat_map(|word| word.to_le_bytes()).collect();
    map[AUXV_SIZE_OFFSET..AUXV_SIZE_OFFSET + 4].copy_from_slice(&(auxv.len() as u32).to_le_bytes());
    map[EXE_FD_OFFSET..].copy_from_slice(&u32::MAX.to_le_bytes());
    let auxv = batch.data(&auxv);
    let map = batch.data(&map);
    batch.pointer(map, AUXV_OFFSET, auxv);
    let arguments = [libc::PR_SET_MM.into(), PR_SET_MM_MAP.into(), map.into(), MAP_SIZE.into(), 0.into()];
    batch.call("setting the marks of the address space (PR_SET_MM_MAP)", libc::SYS_prctl, &arguments);
    let outcome = tracee.run(batch)?;
    let Some(opened) = opened else { return Ok(()) };
    // The descriptor's number goes into the structure, so the executable is set by a second batch.
    let fd = outcome.result(opened).unwrap_or_default() as u32;
    set_executable(tracee, outcome.bytes(map), &mm.mm_saved_auxv, fd)
}

fn set_executable(tracee: &mut Tracee, map: &[u8], auxv: &[u64], fd: u32) -> Result<()> {
    let mut batch = Batch::new();
    let mut map = map.to_vec();
    map[EXE_FD_OFFSET..].copy_from_slice(&fd.to_le_bytes());
    let auxv: Vec<u8> = auxv.iter().flat_map(|word| word.to_le_bytes()).collect();
    let auxv = batch.data(&auxv);
    let map = batch.data(&map);
    batch.pointer(map, AUXV_OFFSET, auxv);
    let arguments = [libc::PR_SET_MM.into(), PR_SET_MM_MAP.into(), map.into(), MAP_SIZE.into(), 0.into()];
    batch.call("setting the executable (PR_SET_MM_MAP)", libc::SYS_prctl, &arguments);
    batch.call("close", libc::SYS_close, &[fd.into()]);
    tracee.run(batch)?;
    Ok(())
}
