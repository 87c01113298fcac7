//! Connections and addresses that move along.
//!
//! Inside the freeze all packets of its connections are held back, and addresses go with `Commit`. After it what has arrived here is
//! sent after the connections. What clients do before is for [`super::callers`].

use super::Agent;
use super::moving::Moving;
use super::own_network::OwnNetwork;
use super::stop::Result;
use crate::cancel::Cancel;
use crate::journal::Undo;
use crate::request::{DEFAULT_FORWARD, Request};
use godwit_network::{
    Announcer, Flow, Hold, Listener, Namespace, Packet, Tracking, Translation, give_routes, route_names,
};
use godwit_proto::wire as messages;
use godwit_resources::descriptors::{
    Connections, EarlyConnections, Socket, Survey, other_ends, translate_addresses, used_addresses,
};
use godwit_resources::{LEAVE_BEHIND, Obstacle};
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

/// Time without a packet after which no more are expected: the network knows where the connections live now.
const QUIET: Duration = Duration::from_millis(50);
/// Longest time that packets are sent after connections.
const LONGEST: Duration = Duration::from_secs(1);
/// How often packets are looked for.
pub(super) const GLANCE: Duration = Duration::from_millis(1);
/// Connections that may come up between the first look and the freeze, beside as many as there were.
const SOME: usize = 1024;
/// Bytes of packets in one message.
const MESSAGE: usize = 1 << 20;

/// What of the network is involved in a move.
#[derive(Debug, Default)]
pub(super) struct Network {
    addresses: Vec<Moving>,
    /// The network namespace that is only the process's own.
    pub(super) own: Option<OwnNetwork>,
    /// All addresses where the process is.
    here: HashSet<IpAddr>,
    /// Addresses that are others at the destination.
    pub(super) translation: Translation,
    /// Connections that stay here and lose their address.
    bereft: Vec<Flow>,
    pub(super) hold: Option<Hold>,
    /// What of tracked connections goes along; not from a namespace that does so itself.
    tracking: Option<Tracking>,
    /// What connections will be taken apart with.
    pub(super) connections: Connections,
    pub(super) early_connections: EarlyConnections,
    /// Connections that the process has closed and whose peers have not got everything: they move along.
    pub(super) closed: Vec<Socket>,
    /// Whether connections that the process has not accepted are to be lost.
    pub(super) leaves_waiting: bool,
}

