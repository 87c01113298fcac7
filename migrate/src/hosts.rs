//! Whom this host trusts: the commands `migrate hosts` and `migrate trust`.

mod arguments;

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use godwit_carry::{Code, Fingerprint, Hosts, Peer, Peers, Permission, enrol, own_name, with_causes};
use serde_json::{Value, json};

pub use arguments::{Change, CodeText, HostsArguments, TrustArguments};
pub(crate) use arguments::{HOSTS_ABOUT, HOSTS_DETAILS, HOSTS_EPILOGUE, TRUST_ABOUT, TRUST_DETAILS, TRUST_EPILOGUE};

/// Time that an inviting host has to answer.
const PATIENCE: Duration = Duration::from_secs(8);
/// Bytes of the longest code that is read from standard input.
const LONGEST_CODE: u64 = 4096;
/// Digits of a fingerprint that stand for all of it.
const FEWEST_DIGITS: usize = 8;

/// Accepts an invitation.
///
/// # Errors
/// When the code is none, the other host does not answer, or the invitation is not open.
pub fn trust(arguments: &TrustArguments) -> Result<()> {
    let code = match arguments.code.0.as_str() {
        "-" => {
            let mut text = String::new();
            std::io::stdin().take(LONGEST_CODE).read_to_string(&mut text).context("standard input")?;
            Code::parse(&text)?
        }
        text => Code::parse(text)?,
    };
    let hosts = Hosts::load(&arguments.config_dir)?;
    let permission = if arguments.one_way { Permission::Sending } else { Permission::Both };
    let name = arguments.name.clone().unwrap_or_else(own_name);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let peer = runtime
        .block_on(enrol(&code, &hosts, &name, permission, PATIENCE))
        .map_err(|error| match error.remedy() {
            Some(remedy) => anyhow::Error::new(error).context(remedy),
            None => error.into(),
        })
        .with_context(|| format!("{} was not enrolled", code.address()))?;
    let address = peer.address.clone().unwrap_or_default();
    if arguments.json {
        return say(&described(&peer).to_string());
    }
    let back = match permission {
        Permission::Both => " and the other way round",
        _ => "",
    };
    say(&format!(
        "{} ({address}) and this host trust each other: processes may go there{back}.\n  fingerprint there: {}\n  fingerprint here:  {}\n\
         To move one: migrate --to {address} PID",
        peer.name,
        peer.fingerprint,
        hosts.key.fingerprint()
    ))
}

/// Shows the list, or changes it.
///
/// # Errors
/// When the list cannot be read or written, or what is to be revoked is not in it.
pub fn run(arguments: &HostsArguments) -> Result<()> {
    let peers = Peers::in_directory(&arguments.config_dir);
    match &arguments.change {
        None => show(arguments, &peers),
        Some(Change::Revoke { host }) => {
            let gone = revoke(&peers, host)?;
            if arguments.json {
                return say(&json!({ "revoked": gone.iter().map(ToString::to_string).collect::<Vec<_>>() }).to_string());
            }
            gone.iter().try_for_each(|fingerprint| say(&format!("{fingerprint} is trusted no more")))
        }
        Some(Change::Add { fingerprint, name, permit }) => {
            let name = name.clone().unwrap_or_else(|| fingerprint.to_string()[..FEWEST_DIGITS].to_owned());
            let peer = Peer::new(&name, *fingerprint, None, *permit, "add")?;
            peers.add(&peer)?;
            if arguments.json {
                say(&described(&peer).to_string())
            } else {
                say(&format!("{name} ({fingerprint}) is trusted"))
            }
        }
    }
}

