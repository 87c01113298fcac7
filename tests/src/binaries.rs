//! Where the programs under test and the victims are.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Finds a program of the engine: in `$GODWIT_BIN_DIR`, else in the target directory that the running test lies in.
///
/// # Errors
/// The program has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("GODWIT_BIN_DIR") {
        return existing(Path::new(&directory), name);
    }
    let this = std::env::current_exe().context("the path of the running test")?;
    let directory = this
        .ancestors()
        .skip(1)
        .find(|directory| directory.join(name).is_file())
        .map_or_else(|| this.parent().unwrap_or(&this).to_path_buf(), Path::to_path_buf);
    existing(&directory, name)
}

/// The path of the multi-call victim program.
pub fn victim_program() -> &'static Path {
    Path::new(env!("GODWIT_VICTIM"))
}

/// The path of the interpreter itself: a wrapper on the search path would start it as its child.
///
/// # Errors
/// There is none.
pub fn python() -> Result<String> {
    let output = std::process::Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output();
    Ok(String::from_utf8(output.context("python3 is needed")?.stdout)?.trim().to_owned())
}

/// The path of the program that starts others with nothing of the test runner's.
pub(crate) fn launcher() -> &'static Path {
    Path::new(env!("GODWIT_LAUNCHER"))
}

fn existing(directory: &Path, name: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    if !path.is_file() {
        bail!("no program {name} in or above {}: run `cargo build` first, or set GODWIT_BIN_DIR", directory.display());
    }
    Ok(path)
}
