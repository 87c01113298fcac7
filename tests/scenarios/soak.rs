//! Back and forth with faults, a short one; `cargo run -p godwit-tests --bin soak` goes on for longer.

use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use godwit_tests::{Course, soak};

#[test]
fn a_short_one() -> Result<()> {
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos() as u64 % 1_000_000;
    let course = Course { moves: 60, time: Duration::from_secs(40), seed };
    let tally = soak(course, &mut |line| println!("{line}"))?;
    println!("{tally:?}");
    ensure!(tally.moved > 3 && tally.answers > 100, "{tally:?}");
    Ok(())
}
