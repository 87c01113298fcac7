//! Carries frames between two hosts over QUIC, and is the only library here that is asynchronous.
//!
//! A [`Listener`] and [`connect`] end in the same thing: a [`Link`], the connection with its figures and its end,
//! and a [`Channel`], one ordered stream of frames in each direction. Between the TLS handshake and the first frame
//! both sides prove that they hold the same [`Token`], bound to this very TLS session; without it nothing is said.
//!
//! What the frames mean, when to reconnect and what to send first is not decided here. An endpoint runs on the
//! runtime it is made on: faults, which must not queue behind bulk data, want [`Profile::Faults`], a socket and a
//! `current_thread` runtime on a thread of their own.

mod address;
mod authentication;
mod channel;
mod connect;
mod crowd;
#[doc(hidden)]
pub mod decoders;
mod error;
mod identity;
mod link;
mod listener;
mod socket;
mod token;
mod transport;

pub use address::{DEFAULT_PORT, DRAIN_PORT_OFFSET, FAULT_PORT_OFFSET, HostPort, Service, resolve};
pub use authentication::PROTOCOL_VERSION;
pub use channel::{Channel, Frame, Receiver, Sender};
pub use connect::{Connector, connect};
pub use error::{CODE_AUTH_FAILED, CODE_DONE, CODE_PROTOCOL, CODE_VERSION, Error, Result};
pub use link::Link;
pub use listener::{Incoming, Listener};
pub use token::Token;
pub use transport::{Profile, Timing};
