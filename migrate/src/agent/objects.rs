//! Shared objects whose content can change unseen: compared by a hash of each page, sent where it differs.

use super::memory::ranges;
use super::stop::{Result, Stop};
use super::wire::Wire;
use bytes::Bytes;
use godwit_kernel::process::{pidfd_getfd, pidfd_open};
use godwit_pages::{PAGE_SIZE, PageRange, PageSet};
use godwit_proto::wire;
use godwit_proto::wire::shared_object::Kind;
use godwit_resources::memory::{Object, Objects};
use godwit_stream::{PageEncoder, checksum};
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

/// Pages read at once.
const CHUNK_PAGES: u64 = 256;

/// What the destination has of each object.
#[derive(Debug, Default)]
pub(super) struct ObjectPass {
    known: HashMap<u32, HashMap<u64, u64>>,
}

impl ObjectPass {
    /// Whether an object is compared by content instead of tracked through its mappings.
    pub(super) fn compares(object: &Object) -> bool {
        object.has_descriptor || !object.description.mapped || object.description.kind() == Kind::GhostFile
    }

    /// Takes in the objects that descriptors of the process lead to.
    ///
    /// # Errors
    /// When the process is gone.
    pub(super) fn find_descriptors(&self, pid: i32, objects: &mut Objects) -> Result<()> {
        let path = format!("/proc/{pid}/fd");
        let entries = std::fs::read_dir(&path).map_err(|error| Stop::failed(path, error.to_string()))?;
        let pidfd = pidfd_open(pid).map_err(|errno| Stop::failed("process", format!("pidfd_open: {errno}")))?;
        for entry in entries.flatten() {
            let Ok(link) = std::fs::read_link(entry.path()) else { continue };
            let link = link.as_os_str().as_bytes();
            let is_deleted = link.starts_with(b"/") && link.ends_with(b" (deleted)");
            if !is_deleted && !link.starts_with(b"/memfd:") {
                continue;
            }
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(fd) = number.and_then(|number| pidfd_getfd(pidfd.as_fd(), number).ok()) else { continue };
            let regular = nix::sys::stat::fstat(&fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFREG);
            if regular {
                objects.admit_descriptor(fd.as_fd(), link)?;
            }
        }
        Ok(())
    }

    /// Number of pages of compared objects that the destination has.
    pub(super) fn compared_pages(&self) -> u64 {
        self.known.values().map(|pages| pages.len() as u64).sum()
    }

    /// Sends the pages that differ from what the destination has. Returns their number.
    ///
    /// # Errors
    /// When an object cannot be read or the link is lost.
    pub(super) fn send_changed(&mut self, objects: &Objects, encoder: &mut PageEncoder, wire: &Wire) -> Result<u64> {
        let mut sent = 0;
        for object in objects.iter().filter(|object| Self::compares(object)) {
            sent += self.send_object(object, encoder, wire)?;
        }
        Ok(sent)
    }

    fn send_object(&mut self, object: &Object, encoder: &mut PageEncoder, wire: &Wire) -> Result<u64> {
        let number = object.description.number;
        let known = self.known.entry(number).or_default();
        let content = object.populated()?;
        let gone: Vec<u64> = known.keys().filter(|&&offset| !content.contains(offset)).copied().collect();
        if !gone.is_empty() {
            let set = PageSet::from_iter(gone.iter().filter_map(|&offset| PageRange::page_at(offset)));
            wire.send(&wire::Drop { space: number, ranges: ranges(&set) })?;
            for offset in gone {
                known.remove(&offset);
            }
        }
        let mut sent = 0;
        for chunk in content.iter().flat_map(|range| range.chunks(CHUNK_PAGES)) {
            let mut bytes = vec![0; chunk.len() as usize];
            object.read(chunk.start(), &mut bytes)?;
            let bytes = Bytes::from(bytes);
            let mut frames = Vec::new();
            for page in chunk.chunks(1) {
                let at = (page.start() - chunk.start()) as usize;
                let piece = bytes.slice(at..at + PAGE_SIZE as usize);
                let hash = checksum(&piece);
                if known.insert(page.start(), hash) != Some(hash) {
                    frames.extend(encoder.encode_shared(number, page.start(), &piece, 0));
                    sent += 1;
                }
            }
            if !frames.is_empty() {
                wire.send_frames(frames)?;
            }
        }
        Ok(sent)
    }
}
