//! Messages of a migration, generated from `godwit/wire.proto`; documentation of messages lives there.
#![allow(missing_docs, clippy::all, clippy::pedantic)]

include!(concat!(env!("OUT_DIR"), "/godwit.wire.rs"));
