//! The log: for operators, on standard error, as much of it as `-v` asks for.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts to log. `GODWIT_LOG` in the environment, in the words of tracing's `EnvFilter`, goes before `-v`.
pub fn to_standard_error(verbosity: u8) {
    let filter = EnvFilter::try_from_env("GODWIT_LOG").unwrap_or_else(|_| EnvFilter::new(directives(verbosity)));
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
    let started = log.try_init();
    // Somebody else logs in this process already; that is as good.
    let _ = started;
}

/// Ours by name, and of everybody else what would be wrong anyway.
fn directives(verbosity: u8) -> &'static str {
    match verbosity {
        0 => "error",
        1 => "warn,migrate=info,godwit=info",
        2 => "warn,migrate=debug,godwit=debug",
        _ => "info,migrate=trace,godwit=trace",
    }
}
