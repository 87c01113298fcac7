//! The command line of `bench`.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::builder::TypedValueParser;
use clap::{Args, Parser, Subcommand};

use crate::plan::Scenario;

const ABOUT: &str = "Measures how whole processes move between two hosts";

const DETAILS: &str = "\
Makes two hosts out of namespaces on this machine, moves processes of several
sizes from one to the other, and says how long they were not running, where that
time went, and how fast everything was. Writes bench.json and freeze.svg.
Needs root, and migrate and page-server beside this program.";

const EPILOGUE: &str = "\
Scenarios:
  hybrid-idle    hybrid mode; the process only notes the time
  hybrid-writer  hybrid mode; the process rewrites memory at --writer MiB/s
  pre-copy       pre-copy mode; the process rewrites memory at --writer MiB/s
  post-copy      post-copy mode; the process touches its pages at random
  stop-and-copy  stop-and-copy mode; the process only notes the time
  hybrid-busy    hybrid mode; a thread computes without pause and rewrites memory at --writer MiB/s: how much slower it
                 gets while pages travel. Two hosts share this machine's processors here, so its processor time counts

Side by side:
  with --criu PATH the same processes are moved by CRIU too: stop-and-copy is a dump to its page server and a restore, with
  images on a tmpfs, and post-copy its lazy-pages. Its freeze is what the process sees. Where root has no CAP_SYS_RESOURCE,
  lazy-pages needs wider limits for pipes: fs.pipe-max-size 16777216 and fs.pipe-user-pages-soft 0

Exit codes:
  0  measured, whether the figures are good or not
  1  a move failed
  2  wrong usage

Examples:
  cargo build --release -p migrate -p page-server -p godwit-bench && target/release/bench
  bench --sizes 16 --repetitions 1
  bench --sizes 1024,4096 --scenarios hybrid-idle,hybrid-writer --out /tmp/figures
  bench --criu /usr/local/sbin/criu
  bench connections --counts 0,1000 --repetitions 3";

/// What `bench` was called with.
#[derive(Debug, Parser)]
#[command(
    name = "bench", version, about = ABOUT, long_about = DETAILS, after_long_help = EPILOGUE,
    after_help = "`--help` says more: scenarios, exit codes, examples.",
    args_conflicts_with_subcommands = true, disable_help_subcommand = true
)]
pub struct Arguments {
    /// Something else than a series of runs
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The series
    #[command(flatten)]
    pub series: SeriesArguments,
}

/// Something else than a series of runs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measures what TCP connections cost: a server with many clients moves with its address. Writes connections.json
    Connections(ConnectionsArguments),
    /// The process that is moved.
    #[command(hide = true)]
    Victim(VictimArguments),
    /// The server that is moved.
    #[command(hide = true)]
    ConnectionServer(ConnectionServerArguments),
}

/// How many connections, and how.
#[derive(Args, Debug)]
pub struct ConnectionsArguments {
    /// Numbers of idle connections
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "0,1,100,1000,10000", value_parser = clap::value_parser!(u32).range(0..=25_000).map(|count| count as usize))]
    pub counts: Vec<usize>,
    /// Numbers of connections whose clients talk all the time
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1000", value_parser = clap::value_parser!(u32).range(1..=25_000).map(|count| count as usize))]
    pub busy: Vec<usize>,
    /// Runs of each; medians count
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repetitions: u32,
    /// The largest packet between the hosts in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 9000, value_parser = clap::value_parser!(u32).range(1280..=65535))]
    pub mtu: u32,
    /// Have the criu at PATH move the same servers, too
    #[arg(long, value_name = "PATH")]
    pub criu: Option<PathBuf>,
    /// Where to write connections.json
    #[arg(long, value_name = "DIRECTORY", default_value = "target/bench")]
    pub out: PathBuf,
}

/// Where a server listens.
#[derive(Args, Debug)]
pub struct ConnectionServerArguments {
    /// Its address
    pub address: IpAddr,
    /// Its port
    pub port: u16,
}

/// Which runs to make, and how.
#[derive(Args, Debug)]
pub struct SeriesArguments {
    /// Sizes of the process in MiB
    #[arg(long, value_name = "MIB,...", value_delimiter = ',', default_value = "16,256,1024,4096", value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    pub sizes: Vec<u64>,
    /// What is measured
    #[arg(
        long,
        value_enum,
        value_name = "NAME,...",
        value_delimiter = ',',
        default_value = "hybrid-idle,hybrid-writer,post-copy,hybrid-busy"
    )]
    pub scenarios: Vec<Scenario>,
    /// Runs of each scenario and size; medians count
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repetitions: u32,
    /// What the writer of a scenario rewrites, in MiB/s
    #[arg(long, value_name = "MIB", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub writer: u64,
    /// The largest packet between the hosts in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 9000, value_parser = clap::value_parser!(u32).range(1280..=65535))]
    pub mtu: u32,
    /// How long to wait for a quiet moment before each run, in seconds
    #[arg(long, value_name = "S", default_value_t = 20, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub patience: u64,
    /// Move the same processes by this CRIU too
    #[arg(long, value_name = "PATH")]
    pub criu: Option<PathBuf>,
    /// Where to write bench.json and freeze.svg
    #[arg(long, value_name = "DIRECTORY", default_value = "target/bench")]
    pub out: PathBuf,
}

/// What the process that is moved does.
#[derive(Args, Debug)]
pub struct VictimArguments {
    /// MiB to fill
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    pub memory: u64,
    /// MiB to rewrite in a second
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    pub writer: u64,
    /// Compute between the writes, instead of sleeping
    #[arg(long)]
    pub busy: bool,
    /// Touch pages at random
    #[arg(long)]
    pub reader: bool,
    /// Where to write what it sees
    #[arg(long, value_name = "FILE")]
    pub status: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once("bench").chain(words.split_whitespace()))
    }

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn nothing_is_required() {
        let series = parse("").unwrap().series;
        assert_eq!(series.sizes, [16, 256, 1024, 4096]);
        assert_eq!(series.repetitions, 5);
        assert_eq!(series.writer, 20);
        assert_eq!(series.mtu, 9000);
        assert_eq!(series.out, PathBuf::from("target/bench"));
        assert!(!series.scenarios.contains(&Scenario::PreCopy) && series.criu.is_none());
    }

    #[test]
    fn lists_have_commas() {
        let series = parse("--sizes 16,32 --scenarios post-copy,hybrid-idle --repetitions 1").unwrap().series;
        assert_eq!(series.sizes, [16, 32]);
        assert_eq!(series.scenarios, [Scenario::PostCopy, Scenario::HybridIdle]);
        for wrong in ["--sizes 0", "--sizes many", "--repetitions 0", "--scenarios fast", "--mtu 100"] {
            assert_eq!(parse(wrong).expect_err(wrong).exit_code(), 2);
        }
    }
}
