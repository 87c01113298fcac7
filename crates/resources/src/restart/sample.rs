//! What /proc says of a thread that waits: in which call, since when, and how often it has run.

use super::call::timeout;
use godwit_kernel::sched;
use godwit_tracee::Registers;
use std::collections::HashMap;

/// A thread as it was seen waiting.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    number: i64,
    arguments: [u64; 6],
    stack_pointer: u64,
    instruction_pointer: u64,
    /// How often it had been given a CPU, and how often it had given it up by itself.
    runs: u64,
    yields: u64,
    /// Function of the kernel that it waits in.
    place: String,
    /// CLOCK_MONOTONIC of this process in nanoseconds when it went to sleep.
    pub(super) began_ns: Option<i64>,
}

impl Sample {
    /// Whether it shows the same call as the registers of the stopped thread.
    pub(super) fn is_of(&self, r: &Registers) -> bool {
        self.number == r.orig_rax as i64
            && self.arguments == [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9]
            && (self.stack_pointer, self.instruction_pointer) == (r.rsp, r.rip)
    }

    /// Whether the thread, just stopped, had not run since: it ran once, to stop.
    pub(super) fn is_undisturbed(&self, pid: i32, tid: i32) -> bool {
        // The second number also tells when it was preempted on its way to the stop; it takes longer to read.
        runs(pid, tid) == Some(self.runs + 1)
            || schedule(&format!("/proc/{pid}/task/{tid}")).is_some_and(|now| now.yields == self.yields + 1)
    }

    /// Guesses what is behind restart_syscall(2).
    pub(super) fn guess(&self, r: &Registers) -> Option<i64> {
        if self.number != libc::SYS_restart_syscall || (self.stack_pointer, self.instruction_pointer) != (r.rsp, r.rip)
        {
            return None;
        }
        let place = self.place.as_str();
        // A clock's number is small, a pointer is not.
        let clock = r.rdi < 4096;
        match () {
            () if place.contains("nanosleep") && clock => Some(libc::SYS_clock_nanosleep),
            () if place.contains("nanosleep") => Some(libc::SYS_nanosleep),
            () if place.contains("futex") => Some(libc::SYS_futex),
            () if place.contains("poll") => Some(libc::SYS_poll),
            () => None,
        }
    }
}

/// Samples those of the threads that wait with a timeout.
pub(super) fn sample(pid: i32, tids: &[i32]) -> HashMap<i32, Sample> {
    let mut found = HashMap::new();
    let mut by_cpu: HashMap<u32, Vec<(i32, i64)>> = HashMap::new();
    for &tid in tids {
        if let Some((sample, cpu, slept_at)) = look(pid, tid) {
            found.insert(tid, sample);
            by_cpu.entry(cpu).or_default().push((tid, slept_at));
        }
    }
    for (tid, began) in on_our_clock(by_cpu) {
        if let Some(sample) = found.get_mut(&tid) {
            sample.began_ns = Some(began);
        }
    }
    found
}

/// Looks at one thread; the last two values are its CPU and when, on that CPU's clock, it went to sleep.
fn look(pid: i32, tid: i32) -> Option<(Sample, u32, i64)> {
    let task = format!("/proc/{pid}/task/{tid}");
    let text = std::fs::read_to_string(format!("{task}/syscall")).ok()?;
    let (number, numbers) = parse_call(&text)?;
    let mut sample = Sample {
        number,
        arguments: numbers[..6].try_into().ok()?,
        stack_pointer: numbers[6],
        instruction_pointer: numbers[7],
        runs: runs(pid, tid)?,
        yields: 0,
        place: String::new(),
        began_ns: None,
    };
    if number == libc::SYS_restart_syscall {
        sample.place = std::fs::read_to_string(format!("{task}/wchan")).unwrap_or_default();
    } else {
        timeout(number, &sample.registers())?;
    }
    let schedule = schedule(&task)?;
    sample.yields = schedule.yields;
    let stat = std::fs::read_to_string(format!("{task}/stat")).ok()?;
    let cpu = stat.rsplit_once(") ")?.1.split(' ').nth(36)?.parse().ok()?;
    // N.B. it must not have run between these files, or they are of different waits.
    (runs(pid, tid) == Some(sample.runs)).then_some((sample, cpu, schedule.exec_start))
}

