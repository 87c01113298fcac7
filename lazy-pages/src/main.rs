//! Entry point; everything is in the library of this package.

use std::process::ExitCode;

use clap::Parser;
use lazy_pages::{Arguments, Command, run};

fn main() -> ExitCode {
    let Arguments { command: Command::Daemon(arguments) } = Arguments::parse();
    godwit_kernel::process::go_before_others();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lazy-pages: {}", godwit_carry::with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
