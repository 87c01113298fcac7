//! What a mapping is a mapping of, told from its line in /proc/PID/maps.

use godwit_proto::wire::shared_object::Kind;
use godwit_tracee::Vma;

/// What backs a virtual memory area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory: heap, stacks, `mmap`.
    Anonymous,
    /// Private huge pages (`MAP_HUGETLB`).
    HugePages,
    /// A file that has a path.
    File,
    /// A shared object: memory, or a file without a path, that other mappings and descriptors may lead to as well.
    Object(Kind),
    /// The ring of an asynchronous I/O context (io_setup(2)).
    AioRing,
    /// Provided by the kernel (vdso, vvar, vsyscall).
    Kernel,
    /// Cannot be moved; the text says what it is.
    Unsupported(&'static str),
}

const DELETED: &[u8] = b" (deleted)";

impl Backing {
    /// Tells the backing of an area.
    #[must_use]
    pub fn of(vma: &Vma) -> Self {
        let name = vma.name.as_slice();
        if vma.is_kernel_provided() {
            return Self::Kernel;
        }
        if name == b"[uprobes]" {
            return Self::Unsupported("a probe of a debugger or tracer (uprobe)");
        }
        if name.is_empty() || name.starts_with(b"[") {
            return if vma.inode == 0 { Self::Anonymous } else { Self::Unsupported("a mapping without a name") };
        }
        if name.starts_with(b"/[aio]") {
            return Self::AioRing;
        }
        if let Some(inode) = name.strip_prefix(b"anon_inode:") {
            return Self::Unsupported(match inode {
                b"[io_uring]" => "an io_uring instance",
                b"[perf_event]" => "a performance event buffer",
                _ => "a mapping of an anonymous inode (KVM, BPF or a driver)",
            });
        }
        if name.starts_with(b"/secretmem") {
            return Self::Unsupported("secret memory (memfd_secret), which nobody else may read");
        }
        if name.starts_with(b"socket:") {
            return Self::Unsupported("a ring buffer of a socket");
        }
        if name == b"/dev/zero (deleted)" {
            return Self::Object(Kind::AnonShm);
        }
        if name.starts_with(b"/memfd:") {
            return Self::Object(Kind::Memfd);
        }
        if name.starts_with(b"/SYSV") && name.ends_with(DELETED) {
            return Self::Object(Kind::Sysv);
        }
        if name.starts_with(b"/anon_hugepage") {
            return if vma.shared { Self::Object(Kind::Hugetlb) } else { Self::HugePages };
        }
        if name.ends_with(DELETED) {
            return Self::Object(Kind::GhostFile);
        }
        if name.starts_with(b"/dev/") && name != b"/dev/zero" && !name.starts_with(b"/dev/shm/") {
            return Self::Unsupported("a mapping of a device");
        }
        if name.starts_with(b"/") { Self::File } else { Self::Unsupported("a mapping of an unknown kind") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(name: &str, shared: bool, inode: u64) -> Vma {
        Vma {
            start: 0x1000,
            end: 0x2000,
            protection: 3,
            shared,
            offset: 0,
            device: 0,
            inode,
            name: name.as_bytes().to_vec(),
        }
    }

    #[test]
    fn tells_backings_by_name() {
        assert_eq!(Backing::of(&vma("[anon:heap]", false, 0)), Backing::Anonymous);
        assert_eq!(Backing::of(&vma("/memfd:a b (deleted)", true, 7)), Backing::Object(Kind::Memfd));
        assert_eq!(Backing::of(&vma("/dev/zero (deleted)", true, 7)), Backing::Object(Kind::AnonShm));
        assert_eq!(Backing::of(&vma("/dev/zero", false, 7)), Backing::File);
        assert_eq!(Backing::of(&vma("/tmp/x (deleted)", true, 7)), Backing::Object(Kind::GhostFile));
        assert_eq!(Backing::of(&vma("/anon_hugepage (deleted)", false, 7)), Backing::HugePages);
        assert!(matches!(Backing::of(&vma("/dev/dri/card0", true, 7)), Backing::Unsupported(_)));
    }
}
