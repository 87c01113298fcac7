//! The programs as a user meets them: help, usage errors, the demonstration.

use std::collections::BTreeSet;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use godwit_tests::program;

/// Runs a program in the test's own namespaces, with no terminal, for at most two minutes.
fn run(name: &str, arguments: &[&str]) -> Result<Output> {
    let mut child = Command::new(program(name)?)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(name.to_owned())?;
    // What these programs say fits into a pipe.
    let end = Instant::now() + Duration::from_secs(120);
    while child.try_wait()?.is_none() {
        if Instant::now() > end {
            child.kill()?;
            bail!("{name} {arguments:?} runs for ever: {:?}", child.wait_with_output()?);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(child.wait_with_output()?)
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn help_is_complete_and_has_examples() -> Result<()> {
    let expected: [(&str, &[&str]); 3] = [
        (
            "migrate",
            &[
                "--to",
                "--token-file",
                "--mode",
                "--max-rounds",
                "--downtime-target",
                "--timeout",
                "--json",
                "--external",
                "demo",
            ],
        ),
        ("page-server", &["--listen", "--token-file", "--lazy-socket", "--once", "--json"]),
        ("lazy-pages", &["daemon"]),
    ];
    for (name, words) in expected {
        let output = run(name, &["--help"])?;
        ensure!(output.status.success(), "{name} --help ended with {}", output.status);
        let help = text(&output);
        for word in words {
            ensure!(help.contains(word), "{word} is not in the help of {name}: {help}");
        }
        ensure!(help.to_lowercase().contains("example"), "the help of {name} has no examples");
    }
    let help = text(&run("lazy-pages", &["daemon", "--help"])?);
    for word in ["--socket", "--listen", "--token-file"] {
        ensure!(help.contains(word), "{word} is not in the help of lazy-pages daemon: {help}");
    }
    Ok(())
}

#[test]
fn wrong_usage_has_its_own_exit_code() -> Result<()> {
    let wrong: [(&str, &[&str]); 6] = [
        ("migrate", &["--to", "host"]),
        ("migrate", &["12"]),
        ("migrate", &["--to", "host", "twelve"]),
        ("migrate", &["--to", "host", "12", "--mode", "teleport"]),
        ("page-server", &["--listen", "nowhere"]),
        ("lazy-pages", &[]),
    ];
    for (name, arguments) in wrong {
        let output = run(name, arguments)?;
        ensure!(
            output.status.code() == Some(2),
            "{name} {arguments:?} ended with {}: {}",
            output.status,
            text(&output)
        );
    }
    Ok(())
}

/// The pids and names of everything that runs on this machine, and its mounts.
fn surroundings() -> Result<BTreeSet<String>> {
    let mut all: BTreeSet<String> = std::fs::read_to_string("/proc/self/mounts")?.lines().map(str::to_owned).collect();
    for entry in std::fs::read_dir("/sys/class/net")?.flatten() {
        all.insert(format!("interface {}", entry.file_name().to_string_lossy()));
    }
    Ok(all)
}

#[test]
fn the_demonstration_moves_there_and_back_and_cleans_up() -> Result<()> {
    let before = surroundings()?;
    let output = run("migrate", &["demo", "--memory", "64"])?;
    let said = text(&output);
    ensure!(output.status.success(), "the demonstration ended with {}: {said}", output.status);
    ensure!(
        said.to_lowercase().contains("freeze") || said.to_lowercase().contains("froze"),
        "it shows no freeze: {said}"
    );
    ensure!(surroundings()? == before, "the demonstration leaves something behind");
    Ok(())
}
