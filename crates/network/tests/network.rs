//! Packets and addresses in a network namespace of the test's own. Needs root.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use godwit_network::{
    Address, Announcer, Datagram, Datagrams, Delivery, Flow, Hold, Listener, Namespace, Packet, Watched, find, has,
    interface, net_table, route_names,
};
use nix::sched::{CloneFlags, unshare};

/// A peer sends again what was lost after 200 ms, and asks again for a connection after a second: what comes earlier was
/// delivered.
const SOONER_THAN_SENT_AGAIN: Duration = Duration::from_millis(180);
const NOT_YET: Duration = Duration::from_millis(30);

/// Puts this thread into a network namespace of its own.
fn own_network() {
    assert!(nix::unistd::geteuid().is_root(), "network namespaces need root: run the tests as root");
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip("link set lo up");
}

fn here() -> Namespace {
    Namespace::current().unwrap()
}

fn ip(words: &str) {
    assert!(Command::new("ip").args(words.split(' ')).status().unwrap().success(), "ip {words}");
}

fn pair(address: &str) -> (TcpListener, TcpStream, TcpStream) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    (listener, client, server)
}

fn watched(server: &TcpStream) -> Watched {
    let flow = Flow::new(server.local_addr().unwrap(), server.peer_addr().unwrap());
    Watched { flows: [flow].into(), ..Watched::default() }
}

fn expect_nothing(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(NOT_YET)).unwrap();
    assert_eq!(stream.read(&mut [0; 9]).unwrap_err().kind(), ErrorKind::WouldBlock);
}

fn expect(stream: &mut TcpStream, text: &[u8]) {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut bytes = vec![0; text.len()];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, text);
}

#[test]
fn what_is_held_back_is_delivered_when_it_is_over() {
    own_network();
    for address in ["127.0.0.1", "::1"] {
        let (_listener, mut client, mut server) = pair(address);
        let (_other_listener, mut other, mut served) = pair(address);
        let mut hold = Hold::prepare(here(), "test", watched(&server)).unwrap();
        client.write_all(b"before").unwrap();
        expect(&mut server, b"before");
        hold.hold_requests().unwrap();
        hold.hold_everything(&[]).unwrap();
        let sent = Instant::now();
        client.write_all(b"during").unwrap();
        expect_nothing(&mut server);
        server.write_all(b"later").unwrap();
        expect_nothing(&mut client);
        other.write_all(b"other").unwrap();
        expect(&mut served, b"other");
        assert!(Hold::prepare(here(), "test", Watched::default()).is_err(), "two tables have one name");
        drop(hold);
        expect(&mut server, b"during");
        assert!(sent.elapsed() < SOONER_THAN_SENT_AGAIN);
        expect(&mut client, b"later");
        // Now its table is gone.
        drop(Hold::prepare(here(), "test", Watched::default()).unwrap());
    }
}

#[test]
fn connections_that_come_up_late_are_held_back_too() {
    own_network();
    let (_listener, mut client, mut server) = pair("127.0.0.1");
    let mut hold = Hold::prepare(here(), "test", Watched::default()).unwrap();
    hold.hold_everything(&watched(&server).flows).unwrap();
    let sent = Instant::now();
    client.write_all(b"during").unwrap();
    expect_nothing(&mut server);
    // Taken, they are somebody else's to deliver.
    let packets = hold.take().unwrap();
    drop(hold);
    expect_nothing(&mut server);
    let delivery = Delivery::new().unwrap();
    let all = packets.len();
    assert_eq!(delivery.deliver(packets), all);
    expect(&mut server, b"during");
    assert!(sent.elapsed() < SOONER_THAN_SENT_AGAIN);
}

