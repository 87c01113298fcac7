//! Packets and addresses in a network namespace of the test's own. Needs root; says so where it is not.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use godwit_network::{Address, Announcer, Delivery, Flow, Hold, Listener, Namespace, Watched, find, has, interface};
use nix::sched::{CloneFlags, unshare};

/// A peer sends again what was lost after 200 ms, and asks again for a connection after a second: what comes earlier was
/// delivered.
const SOONER_THAN_SENT_AGAIN: Duration = Duration::from_millis(180);
const NOT_YET: Duration = Duration::from_millis(60);

/// Puts this thread into a network namespace of its own.
fn own_network() -> bool {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not checked: needs root");
        return false;
    }
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip("link set lo up");
    true
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

fn expect(stream: &mut TcpStream, text: &[u8]) -> Duration {
    let began = Instant::now();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut bytes = vec![0; text.len()];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, text);
    began.elapsed()
}

#[test]
fn what_is_held_back_is_delivered_when_it_is_over() {
    if !own_network() {
        return;
    }
    for address in ["127.0.0.1", "::1"] {
        let (_listener, mut client, mut server) = pair(address);
        let (_other_listener, mut other, mut served) = pair(address);
        let mut hold = Hold::prepare(here(), "test", watched(&server)).unwrap();
        client.write_all(b"before").unwrap();
        expect(&mut server, b"before");
        hold.hold_requests().unwrap();
        hold.hold_everything(&[]).unwrap();
        client.write_all(b"during").unwrap();
        expect_nothing(&mut server);
        other.write_all(b"other").unwrap();
        expect(&mut served, b"other");
        assert!(Hold::prepare(here(), "test", Watched::default()).is_err(), "two tables have one name");
        drop(hold);
        assert!(expect(&mut server, b"during") < SOONER_THAN_SENT_AGAIN);
        server.write_all(b"answer").unwrap();
        assert!(expect(&mut client, b"answer") < SOONER_THAN_SENT_AGAIN);
        // Now its table is gone.
        drop(Hold::prepare(here(), "test", Watched::default()).unwrap());
    }
}

#[test]
fn connections_that_come_up_late_are_held_back_too() {
    if !own_network() {
        return;
    }
    let (_listener, mut client, mut server) = pair("127.0.0.1");
    let mut hold = Hold::prepare(here(), "test", Watched::default()).unwrap();
    hold.hold_everything(&watched(&server).flows).unwrap();
    client.write_all(b"during").unwrap();
    expect_nothing(&mut server);
    // Taken, they are somebody else's to deliver.
    let packets = hold.take().unwrap();
    drop(hold);
    expect_nothing(&mut server);
    let delivery = Delivery::new().unwrap();
    assert!(packets.into_iter().all(|packet| delivery.deliver(packet)));
    assert!(expect(&mut server, b"during") < SOONER_THAN_SENT_AGAIN);
}

/// As at a destination: nothing that leaves is held back, and only what comes to live here is delivered here.
#[test]
fn early_packets_are_delivered_where_the_connection_comes_to_live() {
    if !own_network() {
        return;
    }
    for comes_to_live in [true, false] {
        let (_listener, mut client, mut server) = pair("127.0.0.1");
        let mut hold = Hold::prepare_for_arrival(here(), "test", watched(&server)).unwrap();
        hold.collect().unwrap();
        client.write_all(b"early").unwrap();
        expect_nothing(&mut server);
        server.write_all(b"leaves").unwrap();
        expect(&mut client, b"leaves");
        if comes_to_live {
            hold.deliver_here();
            assert!(expect(&mut server, b"early") < SOONER_THAN_SENT_AGAIN);
        } else {
            drop(hold);
            expect_nothing(&mut server);
            // The client sends it again by itself: nothing holds it back any more.
            expect(&mut server, b"early");
        }
        drop(Hold::prepare_for_arrival(here(), "test", Watched::default()).unwrap());
    }
}

/// As at a source whose address stays, once the connections live elsewhere: nobody answers for what is accepted there.
#[test]
fn packets_of_unknown_connections_are_held_back_when_their_listener_is_elsewhere() {
    if !own_network() {
        return;
    }
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
    if !own_network() {
        return;
    }
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

#[test]
fn addresses_come_and_go() {
    if !own_network() {
        return;
    }
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
