//! A server with many clients moves with its address: what its connections cost inside the freeze, and what clients see.
//!
//! Clients live on a third host. Idle ones say nothing until the server has moved, then all are heard. Busy ones talk all the
//! time; the longest time that one of them waits for an answer is the stall.

mod clients;
mod server;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Host, Running, TwoHosts, wait_until};
use migrate::report::{Outcome, Report};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Serialize;

use crate::cli::ConnectionsArguments;
use crate::criu::run_with_connections;
use crate::figures::Engine;
use crate::machine::Machine;
use crate::passage::MOVE;

pub use server::serve;

/// Where the server listens.
const PORT: u16 = 6300;
/// The address that moves.
const SERVICE: &str = "10.77.0.100";
/// Time between two messages of a busy client.
const PAUSE: Duration = Duration::from_millis(50);
/// How long busy clients talk before the move.
const BEFORE: Duration = Duration::from_millis(500);

/// One run.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Run {
    /// What moved them.
    pub engine: Engine,
    /// Connections.
    pub connections: usize,
    /// Whether they talk all the time.
    pub busy: bool,
    /// The freeze, ms; of CRIU, from the beginning of the dump to the end of the restore.
    pub freeze_ms: f64,
    /// Reading the state of everything, connections among it, ms.
    pub collect_ms: Option<f64>,
    /// Making everything again, ms.
    pub rebuild_ms: Option<f64>,
    /// From the decision until the process ran, ms.
    pub resume_ms: Option<f64>,
    /// The longest wait of a busy client, ms.
    pub stall_ms: Option<f64>,
}

/// Makes all runs, prints the table, writes connections.json; gives the exit code.
///
/// # Errors
/// A move failed, or a client saw anything but a delay.
pub fn run(arguments: &ConnectionsArguments) -> Result<u8> {
    allow_descriptors()?;
    let machine = Machine::here(arguments.mtu)?;
    let idle = arguments.counts.iter().map(|&count| (count, false));
    let kinds: Vec<(usize, bool)> = idle.chain(arguments.busy.iter().map(|&count| (count, true))).collect();
    let mut movers = vec![(Engine::Godwit, None)];
    movers.extend(arguments.criu.as_deref().map(|criu| (Engine::Criu, Some(criu))));
    let mut runs = Vec::new();
    // N.B. both by turns: what else happens on the machine is then the same for both.
    for &(count, busy) in &kinds {
        for repetition in 1..=arguments.repetitions {
            for &(engine, criu) in &movers {
                let run = one(count, busy, arguments.mtu, criu);
                let run = run.with_context(|| format!("{engine:?}, {}", name(count, busy)))?;
                let stall = run.stall_ms.map_or_else(String::new, |stall| format!(", longest stall {stall:.1} ms"));
                eprintln!("{engine:?}, {} #{repetition}: freeze {:.1} ms{stall}", name(count, busy), run.freeze_ms);
                runs.push(run);
            }
        }
    }
    println!("{machine}; medians of {}, ms\n", arguments.repetitions);
    println!(
        "{:>12}  {:>6}  {:>8}  {:>8}  {:>8}  {:>8}  {:>14}",
        "connections", "by", "freeze", "collect", "rebuild", "resume", "longest stall"
    );
    for (&(count, busy), &(engine, _)) in kinds.iter().flat_map(|kind| movers.iter().map(move |mover| (kind, mover))) {
        let of_kind = || runs.iter().filter(|run| (run.connections, run.busy, run.engine) == (count, busy, engine));
        let shown = |pick: fn(&Run) -> Option<f64>| {
            median(of_kind().filter_map(pick).collect()).map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"))
        };
        println!(
            "{:>12}  {:>6}  {:>8}  {:>8}  {:>8}  {:>8}  {:>14}",
            name(count, busy),
            format!("{engine:?}"),
            shown(|run| Some(run.freeze_ms)),
            shown(|run| run.collect_ms),
            shown(|run| run.rebuild_ms),
            shown(|run| run.resume_ms),
            shown(|run| run.stall_ms)
        );
    }
    write(&arguments.out, &serde_json::to_string_pretty(&runs)?)?;
    Ok(0)
}

