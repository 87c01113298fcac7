//! Compiles the victims, tiny C programs that check themselves, into one binary, and the launcher of everything into another.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=CC");
    compile("victims", "victim", "GODWIT_VICTIM");
    compile("launcher", "launch", "GODWIT_LAUNCHER");
}

/// Compiles every C file of a folder into one program, whose path the crate finds in an environment variable.
fn compile(folder: &str, name: &str, variable: &str) {
    println!("cargo:rerun-if-changed={folder}");
    let mut sources: Vec<PathBuf> = std::fs::read_dir(Path::new(folder))
        .unwrap_or_else(|error| panic!("cannot read tests/{folder}: {error}"))
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .collect();
    sources.sort();
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let program = out.join(name);
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let status = Command::new(&compiler)
        .args(["-std=gnu17", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"])
        .args(["-Wno-unused-parameter", "-o"])
        .arg(&program)
        .args(&sources)
        .status()
        .unwrap_or_else(|error| panic!("cannot run the C compiler {compiler:?}: {error}"));
    assert!(status.success(), "tests/{folder} does not compile");
    println!("cargo:rustc-env={variable}={}", program.display());
}
