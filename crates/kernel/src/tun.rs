//! Interfaces whose other end is a file: the ioctls of /dev/net/tun (linux/if_tun.h), and what an interface leaves to that file
//! (ethtool(8)).

use crate::check;
use libc::{c_char, c_int, ifreq};
use nix::errno::Errno;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Packets without a link-layer header.
pub const IFF_TUN: u16 = 0x0001;
/// Ethernet frames.
pub const IFF_TAP: u16 = 0x0002;
/// There are several files for one interface.
pub const IFF_MULTI_QUEUE: u16 = 0x0100;
/// The file is attached and gets nothing.
pub const IFF_DETACH_QUEUE: u16 = 0x0400;
/// The interface stays without a file.
pub const IFF_PERSIST: u16 = 0x0800;
/// Packets come without four bytes that say of which protocol they are. N.B. of a file that has no filter `TUNGETIFF` says this whether
/// it is so or not: the number means two things.
pub const IFF_NO_PI: u16 = 0x1000;
/// Packets come with a header that says what is left to do of them.
pub const IFF_VNET_HDR: u16 = 0x4000;

/// A number that a file of /dev/net/tun has for its interface, and the requests that read and set it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// Bytes that may wait to be taken in.
    SendBuffer,
    /// Bytes of the header that says what is left to do of a packet (`IFF_VNET_HDR`).
    HeaderSize,
    /// Whether that header is little-endian (Linux 4.1).
    LittleEndian,
    /// Whether it is big-endian (Linux 4.1, where the kernel was built so).
    BigEndian,
}

impl Number {
    const fn requests(self) -> (u64, u64) {
        match self {
            Self::SendBuffer => (0x8004_54d3, 0x4004_54d4),
            Self::HeaderSize => (0x8004_54d7, 0x4004_54d8),
            Self::LittleEndian => (0x8004_54dd, 0x4004_54dc),
            Self::BigEndian => (0x8004_54df, 0x4004_54de),
        }
    }

    /// Reads it.
    ///
    /// # Errors
    /// `EBADFD` without an interface, `EINVAL` where the kernel does not have it.
    pub fn of(self, file: BorrowedFd<'_>) -> Result<i32, Errno> {
        let mut value: c_int = 0;
        // SAFETY: the request writes one int.
        check(unsafe { libc::ioctl(file.as_raw_fd(), self.requests().0, &raw mut value) }.into())?;
        Ok(value)
    }

    /// Sets it.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn set(self, file: BorrowedFd<'_>, value: i32) -> Result<(), Errno> {
        // SAFETY: the request reads one int.
        check(unsafe { libc::ioctl(file.as_raw_fd(), self.requests().1, &raw const value) }.into()).map(drop)
    }
}

/// What a file is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Name of the interface.
    pub name: String,
    /// `IFF_*`.
    pub flags: u16,
}

/// Reads which interface a file is attached to (`TUNGETIFF`); `None` when it is attached to none yet.
///
/// # Errors
/// `ENOTTY` for what is no file of /dev/net/tun.
pub fn attached(file: BorrowedFd<'_>) -> Result<Option<Attached>, Errno> {
    const TUNGETIFF: u64 = 0x8004_54d2;
    let mut request = empty();
    // SAFETY: the request writes a whole ifreq, whatever the size in its number says.
    match check(unsafe { libc::ioctl(file.as_raw_fd(), TUNGETIFF, &raw mut request) }.into()) {
        Err(Errno::EBADFD) => return Ok(None),
        done => done?,
    };
    // SAFETY: the kernel has filled in the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let name = request.ifr_name.iter().take_while(|&&byte| byte != 0).map(|&byte| byte as u8).collect();
    let name = String::from_utf8(name).map_err(|_| Errno::EILSEQ)?;
    Ok(Some(Attached { name, flags: flags as u16 }))
}

/// Number of instructions in the filter of a tap interface (`TUNGETFILTER`), which are kept where nobody can read them.
///
/// # Errors
/// `EINVAL` for an interface of another type.
pub fn filter_length(file: BorrowedFd<'_>) -> Result<u16, Errno> {
    const TUNGETFILTER: u64 = 0x8010_54db;
    let mut program = libc::sock_fprog { len: 0, filter: std::ptr::null_mut() };
    // SAFETY: the request writes one sock_fprog; its pointer, into another process, is not followed.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNGETFILTER, &raw mut program) }.into())?;
    Ok(program.len)
}

/// Attaches a file to an interface, which is made if it does not exist (`TUNSETIFF`).
///
/// # Errors
/// `EBUSY` when another file is attached to it, `EINVAL` when it is of another type, or the name is none.
pub fn attach(file: BorrowedFd<'_>, name: &str, flags: u16) -> Result<(), Errno> {
    const TUNSETIFF: u64 = 0x4004_54ca;
    let mut request = named(name)?;
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: the request reads and writes a whole ifreq.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) }.into()).map(drop)
}

/// Chooses the number of the interface that attaching makes (`TUNSETIFINDEX`, Linux 3.8).
///
/// # Errors
/// `EINVAL` when the file is attached.
pub fn choose_index(file: BorrowedFd<'_>, index: u32) -> Result<(), Errno> {
    const TUNSETIFINDEX: u64 = 0x4004_54da;
    // SAFETY: the request reads one unsigned int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFINDEX, &raw const index) }.into()).map(drop)
}

/// Something that an attached file says of its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// It stays without a file (1), or does not (0).
    Persistent,
    /// Id of the user who may attach.
    Owner,
    /// Id of the group that may.
    Group,
    /// `TUN_F_*`: what the interface leaves to who reads from the file.
    Offloads,
}

