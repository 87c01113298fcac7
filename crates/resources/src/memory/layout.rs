//! The layout of an address space as a state message.

use super::backing::Backing;
use super::objects::Objects;
use super::sharers;
use super::smaps::{self, Details};
use crate::{Error, Obstacle, Result};
use godwit_pages::PAGE_SIZE;
use godwit_proto::image::{MmEntry, VmaEntry};
use godwit_proto::magics;
use godwit_tracee::{Batch, Tracee, Vma, read_maps};
use std::collections::HashMap;

/// One look at an address space.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// The areas as /proc/PID/maps lists them, kernel-provided ones included.
    pub vmas: Vec<Vma>,
    /// The same as a state message, the areas of the same order in it.
    pub mm: MmEntry,
}

/// Reads layouts of one process again and again, remembering what is dear to find out.
#[derive(Debug)]
pub struct LayoutReader {
    pid: i32,
    details: HashMap<u64, Details>,
    /// Shared objects found so far.
    pub objects: Objects,
}

/// Names every mapping of a running process that cannot be moved, or not without another process that shares it.
///
/// # Errors
/// When the process is gone.
pub fn inspect(pid: i32) -> Result<Vec<Obstacle>> {
    let named = read_maps(pid)?.into_iter().filter_map(|vma| match Backing::of(&vma) {
        Backing::Unsupported(what) => Some((format!("mapping at {:#x}", vma.start), what)),
        _ => None,
    });
    let named = named.map(|(resource, what)| Obstacle::new(resource, format!("{what} cannot be moved"), ""));
    let shared = sharers::obstacles(pid)?;
    let missing = smaps::awaits_pages(pid).filter(|awaits| *awaits).map(|_| incomplete(pid));
    Ok(named.chain(missing).chain(shared).collect())
}

/// Refuses a process whose memory is not all there. N.B. what is missing would be taken for empty.
fn incomplete(pid: i32) -> Obstacle {
    Obstacle::new(
        format!("memory of process {pid}"),
        "not all of it is here: what is missing is still to come from where the process was before, or from another program (userfaultfd)",
        "wait until that migration is over: `migrate status` lists it",
    )
}

impl LayoutReader {
    /// Starts reading layouts of a process.
    #[must_use]
    pub fn new(pid: i32) -> Self {
        Self { pid, details: HashMap::new(), objects: Objects::default() }
    }

    /// Reads the slow part (smaps) again. For the time before a freeze.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn refresh(&mut self) -> Result<()> {
        self.details = smaps::read(self.pid)?;
        Ok(())
    }

    /// Reads the layout of now. Areas that the last [`LayoutReader::refresh`] did not see in the same place make it
    /// refresh again.
    ///
    /// # Errors
    /// When the process is gone, or has mapped something that cannot be moved.
    pub fn read(&mut self) -> Result<Layout> {
        let vmas = read_maps(self.pid)?;
        let known = |vma: &Vma| {
            vma.is_kernel_provided() || self.details.get(&vma.start).is_some_and(|details| details.end == vma.end)
        };
        if !vmas.iter().all(known) {
            self.refresh()?;
        }
        let mut mm = read_marks(self.pid)?;
        mm.vmas = vmas.iter().map(|vma| self.describe(vma)).collect::<Result<_>>()?;
        let heap_end = vmas.iter().filter(|vma| vma.name == b"[heap]").map(|vma| vma.end).max();
        mm.mm_brk = heap_end.unwrap_or(mm.mm_start_brk);
        Ok(Layout { vmas, mm })
    }

    fn describe(&mut self, vma: &Vma) -> Result<VmaEntry> {
        let details =
            self.details.get(&vma.start).filter(|details| details.end == vma.end).cloned().unwrap_or_default();
        if details.awaits_pages() {
            return Err(Error::Obstacle(incomplete(self.pid)));
        }
        let has = |code: &str| details.has(code);
        let mut flags = if vma.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let mut status = magics::VMA_AREA_REGULAR;
        let mut object = None;
        match Backing::of(vma) {
            Backing::Anonymous => {
                flags |= libc::MAP_ANONYMOUS;
                status |= magics::VMA_ANON_PRIVATE;
            }
            Backing::HugePages => {
                flags |= libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
                status |= magics::VMA_ANON_PRIVATE;
            }
            Backing::File if vma.shared => status |= magics::VMA_FILE_SHARED,
            Backing::File => status |= magics::VMA_FILE_PRIVATE,
            Backing::Object(kind) => {
                object = Some(self.objects.admit_mapping(self.pid, vma, kind)?);
                status |= if vma.shared { magics::VMA_ANON_SHARED } else { magics::VMA_FILE_PRIVATE };
            }
            Backing::AioRing => status |= magics::VMA_AREA_AIORING,
            Backing::Kernel => status = special_status(vma),
            Backing::Unsupported(what) => {
                let resource = format!("mapping at {:#x}", vma.start);
                return Err(Error::Obstacle(Obstacle::new(resource, format!("{what} cannot be moved"), "")));
            }
        }
        for (code, flag) in [("gd", libc::MAP_GROWSDOWN), ("nr", libc::MAP_NORESERVE), ("lo", libc::MAP_LOCKED)] {
            if has(code) {
                flags |= flag;
            }
        }
        let advices = [
            ("sr", libc::MADV_SEQUENTIAL),
            ("rr", libc::MADV_RANDOM),
            ("dc", libc::MADV_DONTFORK),
            ("dd", libc::MADV_DONTDUMP),
            ("wf", libc::MADV_WIPEONFORK),
            ("mg", libc::MADV_MERGEABLE),
            ("hg", libc::MADV_HUGEPAGE),
            ("nh", libc::MADV_NOHUGEPAGE),
        ];
        let madv = advices.iter().filter(|(code, _)| has(code)).fold(0u64, |bits, &(_, advice)| bits | 1 << advice);
        Ok(VmaEntry {
            start: vma.start,
            end: vma.end,
            pgoff: vma.offset,
            shmid: u64::from(object.unwrap_or(0)),
            prot: vma.protection as u32,
            flags: flags as u32,
            status,
            fd: -1,
            madv: (madv != 0).then_some(madv),
            fdflags: Some(if vma.shared && has("mw") { libc::O_RDWR } else { libc::O_RDONLY } as u32),
            name: Some(file_name(vma)),
            device: Some(vma.device),
            inode: Some(vma.inode),
            object,
            vm_flags: Some(details.flags),
            kernel_page_size: Some(details.page_size.max(PAGE_SIZE)),
        })
    }
}

