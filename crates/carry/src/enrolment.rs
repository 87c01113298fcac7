//! How two hosts get into each other's list by the code of an invitation.
//!
//! ```text
//! invited → inviting   "GODWIT", version (u16, little endian), id (8 bytes), proof (32), permission (1), name (1 + n)
//! inviting → invited   proof (32), name (1 + n), or the connection is closed with a code and a text
//! ```
//! Both show their certificates. The invited host goes on only if the other one's is that of the code; the proofs are those of the
//! token ([`crate::authentication`]), made of the code's secret and bound to this session, so what somebody in the middle picks up
//! is of no use. Who proves the secret and is the first to take the invitation is put into the list, then answers.

use std::net::SocketAddr;
use std::time::Duration;

use quinn::{Connection, ReadExactError, RecvStream, VarInt};

use crate::authentication::{self, MAGIC, PROTOCOL_VERSION};
use crate::connect;
use crate::credentials::Hosts;
use crate::error::{CODE_AUTH_FAILED, CODE_DONE, Error, Result};
use crate::fingerprint::Fingerprint;
use crate::identity::{self, Wanted, Way};
use crate::invitation::{Code, InvitationId, Invitations};
use crate::peers::{Peer, Permission, is_word};
use crate::socket;
use crate::token::{PROOF_SIZE, Role};
use crate::transport::Profile;

/// What those who prove nothing wait for their answer. They can do nothing with it, and guess slowly.
const DELAY: Duration = Duration::from_secs(1);
/// Time for the last words.
const PARTING: Duration = Duration::from_millis(300);

/// Accepts an invitation: calls the inviting host, proves the code's secret, and puts it into this host's list. `permission` is
/// what this host permits the other one, `name` what it calls itself.
///
/// # Errors
/// When nobody answers, another host does, or the invitation is not open any more.
pub async fn enrol(code: &Code, hosts: &Hosts, name: &str, permission: Permission, timeout: Duration) -> Result<Peer> {
    let mut last = Error::Resolve { host: code.address().host().to_owned(), source: None };
    for address in code.address().resolve().await? {
        let address = socket::canonical(address);
        let attempt = tokio::time::timeout(timeout, accept(code, hosts, (name, permission), address)).await;
        match attempt.unwrap_or(Err(Error::TimedOut { address, during: "accepting an invitation" })) {
            Err(error @ (Error::TimedOut { .. } | Error::Lost { .. } | Error::Socket { .. })) => last = error,
            answered => return answered,
        }
    }
    Err(last)
}

async fn accept(
    code: &Code,
    hosts: &Hosts,
    (name, permission): (&str, Permission),
    address: SocketAddr,
) -> Result<Peer> {
    let endpoint = socket::endpoint(socket::unspecified_for(address), Profile::Faults, None)?;
    let wanted = Wanted::Exactly(code.fingerprint());
    let (config, seen) = identity::client(Way::Enrolment, Some(hosts.key.certified()), wanted)?;
    let accepted = async {
        let connection = connect::shake_hands(&endpoint, config, address, Profile::Faults).await?;
        let answered = ask(&connection, code, name, permission).await?;
        connection.close(VarInt::from_u32(CODE_DONE), b"enrolled");
        Ok(answered)
    };
    let accepted: Result<String> = accepted.await;
    // N.B. the closing words leave only while the runtime runs.
    let _ = tokio::time::timeout(PARTING, endpoint.wait_idle()).await;
    let answer = accepted.map_err(|error| explain(error, code, seen.presented()))?;
    let place = code.address().to_string();
    let called = if is_word(&answer) { answer } else { code.address().host().to_owned() };
    let peer = Peer::new(&called, code.fingerprint(), Some(&place), permission, "trust")?;
    hosts.peers.add(&peer)?;
    Ok(peer)
}

/// Says who one is and that one is invited; gives the other host's name.
async fn ask(connection: &Connection, code: &Code, name: &str, permission: Permission) -> Result<String> {
    let address = socket::canonical(connection.remote_address());
    let token = code.token();
    let lost = |source| Error::connection(address, "accepting an invitation", source);
    let (mut send, mut receive) = connection.open_bi().await.map_err(lost)?;
    let mut words = Vec::new();
    words.extend_from_slice(MAGIC);
    words.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    words.extend_from_slice(code.id().bytes());
    words.extend_from_slice(&token.prove(&authentication::exporter(connection, Role::Client)?, Role::Client));
    words.push(permission as u8);
    put_name(&mut words, name);
    send.write_all(&words).await.map_err(|source| Error::write(address, source))?;
    let mut proof = [0; PROOF_SIZE];
    read(&mut receive, &mut proof, address).await?;
    if !token.verifies(&authentication::exporter(connection, Role::Server)?, Role::Server, &proof) {
        return Err(authentication::refuse(connection, "the inviting host does not know the secret of the code"));
    }
    take_name(&mut receive, address).await
}

