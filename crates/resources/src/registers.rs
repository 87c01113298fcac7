//! Registers of a thread: the general ones and the XSAVE area, with the fields that other readers of the messages expect.
//!
//! Both travel raw, exactly as ptrace(2) gave them; registers that this program has never heard of move all the same. The
//! fields beside them are filled from the raw bytes and never read back. What comes from a peer is checked here before
//! any of it reaches a thread: a bad selector or base address would otherwise be the kernel's to find.

use crate::{Error, Result};
use godwit_proto::image::{
    RseqEntry, ThreadInfoX86, UserX86FpregsEntry, UserX86RegsEntry, UserX86RegsMode, UserX86XsaveEntry,
};
use godwit_tracee::Registers;

/// Bytes of `struct user_regs_struct`.
const SIZE: usize = size_of::<Registers>();
/// Bytes of the legacy (FXSAVE) part of an XSAVE area.
const LEGACY: usize = 512;
/// Bytes of the legacy part and the header.
const HEADER_END: usize = LEGACY + 64;
/// Most bytes of an XSAVE area; AMX makes it 11 KiB.
const MAX_XSTATE: usize = 64 * 1024;
/// Where the kernel notes which components the area can hold (`sw_reserved` of the FXSAVE area).
const ENABLED_AT: usize = 464;
/// Offset of the upper halves of the AVX registers in the uncompacted form, the same on every CPU.
const AVX_AT: usize = 576;
const AVX: u64 = 1 << 2;
/// `cs` and `ss` of 64-bit user code.
const USER_CS: u64 = 0x33;
const USER_SS: u64 = 0x2b;
/// First address that user space cannot have (four- and five-level paging; the kernel checks the finer limit).
const ADDRESS_LIMIT: u64 = 1 << 56;
/// Flags that a program can have: the arithmetic ones, TF, DF, NT, RF, AC and ID.
const PROGRAM_FLAGS: u64 = 0x0025_4dd5;
/// The flags that are always on: the reserved bit and interrupts.
const FIXED_FLAGS: u64 = 0x202;

/// Lists the fields in the order of the kernel's structure.
macro_rules! in_order {
    ($each:ident) => {
        $each!(
            r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs, eflags, rsp,
            ss, fs_base, gs_base, ds, es, fs, gs
        )
    };
}

/// The general registers as they lie in `struct user_regs_struct`.
#[must_use]
pub fn to_bytes(registers: &Registers) -> Vec<u8> {
    macro_rules! words {
        ($($field:ident),*) => { [$(registers.$field),*] };
    }
    in_order!(words).iter().flat_map(|word: &u64| word.to_le_bytes()).collect()
}

/// Reads what [`to_bytes`] wrote.
///
/// # Errors
/// When the length is wrong. The values are not looked at: see [`check`].
pub fn from_bytes(bytes: &[u8]) -> Result<Registers> {
    if bytes.len() != SIZE {
        return Err(Error::state("registers", format!("{} bytes instead of {SIZE}", bytes.len())));
    }
    let mut words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    macro_rules! fill {
        ($($field:ident),*) => { Registers { $($field: words.next().unwrap_or_default()),* } };
    }
    Ok(in_order!(fill))
}

/// Refuses registers that no 64-bit thread could have had.
///
/// # Errors
/// [`Error::State`] naming the first that is out of place.
pub fn check(registers: &Registers) -> Result<()> {
    let wrong = |what: &str, value: u64| Err(Error::state("registers", format!("{what} {value:#x}")));
    if registers.cs != USER_CS || registers.ss != USER_SS {
        return wrong("not 64-bit user code, cs", registers.cs);
    }
    for (name, selector) in [("ds", registers.ds), ("es", registers.es), ("fs", registers.fs), ("gs", registers.gs)] {
        // N.B. null, or the user data segment: others would need an entry in a descriptor table that is not moved.
        if selector > 3 && selector != USER_SS {
            return wrong(name, selector);
        }
    }
    for (name, address) in [("rip", registers.rip), ("fs_base", registers.fs_base), ("gs_base", registers.gs_base)] {
        if address >= ADDRESS_LIMIT {
            return wrong(name, address);
        }
    }
    if registers.eflags & !(PROGRAM_FLAGS | FIXED_FLAGS) != 0 {
        return wrong("eflags", registers.eflags);
    }
    Ok(())
}

