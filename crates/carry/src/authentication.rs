//! The first bytes on the channel. Where a token is shared, each side proves it to the other, bound to the TLS session.
//!
//! ```text
//! client → server   "GODWIT", version (u16, little endian), proof (32 bytes)
//! server → client   proof (32 bytes), or the connection is closed with a code and a text
//! ```
//! proof = HMAC-SHA256(token, exporter ‖ role), where the exporter is TLS keying material that differs for every
//! session. Somebody in the middle has two sessions, and a proof made in one fits not the other. The client
//! speaks first, and a server that does not like what it hears says nothing but why it closes. The version is
//! looked at only after the proof: this layout is the same in every version.
//!
//! Where hosts know each other by their keys all is proven by TLS, and what is said is the same without the proofs:
//! ```text
//! client → server   "GODWIT", version
//! server → client   "GODWIT", version, or the connection is closed with a code and a text
//! ```
//! The client waits for that, because its handshake is over before the server has looked at its certificate.

use quinn::{Connection, ReadExactError, RecvStream, SendStream, VarInt};

use crate::error::{CODE_AUTH_FAILED, CODE_VERSION, Error, Result};
use crate::socket;
use crate::token::{PROOF_SIZE, Role, Token};

/// The version of everything said on a channel after the proofs.
pub const PROTOCOL_VERSION: u16 = 1;

pub(crate) const MAGIC: &[u8; 6] = b"GODWIT";
const LABEL: &[u8] = b"godwit token v1";
const HAIL_SIZE: usize = MAGIC.len() + size_of::<u16>();
const GREETING_SIZE: usize = HAIL_SIZE + PROOF_SIZE;

/// Opens the stream, proves the token to the server and checks the server's proof.
pub(crate) async fn as_client(connection: &Connection, token: &Token) -> Result<(SendStream, RecvStream)> {
    let address = socket::canonical(connection.remote_address());
    let lost = |source| Error::connection(address, "proving the token", source);
    let exporter = exporter(connection, Role::Client)?;
    let mut greeting = Vec::with_capacity(GREETING_SIZE);
    greeting.extend_from_slice(MAGIC);
    greeting.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    greeting.extend_from_slice(&token.prove(&exporter, Role::Client));
    let (mut send, mut receive) = connection.open_bi().await.map_err(lost)?;
    send.write_all(&greeting).await.map_err(|source| Error::write(address, source))?;

    let mut proof = [0; PROOF_SIZE];
    match receive.read_exact(&mut proof).await {
        Ok(()) => {}
        Err(ReadExactError::ReadError(source)) => return Err(Error::read(address, source)),
        Err(ReadExactError::FinishedEarly(_)) => {
            return Err(refuse(connection, "the server proved no token"));
        }
    }
    if !token.verifies(&self::exporter(connection, Role::Server)?, Role::Server, &proof) {
        return Err(refuse(connection, "the server's token is not the one this side holds"));
    }
    Ok((send, receive))
}

/// Waits for the client's stream and proof, checks it and proves the token in return.
pub(crate) async fn as_server(connection: &Connection, token: &Token) -> Result<(SendStream, RecvStream)> {
    let address = socket::canonical(connection.remote_address());
    let lost = |source| Error::connection(address, "waiting for the token's proof", source);
    let (mut send, mut receive) = connection.accept_bi().await.map_err(lost)?;
    let mut greeting = [0; GREETING_SIZE];
    match receive.read_exact(&mut greeting).await {
        Ok(()) => {}
        Err(ReadExactError::ReadError(source)) => return Err(Error::read(address, source)),
        Err(ReadExactError::FinishedEarly(_)) => {
            return Err(refuse(connection, "the client proved no token"));
        }
    }
    let Some((version, proof)) = parse(&greeting) else {
        return Err(refuse(connection, "the client proved no token"));
    };
    if !token.verifies(&exporter(connection, Role::Client)?, Role::Client, &proof) {
        return Err(refuse(connection, "the client's token is not the one this side holds"));
    }
    check_version(connection, version)?;
    let proof = token.prove(&exporter(connection, Role::Server)?, Role::Server);
    send.write_all(&proof).await.map_err(|source| Error::write(address, source))?;
    Ok((send, receive))
}

