//! The contract between hosts and with disks: process state, checkpoint magics and the messages of a migration.
//!
//! Types in [`image`] are at once the wire's state messages and the records of checkpoint files. They keep the message
//! names, field names, numbers and types of CRIU's images; what those have no field for is numbered from 10000 up.
//! Types in [`wire`] exist only between a source agent and a page server and may change with the protocol version.
//!
//! Generated code decodes hostile input without panicking, but a missing required field decodes as its default:
//! whoever reads a message checks what it relies on. A message of a peer is decoded by [`decode`], which caps the memory it takes.

pub mod image;
pub mod magics;
mod typed;
mod weight;
pub mod wire;

pub use prost::{DecodeError, Message};
pub use typed::Typed;
pub use weight::{HEAVIEST, Refused, Shape, Shaped, decode};