/// Components that are not in their initial state in an XSAVE area (`xstate_bv`).
#[must_use]
pub fn components_in_use(xstate: &[u8]) -> u64 {
    word(xstate, LEGACY)
}

/// Components that an XSAVE area read on this machine can hold (XCR0).
#[must_use]
pub fn components_enabled(xstate: &[u8]) -> u64 {
    word(xstate, ENABLED_AT)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
}

/// Fits an XSAVE area of the source to what this machine uses, of which `local` is an example.
///
/// Components have the same place on machines that have them, so only the end differs: what the source lacks is in its
/// initial state, what this machine lacks must have been.
///
/// # Errors
/// [`Error::State`] when components are in use that this machine does not have, or the area is not one.
pub fn fit_xstate(xstate: &[u8], local: &[u8]) -> Result<Vec<u8>> {
    if !(HEADER_END..=MAX_XSTATE).contains(&xstate.len()) {
        return Err(Error::state("XSAVE area", format!("of {} bytes", xstate.len())));
    }
    let missing = components_in_use(xstate) & !components_enabled(local);
    if missing != 0 {
        return Err(Error::state("XSAVE area", format!("uses components {missing:#x}, which this CPU does not have")));
    }
    let mut fitted = xstate.to_vec();
    fitted.resize(local.len(), 0);
    Ok(fitted)
}

/// Composes the message of a thread's registers.
#[must_use]
pub fn to_message(registers: &Registers, xstate: &[u8], clear_tid_addr: u64) -> ThreadInfoX86 {
    ThreadInfoX86 { clear_tid_addr, gpregs: general(registers), fpregs: extended(xstate), tls: Vec::new() }
}

fn general(r: &Registers) -> UserX86RegsEntry {
    UserX86RegsEntry {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        bp: r.rbp,
        bx: r.rbx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        ax: r.rax,
        cx: r.rcx,
        dx: r.rdx,
        si: r.rsi,
        di: r.rdi,
        orig_ax: r.orig_rax,
        ip: r.rip,
        cs: r.cs,
        flags: r.eflags,
        sp: r.rsp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
        mode: Some(UserX86RegsMode::Native.into()),
    }
}

fn extended(xstate: &[u8]) -> UserX86FpregsEntry {
    let short = |at: usize| u32::from(word(xstate, at) as u16);
    let half = |at: usize| word(xstate, at) as u32;
    let halves = |range: std::ops::Range<usize>| -> Vec<u32> {
        let bytes = xstate.get(range).unwrap_or_default();
        bytes.chunks_exact(4).map(|half| u32::from_le_bytes(half.try_into().expect("four bytes"))).collect()
    };
    let in_use = components_in_use(xstate);
    UserX86FpregsEntry {
        cwd: short(0),
        swd: short(2),
        twd: short(4),
        fop: short(6),
        rip: word(xstate, 8),
        rdp: word(xstate, 16),
        mxcsr: half(24),
        mxcsr_mask: half(28),
        st_space: halves(32..160),
        xmm_space: halves(160..416),
        padding: Vec::new(),
        xsave: Some(UserX86XsaveEntry {
            xstate_bv: in_use,
            ymmh_space: if in_use & AVX != 0 { halves(AVX_AT..AVX_AT + 256) } else { Vec::new() },
            ..UserX86XsaveEntry::default()
        }),
    }
}

/// Where a restartable sequence begins, how long it is and where it continues when it is interrupted: `struct rseq_cs`.
pub(crate) const RSEQ_CS_SIZE: usize = 32;
/// Offset of `rseq_cs` in `struct rseq`.
pub(crate) const RSEQ_CS_AT: u64 = 8;

