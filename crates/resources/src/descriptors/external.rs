//! What becomes of descriptors that lead outside: the user says so, descriptor by descriptor.

use crate::{Error, Result};
use godwit_proto::image::RegFileEntry;
use std::collections::BTreeMap;

/// What a descriptor becomes at the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Replacement {
    Null,
    File(String),
}

/// The user's choices, by descriptor number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Externals(BTreeMap<i32, Replacement>);

impl Externals {
    /// Parses choices of the forms `fd[N]=file:/path` and `fd[N]=null`.
    ///
    /// # Errors
    /// [`Error::State`] for any other form, a relative path, or a number given twice.
    pub fn parse(choices: &[String]) -> Result<Self> {
        let mut parsed = BTreeMap::new();
        for choice in choices {
            let (fd, replacement) = parse_one(choice).ok_or_else(|| {
                Error::state(
                    format!("--external {choice:?}"),
                    "expected fd[N]=file:/absolute/path or fd[N]=null, for example 'fd[1]=file:/var/log/out'",
                )
            })?;
            if parsed.insert(fd, replacement).is_some() {
                return Err(Error::state(format!("--external {choice:?}"), format!("fd {fd} is given twice")));
            }
        }
        Ok(Self(parsed))
    }

    /// Whether the user chose something for a descriptor.
    #[must_use]
    pub fn names(&self, fd: i32) -> bool {
        self.0.contains_key(&fd)
    }

    /// The file that takes the place of a descriptor whose flags were `flags`. A file is appended to unless the descriptor
    /// was open for reading only.
    pub(crate) fn replacement(&self, fd: i32, flags: i32) -> Option<RegFileEntry> {
        let access = flags & libc::O_ACCMODE;
        let (name, added) = match self.0.get(&fd)? {
            Replacement::Null => ("/dev/null".to_owned(), 0),
            Replacement::File(path) if access == libc::O_RDONLY => (path.clone(), 0),
            Replacement::File(path) => (path.clone(), libc::O_APPEND | libc::O_CREAT),
        };
        // A terminal is open for both on all three standard streams; output must not be lost for want of reading.
        let access = match fd {
            1 | 2 if added != 0 => libc::O_WRONLY,
            _ => access,
        };
        let flags = access | added | flags & libc::O_NONBLOCK;
        Some(RegFileEntry { flags: flags as u32, name, ext: Some(true), ..RegFileEntry::default() })
    }
}

fn parse_one(choice: &str) -> Option<(i32, Replacement)> {
    let (fd, replacement) = choice.strip_prefix("fd[")?.split_once("]=")?;
    let fd = fd.parse().ok().filter(|fd| *fd >= 0)?;
    let replacement = match replacement.strip_prefix("file:") {
        Some(path) if path.starts_with('/') && !path.contains('\0') => Replacement::File(path.to_owned()),
        None if replacement == "null" => Replacement::Null,
        _ => return None,
    };
    Some((fd, replacement))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(choices: &[&str]) -> Result<Externals> {
        Externals::parse(&choices.iter().map(|&choice| choice.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn both_forms_are_understood() {
        let externals = parse(&["fd[1]=file:/tmp/out=[x]", "fd[0]=null"]).unwrap();
        let out = externals.replacement(1, libc::O_RDWR).unwrap();
        assert_eq!(
            (out.name.as_str(), out.flags as i32),
            ("/tmp/out=[x]", libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT)
        );
        assert_eq!(externals.replacement(0, libc::O_RDWR).unwrap().name, "/dev/null");
        assert!(externals.replacement(2, 0).is_none());
    }

    #[test]
    fn other_forms_are_refused() {
        for wrong in ["1=null", "fd[-1]=null", "fd[x]=null", "fd[1]=nil", "fd[1]=file:out", "fd[1]", ""] {
            assert!(parse(&[wrong]).is_err(), "{wrong}");
        }
        assert!(parse(&["fd[1]=null", "fd[1]=file:/x"]).is_err());
    }
}
