//! Connections that a program takes apart and puts together itself, in a network namespace of the test's own. Needs root; says so
//! where it is not.

use godwit_kernel::Errno;
use godwit_kernel::descriptors::{is_at_urgent_mark, set_socket_option, socket_option};
use godwit_network::{Delivery, Flow, Hold, Namespace, Watched};
use godwit_proto::{Message, wire};
use godwit_resources::Error;
use godwit_resources::descriptors::{Connections, Socket, put_together, take_apart, take_over, watched_by, watched_of};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{MsgFlags, recv, send};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

fn own_network() -> bool {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not checked: needs root");
        return false;
    }
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
    true
}

fn here() -> Namespace {
    Namespace::current().unwrap()
}

fn pair(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    }
    (client, server)
}

fn expect(stream: &mut TcpStream, text: &[u8]) {
    let mut bytes = vec![0; text.len()];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, text);
}

fn lent(stream: &TcpStream) -> [Socket; 1] {
    [Socket { number: 5, file: stream.try_clone().unwrap().into() }]
}

/// Takes a connection apart that nobody here needs any more.
fn give_away(stream: TcpStream) -> wire::Connections {
    let sockets = [Socket { number: 5, file: stream.into() }];
    let mut hold = Hold::prepare(here(), "test", watched_by(&sockets).unwrap()).unwrap();
    let mut connections = Connections::default();
    let state = take_apart(&sockets, &mut hold, &mut connections).unwrap();
    hold.give_away();
    connections.give_away();
    connections.forget();
    state
}

/// Which end has closed first is what tells these two apart, and what the kernel goes on to from them.
#[test]
fn both_ends_may_have_closed_it_and_one_of_them_did_first() {
    const LAST_ACK: u8 = 9;
    const CLOSING: u8 = 11;
    if !own_network() {
        return;
    }
    let state = |stream: &TcpStream| socket_option(stream.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, 8).unwrap()[0];
    for address in ["127.0.0.1", "::1"] {
        for expected in [LAST_ACK, CLOSING] {
            let (mut client, mut server) = pair(address);
            set_socket_option(client.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, &4096i32.to_ne_bytes()).unwrap();
            if expected == LAST_ACK {
                client.shutdown(Shutdown::Write).unwrap();
                assert_eq!(server.read(&mut [0]).unwrap(), 0);
            }
            server.set_nonblocking(true).unwrap();
            let written = fill(&mut server, &vec![7; 32 << 20]);
            server.set_nonblocking(false).unwrap();
            server.shutdown(Shutdown::Write).unwrap();
            if expected == CLOSING {
                client.shutdown(Shutdown::Write).unwrap();
                assert_eq!(server.read(&mut [0]).unwrap(), 0);
            }
            assert_eq!(state(&server), expected, "{address}");
            let given = give_away(server);
            let complete = put_together(&given).unwrap();
            let server = TcpStream::from(complete.wake().unwrap().remove(0));
            assert_eq!(state(&server), expected, "{address}");
            let mut heard = Vec::new();
            client.read_to_end(&mut heard).unwrap();
            assert!(heard.len() == written && heard.iter().all(|&byte| byte == 7), "{} of {written}", heard.len());
        }
    }
}

/// What is left of a socket looks as if the peer had closed it.
fn expect_ended(stream: &mut TcpStream) {
    assert_eq!(stream.read(&mut [0; 9]).unwrap(), 0);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert_eq!(stream.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);
    assert!(stream.take_error().unwrap().is_none());
    const TCP_REPAIR: i32 = 19;
    assert_eq!(socket_option(stream.as_fd(), libc::IPPROTO_TCP, TCP_REPAIR, 4).unwrap(), 0i32.to_ne_bytes());
}

/// Places in `struct tcp_info`: `tcpi_rto`, `tcpi_unacked`, `tcpi_rtt` and `tcpi_snd_wnd`.
const TIMEOUT: usize = 8;
const UNACKNOWLEDGED: usize = 24;
const ROUND_TRIP: usize = 68;
const WINDOW: usize = 228;

fn info(socket: BorrowedFd<'_>, at: usize) -> u32 {
    let info = socket_option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, WINDOW + 4).unwrap();
    u32::from_ne_bytes(info[at..at + 4].try_into().unwrap())
}