impl Network {
    /// Looks the addresses up that are to move, and whether connections can.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub(super) fn look_at(request: &Request, survey: &mut Survey, obstacles: &mut Vec<Obstacle>) -> Result<Self> {
        let mut network = Self { own: OwnNetwork::look_at(request, &survey.tun_files, obstacles)?, ..Self::default() };
        for wish in &request.move_addresses {
            match Moving::find(wish.address, wish.device.as_deref())? {
                Ok(moving) if network.addresses.iter().any(|other| other.name == moving.name) => {
                    let text = "it is to move along twice";
                    obstacles.push(Obstacle::new(moving.name.to_string(), text, "give --move-addr for it once"));
                }
                Ok(moving) => {
                    let loss = moving.here.loss()?;
                    obstacles.extend(loss.map(|loss| Obstacle::new(moving.name.to_string(), loss, "")));
                    network.addresses.push(moving);
                }
                Err(obstacle) => obstacles.push(obstacle),
            }
        }
        let moving: Vec<IpAddr> = network.addresses.iter().map(|moving| moving.name).collect();
        if !moving.is_empty() {
            network.bereft = godwit_network::others_at(&moving, &survey.network);
        }
        network.translate(request, survey, obstacles)?;
        if request.tcp_close {
            survey.network.flows.clear();
            survey.listening.retain(|address| !address.starts_with("connection:"));
        } else {
            obstacles.append(&mut survey.tied);
        }
        if network.own.as_ref().is_some_and(|own| !own.is_prepared()) {
            // Interfaces of its own namespace come along.
            survey.listening.retain(|address| !address.starts_with("interface:") && !address.starts_with("tun:"));
        }
        network.here = match &network.own {
            Some(own) => own.addresses().collect(),
            None if survey.network.is_empty() => HashSet::new(),
            None => godwit_network::addresses()?,
        };
        // A connection of the process with itself that it has not accepted yet has no second end so far.
        let is_asked_for = |flow: &Flow| {
            let to = |address| Listener { address, port: flow.remote.port() };
            [None, Some(flow.remote.ip())].into_iter().any(|address| survey.network.listeners.contains(&to(address)))
        };
        let flows = survey.network.flows.iter().filter(|flow| !is_asked_for(flow)).copied();
        let flows = flows.collect();
        let here: Vec<Flow> = network.stay_behind(&flows, &survey.network.flows).copied().collect();
        let whose = other_ends(request.pid, &here);
        obstacles.extend(here.iter().map(|flow| stays_behind(flow, whose.get(flow))));
        Ok(network)
    }

    /// Looks whether addresses can be what they are to be at the destination, as far as that is to be seen from here.
    fn translate(&mut self, request: &Request, survey: &Survey, obstacles: &mut Vec<Obstacle>) -> Result<()> {
        match Translation::new(request.map_addresses.iter().map(|wish| (wish.old, wish.new))) {
            Ok(translation) => self.translation = translation,
            Err(text) => {
                obstacles.push(Obstacle::new("--map-addr", text, ""));
                return Ok(());
            }
        }
        if self.translation.is_empty() {
            return Ok(());
        }
        let mut used = used_addresses(&survey.listening, &survey.network);
        if survey.network.takes_any_address() {
            match &self.own {
                Some(own) => used.extend(own.addresses()),
                None => used.extend(godwit_network::addresses()?),
            }
        }
        for (old, new) in self.translation.pairs().filter(|(old, _)| !used.contains(old)) {
            let names: Vec<String> = used.iter().map(IpAddr::to_string).collect();
            let text = match names.as_slice() {
                [] => format!("no socket of the process uses {old}, or any other address of one host"),
                names => format!("no socket of the process uses {old}; they use {}", names.join(", ")),
            };
            obstacles.push(Obstacle::new(format!("--map-addr {old}={new}"), text, "name an address that is used"));
        }
        for (one, other) in translate_addresses(&survey.listening, &self.translation).err().unwrap_or_default() {
            let text = format!("it would have the same address at the destination as {one}");
            obstacles.push(Obstacle::new(
                format!("listening address {other}"),
                text,
                "map one of them to another address",
            ));
        }
        Ok(())
    }

    /// Addresses that sockets need, as the destination calls them.
    pub(super) fn addresses_there(&self, listening: &[String]) -> Vec<String> {
        // Where they clash, that was said, and nothing will be asked for.
        translate_addresses(listening, &self.translation).unwrap_or_default()
    }

    /// Names the address by which the destination is reached, if it is one that is to move.
    pub(super) fn cuts_off(&self, destination: SocketAddr) -> Option<Obstacle> {
        let any = if destination.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(destination).ok()?;
        let own = socket.local_addr().ok()?.ip().to_canonical();
        let moves = self.addresses.iter().any(|moving| moving.name == own);
        let text = "this host reaches the destination by it, and could not say that it is given away";
        moves.then(|| Obstacle::new(own.to_string(), text, "reach the destination by another address"))
    }

    /// Names connections that stay here although their address is to move along: the destination will answer their peers with
    /// resets.
    pub(super) fn bereft(&self) -> Option<String> {
        let first = self.bereft.first().map(|flow| format!("{} - {}", flow.local, flow.remote))?;
        Some(match self.bereft.len() - 1 {
            0 => first,
            more => format!("{first} (and {more} more)"),
        })
    }

    /// Names routes of this host that go with addresses, for nothing else may speak under them.
    pub(super) fn routes_lost(&self) -> impl Iterator<Item = String> + '_ {
        self.addresses.iter().filter(|moving| !moving.routes.is_empty()).map(|moving| {
            let names = route_names(&moving.routes).join(", ");
            format!(
                "routes of this host that have {} as their source go with it, or lose that source, for good: {names}",
                moving.name
            )
        })
    }

    /// Those of some connections whose other end is on this host, too, and not among `all` that move.
    fn stay_behind<'a>(&self, flows: &'a HashSet<Flow>, all: &HashSet<Flow>) -> impl Iterator<Item = &'a Flow> {
        let ends: HashSet<_> = all.iter().map(|flow| flow.local).collect();
        let on_this_host = |flow: &&Flow| flow.remote.ip().is_loopback() || self.here.contains(&flow.remote.ip());
        // The other end of a connection with itself moves along.
        flows.iter().filter(move |flow| on_this_host(flow) && !ends.contains(&flow.remote))
    }

    /// Whether the destination has an address, or will have: it was asked, or need not be. It was for those that are `known`.
    pub(super) fn is_looked_after(&self, address: IpAddr, known: &HashSet<IpAddr>) -> bool {
        let moves = self.addresses.iter().any(|moving| moving.name == address);
        self.own.is_some() || moves || address.is_loopback() || known.contains(&address)
    }

    /// What stands in the way of connections that came up since those that are `known`.
    pub(super) fn objection(&self, flows: &HashSet<Flow>, known: &HashSet<Flow>) -> Option<Obstacle> {
        let known: HashSet<IpAddr> = known.iter().map(|flow| flow.local.ip()).collect();
        let strange = flows.iter().find(|flow| !self.is_looked_after(flow.local.ip(), &known));
        let strange = strange.map(|flow| {
            Obstacle::new(
                format!("TCP connection {} - {}", flow.local, flow.remote),
                "it came up since the process was looked at, and nobody has asked whether the destination has its address",
                "try again",
            )
        });
        strange.or_else(|| self.stay_behind(flows, flows).next().map(|flow| stays_behind(flow, None)))
    }

    /// What the destination is to make of the process's own network namespace, if it has one.
    pub(super) fn own_contents(&self) -> Option<messages::NetworkNamespace> {
        self.own.as_ref().map(|own| own.contents().clone())
    }

    /// How the destination shall join it to its network.
    pub(super) fn joints(&self) -> Vec<messages::NetworkJoint> {
        self.own.as_ref().map(OwnNetwork::joints).unwrap_or_default()
    }

    /// As it is now, with the process stopped.
    ///
    /// # Errors
    /// When nothing is prepared for what has changed in it.
    pub(super) fn own_now(&mut self) -> Result<Option<messages::NetworkNamespace>> {
        let flows = self.hold.as_ref().into_iter().flat_map(Hold::flows);
        self.own.as_mut().map(|own| own.look_again(flows)).transpose()
    }

    /// What would have to be undone should another program let the process go on here.
    pub(super) fn undo(&self) -> Undo {
        let taken = self.addresses.iter().filter(|moving| moving.taken);
        let address = |moving: &Moving| crate::journal::Address {
            ip: moving.name,
            prefix_bits: moving.here.prefix_bits(),
            device: moving.here.interface_name().unwrap_or_else(|_| moving.device.clone()),
            content: moving.told_here(),
            routes: moving.routes_to_write_down(self.addresses.len()),
        };
        Undo {
            addresses: taken.map(address).collect(),
            silent_by: self.silent_by().map(str::to_owned),
            ..Undo::default()
        }
    }

    /// The name of the tables that keep the process's own network namespace silent, if any do.
    pub(super) fn silent_by(&self) -> Option<&str> {
        self.own.as_ref().and_then(OwnNetwork::silent_by)
    }

    /// Where the process's packets arrive.
    pub(super) fn namespace(&self) -> Result<Namespace> {
        match &self.own {
            Some(own) => Ok(own.namespace().try_clone()?),
            None => Ok(Namespace::current()?),
        }
    }

    /// What the destination must know of addresses.
    pub(super) fn messages(&self) -> Vec<messages::MovedAddress> {
        let message = |moving: &Moving| messages::MovedAddress {
            address: match moving.name {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            },
            prefix_bits: moving.here.prefix_bits().into(),
            device: moving.device.clone(),
            content: moving.told.clone(),
        };
        self.addresses.iter().map(message).collect()
    }

    /// Takes the addresses away from this host. `id` distinguishes the migration.
    ///
    /// # Errors
    /// When one cannot be; those that were are given back by [`Network::give_back`].
    pub(super) fn take_addresses(&mut self, id: &str) -> Result<()> {
        if let Some(hold) = &mut self.hold {
            // N.B. before: a datagram to an address that is nobody's here, or into silence, would go unnoticed.
            let names: Vec<IpAddr> = match &self.own {
                Some(own) => own.addresses().collect(),
                None => self.addresses.iter().map(|moving| moving.name).collect(),
            };
            hold.hold_addresses(&names)?;
        }
        if let Some(own) = &mut self.own {
            own.silence(id)?;
        }
        for moving in self.addresses.iter_mut().filter(|moving| !moving.taken) {
            moving.here.take_away()?;
            moving.taken = true;
        }
        Ok(())
    }

    /// Sends packets that have arrived here by now after their connections, before all else: peers wait for what they have sent. For
    /// the time that was `told`, what comes to listening sockets from now on is kept, too.
    ///
    /// # Errors
    /// When no more can be sent; that is told.
    pub(super) fn begin_forwarding(
        &mut self,
        wire: &super::Wire,
        told: Option<Duration>,
    ) -> std::result::Result<(), ()> {
        let Some(hold) = &mut self.hold else { return Ok(()) };
        // Addresses that stay here would answer with a reset.
        let is_told = told.is_some() || !self.translation.is_empty();
        if is_told && let Err(error) = hold.hold_all_to_listeners() {
            tracing::warn!(%error, "new clients who still come here may be turned away");
        }
        self.send_on(wire).map(drop)
    }

    /// Goes on sending packets that arrive here after their connections, until none do or for the time that was `told`. It
    /// takes the peers half a `round_trip` to hear where the connections live now, and what they sent before that as long again
    /// to arrive.
    pub(super) fn forward(
        &mut self,
        wire: &super::Wire,
        told: Option<Duration>,
        round_trip: Duration,
        cancel: &Cancel,
    ) {
        if self.hold.is_none() {
            return;
        }
        // When the network has understood is not to be seen from here.
        let mapped = (!self.translation.is_empty()).then_some(DEFAULT_FORWARD);
        let told = told.or(mapped);
        let (longest, quiet) = told.map_or((LONGEST, QUIET + round_trip), |told| (told, told));
        let begun = Instant::now();
        let mut last = begun;
        while begun.elapsed() < longest && last.elapsed() < quiet && !cancel.is_cancelled() {
            match self.send_on(wire) {
                Ok(0) => std::thread::sleep(GLANCE),
                Ok(_) => last = Instant::now(),
                Err(()) => return,
            }
        }
    }

    /// Prepares to look at what this host's packet filter tracks.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub(super) fn begin_tracking(&mut self) -> Result<()> {
        if self.own.as_ref().is_none_or(OwnNetwork::is_prepared) {
            self.tracking = Some(Tracking::of(self.namespace()?)?);
        }
        Ok(())
    }

    /// What this host's packet filter tracks of the connections and was not told before.
    pub(super) fn tracked(&mut self) -> Vec<Vec<u8>> {
        let (Some(tracking), Some(hold)) = (&mut self.tracking, &self.hold) else { return Vec::new() };
        tracking.leaving(hold.watched(), &self.translation).unwrap_or_else(|error| {
            tracing::warn!(%error, "a stateful packet filter at the destination may stop packets of the connections");
            Vec::new()
        })
    }

    /// Has this host's packet filter forget connections that live elsewhere now: they may come back.
    pub(super) fn forget_tracked(&self) {
        let (Some(tracking), Some(hold)) = (&self.tracking, &self.hold) else { return };
        if let Err(error) = tracking.forget(|flow| hold.watched().flows.contains(flow)) {
            tracing::warn!(%error, "what the packet filter tracks of connections that have left stays");
        }
    }

    /// Sends packets that have arrived here by now after the connections that they belong to; gives their number.
    ///
    /// # Errors
    /// When no more can be sent; that is told.
    fn send_on(&mut self, wire: &super::Wire) -> std::result::Result<usize, ()> {
        let Some(hold) = &mut self.hold else { return Ok(0) };
        let mut packets = hold.take().map_err(|error| tracing::warn!(%error, "packets that arrive here are lost"))?;
        if packets.is_empty() {
            return Ok(0);
        }
        packets.iter_mut().for_each(|packet| self.translation.packet(&mut packet.bytes));
        let count = packets.len();
        tracing::debug!(packets = count, "sending packets after their connections");
        send_packets(wire, packets).map_err(|error| tracing::warn!(?error, "packets that arrived here are lost"))?;
        Ok(count)
    }

    /// Gives this host its addresses back, and its packets. Returns what went wrong.
    pub(super) fn give_back(&mut self) -> Vec<String> {
        let mut troubles = Vec::new();
        for moving in self.addresses.iter_mut().filter(|moving| moving.taken) {
            let announce = || Announcer::new()?.announce(&moving.here, &moving.interface);
            let given = moving.here.give().and_then(|()| announce());
            troubles.extend(given.err().map(|error| error.to_string()));
            troubles.extend(give_routes(&moving.routes).err().map(|error| error.to_string()));
            moving.taken = false;
        }
        troubles.extend(self.own.as_mut().and_then(|own| own.speak().err()).map(|error| error.to_string()));
        // N.B. after the addresses are back: packets are only delivered to those that are here.
        if let Some(mut hold) = self.hold.take() {
            hold.take_back();
        }
        troubles
    }
}

