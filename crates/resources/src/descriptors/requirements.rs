//! Checking at the destination, before the source is touched, that files and addresses are there to be had.

use super::{netlink_socket, tun, vsock, whose};
use crate::{LEAVE_BEHIND, Obstacle};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::set_socket_option;
use godwit_kernel::socket::socket as make_socket;
use godwit_proto::wire::FileFacts;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, UnixAddr, bind, socket};
use nix::sys::stat::{FileStat, lstat};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

const IN_USE: &str = "it is in use at the destination";

/// Checks that files are here as the source has them: type, device number, and size of those that are only read.
#[must_use]
pub fn check_files(files: &[FileFacts]) -> Vec<Obstacle> {
    files.iter().filter_map(check_file).collect()
}

fn type_name(mode: u32) -> &'static str {
    match mode & libc::S_IFMT {
        libc::S_IFREG => "a regular file",
        libc::S_IFDIR => "a directory",
        libc::S_IFCHR => "a character device",
        libc::S_IFBLK => "a block device",
        libc::S_IFIFO => "a named pipe",
        libc::S_IFSOCK => "a socket",
        libc::S_IFLNK => "a symbolic link",
        _ => "something else",
    }
}

fn check_file(file: &FileFacts) -> Option<Obstacle> {
    let obstacle = |text: String, remedy: &str| Some(Obstacle::new(&file.path, text, remedy));
    let found = match lstat(file.path.as_str()) {
        Ok(found) => found,
        Err(Errno::ENOENT | Errno::ENOTDIR) => {
            return obstacle("it does not exist at the destination".into(), "copy it there");
        }
        Err(errno) => return obstacle(format!("it cannot be looked at at the destination: {errno}"), ""),
    };
    let wanted = if file.directory { libc::S_IFDIR } else { file.mode & libc::S_IFMT };
    if wanted != 0 && found.st_mode & libc::S_IFMT != wanted {
        return obstacle(
            format!("it is {} at the source and {} here", type_name(wanted), type_name(found.st_mode)),
            "",
        );
    }
    differing(file, &found).and_then(|text| obstacle(text, "copy it there"))
}

fn differing(file: &FileFacts, found: &FileStat) -> Option<String> {
    let kind = found.st_mode & libc::S_IFMT;
    if kind == libc::S_IFCHR && file.rdev != 0 && file.rdev != found.st_rdev {
        return Some("it is another device at the destination".to_owned());
    }
    let must_match = kind == libc::S_IFREG && (file.mapped || !file.writable);
    let size = found.st_size as u64;
    (must_match && size != file.size).then(|| format!("it has {} bytes at the source and {size} here", file.size))
}

/// Checks that addresses (`tcp:127.0.0.1:80`, `tcp+shared:127.0.0.1:80`, `mptcp:127.0.0.1:80`, `udp:127.0.0.1:53`, `udp+shared:0.0.0.0:5353`, `unix:/run/x`, `unix:@abstract`,
/// `netlink:0:4711`, `vsock:4294967295:80`) can be bound here, and that those of connections (`connection:10.0.0.1:80`) and raw
/// sockets (`address:10.0.0.1:0`) are here, or will be as they are `moved`. Interfaces (`interface:eth0`,
/// `tun:tun0:tap`) must be here.
#[must_use]
pub fn check_addresses(addresses: &[String], moved: &[IpAddr]) -> Vec<Obstacle> {
    let check = |address: &String| {
        if let Some(interface) = address.strip_prefix("tun:") {
            return tun::check(interface);
        }
        let text = match address.split_once(':') {
            Some((kind @ ("tcp" | "tcp+shared" | "mptcp" | "mptcp+shared"), address)) => {
                let sharing = if kind.ends_with("+shared") { libc::SO_REUSEPORT } else { libc::SO_REUSEADDR };
                let check = |tcp| check_tcp(tcp, sharing, moved);
                let checked = address.parse().map_or_else(|_| Some("cannot be understood".to_owned()), check);
                checked.or_else(|| kind.starts_with("mptcp").then(lacks_mptcp).flatten())
            }
            Some(("connection", address)) => address
                .parse()
                .map_or_else(|_| Some("cannot be understood".to_owned()), |local| check_connection(local, moved)),
            Some((kind @ ("udp" | "udp+shared" | "udplite" | "udplite+shared"), address)) => {
                address.parse().map_or_else(
                    |_| Some("cannot be understood".to_owned()),
                    |address| check_datagram(kind, address, moved),
                )
            }
            Some(("address" | "address+shared", address)) => address
                .parse()
                .map_or_else(|_| Some("cannot be understood".to_owned()), |local| check_connection(local, moved)),
            Some(("interface", name)) => match nix::net::if_::if_nametoindex(name) {
                Ok(_) => None,
                Err(_) => Some("the destination has no interface of this name".to_owned()),
            },
            Some((kind @ ("netlink" | "vsock"), numbers)) => check_numbers(kind, numbers),
            Some(("unix", name)) => match name.strip_prefix('@') {
                Some(name) => check_abstract(name),
                None => check_unix(Path::new(name)),
            },
            _ => Some("cannot be understood".to_owned()),
        };
        text.map(|text| name_obstacle(address, text))
    };
    addresses.iter().filter_map(check).collect()
}

