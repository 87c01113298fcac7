//! What a page server and its host hold: compared before and after visitors of whom nothing shall be left.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::deadline::wait_until;
use crate::host::Host;

/// Memory that allocators may keep for themselves, in KiB.
const SLACK_KIB: u64 = 96 << 10;

/// What is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Descriptors of the program, by what they lead to.
    pub descriptors: BTreeMap<String, usize>,
    /// Processes of the host, stubs and zombies included.
    pub processes: usize,
    /// Tables of the host's packet filter.
    pub tables: String,
    /// System V segments of the host.
    pub segments: String,
    /// Interfaces of the host.
    pub interfaces: String,
    /// Threads of the program.
    threads: usize,
    /// Resident memory of the program, in KiB.
    memory_kib: u64,
}

impl Footprint {
    /// Takes the footprint of the program with this pid (as the test sees it) and of its host.
    ///
    /// # Errors
    /// The program is gone.
    pub fn of(host: &Host, program: u32) -> Result<Self> {
        let mut descriptors = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{program}/fd")).context("the program is gone")? {
            // N.B. one may be closed meanwhile.
            let Ok(link) = fs::read_link(entry?.path()) else { continue };
            let link = link.to_string_lossy().into_owned();
            // What is written down of hand-overs is kept for sources that ask, up to a number.
            if link.starts_with("/run/godwit/") {
                continue;
            }
            let kind = link.split_once(":[").map_or(link.as_str(), |(kind, _)| kind).to_owned();
            *descriptors.entry(kind).or_default() += 1;
        }
        let status = fs::read_to_string(format!("/proc/{program}/status"))?;
        let number = |field: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(field))?;
            line.trim_start_matches(':').split_whitespace().next()?.parse().ok()
        };
        let segments = host.run("cat", &["/proc/sysvipc/shm"])?.stdout.lines().skip(1).collect::<Vec<_>>().join("\n");
        Ok(Self {
            descriptors,
            processes: host.processes()?.len(),
            tables: host.run("nft", &["list", "tables"])?.stdout,
            segments,
            interfaces: host.run("ip", &["-brief", "link"])?.stdout,
            threads: number("Threads").context("no threads")? as usize,
            memory_kib: number("VmRSS").context("no memory")?,
        })
    }

    /// Expects that no more is held than this, soon.
    ///
    /// # Errors
    /// Names what is.
    pub fn expect_again(&self, host: &Host, program: u32) -> Result<()> {
        let mut now = self.clone();
        let settled = wait_until("everything to be let go", Duration::from_secs(20), || {
            now = Self::of(host, program)?;
            Ok(self.is_like(&now))
        });
        settled.with_context(|| format!("before: {self:?}\nnow: {now:?}; processes: {:?}", host.processes()))?;
        ensure!(now.memory_kib < self.memory_kib + SLACK_KIB, "{} KiB are kept", now.memory_kib - self.memory_kib);
        // N.B. threads for blocking work wait for more of it before they end.
        ensure!(now.threads < self.threads + 64, "{} threads instead of {}", now.threads, self.threads);
        Ok(())
    }

    fn is_like(&self, other: &Self) -> bool {
        let plain = |one: &Self| Self { threads: 0, memory_kib: 0, ..one.clone() };
        plain(self) == plain(other)
    }
}
