//! Peers that hold another token, none, somebody else's proof, or the right one and no manners.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use godwit_carry::*;
use godwit_stream::{FrameHeader, HEADER_SIZE};
use hmac::{Hmac, Mac};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};

const PATIENCE: Duration = Duration::from_secs(10);
const SECRET: [u8; 32] = [7; 32];
const LOCAL: &str = "127.0.0.1:0";

fn token() -> Token {
    Token::from_bytes(&SECRET).unwrap()
}

fn listener() -> Listener {
    let timing = Timing { authentication: Duration::from_millis(500), ..Timing::default() };
    Listener::bind_with(LOCAL.parse().unwrap(), token(), Profile::Bulk, timing).unwrap()
}

async fn serve(listener: &Listener) -> Result<(Link, Channel)> {
    listener.accept().await.unwrap().authenticate().await
}

async fn call(address: SocketAddr) -> Result<(Link, Channel)> {
    connect(address, token(), Profile::Bulk, PATIENCE).await
}

/// A certificate check that checks nothing.
#[derive(Debug)]
struct Careless;

impl ServerCertVerifier for Careless {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Connects as far as TLS goes, offering `alpn`.
async fn raw_connect(address: SocketAddr, alpn: &[u8]) -> Result<(Endpoint, Connection), quinn::ConnectionError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Careless))
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
    let endpoint = Endpoint::client(LOCAL.parse().unwrap()).unwrap();
    let connection = endpoint.connect_with(config, address, "anything").unwrap().await?;
    Ok((endpoint, connection))
}

/// Listens as far as TLS goes, with a certificate of its own.
fn raw_listener() -> Endpoint {
    let made = rcgen::generate_simple_self_signed(vec!["anything".into()]).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    config.alpn_protocols = vec![b"godwit".to_vec()];
    let config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(config).unwrap()));
    Endpoint::server(config, LOCAL.parse().unwrap()).unwrap()
}

/// Computes a proof as the protocol's description says.
fn proof(connection: &Connection, secret: &[u8], role: &[u8]) -> [u8; 32] {
    let mut exporter = [0; 32];
    connection.export_keying_material(&mut exporter, b"godwit token v1", role).unwrap();
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(secret).unwrap();
    mac.update(&exporter);
    mac.update(role);
    mac.finalize().into_bytes().into()
}

fn greeting(version: u16, proof: [u8; 32]) -> Vec<u8> {
    [&b"GODWIT"[..], &version.to_le_bytes(), &proof].concat()
}

/// Connects, proves the token, and checks the server's proof: a peer written from the description alone.
async fn raw_authenticated(address: SocketAddr) -> (Endpoint, Connection, SendStream, RecvStream) {
    let (endpoint, connection) = raw_connect(address, b"godwit").await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(&greeting(1, proof(&connection, &SECRET, b"client"))).await.unwrap();
    let mut answer = [0; 32];
    receive.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, proof(&connection, &SECRET, b"server"));
    (endpoint, connection, send, receive)
}

/// Waits for the close and gives its code and text.
async fn close_of(connection: &Connection) -> (u64, String) {
    match tokio::time::timeout(PATIENCE, connection.closed()).await.unwrap() {
        quinn::ConnectionError::ApplicationClosed(close) => {
            (close.error_code.into_inner(), String::from_utf8(close.reason.to_vec()).unwrap())
        }
        other => panic!("closed by {other:?}"),
    }
}

#[tokio::test]
async fn a_wrong_token_is_refused_by_name_on_both_sides() {
    let listener = listener();
    let wrong = Token::from_bytes(&[8; 32]).unwrap();
    let calling = connect(listener.local_addr(), &wrong, Profile::Bulk, PATIENCE);
    let (client, server) = tokio::join!(calling, serve(&listener));
    for side in [client.unwrap_err(), server.unwrap_err()] {
        assert!(matches!(&side, Error::Refused { reason, .. } if reason.contains("token")), "{side:?}");
    }
    // The next caller, with the right one, is served.
    let (client, server) = tokio::join!(call(listener.local_addr()), serve(&listener));
    client.unwrap();
    server.unwrap();
}

