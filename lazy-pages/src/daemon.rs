//! The daemon from start to end.

use std::io::IsTerminal;
use std::sync::Arc;

use anyhow::Context;
use godwit_carry::Credentials;
use godwit_fault::{FaultListenerConfig, FaultService, HandoverListener};
use godwit_kernel::privileges;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing_subscriber::EnvFilter;

use crate::cli::{DaemonArguments, drain_address};
use crate::show::Style;

/// Serves until a signal ends it.
///
/// # Errors
/// When the token or this host's key cannot be used or something cannot be listened on.
pub fn run(arguments: &DaemonArguments) -> anyhow::Result<()> {
    log(arguments.verbose);
    let style = if arguments.json { Style::Json } else { Style::Lines };
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot handle signals")?;
    let credentials = Credentials::choose(&arguments.config_dir, arguments.token_file.as_deref())?;
    let drain = drain_address(arguments.listen).context("the port above --listen does not exist")?;
    // N.B. the socket first: when another daemon has it, that one's ports are in use too, and the error should name the cause.
    let listener = HandoverListener::bind(&arguments.socket)?;
    let listener = Arc::new(listener);
    let service = Arc::new(FaultService::start(FaultListenerConfig::new(arguments.listen, drain, credentials))?);
    confine();
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
    // What is left of the socket is removed here: threads that still serve would keep its owner alive.
    let _ = std::fs::remove_file(&arguments.socket);
    match (ended, failure.try_recv()) {
        // Programs that lack pages stall from here on; their page servers hold on and call the next daemon.
        (Some(_), _) => Ok(()),
        (None, Ok(Err(error))) => Err(error.into()),
        (None, _) => Ok(()),
    }
}

/// System calls that this daemon has no use for, and that somebody who had taken it over would.
const FORBIDDEN: [libc::c_long; 44] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_kill,
    libc::SYS_open_by_handle_at,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fsconfig,
    libc::SYS_mount_setattr,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_mknodat,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_setuid,
    libc::SYS_setresuid,
    libc::SYS_setgroups,
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_listen,
];

/// Gives up what is not needed any more now that all sockets are there. The threads that serve pages have given up their capabilities
/// themselves; what is started from here on inherits none.
fn confine() {
    if let Err(errno) = privileges::give_up_all() {
        tracing::warn!(%errno, "this daemon keeps its capabilities");
    }
    if let Err(errno) = privileges::forbid_calls(&FORBIDDEN) {
        tracing::warn!(%errno, "this daemon may make any system call");
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
