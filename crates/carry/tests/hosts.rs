//! Hosts that know each other by their keys: enrolment, revocation, and those who are not in the list.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use godwit_carry::*;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(10);
const LOCAL: &str = "127.0.0.1:0";

/// A host's configuration directory, and what is in it.
struct Host {
    directory: TempDir,
    hosts: Hosts,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let hosts = Hosts::load(directory.path()).unwrap();
        Self { directory, hosts }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn fingerprint(&self) -> Fingerprint {
        self.hosts.key.fingerprint()
    }

    fn trusts(&self, other: &Self, permission: Permission) {
        let peer = Peer::new("other", other.fingerprint(), None, permission, "test").unwrap();
        self.hosts.peers.add(&peer).unwrap();
    }

    fn listener(&self) -> Listener {
        self.listener_of(self.hosts.clone())
    }

    fn listener_of(&self, credentials: impl Into<Credentials>) -> Listener {
        let listener = Listener::bind(LOCAL.parse().unwrap(), credentials, Profile::Bulk).unwrap();
        listener.with_invitations(Invitations::in_directory(self.path()))
    }

    fn invite(&self, at: SocketAddr) -> Code {
        let address = HostPort::parse(&at.to_string(), DEFAULT_PORT).unwrap();
        Invitations::in_directory(self.path()).create(self.fingerprint(), address, DEFAULT_VALIDITY).unwrap()
    }
}

/// Calls and answers; what each side makes of it.
async fn meet(
    listener: &Listener,
    caller: impl Into<Credentials>,
) -> (Result<(Link, Channel)>, Result<(Link, Channel)>) {
    tokio::join!(connect(listener.local_addr(), caller, Profile::Bulk, PATIENCE), async {
        listener.accept().await.unwrap().authenticate().await
    })
}

/// Answers calls until told otherwise, and keeps what became of them.
fn answering(listener: Listener) -> tokio::sync::mpsc::UnboundedReceiver<Result<Answered>> {
    let (tell, told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(incoming) = listener.accept().await {
            let tell = tell.clone();
            tokio::spawn(async move { tell.send(incoming.answer().await) });
        }
    });
    told
}

#[tokio::test]
async fn hosts_in_each_others_list_are_linked_and_named() {
    let (source, destination) = (Host::new(), Host::new());
    source.trusts(&destination, Permission::Sending);
    destination.trusts(&source, Permission::Receiving);
    let listener = destination.listener();
    let (client, server) = meet(&listener, source.hosts.clone()).await;
    let ((client, channel), (server, other)) = (client.unwrap(), server.unwrap());
    assert_eq!(client.peer().unwrap().fingerprint, destination.fingerprint());
    assert_eq!(server.peer().unwrap().fingerprint, source.fingerprint());
    channel.split().0.send_message(1, 2, Bytes::from_static(b"over")).await.unwrap();
    let frame = other.split().1.receive().await.unwrap().unwrap();
    assert_eq!(&frame.payload[..], b"over");
}

/// The command in an error's remedy is what has to be done, so it is done here.
fn obey(error: &Error, host: &Host) {
    let remedy = error.remedy().unwrap();
    let words: Vec<&str> = remedy.split_once("migrate hosts add ").unwrap().1.split([' ', ';']).collect();
    assert_eq!(words[1], "--name");
    let peer = Peer::new(words[2], words[0].parse().unwrap(), None, Permission::Both, "test").unwrap();
    host.hosts.peers.add(&peer).unwrap();
}

#[tokio::test]
async fn an_unknown_host_is_refused_with_what_admits_it_at_both_ends() {
    let (source, destination) = (Host::new(), Host::new());
    let listener = destination.listener();
    // Neither knows the other: the caller looks first.
    let (client, server) = meet(&listener, source.hosts.clone()).await;
    let (client, server) = (client.unwrap_err(), server.unwrap_err());
    assert!(
        matches!(&client, Error::Untrusted { fingerprint, .. } if **fingerprint == destination.fingerprint()),
        "{client}"
    );
    assert!(matches!(&server, Error::NotTrusted { own, .. } if **own == destination.fingerprint()), "{server}");
    assert!(client.remedy().unwrap().contains(&format!("--config-dir {}", source.path().display())));
    obey(&client, &source);
    // Now the server does not know the caller.
    let (client, server) = meet(&listener, source.hosts.clone()).await;
    let (client, server) = (client.unwrap_err(), server.unwrap_err());
    assert!(matches!(&client, Error::NotTrusted { own, .. } if **own == source.fingerprint()), "{client}");
    assert!(
        matches!(&server, Error::Untrusted { fingerprint, .. } if **fingerprint == source.fingerprint()),
        "{server}"
    );
    assert!(server.to_string().contains(&source.fingerprint().to_string()));
    obey(&client, &destination);
    let (client, server) = meet(&listener, source.hosts.clone()).await;
    assert!(client.is_ok() && server.is_ok());
}

