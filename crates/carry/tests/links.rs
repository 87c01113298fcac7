//! Links between two sides that mean well.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use godwit_carry::*;
use godwit_stream::{Compression, FrameHeader, Limits, PAGE_SIZE, PageEncoder, Scratch, decode_pages};

const PATIENCE: Duration = Duration::from_secs(10);

fn token() -> Token {
    Token::from_bytes(&[7; 32]).unwrap()
}

struct Pair {
    listener: Listener,
    client: (Link, Channel),
    server: (Link, Channel),
}

async fn pair_on(address: &str, profile: Profile, timing: Timing) -> Pair {
    let listener = Listener::bind_with(address.parse().unwrap(), token(), profile, timing).unwrap();
    let mut target = listener.local_addr();
    if target.ip().is_unspecified() {
        target = SocketAddr::from(([127, 0, 0, 1], target.port()));
    }
    let connector = Connector::new(token(), profile).with_timing(timing);
    let (client, server) = tokio::join!(connector.connect(target, PATIENCE), async {
        listener.accept().await.unwrap().authenticate().await
    });
    Pair { client: client.unwrap(), server: server.unwrap(), listener }
}

async fn pair() -> Pair {
    pair_on("127.0.0.1:0", Profile::Bulk, Timing::default()).await
}

async fn exchange(pair: Pair) {
    let (mut sender, mut receiver) = pair.client.1.split();
    let (mut other_sender, mut other_receiver) = pair.server.1.split();
    sender.send_message(5, 6, Bytes::from_static(b"over")).await.unwrap();
    let frame = other_receiver.receive().await.unwrap().unwrap();
    assert_eq!((frame.message_type(), frame.header.id, &frame.payload[..]), (Some(5), 6, &b"over"[..]));
    other_sender.send_message(7, 8, Bytes::new()).await.unwrap();
    let frame = receiver.receive().await.unwrap().unwrap();
    assert_eq!((frame.message_type(), frame.payload.len()), (Some(7), 0));
    sender.finish().await.unwrap();
    assert!(other_receiver.receive().await.unwrap().is_none());
}

#[tokio::test]
async fn both_families_and_both_on_one_socket() {
    for (address, loopback) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1")] {
        for profile in [Profile::Bulk, Profile::Faults] {
            let pair = pair_on(address, profile, Timing::default()).await;
            assert_eq!(pair.server.0.remote_address().ip().to_string(), loopback);
            exchange(pair).await;
        }
    }
}

#[tokio::test]
async fn messages_of_every_size_arrive_whole() {
    let pair = pair().await;
    let (mut sender, _) = pair.client.1.split();
    let (_, mut receiver) = pair.server.1.split();
    let sizes = [0, 1, 39, 40, 41, 1000, 1412, 1413, 9000, 65_535, 1 << 20, Limits::MESSAGE_BYTES];
    let content = |size: usize| Bytes::from((0..size).map(|at| (at * 7 + size) as u8).collect::<Vec<u8>>());
    let sending = tokio::spawn(async move {
        for size in sizes {
            sender.send_message(1, size as u64, content(size)).await.unwrap();
        }
        let refused = sender.send_message(1, 0, vec![0; Limits::MESSAGE_BYTES + 1].into()).await;
        assert!(matches!(refused, Err(Error::Frame(_))));
        sender.finish().await.unwrap();
        sender
    });
    for size in sizes {
        let frame = receiver.receive().await.unwrap().unwrap();
        assert_eq!(frame.header.id, size as u64);
        assert!(frame.payload == content(size), "{size} bytes");
    }
    assert!(receiver.receive().await.unwrap().is_none());
    sending.await.unwrap();
}

