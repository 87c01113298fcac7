//! The hosts that this one trusts: one small file for each in `peers` of the configuration directory, named by its fingerprint.
//!
//! A file that is there is trust, and one that is not is none, so whoever adds or revokes needs no lock and no word with those
//! who look: files come whole (rename(2)) and go at once (unlink(2)), and every handshake looks anew.
//!
//! ```text
//! name host-b
//! address 192.0.2.2:7477        where it was found, if that is known
//! permits both                  or: sending (this host sends there), receiving (it may send here)
//! added 2026-11-26T22:40:00Z
//! by trust
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::private::{self, Existing, Unfit};

const DIRECTORY: &str = "peers";
/// Bytes of the longest entry that is read.
const LONGEST: usize = 4096;
/// Characters of the longest name and address.
const LONGEST_WORD: usize = 255;

/// What two hosts may do together, as this one sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Permission {
    /// Processes may go both ways.
    #[default]
    Both,
    /// This host sends there, and takes nothing from there.
    Sending,
    /// This host takes what comes from there, and sends nothing.
    Receiving,
}

impl Permission {
    /// The word in files and listings.
    pub fn word(self) -> &'static str {
        match self {
            Self::Both => "both",
            Self::Sending => "sending",
            Self::Receiving => "receiving",
        }
    }

    /// The same, as the other host has to see it.
    pub(crate) fn reversed(self) -> Self {
        match self {
            Self::Both => Self::Both,
            Self::Sending => Self::Receiving,
            Self::Receiving => Self::Sending,
        }
    }

    /// Says whether all that `wanted` is, is permitted.
    pub(crate) fn covers(self, wanted: Self) -> bool {
        self == Self::Both || self == wanted
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Both, Self::Sending, Self::Receiving].into_iter().find(|permission| permission.word() == text)
    }
}

/// A host that is trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// What it is called here.
    pub name: String,
    /// What it is known by.
    pub fingerprint: Fingerprint,
    /// Where it was found.
    pub address: Option<String>,
    /// Which way processes may go.
    pub permission: Permission,
    /// When it was added, in UTC.
    pub added: String,
    /// How it came to be here: `invite`, `trust` or `add`.
    pub by: String,
}

impl Peer {
    /// Describes a host that is added now.
    ///
    /// # Errors
    /// When name or address is not a word that can stand in the list.
    pub fn new(
        name: &str,
        fingerprint: Fingerprint,
        address: Option<&str>,
        permission: Permission,
        by: &str,
    ) -> Result<Self> {
        for word in [Some(name), address].into_iter().flatten() {
            if !is_word(word) {
                let shown = word.chars().take(LONGEST_WORD).map(|c| if c.is_control() { ' ' } else { c }).collect();
                return Err(Error::HostName { name: shown });
            }
        }
        Ok(Self {
            name: name.to_owned(),
            fingerprint,
            address: address.map(str::to_owned),
            permission,
            added: utc(SystemTime::now()),
            by: by.to_owned(),
        })
    }

    fn text(&self) -> String {
        let address = self.address.as_ref().map(|address| format!("address {address}\n")).unwrap_or_default();
        let (name, permits, added, by) = (&self.name, self.permission.word(), &self.added, &self.by);
        format!("name {name}\n{address}permits {permits}\nadded {added}\nby {by}\n")
    }

    fn parse(fingerprint: Fingerprint, text: &str) -> Result<Self, String> {
        let (mut name, mut address, mut permission, mut added, mut by) = (None, None, None, None, None);
        for (number, line) in (1..).zip(text.lines()) {
            let bad = |why: &str| format!("line {number}: {why}");
            let (key, value) = line.split_once(' ').ok_or_else(|| bad("no \"KEY VALUE\""))?;
            let slot = match key {
                "name" => &mut name,
                "address" => &mut address,
                "permits" => &mut permission,
                "added" => &mut added,
                "by" => &mut by,
                _ => return Err(bad("a key that is none of name, address, permits, added, by")),
            };
            if !is_word(value) {
                return Err(bad("the value is not one word of plain characters"));
            }
            if slot.replace(value.to_owned()).is_some() {
                return Err(bad("the key was there before"));
            }
        }
        let permission = permission.ok_or("does not say what it permits")?;
        Ok(Self {
            name: name.ok_or("has no name")?,
            fingerprint,
            address,
            permission: Permission::parse(&permission).ok_or("permits something unknown")?,
            added: added.unwrap_or_default(),
            by: by.unwrap_or_default(),
        })
    }
}

