//! Every victim, in every mode: it moves, it runs on, and nothing was ever wrong.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Host, Mode, PageServerOptions, Trip, TwoHosts, expect_untouched, wait_for};

macro_rules! moves {
    ($($test:ident: $victim:literal $arguments:expr;)*) => {$(
        mod $test {
            use super::*;

            #[test]
            fn hybrid() -> Result<()> {
                Trip::of($victim, &$arguments).run(Mode::Hybrid).map(drop)
            }

            #[test]
            fn pre_copy() -> Result<()> {
                Trip::of($victim, &$arguments).run(Mode::PreCopy).map(drop)
            }

            #[test]
            fn post_copy() -> Result<()> {
                Trip::of($victim, &$arguments).run(Mode::PostCopy).map(drop)
            }

            #[test]
            fn stop_and_copy() -> Result<()> {
                Trip::of($victim, &$arguments).run(Mode::StopAndCopy).map(drop)
            }
        }
    )*};
}

moves! {
    memory_idle: "memory" ["1", "32", "0"];
    memory_hammered_by_eight_threads: "memory" ["8", "64", "20"];
    registers: "registers" [];
    signals: "signals" [];
    timers: "timers" [];
    sleeps: "sleeps" [];
    blocked_calls: "blocked" [];
    clocks: "clocks" [];
    credentials: "credentials" [];
    credentials_of_a_user: "credentials" ["uid=1000"];
    credentials_of_a_user_under_seccomp: "credentials" ["uid=1000", "seccomp=1"];
    credentials_with_fewer_capabilities: "credentials" ["drop=1", "nnp=1"];
    robust_lists_and_rseq: "robust" [];
    threads_born_and_dying: "threads" ["32"];
    file_mappings: "filemap" [];
    shared_memory: "sharedmem" [];
    layout: "layout" [];
    churning_mappings: "churn" [];
    kernel_writes: "kernelwrites" [];
    reads_past_the_page_cache: "direct" [];
    asynchronous_input_and_output: "aio" [];
    sparse_memory: "sparse" ["16"];
    huge_pages: "huge" ["32"];
    forking_after_the_move: "forker" ["16"];
    files: "files" [];
    pipes: "pipes" [];
    events: "events" [];
    listeners: "listeners" [];
    datagrams: "datagrams" [];
    many_threads: "threads" ["300"];
    many_descriptors: "many" ["descriptors"];
    many_mappings: "many" ["mappings"];
    mappings_everywhere: "many" ["everywhere"];
    a_large_stack: "many" ["stack"];
    pages_at_odd_addresses: "many" ["addresses"];
    a_root_directory_of_its_own: "many" ["root"];
    not_dumpable: "many" ["dumpable"];
}

/// A writer that no number of rounds catches up with: pre-copy is told to freeze for as long as it takes.
#[test]
fn memory_written_without_pause() -> Result<()> {
    for mode in Mode::ALL {
        Trip::of("memory", &["2", "32", "-1"]).with(&["--downtime-target", "5000"]).run(mode)?;
    }
    // A target that cannot be met is said to be so, and the process runs on.
    let hosts = TwoHosts::builder().rate("400mbit").build()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let victim = hosts.source.victim("memory", &["2", "32", "-1"])?;
    let before = victim.view()?;
    let arguments = ["--downtime-target", "1", "--max-rounds", "3"];
    let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PreCopy).arguments(&arguments).run()?;
    migration.expect(1, &["failed", "refused"])?;
    ensure!(migration.text().contains("downtime"), "{}", migration.text());
    expect_untouched(&victim, &before)?;
    victim.finish().map(drop)
}

/// The destination has no address but that of its link, where pages that follow later must find it, too.
#[test]
fn to_a_link_local_address() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let script = "ip -6 -o addr show dev godwit0 scope link -tentative | sed -n 's|.*inet6 \\([^/]*\\)/.*|\\1|p'";
    // Both ends': while its own is tentative, the source speaks from another address and then changes it within the greeting.
    let link_local = |host: &Host| {
        wait_for("a link-local address", Duration::from_secs(10), || {
            let ip = host.run("sh", &["-c", script])?.stdout.trim().to_owned();
            Ok((!ip.is_empty()).then_some(ip))
        })
    };
    link_local(&hosts.source)?;
    let ip = link_local(&hosts.destination)?;
    let listen = PageServerOptions { listen: Some("[::]".to_owned()), ..PageServerOptions::default() };
    let mut server = hosts.destination.page_server_with(&hosts.token, &listen)?;
    server.address = server.address.replace("[::]", &format!("[{ip}%godwit0]"));
    let mut victim = hosts.source.victim("memory", &["1", "32", "0"])?;
    victim.expect_beats(5)?;
    let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::PostCopy).run()?;
    migration.expect_moved()?;
    victim.follow(&hosts.destination, &migration)?;
    victim.finish().map(drop)
}

/// The machine's pool of huge pages, larger by 32 as long as this lives.
struct Pool(String);

impl Pool {
    const PATH: &str = "/proc/sys/vm/nr_hugepages";

    fn raise() -> Result<Self> {
        let before = fs::read_to_string(Self::PATH).context("no pool of huge pages on this machine")?;
        let count: u32 = before.trim().parse()?;
        fs::write(Self::PATH, (count + 32).to_string())?;
        Ok(Self(before))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(Self::PATH, &self.0);
    }
}

/// All modes in one test: the pool belongs to the machine.
#[test]
fn pool_of_huge_pages() -> Result<()> {
    let _pool = Pool::raise()?;
    for mode in Mode::ALL {
        Trip::of("hugetlb", &[]).with(&["--downtime-target", "5000"]).run(mode)?;
    }
    Ok(())
}
