//! `migrate resume`: a migration is gone on with, by the user or by who takes an agent's place.

use std::time::Duration;

use godwit_journal::Side;

use super::arrived::Arrived;
use super::{ResumeArguments, open, peek};
use crate::agent::{self, Resumption};
use crate::cancel::Cancel;
use crate::display::{Audience, Display};
use crate::event::Event;
use crate::keeper::{Witness, aftermath};

/// Goes on with a migration; gives the exit code.
pub fn resume(arguments: &ResumeArguments, cancel: &Cancel) -> u8 {
    let audience =
        if arguments.common.json { Audience::Programs } else { Audience::of_standard_error(arguments.common.verbose) };
    let wish = Resumption {
        id: arguments.id.clone(),
        state_directory: arguments.common.state_directory.clone(),
        reconnect_for: Duration::from_secs(arguments.reconnect_for),
        so_far: None,
        frozen_since: None,
    };
    let elsewhere = Arrived::find(&wish.state_directory, &wish.id);
    if let Some(error) =
        elsewhere.map(|found| found.map(|arrived| arrived.at_its_source("resume"))).unwrap_or_else(Some)
    {
        eprintln!("migrate: {}", godwit_carry::with_causes(error.as_ref()));
        return 1;
    }
    go_on(&wish, audience, None, cancel)
}

/// Goes on with a migration and shows it; gives the exit code. Who goes on for another agent says so first, and has its witness.
pub fn go_on(wish: &Resumption, audience: Audience, instead: Option<(String, &Witness)>, cancel: &Cancel) -> u8 {
    // What there is to say against it is said by what follows.
    let to = open(&wish.state_directory, Side::Source).ok();
    let to = to.and_then(|journal| Some(peek(&journal, &wish.id).ok()?.2.to));
    let (warning, witness) = instead.unzip();
    let mut display = Display::start(audience, to.as_deref().unwrap_or("the destination"));
    if let Some(witness) = witness {
        display = display.counting_from(witness.begun());
    }
    if let Some(warning) = warning {
        display.show(Event::warning(warning));
    }
    let mut tell = |event| {
        if let Some(witness) = witness {
            witness.note(&event);
        }
        display.show(event);
    };
    match agent::resume(wish, &mut tell, cancel) {
        Ok(report) => {
            display.finish(&report);
            report.exit_code()
        }
        Err(error) => match aftermath::cut_short(wish, &error) {
            Some(report) => {
                display.finish(&report);
                report.exit_code()
            }
            None => {
                eprintln!("migrate: {error}");
                1
            }
        },
    }
}
