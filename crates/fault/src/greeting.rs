//! How a source and a fault service begin to talk: Hello, Welcome.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use godwit_carry::{
    CODE_PROTOCOL, CODE_VERSION, Channel, Complaints, Link, PROTOCOL_VERSION, Receiver, Sender, Timing,
};
use godwit_proto::Typed;
use godwit_proto::wire::{Failure, FailureCode, Hello, Role, Welcome};

use crate::error::{Error, MigrationId, Result};
use crate::fault_side::chain;

/// Close code: no such migration here (yet).
pub(crate) const CODE_UNKNOWN: u32 = 16;
/// Close code: a newer link took over.
pub(crate) const CODE_REPLACED: u32 = 17;

/// Close code: the service is not the host that the process was given to.
pub(crate) const CODE_STRANGER: u32 = 18;

/// Close code: the source has said that it knows the end, and leaves.
pub(crate) const CODE_ACKNOWLEDGED: u32 = 19;

/// How long is too long on these links. A service that was killed says nothing, and its successor is waited for; calling once
/// too often costs a few milliseconds.
pub(crate) fn timing() -> Timing {
    Timing { keep_alive: Duration::from_millis(300), idle: Duration::from_millis(2500), ..Timing::default() }
}

const LIMIT: Duration = Duration::from_secs(5);

/// Sends a message.
pub(crate) async fn say<M: Typed>(sender: &mut Sender, id: u64, message: &M) -> Result<()> {
    Ok(sender.send_message(M::TYPE as u32, id, Bytes::from(message.encode_to_vec())).await?)
}

/// Takes a message of one type apart; `None` when it is another or does not decode.
pub(crate) fn decode<M: Typed>(frame: &godwit_carry::Frame) -> Option<M> {
    (frame.message_type()? == M::TYPE as u32).then(|| godwit_proto::decode(&frame.payload).ok())?
}

/// Waits for the one message that may come now.
pub(crate) async fn expect<M: Typed>(link: &Link, receiver: &mut Receiver) -> Result<M> {
    let violated = |what: String| Error::Protocol { address: link.remote_address(), what };
    let frame = tokio::time::timeout(LIMIT, receiver.receive())
        .await
        .map_err(|_| violated(format!("no {:?} in time", M::TYPE)))??
        .ok_or_else(|| violated(format!("the peer left instead of saying {:?}", M::TYPE)))?;
    if let Some(failure) = decode::<Failure>(&frame) {
        if failure.code == FailureCode::Process as i32 {
            return Err(Error::NotDrained { address: link.remote_address() });
        }
        return Err(violated(format!("the peer says: {}", shortened(&failure.text))));
    }
    decode(&frame).ok_or_else(|| violated(format!("something else instead of {:?}", M::TYPE)))
}

/// The source's side: says which migration and what the link is for.
pub(crate) async fn introduce(
    (link, channel): (Link, Channel),
    id: MigrationId,
    role: Role,
) -> Result<(Link, Sender, Receiver)> {
    let (mut sender, mut receiver) = channel.split();
    let version = u32::from(PROTOCOL_VERSION);
    let hello = Hello {
        oldest_version: version,
        newest_version: version,
        migration_id: id.0.to_vec(),
        role: role.into(),
        ..Hello::default()
    };
    say(&mut sender, 0, &hello).await?;
    let welcome: Welcome = expect(&link, &mut receiver).await?;
    if welcome.version != version {
        link.close(CODE_VERSION, "no such version");
        let what = format!("the service chose version {}, not {version}", welcome.version);
        return Err(Error::Protocol { address: link.remote_address(), what });
    }
    Ok((link, sender, receiver))
}

/// The destination's side: finds what the caller is about by `find`, and says so.
pub(crate) async fn receive<T>(
    (link, channel): (Link, Channel),
    role: Role,
    find: impl FnOnce(MigrationId) -> Option<T>,
) -> Result<(T, Link, Sender, Receiver)> {
    let (mut sender, mut receiver) = channel.split();
    let hello: Hello = expect(&link, &mut receiver).await?;
    let version = u32::from(PROTOCOL_VERSION);
    let found = if !(hello.oldest_version..=hello.newest_version).contains(&version) {
        Err((CODE_VERSION, FailureCode::Version, format!("this service speaks version {version}")))
    } else if hello.role != role as i32 {
        Err((CODE_PROTOCOL, FailureCode::Protocol, format!("this port is for {role:?}")))
    } else {
        MigrationId::from_slice(&hello.migration_id).and_then(find).ok_or((
            CODE_UNKNOWN,
            FailureCode::Process,
            "no such migration is being drained here".to_owned(),
        ))
    };
    match found {
        Ok(found) => {
            say(&mut sender, 0, &Welcome { version, ..Welcome::default() }).await?;
            Ok((found, link, sender, receiver))
        }
        Err((code, kind, text)) => {
            let is_over = code == CODE_UNKNOWN;
            let failure =
                Failure { phase: "drain".into(), text: text.clone(), code: kind.into(), ..Failure::default() };
            say(&mut sender, 0, &failure).await?;
            let _ = tokio::time::timeout(Duration::from_millis(500), sender.finish()).await;
            link.close(code, &text);
            let address = link.remote_address();
            // A source calls before it is known whether any page will be missed, and again until it knows that none is.
            Err(if is_over { Error::NotDrained { address } } else { Error::Protocol { address, what: text } })
        }
    }
}

/// Says that a caller was turned away, who may be anybody.
pub(crate) fn tell_turned_away(address: SocketAddr, error: Error) {
    static COMPLAINTS: Complaints = Complaints::new();
    if let Some(others) = COMPLAINTS.one_more() {
        tracing::info!(%address, error = %chain(&error), "a caller for missing pages was turned away{others}");
    }
}

/// Says that a link has ended before all was said on it.
pub(crate) fn tell_end(what: &str, address: SocketAddr, error: &Error) {
    if matches!(error, Error::NotDrained { .. }) {
        tracing::debug!(%address, what, "a source has called for a migration that needs no pages here");
    } else {
        tracing::info!(%address, error = %chain(error), "{what} ended");
    }
}

/// A peer's words, fit to be shown.
pub(crate) fn shortened(text: &str) -> String {
    text.chars().take(300).map(|character| if character.is_control() { ' ' } else { character }).collect()
}