/// As at a destination: nothing that leaves is held back, and only what comes to live here is delivered here.
#[test]
fn early_packets_are_delivered_where_the_connection_comes_to_live() {
    own_network();
    for comes_to_live in [true, false] {
        let (_listener, mut client, mut server) = pair("127.0.0.1");
        let mut hold = Hold::prepare_for_arrival(here(), "test", watched(&server)).unwrap();
        hold.collect().unwrap();
        let sent = Instant::now();
        client.write_all(b"early").unwrap();
        expect_nothing(&mut server);
        server.write_all(b"leaves").unwrap();
        expect(&mut client, b"leaves");
        if comes_to_live {
            hold.deliver_here();
            expect(&mut server, b"early");
            assert!(sent.elapsed() < SOONER_THAN_SENT_AGAIN);
        } else {
            drop(hold);
            expect_nothing(&mut server);
            // The client sends it again by itself: nothing holds it back any more.
            expect(&mut server, b"early");
        }
        drop(Hold::prepare_for_arrival(here(), "test", Watched::default()).unwrap());
    }
}

/// Resets that this network namespace has sent.
fn resets() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let mut tcp = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (tcp.next().unwrap(), tcp.next().unwrap());
    let at = names.split(' ').position(|name| name == "OutRsts").unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

/// A connection that has ended when its last acknowledgement comes that was held back: nobody is told that it is unknown.
#[test]
fn what_only_acknowledges_on_a_connection_that_has_ended_is_left_out() {
    own_network();
    let (_listener, client, server) = pair("127.0.0.1");
    let alive = Flow::new(server.local_addr().unwrap(), server.peer_addr().unwrap());
    // N.B. there is somebody who takes new connections at that port.
    let ended = Flow { remote: "127.0.0.1:9".parse().unwrap(), ..alive };
    let acknowledgement = |flow: &Flow| {
        let builder = PacketBuilder::ipv4([127, 0, 0, 1], [127, 0, 0, 1], 64);
        let builder = builder.tcp(flow.remote.port(), flow.local.port(), 1000, 500).ack(7);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, b"").unwrap();
        bytes
    };
    let knowing = Delivery::new().unwrap().knowing([alive, ended].into());
    let before = resets();
    assert_eq!(knowing.deliver([acknowledgement(&ended)]), 0);
    assert_eq!(knowing.deliver([&alive, &alive, &ended].map(acknowledgement)), 1, "the last of each is enough");
    assert_eq!(resets(), before);
    // A client whose request nobody knows is told so.
    let stranger = Flow { remote: "127.0.0.1:10".parse().unwrap(), ..alive };
    assert_eq!(knowing.deliver([acknowledgement(&stranger)]), 1);
    assert_eq!(resets(), before + 1);
    drop(client);
}

/// As at a source whose address stays, once the connections live elsewhere: nobody answers for what is accepted there.
#[test]
fn packets_of_unknown_connections_are_held_back_when_their_listener_is_elsewhere() {
    own_network();
    let (listener, mut client, mut server) = pair("127.0.0.1");
    let at = listener.local_addr().unwrap();
    let held = Listener { address: None, port: at.port() };
    let mut hold = Hold::prepare(here(), "test", Watched::default()).unwrap();
    hold.add_listeners([held]).unwrap();
    hold.hold_everything(&[]).unwrap();
    client.write_all(b"seen").unwrap();
    expect(&mut server, b"seen");
    hold.hold_all_to_listeners().unwrap();
    client.write_all(b"not seen").unwrap();
    expect_nothing(&mut server);
    assert!(!hold.take().unwrap().is_empty());
    drop(hold);
    drop(Hold::prepare(here(), "test", Watched::default()).unwrap());
    expect(&mut server, b"not seen");
}

