//! What the calling thread may do: capability sets, no_new_privs, and for whom it opens files (capabilities(7), setfsuid(2)).
//!
//! The kernel keeps all of this per thread. What libc offers for whole processes is not used: threads are to differ.

use crate::check;
use nix::errno::Errno;

/// `_LINUX_CAPABILITY_VERSION_3`: two 32-bit words a set.
const VERSION: u32 = 0x2008_0522;
/// The highest number of a capability that fits into a set.
const LAST: u32 = 63;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Words {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const _: () = assert!(size_of::<Header>() == 8 && size_of::<[Words; 2]>() == 24);

/// Capability sets of a thread, a bit for each capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// What counts when the kernel checks.
    pub effective: u64,
    /// What can be made effective.
    pub permitted: u64,
    /// What may survive execve(2).
    pub inheritable: u64,
}

/// Reads the sets of the calling thread (capget(2)).
pub fn capabilities() -> Result<Capabilities, Errno> {
    let mut header = Header { version: VERSION, pid: 0 };
    let mut words = [Words::default(); 2];
    // SAFETY: the header is valid, and version 3 has the kernel write two elements to where there are two.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, words.as_mut_ptr()) })?;
    let set = |part: fn(&Words) -> u32| u64::from(part(&words[0])) | u64::from(part(&words[1])) << 32;
    Ok(Capabilities {
        effective: set(|words| words.effective),
        permitted: set(|words| words.permitted),
        inheritable: set(|words| words.inheritable),
    })
}

/// Sets those of the calling thread (capset(2)); ambient capabilities that are not both permitted and inheritable go.
///
/// # Errors
/// `EPERM` when a set gains what the thread does not have.
pub fn set_capabilities(sets: Capabilities) -> Result<(), Errno> {
    let mut header = Header { version: VERSION, pid: 0 };
    let word = |shift: u32| Words {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let words = [word(0), word(32)];
    // SAFETY: the header is valid, and version 3 has the kernel read two elements from where there are two.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, words.as_ptr()) }).map(drop)
}

/// Leaves the calling thread's bounding set no more than `keep` (`PR_CAPBSET_DROP`): neither it nor what it starts gains anything else by
/// execve(2).
///
/// # Errors
/// `EPERM` without CAP_SETPCAP, where there is anything to drop.
pub fn bound_capabilities(keep: u64) -> Result<(), Errno> {
    for capability in (0..=LAST).filter(|capability| keep >> capability & 1 == 0) {
        // SAFETY: takes integers.
        match check(unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(capability), 0, 0, 0) }.into()) {
            // Past the last one that this kernel knows.
            Err(Errno::EINVAL) => break,
            Ok(0) => {}
            _ => {
                let number = libc::c_ulong::from(capability);
                // SAFETY: takes integers.
                check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) }.into())?;
            }
        }
    }
    Ok(())
}

/// Has execve(2) never grant anything any more to the calling thread and what it starts (`PR_SET_NO_NEW_PRIVS`).
pub fn gain_nothing() -> Result<(), Errno> {
    // SAFETY: takes integers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into()).map(drop)
}

/// Gives up all capabilities, for the calling thread and what it starts.
///
/// # Errors
/// None that is known, as [`bound_capabilities`] is asked for nothing that the thread has not.
pub fn give_up_all() -> Result<(), Errno> {
    const SETPCAP: u64 = 1 << 8;
    // Without CAP_SETPCAP the bounding set stays; it is good for programs that are started only.
    if capabilities()?.effective & SETPCAP != 0 {
        bound_capabilities(0)?;
    }
    set_capabilities(Capabilities::default())
}

/// Has the calling thread open files as this user, in these groups, with no capability that overrides permissions (setfsuid(2)): for
/// a thread that does nothing else and ends.
///
/// # Errors
/// `EPERM` without CAP_SETUID and CAP_SETGID.
pub fn act_as(uid: u32, gid: u32, groups: &[u32]) -> Result<(), Errno> {
    // SAFETY: the kernel reads as many numbers as there are. libc's function would change all threads.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    let set = |call: libc::c_long, id: u32| -> Result<(), Errno> {
        // SAFETY: takes an integer, and returns the previous id whether it succeeds or not.
        unsafe { libc::syscall(call, id) };
        // SAFETY: an id that cannot be set changes nothing and returns the present one.
        let now = unsafe { libc::syscall(call, u32::MAX) };
        if now as u32 == id { Ok(()) } else { Err(Errno::EPERM) }
    };
    set(libc::SYS_setfsgid, gid)?;
    set(libc::SYS_setfsuid, uid)?;
    // For root these stay.
    if uid == 0 {
        return Ok(());
    }
    let now = capabilities()?;
    set_capabilities(Capabilities { effective: 0, ..now })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(work).join().unwrap()
    }

    fn bounding() -> String {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        status.lines().find(|line| line.starts_with("CapBnd")).unwrap().to_owned()
    }

    #[test]
    fn a_thread_gives_up_and_others_keep() {
        let before = (capabilities().unwrap(), bounding());
        let after = in_a_thread(|| {
            bound_capabilities(0).unwrap();
            set_capabilities(Capabilities::default()).unwrap();
            let all = Capabilities { permitted: u64::MAX, ..Capabilities::default() };
            assert_eq!(set_capabilities(all), Err(Errno::EPERM));
            (capabilities().unwrap(), bounding())
        });
        assert_eq!(after.0, Capabilities::default());
        assert!(after.1.ends_with("0000000000000000"), "{}", after.1);
        assert_eq!((capabilities().unwrap(), bounding()), before);
    }

    #[test]
    fn files_are_opened_as_somebody_else() {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("godwit-private-{}", std::process::id()));
        std::fs::write(&path, "x").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let other = path.clone();
        let opened = in_a_thread(move || {
            act_as(12345, 12345, &[]).unwrap();
            std::fs::File::open(other).map(drop)
        });
        assert_eq!(opened.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
        std::fs::File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
