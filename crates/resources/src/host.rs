//! What a host has that the other one must match: kernel, CPU, vdso, clocks.

use crate::{Error, Obstacle, Result};
use godwit_pages::PAGE_SIZE;
use godwit_proto::wire::HostFacts;
use godwit_tracee::read_maps;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};
use std::os::unix::fs::FileExt;

/// CPU flags that programs choose code by; a destination that lacks one that the source has would crash them.
const PROGRAM_VISIBLE: &[&str] = &[
    "sse3",
    "pni",
    "ssse3",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "popcnt",
    "aes",
    "pclmulqdq",
    "movbe",
    "xsave",
    "avx",
    "f16c",
    "fma",
    "bmi1",
    "avx2",
    "bmi2",
    "lzcnt",
    "abm",
    "rdrand",
    "rdseed",
    "adx",
    "sha_ni",
    "rtm",
    "hle",
    "avx512f",
    "avx512dq",
    "avx512cd",
    "avx512bw",
    "avx512vl",
    "avx512ifma",
    "avx512vbmi",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_bitalg",
    "avx512_vpopcntdq",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vp2intersect",
    "avx_vnni",
    "gfni",
    "vaes",
    "vpclmulqdq",
    "pku",
    "ospke",
    "fsgsbase",
    "rdpid",
    "clflushopt",
    "clwb",
    "movdiri",
    "movdir64b",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "erms",
    "fsrm",
    "xsavec",
    "xgetbv1",
    "clzero",
    "waitpkg",
    "serialize",
    "cx16",
];

/// Reads a clock in nanoseconds (clock_gettime(2)).
#[must_use]
pub fn clock_ns(clock: libc::clockid_t) -> i64 {
    clock_gettime(ClockId::from_raw(clock)).map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// Reads the facts of this host.
///
/// # Errors
/// When /proc is not there.
pub fn facts() -> Result<HostFacts> {
    let uname = nix::sys::utsname::uname().map_err(|source| Error::call("host", "uname", source))?;
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")
        .map_err(|source| Error::Proc { path: "/proc/cpuinfo".into(), source })?;
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'));
    let (vdso_digest, vdso_size) = vdso()?;
    let cpus = sched_getaffinity(Pid::from_raw(0)).map_or_else(|_| Vec::new(), |set| cpu_numbers(&set));
    Ok(HostFacts {
        kernel_release: uname.release().to_string_lossy().into_owned(),
        machine: uname.machine().to_string_lossy().into_owned(),
        page_size: PAGE_SIZE as u32,
        cpu_flags: flags.map_or_else(Vec::new, |(_, text)| text.split_whitespace().map(str::to_owned).collect()),
        vdso_digest,
        vdso_size,
        monotonic_ns: clock_ns(libc::CLOCK_MONOTONIC),
        boottime_ns: clock_ns(libc::CLOCK_BOOTTIME),
        realtime_ns: clock_ns(libc::CLOCK_REALTIME),
        online_cpus: cpus.len() as u32,
        cpus,
        ..HostFacts::default()
    })
}

fn cpu_numbers(set: &CpuSet) -> Vec<u32> {
    (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).map(|cpu| cpu as u32).collect()
}

/// Digest and size of the vdso that this kernel gives its processes.
fn vdso() -> Result<(Vec<u8>, u64)> {
    let pid = std::process::id() as i32;
    let Some(vma) = read_maps(pid)?.into_iter().find(|vma| vma.name == b"[vdso]") else {
        return Ok((Vec::new(), 0));
    };
    let mut code = vec![0; vma.length() as usize];
    std::fs::File::open("/proc/self/mem")
        .and_then(|mem| mem.read_exact_at(&mut code, vma.start))
        .map_err(|source| Error::Proc { path: "/proc/self/mem".into(), source })?;
    Ok((Sha256::digest(&code).to_vec(), vma.length()))
}

/// Names what in the destination does not suit a process of the source.
#[must_use]
pub fn compare(source: &HostFacts, destination: &HostFacts) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    if source.machine != destination.machine {
        let text = format!("the source is {}, the destination {}", source.machine, destination.machine);
        obstacles.push(Obstacle::new("CPU architecture", text, ""));
    }
    if source.page_size != destination.page_size {
        let text = format!("the source has {} bytes, the destination {}", source.page_size, destination.page_size);
        obstacles.push(Obstacle::new("page size", text, ""));
    }
    let lacking: Vec<&str> =
        PROGRAM_VISIBLE.iter().filter(|&&flag| has(source, flag) && !has(destination, flag)).copied().collect();
    if !lacking.is_empty() {
        let text = format!("the destination lacks {}, which the program may have chosen code by", lacking.join(" "));
        obstacles.push(Obstacle::new("CPU features", text, ""));
    }
    if source.vdso_digest != destination.vdso_digest {
        let text = format!(
            "the kernels ({} and {}) give processes different vdsos",
            source.kernel_release, destination.kernel_release
        );
        obstacles.push(Obstacle::new("vdso", text, "run the same kernel on both hosts"));
    }
    obstacles
}

fn has(host: &HostFacts, flag: &str) -> bool {
    host.cpu_flags.iter().any(|own| own == flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_suits_itself_and_a_lesser_one_does_not() {
        let own = facts().unwrap();
        assert!(own.vdso_size > 0 && !own.cpu_flags.is_empty());
        assert_eq!(compare(&own, &own), vec![]);
        let mut lesser = own.clone();
        lesser.cpu_flags.retain(|flag| flag != "xsave");
        assert!(compare(&own, &lesser)[0].text.contains("xsave"));
    }
}