#[tokio::test]
async fn pages_arrive_as_they_were() {
    let pair = pair().await;
    let (mut sender, _) = pair.client.1.split();
    let (_, mut receiver) = pair.server.1.split();
    let mut pages = vec![0; 1000 * PAGE_SIZE];
    for (at, byte) in pages.iter_mut().enumerate().filter(|(at, _)| (at / PAGE_SIZE) % 10 < 6) {
        *byte = (at / 256) as u8 ^ at as u8;
    }
    let sent = Bytes::from(pages);
    let expected = sent.clone();
    let sending = tokio::spawn(async move {
        for compression in [Compression::Off, Compression::Level(1)] {
            let mut encoder = PageEncoder::new(compression);
            sender.send_frames(encoder.encode_shared(0, 0x1000, &sent, 0)).await.unwrap();
            for (header, payload) in encoder.encode(0, 0x1000, &sent, 0) {
                sender.send_pages(header, payload).await.unwrap();
            }
        }
        let mismatch = sender.send_pages(FrameHeader::raw_pages(0, 0, 2, 0), Some(sent.slice(..PAGE_SIZE))).await;
        assert!(matches!(mismatch, Err(Error::Frame(_))));
        sender.finish().await.unwrap();
    });
    let mut scratch = Scratch::new();
    let (mut address, mut rounds) = (0x1000, 0);
    while let Some(frame) = receiver.receive().await.unwrap() {
        assert!(frame.is_pages() && frame.message_type().is_none());
        if frame.header.address == 0x1000 {
            address = 0x1000;
            rounds += 1;
        }
        assert_eq!(frame.header.address, address);
        let decoded = decode_pages(&frame.header, frame.payload, &mut scratch).unwrap();
        let start = address as usize - 0x1000;
        assert!(decoded == expected.slice(start..start + decoded.len()));
        address += decoded.len() as u64;
    }
    assert_eq!((rounds, address), (4, 0x1000 + expected.len() as u64));
    sending.await.unwrap();
}

#[tokio::test]
async fn the_path_is_found_to_carry_jumbo_packets() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let pair = pair_on(address, Profile::Bulk, Timing::default()).await;
        for link in [&pair.client.0, &pair.server.0] {
            let found = async {
                while link.path_payload() < 8900 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(PATIENCE, found).await.unwrap();
        }
        exchange(pair).await;
    }
}

#[tokio::test]
async fn figures_grow() {
    let pair = pair().await;
    let (sent, received) = (pair.client.0.bytes_sent(), pair.server.0.bytes_received());
    let (mut sender, _) = pair.client.1.split();
    let (_, mut receiver) = pair.server.1.split();
    sender.send_message(0, 0, vec![1; 100_000].into()).await.unwrap();
    receiver.receive().await.unwrap().unwrap();
    assert!(pair.client.0.bytes_sent() - sent > 100_000);
    assert!(pair.server.0.bytes_received() - received > 100_000);
    assert!(pair.client.0.rtt() > Duration::ZERO);
    pair.client.0.check().unwrap();
}

#[tokio::test]
async fn closing_words_reach_the_peer() {
    let pair = pair().await;
    let (_, mut receiver) = pair.server.1.split();
    pair.client.0.close(42, "enough");
    assert!(matches!(pair.client.0.closed().await, Error::Closed));
    let heard = receiver.receive().await.unwrap_err();
    assert!(matches!(&heard, Error::PeerClosed { code: 42, reason } if reason == "enough"), "{heard:?}");
    assert!(matches!(pair.server.0.closed().await, Error::PeerClosed { code: 42, .. }));
    assert!(matches!(pair.server.0.check(), Err(Error::PeerClosed { code: 42, .. })));
    pair.client.0.settle(PATIENCE).await;
}

#[tokio::test]
async fn a_closing_listener_tells_its_links() {
    let pair = pair().await;
    pair.listener.close(CODE_DONE, "going down", PATIENCE).await;
    assert!(matches!(pair.client.0.closed().await, Error::PeerClosed { code: 0, .. }));
    assert!(pair.listener.accept().await.is_none());
}

