//! Carries frames between two hosts over QUIC, and is the only library here that is asynchronous.
//!
//! A [`Listener`] and [`connect`] end in the same thing: a [`Link`], the connection with its figures and its end,
//! and a [`Channel`], one ordered stream of frames in each direction. Between the TLS handshake and the first frame
//! both sides know who the other one is: by the [`HostKey`]s that each has in its list ([`Peers`]), or by a [`Token`] that both hold,
//! bound to this very TLS session; without either nothing is said. Hosts get into each other's list by invitation
//! ([`Invitations`], [`enrol`]).
//!
//! What the frames mean, when to reconnect and what to send first is not decided here. An endpoint runs on the
//! runtime it is made on: faults, which must not queue behind bulk data, want [`Profile::Faults`], a socket and a
//! `current_thread` runtime on a thread of their own.

mod address;
mod authentication;
mod channel;
mod complaints;
mod congestion;
mod connect;
mod credentials;
mod crowd;
#[doc(hidden)]
pub mod decoders;
mod enrolment;
mod error;
mod fingerprint;
mod host_key;
mod identity;
mod invitation;
mod lasting;
mod link;
mod listener;
mod party;
mod peers;
mod private;
mod socket;
mod token;
mod transport;

pub use address::{DEFAULT_PORT, DRAIN_PORT_OFFSET, FAULT_PORT_OFFSET, HostPort, Service, resolve};
pub use authentication::PROTOCOL_VERSION;
pub use channel::{Channel, Frame, Receiver, Sender};
pub use complaints::Complaints;
pub use connect::{Connector, connect};
pub use credentials::{Credentials, DEFAULT_CONFIG_DIR, Hosts};
pub use enrolment::{enrol, own_name};
pub use error::{CODE_AUTH_FAILED, CODE_DONE, CODE_PROTOCOL, CODE_VERSION, Error, Result, with_causes};
pub use fingerprint::Fingerprint;
pub use host_key::HostKey;
pub use invitation::{Code, DEFAULT_VALIDITY, Invitations};
pub use link::Link;
pub use listener::{Answered, Incoming, Listener};
pub use party::Party;
pub use peers::{Peer, Peers, Permission};
pub use token::Token;
pub use transport::{Profile, Timing};