/// Says it (`TUNSETPERSIST`, `TUNSETOWNER`, `TUNSETGROUP`, `TUNSETOFFLOAD`).
///
/// # Errors
/// `EBADFD` without an interface, `EINVAL` for what the kernel does not have.
pub fn tell(file: BorrowedFd<'_>, what: Word, value: u32) -> Result<(), Errno> {
    let request = match what {
        Word::Persistent => 0x4004_54cb,
        Word::Owner => 0x4004_54cc,
        Word::Group => 0x4004_54ce,
        Word::Offloads => 0x4004_54d0,
    };
    // SAFETY: the argument is the number itself.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, u64::from(value)) }.into()).map(drop)
}

/// Has an attached file get nothing any more (`TUNSETQUEUE`).
///
/// # Errors
/// `EINVAL` where there are not several files for the interface.
pub fn switch_off(file: BorrowedFd<'_>) -> Result<(), Errno> {
    const TUNSETQUEUE: u64 = 0x4004_54d9;
    let mut request = empty();
    request.ifr_ifru.ifru_flags = IFF_DETACH_QUEUE as i16;
    // SAFETY: the request reads a whole ifreq.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETQUEUE, &raw mut request) }.into()).map(drop)
}

/// Opens the network namespace that the interface of a file is in (`TUNGETDEVNETNS`, Linux 5.2).
///
/// # Errors
/// `EBADFD` without an interface, `EINVAL` from older kernels.
pub fn network_namespace(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    const TUNGETDEVNETNS: u64 = 0x54e3;
    // SAFETY: the request takes no argument.
    let namespace = check(unsafe { libc::ioctl(file.as_raw_fd(), TUNGETDEVNETNS) }.into())?;
    // SAFETY: the kernel has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(namespace as i32) })
}

/// What is in force of that which an interface can leave to others, and what `TUN_F_*` call it. Nothing reads what was set.
const OFFLOADS: &[(&CStr, u32)] = &[
    (c"tx-checksum-ip-generic", 0x01),
    (c"tx-tcp-segmentation", 0x02),
    (c"tx-tcp6-segmentation", 0x04),
    (c"tx-tcp-ecn-segmentation", 0x08),
    (c"tx-udp-segmentation", 0x20 | 0x40),
];

/// Reads what the interface called `name` leaves to who reads from its file, as [`Word::Offloads`] has it. `socket` is any socket of
/// its network namespace.
///
/// # Errors
/// `ENODEV` without such an interface.
pub fn offloads(socket: BorrowedFd<'_>, name: &str) -> Result<u32, Errno> {
    const ETHTOOL_GSTRINGS: u32 = 0x1b;
    const ETHTOOL_GSSET_INFO: u32 = 0x37;
    const ETHTOOL_GFEATURES: u32 = 0x3a;
    const OF_FEATURES: u32 = 4;
    const NAME: usize = 32;
    const MOST: usize = 1024;
    // Command, reserved, mask of sets (64 bits), then the length of each.
    let mut sizes = [ETHTOOL_GSSET_INFO, 0, 1 << OF_FEATURES, 0, 0];
    ask(socket, name, &mut sizes)?;
    let count = (sizes[4] as usize).min(MOST);
    let mut names = vec![0; 3 + count * NAME / 4];
    names[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, OF_FEATURES, count as u32]);
    ask(socket, name, &mut names)?;
    let names: Vec<u8> = names[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    // For every 32 features: which there are, were asked for, are in force, never change.
    let blocks = count.div_ceil(32);
    let mut features = vec![0; 2 + blocks * 4];
    features[..2].copy_from_slice(&[ETHTOOL_GFEATURES, blocks as u32]);
    ask(socket, name, &mut features)?;
    let is_active = |at: usize| features[2 + at / 32 * 4 + 2] >> (at % 32) & 1 != 0;
    let active = names.chunks_exact(NAME).enumerate().filter(|&(at, _)| is_active(at)).map(|(_, name)| name);
    let of_one = |name: &[u8]| {
        let name = CStr::from_bytes_until_nul(name).ok()?;
        OFFLOADS.iter().find(|(known, _)| *known == name).map(|(_, flags)| flags)
    };
    Ok(active.filter_map(of_one).fold(0, |all, flags| all | flags))
}

/// Makes a request of ethtool whose answer is as long as the request is.
fn ask(socket: BorrowedFd<'_>, name: &str, words: &mut [u32]) -> Result<(), Errno> {
    const SIOCETHTOOL: u64 = 0x8946;
    let mut request = named(name)?;
    request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
    // SAFETY: each of the requests above says how much it has room for, and the kernel writes no more.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) }.into()).map(drop)
}

fn empty() -> ifreq {
    // SAFETY: an ifreq of zeros is a valid value.
    unsafe { std::mem::zeroed() }
}

/// A request about an interface. A name with a `%` would be a pattern.
fn named(name: &str) -> Result<ifreq, Errno> {
    let mut request = empty();
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains(['%', '/', '\0']) {
        return Err(Errno::EINVAL);
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as c_char;
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn names_are_checked_and_other_files_refused() {
        for name in ["", "tun%d", "a/b", "a-name-that-is-too-long"] {
            assert_eq!(named(name).err(), Some(Errno::EINVAL), "{name}");
        }
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(attached(null.as_fd()), Err(Errno::ENOTTY));
        assert_eq!(Number::SendBuffer.of(null.as_fd()), Err(Errno::ENOTTY));
    }

    #[test]
    fn an_interface_tells_what_it_leaves_to_others() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        // That of the loopback device sums up nothing itself.
        assert_ne!(offloads(socket.as_fd(), "lo").unwrap() & 1, 0);
        assert_eq!(offloads(socket.as_fd(), "nothing0"), Err(Errno::ENODEV));
    }
}
