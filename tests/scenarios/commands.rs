//! The programs as a user meets them: help, usage errors, the demonstration.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
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

/// What others can write to says nothing about who is trusted, or which process is whose.
#[test]
fn directories_that_others_can_write_to_are_refused() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name).display().to_string();
    let open = |path: &str| -> Result<()> {
        std::fs::create_dir_all(path)?;
        Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777))?)
    };
    for below in ["conf", "conf/peers"] {
        let _ = std::fs::remove_dir_all(at("conf"));
        std::fs::create_dir_all(at("conf"))?;
        open(&at(below))?;
        let output = run("migrate", &["hosts", "--config-dir", &at("conf")])?;
        let said = text(&output);
        ensure!(output.status.code() == Some(1) && said.contains("chmod 700"), "{below}: {said}");
    }
    open(&at("state"))?;
    let output = run("migrate", &["status", "--state-dir", &at("state")])?;
    let said = text(&output);
    ensure!(output.status.code() == Some(1) && said.contains("chmod 700"), "{said}");
    Ok(())
}

/// A port that is taken is named, whichever of the three it is.
#[test]
fn a_port_that_is_taken_is_named() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name).display().to_string();
    // N.B. three in a row that are free: the lowest is found by trying.
    let free = |base: u16| -> Option<Vec<UdpSocket>> {
        (base..base + 3).map(|port| UdpSocket::bind(("127.0.0.1", port)).ok()).collect()
    };
    let base = (20_000..30_000).step_by(3).find(|&base| free(base).is_some()).context("no ports are free")?;
    for offset in 0..3 {
        let taken = UdpSocket::bind(("127.0.0.1", base + offset))?;
        let listen = format!("127.0.0.1:{base}");
        let arguments = ["--listen", &listen, "--config-dir", &path("conf"), "--state-dir", &path("state")];
        let output = run("page-server", &arguments)?;
        let said = text(&output);
        let named = format!("127.0.0.1:{}", base + offset);
        ensure!(output.status.code() == Some(1), "it ended with {}: {said}", output.status);
        ensure!(said.contains(&named) && said.contains("in use") && !said.contains("panicked"), "{said}");
        drop(taken);
    }
    Ok(())
}