/// Says whether `text` can be a name: letters, digits and what host names and addresses have besides.
pub(crate) fn is_word(text: &str) -> bool {
    let plain = |character: char| character.is_ascii_alphanumeric() || ".-_:[]%".contains(character);
    !text.is_empty() && text.len() <= LONGEST_WORD && text.chars().all(plain) && !text.starts_with('-')
}

/// The list in one configuration directory.
#[derive(Clone, Debug)]
pub struct Peers {
    directory: PathBuf,
}

impl Peers {
    /// Gives the list of a configuration directory; nothing is read or made yet.
    pub fn in_directory(configuration: &Path) -> Self {
        Self { directory: configuration.join(DIRECTORY) }
    }

    /// Lists those who are trusted, by name; entries that cannot be used, and so are no trust, come as errors beside them.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<(Vec<Peer>, Vec<Error>)> {
        let (mut peers, mut bad) = (Vec::new(), Vec::new());
        for name in self.names()? {
            let found = match name.parse() {
                Ok(fingerprint) => self.find(fingerprint),
                Err(reason) => {
                    let (path, reason) = (self.directory.join(name), format!("is no entry: {reason}"));
                    Err(Error::ConfigFile { path, reason, source: None })
                }
            };
            match found {
                Ok(peer) => peers.extend(peer),
                Err(error) => bad.push(error),
            }
        }
        peers.sort_by(|one, other| (&one.name, one.fingerprint).cmp(&(&other.name, other.fingerprint)));
        Ok((peers, bad))
    }

    /// Says whether nobody was ever added or all were revoked. Where that cannot be seen somebody may be.
    pub fn is_empty(&self) -> bool {
        self.names().is_ok_and(|names| names.is_empty())
    }

    /// Whoever can write there says who is trusted.
    fn check(&self) -> Result<()> {
        private::check_directory(&self.directory).map_err(|unfit| Error::ConfigFile {
            path: self.directory.clone(),
            reason: unfit.reason,
            source: unfit.source,
        })
    }

    fn names(&self) -> Result<Vec<String>> {
        self.check()?;
        let failed = |source| Error::ConfigFile {
            path: self.directory.clone(),
            reason: "cannot be listed".into(),
            source: Some(source),
        };
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if !name.starts_with('.') {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Looks a host up; `None` when it is not trusted.
    ///
    /// # Errors
    /// When its entry cannot be read or used.
    pub fn find(&self, fingerprint: Fingerprint) -> Result<Option<Peer>> {
        let path = self.directory.join(fingerprint.to_string());
        let failed =
            |unfit: Unfit| Error::ConfigFile { path: path.clone(), reason: unfit.reason, source: unfit.source };
        self.check()?;
        let bytes = match private::read(&path, LONGEST) {
            Err(unfit) if unfit.is_missing() => return Ok(None),
            read => read.map_err(failed)?,
        };
        let text = std::str::from_utf8(&bytes).map_err(|_| failed(Unfit::new("is no text")))?;
        Peer::parse(fingerprint, text).map(Some).map_err(|reason| failed(Unfit::new(reason)))
    }

    /// Adds a host, or changes its entry.
    ///
    /// # Errors
    /// When the entry cannot be written.
    pub fn add(&self, peer: &Peer) -> Result<()> {
        let path = self.directory.join(peer.fingerprint.to_string());
        let failed =
            |path: PathBuf| move |unfit: Unfit| Error::ConfigFile { path, reason: unfit.reason, source: unfit.source };
        private::directory(&self.directory).map_err(failed(self.directory.clone()))?;
        private::write(&path, peer.text().as_bytes(), Existing::Replace).map(drop).map_err(failed(path.clone()))
    }

    /// Revokes a host: no link with it begins any more. Says whether it was trusted.
    ///
    /// # Errors
    /// When the entry is there and cannot be removed.
    pub fn remove(&self, fingerprint: Fingerprint) -> Result<bool> {
        let path = self.directory.join(fingerprint.to_string());
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(Error::ConfigFile { path, reason: "cannot be removed".into(), source: Some(source) }),
        }
    }

    /// The words that admit a host with this list, to be typed into a shell.
    pub(crate) fn command(&self, fingerprint: Fingerprint, name: &str) -> String {
        let configuration = self.directory.parent().unwrap_or(&self.directory);
        let command = Self::usual_command(fingerprint, name);
        match configuration == Path::new(crate::DEFAULT_CONFIG_DIR) {
            true => command,
            false => format!("{command} --config-dir {}", configuration.display()),
        }
    }

    /// The same for a list in the usual place.
    pub(crate) fn usual_command(fingerprint: Fingerprint, name: &str) -> String {
        let name = if is_word(name) { format!(" --name {name}") } else { String::new() };
        format!("migrate hosts add {fingerprint}{name}")
    }
}

