//! Pipes and named pipes. What is inside is copied by tee(2), which takes nothing out.

use super::regular;
use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::readable_bytes;
use godwit_proto::image::{FdTypes, FifoEntry, FileEntry, PipeDataEntry, PipeEntry};
use godwit_proto::wire::PipeContent;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, open, tee};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{pipe2, read, write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Largest pipe that is read; the kernel's own limit is usually 1 MiB.
const MAX_CONTENT: usize = 64 << 20;

fn is_readable(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_WRONLY
}

/// Collects one end of a pipe.
pub(crate) fn collect(entry: &Entry, id: u32) -> FileEntry {
    let message = PipeEntry {
        id,
        pipe_id: entry.stat.st_ino as u32,
        flags: entry.info.status_flags() as u32,
        ..PipeEntry::default()
    };
    FileEntry { r#type: FdTypes::Pipe as i32, id, pipe: Some(message.into()), ..FileEntry::default() }
}

/// Collects an open named pipe; its path becomes a file of its own with id `path_id`.
pub(crate) fn collect_fifo(entry: &Entry, id: u32, path_id: u32) -> Result<[FileEntry; 2]> {
    let fifo = FifoEntry { id, pipe_id: entry.stat.st_ino as u32, regf_id: Some(path_id) };
    let fifo = FileEntry { r#type: FdTypes::Fifo as i32, id, fifo: Some(fifo.into()), ..FileEntry::default() };
    Ok([fifo, regular::collect(entry, path_id)?])
}

/// Collects capacity and content of a pipe through any descriptor of it.
pub(crate) fn collect_content(entry: &Entry) -> Result<Vec<PipeContent>> {
    let size = fcntl(&entry.file, FcntlArg::F_GETPIPE_SZ).map_err(entry.error("F_GETPIPE_SZ"))?;
    let contents = peek(entry, size)?;
    let message = |data: Vec<u8>| PipeContent {
        entry: Some(PipeDataEntry {
            pipe_id: entry.stat.st_ino as u32,
            bytes: data.len() as u32,
            size: Some(size as u32),
        }),
        data,
    };
    Ok(contents.into_iter().map(message).collect())
}

/// Copies what is inside: one piece, or a piece for each packet. At least one piece, maybe empty.
fn peek(entry: &Entry, size: i32) -> Result<Vec<Vec<u8>>> {
    let waiting = readable_bytes(entry.file.as_fd()).map_err(entry.error("FIONREAD"))?;
    // What nobody has a reading end for can still be read in a named pipe, by the next to open it.
    let unreadable = !is_readable(entry.info.flags) && entry.link.starts_with(b"pipe:");
    if waiting == 0 || unreadable {
        return Ok(vec![Vec::new()]);
    }
    if waiting > MAX_CONTENT {
        return Err(Error::state(entry.name(), format!("{waiting} bytes wait in it")));
    }
    let reopened;
    let from = if is_readable(entry.info.flags) {
        entry.file.as_fd()
    } else {
        let path = format!("/proc/self/fd/{}", entry.file.as_raw_fd());
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        reopened = open(path.as_str(), flags, Mode::empty()).map_err(entry.error("open"))?;
        reopened.as_fd()
    };
    let pieces = copy_out(from, waiting, size).map_err(entry.error("tee"))?;
    if pieces.iter().map(Vec::len).sum::<usize>() != waiting {
        return Err(Error::state(entry.name(), "its content changes while it is read"));
    }
    Ok(pieces)
}

/// A read returns all there is, except that it ends behind each packet.
fn copy_out(from: BorrowedFd<'_>, waiting: usize, size: i32) -> Result<Vec<Vec<u8>>, Errno> {
    let (out, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    fcntl(&into, FcntlArg::F_SETPIPE_SZ(size))?;
    tee(from, &into, waiting, SpliceFFlags::SPLICE_F_NONBLOCK)?;
    let mut pieces = Vec::new();
    let mut left = waiting;
    while left > 0 {
        let mut piece = vec![0; left];
        match read(&out, &mut piece) {
            Ok(0) | Err(Errno::EAGAIN) => break,
            Ok(length) => {
                piece.truncate(length);
                left -= length;
                pieces.push(piece);
            }
            Err(source) => return Err(source),
        }
    }
    Ok(pieces)
}

fn fill(writer: BorrowedFd<'_>, contents: &[&PipeContent]) -> Result<(), Errno> {
    let size = contents.iter().find_map(|content| content.entry.as_ref()?.size);
    if let Some(size) = size {
        let size = i32::try_from(size).map_err(|_| Errno::EINVAL)?;
        if fcntl(writer, FcntlArg::F_GETPIPE_SZ)? != size {
            fcntl(writer, FcntlArg::F_SETPIPE_SZ(size))?;
        }
    }
    for content in contents {
        let mut rest = content.data.as_slice();
        while !rest.is_empty() {
            let written = write(writer, rest)?;
            rest = &rest[written..];
        }
    }
    Ok(())
}

/// Makes a pipe and the ends that `ends` tell of, in their order. An end that nobody has is closed by that.
pub(crate) fn rebuild(ends: &[&PipeEntry], contents: &[&PipeContent]) -> Result<Vec<OwnedFd>> {
    let resource = || format!("pipe:[{}]", ends.first().map_or(0, |end| end.pipe_id));
    let failed = |what| move |source| Error::call(resource(), what, source);
    // The flag is the writer's alone; packets written before it was cleared are packets still.
    let packets = contents.len() > 1 || ends.iter().any(|end| end.flags as i32 & libc::O_DIRECT != 0);
    let mode = if packets { OFlag::O_DIRECT } else { OFlag::empty() };
    let (reader, writer) = pipe2(mode | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(failed("pipe2"))?;
    fill(writer.as_fd(), contents).map_err(failed("putting back what was inside"))?;
    let (mut fresh_reader, mut fresh_writer) = (Some(()), Some(()));
    let mut made = Vec::with_capacity(ends.len());
    for end in ends {
        let flags = OFlag::from_bits_truncate(end.flags as i32);
        let side = match flags & OFlag::O_ACCMODE {
            OFlag::O_RDONLY if fresh_reader.take().is_some() => reader.try_clone(),
            OFlag::O_WRONLY if fresh_writer.take().is_some() => writer.try_clone(),
            // Opened once more through /proc: an open file description of its own.
            _ => {
                let again = regular::reopen(reader.as_fd(), flags).map_err(failed("opening it again"))?;
                made.push(again);
                continue;
            }
        };
        let side =
            side.map_err(|source| failed("dup")(source.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw)))?;
        fcntl(&side, FcntlArg::F_SETFL(flags & !OFlag::O_ACCMODE)).map_err(failed("F_SETFL"))?;
        made.push(side);
    }
    Ok(made)
}

/// Opens a named pipe that exists at the destination as often as `opens` says (their flags, in order), and puts back what
/// was inside.
///
/// Two hosts that are namespaces of one kernel share a named pipe on a file system that they share: what is inside is there
/// already and stays.
pub(crate) fn rebuild_fifo(path: &str, opens: &[i32], contents: &[&PipeContent]) -> Result<Vec<OwnedFd>> {
    let failed = |what| move |source| Error::call(path, what, source);
    let packets = if contents.len() > 1 { OFlag::O_DIRECT } else { OFlag::empty() };
    let both = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | packets;
    // N.B. kept until all are open: none of them blocks for want of another end.
    let keeper = open(path, both, Mode::empty()).map_err(failed("open"))?;
    if fstat(&keeper).map_err(failed("fstat"))?.st_mode & libc::S_IFMT != libc::S_IFIFO {
        return Err(Error::state(path, "it is not a named pipe at the destination"));
    }
    let waiting = readable_bytes(keeper.as_fd()).map_err(failed("FIONREAD"))?;
    if waiting == 0 {
        fill(keeper.as_fd(), contents).map_err(failed("putting back what was inside"))?;
    } else {
        let size = fcntl(&keeper, FcntlArg::F_GETPIPE_SZ).map_err(failed("F_GETPIPE_SZ"))?;
        let inside = copy_out(keeper.as_fd(), waiting, size).map_err(failed("tee"))?.concat();
        let wanted: Vec<u8> = contents.iter().flat_map(|content| content.data.iter().copied()).collect();
        if inside != wanted {
            return Err(Error::state(path, "something else waits in this named pipe at the destination"));
        }
    }
    let mut made = Vec::with_capacity(opens.len());
    for flags in opens {
        let flags = OFlag::from_bits_truncate(*flags);
        let opened = open(path, flags | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed("open"))?;
        fcntl(&opened, FcntlArg::F_SETFL(flags & !OFlag::O_ACCMODE)).map_err(failed("F_SETFL"))?;
        made.push(opened);
    }
    Ok(made)
}