#[test]
fn a_connection_lives_on_in_another_socket() {
    if !own_network() {
        return;
    }
    // As on a wire: the segments of loopback are as long as windows are.
    assert!(Command::new("ip").args(["link", "set", "lo", "mtu", "1500"]).status().unwrap().success());
    for address in ["127.0.0.1", "::1"] {
        let (mut client, mut server) = pair(address);
        client.write_all(b"unread").unwrap();
        server.write_all(b"unheard").unwrap();
        let segment = |stream: &TcpStream| {
            let told = socket_option(stream.as_fd(), libc::IPPROTO_TCP, libc::TCP_MAXSEG, 4).unwrap();
            i32::from_ne_bytes(told.try_into().unwrap())
        };
        let longest = segment(&server);
        let sockets = lent(&server);
        let mut hold = Hold::prepare(here(), "test", watched_by(&sockets).unwrap()).unwrap();
        let mut connections = Connections::default();
        let state = take_apart(&sockets, &mut hold, &mut connections).unwrap();
        client.write_all(b"meanwhile").unwrap();
        let state = wire::Connections::decode(&*state.encode_to_vec()).unwrap();
        hold.give_away();
        connections.give_away();
        connections.forget();
        expect_ended(&mut server);

        let mut arrivals = Hold::prepare_for_arrival(here(), "test", watched_of(&state.sockets)).unwrap();
        arrivals.collect().unwrap();
        let complete = put_together(&state).unwrap();
        let ends = (client.peer_addr().unwrap(), client.local_addr().unwrap());
        assert_eq!(complete.ends().collect::<Vec<_>>(), [ends]);
        assert!(put_together(&state).is_err(), "one connection is there twice");
        let mut other = TcpStream::from(complete.wake().unwrap().remove(0));
        assert_eq!(segment(&other), longest, "{address}");
        arrivals.deliver_here();
        let packets = hold.take().unwrap();
        drop(hold);
        let delivery = Delivery::new().unwrap();
        packets.into_iter().for_each(|packet| {
            delivery.deliver([packet]);
        });
        expect(&mut other, b"unreadmeanwhile");
        expect(&mut client, b"unheard");
        other.write_all(b"hello").unwrap();
        expect(&mut client, b"hello");
        client.write_all(b"there").unwrap();
        expect(&mut other, b"there");
    }
}

/// A peer that sends the second part of a question only when the first one has been acknowledged does not wait for its timer.
#[test]
fn what_was_received_is_acknowledged_at_once() {
    if !own_network() {
        return;
    }
    let (mut client, mut server) = pair("127.0.0.1");
    // The kernel may wait with acknowledgements as soon as questions have been answered.
    for _ in 0..3 {
        client.write_all(b"question").unwrap();
        expect(&mut server, b"question");
        server.write_all(b"answer").unwrap();
        expect(&mut client, b"answer");
    }
    let off = 0i32.to_ne_bytes();
    set_socket_option(server.as_fd(), libc::IPPROTO_TCP, libc::TCP_QUICKACK, &off).unwrap();
    client.write_all(b"first").unwrap();
    client.write_all(b"second").unwrap();
    let sockets = lent(&server);
    let mut hold = Hold::prepare(here(), "test", watched_by(&sockets).unwrap()).unwrap();
    let mut connections = Connections::default();
    let state = take_apart(&sockets, &mut hold, &mut connections).unwrap();
    let received = &state.streams.as_ref().unwrap().streams[0].received;
    assert_eq!(received, b"first", "nothing was left to be acknowledged");
    hold.give_away();
    connections.give_away();
    connections.forget();
    let mut other = TcpStream::from(put_together(&state).unwrap().wake().unwrap().remove(0));
    let packets = hold.take().unwrap();
    assert!(!packets.is_empty(), "the peer has heard nothing");
    drop(hold);
    let (woken, delivery) = (Instant::now(), Delivery::new().unwrap());
    let all = packets.len();
    assert_eq!(delivery.deliver(packets), all);
    other.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    expect(&mut other, b"firstsecond");
    // Linux asks again after 200 ms or more.
    assert!(woken.elapsed() < Duration::from_millis(150), "the peer waited for {:?}", woken.elapsed());
}

#[test]
fn what_is_not_given_away_goes_on() {
    if !own_network() {
        return;
    }
    let (mut client, mut server) = pair("127.0.0.1");
    let sockets = lent(&server);
    let mut hold = Hold::prepare(here(), "test", watched_by(&sockets).unwrap()).unwrap();
    let mut connections = Connections::default();
    take_apart(&sockets, &mut hold, &mut connections).unwrap();
    client.write_all(b"during").unwrap();
    drop(connections);
    drop(hold);
    expect(&mut server, b"during");
    server.write_all(b"after").unwrap();
    expect(&mut client, b"after");
}