/// Serves a caller that says it is invited, and puts it into the list if it is.
pub(crate) async fn serve(connection: &Connection, hosts: &Hosts, invitations: &Invitations) -> Result<Peer> {
    let address = socket::canonical(connection.remote_address());
    let Some(fingerprint) = identity::peer_fingerprint(connection) else {
        return Err(authentication::refuse(connection, "the caller shows no certificate"));
    };
    let lost = |source| Error::connection(address, "waiting for an invitation's proof", source);
    let (mut send, mut receive) = connection.accept_bi().await.map_err(lost)?;
    let mut head = [0; MAGIC.len() + size_of::<u16>() + InvitationId::SIZE];
    read(&mut receive, &mut head, address).await?;
    let mut proof = [0; PROOF_SIZE];
    read(&mut receive, &mut proof, address).await?;
    let mut permission = [0];
    read(&mut receive, &mut permission, address).await?;
    let name = take_name(&mut receive, address).await?;

    let parsed = head.strip_prefix(MAGIC).and_then(|rest| rest.split_first_chunk());
    let Some((version, id)) =
        parsed.and_then(|(version, id)| Some((*version, InvitationId::from_bytes(id.try_into().ok()?))))
    else {
        return Err(authentication::refuse(connection, "what the caller says is no answer to an invitation"));
    };
    authentication::check_version(connection, u16::from_le_bytes(version))?;
    let open = invitations.find(id);
    let proven = match &open {
        Some(open) => open.token().verifies(&authentication::exporter(connection, Role::Client)?, Role::Client, &proof),
        None => false,
    };
    let taken = proven && open.as_ref().is_some_and(|open| invitations.take(open));
    if let (false, Some(open)) = (proven, &open) {
        invitations.was_wrong(open);
    }
    let (true, Some(open)) = (taken, open) else {
        tokio::time::sleep(DELAY).await;
        return Err(authentication::refuse(
            connection,
            "this invitation is not open: it was used, has expired, or never was",
        ));
    };
    let peer = describe(&name, fingerprint, address, permission[0])?;
    if let Err(error) = hosts.peers.add(&peer) {
        connection
            .close(VarInt::from_u32(CODE_AUTH_FAILED), b"the inviting host cannot write its list of trusted hosts");
        return Err(error);
    }
    let mut words = Vec::new();
    words.extend_from_slice(&open.token().prove(&authentication::exporter(connection, Role::Server)?, Role::Server));
    put_name(&mut words, &own_name());
    // The caller is in the list by now; what fails from here on it hears of, or finds out.
    let _ = send.write_all(&words).await;
    let _ = send.finish();
    let _ = tokio::time::timeout(PARTING, connection.closed()).await;
    Ok(peer)
}

fn describe(name: &str, fingerprint: Fingerprint, address: SocketAddr, permission: u8) -> Result<Peer> {
    let theirs = [Permission::Both, Permission::Sending, Permission::Receiving]
        .into_iter()
        .find(|known| *known as u8 == permission)
        // Something later: as little as there is.
        .unwrap_or(Permission::Sending);
    let place = address.ip().to_string();
    let name = if is_word(name) { name } else { &place };
    Peer::new(name, fingerprint, Some(&place), theirs.reversed(), "invite")
}

/// What this host calls itself.
pub fn own_name() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    name.filter(|name| is_word(name)).unwrap_or_else(|| "host".to_owned())
}

fn put_name(words: &mut Vec<u8>, name: &str) {
    let name = &name.as_bytes()[..name.len().min(usize::from(u8::MAX))];
    words.push(name.len() as u8);
    words.extend_from_slice(name);
}

async fn take_name(receive: &mut RecvStream, address: SocketAddr) -> Result<String> {
    let mut length = [0];
    read(receive, &mut length, address).await?;
    let mut name = vec![0; length[0].into()];
    read(receive, &mut name, address).await?;
    Ok(String::from_utf8_lossy(&name).into_owned())
}

async fn read(receive: &mut RecvStream, into: &mut [u8], address: SocketAddr) -> Result<()> {
    match receive.read_exact(into).await {
        Ok(()) => Ok(()),
        Err(ReadExactError::ReadError(source)) => Err(Error::read(address, source)),
        Err(ReadExactError::FinishedEarly(_)) => {
            Err(Error::Protocol { address, what: "it ends in the middle of an enrolment".into() })
        }
    }
}

/// Says what an end of the handshake means where somebody was invited.
fn explain(error: Error, code: &Code, presented: Option<Fingerprint>) -> Error {
    match (error, presented) {
        (Error::Alert { address, by_peer: false, .. }, Some(presented)) if presented != code.fingerprint() => {
            let (expected, presented) = (Box::new(code.fingerprint()), Box::new(presented));
            Error::Impostor { address, expected, presented }
        }
        (Error::Alert { address, by_peer: true, .. }, _) => {
            let reason = "nobody is invited there any more: the invitation was used or has expired, or the page server \
                          was started with --token-file or another --config-dir";
            Error::Refused { address, reason: reason.into() }
        }
        (error, _) => error,
    }
}
