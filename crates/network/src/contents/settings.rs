//! What can be set of a namespace's network below /proc/sys/net (sysctl(8)).

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path};

use godwit_proto::wire::NetworkSetting;

const ROOT: &str = "/proc/sys/net";
/// Longest value.
const LONGEST: usize = 4096;
/// Folders deeper than any that there is.
const DEEPEST: usize = 6;
/// Owner may read and write.
const READ_AND_WRITE: u32 = 0o600;

/// Reads all settings of the calling thread's namespace that can be read and written.
pub(super) fn read() -> Vec<NetworkSetting> {
    let mut settings = Vec::new();
    walk(Path::new(ROOT), 0, &mut settings);
    settings
}

fn walk(directory: &Path, depth: usize, into: &mut Vec<NetworkSetting>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth < DEEPEST => walk(&path, depth + 1, into),
            Ok(kind) if kind.is_file() => into.extend(read_one(&path)),
            _ => {}
        }
    }
}

fn read_one(path: &Path) -> Option<NetworkSetting> {
    let mode = fs::metadata(path).ok()?.permissions().mode();
    (mode & READ_AND_WRITE == READ_AND_WRITE).then_some(())?;
    let name = path.strip_prefix(ROOT).ok()?.to_str()?.to_owned();
    // Some have no value until they are given one.
    let value = value(path)?;
    Some(NetworkSetting { path: name, value })
}

fn value(path: &Path) -> Option<Vec<u8>> {
    let mut value = Vec::new();
    File::open(path).ok()?.take(LONGEST as u64).read_to_end(&mut value).ok()?;
    Some(value)
}

/// Gives the calling thread's namespace settings. Those that this kernel does not have or take are named in a warning.
pub(super) fn apply(settings: &[NetworkSetting]) {
    let mut refused = Vec::new();
    // N.B. settings for all interfaces change those of single ones.
    let is_general = |setting: &&NetworkSetting| {
        setting.path.contains("/conf/all/")
            || setting.path.contains("/conf/default/")
            || setting.path.ends_with("/ip_forward")
    };
    let (general, single): (Vec<_>, Vec<_>) = settings.iter().partition(is_general);
    for setting in general.into_iter().chain(single) {
        if !apply_one(setting) {
            refused.push(setting.path.as_str());
        }
    }
    if !refused.is_empty() {
        tracing::warn!(settings = refused.join(", "), "this host does not take some settings of the network");
    }
}

/// Whether a path stays below the folder of settings.
pub(super) fn is_one(path: &str) -> bool {
    Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

fn apply_one(setting: &NetworkSetting) -> bool {
    if !is_one(&setting.path) || setting.value.len() > LONGEST {
        return false;
    }
    let path = Path::new(ROOT).join(&setting.path);
    if value(&path).as_ref() == Some(&setting.value) {
        return true;
    }
    File::options().write(true).open(&path).and_then(|mut file| file.write_all(&setting.value)).is_ok()
}

/// Keeps an interface from making itself addresses before it gets those that it had.
pub(super) fn keep_from_making_addresses(interface: &str) {
    const NONE: &[u8] = b"1";
    // A host may do without IPv6.
    apply_one(&NetworkSetting { path: format!("ipv6/conf/{interface}/addr_gen_mode"), value: NONE.to_vec() });
}
