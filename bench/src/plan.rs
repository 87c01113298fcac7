//! What is measured: scenarios, and what each asks of the victim and of the move.

use clap::ValueEnum;
use godwit_tests::Mode;
use serde::Serialize;

/// A kind of move of a kind of process.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// Hybrid mode; the process only notes the time.
    HybridIdle,
    /// Hybrid mode; the process rewrites memory at a given rate.
    HybridWriter,
    /// Pre-copy mode; the process rewrites memory at a given rate.
    PreCopy,
    /// Post-copy mode; the process touches its pages at random.
    PostCopy,
    /// Stop-and-copy mode; the process only notes the time.
    StopAndCopy,
    /// Hybrid mode; a thread computes and rewrites memory without pause.
    HybridBusy,
}

impl Scenario {
    /// When memory travels.
    pub fn mode(self) -> Mode {
        match self {
            Self::HybridIdle | Self::HybridWriter | Self::HybridBusy => Mode::Hybrid,
            Self::PreCopy => Mode::PreCopy,
            Self::PostCopy => Mode::PostCopy,
            Self::StopAndCopy => Mode::StopAndCopy,
        }
    }

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::HybridIdle => "hybrid-idle",
            Self::HybridWriter => "hybrid-writer",
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
            Self::StopAndCopy => "stop-and-copy",
            Self::HybridBusy => "hybrid-busy",
        }
    }

    /// The words that ask the victim for its part; `rate` is in MiB/s.
    pub fn victim_arguments(self, rate: u64) -> Vec<String> {
        let writer = || vec!["--writer".to_owned(), rate.to_string()];
        match self {
            Self::HybridIdle | Self::StopAndCopy => Vec::new(),
            Self::HybridWriter | Self::PreCopy => writer(),
            Self::PostCopy => vec!["--reader".to_owned()],
            Self::HybridBusy => [writer(), vec!["--busy".to_owned()]].concat(),
        }
    }

    /// Whether the victim's work before the move is compared with its work during the rounds.
    pub fn compares_work(self) -> bool {
        self == Self::HybridBusy
    }
}