#[tokio::test]
async fn a_finished_stream_survives_the_close_that_follows() {
    let pair = pair().await;
    let (mut sender, _receiver) = pair.client.1.split();
    let (_, mut receiver) = pair.server.1.split();
    let content = Bytes::from(vec![3; 3 << 20]);
    sender.send_message(0, 0, content.clone()).await.unwrap();
    sender.finish().await.unwrap();
    pair.client.0.close(CODE_DONE, "");
    pair.server.0.closed().await;
    assert!(receiver.receive().await.unwrap().unwrap().payload == content);
    assert!(receiver.receive().await.unwrap().is_none());
}

#[tokio::test]
async fn a_throttled_link_carries_everything_all_the_same() {
    let pair = pair().await;
    pair.client.0.throttle(64 << 10);
    pair.server.0.throttle(64 << 10);
    let (mut sender, _) = pair.client.1.split();
    let (_, mut receiver) = pair.server.1.split();
    let content = Bytes::from(vec![4; 5 << 20]);
    let sending = async {
        sender.send_message(0, 0, content.clone()).await.unwrap();
        pair.client.0.throttle(4 << 20);
        pair.server.0.throttle(4 << 20);
        sender.send_message(0, 1, content.clone()).await.unwrap();
    };
    let receiving = async {
        for id in 0..2 {
            let frame = receiver.receive().await.unwrap().unwrap();
            assert!(frame.header.id == id && frame.payload == content);
        }
    };
    tokio::time::timeout(PATIENCE, async { tokio::join!(sending, receiving) }).await.unwrap();
}

#[tokio::test]
async fn an_idle_link_lives_on_and_a_silent_one_does_not() {
    let timing =
        Timing { keep_alive: Duration::from_millis(100), idle: Duration::from_millis(600), ..Timing::default() };
    let pair = pair_on("127.0.0.1:0", Profile::Faults, timing).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    pair.server.0.check().unwrap();
    exchange(pair).await;

    // A side whose thread stands still says nothing, not even that it is there.
    let (port_sender, port) = std::sync::mpsc::channel();
    let standing = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let address = "127.0.0.1:0".parse().unwrap();
            let listener = Listener::bind_with(address, token(), Profile::Faults, timing).unwrap();
            port_sender.send(listener.local_addr()).unwrap();
            let held = listener.accept().await.unwrap().authenticate().await.unwrap();
            // The server's proof is on its way before this thread stands still.
            tokio::time::sleep(Duration::from_millis(200)).await;
            std::thread::sleep(Duration::from_secs(2));
            drop(held);
        });
    });
    let address = port.recv().unwrap();
    let connector = Connector::new(token(), Profile::Faults).with_timing(timing);
    let (link, _channel) = connector.connect(address, PATIENCE).await.unwrap();
    assert!(matches!(link.closed().await, Error::TimedOut { .. }));
    standing.join().unwrap();
}

#[tokio::test]
async fn nobody_there_is_a_timeout() {
    let unused = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = unused.local_addr().unwrap();
    let refused = connect(address, token(), Profile::Bulk, Duration::from_millis(300)).await;
    assert!(matches!(refused, Err(Error::TimedOut { .. })));
    let connector = Connector::new(token(), Profile::Bulk);
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), token(), Profile::Bulk).unwrap();
    let serving = async { listener.accept().await.unwrap().authenticate().await };
    let addresses = [address, listener.local_addr()];
    let (found, served) = tokio::join!(connector.connect_any(&addresses, Duration::from_millis(500)), serving);
    assert_eq!(found.unwrap().0.remote_address(), listener.local_addr());
    served.unwrap();
}

#[tokio::test]
async fn a_dropped_listener_takes_no_more_calls() {
    let Pair { listener, client, server } = pair().await;
    let address = listener.local_addr();
    drop(listener);
    let refused = connect(address, token(), Profile::Bulk, Duration::from_secs(1)).await;
    assert!(refused.is_err());
    let (mut sender, _) = client.1.split();
    sender.send_message(0, 0, Bytes::new()).await.unwrap();
    let (_, mut receiver) = server.1.split();
    receiver.receive().await.unwrap().unwrap();
}
