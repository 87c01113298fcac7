//! The fault matrix, a test for each fault; `godwit_tests::faults` says what a cell has to hold.

use anyhow::{Result, bail};
use godwit_tests::faults::{Fault, cells, run, table};

/// Cells at a time: they wait for lost links most of their time.
const AT_A_TIME: usize = 8;

fn expect_all(fault: Fault) -> Result<()> {
    let entries = run(cells(fault), AT_A_TIME, |_| ());
    println!("{}", table(&entries));
    let wrong: Vec<String> = entries
        .iter()
        .filter(|entry| !entry.is_as_expected())
        .map(|entry| match (&entry.seen, entry.reason()) {
            (Err(error), _) => format!("{}: {error:#}", entry.cell),
            (Ok(seen), reason) => {
                format!("{} ({seen}) holds; it is said not to, because: {}", entry.cell, reason.unwrap_or_default())
            }
        })
        .collect();
    if !wrong.is_empty() {
        bail!("{} of {} cells:\n{}", wrong.len(), entries.len(), wrong.join("\n\n"));
    }
    Ok(())
}

macro_rules! faults {
    ($($test:ident: $fault:ident;)*) => {$(
        #[test]
        fn $test() -> Result<()> {
            expect_all(Fault::$fault)
        }
    )*};
}

faults! {
    migrate_killed: MigrateKilled;
    agent_killed: AgentKilled;
    page_server_killed: PageServerKilled;
    lazy_pages_killed: LazyPagesKilled;
    link_cut_for_2_s: LinkCutFor2s;
    link_cut: LinkCut;
    answers_lost: AnswersLost;
    requests_lost: RequestsLost;
    refused: Refused;
    memory_full: MemoryFull;
    no_room_for_the_journal_here: JournalFullHere;
    no_room_for_the_journal_there: JournalFullThere;
}