#[test]
fn new_clients_get_in_when_it_is_over() {
    own_network();
    for (address, any) in [("127.0.0.1", false), ("127.0.0.1", true), ("::1", false)] {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let at = listener.local_addr().unwrap();
        let held = Listener { address: (!any).then_some(at.ip()), port: at.port() };
        let mut client = TcpStream::connect(at).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let mut hold =
            Hold::prepare(here(), "test", Watched { listeners: [held].into(), ..Watched::default() }).unwrap();
        hold.hold_requests().unwrap();
        let connecting = std::thread::spawn(move || TcpStream::connect(at).unwrap());
        std::thread::sleep(NOT_YET);
        assert!(!connecting.is_finished());
        // Connections that are there already are not concerned.
        client.write_all(b"going on").unwrap();
        expect(&mut server, b"going on");
        drop(hold);
        let began = Instant::now();
        listener.accept().unwrap();
        connecting.join().unwrap();
        assert!(began.elapsed() < Duration::from_millis(500));
    }
}

/// Several migrations may hold requests back at once, in one network namespace.
#[test]
fn requests_of_several_holds_are_told_apart() {
    own_network();
    let hold = |name: &str| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let held = Listener { address: None, port: at.port() };
        let watched = Watched { listeners: [held].into(), ..Watched::default() };
        let mut hold = Hold::prepare(here(), name, watched).unwrap();
        hold.hold_requests().unwrap();
        (listener, at, hold)
    };
    let mut all = ["one", "two", "three"].map(hold);
    for (_, at, _) in &all {
        assert!(TcpStream::connect_timeout(at, NOT_YET).is_err());
    }
    for (_, at, hold) in &mut all {
        // A request that came before everything is held back, once, and none of the others'.
        hold.hold_everything(&[]).unwrap();
        let packets = hold.take().unwrap();
        assert_eq!(packets.len(), 1, "{packets:?}");
        let port = u16::from_be_bytes([packets[0].bytes[22], packets[0].bytes[23]]);
        assert_eq!(port, at.port());
        assert_eq!(hold.take().unwrap(), []);
    }
}

#[test]
fn addresses_come_and_go() {
    own_network();
    ip("link add here type veth peer name there");
    ip("link set here up");
    ip("link set there up");
    let device = interface("here").unwrap();
    assert!(device.is_up && interface("nowhere").is_err());
    for (text, bits) in [("10.1.2.3", 24), ("10.1.3.4", 32), ("fd00:7::1", 64)] {
        let address: IpAddr = text.parse().unwrap();
        assert!(!has(address).unwrap());
        let made = Address::new(address, bits, device.index);
        made.give().unwrap();
        assert!(made.give().is_err());
        let found = find(address).unwrap().unwrap();
        assert_eq!((found.prefix_bits(), found.interface()), (bits, device.index));
        TcpListener::bind((address, 0)).unwrap();
        Announcer::new().unwrap().announce(&found, &device).unwrap();
        found.take_away().unwrap();
        assert!(found.take_away().is_err() && !has(address).unwrap());
        // As it was before, for a move that is called off.
        found.give().unwrap();
        TcpListener::bind((address, 0)).unwrap();
    }
    assert!(has("127.0.0.2".parse().unwrap()).unwrap());
}

