//! Everything here that reads words of others, each behind a function of bytes that changes nothing: what the fuzzer calls. Each
//! returns how much it has understood, which is what the fuzzer is guided by.

use crate::descriptors::decoders as descriptors;
use crate::filesystem::Place;
use crate::identity::{namespaces, numbers};
use crate::memory::{aio, smaps};
use crate::restart::sample;
use crate::timers::{self, Clocks, IdChoice};
use crate::{credentials, files, limits, registers, scheduling, seccomp, signals};
use godwit_kernel::ptrace::Queue;
use godwit_proto::image::CoreEntry;
use godwit_proto::wire::{Final, Prepare};
use godwit_tracee::Batch;

/// Something that reads words of others.
pub type Decoder = fn(&[u8]) -> usize;

/// All of them, by name.
pub const ALL: &[(&str, Decoder)] = &[
    ("proc-fdinfo", |bytes| descriptors::descriptor(&text(bytes))),
    ("proc-mountinfo", |bytes| descriptors::mounts(&text(bytes)) + namespaces::parse_mounts(&text(bytes)).len()),
    ("proc-net", |bytes| descriptors::tables(&text(bytes))),
    ("proc-smaps", |bytes| smaps::parse(&text(bytes)).len()),
    ("proc-stat", |bytes| usize::from(numbers::Group::parse(&text(bytes)).is_some())),
    ("proc-timers", |bytes| timers::parse(&text(bytes)).map_or(0, |timers| 1 + timers.len())),
    ("proc-limits", |bytes| text(bytes).lines().filter_map(limits::parse_line).count()),
    ("proc-task", task),
    ("proc-lists", lists),
    ("elf-notes", |bytes| files::gnu_build_id(bytes).map_or(0, |id| 1 + id.len())),
    ("sock-diag", descriptors::diagnosis),
    ("datagram", descriptors::datagram),
    ("externals", |bytes| descriptors::externals(&text(bytes))),
    ("xsave", |bytes| {
        let (first, second) = bytes.split_at(bytes.len() / 2);
        usize::from(registers::fit_xstate(first, second).is_ok())
    }),
    ("state", |bytes| godwit_proto::decode::<Final>(bytes).map_or(0, |message| 1 + state(&message))),
    ("order", |bytes| godwit_proto::decode::<Prepare>(bytes).map_or(0, |message| 1 + descriptors::order(&message))),
];

fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// /proc/PID/task/TID/syscall and sched.
fn task(bytes: &[u8]) -> usize {
    let text = text(bytes);
    usize::from(sample::parse_call(&text).is_some()) + 2 * usize::from(sample::parse_schedule(&text).is_some())
}

/// Lists of CPUs, clock offsets and maps of ids.
fn lists(bytes: &[u8]) -> usize {
    let text = text(bytes);
    let offsets = usize::from(namespaces::parse_offsets(&text).is_some());
    scheduling::parse_list(&text).len() + offsets + usize::from(namespaces::maps(&text, 1000))
}

/// A state message, as far as it is looked at before anything is made of it, and the calls that would make it.
fn state(state: &Final) -> usize {
    let mut understood = descriptors::state(state);
    let place = state.fs.as_ref().map(|fs| Place::from_messages(fs, &state.files));
    understood += usize::from(matches!(place, Some(Ok(_))));
    let contexts = state.mm.iter().flat_map(|mm| &mm.aios);
    understood += contexts.filter(|context| aio::validate(context).is_ok()).count();
    let filters = state.seccomp.clone().unwrap_or_default();
    let newest = state.leader.iter().chain(&state.threads).filter_map(|core| core.thread_core.as_ref()?.seccomp_filter);
    understood += newest.filter(|&newest| seccomp::chain(&filters, newest).is_ok()).count();
    // N.B. as many as show everything: each of them has the same code.
    understood + state.leader.iter().chain(&state.threads).take(64).map(thread).sum::<usize>()
}

fn thread(core: &CoreEntry) -> usize {
    let mut batch = Batch::new();
    let mut understood = 0;
    if let Some(thread) = &core.thread_core {
        understood += usize::from(scheduling::set(&mut batch, thread, &[0, 1]).is_ok());
        if let Some(stack) = &thread.sas {
            signals::set_stack(&mut batch, stack);
        }
        let have = credentials::Capabilities::default();
        let credentials = thread.creds.as_ref().map(|creds| credentials::set(&mut batch, creds, have));
        understood += usize::from(matches!(credentials, Some(Ok(()))));
        let pending = thread.signals_p.as_ref().map(|queue| signals::queue(&mut batch, 2, 3, Queue::Thread, queue));
        understood += usize::from(matches!(pending, Some(Ok(()))));
        let raw = thread.user_regs.as_ref().and_then(|raw| registers::from_bytes(raw).ok());
        understood += usize::from(raw.is_some_and(|raw| registers::check(&raw).is_ok()));
    }
    if let Some(task) = &core.tc {
        understood += usize::from(signals::set_actions(&mut batch, &task.sigactions).is_ok());
        let timers = task.timers.as_ref();
        for choice in [IdChoice::Free, IdChoice::Ascending] {
            let made = timers.map(|timers| timers::create(&mut batch, timers, choice));
            understood += usize::from(matches!(made, Some(Ok(()))));
        }
        let (then, now) = (Clocks::default(), Clocks { monotonic_ns: 7, boottime_ns: 8, realtime_ns: 9 });
        if let Some(timers) = timers.filter(|timers| timers.posix.len() < 1000) {
            timers::arm(&mut batch, timers, then, now);
        }
        let limits = task.rlimits.as_ref().map(|rlimits| limits::set(&mut batch, rlimits));
        understood += usize::from(matches!(limits, Some(Ok(()))));
    }
    understood + batch.len()
}
