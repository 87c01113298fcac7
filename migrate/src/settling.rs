//! `migrate status`, `resume`, `cancel` and `resolve`: migrations that are not over, and what can be done about them.
//!
//! The facts come from the journals of this host and, where it can be reached, from the destination. A choice that could make two
//! copies run, or lose the only one, is refused unless a flag says that this is wanted.

mod arrived;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{ArgAction, Args};
use godwit_journal::{DEFAULT_STATE_DIRECTORY, Journal, ProcessName, Side};
use godwit_session::decision::{DestinationRecord, SourceRecord, Verdict};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::agent::{self, Answered, Resumption};
use crate::cancel::Cancel;
use crate::display::{Audience, Display};
use crate::event::Event;
use crate::journal::{self, Facts, SourceEntry};
use crate::keeper::{Witness, aftermath};
use crate::request::DEFAULT_RECONNECT_FOR;
use arrived::Arrived;

/// Reads the first digits of an id, or all of them.
fn digits(text: &str) -> Result<String, String> {
    let is_one = (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let expected = || "expected the first hexadecimal digits of a migration's id, 32 at most".to_owned();
    is_one.then(|| text.to_ascii_lowercase()).ok_or_else(expected)
}

/// What goes on with a migration needs to know.
#[derive(Args, Debug)]
pub struct ResumeArguments {
    /// The migration, or the first digits of its id
    #[arg(value_name = "ID", value_parser = digits)]
    pub id: String,
    /// Call the destination for S seconds
    #[arg(long, value_name = "S", default_value_t = DEFAULT_RECONNECT_FOR.as_secs(), value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub reconnect_for: u64,
    /// How and where
    #[command(flatten)]
    pub common: CommonArguments,
}

/// What tells of migrations needs to know.
#[derive(Args, Debug)]
pub struct StatusArguments {
    /// The migration, or the first digits of its id; without one all that are not over
    #[arg(value_name = "ID", value_parser = digits)]
    pub id: Option<String>,
    /// How and where
    #[command(flatten)]
    pub common: CommonArguments,
}

/// What calls a migration off needs to know.
#[derive(Args, Debug)]
pub struct CancelArguments {
    /// The migration, or the first digits of its id
    #[arg(value_name = "ID", value_parser = digits)]
    pub id: String,
    /// How and where
    #[command(flatten)]
    pub common: CommonArguments,
}

/// What resolves a migration needs to know.
#[derive(Args, Debug)]
pub struct ResolveArguments {
    /// The migration, or the first digits of its id
    #[arg(value_name = "ID", value_parser = digits)]
    pub id: String,
    /// Let the frozen process go on here
    #[arg(long, conflicts_with = "end")]
    pub thaw: bool,
    /// End the frozen process here; at a destination, the copy that came
    #[arg(long = "kill")]
    pub end: bool,
    /// Thaw it even where a copy may run at the destination
    #[arg(long, requires = "thaw")]
    pub allow_two_copies: bool,
    /// End it even where something is lost with it
    #[arg(long, requires = "end")]
    pub allow_loss: bool,
    /// How and where
    #[command(flatten)]
    pub common: CommonArguments,
}

/// What all of them take.
#[derive(Args, Debug)]
pub struct CommonArguments {
    /// Where hand-overs are written down
    #[arg(long = "state-dir", value_name = "DIRECTORY", default_value = DEFAULT_STATE_DIRECTORY)]
    pub state_directory: PathBuf,
    /// Write JSON to standard output, one object a line
    #[arg(long)]
    pub json: bool,
    /// Log to standard error: -v what happens, -vv details
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}

/// What `page-server` has written down, as far as it concerns us.
#[derive(Debug, Deserialize)]
struct ArrivedFacts {
    process: ProcessName,
    command: String,
    from: SocketAddr,
    /// Whether it has ended before all its pages came.
    #[serde(default)]
    ended: bool,
}

/// What a copy is said to have done that ended before all its pages came.
const ENDED: &str = "ended";

/// One migration as this host knows it.
#[derive(Debug, Serialize)]
struct Known {
    migration_id: String,
    side: String,
    /// What is written down.
    state: &'static str,
    pid: i32,
    command: String,
    /// The other host.
    peer: String,
    /// Whether a `migrate` or `page-server` is at work on it.
    under_way: bool,
    /// Whether the process is there.
    process_is_there: bool,
    /// What the destination says; absent where it was not asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination_pid: Option<i32>,
}

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
    let display = Display::start(audience, to.as_deref().unwrap_or("the destination"));
    let witness = instead.map(|(warning, witness)| {
        display.show(Event::warning(warning));
        witness
    });
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

/// Tells of migrations that are not over.
///
/// # Errors
/// When a journal cannot be read, or there is no such migration.
pub fn status(arguments: &StatusArguments) -> Result<()> {
    let mut all = Vec::new();
    let mut failed = 0;
    for side in [Side::Source, Side::Destination] {
        let journal = open(&arguments.common.state_directory, side)?;
        for id in journal.ids()? {
            if arguments.id.as_ref().is_some_and(|wanted| !id.starts_with(wanted)) {
                continue;
            }
            match look(&journal, side, &id) {
                Ok(Some(known)) => all.push(known),
                // It was over while we looked.
                Ok(None) => {}
                Err(error) => {
                    failed += 1;
                    eprintln!("migrate: {}", godwit_carry::with_causes(error.as_ref()));
                }
            }
        }
    }
    if let (true, 0, Some(id)) = (all.is_empty(), failed, &arguments.id) {
        return Err(unknown(id, &arguments.common.state_directory));
    }
    let mut text = String::new();
    for known in &all {
        if arguments.common.json {
            writeln!(text, "{}", serde_json::to_string(known)?)?;
        } else {
            writeln!(text, "{known}")?;
            if known.side == "source" && !known.under_way {
                let resolve = arguments.common.command("resolve", &known.migration_id[..8]);
                writeln!(text, "          {resolve} says what can be done")?;
            }
        }
    }
    if all.is_empty() && failed == 0 && !arguments.common.json {
        text += "no migration is under way or unsettled here\n";
    }
    print(&text);
    ensure!(failed == 0, "what is written down cannot all be read");
    Ok(())
}

/// Calls a migration off that is not decided.
///
/// # Errors
/// When there is none, or it is too late.
pub fn cancel(arguments: &CancelArguments) -> Result<()> {
    if let Some(arrived) = Arrived::find(&arguments.common.state_directory, &arguments.id)? {
        return Err(arrived.at_its_source("cancel"));
    }
    let journal = open(&arguments.common.state_directory, Side::Source)?;
    let (id, state, facts) = peek(&journal, &arguments.id)?;
    let short = &id[..8];
    if matches!(state, SourceRecord::Decided | SourceRecord::Given) {
        let resolve = arguments.common.command("resolve", short);
        bail!("migration {short} is decided: the process may run at the destination; {resolve} says how it stands");
    }
    if !journal.is_in_use(&id) {
        // Nobody is at work on it any more: what is left is that the process may go on.
        let entry: SourceEntry = journal.find(&id)?.context("it is over")?;
        agent::let_go_on(entry).map_err(anyhow::Error::msg)?;
        print(&format!("migration {short} was left undecided: process {} goes on here\n", facts.process.pid));
        return Ok(());
    }
    let agent = holder_of(&journal, &id).context("the `migrate` that is at work on it cannot be found")?;
    kill(Pid::from_raw(agent), Signal::SIGINT).context("telling the `migrate` that is at work on it")?;
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while journal.is_in_use(&id) && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    match journal.peek::<SourceRecord, Facts>(&id)? {
        None if facts.process.is_there() => {
            print(&format!("migration {short} is called off: process {} runs on here\n", facts.process.pid))
        }
        None => {
            bail!("migration {short} is over, and process {} is not here: it has moved or ended", facts.process.pid)
        }
        Some(_) => bail!("it is not called off; {} says how it stands", arguments.common.command("status", short)),
    }
    Ok(())
}

/// Says how a hand-over stands and what can be done, or does it.
///
/// # Errors
/// When there is no such migration, it is under way, or what is asked for could do harm.
pub fn resolve(arguments: &ResolveArguments, cancel: &Cancel) -> Result<()> {
    if let Some(arrived) = Arrived::find(&arguments.common.state_directory, &arguments.id)? {
        return arrived.resolve(arguments);
    }
    let journal = open(&arguments.common.state_directory, Side::Source)?;
    let (id, state, facts) = peek(&journal, &arguments.id)?;
    let short = id[..8].to_owned();
    if journal.is_in_use(&id) {
        let way = match state {
            SourceRecord::Decided | SourceRecord::Given => "it settles the hand-over by itself".to_owned(),
            _ => format!("nothing is decided; {} calls it off", arguments.common.command("cancel", &short)),
        };
        let text = format!("a `migrate` is at work on migration {short}: {way}");
        ensure!(!arguments.thaw && !arguments.end, "{text}");
        let known = look(&journal, Side::Source, &id)?.context("it is over")?;
        return arguments.common.tell(Prospect { known, resume: Some(text), thaw: None, kill: None });
    }
    let answer = agent::ask(&facts, &id, cancel);
    let outlook = Outlook::of(state, answer.as_ref().ok(), facts.process.is_there());
    if !arguments.thaw && !arguments.end {
        let known = look(&journal, Side::Source, &id)?.context("it is over")?;
        let resume =
            outlook.resume.then(|| format!("{} brings it to its end", arguments.common.command("resume", &short)));
        return arguments.common.tell(Prospect {
            known,
            resume,
            thaw: Some(outlook.thaw.text()),
            kill: Some(outlook.end.text()),
        });
    }
    let entry: SourceEntry = journal.find(&id)?.context("it is over")?;
    if arguments.thaw {
        outlook.thaw.permit(arguments.allow_two_copies, "--allow-two-copies")?;
        let is_over_there = answer.is_ok_and(|answer| answer.ended);
        agent::thaw(entry, is_over_there).map_err(anyhow::Error::msg)?;
        arguments.common.tell_done(&id, "thawed", &format!("process {} goes on here", facts.process.pid));
    } else {
        outlook.end.permit(arguments.allow_loss, "--allow-loss")?;
        let was_here = facts.process.is_there();
        let needs_nothing =
            answer.is_ok_and(|answer| answer.ended || answer.verdict == Verdict::Runs { complete: true });
        agent::end(entry, needs_nothing).map_err(anyhow::Error::msg)?;
        let pid = facts.process.pid;
        let text =
            if was_here { format!("process {pid} is ended here") } else { format!("process {pid} is gone here") };
        arguments.common.tell_done(&id, "ended", &format!("{text}; the migration is forgotten"));
    }
    Ok(())
}

/// What would come of a choice.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Choice {
    Harmless(&'static str),
    Harmful(&'static str),
    /// There is nothing to do it with.
    Void(&'static str),
}

impl Choice {
    fn text(&self) -> String {
        match self {
            Self::Harmless(text) => (*text).to_owned(),
            Self::Harmful(why) | Self::Void(why) => format!("refused: {why}"),
        }
    }

    /// Says no where it would do harm, unless the user has said by a flag that this is wanted.
    fn permit(&self, is_wanted: bool, flag: &str) -> Result<()> {
        match self {
            Self::Harmless(_) => Ok(()),
            Self::Harmful(why) => {
                ensure!(is_wanted, "{why}; {flag} does it all the same");
                Ok(())
            }
            Self::Void(why) => bail!("{why}"),
        }
    }
}

/// How a migration stands and what can be done about it.
#[derive(Debug, Serialize)]
struct Prospect {
    #[serde(flatten)]
    known: Known,
    /// What `migrate resume` would do, or who does it already.
    #[serde(skip_serializing_if = "Option::is_none")]
    resume: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    thaw: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kill: Option<String>,
}

impl CommonArguments {
    /// What to type about a migration.
    fn command(&self, word: &str, short: &str) -> String {
        journal::command(&format!("{word} {short}"), &self.state_directory)
    }

    /// Says what can be done.
    fn tell(&self, prospect: Prospect) -> Result<()> {
        if self.json {
            print(&format!("{}\n", serde_json::to_string(&prospect)?));
            return Ok(());
        }
        let Prospect { known, resume, thaw, kill } = prospect;
        let choices = [(resume, ""), (thaw, "--thaw: "), (kill, "--kill: ")];
        let choices = choices.into_iter().filter_map(|(text, flag)| Some(format!("  {flag}{}\n", text?)));
        print(&format!("{known}\n{}", choices.collect::<String>()));
        Ok(())
    }

    /// Says what was done.
    fn tell_done(&self, id: &str, done: &str, text: &str) {
        match self.json {
            true => print(&format!("{}\n", serde_json::json!({ "migration_id": id, "done": done, "text": text }))),
            false => print(&format!("{text}\n")),
        }
    }
}

/// What can be done about a hand-over.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Outlook {
    resume: bool,
    thaw: Choice,
    end: Choice,
}

impl Outlook {
    /// `answer`: what the destination says, where it could be asked; `is_here`: whether the process that was given away is still there.
    fn of(state: SourceRecord, answer: Option<&Answered>, is_here: bool) -> Self {
        use Choice::{Harmful, Harmless};
        const ONLY_ONE: Choice = Harmful("it is the only copy there is");
        let new = |resume, thaw, end| Self { resume, thaw, end };
        if !is_here {
            return Self::of_gone(answer);
        }
        if matches!(state, SourceRecord::Undecided | SourceRecord::Stayed) {
            return new(true, Harmless("it goes on here; nothing was decided"), ONLY_ONE);
        }
        match answer.map(|answer| answer.verdict) {
            Some(Verdict::Aborted) => {
                new(true, Harmless("it goes on here; the copy at the destination never ran and never will"), ONLY_ONE)
            }
            Some(Verdict::Runs { .. }) if answer.is_some_and(|answer| answer.ended) => new(
                false,
                Harmful("it has run at the destination: what it did there would be done once more"),
                Harmful("it has ended at the destination before all its pages came: this is all that is left of it"),
            ),
            Some(Verdict::Runs { complete: true }) => new(
                true,
                Harmful("it runs at the destination: two copies would run"),
                Harmless("it is ended here; the one at the destination has all it needs"),
            ),
            Some(Verdict::Runs { complete: false }) => new(
                true,
                Harmful("it runs at the destination: two copies would run"),
                Harmful("the one at the destination still needs pages that only this one has"),
            ),
            Some(Verdict::Waiting) => new(
                true,
                Harmful("a complete copy at the destination may be told to run at any moment"),
                Harmful("the copy at the destination has not been told to run"),
            ),
            Some(Verdict::Unknown) => new(
                false,
                Harmful("the destination knows nothing of it: the copy there may have run, or run still"),
                Harmful("the destination knows nothing of it: this may be the only copy"),
            ),
            None => new(
                true,
                Harmful("the destination cannot be asked: the copy there may run"),
                Harmful("the destination cannot be asked: this may be the only copy"),
            ),
        }
    }
}

impl Outlook {
    /// What can be done about a hand-over whose process is gone here.
    fn of_gone(answer: Option<&Answered>) -> Self {
        use Choice::{Harmful, Harmless, Void};
        let (resume, end) = match answer.map(|answer| answer.verdict) {
            Some(Verdict::Runs { .. }) if answer.is_some_and(|answer| answer.ended) => {
                (true, Harmless("it has ended at the destination, too; this forgets the migration"))
            }
            Some(Verdict::Runs { complete: true }) => {
                (true, Harmless("it runs at the destination, with all it needs; this forgets the migration"))
            }
            Some(Verdict::Runs { complete: false }) => (
                false,
                Harmful(
                    "the one at the destination needs pages that nobody has any more: it is to be ended there; this forgets the migration",
                ),
            ),
            Some(Verdict::Waiting) => {
                (true, Harmful("a complete copy at the destination waits to be let run; this forgets the migration"))
            }
            Some(Verdict::Aborted) => (false, Harmless("there is no copy of it any more; this forgets the migration")),
            Some(Verdict::Unknown) => {
                (false, Harmful("the destination knows nothing of it; this forgets the migration"))
            }
            None => (true, Harmful("the destination cannot be asked; this forgets the migration")),
        };
        Self { resume, thaw: Void("the process is gone here: there is nothing to let go on"), end }
    }
}

/// Opens a journal. A state directory that somebody names has to be there: nothing is written down in one that is made for the question.
///
/// # Errors
/// When it is not, or cannot be used.
fn open(state_directory: &Path, side: Side) -> Result<Journal> {
    let is_named = state_directory != Path::new(DEFAULT_STATE_DIRECTORY);
    ensure!(!is_named || state_directory.is_dir(), "there is no directory {}", state_directory.display());
    Ok(Journal::open(state_directory, side)?)
}

/// The whole id of the only entry whose id begins so.
fn only(journal: &Journal, id: &str) -> Result<Option<String>> {
    let mut ids: Vec<String> = journal.ids()?.into_iter().filter(|other| other.starts_with(id)).collect();
    ensure!(ids.len() < 2, "several migrations begin like this: {}", ids.join(", "));
    Ok(ids.pop())
}

fn unknown(id: &str, state_directory: &Path) -> anyhow::Error {
    let status = journal::command("status", state_directory);
    anyhow::anyhow!("no migration {id} is written down here; {status} lists those that are")
}

fn peek(journal: &Journal, id: &str) -> Result<(String, SourceRecord, Facts)> {
    let none = || unknown(id, journal.state_directory());
    let id = only(journal, id)?.ok_or_else(none)?;
    let (state, facts) = journal.peek(&id)?.ok_or_else(none)?;
    Ok((id, state, facts))
}

fn look(journal: &Journal, side: Side, id: &str) -> Result<Option<Known>> {
    use godwit_journal::State as _;
    let under_way = journal.is_in_use(id);
    let new = |state, process: &ProcessName, command: &str, peer: String| Known {
        migration_id: id.to_owned(),
        side: side.to_string(),
        state,
        pid: process.pid,
        command: command.to_owned(),
        peer,
        under_way,
        process_is_there: process.is_there(),
        destination: None,
        destination_pid: None,
    };
    if side == Side::Destination {
        let found: Option<(DestinationRecord, ArrivedFacts)> = journal.peek(id)?;
        return Ok(found.map(|(state, facts)| {
            let state = arrived::as_it_is(id, state, &facts);
            let is_ended =
                facts.ended || !facts.process.is_there() && state == DestinationRecord::Runs { complete: false };
            let word = if is_ended { ENDED } else { state.word() };
            new(word, &facts.process, &facts.command, facts.from.to_string())
        }));
    }
    let found: Option<(SourceRecord, Facts)> = journal.peek(id)?;
    let Some((state, facts)) = found else { return Ok(None) };
    let mut known = new(state.word(), &facts.process, &facts.command, facts.to.clone());
    if !under_way {
        match agent::ask(&facts, id, &Cancel::new()?) {
            Ok(answer) => {
                known.destination = Some(answer.to_string());
                known.destination_pid = (answer.pid != 0).then_some(answer.pid);
            }
            Err(error) => known.destination = Some(format!("cannot be asked: {error}")),
        }
    }
    Ok(Some(known))
}

impl std::fmt::Display for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (preposition, verb) = if self.side == "source" { ("to", "leaves") } else { ("from", "comes") };
        write!(
            f,
            "{}  process {} ({}) {verb} {preposition} {}: {}",
            &self.migration_id[..8],
            self.pid,
            self.command,
            self.peer,
            self.state
        )?;
        f.write_str(match (self.side.as_str(), self.state) {
            // N.B. kept for as long as the source may still ask.
            ("destination", "runs-complete" | "aborted") => ", and its source has not confirmed that yet",
            ("destination", "runs") => ", and lacks pages that are still at its source",
            ("destination", ENDED) => " before all its pages came, and its source has not confirmed that yet",
            _ if self.under_way => ", under way",
            _ => ", nobody is at work on it",
        })?;
        if !self.process_is_there {
            f.write_str("; the process is gone here")?;
        }
        if let Some(destination) = &self.destination {
            write!(f, "; destination: {destination}")?;
        }
        Ok(())
    }
}

