//! Socket options that name an interface by its number, which is another one on another host.

use super::multicast::{address_of, bytes_of};
use super::table::Entry;
use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::descriptors::{set_socket_option, socket_option};
use godwit_proto::image::InterfaceOption;
use nix::net::if_::{if_indextoname, if_nametoindex};
use std::os::fd::{AsFd, BorrowedFd};

/// How an option says which interface is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Number,
    /// The same in network order.
    BigEndian,
    /// An address of it. One that was named by its number alone cannot be read (ip(7), `IP_MULTICAST_IF`).
    Address,
}

const OPTIONS: &[(i32, i32, Form)] = &[
    (libc::IPPROTO_IP, libc::IP_MULTICAST_IF, Form::Address),
    (libc::IPPROTO_IP, libc::IP_UNICAST_IF, Form::BigEndian),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, Form::Number),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_IF, Form::BigEndian),
];

/// Reads those that are set.
pub(crate) fn collect(entry: &Entry) -> Result<Vec<InterfaceOption>> {
    let mut found = Vec::new();
    for &(level, name, form) in OPTIONS {
        let Ok(value) = socket_option(entry.file.as_fd(), level, name, 4) else { continue };
        let Ok(bytes) = <[u8; 4]>::try_from(value) else { continue };
        if bytes == [0; 4] {
            continue;
        }
        let (index, address) = match form {
            Form::Number => (u32::from_ne_bytes(bytes), None),
            Form::BigEndian => (u32::from_be_bytes(bytes), None),
            Form::Address => match godwit_network::find(bytes.into())? {
                Some(address) => (address.interface(), Some(bytes_of(address.ip()))),
                // It has gone since; the socket goes on with the interface, but nobody can say which.
                None => continue,
            },
        };
        let interface = if_indextoname(index).map_err(entry.error("if_indextoname"))?.to_string_lossy().into_owned();
        found.push(InterfaceOption { level, name, interface, address });
    }
    Ok(found)
}

/// Sets them on a new socket.
pub(crate) fn rebuild(socket: BorrowedFd<'_>, options: &[InterfaceOption], resource: &str) -> Result<()> {
    for option in options {
        let failed = |source: Errno| {
            let resource = format!("{resource}, option {}:{} ({})", option.level, option.name, option.interface);
            Error::call(resource, "setsockopt", source)
        };
        let known = OPTIONS.iter().find(|(level, name, _)| (*level, *name) == (option.level, option.name));
        let &(level, name, form) = known.ok_or_else(|| failed(Errno::ENOPROTOOPT))?;
        let index = if_nametoindex(option.interface.as_str()).map_err(failed)?;
        let value = match form {
            Form::Number => index.to_ne_bytes().to_vec(),
            Form::BigEndian => index.to_be_bytes().to_vec(),
            Form::Address => {
                // struct ip_mreqn: with the number the address need not be here yet.
                let address = option.address.as_deref().and_then(address_of).ok_or_else(|| failed(Errno::EINVAL))?;
                [vec![0; 4], bytes_of(address), index.to_ne_bytes().to_vec()].concat()
            }
        };
        set_socket_option(socket, level, name, &value).map_err(failed)?;
    }
    Ok(())
}
