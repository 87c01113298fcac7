//! Shared objects: memory, and files without a path, that several mappings and descriptors lead to. Each gets a number, is
//! opened once, and is made once at the destination.

use crate::descriptors::shared_object;
use crate::{Error, Result};
use godwit_kernel::ipc;
use godwit_pages::{PageRange, PageSet};
use godwit_proto::wire::SharedObject;
use godwit_proto::wire::shared_object::Kind;
use godwit_tracee::Vma;
use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

/// A shared object of the source and what is known of it.
#[derive(Debug)]
pub struct Object {
    /// How it is described to the destination.
    pub description: SharedObject,
    /// Whether a descriptor of the process leads to it, through which content can change unseen by dirty tracking.
    pub has_descriptor: bool,
    file: File,
}

impl Object {
    /// Pages that have content, by byte offset; holes are left out (lseek(2), `SEEK_DATA`).
    ///
    /// # Errors
    /// When the object cannot be sought in.
    pub fn populated(&self) -> Result<PageSet> {
        let mut pages = PageSet::new();
        let mut at = 0;
        loop {
            let start = match lseek(&self.file, at, Whence::SeekData) {
                Ok(start) => start,
                Err(Errno::ENXIO) => return Ok(pages),
                Err(source) => return Err(Error::call(self.name(), "seeking data", source)),
            };
            let end = lseek(&self.file, start, Whence::SeekHole)
                .map_err(|source| Error::call(self.name(), "seeking a hole", source))?;
            if let Some(range) = PageRange::enclosing(start as u64, end as u64) {
                pages.insert(range);
            }
            at = end;
        }
    }

    /// Reads content at a byte offset; what lies behind the end reads as zeros.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => {
                    buffer[done..].fill(0);
                    break;
                }
                Ok(read) => done += read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let source = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
                    return Err(Error::call(self.name(), "reading", source));
                }
            }
        }
        Ok(())
    }

    /// The name that users know it by.
    #[must_use]
    pub fn name(&self) -> String {
        let SharedObject { name, path, .. } = &self.description;
        if path.is_empty() { name.clone() } else { path.clone() }
    }

    fn refresh(&mut self) -> Result<()> {
        let stat = fstat(&self.file).map_err(|source| Error::call(self.name(), "fstat", source))?;
        self.description.size = stat.st_size as u64;
        Ok(())
    }
}

/// All shared objects of a process, found so far.
#[derive(Debug, Default)]
pub struct Objects(Vec<Object>);

impl Objects {
    /// The objects, in order of their numbers, which start at 1.
    pub fn iter(&self) -> impl Iterator<Item = &Object> {
        self.0.iter()
    }

    /// The object with a number.
    #[must_use]
    pub fn by_number(&self, number: u32) -> Option<&Object> {
        self.0.get(number.checked_sub(1)? as usize)
    }

    /// The object of a device and inode.
    #[must_use]
    pub fn by_identity(&self, device: u64, inode: u64) -> Option<&Object> {
        self.0.iter().find(|object| (object.description.device, object.description.inode) == (device, inode))
    }

    /// Descriptions of all of them, with their sizes of now.
    ///
    /// # Errors
    /// When one cannot be looked at.
    pub fn describe(&mut self) -> Result<Vec<SharedObject>> {
        self.0
            .iter_mut()
            .map(|object| {
                object.refresh()?;
                Ok(object.description.clone())
            })
            .collect()
    }

    /// Takes in the object behind an area of process `pid`, opened through /proc/PID/map_files.
    ///
    /// # Errors
    /// When it cannot be opened or described.
    pub fn admit_mapping(&mut self, pid: i32, vma: &Vma, kind: Kind) -> Result<u32> {
        if let Some(object) = self
            .0
            .iter_mut()
            .find(|object| (object.description.device, object.description.inode) == (vma.device, vma.inode))
        {
            object.description.mapped = true;
            return Ok(object.description.number);
        }
        let path = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
        let file = File::open(&path).map_err(|source| Error::Proc { path: path.into(), source })?;
        let number = self.admit(file, kind, vma)?;
        if let Some(object) = self.0.last_mut() {
            object.description.mapped = true;
        }
        Ok(number)
    }

    /// Takes in the object behind a descriptor, fetched from the process. `link` is what /proc/PID/fd says of it.
    ///
    /// # Errors
    /// When it cannot be described.
    pub fn admit_descriptor(&mut self, fd: BorrowedFd<'_>, link: &[u8]) -> Result<u32> {
        self.admit_described(shared_object(fd, link)?, fd)
    }

    /// Takes in an object that a descriptor leads to and that has been described already.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn admit_described(&mut self, description: SharedObject, fd: BorrowedFd<'_>) -> Result<u32> {
        let identity = (description.device, description.inode);
        let known = self.0.iter().position(|object| (object.description.device, object.description.inode) == identity);
        let at = match known {
            Some(at) => at,
            None => {
                // N.B. reopened, so that reading here never moves the program's own offset.
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                let file = File::open(&path).map_err(|source| Error::Proc { path: path.into(), source })?;
                self.add(description, file);
                self.0.len() - 1
            }
        };
        self.0[at].has_descriptor = true;
        Ok(self.0[at].description.number)
    }

    fn add(&mut self, mut description: SharedObject, file: File) -> u32 {
        description.number = self.0.len() as u32 + 1;
        let number = description.number;
        self.0.push(Object { description, has_descriptor: false, file });
        number
    }

    fn admit(&mut self, file: File, kind: Kind, vma: &Vma) -> Result<u32> {
        let link = vma.name_text();
        let stat = fstat(&file).map_err(|source| Error::call(link.as_ref(), "fstat", source))?;
        let mut description = match kind {
            Kind::Memfd | Kind::GhostFile | Kind::Hugetlb => shared_object(file.as_fd(), &vma.name)?,
            Kind::AnonShm | Kind::Sysv | Kind::File => SharedObject {
                kind: kind.into(),
                size: stat.st_size as u64,
                name: link.strip_suffix(" (deleted)").unwrap_or(&link).to_owned(),
                ..SharedObject::default()
            },
        };
        (description.device, description.inode) = (vma.device, vma.inode);
        if kind == Kind::Sysv {
            describe_segment(&mut description, vma.inode)?;
        }
        Ok(self.add(description, file))
    }
}

fn describe_segment(description: &mut SharedObject, inode: u64) -> Result<()> {
    const SHM_DEST: u32 = 0o1000;
    let id = i32::try_from(inode).map_err(|_| Error::state("System V shared memory", "its id is out of range"))?;
    let segment =
        ipc::segment(id).map_err(|source| Error::call(format!("System V shared memory {id}"), "shmctl", source))?;
    description.sysv_id = id;
    description.sysv_key = segment.key;
    description.size = segment.size;
    description.mode = segment.mode & 0o777;
    description.uid = segment.uid;
    description.gid = segment.gid;
    description.removed = segment.mode & SHM_DEST != 0;
    Ok(())
}
