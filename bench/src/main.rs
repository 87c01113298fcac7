//! `bench`: measures whole migrations.

use std::process::ExitCode;

use clap::Parser;
use godwit_bench::cli::{Arguments, Command};
use godwit_bench::{series, victim};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let ended = match &arguments.command {
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