/// Opens the stream to a server whose certificate is trusted, and waits until it has said the same of this side's.
pub(crate) async fn as_known_client(connection: &Connection) -> Result<(SendStream, RecvStream)> {
    let address = socket::canonical(connection.remote_address());
    let (mut send, mut receive) =
        connection.open_bi().await.map_err(|source| Error::connection(address, "greeting the page server", source))?;
    send.write_all(&hail()).await.map_err(|source| Error::write(address, source))?;
    match receive.read_exact(&mut [0; HAIL_SIZE]).await {
        Ok(()) => Ok((send, receive)),
        Err(ReadExactError::ReadError(source)) => Err(Error::read(address, source)),
        Err(ReadExactError::FinishedEarly(_)) => Err(refuse(connection, "the server does not answer the greeting")),
    }
}

/// Waits for the stream of a client whose certificate is trusted.
pub(crate) async fn as_known_server(connection: &Connection) -> Result<(SendStream, RecvStream)> {
    let address = socket::canonical(connection.remote_address());
    let lost = |source| Error::connection(address, "waiting for the greeting", source);
    let (mut send, mut receive) = connection.accept_bi().await.map_err(lost)?;
    let mut greeting = [0; HAIL_SIZE];
    match receive.read_exact(&mut greeting).await {
        Ok(()) => {}
        Err(ReadExactError::ReadError(source)) => return Err(Error::read(address, source)),
        Err(ReadExactError::FinishedEarly(_)) => return Err(refuse(connection, "the client says nothing")),
    }
    let Some(version) = greeting.strip_prefix(MAGIC).and_then(|version| version.try_into().ok()) else {
        return Err(refuse(connection, "the client's greeting is none"));
    };
    check_version(connection, u16::from_le_bytes(version))?;
    send.write_all(&hail()).await.map_err(|source| Error::write(address, source))?;
    Ok((send, receive))
}

fn hail() -> [u8; HAIL_SIZE] {
    let mut hail = [0; HAIL_SIZE];
    hail[..MAGIC.len()].copy_from_slice(MAGIC);
    hail[MAGIC.len()..].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    hail
}

/// Closes a connection whose client speaks another version, telling it so.
pub(crate) fn check_version(connection: &Connection, version: u16) -> Result<()> {
    if version == PROTOCOL_VERSION {
        return Ok(());
    }
    let reason = format!("this side speaks version {PROTOCOL_VERSION}, the client version {version}");
    connection.close(VarInt::from_u32(CODE_VERSION), reason.as_bytes());
    Err(Error::Version { address: socket::canonical(connection.remote_address()), reason })
}

/// Takes a greeting apart into version and proof; `None` when it is not one.
pub(crate) fn parse(greeting: &[u8; GREETING_SIZE]) -> Option<(u16, [u8; PROOF_SIZE])> {
    let (version, proof) = greeting.strip_prefix(MAGIC)?.split_first_chunk()?;
    Some((u16::from_le_bytes(*version), proof.try_into().ok()?))
}

/// Closes a connection whose peer proved nothing, telling it why, and makes the error that says so here.
pub(crate) fn refuse(connection: &Connection, reason: &str) -> Error {
    connection.close(VarInt::from_u32(CODE_AUTH_FAILED), reason.as_bytes());
    Error::Refused { address: socket::canonical(connection.remote_address()), reason: reason.to_owned() }
}

/// Takes from the TLS session what only its two ends know, for the side that is `role`.
pub(crate) fn exporter(connection: &Connection, role: Role) -> Result<[u8; 32]> {
    let mut material = [0; 32];
    connection
        .export_keying_material(&mut material, LABEL, role.name())
        .map_err(|_| Error::tls("bind the token to the TLS session", "no keying material for this length"))?;
    Ok(material)
}