#[tokio::test]
async fn greetings_that_prove_nothing_are_refused() {
    let listener = listener();
    let mut greetings: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("too short", b"GODWIT\x01\0abc".to_vec()),
        ("noise", vec![0xa5; 40]),
        ("a frame", FrameHeader::message(0, 0, 0).encode().unwrap().to_vec()),
        ("zero proof", greeting(1, [0; 32])),
    ];
    greetings.push(("wrong version and no proof", greeting(9, [1; 32])));
    for (what, bytes) in greetings {
        let caller = async {
            let (_endpoint, connection) = raw_connect(listener.local_addr(), b"godwit").await.unwrap();
            let (mut send, mut receive) = connection.open_bi().await.unwrap();
            send.write_all(&bytes).await.unwrap();
            send.finish().unwrap();
            // Nothing is said but the close.
            assert!(receive.read_to_end(1000).await.is_err(), "{what}");
            close_of(&connection).await
        };
        let (heard, served) = tokio::join!(caller, serve(&listener));
        assert!(matches!(served, Err(Error::Refused { .. })), "{what}: {served:?}");
        assert_eq!(heard.0, u64::from(CODE_AUTH_FAILED), "{what}");
        assert!(heard.1.contains("token"), "{what}: {}", heard.1);
    }
}

#[tokio::test]
async fn a_silent_caller_is_refused_in_time() {
    let listener = listener();
    let caller = async {
        let (_endpoint, connection) = raw_connect(listener.local_addr(), b"godwit").await.unwrap();
        close_of(&connection).await
    };
    let (heard, served) = tokio::join!(caller, serve(&listener));
    assert!(matches!(served, Err(Error::Refused { .. })));
    assert_eq!(heard.0, u64::from(CODE_AUTH_FAILED));
}

#[tokio::test]
async fn a_caller_gets_one_stream_and_no_other_way_to_fill_memory() {
    let listener = listener();
    let caller = async {
        let (_endpoint, connection) = raw_connect(listener.local_addr(), b"godwit").await.unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(b"GODWIT").await.unwrap();
        let short = Duration::from_millis(100);
        assert!(tokio::time::timeout(short, connection.open_bi()).await.is_err());
        assert!(tokio::time::timeout(short, connection.open_uni()).await.is_err());
        assert!(connection.max_datagram_size().is_none());
        close_of(&connection).await
    };
    let (heard, served) = tokio::join!(caller, serve(&listener));
    assert!(matches!(served, Err(Error::Refused { .. })));
    assert_eq!(heard.0, u64::from(CODE_AUTH_FAILED));
}

#[tokio::test]
async fn another_protocol_is_turned_away_by_tls() {
    let listener = listener();
    let (refused, served) = tokio::join!(raw_connect(listener.local_addr(), b"h3"), serve(&listener));
    assert!(refused.is_err() && served.is_err());
}

#[tokio::test]
async fn another_version_is_refused_by_name() {
    let listener = listener();
    let caller = async {
        let (_endpoint, connection) = raw_connect(listener.local_addr(), b"godwit").await.unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(&greeting(9, proof(&connection, &SECRET, b"client"))).await.unwrap();
        close_of(&connection).await
    };
    let (heard, served) = tokio::join!(caller, serve(&listener));
    assert!(matches!(served, Err(Error::Version { .. })));
    assert_eq!(heard.0, u64::from(CODE_VERSION));
    assert!(heard.1.contains("version 1") && heard.1.contains("version 9"), "{}", heard.1);
}

/// The client believes it talks to the server; somebody in between passes every byte of both on, decrypted and
/// encrypted again.
#[tokio::test]
async fn a_relay_in_the_middle_is_refused_by_both() {
    let listener = listener();
    let middle = raw_listener();
    let middle_address = middle.local_addr().unwrap();
    let relay = tokio::spawn({
        let server_address = listener.local_addr();
        async move {
            let to_client = middle.accept().await.unwrap().await.unwrap();
            let (mut client_send, mut client_receive) = to_client.accept_bi().await.unwrap();
            let (_endpoint, to_server) = raw_connect(server_address, b"godwit").await.unwrap();
            let (mut server_send, mut server_receive) = to_server.open_bi().await.unwrap();
            let mut greeting = [0; 40];
            client_receive.read_exact(&mut greeting).await.unwrap();
            server_send.write_all(&greeting).await.unwrap();
            // The server must not answer. If it does, its proof is passed on, and the other half of the test fails too.
            let mut answer = [0; 32];
            let answered = server_receive.read_exact(&mut answer).await.is_ok();
            client_send.write_all(&answer).await.unwrap();
            to_client.closed().await;
            answered
        }
    });
    let (client, server) = tokio::join!(call(middle_address), serve(&listener));
    assert!(matches!(client, Err(Error::Refused { .. })), "{client:?}");
    assert!(matches!(server, Err(Error::Refused { .. })), "{server:?}");
    assert!(!relay.await.unwrap());
}

