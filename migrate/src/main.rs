//! `migrate`: the source's side of a move.

use std::process::ExitCode;

use clap::Parser;
use migrate::cancel::Cancel;
use migrate::cli::{Arguments, Command, ConnectionArguments, DepartureArguments};
use migrate::display::{Audience, Display, HandOverDisplay};
use migrate::{agent, demo, interrupt, log};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let ended = match (arguments.command, arguments.departure) {
        (Some(Command::DemoHost(host)), _) => demo::keep_host(&host).map(|()| 0),
        (Some(Command::DemoWorker(worker)), _) => demo::work(&worker).map(|()| 0),
        (Some(Command::Connection(connection)), _) => {
            log::to_standard_error(connection.verbose);
            watched().map(|cancel| hand_over(&connection, &cancel))
        }
        (Some(Command::Demo(demonstration)), _) => {
            log::to_standard_error(demonstration.verbose);
            watched().and_then(|cancel| demo::run(&demonstration, &cancel))
        }
        (None, Some(departure)) => {
            log::to_standard_error(departure.verbose);
            // N.B. while there is only one thread. A copy of each descriptor of the process is held for a moment.
            if let Err(errno) = godwit_resources::limits::make_room_for_descriptors() {
                tracing::warn!(%errno, "a process with many descriptors may not be moved");
            }
            watched().map(|cancel| depart(&departure, &cancel))
        }
        // The parser asks for one of the two; it has said so and ended the program.
        (None, None) => Ok(2),
    };
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("migrate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Makes the flag that Ctrl-C raises.
fn watched() -> anyhow::Result<Cancel> {
    let cancel = Cancel::new()?;
    interrupt::watch(&cancel)?;
    Ok(cancel)
}

/// Moves a process and shows it; gives the exit code.
fn depart(arguments: &DepartureArguments, cancel: &Cancel) -> u8 {
    let audience = if arguments.json { Audience::Programs } else { Audience::of_standard_error(arguments.verbose) };
    let display = Display::start(audience, &arguments.to);
    let report = agent::run(&arguments.request(), &mut |event| display.show(event), cancel);
    display.finish(&report);
    report.exit_code()
}

/// Hands connections over and shows it; gives the exit code.
fn hand_over(arguments: &ConnectionArguments, cancel: &Cancel) -> u8 {
    let audience = if arguments.json { Audience::Programs } else { Audience::Log };
    let display = HandOverDisplay::start(audience);
    let report = agent::hand_over(&arguments.wish(), &mut |event| display.show(event), cancel);
    display.finish(&report);
    report.exit_code()
}
