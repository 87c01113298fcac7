//! Waiting with an end: nothing in a scenario waits for ever.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Polls `probe` every 2 ms until it yields a value.
///
/// # Errors
/// The probe's own error, or that `what` did not happen within `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if Instant::now() >= end {
            bail!("{what}: nothing after {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Polls `condition` every 2 ms until it holds.
///
/// # Errors
/// The condition's own error, or that `what` did not happen within `limit`.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_for(what, limit, || Ok(condition()?.then_some(())))
}