#[tokio::test]
async fn a_revoked_host_is_refused_by_a_listener_that_runs() {
    let (source, destination) = (Host::new(), Host::new());
    source.trusts(&destination, Permission::Both);
    destination.trusts(&source, Permission::Both);
    let listener = destination.listener();
    let (client, server) = meet(&listener, source.hosts.clone()).await;
    let ((_link, channel), (_server, other)) = (client.unwrap(), server.unwrap());
    assert!(destination.hosts.peers.remove(source.fingerprint()).unwrap());
    let (client, server) = meet(&listener, source.hosts.clone()).await;
    assert!(matches!(client, Err(Error::NotTrusted { .. })), "{client:?}");
    assert!(matches!(server, Err(Error::Untrusted { .. })), "{server:?}");
    // What is under way may end.
    channel.split().0.send_message(1, 2, Bytes::new()).await.unwrap();
    assert!(other.split().1.receive().await.unwrap().is_some());
}

#[tokio::test]
async fn an_entry_for_one_direction_is_good_for_no_other() {
    let (source, destination) = (Host::new(), Host::new());
    source.trusts(&destination, Permission::Both);
    destination.trusts(&source, Permission::Sending);
    let listener = destination.listener();
    let (client, server) = meet(&listener, source.hosts.clone()).await;
    assert!(matches!(client, Err(Error::NotTrusted { .. })));
    assert!(server.unwrap_err().to_string().contains("direction"));
    destination.trusts(&source, Permission::Receiving);
    source.trusts(&destination, Permission::Receiving);
    let (client, _) = meet(&listener, source.hosts.clone()).await;
    assert!(client.unwrap_err().to_string().contains("direction"));
}

#[tokio::test]
async fn a_damaged_entry_is_no_trust() {
    let (source, destination) = (Host::new(), Host::new());
    source.trusts(&destination, Permission::Both);
    destination.trusts(&source, Permission::Both);
    std::fs::write(destination.path().join("peers").join(source.fingerprint().to_string()), "name\n").unwrap();
    let listener = destination.listener();
    let (client, server) = meet(&listener, source.hosts.clone()).await;
    assert!(matches!(client, Err(Error::NotTrusted { .. })));
    assert!(server.unwrap_err().to_string().contains("migrate hosts"));
}

#[tokio::test]
async fn two_ways_of_proving_do_not_meet_and_say_so() {
    let (source, destination) = (Host::new(), Host::new());
    let token = Token::from_bytes(&[7; 32]).unwrap();
    let listener = destination.listener_of(token.clone());
    let (client, server) = meet(&listener, source.hosts.clone()).await;
    for side in [client.unwrap_err(), server.unwrap_err()] {
        assert!(matches!(side, Error::Modes { .. }), "{side:?}");
        assert!(side.remedy().unwrap().contains("--token-file"));
    }
    let listener = destination.listener();
    let (client, server) = meet(&listener, token).await;
    for side in [client.unwrap_err(), server.unwrap_err()] {
        assert!(matches!(side, Error::Modes { .. }), "{side:?}");
    }
}

/// A token that lies in the usual place counts until somebody is trusted; that needs no new start.
#[tokio::test]
async fn a_token_gives_way_to_the_first_trusted_host() {
    let (source, destination) = (Host::new(), Host::new());
    let token = Token::from_bytes(&[7; 32]).unwrap();
    let listener = destination.listener_of(Credentials::Undecided(destination.hosts.clone(), token.clone()));
    let calling = Credentials::Undecided(source.hosts.clone(), token.clone());
    let (client, server) = meet(&listener, calling.clone()).await;
    assert!(client.unwrap().0.peer().is_none() && server.unwrap().0.peer().is_none());
    let (client, server) = meet(&listener, Token::from_bytes(&[8; 32]).unwrap()).await;
    assert!(matches!((client, server), (Err(Error::Refused { .. }), Err(Error::Refused { .. }))));
    let code = destination.invite(listener.local_addr());
    let (enrolled, answered) = tokio::join!(enrol(&code, &source.hosts, "source", Permission::Both, PATIENCE), async {
        listener.accept().await.unwrap().answer().await
    });
    enrolled.unwrap();
    assert!(matches!(answered, Ok(Answered::Enrolled(_))));
    let (client, server) = meet(&listener, calling).await;
    assert!(client.unwrap().0.peer().is_some() && server.unwrap().0.peer().is_some());
    let (client, server) = meet(&listener, token).await;
    assert!(matches!((client, server), (Err(Error::Modes { .. }), Err(Error::Modes { .. }))));
}