#[test]
fn what_is_told_of_an_address_makes_it_elsewhere() {
    own_network();
    ip("link add here type veth peer name there");
    ip("link set here up");
    ip("link set there up");
    ip("address add 10.1.2.3 peer 10.1.2.9/32 dev here label here:svc metric 7 valid_lft 300 preferred_lft 200");
    ip("address add fd00:7::1/64 dev here preferred_lft 0 nodad noprefixroute");
    ip("route add 10.5.0.0/16 dev here src 10.1.2.3");
    let shown = |device: &str| {
        let output = Command::new("ip").args(["-o", "address", "show", "dev", device]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap().replace(device, "it");
        let words = |line: &str| line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ");
        text.lines().map(words).filter(|line| !line.contains("fe80")).collect::<Vec<_>>()
    };
    let before = shown("here");
    let index = interface("there").unwrap().index;
    for text in ["10.1.2.3", "fd00:7::1"] {
        let found = find(text.parse().unwrap()).unwrap().unwrap();
        let (told, routes) = (found.told("there").unwrap(), found.routes().unwrap());
        assert_eq!(route_names(&routes), if text.contains(':') { &[][..] } else { &["10.5.0.0/16"] });
        found.take_away().unwrap();
        Address::from_told(&told, index).unwrap().give().unwrap();
        assert!(Address::from_told(&told[..told.len() - 1], index).is_none_or(|short| short.ip() == found.ip()));
        assert!(Address::from_told(&told[..9], index).is_none());
    }
    assert_eq!(shown("there"), before);
    assert_eq!(shown("here"), [""; 0]);
}

/// Each datagram is either taken by its socket or held back, whatever is sent meanwhile, and none comes twice.
#[test]
fn datagrams_are_held_back_and_delivered_once() {
    own_network();
    for (address, any) in [("127.0.0.1", false), ("127.0.0.1", true), ("::1", false), ("::1", true)] {
        for elsewhere in [false, true] {
            let server = UdpSocket::bind((address, 0)).unwrap();
            let other = UdpSocket::bind((address, 0)).unwrap();
            let at = server.local_addr().unwrap();
            // Everything at once: what does not fit would be lost.
            nix::sys::socket::setsockopt(&server, nix::sys::socket::sockopt::RcvBufForce, &(32 << 20)).unwrap();
            let client = UdpSocket::bind((address, 0)).unwrap();
            let ports = [Listener { address: (!any).then_some(at.ip()), port: at.port() }].into();
            let datagrams = Datagrams { ports, ..Datagrams::default() };
            let mut hold = Hold::prepare(Namespace::current().unwrap(), "test", Watched::default()).unwrap();
            hold.prepare_datagrams().unwrap();
            let sender = client.try_clone().unwrap();
            let sending = std::thread::spawn(move || {
                for number in 0..2000u32 {
                    sender.send_to(&number.to_ne_bytes(), at).unwrap();
                    if number % 50 == 0 {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(5));
            assert!(hold.hold_datagrams(&datagrams).unwrap());
            client.send_to(b"other", other.local_addr().unwrap()).unwrap();
            other.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            assert_eq!(other.recv(&mut [0; 9]).unwrap(), 5);
            // Longer than a packet of the link, but not of this one: nothing is in fragments here.
            let long: Vec<u8> = (0..40_000).map(|byte| byte as u8).collect();
            sending.join().unwrap();
            client.send_to(&long, at).unwrap();
            client.send_to(b"", at).unwrap();
            let mut seen = BTreeSet::new();
            let mut order = Vec::new();
            let mut take_all = || {
                server.set_read_timeout(Some(NOT_YET)).unwrap();
                let mut buffer = vec![0; 65536];
                while let Ok((length, from)) = server.recv_from(&mut buffer) {
                    assert_eq!(from, client.local_addr().unwrap());
                    if let Ok(bytes) = buffer[..length].try_into() {
                        let number = u32::from_ne_bytes(bytes);
                        assert!(seen.insert(number), "{number} comes twice");
                    } else {
                        order.push(buffer[..length].to_vec());
                    }
                }
                seen.len()
            };
            let before = take_all();
            assert!(before > 0 && before < 2000, "{before} before");
            if elsewhere {
                hold.give_away();
                let packets = hold.take().unwrap();
                assert!(packets.iter().all(|packet| packet.interface.as_deref() == Some("lo")));
                drop(hold);
                let delivery = Delivery::new().unwrap();
                let all = packets.len();
                assert_eq!(delivery.deliver(packets), all);
            } else {
                drop(hold);
            }
            assert_eq!(take_all(), 2000);
            assert!(order == [long, Vec::new()], "{} others", order.len());
        }
    }
}

/// A datagram arrives by an interface, at an address, of which this host need not have either.
#[test]
fn datagrams_arrive_as_if_from_elsewhere() {
    own_network();
    ip("link add here type veth peer name there");
    ip("link set here up");
    ip("link set there up");
    ip("address add 10.1.2.3/24 dev here");
    ip("address add fd00:7::1/64 dev here nodad");
    // The kernel takes its time to see that both ends are up.
    let list = || Command::new("ip").args(["link", "show", "dev", "here"]).output().unwrap().stdout;
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !String::from_utf8(list()).unwrap().contains("state UP") {
        assert!(std::time::Instant::now() < deadline, "a link does not come up");
        std::thread::sleep(Duration::from_millis(5));
    }
    let delivery = Delivery::new().unwrap();
    for (any, source, destination) in [
        ("0.0.0.0:0", "192.0.2.9:53", "198.51.100.7"),
        ("0.0.0.0:0", "192.0.2.9:53", "239.1.2.3"),
        ("[::]:0", "[2001:db8::9]:53", "2001:db8::1"),
        ("[::]:0", "[2001:db8::9]:53", "ff05::77"),
    ] {
        let bound = UdpSocket::bind(any).unwrap();
        let port = bound.local_addr().unwrap().port();
        let destination: IpAddr = destination.parse().unwrap();
        let datagram = Datagram {
            protocol: libc::IPPROTO_UDP as u8,
            source: source.parse().unwrap(),
            destination: SocketAddr::new(destination, port),
            hops: 5,
            traffic_class: 0,
            payload: b"hello",
        };
        for interface in [None, Some("here"), Some("nowhere")] {
            nix::sys::socket::setsockopt(
                &bound,
                nix::sys::socket::sockopt::BindToDevice,
                &match interface {
                    Some("here") => "here".into(),
                    _ => "".into(),
                },
            )
            .unwrap();
            delivery.arrive(&datagram.packet().unwrap(), destination, interface).unwrap();
            bound.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let (length, from) = bound.recv_from(&mut [0; 9]).unwrap();
            assert_eq!((length, from), (5, datagram.source), "{destination} by {interface:?}");
        }
    }
}

/// What is longer than a packet is joined where it is delivered: that it was sent to an address that this host is about to lose
/// makes no difference.
#[test]
fn fragments_are_forwarded() {
    own_network();
    let cases = [("127.0.0.1", false, true), ("127.0.0.1", true, true), ("::1", false, true), ("::1", true, true)];
    let undone = [("127.0.0.1", false, false), ("::1", false, false)];
    for (address, loses_address, elsewhere) in cases.into_iter().chain(undone) {
        let server = UdpSocket::bind((address, 0)).unwrap();
        let client = UdpSocket::bind((address, 0)).unwrap();
        let at = server.local_addr().unwrap();
        let ports = [Listener { address: Some(at.ip()), port: at.port() }].into();
        let mut hold = Hold::prepare(Namespace::current().unwrap(), "test", Watched::default()).unwrap();
        hold.prepare_datagrams().unwrap();
        hold.hold_datagrams(&Datagrams { ports, ..Datagrams::default() }).unwrap();
        if loses_address {
            hold.hold_addresses(&[at.ip()]).unwrap();
        }
        let long: Vec<u8> = (0..20_000).map(|byte| byte as u8).collect();
        ip("link set lo mtu 1500");
        client.send_to(&long, at).unwrap();
        client.send_to(b"short", at).unwrap();
        ip("link set lo mtu 65536");
        if elsewhere {
            hold.give_away();
            let packets = hold.take().unwrap();
            drop(hold);
            let delivery = Delivery::new().unwrap();
            let all = packets.len();
            assert_eq!(delivery.deliver(packets), all);
        } else {
            drop(hold);
        }
        server.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut buffer = vec![0; 65536];
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        assert!(buffer[..length] == long && from == client.local_addr().unwrap(), "{length} bytes from {from}");
        assert_eq!(server.recv(&mut buffer).unwrap(), 5);
    }
}

#[test]
fn very_many_connections_are_held_back() {
    own_network();
    let at = |ip: [u8; 4], port: u16| std::net::SocketAddr::from((ip, port));
    let flows = (0..20_000u32).map(|n| Flow::new(at([10, 0, 0, 1], 80), at([10, 1, (n >> 8) as u8, n as u8], 4000)));
    let watched = Watched { flows: flows.collect(), ..Watched::default() };
    let mut hold = Hold::prepare(here(), "test", watched).unwrap();
    hold.hold_everything(&[]).unwrap();
}

/// Somebody whom the packet filter turns away is turned away, though it lets in what comes by the loopback device.
#[test]
fn what_was_held_back_comes_by_its_interface() {
    own_network();
    ip("link add here type veth peer name there");
    for device in ["here", "there"] {
        ip(&format!("link set {device} up"));
    }
    ip("address add 10.1.2.3/24 dev here");
    ip("address add fd00:7::3/64 dev here nodad");
    let rules = "table inet guard { chain in { type filter hook input priority filter; policy drop
        iif lo accept
        meta l4proto ipv6-icmp accept
        ip saddr 10.1.2.66 drop
        ip6 saddr fd00:7::66 drop
        iifname here accept
    }
    }";
    assert!(Command::new("nft").arg(rules).status().unwrap().success());
    let delivery = Delivery::new().unwrap();
    for (own, friend, other) in [("10.1.2.3", "10.1.2.9", "10.1.2.66"), ("fd00:7::3", "fd00:7::9", "fd00:7::66")] {
        let own: IpAddr = own.parse().unwrap();
        let server = UdpSocket::bind((own, 0)).unwrap();
        server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let datagram_of = |from: &str, interface: Option<&str>, payload: &[u8]| {
            let source = SocketAddr::new(from.parse().unwrap(), 7);
            let destination = server.local_addr().unwrap();
            let protocol = libc::IPPROTO_UDP as u8;
            let made = Datagram { protocol, source, destination, hops: 60, traffic_class: 0, payload };
            Packet { bytes: made.packet().unwrap(), interface: interface.map(str::to_owned) }
        };
        let datagram = |from: &str, interface: Option<&str>| datagram_of(from, interface, from.as_bytes());
        let mut heard = [0; 20_000];
        for interface in [Some("here"), None] {
            // Longer than a frame can be.
            let long = vec![7; 12_000];
            let all = [datagram_of(other, interface, &long), datagram_of(friend, interface, &long)];
            assert_eq!(delivery.deliver(all), 2);
            let (length, from) = server.recv_from(&mut heard).unwrap();
            assert!(heard[..length] == long && from.ip() == friend.parse::<IpAddr>().unwrap(), "{length} of {from}");
            // As many as have room.
            let many = (0..40).map(|n| datagram(if n % 2 == 0 { other } else { friend }, interface));
            assert_eq!(delivery.deliver(many), 40);
            for _ in 0..20 {
                assert_eq!(server.recv_from(&mut heard).unwrap().1.ip(), friend.parse::<IpAddr>().unwrap());
            }
            assert!(server.recv_from(&mut heard).is_err());
            assert_eq!(delivery.deliver([datagram(other, interface), datagram(friend, interface)]), 2);
            let (length, from) = server.recv_from(&mut heard).unwrap();
            assert_eq!((&heard[..length], from.ip()), (friend.as_bytes(), friend.parse().unwrap()));
            assert!(server.recv_from(&mut heard).is_err());
        }

        let listener = TcpListener::bind((own, 0)).unwrap();
        let at = listener.local_addr().unwrap();
        let request = |from: &str| {
            let builder = match (from.parse().unwrap(), own) {
                (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 60),
                (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 60),
                _ => panic!("of two families"),
            };
            let mut bytes = Vec::new();
            builder.tcp(4000, at.port(), 1000, 500).syn().write(&mut bytes, &[]).unwrap();
            bytes
        };
        assert_eq!(delivery.deliver([request(other), request(friend)]), 2);
        let asked = |from: &str| {
            const SYN_RECV: u8 = 3;
            let from: IpAddr = from.parse().unwrap();
            net_table::read("thread-self", &net_table::TCP)
                .any(|line| line.state == SYN_RECV && line.remote.ip() == from)
        };
        assert!(asked(friend) && !asked(other));
    }
}
