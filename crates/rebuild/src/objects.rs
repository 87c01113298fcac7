//! Shared objects at the destination: each made once, kept open here, and led to from mappings and descriptors alike.

use crate::{Error, Result};
use godwit_kernel::ipc::{self, Attachment};
use godwit_pages::PAGE_SIZE;
use godwit_proto::wire::SharedObject;
use godwit_proto::wire::shared_object::Kind;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Largest shared object that is accepted, in bytes: the size of an address space.
const MAX_SIZE: u64 = 1 << 47;

/// One object.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) description: SharedObject,
    file: File,
    /// Keeps a System V segment attached until the process itself is.
    attachment: Option<Attachment>,
}

/// All shared objects of a process that is being built.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    made: BTreeMap<u32, Object>,
    kept: bool,
}

impl Objects {
    /// Makes what is described and not there yet, and gives the others their size of now.
    pub(crate) fn follow(&mut self, descriptions: &[SharedObject]) -> Result<()> {
        for description in descriptions {
            if description.size > MAX_SIZE {
                return Err(Error::state(label(description), "its size is beyond any address space"));
            }
            match self.made.get_mut(&description.number) {
                Some(object) => object.resize(description)?,
                None => {
                    self.made.insert(description.number, Object::make(description)?);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn get(&self, number: u32) -> Result<&Object> {
        self.made.get(&number).ok_or_else(|| Error::state(format!("shared object {number}"), "it was never described"))
    }

    pub(crate) fn descriptor(&self, number: u32) -> Option<BorrowedFd<'_>> {
        self.made.get(&number).map(|object| object.file.as_fd())
    }

    /// Puts on what would have hindered filling: seals, and the removal mark of System V segments.
    pub(crate) fn finish(&mut self) -> Result<()> {
        for object in self.made.values_mut() {
            object.finish()?;
        }
        Ok(())
    }

    /// Leaves them to the process, which runs now.
    pub(crate) fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        for object in self.made.values() {
            if object.description.kind() == Kind::Sysv {
                let _ = ipc::remove_segment(object.description.sysv_id);
            }
        }
    }
}

fn label(description: &SharedObject) -> String {
    let name = if description.path.is_empty() { &description.name } else { &description.path };
    format!("shared object {name}")
}

impl Object {
    fn make(description: &SharedObject) -> Result<Self> {
        let failed = |what, source: std::io::Error| Error::call(label(description), what, source);
        let size = description.size;
        let (file, attachment) = match description.kind() {
            Kind::AnonShm => {
                let attachment = Attachment::anonymous(size.next_multiple_of(PAGE_SIZE).max(PAGE_SIZE))
                    .map_err(|source| failed("mapping", source.into()))?;
                (open_attachment(&attachment).map_err(|source| failed("opening", source))?, None)
            }
            Kind::Hugetlb if description.memfd_flags == 0 => {
                let attachment = Attachment::anonymous_huge(size, description.huge_page_size)
                    .map_err(|source| failed("mapping", source.into()))?;
                (open_attachment(&attachment).map_err(|source| failed("opening", source))?, None)
            }
            Kind::Memfd | Kind::Hugetlb => {
                (make_memfd(description).map_err(|source| failed("memfd_create", source))?, None)
            }
            Kind::Sysv => {
                let attachment = make_segment(description)?;
                let file = open_attachment(&attachment).map_err(|source| failed("opening", source))?;
                (file, Some(attachment))
            }
            Kind::GhostFile => (make_ghost(description).map_err(|source| failed("creating", source))?, None),
            Kind::File => return Err(Error::state(label(description), "a file with a path is not a shared object")),
        };
        Ok(Self { description: description.clone(), file, attachment })
    }

    fn resize(&mut self, description: &SharedObject) -> Result<()> {
        // What is removed when the migration is called off must be what was made here.
        if (description.kind(), description.sysv_id) != (self.description.kind(), self.description.sysv_id) {
            return Err(Error::state(label(description), "it has become another object"));
        }
        let resizable = matches!(self.description.kind(), Kind::Memfd | Kind::GhostFile | Kind::Hugetlb);
        if resizable && description.size != self.description.size {
            self.file
                .set_len(description.size)
                .map_err(|source| Error::call(label(description), "ftruncate", source))?;
        }
        self.description = description.clone();
        Ok(())
    }

    /// Writes content at a byte offset.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        // The last page may reach past the end, which must stay where it is.
        let limit = match self.description.kind() {
            Kind::AnonShm | Kind::Sysv => self.description.size.next_multiple_of(PAGE_SIZE),
            _ => self.description.size,
        };
        let length = bytes.len().min(limit.saturating_sub(offset) as usize);
        self.file
            .write_all_at(&bytes[..length], offset)
            .map_err(|source| Error::call(label(&self.description), "writing", source))
    }

    /// Makes a range a hole again.
    pub(crate) fn punch(&self, offset: u64, length: u64) -> Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, flags, offset as i64, length as i64)
            .map_err(|source| Error::call(label(&self.description), "punching a hole", source))
    }

    /// A path under which a process that shares our /proc can open it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    fn finish(&mut self) -> Result<()> {
        let failed = |what, source: nix::errno::Errno| Error::call(label(&self.description), what, source);
        match self.description.kind() {
            Kind::Memfd => {
                let seals = SealFlag::from_bits_retain(self.description.seals as i32);
                let sealable = self.description.memfd_flags & MFdFlags::MFD_ALLOW_SEALING.bits() != 0;
                if sealable && !seals.is_empty() {
                    fcntl(&self.file, FcntlArg::F_ADD_SEALS(seals)).map_err(|source| failed("sealing", source))?;
                }
            }
            Kind::Sysv if self.description.removed => {
                ipc::remove_segment(self.description.sysv_id)
                    .map_err(|source| failed("marking for removal", source))?;
            }
            _ => {}
        }
        self.attachment = None;
        Ok(())
    }
}

