//! `migrate`: the source's side of a move.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use migrate::cancel::Cancel;
use migrate::cli::{Arguments, Command, ConnectionArguments, DepartureArguments};
use migrate::display::{Audience, Display, HandOverDisplay};
use migrate::keeper::aftermath::{self, Aftermath};
use migrate::keeper::{self, Ended, Witness};
use migrate::report::Report;
use migrate::{agent, demo, hosts, interrupt, log, settling};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let ended = match (arguments.command, arguments.departure) {
        (Some(Command::DemoHost(host)), _) => demo::keep_host(&host).map(|()| 0),
        (Some(Command::DemoWorker(worker)), _) => demo::work(&worker).map(|()| 0),
        (Some(Command::Hosts(list)), _) => hosts::run(&list).map(|()| 0),
        (Some(Command::Trust(invitation)), _) => hosts::trust(&invitation).map(|()| 0),
        (Some(Command::Connection(connection)), _) => {
            log::to_standard_error(connection.verbose);
            hand_over(&connection)
        }
        (Some(Command::Resume(wish)), _) => {
            log::to_standard_error(wish.common.verbose);
            go_on(&wish.id, &wish.common.state_directory, |cancel| settling::resume(&wish, cancel))
        }
        (Some(Command::Status(wish)), _) => {
            log::to_standard_error(wish.common.verbose);
            settling::status(&wish).map(|()| 0)
        }
        (Some(Command::Cancel(wish)), _) => {
            log::to_standard_error(wish.common.verbose);
            settling::cancel(&wish).map(|()| 0)
        }
        (Some(Command::Resolve(wish)), _) => {
            log::to_standard_error(wish.common.verbose);
            watched().and_then(|cancel| settling::resolve(&wish, &cancel)).map(|()| 0)
        }
        (Some(Command::Demo(demonstration)), _) => {
            log::to_standard_error(demonstration.verbose);
            watched().and_then(|cancel| demo::run(&demonstration, &cancel))
        }
        (None, Some(departure)) => {
            log::to_standard_error(departure.verbose);
            depart(&departure)
        }
        // The parser asks for one of the two; it has said so and ended the program.
        (None, None) => Ok(2),
    };
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("migrate: {}", godwit_carry::with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Goes on with a migration and shows it; gives the exit code.
fn go_on(id: &str, state_directory: &Path, work: impl FnOnce(&Cancel) -> u8) -> anyhow::Result<u8> {
    Ok(match keeper::run(work)? {
        Ended::Code(code) => code,
        Ended::Killed(signal) => {
            let status = migrate::journal::command(&format!("status {}", id.get(..8).unwrap_or(id)), state_directory);
            eprintln!("migrate: godwit-agent: {}; {status} says how it stands", aftermath::killed(signal));
            3
        }
    })
}

/// Makes the flag that Ctrl-C raises.
fn watched() -> anyhow::Result<Cancel> {
    let cancel = Cancel::new()?;
    interrupt::watch(&cancel)?;
    Ok(cancel)
}

/// Agents that go on with a hand-over one after the other when each is killed.
const SUCCESSORS: usize = 3;

/// Moves a process and shows it; gives the exit code. Where the agent is killed its front looks after what it has left.
fn depart(arguments: &DepartureArguments) -> anyhow::Result<u8> {
    let audience = if arguments.json { Audience::Programs } else { Audience::of_standard_error(arguments.verbose) };
    let request = arguments.request();
    let witness = Witness::new()?;
    let finish = |report: &Report| {
        Display::start(audience, &arguments.to).finish(report);
        report.exit_code()
    };
    let cut_short =
        |wish: &agent::Resumption, why: &str| aftermath::cut_short(wish, why).map_or(3, |report| finish(&report));
    let mut ended = keeper::run(|cancel| {
        let display = Display::start(audience, &arguments.to);
        let mut tell = |event| {
            witness.note(&event);
            display.show(event);
        };
        let report = agent::run(&request, &mut tell, cancel);
        display.finish(&report);
        report.exit_code()
    })?;
    for _ in 0..SUCCESSORS {
        let signal = match ended {
            Ended::Code(code) => return Ok(code),
            Ended::Killed(signal) => signal,
        };
        let wish = match aftermath::of_move(&request, &witness, signal) {
            Aftermath::Over(report) => return Ok(finish(&report)),
            Aftermath::Decided(wish) => wish,
        };
        let warning = format!("godwit-agent: {}; another one goes on with the hand-over", aftermath::killed(signal));
        ended = match keeper::run(|cancel| settling::go_on(&wish, audience, Some((warning, &witness)), cancel)) {
            Ok(ended) => ended,
            // N.B. the process is kept frozen: that is to be told, and by the exit code, too.
            Err(error) => return Ok(cut_short(&wish, &error.to_string())),
        };
    }
    Ok(match ended {
        Ended::Code(code) => code,
        Ended::Killed(signal) => match aftermath::of_move(&request, &witness, signal) {
            Aftermath::Over(report) => finish(&report),
            Aftermath::Decided(wish) => cut_short(&wish, &aftermath::killed(signal)),
        },
    })
}

/// Hands connections over and shows it; gives the exit code.
fn hand_over(arguments: &ConnectionArguments) -> anyhow::Result<u8> {
    let audience = if arguments.json { Audience::Programs } else { Audience::Log };
    let wish = arguments.wish();
    let witness = Witness::new()?;
    let ended = keeper::run(|cancel| {
        let display = HandOverDisplay::start(audience);
        let mut tell = |event| {
            witness.note(&event);
            display.show(event);
        };
        let report = agent::hand_over(&wish, &mut tell, cancel);
        display.finish(&report);
        report.exit_code()
    })?;
    Ok(match ended {
        Ended::Code(code) => code,
        Ended::Killed(signal) => {
            let report = aftermath::of_connections(&wish, &witness, signal);
            HandOverDisplay::start(audience).finish(&report);
            report.exit_code()
        }
    })
}