fn name_obstacle(address: &str, text: String) -> Obstacle {
    let lacks_address = text.contains("does not have this address");
    match address.split_once(':') {
        Some(("connection", local)) => Obstacle::new(
            format!("connection of {local}"),
            text,
            format!(
                "give --move-addr to have the address move along, or --map-addr to change it into one that the destination has, \
                 or {LEAVE_BEHIND}"
            ),
        ),
        Some(("interface", name)) => {
            Obstacle::new(format!("interface {name}"), text, "make one, or name one so: sockets depend on it")
        }
        Some(("netlink" | "vsock", _)) => Obstacle::new(address, text, ""),
        Some((kind, _)) if lacks_address => {
            let what = if kind.contains("tcp") { "listening" } else { "socket" };
            let remedy = "give --move-addr to have the address move along, or --map-addr to change it into one that the destination has";
            Obstacle::new(format!("{what} address {address}"), text, remedy)
        }
        _ => {
            let remedy =
                if text.starts_with(IN_USE) { "end what has it there, or have the process use another" } else { "" };
            Obstacle::new(format!("listening address {address}"), text, remedy)
        }
    }
}

fn check_datagram(kind: &str, address: SocketAddr, moved: &[IpAddr]) -> Option<String> {
    let (kind, shared) = kind.split_once('+').map_or((kind, false), |(kind, _)| (kind, true));
    let protocol = if kind == "udplite" { libc::IPPROTO_UDPLITE } else { libc::IPPROTO_UDP };
    // A group is no address of a host.
    let on_its_way = moved.contains(&address.ip().to_canonical());
    let attempt = || {
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let probe = make_socket(family, libc::SOCK_DGRAM, protocol)?;
        let set = |level, name| set_socket_option(probe.as_fd(), level, name, &1i32.to_ne_bytes());
        if shared {
            set(libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
            set(libc::SOL_SOCKET, libc::SO_REUSEPORT)?;
        }
        if on_its_way {
            set(libc::IPPROTO_IP, libc::IP_FREEBIND)?;
        }
        if address.is_ipv6() {
            set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)?;
        }
        bind(probe.as_raw_fd(), &SockaddrStorage::from(address))
    };
    let tables: &[&str] = if kind == "udplite" { &["udplite", "udplite6"] } else { &["udp", "udp6"] };
    attempt().err().map(|errno| explain(errno, || whose::by_port(tables, address.port())))
}

fn check_numbers(kind: &str, numbers: &str) -> Option<String> {
    let parsed = numbers.split_once(':').and_then(|(first, second)| Some((first.parse().ok()?, second.parse().ok()?)));
    let Some((first, port)): Option<(u32, u32)> = parsed else { return Some("cannot be understood".to_owned()) };
    let tried = match (kind, i32::try_from(first)) {
        ("netlink", Ok(protocol)) => netlink_socket::try_port(protocol, port),
        ("netlink", Err(_)) => Err(Errno::EPROTONOSUPPORT),
        _ => vsock::try_port(first, port),
    };
    tried.err().map(|errno| explain(errno, String::new))
}

/// Says why an address cannot be bound; `by` names who has it.
fn explain(errno: Errno, by: impl FnOnce() -> String) -> String {
    match errno {
        Errno::EADDRINUSE => IN_USE.to_owned() + &by(),
        Errno::EADDRNOTAVAIL => "the destination does not have this address".to_owned(),
        errno => format!("it cannot be bound at the destination: {errno}"),
    }
}

