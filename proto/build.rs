//! Turns the .proto files into Rust types with a compiler that is itself a crate, so that no protoc is needed.

use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("godwit");
    let mut sources = protos_in(&root.join("image"))?;
    sources.extend(protos_in(root)?);
    // A directory is named too: a file added to it must also cause a new run.
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(&sources, ["."])?;
    let out = std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    let mut shapes = String::new();
    for file in &descriptors.file {
        for message in &file.message_type {
            let fields = message.field.iter();
            let fields = fields.map(|field| Field {
                number: field.number(),
                kind: field.r#type() as i32,
                is_repeated: field.label() as i32 == REPEATED,
                message: field.type_name(),
            });
            describe(&mut shapes, file.package(), message.name(), fields)?;
        }
    }
    // A file has one part of many, and there may be very many files.
    let files =
        descriptors.file.iter().flat_map(|file| &file.message_type).filter(|message| message.name() == "file_entry");
    let parts_of_files: Vec<String> = files
        .flat_map(|message| &message.field)
        .filter(|field| field.r#type() as i32 == MESSAGE)
        .map(|field| format!(".godwit.image.file_entry.{}", field.name()))
        .collect();
    std::fs::write(Path::new(&out).join("shapes.rs"), shapes)?;
    let mut config = prost_build::Config::new();
    for part in &parts_of_files {
        config.boxed(part);
    }
    config.compile_fds(descriptors)?;
    Ok(())
}

/// Numbers of the label and of field types in google/protobuf/descriptor.proto.
const REPEATED: i32 = 3;
const STRING: i32 = 9;
const MESSAGE: i32 = 11;
const BYTES: i32 = 12;

/// What is of interest about a field.
struct Field<'a> {
    number: i32,
    kind: i32,
    is_repeated: bool,
    message: &'a str,
}

/// Writes down how much memory a message takes and which of its fields hold further ones: see `src/weight.rs`.
fn describe<'a>(
    into: &mut String,
    package: &str,
    name: &str,
    fields: impl Iterator<Item = Field<'a>>,
) -> std::fmt::Result {
    use std::fmt::Write;
    let rust = format!("crate::{}::{}", package.trim_start_matches("godwit."), camel(name));
    let shape = shape_name(&format!(".{package}.{name}"));
    writeln!(into, "static {shape}: Shape = Shape {{ size: size_of::<{rust}>(), parts: &[")?;
    for field in fields {
        match field.kind {
            MESSAGE => writeln!(into, "    ({}, Part::Message(&{})),", field.number, shape_name(field.message))?,
            STRING | BYTES => {}
            _ if field.is_repeated => writeln!(into, "    ({}, Part::Numbers),", field.number)?,
            _ => {}
        }
    }
    writeln!(into, "] }};\nimpl Shaped for {rust} {{ const SHAPE: &'static Shape = &{shape}; }}")
}

fn shape_name(message: &str) -> String {
    message.trim_start_matches('.').replace('.', "_").to_uppercase()
}

/// A message's name as the generated code has it.
fn camel(name: &str) -> String {
    let words = name.split('_').map(|word| word.split_at(word.len().min(1)));
    words.map(|(first, rest)| first.to_uppercase() + rest).collect()
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
