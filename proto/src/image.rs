//! State messages generated from `godwit/image/*.proto`; documentation of messages lives there.
#![allow(missing_docs, clippy::all, clippy::pedantic)]

include!(concat!(env!("OUT_DIR"), "/godwit.image.rs"));
