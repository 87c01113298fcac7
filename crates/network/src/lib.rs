//! What the hosts' networks have to do while connections change hosts: packets are held back and delivered later, and
//! addresses move.
//!
//! No peer may notice that for some milliseconds nobody has its connection. A kernel without the socket would answer with a
//! reset, and a packet that is just dropped comes again only when the peer's timer runs out, 200 ms later or more. So packets
//! of moving connections are kept from the kernel ([`Hold`]: a netfilter rule) and collected (a packet socket sees them
//! before the rule does), and the host where the connection lives afterwards gets them all ([`Delivery`]): the destination,
//! or this one again if the move is called off.
//!
//! Everything here acts on the network namespace of the calling thread. Sockets are no business of this crate.

mod address;
mod attribute;
mod capture;
pub mod contents;
mod deliver;
mod error;
mod flow;
mod hold;
mod namespace;
mod netlink;
mod nftables;
mod packet;
mod silence;
mod translation;

pub use address::{Address, Announcer, Interface, addresses, find, has, interface};
pub use deliver::Delivery;
pub use error::{Error, Result};
pub use flow::{Flow, Listener, Watched};
pub use hold::Hold;
pub use namespace::Namespace;
pub use packet::end_of_stream;
pub use silence::Silence;
pub use translation::Translation;
