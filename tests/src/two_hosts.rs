//! The fixture: a source and a destination joined by a virtual Ethernet pair, or by a third host with a bridge, where clients
//! live; and a token both know.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::host::{Host, HostOptions, PidSpace};
use crate::path::Path as Way;
use crate::relay::Relay;

/// Two hosts. Dropping it ends every process on them and removes every file.
#[derive(Debug)]
pub struct TwoHosts {
    /// Where victims start.
    pub source: Host,
    /// Where they go.
    pub destination: Host,
    /// Where clients live, if there are any.
    pub clients: Option<Host>,
    /// The way that does something to packets, if there is one: between the hosts, and *there* is what the source sends; or between the
    /// clients and the other two, and *there* is what clients send.
    pub relay: Option<Relay>,
    /// What stands between the clients and both hosts, if anything does.
    pub router: Option<Host>,
    /// The token file of both.
    pub token: Token,
    directory: TempDir,
}

/// A token file: 32 random bytes that only its owner may read.
#[derive(Debug, Clone)]
pub struct Token {
    path: PathBuf,
}

/// How two hosts shall be made.
#[derive(Debug, Clone)]
pub struct TwoHostsBuilder {
    mtu: u32,
    rate: Option<String>,
    shared_pids: Sharing,
    source: HostOptions,
    destination: HostOptions,
    clients: Option<Way>,
    router: bool,
    between: Way,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    Separate,
    Shared,
}

/// The name of the interface on both hosts.
pub(crate) const INTERFACE: &str = "godwit0";

impl TwoHosts {
    /// Makes two hosts with PID namespaces of their own, equal clocks and jumbo frames.
    ///
    /// # Errors
    /// Not root, or a program of util-linux or iproute2 is missing.
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// Starts to describe two hosts.
    pub fn builder() -> TwoHostsBuilder {
        TwoHostsBuilder {
            mtu: 9000,
            rate: None,
            shared_pids: Sharing::Separate,
            source: HostOptions { first_pid: 10_000, ..HostOptions::default() },
            destination: HostOptions { first_pid: 20_000, ..HostOptions::default() },
            clients: None,
            router: false,
            between: Way::default(),
        }
    }

    /// The directory of this fixture's logs; it has the same path on both hosts.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Cuts the link between the hosts: from now on every packet is lost, without a word to either end.
    ///
    /// # Errors
    /// ip(8) failed.
    pub fn cut_link(&self) -> Result<()> {
        self.source.run("ip", &["link", "set", INTERFACE, "down"]).map(drop)
    }

    /// Mends a cut link. The address has stayed; routes come back with it.
    ///
    /// # Errors
    /// ip(8) failed.
    pub fn mend_link(&self) -> Result<()> {
        self.source.run("ip", &["link", "set", INTERFACE, "up"]).map(drop)
    }

    /// Limits what both hosts send, `rate` in the words of tc(8): `"400mbit"`.
    ///
    /// # Errors
    /// tc(8) failed.
    pub fn limit_rate(&self, rate: &str) -> Result<()> {
        for host in [&self.source, &self.destination] {
            let arguments = ["qdisc", "replace", "dev", INTERFACE, "root", "tbf", "rate", rate, "burst", "256kb"];
            host.run("tc", &[&arguments[..], &["latency", "50ms"]].concat())?;
        }
        Ok(())
    }

    /// The host where clients live.
    ///
    /// # Errors
    /// There is none.
    pub fn clients(&self) -> Result<&Host> {
        self.clients.as_ref().context("these hosts were made without clients")
    }

    /// The host between the clients and the others.
    ///
    /// # Errors
    /// There is none.
    pub fn router(&self) -> Result<&Host> {
        self.router.as_ref().context("these hosts were made without a router")
    }

    /// Makes one more token, which nobody knows yet.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn other_token(&self, name: &str) -> Result<Token> {
        Token::create(&self.directory().join(name))
    }
}

impl TwoHostsBuilder {
    /// Adds a host for clients and a router, which has a link to each of the three: source, destination and clients are host 2 of
    /// networks 10.78.1, 10.78.2 and 10.78.3 (and fd78:1 to fd78:3), the router is host 1. Source and destination have a link of
    /// their own besides.
    pub fn with_router(mut self) -> Self {
        self.router = true;
        self
    }

