//! Rarer things. Each is moved as it is, or refused by name with the process untouched; neither lost nor changed in silence.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::{Mode, TwoHosts, expect_untouched};

/// Moves a victim that holds `thing`, or hears one of `words` in the refusal.
fn moved_or_refused(thing: &str, words: &[&str]) -> Result<()> {
    let hosts = TwoHosts::new()?;
    let server = hosts.destination.page_server(&hosts.token)?;
    let mut victim = hosts.source.victim("edge", &[thing])?;
    let before = victim.view()?;
    let migration = hosts.source.migrate(&server, victim.pid()).mode(Mode::Hybrid).run()?;
    let story = || format!("{}; page server: {}", migration.text(), server.log());
    if migration.code() == Some(0) {
        migration.expect_moved().with_context(story)?;
        victim.follow(&hosts.destination, &migration).with_context(story)?;
    } else {
        // What lies inside a queue may change until the freeze, and is only looked at there.
        let outcomes: &[&str] = if thing == "rights" { &["refused", "failed"] } else { &["refused"] };
        migration.expect(1, outcomes).with_context(story)?;
        let text = migration.text().to_lowercase();
        ensure!(words.iter().any(|word| text.contains(word)), "the refusal says none of {words:?}: {}", story());
        expect_untouched(&victim, &before).with_context(story)?;
    }
    victim.expect_beats(20).with_context(story)?;
    victim.go()?;
    std::thread::sleep(Duration::from_millis(100));
    victim.expect_beats(20).with_context(story)?;
    victim.finish().with_context(story).map(drop)
}

macro_rules! edges {
    ($($thing:ident or $words:expr;)*) => {$(
        #[test]
        fn $thing() -> Result<()> {
            moved_or_refused(stringify!($thing), &$words)
        }
    )*};
}

edges! {
    flock or ["lock"];
    record_lock or ["lock"];
    rights or ["scm_rights", "descriptor", "in flight"];
    datagrams or ["unix", "datagram"];
    sigio or ["o_async", "sigio", "owner"];
    secret or ["secret"];
    mlockall or ["mlockall", "locked"];
    thread_fs or ["thread", "directory"];
    thread_files or ["thread", "descriptor"];
    thread_user or ["thread", "credentials"];
    thread_seccomp or ["thread", "seccomp"];
    mqueue or ["mqueue", "message queue"];
    alarm or [];
    own_connection or [];
    deleted_mapping or ["deleted"];
}
