//! `page-server invite`: a code that enrols another host, answered by whichever page server runs on the same configuration.

use std::io::Write;
use std::net::{IpAddr, UdpSocket};

use anyhow::{Context as _, Result, anyhow};
use godwit_carry::{DEFAULT_PORT, HostKey, HostPort, Invitations};

use crate::cli::InviteArguments;

/// Makes an invitation and prints its code, alone on standard output; what to do with it goes to standard error.
///
/// # Errors
/// When this host's key or the invitation cannot be made, or no address of this host is to be found.
pub fn invite(arguments: &InviteArguments) -> Result<()> {
    let key = HostKey::load_or_create(&arguments.config_dir)?;
    let address = match &arguments.address {
        Some(address) => address.clone(),
        None => own_address()?,
    };
    let code =
        Invitations::in_directory(&arguments.config_dir).create(key.fingerprint(), address.clone(), arguments.valid)?;
    writeln!(std::io::stdout(), "{}", *code.reveal()).context("standard output")?;
    let seconds = arguments.valid.as_secs();
    let time = match (seconds % 60, seconds / 60) {
        (0, 1) => "a minute".to_owned(),
        (0, minutes) => format!("{minutes} minutes"),
        _ => format!("{seconds} seconds"),
    };
    eprintln!(
        "Good once, for {time}, on one other host: migrate trust CODE\n\
         It calls {address}, where page-server has to run (another address: --address). The fingerprint of this host is\n  {}",
        key.fingerprint()
    );
    Ok(())
}

/// Finds an address by which others may reach this host: the one that it sends from to the rest of the world, else the first that is
/// not only good for itself.
fn own_address() -> Result<HostPort> {
    // Nothing is sent: connect(2) on UDP only looks the way up. The networks are those of examples, RFC 5737 and 3849.
    let towards = [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")];
    let on_the_way = towards.into_iter().find_map(|(from, to)| {
        let socket = UdpSocket::bind(from).ok()?;
        socket.connect(to).ok()?;
        Some(socket.local_addr().ok()?.ip())
    });
    let ip = on_the_way.into_iter().chain(interfaces()).find(|ip| is_good_for_others(*ip));
    let ip = ip.ok_or_else(|| anyhow!("this host has no address that others can call: name one by --address"))?;
    Ok(HostPort::parse(&ip.to_string(), DEFAULT_PORT)?)
}

fn interfaces() -> impl Iterator<Item = IpAddr> {
    let all = nix::ifaddrs::getifaddrs().into_iter().flatten();
    all.filter_map(|interface| {
        let address = interface.address?;
        let four = address.as_sockaddr_in().map(|address| address.ip().into());
        four.or_else(|| address.as_sockaddr_in6().map(|address| address.ip().into()))
    })
}

fn is_good_for_others(ip: IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !ip.is_loopback() && !ip.is_unspecified() && !is_link_local
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_only_this_host_can_call_are_passed_over() {
        for (ip, good) in [
            ("127.0.0.1", false),
            ("::1", false),
            ("169.254.1.1", false),
            ("fe80::1", false),
            ("10.0.0.1", true),
            ("2001:db8::1", true),
        ] {
            assert_eq!(is_good_for_others(ip.parse().unwrap()), good, "{ip}");
        }
    }
}
