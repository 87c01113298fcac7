//! What is written down of a hand-over is damaged, lost, or looked for in the wrong place.

use super::{Scene, Still};

use anyhow::{Context, Result, ensure};
use godwit_tests::{Mode, PageServerOptions, TwoHosts};

/// What is written down of a held process is damaged: whoever asks hears which file that is and what can be done, and nothing is lost.
#[test]
fn a_damaged_entry_is_named() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("decided"), Mode::PreCopy, &[])?;
    let id = scene.id()?;
    scene.abandon()?;
    let path = format!("/run/godwit/source/{id}");
    let shell = |script: String| scene.hosts.source.run("sh", &["-c", &script]).map(drop);
    shell(format!("cp {path} /run/godwit/kept && truncate -s 100 {path}"))?;
    for command in ["resume", "resolve", "cancel", "status"] {
        scene.expect(&[command, &id], 1, &[&path, "damaged", "at the other host"])?;
    }
    let again = scene.hosts.source.migrate(&scene.server, scene.victim.pid()).run()?;
    again.expect(3, &["refused"])?;
    ensure!(again.text().contains(&format!("{path} (damaged)")), "{}", again.text());
    shell(format!("cp /run/godwit/kept {path} && rm /run/godwit/kept"))?;
    let resumed = scene.migrate(&["resume", &id, "--json"])?;
    scene.expect_moved_by(&resumed)
}

/// Nothing is made for a question: a state directory that somebody has mistyped is said not to be there.
#[test]
fn a_state_directory_that_is_not_there_is_named() -> Result<()> {
    let hosts = TwoHosts::new()?;
    let nowhere = hosts.source.directory().join("nowhere");
    let named = nowhere.to_str().context("a path")?;
    for arguments in [&["status"][..], &["resume", "12"], &["resolve", "12"], &["cancel", "12"]] {
        let arguments = [arguments, &["--state-dir", named]].concat();
        Scene::expect_on(&hosts.source, &arguments, 1, &["there is no directory", named])?;
    }
    ensure!(!nowhere.exists(), "it was made");
    for no_id in ["", "xyz", "123456789012345678901234567890123"] {
        Scene::expect_on(&hosts.source, &["status", no_id], 2, &["hexadecimal digits"])?;
    }
    Ok(())
}

/// A destination that has lost what it had written down proves nothing: only somebody who knows more may thaw.
#[test]
fn a_lost_journal_keeps_it_frozen() -> Result<()> {
    let mut scene = Scene::set(&Still::Agent("decided"), Mode::PreCopy, &["--reconnect-for", "1"])?;
    let id = scene.id()?;
    scene.server.kill()?;
    scene.hosts.destination.run("sh", &["-c", "rm -f /run/godwit/destination/*"])?;
    let options = PageServerOptions { port: scene.server.port(), ..PageServerOptions::default() };
    scene.server = scene.hosts.destination.page_server_with(&scene.hosts.token, &options)?;
    scene.go_on()?;
    let migration = scene.finish()?;
    ensure!(migration.code() == Some(3), "{}", migration.text());
    scene.expect(&["resume", &id], 3, &["knows nothing"])?;
    scene.expect(&["resolve", &id, "--thaw"], 1, &["--allow-two-copies"])?;
    scene.expect(&["resolve", &id, "--thaw", "--allow-two-copies"], 0, &["goes on here"])?;
    scene.victim.origin().wake_launcher();
    scene.expect_untouched_and_move()
}
