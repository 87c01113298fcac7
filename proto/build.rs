//! Turns the .proto files into Rust types with a compiler that is itself a crate, so that no protoc is needed.

use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("godwit");
    let mut sources = protos_in(&root.join("image"))?;
    sources.extend(protos_in(root)?);
    // A directory is named too: a file added to it must also cause a new run.
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(&sources, ["."])?;
    prost_build::Config::new().compile_fds(descriptors)?;
    Ok(())
}

/// Lists the .proto files directly in `directory`, sorted, so that the output does not depend on readdir order.
fn protos_in(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "proto") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