impl Sample {
    fn registers(&self) -> Registers {
        let mut registers = empty_registers();
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = self.arguments;
        registers
    }
}

fn empty_registers() -> Registers {
    crate::registers::from_bytes(&[0; size_of::<Registers>()]).expect("the right length")
}

/// Parses `number a b c d e f stack-pointer instruction-pointer`; a thread that runs has no such line.
pub(crate) fn parse_call(text: &str) -> Option<(i64, [u64; 8])> {
    let mut words = text.split_whitespace();
    let number = words.next()?.parse().ok()?;
    let mut numbers = [0; 8];
    for slot in &mut numbers {
        *slot = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
    }
    (number >= 0).then_some((number, numbers))
}

/// How often a thread has been given a CPU (third number of /proc/PID/task/TID/schedstat).
fn runs(pid: i32, tid: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
    text.split_whitespace().nth(2)?.parse().ok()
}

pub(crate) struct Schedule {
    /// Nanoseconds on the clock of its CPU when it last began or stopped to run.
    exec_start: i64,
    yields: u64,
}

fn schedule(task: &str) -> Option<Schedule> {
    parse_schedule(&std::fs::read_to_string(format!("{task}/sched")).ok()?)
}

pub(crate) fn parse_schedule(text: &str) -> Option<Schedule> {
    let value = |field: &str| {
        let line = text.lines().find(|line| line.starts_with(field))?;
        line.rsplit_once(':').map(|(_, value)| value.trim())
    };
    // Milliseconds with six digits behind the point.
    let (milliseconds, rest) = value("se.exec_start")?.split_once('.')?;
    let exec_start = milliseconds.parse::<i64>().ok()?.checked_mul(1_000_000)?.checked_add(rest.parse().ok()?)?;
    Some(Schedule { exec_start, yields: value("nr_voluntary_switches")?.parse().ok()? })
}

/// Translates times on the clocks of CPUs to CLOCK_MONOTONIC, by going to each CPU and reading both.
///
/// The clocks of two CPUs can be seconds apart: what a hypervisor takes from a CPU is not counted on it.
fn on_our_clock(by_cpu: HashMap<u32, Vec<(i32, i64)>>) -> Vec<(i32, i64)> {
    let mut translated = Vec::new();
    let Ok(own) = sched::affinity(0) else { return translated };
    for (cpu, threads) in by_cpu {
        if sched::set_affinity(0, &crate::scheduling::mask([cpu])).is_err() {
            continue;
        }
        let Some(difference) = difference_of_clocks() else { continue };
        let now = super::monotonic_ns();
        translated
            .extend(threads.into_iter().map(|(tid, slept_at)| (tid, slept_at.saturating_add(difference).min(now))));
    }
    let _ = sched::set_affinity(0, &own);
    translated
}

/// How far CLOCK_MONOTONIC is ahead of the clock of the CPU that the calling thread runs on, never too little.
///
/// Too little would end a wait early. The scheduler's note is as old as its last look at this thread, and the thread can
/// lose the CPU between the two readings: each pair of them, the note first, yields an upper bound, and the least one counts.
fn difference_of_clocks() -> Option<i64> {
    const PAIRS: usize = 3;
    let pair = || {
        // Giving up the CPU makes the scheduler note the time for this thread too.
        std::thread::yield_now();
        let noted = schedule("/proc/thread-self")?.exec_start;
        Some(super::monotonic_ns() - noted)
    };
    (0..PAIRS).filter_map(|_| pair()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_the_kernel_prints() {
        let (number, numbers) = parse_call("35 0x1 0x2 0x0 0x0 0x0 0x0 0x7ffd 0x7f00\n").unwrap();
        assert_eq!((number, numbers[0], numbers[7]), (35, 1, 0x7f00));
        for other in ["running\n", "-1 0x7ffd 0x7f00\n", "", "35 0x1"] {
            assert!(parse_call(other).is_none(), "{other}");
        }
        let text = "x (1, #threads: 1)\n---\nse.exec_start        :   2223922.112060\nnr_voluntary_switches : 7\n";
        let schedule = parse_schedule(text).unwrap();
        assert_eq!((schedule.exec_start, schedule.yields), (2_223_922_112_060, 7));
        assert!(parse_schedule("se.exec_start : x").is_none());
    }
}