impl Agent<'_> {
    /// Prepares to hold packets back, where there are any to come.
    pub(super) fn prepare_hold(&mut self) -> Result<()> {
        let inspected = self.inspected.as_ref().expect("looked at in the first phase");
        let watched = inspected.survey.network.clone();
        if watched.is_empty() {
            return Ok(());
        }
        let connected = !watched.flows.is_empty();
        if connected {
            // Some may come up until then.
            self.network.connections = Connections::prepare(watched.flows.len() * 2 + SOME)?;
            self.network.early_connections = EarlyConnections::prepare(self.request.pid, watched.flows.len());
        }
        let takes_datagrams = !watched.datagrams.is_empty();
        match Hold::prepare(self.network.namespace()?, &self.report.migration_id[..8], watched) {
            Ok(mut hold) => {
                if takes_datagrams && let Err(error) = hold.prepare_datagrams() {
                    tracing::warn!(%error, "datagrams that arrive inside the freeze are lost");
                }
                self.network.hold = Some(hold);
                self.network.begin_tracking()?;
            }
            // Without connections all that is lost is that clients who call inside the freeze have to call again.
            Err(error) if !connected => {
                tracing::warn!(%error, "requests for connections and datagrams are not held back")
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Cuts the process's own network namespace off, now that it has moved.
    pub(super) fn leave_network(&mut self) {
        if let Some(Err(error)) = self.network.own.as_mut().map(OwnNetwork::cut_off) {
            tracing::warn!(%error, "the network namespace that the process has left is kept silent by its packet filter");
        }
    }
}

/// Says of a connection that its other end, on this host, stays behind, and who has that.
fn stays_behind(flow: &Flow, whose: Option<&String>) -> Obstacle {
    let whose = whose.map(|name| format!(" ({name})")).unwrap_or_default();
    Obstacle::new(
        format!("TCP connection {} - {}", flow.local, flow.remote),
        format!("its other end{whose} is on this host, too, and stays behind"),
        LEAVE_BEHIND,
    )
}

/// Says that packets may come early, and what is tracked of their connections.
pub(super) fn send_tracked(wire: &super::Wire, tracked: Vec<Vec<u8>>) -> Result<()> {
    let mut message = messages::Streams::default();
    let mut size = 0;
    for content in tracked {
        if size + content.len() > MESSAGE {
            wire.send(&std::mem::take(&mut message))?;
            size = 0;
        }
        size += content.len();
        message.tracked.push(content);
    }
    wire.send(&message)
}

fn send_packets(wire: &super::Wire, packets: Vec<Packet>) -> Result<()> {
    let mut message = messages::Packets::default();
    let mut size = 0;
    for Packet { bytes, interface } in packets {
        if size + bytes.len() > MESSAGE {
            wire.send(&std::mem::take(&mut message))?;
            size = 0;
        }
        size += bytes.len();
        message.packets.push(bytes);
        message.interfaces.push(interface.unwrap_or_default());
    }
    wire.send(&message)
}