    /// Adds a third host, with the bridge that joins all three.
    pub fn with_clients(self) -> Self {
        self.with_distant_clients(Way::default())
    }

    /// Adds a third host with a bridge, whose clients are at the end of a path.
    pub fn with_distant_clients(mut self, path: Way) -> Self {
        self.clients = Some(path);
        self
    }

    /// Lays a path between source and destination. It has no effect where there are clients.
    pub fn with_path_between(mut self, path: Way) -> Self {
        self.between = path;
        self
    }

    /// Sets the largest packet of the link in bytes.
    pub fn mtu(mut self, bytes: u32) -> Self {
        self.mtu = bytes;
        self
    }

    /// Limits the link's rate from the start; see [`TwoHosts::limit_rate`].
    pub fn rate(mut self, rate: &str) -> Self {
        self.rate = Some(rate.to_owned());
        self
    }

    /// Puts the destination into a time namespace whose clocks are off by these numbers of seconds (zero is allowed).
    pub fn destination_clocks(mut self, monotonic: i64, boottime: i64) -> Self {
        self.destination.clock_offsets = Some((monotonic, boottime));
        self
    }

    /// The same for the source: the destination's clocks are behind.
    pub fn source_clocks(mut self, monotonic: i64, boottime: i64) -> Self {
        self.source.clock_offsets = Some((monotonic, boottime));
        self
    }

    /// Lets the destination use the source's PID namespace: every pid of the source is taken there.
    pub fn shared_pids(mut self) -> Self {
        self.shared_pids = Sharing::Shared;
        self
    }

    /// Gives the destination an empty directory of its own at a path that means another one at the source.
    pub fn private_at_destination(mut self, directory: &Path) -> Self {
        self.destination.private.push(directory.to_owned());
        self
    }

    /// Makes the hosts.
    ///
    /// # Errors
    /// Not root, or a program of util-linux or iproute2 is missing or failed.
    pub fn build(mut self) -> Result<TwoHosts> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "two hosts need namespaces, and these need root: run the tests as root"
        );
        let directory = tempfile::Builder::new().prefix("godwit-").tempdir().context("a directory for logs")?;
        // Victims of other users write there too.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        let token = Token::create(&directory.path().join("token"))?;
        let mut source = Host::start("source", directory.path(), &self.source)?;
        if self.shared_pids == Sharing::Shared {
            self.destination.pid_space = PidSpace::Shared(source.init_pid());
        }
        let mut destination = Host::start("destination", directory.path(), &self.destination)?;
        let (clients, relay) = if let Some(path) = self.clients {
            let options = HostOptions { first_pid: 30_000, ..HostOptions::default() };
            let mut clients = Host::start("clients", directory.path(), &options)?;
            let relay = join_by_bridge(&mut clients, [&mut source, &mut destination], self.mtu, path)?;
            (Some(clients), relay)
        } else if self.router {
            join(&mut source, &mut destination, self.mtu)?;
            let options = HostOptions { first_pid: 30_000, ..HostOptions::default() };
            (Some(Host::start("clients", directory.path(), &options)?), None)
        } else if self.between != Way::default() {
            (None, Some(join_by_path(&mut source, &mut destination, self.mtu, self.between)?))
        } else {
            join(&mut source, &mut destination, self.mtu)?;
            (None, None)
        };
        let router = match &clients {
            Some(clients) if self.router => Some(route(directory.path(), [&source, &destination, clients], self.mtu)?),
            _ => None,
        };
        let hosts = TwoHosts { source, destination, clients, relay, router, token, directory };
        if let Some(rate) = &self.rate {
            hosts.limit_rate(rate)?;
        }
        Ok(hosts)
    }
}

