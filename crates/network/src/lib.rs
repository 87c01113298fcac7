//! What the hosts' networks have to do while connections change hosts: packets are held back and delivered later, and
//! addresses move.
//!
//! No peer may notice that for some milliseconds nobody has its connection. A kernel without the socket would answer with a
//! reset, and a packet that is just dropped comes again only when the peer's timer runs out, 200 ms later or more. So packets
//! of moving connections are kept from the kernel ([`Hold`]: a netfilter rule) and collected (a packet socket sees them
//! before the rule does), and the host where the connection lives afterwards gets them all ([`Delivery`]): the destination,
//! or this one again if the move is called off.
//!
//! TCP does not mind a packet that comes twice, and joins fragments again itself. UDP does neither: its packets are collected by
//! the rule that drops them, whole, so that each is either taken by the socket or held back.
//!
//! Everything here acts on the network namespace of the calling thread. Sockets are no business of this crate.

mod address;
mod attribute;
mod capture;
pub mod contents;
#[doc(hidden)]
pub mod decoders;
mod deliver;
mod error;
mod flow;
mod fragments;
mod hold;
mod inject;
mod log;
mod namespace;
pub mod net_table;
mod netlink;
mod nftables;
mod packet;
mod room;
mod routing;
mod silence;
mod stand_in;
mod tcp_table;
mod tracking;
mod translation;
mod turn_away;

pub use address::{Address, Announcer, Interface, addresses, find, give_routes, has, interface, route_names};
pub use deliver::{Delivery, MARK};
pub use error::{Error, Result};
pub use flow::{Datagrams, Flow, Listener, Watched};
pub use hold::{HalfOpen, Hold, Unfinished, others_at};
pub use namespace::Namespace;
pub use packet::{Datagram, Packet, end_of_stream, question, urgent_byte, window_update};
pub use silence::Silence;
pub use stand_in::{Known, Remainder, Said, StandIn, Talks};
pub use tracking::Tracking;
pub use translation::Translation;
