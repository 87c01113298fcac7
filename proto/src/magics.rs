//! Constants that readers of checkpoints expect beside the messages: the second word of each image file, and the
//! values of fields that are plain numbers in the schema.

/// First word of every image but the inventory and service files.
pub const IMG_COMMON_MAGIC: u32 = 0x5456_4319;
/// First word of service files, such as statistics.
pub const IMG_SERVICE_MAGIC: u32 = 0x5510_5940;
/// `inventory.img`: what the checkpoint as a whole is.
pub const INVENTORY_MAGIC: u32 = 0x5831_3116;
/// `pstree.img`: the process tree.
pub const PSTREE_MAGIC: u32 = 0x5027_3030;
/// `fdinfo-ID.img`: a descriptor table.
pub const FDINFO_MAGIC: u32 = 0x5621_3732;
/// `files.img`: open file descriptions.
pub const FILES_MAGIC: u32 = 0x5630_3138;
/// `pagemap-ID.img` and `pagemap-shmem-ID.img`: which pages have content.
pub const PAGEMAP_MAGIC: u32 = 0x5608_4025;
/// `core-TID.img`: one thread.
pub const CORE_MAGIC: u32 = 0x5505_3847;
/// `ids-PID.img`: shared kernel objects.
pub const IDS_MAGIC: u32 = 0x5443_2030;
/// `mm-PID.img`: an address space.
pub const MM_MAGIC: u32 = 0x5749_2820;
/// `fs-PID.img`: working and root directory.
pub const FS_MAGIC: u32 = 0x5140_3912;
/// `pipes-data.img`: bytes inside pipes.
pub const PIPES_DATA_MAGIC: u32 = 0x5645_3709;
/// `fifo-data.img`: bytes inside named pipes.
pub const FIFO_DATA_MAGIC: u32 = 0x5933_3054;
/// `sk-queues.img`: messages inside sockets.
pub const SK_QUEUES_MAGIC: u32 = 0x5626_4026;
/// `reg-files.img`: regular files, in older checkpoints.
pub const REG_FILES_MAGIC: u32 = 0x5036_3636;
/// `remap-fpath.img`: what stands in for paths that are gone.
pub const REMAP_FPATH_MAGIC: u32 = 0x5913_3954;
/// `ghost-file-ID.img`: the content of a file without a path.
pub const GHOST_FILE_MAGIC: u32 = 0x5258_3605;
/// `memfd.img`: anonymous files in memory.
pub const MEMFD_INODE_MAGIC: u32 = 0x4845_3499;
/// `ipcns-shm-ID.img`: System V shared memory.
pub const IPCNS_SHM_MAGIC: u32 = 0x4628_3044;
/// `seccomp.img`: filter programs.
pub const SECCOMP_MAGIC: u32 = 0x6441_3049;
/// `timens-ID.img`: clocks of a time namespace.
pub const TIMENS_MAGIC: u32 = 0x4311_4433;
/// `stats-dump` and `stats-restore`: durations and counts.
pub const STATS_MAGIC: u32 = 0x5709_3306;

/// `task_state` of a process that runs.
pub const TASK_ALIVE: u32 = 1;
/// `task_state` of a process that has ended.
pub const TASK_DEAD: u32 = 2;
/// `task_state` of a process stopped by a signal; `stop_signo` says which. signal(7)
pub const TASK_STOPPED: u32 = 3;
/// `task_state` of a process that has ended and waits for its parent. wait(2)
pub const TASK_ZOMBIE: u32 = 6;

/// The pages are in the parent checkpoint.
pub const PE_PARENT: u32 = 1 << 0;
/// The pages may be brought after the process runs. userfaultfd(2)
pub const PE_LAZY: u32 = 1 << 1;
/// The pages are in this checkpoint.
pub const PE_PRESENT: u32 = 1 << 2;

/// Bit of `vma_entry.status`. Has content that moves.
pub const VMA_AREA_REGULAR: u32 = 1 << 0;
/// Bit of `vma_entry.status`. Grows downwards. mmap(2), MAP_GROWSDOWN
pub const VMA_AREA_STACK: u32 = 1 << 1;
/// Bit of `vma_entry.status`. The fixed vsyscall page of the kernel.
pub const VMA_AREA_VSYSCALL: u32 = 1 << 2;
/// Bit of `vma_entry.status`. Code of the kernel. vdso(7)
pub const VMA_AREA_VDSO: u32 = 1 << 3;
/// Bit of `vma_entry.status`. Grows by brk(2).
pub const VMA_AREA_HEAP: u32 = 1 << 5;
/// Bit of `vma_entry.status`. A private mapping of a file.
pub const VMA_FILE_PRIVATE: u32 = 1 << 6;
/// Bit of `vma_entry.status`. A shared mapping of a file.
pub const VMA_FILE_SHARED: u32 = 1 << 7;
/// Bit of `vma_entry.status`. A shared mapping without a file.
pub const VMA_ANON_SHARED: u32 = 1 << 8;
/// Bit of `vma_entry.status`. A private mapping without a file.
pub const VMA_ANON_PRIVATE: u32 = 1 << 9;
/// Bit of `vma_entry.status`. A System V segment. shmat(2)
pub const VMA_AREA_SYSVIPC: u32 = 1 << 10;
/// Bit of `vma_entry.status`. The ring of a packet socket. packet(7)
pub const VMA_AREA_SOCKET: u32 = 1 << 11;
/// Bit of `vma_entry.status`. Data of the kernel beside the vdso.
pub const VMA_AREA_VVAR: u32 = 1 << 12;
/// Bit of `vma_entry.status`. A ring of asynchronous I/O. io_setup(2)
pub const VMA_AREA_AIORING: u32 = 1 << 13;
/// Bit of `vma_entry.status`. A mapping of an anonymous file. memfd_create(2)
pub const VMA_AREA_MEMFD: u32 = 1 << 14;
/// Bit of `vma_entry.status`. A shadow stack.
pub const VMA_AREA_SHSTK: u32 = 1 << 15;
/// Bit of `vma_entry.status`. Not a mapping: guard pages inside one. madvise(2), MADV_GUARD_INSTALL
pub const VMA_AREA_GUARD: u32 = 1 << 16;
/// Bit of `vma_entry.status`. Belongs to user probes of the kernel.
pub const VMA_AREA_UPROBES: u32 = 1 << 17;