impl Token {
    /// Writes a new random token to a file of mode 0600.
    ///
    /// # Errors
    /// The file exists or cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let mut bytes = [0; 32];
        fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        std::io::Write::write_all(&mut file, &bytes)?;
        Ok(Self { path: path.to_owned() })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Lays a virtual Ethernet pair between two hosts. Both ends are born inside their network namespaces: nothing appears in
/// the test's own, and any number of fixtures use the same names and addresses side by side.
fn join(source: &mut Host, destination: &mut Host, mtu: u32) -> Result<()> {
    lay(source, INTERFACE, destination, INTERFACE, mtu)?;
    give_address(source, INTERFACE, 1)?;
    give_address(destination, INTERFACE, 2)
}

/// The same with a path in between.
fn join_by_path(source: &mut Host, destination: &mut Host, mtu: u32, path: Way) -> Result<Relay> {
    let relay = Relay::lay((source, INTERFACE), (destination, INTERFACE), mtu, path)?;
    give_address(source, INTERFACE, 1)?;
    give_address(destination, INTERFACE, 2)?;
    Ok(relay)
}

/// Joins hosts by a bridge on a third one, which is itself at the end of a path.
fn join_by_bridge(clients: &mut Host, hosts: [&mut Host; 2], mtu: u32, path: Way) -> Result<Option<Relay>> {
    const BRIDGE: &str = "bridge0";
    clients.run("ip", &["link", "add", BRIDGE, "type", "bridge"])?;
    for (number, host) in (1..).zip(hosts) {
        let port = format!("port{number}");
        lay(clients, &port, host, INTERFACE, mtu)?;
        clients.run("ip", &["link", "set", &port, "master", BRIDGE, "up"])?;
        give_address(host, INTERFACE, number)?;
    }
    if path == Way::default() {
        give_address(clients, BRIDGE, 3)?;
        return Ok(None);
    }
    let relay = Relay::lay((clients, INTERFACE), (clients, "port3"), mtu, path)?;
    // N.B. a host answers for its addresses on all of its interfaces, and the bridge would on the near side of the path.
    clients.run("ip", &["link", "set", BRIDGE, "arp", "off", "up"])?;
    clients.run("ip", &["link", "set", "port3", "master", BRIDGE, "up"])?;
    give_address(clients, INTERFACE, 3)?;
    Ok(Some(relay))
}

/// Makes a router with a link to each of the hosts.
fn route(directory: &Path, hosts: [&Host; 3], mtu: u32) -> Result<Host> {
    const LINK: &str = "routed0";
    let router = Host::start("router", directory, &HostOptions { first_pid: 40_000, ..HostOptions::default() })?;
    let settings = "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding";
    router.run("sh", &["-c", settings])?;
    for (network, host) in (1..).zip(hosts) {
        let port = format!("port{network}");
        lay(&router, &port, host, LINK, mtu)?;
        let end = |own: u8, device: &str| {
            format!(
                "ip address add 10.78.{network}.{own}/24 dev {device} && \
                 ip -6 address add fd78:{network}::{own}/64 dev {device} nodad && ip link set {device} up"
            )
        };
        router.run("sh", &["-c", &end(1, &port)])?;
        let routes = format!(
            "{} && ip route add default via 10.78.{network}.1 && ip -6 route add default via fd78:{network}::1",
            end(2, LINK)
        );
        host.run("sh", &["-c", &routes])?;
    }
    Ok(router)
}

fn lay(one: &Host, interface: &str, two: &Host, other: &str, mtu: u32) -> Result<()> {
    let (first, second, mtu) = (one.init_pid().to_string(), two.init_pid().to_string(), mtu.to_string());
    let output = Command::new("ip")
        .args(["link", "add", "name", interface, "mtu", &mtu, "netns", &first, "type", "veth"])
        .args(["peer", "name", other, "mtu", &mtu, "netns", &second])
        .output()
        .context("ip cannot be started")?;
    ensure!(output.status.success(), "no veth pair: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn give_address(host: &mut Host, interface: &str, number: u8) -> Result<()> {
    let script = format!(
        "ip address add 10.77.0.{number}/24 dev {interface} && ip link set {interface} up && \
         ip -6 address add fd77::{number}/64 dev {interface} nodad || true"
    );
    host.run("sh", &["-c", &script])?;
    host.set_address(format!("10.77.0.{number}"));
    Ok(())
}