/// Moves a thread out of the restartable sequence that it was interrupted in; true when it was in one.
///
/// The kernel restarts a sequence when its thread is preempted or migrated, and a move to another machine is both, but it
/// only does so for a thread that returns to user space where it had registered. At the destination registering clears
/// the pointer first, so the abort must have been taken before; the source aborts by itself when it is thawed.
pub(crate) fn leave_sequence(registers: &mut Registers, sequence: &[u8; RSEQ_CS_SIZE]) -> bool {
    let (start, length, abort) = (word(sequence, 8), word(sequence, 16), word(sequence, 24));
    let inside = registers.rip.wrapping_sub(start) < length;
    if inside {
        registers.rip = abort;
    }
    inside
}

/// Composes the message of a thread's registration with rseq(2), if it has one.
pub(crate) fn rseq_message(configuration: &godwit_kernel::ptrace::RseqConfiguration) -> Option<RseqEntry> {
    (configuration.pointer != 0).then_some(RseqEntry {
        rseq_abi_pointer: configuration.pointer,
        rseq_abi_size: configuration.size,
        signature: configuration.signature,
        rseq_cs_pointer: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Registers {
        let words: Vec<u8> = (1..=27u64).flat_map(u64::to_le_bytes).collect();
        let mut registers = from_bytes(&words).unwrap();
        (registers.cs, registers.ss, registers.eflags) = (USER_CS, USER_SS, 0x246);
        (registers.ds, registers.es, registers.fs, registers.gs) = (0, 0, 0, 0);
        registers
    }

    #[test]
    fn bytes_have_the_order_of_the_kernel() {
        let registers = sample();
        let bytes = to_bytes(&registers);
        assert_eq!(bytes.len(), 216);
        assert_eq!(from_bytes(&bytes).unwrap(), registers);
        assert_eq!(word(&bytes, std::mem::offset_of!(Registers, rip)), registers.rip);
        assert_eq!(word(&bytes, std::mem::offset_of!(Registers, gs)), registers.gs);
        assert!(from_bytes(&bytes[1..]).is_err());
    }

    #[test]
    fn refuses_what_no_program_has() {
        check(&sample()).unwrap();
        let spoilers: [fn(&mut Registers); 6] = [
            |r| r.cs = 0x23,
            |r| r.ss = 0x18,
            |r| r.fs = 0x7,
            |r| r.fs_base = 0xffff_8000_0000_0000,
            |r| r.eflags |= 3 << 12,
            |r| r.rip = u64::MAX,
        ];
        for spoil in spoilers {
            let mut registers = sample();
            spoil(&mut registers);
            assert!(check(&registers).is_err(), "{registers:?}");
        }
    }

    #[test]
    fn an_area_is_fitted_only_when_nothing_is_lost() {
        let mut local = vec![0; 1024];
        local[ENABLED_AT] = 0x7;
        let mut area = vec![0; 2048];
        area[LEGACY] = 0x7;
        assert_eq!(fit_xstate(&area, &local).unwrap().len(), 1024);
        area[LEGACY] = 0x87;
        assert!(fit_xstate(&area, &local).is_err());
        assert!(fit_xstate(&area[..500], &local).is_err());
    }

    #[test]
    fn a_sequence_is_left_at_its_abort_handler() {
        let mut sequence = [0; RSEQ_CS_SIZE];
        sequence[8..16].copy_from_slice(&0x1000u64.to_le_bytes());
        sequence[16..24].copy_from_slice(&0x20u64.to_le_bytes());
        sequence[24..32].copy_from_slice(&0x2000u64.to_le_bytes());
        for (rip, after) in [(0xfff, 0xfff), (0x1000, 0x2000), (0x101f, 0x2000), (0x1020, 0x1020)] {
            let mut registers = sample();
            registers.rip = rip;
            assert_eq!(leave_sequence(&mut registers, &sequence), rip != after);
            assert_eq!(registers.rip, after);
        }
    }
}
