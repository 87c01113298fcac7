//! `bench`: measures whole migrations.

use std::process::ExitCode;

use clap::Parser;
use godwit_bench::cli::{Arguments, Command};
use godwit_bench::{connections, series, victim};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let ended = match &arguments.command {
        Some(Command::Connections(arguments)) => connections::run(arguments),
        Some(Command::ConnectionServer(at)) => connections::serve(at.address, at.port).map(|()| 0),
        Some(Command::Victim(work)) => victim::work(work).map(|()| 0),
        None => series::run(&arguments.series),
    };
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