fn file_name(vma: &Vma) -> String {
    vma.name_text().into_owned()
}

fn special_status(vma: &Vma) -> u32 {
    if vma.name.starts_with(b"[vdso") {
        magics::VMA_AREA_REGULAR | magics::VMA_AREA_VDSO
    } else if vma.name.starts_with(b"[vvar") {
        magics::VMA_AREA_REGULAR | magics::VMA_AREA_VVAR
    } else {
        magics::VMA_AREA_VSYSCALL
    }
}

/// Reads the marks of an address space (proc_pid_stat(5)) and its auxiliary vector.
fn read_marks(pid: i32) -> Result<MmEntry> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read(&path).map_err(|source| Error::Proc { path: path.into(), source })?;
    let text = String::from_utf8_lossy(&text);
    let fields: Vec<&str> = text.rsplit_once(") ").map_or("", |(_, rest)| rest).split_whitespace().collect();
    // The first field behind the command's name is number 3 of the man page.
    let field = |number: usize| fields.get(number - 3).and_then(|word| word.parse().ok()).unwrap_or(0);
    let path = format!("/proc/{pid}/auxv");
    let auxv = std::fs::read(&path).map_err(|source| Error::Proc { path: path.into(), source })?;
    Ok(MmEntry {
        mm_start_code: field(26),
        mm_end_code: field(27),
        mm_start_stack: field(28),
        mm_start_data: field(45),
        mm_end_data: field(46),
        mm_start_brk: field(47),
        mm_arg_start: field(48),
        mm_arg_end: field(49),
        mm_env_start: field(50),
        mm_env_end: field(51),
        mm_saved_auxv: auxv
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
            .collect(),
        ..MmEntry::default()
    })
}

/// What only the process itself can tell of its address space. Asked inside the freeze, by one batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    program_break: u64,
    thp_disabled: bool,
    mdwe: u32,
    memory_merge: bool,
    /// Bytes locked in memory while the scratch mapping was there.
    locked: u64,
    scratch: u64,
}

impl Marks {
    /// Asks a stopped process.
    ///
    /// # Errors
    /// When it is gone.
    pub fn of(tracee: &mut Tracee) -> Result<Self> {
        const PR_GET_MEMORY_MERGE: i32 = 68;
        let mut batch = Batch::new();
        let brk = batch.call("brk", libc::SYS_brk, &[0u64.into()]);
        let mut ask = |option: i32| batch.attempt("prctl", libc::SYS_prctl, &[option.into()]);
        let [thp, mdwe, merge] = [libc::PR_GET_THP_DISABLE, libc::PR_GET_MDWE, PR_GET_MEMORY_MERGE].map(&mut ask);
        let outcome = tracee.run(batch)?;
        let answer = |call| outcome.result(call).unwrap_or(0);
        let status = godwit_tracee::read_status(tracee.pid())?;
        let scratch = tracee.scratch_range().map_or(0, |(start, end)| end - start);
        Ok(Self {
            program_break: answer(brk),
            thp_disabled: answer(thp) != 0,
            mdwe: answer(mdwe) as u32,
            memory_merge: answer(merge) != 0,
            locked: status.number("VmLck").unwrap_or(0) * 1024,
            scratch,
        })
    }

    /// What mlockall(2) has said of mappings to come, which nothing shows but a mapping that came after: the scratch one.
    fn lock_future(&self, vmas: &[VmaEntry]) -> Option<u32> {
        let locked = || vmas.iter().filter(|vma| vma.flags as i32 & libc::MAP_LOCKED != 0);
        let known: u64 = locked().map(|vma| vma.end - vma.start).sum();
        if self.locked < known + self.scratch || self.scratch == 0 {
            return None;
        }
        let on_fault = known > 0 && locked().all(|vma| vma.vm_flags().split_whitespace().any(|flag| flag == "lf"));
        Some((libc::MCL_FUTURE | if on_fault { libc::MCL_ONFAULT } else { 0 }) as u32)
    }

    /// Writes the answers into a state message.
    pub fn apply(&self, mm: &mut MmEntry) {
        if self.program_break != 0 {
            mm.mm_brk = self.program_break;
        }
        mm.thp_disabled = Some(self.thp_disabled);
        mm.mdwe = Some(self.mdwe);
        mm.memory_merge = Some(self.memory_merge);
        mm.lock_future = self.lock_future(&mm.vmas);
    }
}