/// The process that has an entry locked. proc_locks(5) names it as this PID namespace does.
fn holder_of(journal: &Journal, id: &str) -> Option<i32> {
    use std::os::unix::fs::MetadataExt;
    let inode = std::fs::metadata(journal.path(id)).ok()?.ino();
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let is_it = fields.get(1) == Some(&"FLOCK")
            && fields.get(5)?.rsplit(':').next()?.parse::<u64>().is_ok_and(|number| number == inode);
        if is_it { fields.get(4)?.parse().ok().filter(|&pid: &i32| pid > 0) } else { None }
    })
}

/// Writes to standard output. A reader that left is no error.
fn print(text: &str) {
    use std::io::Write as _;
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_that_could_make_two_copies_run_is_refused() {
        let answered = |verdict| Answered { verdict, pid: 1, reason: String::new(), ended: false };
        for verdict in
            [Verdict::Waiting, Verdict::Unknown, Verdict::Runs { complete: false }, Verdict::Runs { complete: true }]
        {
            for state in [SourceRecord::Decided, SourceRecord::Given] {
                let outlook = Outlook::of(state, Some(&answered(verdict)), true);
                assert!(matches!(outlook.thaw, Choice::Harmful(_)), "{state:?} {verdict:?}");
            }
        }
        assert!(matches!(Outlook::of(SourceRecord::Decided, None, true).thaw, Choice::Harmful(_)));
        let aborted = Outlook::of(SourceRecord::Decided, Some(&answered(Verdict::Aborted)), true);
        assert!(matches!(aborted.thaw, Choice::Harmless(_)) && matches!(aborted.end, Choice::Harmful(_)));
        let complete = Outlook::of(SourceRecord::Given, Some(&answered(Verdict::Runs { complete: true })), true);
        assert!(matches!(complete.end, Choice::Harmless(_)));
        assert!(matches!(Outlook::of(SourceRecord::Undecided, None, true).thaw, Choice::Harmless(_)));
        let ended = Answered { ended: true, ..answered(Verdict::Runs { complete: true }) };
        let outlook = Outlook::of(SourceRecord::Given, Some(&ended), true);
        assert!(!outlook.resume && matches!(outlook.end, Choice::Harmful(_)), "it is all that is left");
    }

    #[test]
    fn nothing_is_let_go_on_that_is_gone() {
        let answered = |verdict| Answered { verdict, pid: 1, reason: String::new(), ended: false };
        for verdict in [
            Verdict::Waiting,
            Verdict::Unknown,
            Verdict::Aborted,
            Verdict::Runs { complete: false },
            Verdict::Runs { complete: true },
        ] {
            let outlook = Outlook::of(SourceRecord::Given, Some(&answered(verdict)), false);
            assert!(outlook.thaw.permit(true, "--allow-two-copies").is_err(), "{verdict:?}");
            assert!(outlook.end.permit(true, "--allow-loss").is_ok(), "{verdict:?}");
        }
    }
}
