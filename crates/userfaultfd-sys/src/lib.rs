//! The `userfaultfd(2)` ABI of Linux, written down.
//!
//! Takes the place of the published crate of this name, which generates the same items with bindgen and so needs
//! libclang and takes whatever headers the build host has. The ABI is append-only and fixed; here it is as of Linux
//! 6.18, with assertions on every size and number that a slip could break. No functions, no dependencies.
//!
//! Rests on ioctl_userfaultfd(2) and the kernel's Documentation/admin-guide/mm/userfaultfd.rst.

#![no_std]
#![allow(non_camel_case_types, non_upper_case_globals, reason = "the kernel's names")]

mod messages;
mod requests;

pub use messages::*;
pub use requests::*;
