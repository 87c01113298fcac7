//! An address of this host that moves along, with what this host loses with it.

use super::stop::Result;
use godwit_network::{Address, Interface};
use godwit_resources::Obstacle;
use std::net::IpAddr;

/// Of so many routes, some hundred bytes each, an entry of the journal takes no harm.
const ROUTES_WRITTEN_DOWN: usize = 16;

/// An address of this host that moves along.
#[derive(Debug)]
pub(super) struct Moving {
    pub(super) here: Address,
    pub(super) interface: Interface,
    pub(super) name: IpAddr,
    /// The interface of the destination that gets it.
    pub(super) device: String,
    /// What the destination is told of it.
    pub(super) told: Vec<u8>,
    /// Routes of this host that go with it.
    pub(super) routes: Vec<Vec<u8>>,
    /// Whether this host has given it away.
    pub(super) taken: bool,
}

impl Moving {
    /// Finds an address and the interface that has it here.
    pub(super) fn find(address: IpAddr, device: Option<&str>) -> Result<std::result::Result<Self, Obstacle>> {
        let Some(here) = godwit_network::find(address)? else {
            let text = "this host does not have the address that is to move along";
            return Ok(Err(Obstacle::new(address.to_string(), text, "")));
        };
        let name = here.interface_name()?;
        let interface = godwit_network::interface(&name)?;
        let device = device.map_or(name, str::to_owned);
        let (told, routes) = (here.told(&device)?, here.routes()?);
        Ok(Ok(Self { here, interface, name: address, device, told, routes, taken: false }))
    }

    /// As it is on this host.
    pub(super) fn told_here(&self) -> Vec<u8> {
        self.here.interface_name().and_then(|name| self.here.told(&name)).unwrap_or_default()
    }

    /// What there is room for in a journal, with those of `addresses` in it; should this program go on, it knows them all.
    pub(super) fn routes_to_write_down(&self, addresses: usize) -> Vec<Vec<u8>> {
        let most = ROUTES_WRITTEN_DOWN / addresses.max(1);
        if self.routes.len() > most {
            tracing::warn!(address = %self.name, of = self.routes.len(), "routes that go with it are not all written down");
        }
        self.routes.iter().take(most).cloned().collect()
    }
}