fn open_attachment(attachment: &Attachment) -> std::io::Result<File> {
    File::options().read(true).write(true).open(attachment.map_file())
}

fn make_memfd(description: &SharedObject) -> std::io::Result<File> {
    let mut flags = MFdFlags::from_bits_truncate(description.memfd_flags) | MFdFlags::MFD_CLOEXEC;
    if description.huge_page_size > PAGE_SIZE {
        flags |= MFdFlags::MFD_HUGETLB;
        flags |= MFdFlags::from_bits_retain(description.huge_page_size.trailing_zeros() << 26);
    }
    let name = CString::new(description.name.as_str())?;
    let file = File::from(memfd_create(name.as_c_str(), flags)?);
    file.set_len(description.size)?;
    Ok(file)
}

/// Creates a System V segment under its old id, which `shm_next_id` asks for.
fn make_segment(description: &SharedObject) -> Result<Attachment> {
    let name = format!("System V shared memory {}", description.sysv_id);
    let failed = |what, source: std::io::Error| Error::call(name.as_str(), what, source);
    std::fs::write("/proc/sys/kernel/shm_next_id", description.sysv_id.to_string())
        .map_err(|source| failed("choosing its id", source))?;
    let mode = (description.mode & 0o777) as i32;
    let id = ipc::create_segment(description.sysv_key, description.size, mode)
        .map_err(|source| failed("shmget", source.into()))?;
    if id != description.sysv_id {
        let _ = ipc::remove_segment(id);
        return Err(Error::state(name, "its id is taken in the destination's IPC namespace"));
    }
    ipc::own_segment(id, description.uid, description.gid, description.mode)
        .and_then(|()| Attachment::segment(id, description.size))
        .map_err(|source| {
            let _ = ipc::remove_segment(id);
            failed("attaching", source.into())
        })
}

/// Creates a file without a path: in the directory where the original was, or where temporary files go.
fn make_ghost(description: &SharedObject) -> std::io::Result<File> {
    let parent = Path::new(&description.path).parent().filter(|parent| parent.is_dir());
    let create = |directory: &Path| {
        File::options()
            .read(true)
            .write(true)
            .mode(description.mode & 0o7777)
            .custom_flags(OFlag::O_TMPFILE.bits())
            .open(directory)
    };
    let file = match parent.map(create) {
        Some(Ok(file)) => file,
        _ => create(&std::env::temp_dir())?,
    };
    file.set_len(description.size)?;
    nix::unistd::fchown(&file, Some(description.uid.into()), Some(description.gid.into()))?;
    nix::sys::stat::fchmod(&file, Mode::from_bits_truncate(description.mode))?;
    Ok(file)
}
