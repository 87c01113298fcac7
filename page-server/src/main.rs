//! `page-server`: the destination daemon.

use clap::Parser;
use page_server::cli::{Arguments, Command};
use page_server::event::{Event, Style};
use page_server::{Server, Settings, confine, invite};
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if let Some(Command::Invite(invitation)) = arguments.command.take() {
        return ended(invite(&invitation));
    }
    let level = match arguments.verbose {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        EnvFilter::new(format!(
            "warn,page_server={level},godwit_rebuild={level},godwit_fault={level},godwit_resources={level}"
        ))
    });
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    if let Err(errno) = godwit_resources::limits::make_room_for_descriptors() {
        tracing::warn!(%errno, "processes with many descriptors may not fit");
    }
    godwit_kernel::process::go_before_others();
    confine::to_what_is_needed(&arguments.policy());
    ended(run(&arguments))
}

fn ended(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("page-server: {}", godwit_carry::with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let settings = Settings {
        listen: arguments.listen,
        token_file: arguments.token_file.clone(),
        config_dir: arguments.config_dir.clone(),
        lazy_socket: arguments.lazy_socket.clone(),
        hand_over_to: arguments.hand_over_to.clone(),
        state_directory: arguments.state_directory.clone(),
        policy: arguments.policy(),
        once: arguments.once,
        patience: Duration::from_secs(arguments.patience),
        style: if arguments.json { Style::Json } else { Style::Lines },
    };
    runtime.block_on(async {
        let server = Server::bind(&settings)?;
        settings.style.say(&Event::Listening { address: server.local_addr() });
        let (stop, stopped) = watch::channel(false);
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        // A terminal that closes ends it in the same way, not in the middle of things.
        let mut hang_up = signal(SignalKind::hangup())?;
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hang_up.recv() => {}
            }
            let _ = stop.send(true);
            // Without this task's copy the receiver would take the sender's end for an answer.
            std::future::pending::<()>().await;
        });
        server.serve(stopped).await
    })
}
