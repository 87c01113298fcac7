//! What a migration could leave behind on a host.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::host::{Host, STATE};
use crate::proc_view;

/// Everything on a host that the engine's programs make and must remove: one line for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Traces(BTreeSet<String>);

/// The kinds of socket that they open, as files of `/proc/PID/net`, and the words of a line that tell one from another.
const SOCKETS: [(&str, &[usize]); 7] = [
    ("tcp", &[1, 2]),
    ("tcp6", &[1, 2]),
    ("udp", &[1, 2]),
    ("udp6", &[1, 2]),
    ("raw", &[1, 2]),
    ("packet", &[2, 3, 4]),
    ("unix", &[4, 7]),
];

impl Traces {
    /// Looks at a host.
    pub(super) fn of(host: &Host) -> Result<Self> {
        let mut all = BTreeSet::new();
        for (pid, name) in host.processes()? {
            // What runs from the start has the same pid to the end.
            all.insert(format!("process {pid} {name}"));
        }
        let tables = host.run("nft", &["list", "tables"])?.stdout;
        all.extend(tables.lines().map(|table| format!("packet filter {table}")));
        let init = host.init_pid();
        for line in fs::read_to_string(format!("/proc/{init}/mountinfo"))?.lines() {
            all.insert(format!("mount {line}"));
        }
        for (kind, words) in SOCKETS {
            let text = fs::read_to_string(format!("/proc/{init}/net/{kind}")).unwrap_or_default();
            for line in text.lines().skip(1) {
                let line: Vec<&str> = line.split_whitespace().collect();
                let words = words.iter().filter_map(|&place| line.get(place).copied()).collect::<Vec<_>>().join(" ");
                all.insert(format!("socket {kind} {words}"));
            }
        }
        let files = host.run("find", &[STATE, "-type", "f"])?.stdout;
        all.extend(files.lines().map(|path| format!("file {path}")));
        for kind in ["shm", "sem", "msg"] {
            let script = format!("tail -n +2 /proc/sysvipc/{kind}");
            all.extend(host.run("sh", &["-c", &script])?.stdout.lines().map(|line| format!("{kind} {line}")));
        }
        Ok(Self(all))
    }

    /// Expects that nothing is there that was not there before; something that has been ended may take a moment to go.
    pub(super) fn expect_none_since(host: &Host, before: &Self) -> Result<()> {
        let mut left = Vec::new();
        for _ in 0..20 {
            left = Self::of(host)?.0.difference(&before.0).cloned().collect();
            if left.is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        let about = |line: &String| match line.split_whitespace().nth(1).and_then(|pid| pid.parse().ok()) {
            Some(pid) if line.starts_with("process ") => format!("{line} ({:?})", proc_view::namespace_pids(pid)),
            _ => line.clone(),
        };
        bail!("left behind at the {}: {}", host.name(), left.iter().map(about).collect::<Vec<_>>().join("; "))
    }
}
