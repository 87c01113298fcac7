//! The daemon from start to end.

use std::io::IsTerminal;
use std::sync::Arc;

use anyhow::Context;
use godwit_carry::Credentials;
use godwit_fault::{FaultListenerConfig, FaultService, HandoverListener};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing_subscriber::EnvFilter;

use crate::cli::{DaemonArguments, drain_address};
use crate::confine;
use crate::show::Style;

/// Serves until a signal ends it.
///
/// # Errors
/// When the token or this host's key cannot be used or something cannot be listened on.
pub fn run(arguments: &DaemonArguments) -> anyhow::Result<()> {
    log(arguments.verbose);
    let style = if arguments.json { Style::Json } else { Style::Lines };
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("cannot handle signals")?;
    let credentials = Credentials::choose(&arguments.config_dir, arguments.token_file.as_deref())?;
    let drain = drain_address(arguments.listen).context("the port above --listen does not exist")?;
    // N.B. the socket first: when another daemon has it, that one's ports are in use too, and the error should name the cause.
    let listener = HandoverListener::bind(&arguments.socket)?;
    let listener = Arc::new(listener);
    // N.B. before there are threads: each of them is shut off as the one that starts it is.
    let readable = credentials.hosts().map(|_| arguments.config_dir.clone());
    confine::shut_off_files(readable.as_slice());
    let service = Arc::new(FaultService::start(FaultListenerConfig::new(arguments.listen, drain, credentials))?);
    confine::give_up_the_rest();
    style.listening(&arguments.socket, service.faults_addr(), service.drain_addr());

    let (failed, failure) = std::sync::mpsc::channel();
    let handle = signals.handle();
    let serving = (listener, service);
    std::thread::Builder::new()
        .name("godwit-socket".into())
        .spawn(move || {
            let (listener, service) = serving;
            let served = listener.serve(&service, move |event| style.event(&event));
            let _ = failed.send(served);
            handle.close();
        })
        .context("cannot start a thread")?;
    let ended = signals.forever().next();
    match (ended, failure.try_recv()) {
        // Programs that lack pages stall from here on; their page servers hold on and call the next daemon.
        (Some(_), _) => Ok(()),
        (None, Ok(Err(error))) => Err(error.into()),
        (None, _) => Ok(()),
    }
}

fn log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    // Whoever has set one before keeps it.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = log.with_ansi(std::io::stderr().is_terminal()).try_init();
}