fn check_connection(local: SocketAddr, moved: &[IpAddr]) -> Option<String> {
    let address = local.ip().to_canonical();
    if moved.contains(&address) {
        return None;
    }
    match godwit_network::has(address) {
        Ok(true) => None,
        Ok(false) => Some("the destination does not have this address".to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

/// `sharing` is the option that lets the port be shared.
fn check_tcp(address: SocketAddr, sharing: i32, moved: &[IpAddr]) -> Option<String> {
    // The number of an interface means another one here; its name is looked up when the socket is made.
    if matches!(address, SocketAddr::V6(address) if address.scope_id() != 0) {
        return None;
    }
    let attempt = || {
        let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let probe = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        let one = 1i32.to_ne_bytes();
        set_socket_option(probe.as_fd(), libc::SOL_SOCKET, sharing, &one)?;
        if moved.contains(&address.ip().to_canonical()) {
            set_socket_option(probe.as_fd(), libc::IPPROTO_IP, libc::IP_FREEBIND, &one)?;
        }
        // N.B. not for an IPv4 address in the guise of an IPv6 one.
        if address.ip().to_canonical().is_ipv6() {
            set_socket_option(probe.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &one)?;
        }
        bind(probe.as_raw_fd(), &SockaddrStorage::from(address))
    };
    attempt().err().map(|errno| explain(errno, || whose::by_port(&["tcp", "tcp6"], address.port())))
}

/// Says why no MPTCP socket can be made here: the kernel has none, or its administrator wants none.
fn lacks_mptcp() -> Option<String> {
    let made = make_socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP);
    made.err().map(|errno| format!("the destination makes no MPTCP sockets (sysctl net.mptcp.enabled): {errno}"))
}

fn check_abstract(name: &str) -> Option<String> {
    let attempt = || {
        let probe = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(probe.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)
    };
    attempt().err().map(|errno| explain(errno, || whose::by_name(&format!("@{name}"))))
}

/// A socket file that nobody in this network namespace is bound to is a leftover and may be replaced. Connecting to it would
/// be the surer test, but would leave a connection where somebody does listen.
fn check_unix(path: &Path) -> Option<String> {
    match lstat(path) {
        Err(Errno::ENOENT) => match path.parent().map(lstat) {
            Some(Ok(parent)) if parent.st_mode & libc::S_IFMT == libc::S_IFDIR => None,
            _ => Some("its directory does not exist at the destination".to_owned()),
        },
        Err(errno) => Some(explain(errno, String::new)),
        Ok(found) if found.st_mode & libc::S_IFMT != libc::S_IFSOCK => {
            Some(format!("its path is {} at the destination", type_name(found.st_mode)))
        }
        Ok(_) => {
            let sockets = std::fs::read("/proc/self/net/unix").unwrap_or_default();
            let text = String::from_utf8_lossy(&sockets);
            let bound = text.lines().any(|line| bound_path(line).is_some_and(|name| Path::new(name) == path));
            bound.then(|| explain(Errno::EADDRINUSE, || whose::by_name(&path.to_string_lossy())))
        }
    }
}

/// The name at the end of a line of /proc/net/unix, behind seven columns.
pub(super) fn bound_path(line: &str) -> Option<&str> {
    let mut rest = line;
    for _ in 0..7 {
        rest = rest.trim_start().split_once(' ')?.1;
    }
    Some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_sockets_are_found() {
        let line = "0000000000000000: 00000002 00000000 00010000 0001 01 17166 /run/a b";
        assert_eq!(bound_path(line), Some("/run/a b"));
        assert_eq!(bound_path("0000000000000000: 00000003 00000000 00000000 0001 03 17166"), None);
    }

    #[test]
    fn wrong_files_and_addresses_are_named() {
        let file = |path: &str, mode, size| FileFacts { path: path.into(), mode, size, ..FileFacts::default() };
        let found = check_files(&[
            file("/dev/null", libc::S_IFCHR, 0),
            file("/dev/null", libc::S_IFREG, 0),
            file("/nowhere/at/all", libc::S_IFREG, 0),
            file("/proc/self/maps", libc::S_IFREG, 1),
        ]);
        let named: Vec<&str> = found.iter().map(|obstacle| obstacle.resource.as_str()).collect();
        assert_eq!(named, ["/dev/null", "/nowhere/at/all", "/proc/self/maps"]);

        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", taken.local_addr().unwrap());
        let mut addresses =
            vec![address.clone(), "tcp:192.0.2.1:9".into(), "unix:/nowhere/x".into(), "tcp:127.0.0.1:0".into()];
        addresses.extend(["tcp:[::ffff:127.0.0.1]:0".into(), "tcp+shared:127.0.0.1:0".into(), "interface:lo".into()]);
        let found = check_addresses(&addresses, &[]);
        assert_eq!(found.len(), 3);
        let in_use = format!("in use at the destination by process {}, ", std::process::id());
        assert!(found[0].text.contains(&in_use) && found[1].text.contains("does not have"), "{found:?}");

        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let good =
            ["udp:127.0.0.1:0", "interface:lo", "address:127.0.0.1:0", "udp+shared:0.0.0.0:0", "udp:239.1.2.3:0"];
        assert_eq!(check_addresses(&good.map(str::to_owned), &[]), []);
        let bad = [
            format!("udp:127.0.0.1:{port}"),
            "udp:192.0.2.1:9".into(),
            "udp:x".into(),
            "address:192.0.2.1:0".into(),
            "interface:nothing0".into(),
            "netlink:0".into(),
            "netlink:4294967295:9".into(),
        ];
        let found = check_addresses(&bad, &[]);
        assert_eq!(found.len(), bad.len(), "{found:?}");
        assert!(found[1].remedy.contains("--move-addr") && found[4].resource == "interface nothing0", "{found:?}");
        assert_eq!(check_addresses(&[bad[1].clone()], &["192.0.2.1".parse().unwrap()]), []);
    }
}
