//! `migrate`: the source's side of a move.

use std::process::ExitCode;

use clap::Parser;
use godwit_journal::ProcessName;
use migrate::cancel::Cancel;
use migrate::cli::{Arguments, Command, ConnectionArguments, DepartureArguments};
use migrate::display::{Audience, Display, HandOverDisplay};
use migrate::keeper::{self, Ended};
use migrate::request::Request;
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
            keeper::run(|cancel| hand_over(&connection, cancel)).map(|ended| match ended {
                Ended::Killed(_) => left_behind(&connection.wish().request),
                ended => told(ended),
            })
        }
        (Some(Command::Resume(wish)), _) => {
            log::to_standard_error(wish.common.verbose);
            keeper::run(|cancel| settling::resume(&wish, cancel)).map(told)
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
            keeper::run(|cancel| depart(&departure, cancel)).map(|ended| match ended {
                Ended::Killed(_) => left_behind(&departure.request()),
                ended => told(ended),
            })
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

/// The exit code that an agent's end calls for.
fn told(ended: Ended) -> u8 {
    match ended {
        Ended::Code(code) => code,
        Ended::Killed(signal) => {
            eprintln!("migrate: the agent was ended by signal {signal}");
            1
        }
    }
}

/// Looks after a process whose agent was killed; gives the exit code.
fn left_behind(request: &Request) -> u8 {
    match agent::pick_up(request) {
        Ok(None) if ProcessName::of(request.pid).is_none_or(|process| !process.is_there()) => {
            eprintln!(
                "migrate: the agent was killed, and process {} is not here any more: it has moved or ended, which the page \
                 server's log tells",
                request.pid
            );
            3
        }
        Ok(None) => {
            eprintln!("migrate: the agent was killed; process {} goes on here", request.pid);
            1
        }
        Ok(Some(id)) => {
            let resume = migrate::journal::command(&format!("resume {}", &id[..8]), &request.state_directory);
            eprintln!(
                "migrate: the agent was killed behind the decision; process {} is kept frozen. {resume} goes on with it",
                request.pid
            );
            3
        }
        Err(error) => {
            eprintln!("migrate: the agent was killed, and what it has left cannot be put right: {error}");
            3
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
