//! The soak: `soak [MOVES [SEED]]`, 1000 moves unless told otherwise.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use godwit_tests::{Course, soak};

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1).map(|word| word.parse::<u64>());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |since| since.as_secs());
    let (Ok(moves), Ok(seed)) = (words.next().unwrap_or(Ok(1000)), words.next().unwrap_or(Ok(now))) else {
        eprintln!("usage: soak [MOVES [SEED]]");
        return ExitCode::from(2);
    };
    let moves = u32::try_from(moves).unwrap_or(u32::MAX);
    let course = Course { moves, time: Duration::from_secs(u64::from(moves) * 60), seed };
    match soak(course, &mut |line| println!("{line}")) {
        Ok(tally) => {
            println!("{tally:?}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}