/// Urgent data that waits, whether or not it was read or is to be one of the others, is where it was, and stays where it is when it is
/// not given away.
#[test]
fn urgent_data_stays_urgent() {
    if !own_network() {
        return;
    }
    let cases =
        [(true, 0, false), (false, 0, false), (false, 0, true), (true, 0, true), (false, 1, false), (true, 1, false)];
    for ((before, inline, read), moves) in cases.into_iter().flat_map(|case| [(case, false), (case, true)]) {
        let (mut client, mut server) = pair("127.0.0.1");
        let case = format!("before {before}, inline {inline}, read {read}, moves {moves}");
        set_socket_option(server.as_fd(), libc::SOL_SOCKET, libc::SO_OOBINLINE, &i32::to_ne_bytes(inline)).unwrap();
        if before {
            client.write_all(b"abc").unwrap();
        }
        send(client.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
        client.write_all(b"def").unwrap();
        std::thread::sleep(Duration::from_millis(20));
        if read {
            assert_eq!(recv(server.as_raw_fd(), &mut [0], MsgFlags::MSG_OOB), Ok(1), "{case}");
        }
        let sockets = lent(&server);
        let mut hold = Hold::prepare(here(), "test", watched_by(&sockets).unwrap()).unwrap();
        let mut connections = Connections::default();
        let state = take_apart(&sockets, &mut hold, &mut connections).unwrap();
        if moves {
            connections.forget();
            drop((sockets, server));
            let complete = put_together(&state).unwrap();
            hold.deliver_here();
            server = complete.wake().unwrap().pop().unwrap().into();
        } else {
            drop(connections);
            drop(hold);
        }
        client.write_all(b"ghi").unwrap();
        if before {
            expect(&mut server, b"abc");
        }
        assert_eq!(is_at_urgent_mark(server.as_fd()), Ok(true), "{case}");
        let mut byte = [0];
        let apart = recv(server.as_raw_fd(), &mut byte, MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT);
        if inline == 1 || read {
            assert_eq!(apart, Err(Errno::EINVAL), "{case}");
        } else {
            assert_eq!((apart, &byte), (Ok(1), b"!"), "{case}");
        }
        expect(&mut server, if inline == 1 { b"!defghi" } else { b"defghi" });
        server.write_all(b"answer").unwrap();
        expect(&mut client, b"answer");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    if !own_network() {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let listening = [Socket { number: 3, file: listener.into() }];
    assert!(matches!(watched_by(&listening), Err(Error::Obstacle(_))));
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(watched_by(&[Socket { number: 3, file: file.into() }]).is_err());

    let (_client, server) = pair("127.0.0.1");
    let sockets = lent(&server);
    let mut hold = Hold::prepare(here(), "test", watched_by(&sockets).unwrap()).unwrap();
    let mut connections = Connections::default();
    let state = take_apart(&sockets, &mut hold, &mut connections).unwrap();
    let mut without = state.clone();
    without.streams = None;
    let mut many = state.clone();
    many.sockets = vec![state.sockets[0].clone(); 100];
    let mut strange = state.clone();
    strange.sockets[0].state = 10;
    let mut addressless = state;
    addressless.sockets[0].src_addr.clear();
    for state in [without, many, strange, addressless] {
        assert!(matches!(put_together(&state), Err(Error::State { .. })), "{state:?}");
    }
}

/// What a program has closed while its peer did not read: no descriptor leads to it any more.
#[test]
fn what_was_closed_is_taken_over_with_all_that_is_left_in_it() {
    if !own_network() {
        return;
    }
    let patience = Duration::from_secs(3);
    assert!(Command::new("ip").args(["link", "set", "lo", "mtu", "1500"]).status().unwrap().success());
    for (address, is_lost) in [("127.0.0.1", false), ("::1", false), ("127.0.0.1", true), ("::1", true)] {
        let (mut client, mut server) = pair(address);
        let sent: Vec<u8> = (0..40_000_000u32).map(|number| (number >> 3) as u8 ^ number as u8).collect();
        server.set_nonblocking(true).unwrap();
        let flow = Flow::new(server.local_addr().unwrap(), server.peer_addr().unwrap());
        let mut length = fill(&mut server, &sent);
        if is_lost {
            // What is sent from now on does not reach its peer.
            let mut part = vec![0; 30_000];
            client.read_exact(&mut part).unwrap();
            assert!(part == sent[..part.len()]);
            std::thread::sleep(Duration::from_millis(100));
            let way = Flow::new(flow.remote, flow.local);
            let watched = Watched { flows: [way].into(), ..Watched::default() };
            let hold = Hold::prepare_for_arrival(here(), "test", watched).unwrap();
            client.read_exact(&mut part).unwrap();
            assert!(part == sent[30_000..60_000]);
            length += fill(&mut server, &sent[length..]);
            drop(server);
            std::thread::sleep(Duration::from_millis(20));
            drop(hold);
        } else {
            drop(server);
        }
        assert!(take_over(&here(), "test", &[], patience).unwrap().is_empty());
        let begun = Instant::now();
        let taken = take_over(&here(), "test", &[flow], patience).unwrap();
        println!("{length} bytes of {address}, taken over in {:?}", begun.elapsed());
        assert_eq!(taken.len(), 1, "it is not taken over");
        assert!(take_over(&here(), "test", &[flow], patience).unwrap().is_empty(), "there is one more");
        // It moves like another.
        let mut hold = Hold::prepare(here(), "test", watched_by(&taken).unwrap()).unwrap();
        let mut connections = Connections::default();
        let state = take_apart(&taken, &mut hold, &mut connections).unwrap();
        hold.give_away();
        connections.give_away();
        connections.forget();
        drop(taken);
        let woken = put_together(&state).unwrap().wake().unwrap();
        // Or nobody could listen here again as long as it ends.
        let may_share = |socket: &OwnedFd| socket_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 4);
        assert!(woken.iter().all(|socket| may_share(socket) == Ok(1i32.to_ne_bytes().to_vec())));
        drop(woken);
        drop(hold);
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).unwrap();
        let read = if is_lost { 60_000 } else { 0 };
        assert_eq!(rest.len() + read, length);
        assert!(rest == sent[read..length]);
    }
}

/// A peer that takes nothing any more says so while the connection moves.
#[test]
fn nothing_is_sent_to_a_peer_that_has_no_room() {
    const HEARD_LATER: usize = 30_000;
    if !own_network() {
        return;
    }
    assert!(Command::new("ip").args(["link", "set", "lo", "mtu", "1500"]).status().unwrap().success());
    for address in ["127.0.0.1", "::1"] {
        let (mut client, mut server) = pair(address);
        let sent: Vec<u8> = (0..40_000_000u32).map(|number| (number >> 3) as u8 ^ number as u8).collect();
        server.set_nonblocking(true).unwrap();
        let mut length = 0;
        while info(server.as_fd(), WINDOW) > 0 || info(server.as_fd(), UNACKNOWLEDGED) > 0 {
            length += fill(&mut server, &sent[length..]);
        }
        let mut state = give_away(server);
        // As if the last word of the peer were on its way still.
        let stream = &mut state.streams.as_mut().unwrap().streams[0];
        let entry = stream.entry.as_mut().unwrap();
        assert_eq!((entry.snd_wnd, entry.unsq_len), (Some(0), Some(entry.outq_len)), "the peer has room");
        let heard = length - stream.sent.len();
        stream.sent = sent[heard - HEARD_LATER..length].to_vec();
        entry.outq_len += HEARD_LATER as u32;
        entry.snd_wnd = Some(HEARD_LATER as u32);
        let woken = put_together(&state).unwrap().wake().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(info(woken[0].as_fd(), UNACKNOWLEDGED), 0, "{address}: segments are sent, and lost");
        let mut received = vec![0; length];
        client.read_exact(&mut received).unwrap();
        assert!(received == sent[..length]);
    }
}

/// What was lost on its way when the connection moves comes as soon as without that.
#[test]
fn what_was_lost_is_sent_again_soon() {
    const ROUND_TRIP_US: u32 = 40_000;
    if !own_network() {
        return;
    }
    for address in ["127.0.0.1", "::1"] {
        let (mut client, mut server) = pair(address);
        server.write_all(b"heard").unwrap();
        expect(&mut client, b"heard");
        let flow = Flow::new(client.local_addr().unwrap(), client.peer_addr().unwrap());
        let watched = Watched { flows: [flow].into(), ..Watched::default() };
        let loses = Hold::prepare_for_arrival(here(), "loses", watched).unwrap();
        server.write_all(b"lost").unwrap();
        let mut state = give_away(server);
        let stream = &mut state.streams.as_mut().unwrap().streams[0];
        assert_eq!(stream.sent, b"lost");
        assert!(stream.round_trip_us > 0, "it is not known how far away the client is");
        stream.round_trip_us = ROUND_TRIP_US;
        let mut woken = TcpStream::from(put_together(&state).unwrap().wake().unwrap().remove(0));
        let known = info(woken.as_fd(), ROUND_TRIP);
        assert!((ROUND_TRIP_US..ROUND_TRIP_US * 2).contains(&known), "{address}: {known} us to the client");
        let patience = info(woken.as_fd(), TIMEOUT);
        assert!(patience < 500_000, "{address}: sent again after {patience} us");
        drop(loses);
        expect(&mut client, b"lost");
        woken.write_all(b"and on").unwrap();
        expect(&mut client, b"and on");
        client.write_all(b"back").unwrap();
        expect(&mut woken, b"back");
    }
}

/// Writes until nothing more is taken; returns how much was.
fn fill(stream: &mut TcpStream, bytes: &[u8]) -> usize {
    let mut taken = 0;
    for _ in 0..4 {
        while let Ok(more) = stream.write(&bytes[taken..]) {
            taken += more;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    taken
}