fn show(arguments: &HostsArguments, peers: &Peers) -> Result<()> {
    let own = Hosts::load(&arguments.config_dir)?.key.fingerprint();
    let (all, bad) = peers.list()?;
    for error in &bad {
        eprintln!("migrate: {}; nobody is trusted by it", with_causes(error));
    }
    if arguments.json {
        let hosts: Vec<Value> = all.iter().map(described).collect();
        let bad: Vec<String> = bad.iter().map(|error| with_causes(error)).collect();
        let own = json!({ "name": own_name(), "fingerprint": own.to_string() });
        return say(&json!({ "own": own, "hosts": hosts, "bad": bad }).to_string());
    }
    say(&format!("{own}  {} (this host)", own_name()))?;
    for peer in &all {
        let Peer { name, fingerprint, permission, added, by, .. } = peer;
        let address = peer.address.as_deref().map(|address| format!(" at {address}")).unwrap_or_default();
        say(&format!("{fingerprint}  {name}{address}: {}, added {added} by {by}", permission.word()))?;
    }
    if all.is_empty() {
        say("no other host is trusted: `page-server invite` there, then `migrate trust CODE` here")?;
    }
    Ok(())
}

/// Removes all hosts of a name, or the one of a fingerprint.
fn revoke(peers: &Peers, wanted: &str) -> Result<Vec<Fingerprint>> {
    // An entry that cannot be read has a fingerprint, and can be removed.
    if let Ok(fingerprint) = wanted.parse::<Fingerprint>() {
        if peers.remove(fingerprint)? {
            return Ok(vec![fingerprint]);
        }
        bail!("no host with fingerprint {fingerprint} is trusted");
    }
    let (all, _) = peers.list()?;
    let digits = wanted.to_ascii_lowercase().replace(':', "");
    let named: Vec<Fingerprint> = all.iter().filter(|peer| peer.name == wanted).map(|peer| peer.fingerprint).collect();
    let begun: Vec<Fingerprint> = all
        .iter()
        .map(|peer| peer.fingerprint)
        .filter(|fingerprint| digits.len() >= FEWEST_DIGITS && fingerprint.to_string().starts_with(&digits))
        .collect();
    let chosen = match (named.as_slice(), begun.as_slice()) {
        ([], []) => {
            bail!("no host is called {wanted:?}, and no fingerprint begins with it; `migrate hosts` lists them")
        }
        ([], [one]) => vec![*one],
        ([], _) => bail!("several fingerprints begin with {wanted}: give more of it"),
        // Whoever revokes a name wants nobody of that name.
        (named, _) => named.to_vec(),
    };
    for fingerprint in &chosen {
        peers.remove(*fingerprint)?;
    }
    Ok(chosen)
}

fn described(peer: &Peer) -> Value {
    json!({
        "name": peer.name,
        "fingerprint": peer.fingerprint.to_string(),
        "address": peer.address,
        "permits": peer.permission.word(),
        "added": peer.added,
        "by": peer.by,
    })
}

/// Writes a line to standard output.
fn say(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").context("standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_revoked_by_name_and_by_fingerprint() {
        let directory = tempfile::tempdir().unwrap();
        let peers = Peers::in_directory(directory.path());
        let fingerprint = |digit: &str| digit.repeat(64).parse::<Fingerprint>().unwrap();
        let fill = || {
            for (digit, name) in [("1", "one"), ("2", "two"), ("3", "two"), ("4", "four")] {
                peers.add(&Peer::new(name, fingerprint(digit), None, Permission::Both, "test").unwrap()).unwrap();
            }
        };
        fill();
        assert_eq!(revoke(&peers, "one").unwrap(), [fingerprint("1")]);
        assert_eq!(revoke(&peers, "two").unwrap(), [fingerprint("2"), fingerprint("3")]);
        assert_eq!(peers.list().unwrap().0.len(), 1);
        fill();
        assert_eq!(revoke(&peers, &"4".repeat(64)).unwrap(), [fingerprint("4")]);
        assert_eq!(revoke(&peers, "3333:3333:3").unwrap(), [fingerprint("3")]);
        for unknown in ["five", "2222", "", &"9".repeat(64)] {
            assert!(revoke(&peers, unknown).is_err(), "{unknown}");
        }
        assert_eq!(peers.list().unwrap().0.len(), 2);
    }
}