/// Even the true server's proof, made in a session of its own, convinces no client of another session.
#[tokio::test]
async fn a_server_proof_of_another_session_is_refused() {
    let listener = listener();
    let middle = raw_listener();
    let middle_address = middle.local_addr().unwrap();
    let relay = async {
        // With the token in hand the middle gets a genuine proof out of the server ...
        let (_endpoint, connection, _send, _receive) = raw_authenticated(listener.local_addr()).await;
        let genuine = proof(&connection, &SECRET, b"server");
        // ... and replays it to a client.
        let to_client = middle.accept().await.unwrap().await.unwrap();
        let (mut send, _receive) = to_client.accept_bi().await.unwrap();
        send.write_all(&genuine).await.unwrap();
        close_of(&to_client).await
    };
    let (heard, served, client) = tokio::join!(relay, serve(&listener), call(middle_address));
    served.unwrap();
    assert!(matches!(client, Err(Error::Refused { .. })), "{client:?}");
    assert_eq!(heard.0, u64::from(CODE_AUTH_FAILED));
}

/// A server without the token sends the client's own proof back, or says nothing and ends.
#[tokio::test]
async fn a_reflected_or_missing_server_proof_is_refused() {
    for reflects in [true, false] {
        let fake = raw_listener();
        let address = fake.local_addr().unwrap();
        let serving = async {
            let connection = fake.accept().await.unwrap().await.unwrap();
            let (mut send, mut receive) = connection.accept_bi().await.unwrap();
            let mut greeting = [0; 40];
            receive.read_exact(&mut greeting).await.unwrap();
            if reflects {
                send.write_all(&greeting[8..]).await.unwrap();
            } else {
                send.finish().unwrap();
            }
            close_of(&connection).await
        };
        let (heard, client) = tokio::join!(serving, call(address));
        assert!(matches!(client, Err(Error::Refused { .. })), "{client:?}");
        assert_eq!(heard.0, u64::from(CODE_AUTH_FAILED));
    }
}

#[tokio::test]
async fn garbage_instead_of_frames_closes_the_link() {
    let whole = FrameHeader::message(1, 1, 100).encode().unwrap();
    let oversized = {
        let mut header = whole;
        header[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        header.to_vec()
    };
    let corrupt = [&FrameHeader::message(1, 1, 3).with_checksum(b"abc").encode().unwrap()[..], b"abd"].concat();
    let cases: [(&str, Vec<u8>); 6] = [
        ("noise", vec![0xee; 4096]),
        ("zeroes", vec![0; HEADER_SIZE]),
        ("a length past the limit", oversized),
        ("an end inside a header", whole[..17].to_vec()),
        ("an end inside a payload", [&whole[..], &[1; 99]].concat()),
        ("a checksum that is not the payload's", corrupt),
    ];
    for (what, bytes) in cases {
        let listener = listener();
        let (raw, served) = tokio::join!(raw_authenticated(listener.local_addr()), serve(&listener));
        let (_endpoint, connection, mut send, _receive) = raw;
        let (link, channel) = served.unwrap();
        let (_sender, mut receiver) = channel.split();
        send.write_all(&bytes).await.unwrap();
        send.finish().unwrap();
        let refused = receiver.receive().await;
        assert!(matches!(refused, Err(Error::Protocol { .. })), "{what}: {refused:?}");
        assert_eq!(close_of(&connection).await.0, u64::from(CODE_PROTOCOL), "{what}");
        assert!(matches!(link.closed().await, Error::Closed));
    }
}

#[tokio::test]
async fn bytes_by_drops_make_the_same_frames() {
    let listener = listener();
    let (raw, served) = tokio::join!(raw_authenticated(listener.local_addr()), serve(&listener));
    let (_endpoint, _connection, mut send, _receive) = raw;
    let (_link, channel) = served.unwrap();
    let (_sender, mut receiver) = channel.split();
    let frame = |id: u64| {
        let header = FrameHeader::message(2, id, 50).encode().unwrap();
        [&header[..], &[id as u8; 50]].concat()
    };
    let sending = async {
        for byte in frame(1).into_iter().chain(frame(2)).collect::<Vec<u8>>().chunks(7) {
            send.write_chunk(Bytes::copy_from_slice(byte)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        send.finish().unwrap();
    };
    let receiving = async {
        for id in 1..=2 {
            let got = receiver.receive().await.unwrap().unwrap();
            assert_eq!((got.header.id, &got.payload[..]), (id, &[id as u8; 50][..]));
        }
        assert!(receiver.receive().await.unwrap().is_none());
    };
    tokio::join!(sending, receiving);
}

#[tokio::test]
async fn a_reset_stream_is_the_peers_doing() {
    let listener = listener();
    let (raw, served) = tokio::join!(raw_authenticated(listener.local_addr()), serve(&listener));
    let (_endpoint, _connection, mut send, _receive) = raw;
    let (_link, channel) = served.unwrap();
    let (_sender, mut receiver) = channel.split();
    send.reset(VarInt::from_u32(77)).unwrap();
    let ended = receiver.receive().await;
    assert!(matches!(ended, Err(Error::PeerClosed { code: 77, .. })), "{ended:?}");
}