/// A moment as RFC 3339 writes it, in UTC and whole seconds.
fn utc(moment: SystemTime) -> String {
    let seconds = moment.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Years that begin with March end with the leap day: 400 of them, an era, have 146097 days.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let of_years = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * of_years + of_years / 4 - of_years / 100);
    let months = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * months + 2) / 5 + 1;
    let month = if months < 10 { months + 3 } else { months - 9 };
    let year = era * 400 + of_years + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

impl FromStr for Permission {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text).ok_or("one of: both, sending, receiving")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn peer(name: &str) -> Peer {
        let fingerprint = Fingerprint::of(name.as_bytes());
        Peer::new(name, fingerprint, Some("192.0.2.2:7477"), Permission::Both, "test").unwrap()
    }

    #[test]
    fn who_is_added_is_found_until_revoked() {
        let directory = tempfile::tempdir().unwrap();
        let peers = Peers::in_directory(directory.path());
        let (one, two) = (peer("one"), Peer { permission: Permission::Sending, address: None, ..peer("two") });
        assert!(peers.is_empty() && peers.list().unwrap().0.is_empty());
        peers.add(&two).unwrap();
        peers.add(&one).unwrap();
        peers.add(&one).unwrap();
        assert_eq!(peers.list().unwrap().0, [one.clone(), two.clone()]);
        assert_eq!(peers.find(two.fingerprint).unwrap(), Some(two.clone()));
        assert!(peers.remove(one.fingerprint).unwrap());
        assert!(!peers.remove(one.fingerprint).unwrap());
        assert_eq!(peers.find(one.fingerprint).unwrap(), None);
        assert!(!peers.is_empty());
    }

    #[test]
    fn many_writers_at_once_lose_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let peers = Peers::in_directory(directory.path());
        std::thread::scope(|scope| {
            for writer in 0..8 {
                let peers = &peers;
                scope.spawn(move || {
                    for number in 0..8 {
                        peers.add(&peer(&format!("host-{writer}-{number}"))).unwrap();
                        peers.add(&peer("all")).unwrap();
                        peers.list().unwrap();
                    }
                });
            }
        });
        let (all, bad) = peers.list().unwrap();
        assert!(bad.is_empty(), "{bad:?}");
        assert_eq!(all.len(), 65);
    }

    #[test]
    fn bad_entries_are_named_and_are_no_trust() {
        let directory = tempfile::tempdir().unwrap();
        let peers = Peers::in_directory(directory.path());
        let good = peer("good");
        peers.add(&good).unwrap();
        let file = directory.path().join(DIRECTORY).join(good.fingerprint.to_string());
        for (text, words) in [
            ("", "does not say"),
            ("name a\nname b\npermits both\n", "line 2"),
            ("name a\ncolour red\n", "line 2"),
            ("name\n", "line 1"),
            ("name a b\n", "line 1"),
            ("name a\npermits everything\n", "permits"),
            ("name \x1b[2J\npermits both\n", "line 1"),
        ] {
            std::fs::write(&file, text).unwrap();
            let (all, bad) = peers.list().unwrap();
            assert!(all.is_empty(), "{text:?} is trust");
            let bad = bad[0].to_string();
            assert!(bad.contains(words) && bad.contains(&file.display().to_string()), "{bad}");
            assert!(peers.find(good.fingerprint).is_err());
        }
        std::fs::rename(&file, file.with_file_name("notes")).unwrap();
        assert!(peers.list().unwrap().1[0].to_string().contains("notes"));
    }

    #[test]
    fn names_are_words() {
        let fingerprint = Fingerprint::of(b"x");
        for name in ["", "a b", "a\nby b", "-x", "a/b", &"a".repeat(256), "ä"] {
            assert!(Peer::new(name, fingerprint, None, Permission::Both, "test").is_err(), "{name:?}");
        }
        assert!(Peer::new("[fe80::1%eth0]:7477", fingerprint, None, Permission::Both, "test").is_ok());
    }

    #[test]
    fn moments_are_written_as_dates() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn permissions_mirror_each_other() {
        assert_eq!(Permission::Sending.reversed(), Permission::Receiving);
        assert!(Permission::Both.covers(Permission::Sending));
        assert!(!Permission::Sending.covers(Permission::Receiving));
        assert!(Permission::Receiving.covers(Permission::Receiving));
    }
}
