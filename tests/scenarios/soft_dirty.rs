//! A move on a kernel that has soft-dirty bits and no asynchronous write protection: Debian's 6.1, in an emulated machine.
//!
//! `tests/run` installs the emulator and unpacks the kernel into the target directory, whose path it puts into
//! `GODWIT_CLOUD_KERNEL`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use godwit_tests::{Status, program, victim_program};
use serde_json::Value;

/// A program that holds a shell and everything else that the machine needs (Debian: busybox-static).
const BUSYBOX: &str = "/bin/busybox";
/// How long the emulated machine may run.
const LIMIT: Duration = Duration::from_secs(150);

fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{command:?} ended with {}: {stdout}{stderr}", output.status);
    Ok(stdout.into_owned())
}

/// Copies a program without its debugging information, and the libraries that it needs to the places where it looks for them.
fn install(from: &Path, name: &str, root: &Path) -> Result<()> {
    let to = root.join("bin").join(name);
    fs::copy(from, &to).with_context(|| from.display().to_string())?;
    run(Command::new("strip").arg(&to))?;
    for word in run(Command::new("ldd").arg(from))?.split_whitespace().filter(|word| word.starts_with('/')) {
        let place = root.join(word.trim_start_matches('/'));
        fs::create_dir_all(place.parent().context("a library lies in a directory")?)?;
        fs::copy(word, place).with_context(|| word.to_owned())?;
    }
    Ok(())
}

/// Makes the machine's file system, which the kernel unpacks into memory.
fn file_system(directory: &Path) -> Result<PathBuf> {
    let root = directory.join("file-system");
    for name in ["bin", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).context("busybox-static is not installed: tests/run does that")?;
    fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios/soft_dirty/init"), root.join("init"))?;
    install(&program("migrate")?, "migrate", &root)?;
    install(&program("page-server")?, "page-server", &root)?;
    install(victim_program(), "victim", &root)?;
    let archive = directory.join("initramfs");
    let script = "cd \"$1\" && find . | \"$2\" cpio -o -H newc > \"$3\"";
    run(Command::new("sh").args(["-c", script, "sh"]).arg(&root).arg(BUSYBOX).arg(&archive))?;
    Ok(archive)
}

/// The kernel that `tests/run` has unpacked.
fn kernel() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("GODWIT_CLOUD_KERNEL") {
        return Ok(path.into());
    }
    let boot = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cloud-kernel/boot");
    let entries = fs::read_dir(boot).context("no kernel 6.1 was unpacked: tests/run does that")?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    let is_kernel =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-6.1"));
    paths.find(is_kernel).context("no kernel 6.1 was unpacked: tests/run does that")
}

/// Runs the machine to its end and yields what its console shows.
fn emulate(archive: &Path, console: &Path) -> Result<String> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "SIGKILL", "qemu-system-x86_64"]);
    command
        .args([
            "-accel",
            "tcg,thread=multi",
            "-smp",
            "2",
            "-cpu",
            "max",
            "-m",
            "1024",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-nic", "none", "-append", "console=ttyS0 quiet panic=-1", "-kernel"])
        .arg(kernel()?)
        .arg("-initrd")
        .arg(archive)
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .stdin(Stdio::null());
    let mut machine = command.spawn().context("the emulator cannot be started")?;
    let end = Instant::now() + LIMIT;
    while machine.try_wait()?.is_none() {
        if Instant::now() > end {
            machine.kill()?;
            machine.wait()?;
            bail!("the machine runs for more than {LIMIT:?}: {}", fs::read_to_string(console).unwrap_or_default());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(String::from_utf8_lossy(&fs::read(console)?).into_owned())
}

/// The lines of the console that begin with a word, without it.
fn said<'a>(console: &'a str, word: &str) -> Vec<&'a str> {
    let after =
        |line: &'a str| line.trim_end().split_once(' ').filter(|(first, _)| *first == word).map(|(_, rest)| rest);
    console.lines().filter_map(after).collect()
}

fn check(console: &str) -> Result<()> {
    ensure!(said(console, "KERNEL").iter().any(|version| version.starts_with("6.1.")), "this is no kernel 6.1");
    ensure!(said(console, "EXIT") == ["0"], "migrate failed");
    let events: Vec<Value> = said(console, "EVENT").into_iter().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let report = events.last().context("no report")?;
    ensure!(report.get("outcome").is_some_and(|outcome| outcome == "moved"), "not moved");

    let words = console.to_lowercase();
    ensure!(words.contains("soft-dirty"), "nobody says that soft-dirty bits are used");
    // Without a tracker everything would count as written again after the first round.
    let number = |event: &Value, member: &str| event.get(member).and_then(Value::as_u64).unwrap_or(0);
    let first =
        events.iter().find(|event| event.get("event").is_some_and(|name| name == "round")).context("no round")?;
    let (pages, dirty) = (number(first, "pages"), number(first, "dirty_pages"));
    ensure!(pages >= 16 * 256, "the first round sends {pages} pages of more than {}", 16 * 256);
    ensure!(dirty > 0 && dirty < pages / 2, "after the first round {dirty} of {pages} pages are dirty");
    let sent = number(report, "pages_sent");
    ensure!(sent > pages && sent < 2 * pages, "{sent} pages were sent, {pages} of them in the first round");

    ensure!(said(console, "SOURCE").is_empty(), "the source's copy is still there");
    let status = |word| {
        said(console, word).first().and_then(|line| Status::parse(line)).with_context(|| format!("no status {word}"))
    };
    let (before, after) = (status("BEFORE")?, status("AFTER")?);
    ensure!(after.beats > before.beats && after.errors == 0, "the moved copy does not run: {before:?} {after:?}");
    ensure!(said(console, "LOG").iter().any(|line| line.starts_with("verdict pass")), "the victim's verdict");
    Ok(())
}

#[test]
fn a_move_by_soft_dirty_bits() -> Result<()> {
    let directory = tempfile::Builder::new().prefix("godwit-machine-").tempdir()?;
    let archive = file_system(directory.path())?;
    let console = emulate(&archive, &directory.path().join("console"))?;
    check(&console).with_context(|| console.clone())
}