#[tokio::test]
async fn a_code_enrols_both_once() {
    let (source, destination) = (Host::new(), Host::new());
    let listener = destination.listener();
    let address = listener.local_addr();
    let mut answered = answering(listener);
    let code = Code::parse(&destination.invite(address).reveal()).unwrap();
    let enrolled = enrol(&code, &source.hosts, "source", Permission::Sending, PATIENCE).await.unwrap();
    assert_eq!((enrolled.fingerprint, enrolled.permission), (destination.fingerprint(), Permission::Sending));
    assert_eq!(enrolled.address, Some(address.to_string()));
    let Ok(Answered::Enrolled(peer)) = answered.recv().await.unwrap() else { panic!("nobody was enrolled") };
    assert_eq!((peer.name.as_str(), peer.permission), ("source", Permission::Receiving));
    assert_eq!(destination.hosts.peers.find(source.fingerprint()).unwrap(), Some(peer));
    assert!(connect(address, source.hosts.clone(), Profile::Bulk, PATIENCE).await.is_ok());
    answered.recv().await.unwrap().unwrap();
    // A second one with the same code is too late.
    let late = Host::new();
    let refused = enrol(&code, &late.hosts, "late", Permission::Both, PATIENCE).await.unwrap_err();
    assert!(refused.to_string().contains("invit"), "{refused}");
    assert!(late.hosts.peers.is_empty());
    assert_eq!(destination.hosts.peers.find(late.fingerprint()).unwrap(), None);
}

#[tokio::test]
async fn of_many_with_the_same_code_one_is_enrolled() {
    let destination = Host::new();
    let listener = destination.listener();
    let address = listener.local_addr();
    let mut answered = answering(listener);
    let code = destination.invite(address);
    let callers: Vec<Host> = (0..8).map(|_| Host::new()).collect();
    let calls: Vec<_> = callers
        .iter()
        .map(|caller| {
            let (code, hosts) = (code.clone(), caller.hosts.clone());
            tokio::spawn(async move { enrol(&code, &hosts, "caller", Permission::Both, PATIENCE).await })
        })
        .collect();
    let mut enrolled = 0;
    for call in calls {
        enrolled += usize::from(call.await.unwrap().is_ok());
    }
    assert_eq!(enrolled, 1);
    assert_eq!(destination.hosts.peers.list().unwrap().0.len(), 1);
    let mut admitted = 0;
    for _ in &callers {
        admitted += usize::from(matches!(answered.recv().await, Some(Ok(Answered::Enrolled(_)))));
    }
    assert_eq!(admitted, 1);
}

#[tokio::test]
async fn a_wrong_secret_enrols_nobody_and_burns_nothing() {
    let (source, destination) = (Host::new(), Host::new());
    let listener = destination.listener();
    let address = listener.local_addr();
    let _answered = answering(listener);
    let good = destination.invite(address);
    // Codes of the same host that it has never given out.
    let elsewhere = tempfile::tempdir().unwrap();
    let place = HostPort::parse(&address.to_string(), DEFAULT_PORT).unwrap();
    let guess = || {
        Invitations::in_directory(elsewhere.path())
            .create(destination.fingerprint(), place.clone(), DEFAULT_VALIDITY)
            .unwrap()
    };
    let guesses: Vec<_> = (0..8)
        .map(|_| {
            let (code, hosts) = (guess(), source.hosts.clone());
            tokio::spawn(async move { enrol(&code, &hosts, "guess", Permission::Both, PATIENCE).await })
        })
        .collect();
    for guess in guesses {
        let refused = guess.await.unwrap().unwrap_err();
        assert!(refused.to_string().contains("not open"), "{refused}");
    }
    assert!(destination.hosts.peers.is_empty() && source.hosts.peers.is_empty());
    enrol(&good, &source.hosts, "source", Permission::Both, PATIENCE).await.unwrap();
}

#[tokio::test]
async fn another_host_than_that_of_the_code_learns_nothing() {
    let (source, destination, impostor) = (Host::new(), Host::new(), Host::new());
    let listener = impostor.listener();
    let address = listener.local_addr();
    let mut answered = answering(listener);
    // It invites somebody, too, or it would not even talk of enrolment.
    impostor.invite(address);
    let code = destination.invite(address);
    let refused = enrol(&code, &source.hosts, "source", Permission::Both, PATIENCE).await.unwrap_err();
    assert!(
        matches!(&refused, Error::Impostor { presented, .. } if **presented == impostor.fingerprint()),
        "{refused:?}"
    );
    assert!(answered.recv().await.unwrap().is_err());
    assert!(source.hosts.peers.is_empty() && impostor.hosts.peers.is_empty());
}

/// An invitation admits to the list and to nothing else, and nobody is admitted without one.
#[tokio::test]
async fn the_leniency_of_an_invitation_does_not_reach_further() {
    let (stranger, destination) = (Host::new(), Host::new());
    stranger.trusts(&destination, Permission::Both);
    let listener = destination.listener();
    let address = listener.local_addr();
    let closed = Code::parse(&destination.invite(address).reveal()).unwrap();
    let (client, server) = meet(&listener, stranger.hosts.clone()).await;
    assert!(matches!((client, server), (Err(Error::NotTrusted { .. }), Err(Error::Untrusted { .. }))));
    std::fs::remove_dir_all(destination.path().join("invitations")).unwrap();
    let (refused, answered) =
        tokio::join!(enrol(&closed, &stranger.hosts, "stranger", Permission::Both, PATIENCE), async {
            listener.accept().await.unwrap().answer().await
        });
    assert!(refused.unwrap_err().to_string().contains("nobody is invited"));
    assert!(matches!(answered, Err(Error::Modes { .. })), "{answered:?}");
}
