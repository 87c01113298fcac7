//! /proc/PID/status (proc_pid_status(5)) as a table of its fields.

use crate::{Error, Result};
use std::collections::HashMap;

/// The fields of a status file.
#[derive(Clone, Debug, Default)]
pub struct Status(HashMap<String, String>);

impl Status {
    /// The text of a field, empty when the kernel does not have it.
    #[must_use]
    pub fn text(&self, field: &str) -> &str {
        self.0.get(field).map_or("", String::as_str)
    }

    /// The whitespace-separated numbers of a field.
    #[must_use]
    pub fn numbers(&self, field: &str) -> Vec<u64> {
        self.text(field).split_whitespace().filter_map(|word| word.parse().ok()).collect()
    }

    /// A hexadecimal field (signal and capability sets).
    #[must_use]
    pub fn hexadecimal(&self, field: &str) -> Option<u64> {
        u64::from_str_radix(self.text(field), 16).ok()
    }

    /// An octal field (`Umask`).
    #[must_use]
    pub fn octal(&self, field: &str) -> Option<u32> {
        u32::from_str_radix(self.text(field), 8).ok()
    }

    /// The first number of a field.
    #[must_use]
    pub fn number(&self, field: &str) -> Option<u64> {
        self.text(field).split_whitespace().next()?.parse().ok()
    }

    /// State letter (`R`, `S`, `Z`, ...).
    #[must_use]
    pub fn state(&self) -> char {
        self.text("State").chars().next().unwrap_or('?')
    }
}

/// Reads the status of a process or thread.
///
/// # Errors
/// When it is gone.
pub fn read_status(tid: i32) -> Result<Status> {
    let path = format!("/proc/{tid}/status");
    let text = std::fs::read(&path).map_err(|source| Error::proc(&path, source))?;
    Ok(parse_status(&text))
}

/// Takes the text of a status file apart.
#[must_use]
pub fn parse_status(text: &[u8]) -> Status {
    let fields = String::from_utf8_lossy(text)
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(field, value)| (field.to_owned(), value.trim().to_owned()))
        .collect();
    Status(fields)
}
