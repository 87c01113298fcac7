//! What the page server itself may do: no more than building processes takes.
//!
//! A process that comes may have every capability that it had at its source, and gets them from this program, which must then have
//! all of them. Where the policy keeps root and capabilities out ([`Policy::admits_root`]) it gives up those that it needs for
//! nothing else. Its threads that serve pages have none in either case. The bounding set stays as it is, because it is handed on to what is
//! built, and set-user-ID programs that a moved process starts are to work as before; unless those are ruled out too.

use crate::policy::Policy;
use godwit_kernel::privileges::{self, Capabilities};

/// The capabilities that building and serving processes takes, by their numbers in capabilities(7).
const NEEDED: [(u32, &str); 21] = [
    (0, "CAP_CHOWN"),               // owners of deleted files
    (1, "CAP_DAC_OVERRIDE"),        // the same files for whoever had them open
    (2, "CAP_DAC_READ_SEARCH"),     // and /proc of other users' processes
    (3, "CAP_FOWNER"),              // modes of deleted files
    (4, "CAP_FSETID"),              // the same
    (5, "CAP_KILL"),                // stubs that are somebody else's by then
    (6, "CAP_SETGID"),              // groups
    (7, "CAP_SETUID"),              // users
    (8, "CAP_SETPCAP"),             // bounding sets, securebits
    (10, "CAP_NET_BIND_SERVICE"),   // low ports
    (12, "CAP_NET_ADMIN"),          // sockets in repair mode, packet filter, addresses, namespaces
    (13, "CAP_NET_RAW"),            // packets that came before and after
    (14, "CAP_IPC_LOCK"),           // locked memory, System V huge pages
    (15, "CAP_IPC_OWNER"),          // System V segments
    (18, "CAP_SYS_CHROOT"),         // root directories
    (19, "CAP_SYS_PTRACE"),         // stubs
    (21, "CAP_SYS_ADMIN"),          // namespaces, pids, seccomp filters
    (23, "CAP_SYS_NICE"),           // scheduling
    (24, "CAP_SYS_RESOURCE"),       // limits
    (25, "CAP_SYS_TIME"),           // clocks of time namespaces
    (40, "CAP_CHECKPOINT_RESTORE"), // pids
];

/// Gives up what is not needed under a policy. To be called while there is one thread.
pub fn to_what_is_needed(policy: &Policy) {
    if policy.admits_root() {
        return;
    }
    let needed = NEEDED.iter().fold(0, |set, (number, _)| set | 1u64 << number);
    let confined = privileges::capabilities().and_then(|own| {
        if policy.no_new_privs {
            privileges::bound_capabilities(needed)?;
        }
        privileges::set_capabilities(Capabilities {
            effective: own.effective & needed,
            permitted: own.permitted & needed,
            inheritable: 0,
        })
    });
    if let Err(errno) = confined {
        tracing::warn!(%errno, "the page server keeps capabilities that it does not need");
    }
}
