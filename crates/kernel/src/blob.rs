//! The few instructions that enter a tracee: a loop that executes an array of system-call records.
//!
//! The loop lies in `.rodata` between two labels, is position independent, keeps its state in registers that system calls
//! preserve, and touches no stack. Entry: `rbx` = first record, `r12` = number of records (at least 1), `r13` = first record
//! again. At its end `r12` counts the records that were not completed.
//!
//! It ends by sending itself a SIGSTOP, whose delivery is the stop that the tracer sees: should the tracer die the process is
//! stopped by it. (The SIGTRAP of a breakpoint would kill it, and the handler of a blocked SIGTRAP would be lost in any case.)
//! Where a SIGCONT from outside takes the signal away it is sent again. It takes away a SIGCONT in turn, so the loop notes
//! before which signals wait, in the [`HEADER`] bytes before the first record.

/// Stop the batch when this call fails.
pub const STOP_ON_ERROR: u64 = 1;
/// Before the call, argument number `flags >> 8` is replaced by the result of record number `link`.
pub const LINKED: u64 = 2;

/// Bytes before the first record: first the set of signals that wait, written at the end.
pub const HEADER: usize = 16;

/// One system call to execute in a tracee; the layout is shared with the loop below.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// System call number.
    pub number: u64,
    /// Its arguments.
    pub arguments: [u64; 6],
    /// What it returned, `-errno` on failure.
    pub result: i64,
    /// [`STOP_ON_ERROR`], [`LINKED`] and the linked argument's index in bits 8 and up.
    pub flags: u64,
    /// Index of the record whose result is taken.
    pub link: u64,
}

const _: () = assert!(size_of::<Record>() == 80);

impl Record {
    /// Its bytes as they lie in the tracee.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 80] {
        let a = &self.arguments;
        let words = [self.number, a[0], a[1], a[2], a[3], a[4], a[5], self.result as u64, self.flags, self.link];
        let mut bytes = [0; 80];
        for (slot, word) in bytes.chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Offset of `result` in a record.
    pub const RESULT_OFFSET: usize = 56;
}

core::arch::global_asm!(
    ".pushsection .rodata.godwit_blob, \"a\", @progbits",
    ".balign 16",
    ".globl godwit_blob_start",
    "godwit_blob_start:",
    "2:",
    "mov r14, [rbx + 64]",
    "test r14, 2",
    "jz 3f",
    "mov r15, [rbx + 72]",
    "imul r15, r15, 80",
    "mov r15, [r13 + r15 + 56]",
    "shr r14, 8",
    "mov [rbx + r14 * 8 + 8], r15",
    "3:",
    "mov rax, [rbx]",
    "mov rdi, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov r10, [rbx + 32]",
    "mov r8, [rbx + 40]",
    "mov r9, [rbx + 48]",
    "syscall",
    "mov [rbx + 56], rax",
    "cmp rax, -4095",
    "jb 4f",
    "test qword ptr [rbx + 64], 1",
    "jnz 5f",
    "4:",
    "add rbx, 80",
    "dec r12",
    "jnz 2b",
    "5:",
    "mov eax, {rt_sigpending}",
    "lea rdi, [r13 - {header}]",
    "mov esi, 8",
    "syscall",
    "mov eax, {getpid}",
    "syscall",
    "mov r14, rax",
    "mov eax, {gettid}",
    "syscall",
    "mov r15, rax",
    "6:",
    "mov rdi, r14",
    "mov rsi, r15",
    "mov edx, {sigstop}",
    "mov eax, {tgkill}",
    "syscall",
    ".globl godwit_blob_stop",
    "godwit_blob_stop:",
    "jmp 6b",
    ".globl godwit_blob_end",
    "godwit_blob_end:",
    ".popsection",
    rt_sigpending = const libc::SYS_rt_sigpending,
    getpid = const libc::SYS_getpid,
    gettid = const libc::SYS_gettid,
    tgkill = const libc::SYS_tgkill,
    sigstop = const libc::SIGSTOP,
    header = const HEADER,
);

unsafe extern "C" {
    static godwit_blob_start: u8;
    static godwit_blob_stop: u8;
    static godwit_blob_end: u8;
}

/// The loop's machine code; execution starts at its first byte.
#[must_use]
pub fn code() -> &'static [u8] {
    let start = &raw const godwit_blob_start;
    let end = &raw const godwit_blob_end;
    // SAFETY: both labels lie in one section, `end` behind `start`, and everything between is initialised read-only data.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}

/// Where the instruction pointer is, relative to the first byte, in the stop at the end.
#[must_use]
pub fn stop_offset() -> u64 {
    let start = &raw const godwit_blob_start;
    let stop = &raw const godwit_blob_stop;
    (stop as usize - start as usize) as u64
}

#[cfg(test)]
mod tests {
    #[test]
    fn code_is_small_and_ends_in_a_jump_behind_a_system_call() {
        let code = super::code();
        assert!(code.len() > 32 && code.len() < 256);
        let stop = super::stop_offset() as usize;
        assert_eq!(code[stop - 2..stop], [0x0f, 0x05]);
        assert_eq!((code[stop], code.len()), (0xeb, stop + 2));
    }
}
