//! What trackers do not report, with rounds long enough that it happens in them many times.

use anyhow::Result;
use godwit_tests::{Mode, Trip, TwoHosts};

/// Four rounds at the least speed at which they end: each takes the better part of a second.
fn over_a_slow_link(victim: &str, arguments: &[&str], mode: Mode) -> Result<()> {
    let hosts = TwoHosts::builder().rate("80mbit").build()?;
    Trip::of(victim, arguments).with(&["--max-rounds", "4", "--downtime-target", "400"]).run_on(&hosts, mode).map(drop)
}

macro_rules! blind_spots {
    ($($test:ident: $victim:literal $arguments:expr;)*) => {$(
        mod $test {
            use super::*;

            #[test]
            fn pre_copy() -> Result<()> {
                over_a_slow_link($victim, &$arguments, Mode::PreCopy)
            }

            #[test]
            fn hybrid() -> Result<()> {
                over_a_slow_link($victim, &$arguments, Mode::Hybrid)
            }
        }
    )*};
}

blind_spots! {
    private_file_pages_thrown_away: "filemap" [];
    new_moved_and_zapped_mappings: "churn" [];
    shared_memory_written_through_a_descriptor: "sharedmem" [];
    writes_by_the_kernel: "kernelwrites" [];
    a_growing_heap_and_stack: "layout" [];
}
