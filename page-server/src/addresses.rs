//! Addresses that come along with a process.

use godwit_network::{Address, Announcer, Interface};
use godwit_proto::wire::MovedAddress;
use godwit_resources::Obstacle;
use std::net::IpAddr;
use std::time::Duration;

/// When an address is announced once more: announcements can be lost, and nobody acknowledges them.
const AGAIN: [Duration; 3] = [Duration::from_millis(20), Duration::from_millis(200), Duration::from_secs(1)];

/// An address on its way.
#[derive(Clone, Debug)]
pub(crate) struct Coming {
    pub(crate) ip: IpAddr,
    prefix_bits: u8,
    device: String,
    /// More about it, as its source has it.
    content: Vec<u8>,
}

/// Reads what the source says; what makes no sense is left out, and reported by [`check`].
pub(crate) fn parse(messages: &[MovedAddress]) -> Vec<Coming> {
    messages.iter().filter_map(one).collect()
}

fn one(message: &MovedAddress) -> Option<Coming> {
    let bytes = message.address.as_slice();
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    let prefix_bits = u8::try_from(message.prefix_bits).ok().filter(|&bits| usize::from(bits) <= bytes.len() * 8)?;
    Some(Coming { ip, prefix_bits, device: message.device.clone(), content: message.content.clone() })
}

/// Names what stands in the way of having the addresses here.
pub(crate) fn check(messages: &[MovedAddress], addresses: &[Coming]) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    if addresses.len() != messages.len() {
        obstacles.push(Obstacle::new("addresses that move along", "one of them makes no sense", ""));
    }
    for coming in addresses {
        let mut add = |text: String, remedy: &str| obstacles.push(Obstacle::new(coming.ip.to_string(), text, remedy));
        let another = "name another one behind the address: --move-addr ADDR/DEV";
        match godwit_network::interface(&coming.device) {
            Ok(interface) if interface.is_up => {}
            Ok(_) => add(format!("the destination's interface {} is down", coming.device), another),
            Err(_) => add(format!("the destination has no interface {}", coming.device), another),
        }
        match godwit_network::has(coming.ip) {
            Ok(false) => {}
            Ok(true) => add(
                "the destination has this address already".to_owned(),
                "take it away there; only if both hosts are to have it, leave --move-addr out",
            ),
            Err(error) => add(error.to_string(), ""),
        }
    }
    obstacles
}

/// Addresses that this host has now. Dropped before they are kept, it has them no more.
#[must_use = "addresses go again unless they are kept"]
#[derive(Debug, Default)]
pub(crate) struct Arrived {
    addresses: Vec<(Address, Interface)>,
    announcer: Option<Announcer>,
}

/// Gives this host the addresses, and tells everybody.
///
/// # Errors
/// When one cannot be given; the host has none of them then.
pub(crate) fn arrive(coming: &[Coming]) -> godwit_network::Result<Arrived> {
    let mut arrived = Arrived::default();
    for coming in coming {
        let interface = godwit_network::interface(&coming.device)?;
        let told = Address::from_told(&coming.content, interface.index);
        let told = told.filter(|told| told.ip() == coming.ip && told.prefix_bits() == coming.prefix_bits);
        let address = told.unwrap_or_else(|| Address::new(coming.ip, coming.prefix_bits, interface.index));
        address.give()?;
        arrived.addresses.push((address, interface));
    }
    if !arrived.addresses.is_empty() {
        let announcer = Announcer::new()?;
        announce(&announcer, &arrived.addresses);
        arrived.announcer = Some(announcer);
    }
    Ok(arrived)
}

fn announce(announcer: &Announcer, addresses: &[(Address, Interface)]) {
    for (address, interface) in addresses {
        if let Err(error) = announcer.announce(address, interface) {
            tracing::warn!(%error, "neighbours go on looking for the address where it was");
        }
    }
}

impl Arrived {
    /// Keeps the addresses. Neighbours are told some more times.
    pub(crate) fn keep(mut self) {
        let mut kept = std::mem::take(&mut self.addresses);
        if let Some(announcer) = self.announcer.take() {
            repeat(move || {
                // N.B. one that has moved on meanwhile is announced by the next host, and neighbours believe the last word.
                kept.retain(|(address, _)| address.is_here());
                announce(&announcer, &kept);
            });
        }
    }
}

/// Tells neighbours some more times.
pub(crate) fn repeat(mut tell: impl FnMut() + Send + 'static) {
    let telling = std::thread::Builder::new().name("announce".to_owned()).spawn(move || {
        for pause in AGAIN {
            std::thread::sleep(pause);
            tell();
        }
    });
    if let Err(error) = telling {
        tracing::warn!(%error, "neighbours were told of an address only once");
    }
}

impl Drop for Arrived {
    fn drop(&mut self) {
        for (address, _) in &self.addresses {
            if let Err(error) = address.take_away() {
                tracing::warn!(%error, "an address of a process that does not run here is left");
            }
        }
    }
}