fn name(count: usize, busy: bool) -> String {
    format!("{count} {}", if busy { "busy" } else { "idle" })
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn write(directory: &Path, text: &str) -> Result<()> {
    fs::create_dir_all(directory)?;
    let path = directory.join("connections.json");
    fs::write(&path, text.to_owned() + "\n").with_context(|| path.display().to_string())?;
    println!("\nconnections.json is in {}", directory.display());
    Ok(())
}

/// Lets this process, and those it starts, have as many descriptors as the machine allows.
fn allow_descriptors() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}

fn start_server(hosts: &TwoHosts) -> Result<Running> {
    let directory = hosts.directory();
    // N.B. a copy under another name: programs are told apart by their images.
    let program = directory.join("server");
    fs::copy(std::env::current_exe()?, &program).context("a copy of this program")?;
    let mut command = hosts.source.command("sh");
    command.args(["-c", r#"exec "$0" "$@" </dev/null >server.log 2>&1"#]).arg(&program);
    command.args(["connection-server", SERVICE, &PORT.to_string()]);
    hosts.source.start_command(&mut command)
}

fn one(count: usize, busy: bool, mtu: u32, criu: Option<&Path>) -> Result<Run> {
    let hosts = TwoHosts::builder().mtu(mtu).with_clients().build()?;
    let clients: &Host = hosts.clients()?;
    hosts.source.run("ip", &["address", "add", &format!("{SERVICE}/32"), "dev", "godwit0"])?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let running = start_server(&hosts)?;
    let address = SocketAddr::new(SERVICE.parse()?, PORT);
    wait_until("the server to listen", Duration::from_secs(10), || Ok(clients.connect_to(address).is_ok()))?;
    let namespace = fs::File::open(format!("/proc/{}/ns/net", clients.init_pid()))?;
    let group = clients::Group::connect(namespace, address, count, busy.then_some(PAUSE))?;
    std::thread::sleep(BEFORE);
    group.forget_stalls();
    let pid = hosts.source.pid_here(running.host_pid())?;
    let mut run = Run {
        engine: if criu.is_some() { Engine::Criu } else { Engine::Godwit },
        connections: count,
        busy,
        freeze_ms: 0.0,
        collect_ms: None,
        rebuild_ms: None,
        resume_ms: None,
        stall_ms: None,
    };
    let story = match criu {
        Some(criu) => {
            let gap = run_with_connections(criu, &hosts, pid, || move_address(&hosts))?;
            run.freeze_ms = milliseconds(gap);
            String::new()
        }
        None => {
            let migration =
                hosts.source.migrate(&server, pid).arguments(&["--move-addr", SERVICE]).limit(MOVE).run()?;
            let report: Report = serde_json::from_value(migration.report()?.clone()).context("the report")?;
            let story = format!("{:?}: {:?}{:?}\n{}", report.outcome, report.error, report.obstacles, server.log());
            ensure!(report.outcome == Outcome::Moved, "{story}");
            run.freeze_ms = report.freeze_ms;
            run.collect_ms = Some(report.freeze.collect);
            run.rebuild_ms = Some(report.freeze.rebuild);
            run.resume_ms = Some(report.freeze.resume);
            story
        }
    };
    std::thread::sleep(BEFORE);
    let stall = group.finish().context(story)?;
    run.stall_ms = busy.then_some(milliseconds(stall));
    Ok(run)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Has the service's address move by hand, and the clients' host look for it anew.
fn move_address(hosts: &TwoHosts) -> Result<()> {
    let address = format!("{SERVICE}/32");
    hosts.source.run("ip", &["address", "del", &address, "dev", "godwit0"])?;
    hosts.destination.run("ip", &["address", "add", &address, "dev", "godwit0"])?;
    hosts.clients()?.run("ip", &["neighbour", "flush", "to", SERVICE]).map(drop)
}
