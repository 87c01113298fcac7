//! Real processes, stopped, driven and given back; stubs, made and filled.

use godwit_kernel::stub;
use godwit_tracee::{Batch, Extent, Tracee, read_maps, read_status};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A child that is killed when the test ends, however it ends.
struct Victim(Child);

impl Victim {
    fn sleeping() -> Self {
        let child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().expect("sleep runs");
        let victim = Self(child);
        let deadline = Instant::now() + Duration::from_secs(5);
        while std::fs::read_to_string(format!("/proc/{}/comm", victim.pid())).unwrap() != "sleep\n"
            || read_status(victim.pid()).unwrap().state() != 'S'
        {
            assert!(Instant::now() < deadline, "sleep never slept");
            std::thread::sleep(Duration::from_millis(1));
        }
        victim
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn remote_calls_run_and_leave_no_trace() {
    let victim = Victim::sleeping();
    let before = read_maps(victim.pid()).unwrap();
    let mut tracee = Tracee::freeze(victim.pid(), Extent::AllThreads).unwrap();
    let mut batch = Batch::new();
    let pid = batch.call("getpid", libc::SYS_getpid, &[]);
    let path = batch.string(b"/dev/null");
    let open = batch.call("open", libc::SYS_openat, &[libc::AT_FDCWD.into(), path.into(), 0.into()]);
    let close = batch.call("close", libc::SYS_close, &[open.into()]);
    let bad = batch.attempt("close", libc::SYS_close, &[9999.into()]);
    let outcome = tracee.run(batch).unwrap();
    assert_eq!(outcome.result(pid), Ok(victim.pid() as u64));
    assert_eq!(outcome.result(close), Ok(0));
    assert_eq!(outcome.result(bad), Err(godwit_kernel::Errno::EBADF));
    tracee.release().unwrap();
    assert_eq!(read_maps(victim.pid()).unwrap(), before);
    assert_eq!(read_status(victim.pid()).unwrap().number("TracerPid"), Some(0));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(read_status(victim.pid()).unwrap().state(), 'S', "it sleeps on, not interrupted");
}

#[test]
fn a_failing_call_ends_the_batch_and_is_named() {
    let victim = Victim::sleeping();
    let mut tracee = Tracee::freeze(victim.pid(), Extent::Leader).unwrap();
    let mut batch = Batch::new();
    batch.call("getpid", libc::SYS_getpid, &[]);
    batch.call("closing the door", libc::SYS_close, &[9999.into()]);
    batch.call("getpid", libc::SYS_getpid, &[]);
    let error = tracee.run(batch).unwrap_err().to_string();
    assert!(error.contains("closing the door") && error.contains("EBADF"), "{error}");
}

#[test]
fn a_stub_has_the_wanted_pid_gets_threads_and_dies_with_its_handle() {
    let wanted = (20_000..32_000).find(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()).unwrap();
    let pid = stub::spawn(wanted).unwrap();
    assert_eq!(pid, wanted);
    let mut tracee = Tracee::adopt(pid).unwrap();
    let tid = tracee.spawn_thread(wanted + 7).unwrap();
    assert_eq!(tid, wanted + 7);
    let mut batch = Batch::new();
    let gettid = batch.call("gettid", libc::SYS_gettid, &[]);
    assert_eq!(tracee.run_in(tid, batch).unwrap().result(gettid), Ok(tid as u64));
    tracee.move_scratch(0x10_0000, 0).unwrap();
    assert_eq!(tracee.scratch_range().unwrap().0, 0x10_0000);
    tracee.end_thread(tid).unwrap();
    assert_eq!(tracee.threads().len(), 1);
    drop(tracee);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "the stub is gone, and reaped");
}

/// A thread that somebody else traces makes the attempt fail when other threads are stopped already.
#[test]
fn a_freeze_that_fails_leaves_no_signal_blocked() {
    const PROGRAM: &str =
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)";
    let child = Command::new("python3").args(["-c", PROGRAM]).stdin(Stdio::null()).spawn().expect("python3 runs");
    let victim = Victim(child);
    let threads = || {
        let entries = std::fs::read_dir(format!("/proc/{}/task", victim.pid())).unwrap();
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).collect::<Vec<_>>()
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while threads().len() < 2 || threads().iter().any(|&tid| read_status(tid).is_ok_and(|status| status.state() != 'S'))
    {
        assert!(Instant::now() < deadline, "the second thread never slept");
        std::thread::sleep(Duration::from_millis(5));
    }
    let other = threads().into_iter().find(|&tid| tid != victim.pid()).unwrap();
    let (seized, wait) = std::sync::mpsc::channel();
    let (done, finish) = std::sync::mpsc::channel::<()>();
    let tracer = std::thread::spawn(move || {
        godwit_kernel::ptrace::seize(other, godwit_kernel::ptrace::Options::default()).unwrap();
        seized.send(()).unwrap();
        let _ = finish.recv();
    });
    wait.recv().unwrap();
    Tracee::freeze(victim.pid(), Extent::AllThreads).expect_err("one thread has a tracer");
    let status = read_status(victim.pid()).unwrap();
    assert_eq!(status.number("TracerPid"), Some(0));
    assert_eq!(status.hexadecimal("SigBlk"), Some(0), "its signals still reach it");
    done.send(()).unwrap();
    tracer.join().unwrap();
}

/// A SIGCONT takes away a SIGSTOP that has not arrived, ours too.
#[test]
fn a_process_that_is_continued_as_it_is_stopped_is_stopped_all_the_same() {
    let victim = Victim::sleeping();
    let pid = victim.pid();
    for round in 0..200u64 {
        godwit_kernel::process::kill(pid, libc::SIGSTOP).unwrap();
        let other = std::thread::spawn(move || {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_micros(20 * (round % 20)) {}
            godwit_kernel::process::kill(pid, libc::SIGCONT).unwrap();
        });
        let begun = Instant::now();
        let tracee = Tracee::freeze(pid, Extent::AllThreads).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(2), "round {round}: {:?}", begun.elapsed());
        other.join().unwrap();
        assert_eq!(read_status(pid).unwrap().state(), 't');
        tracee.release().unwrap();
        godwit_kernel::process::kill(pid, libc::SIGCONT).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while read_status(pid).unwrap().state() != 'S' {
            assert!(
                Instant::now() < deadline,
                "round {round}: it does not go on: {}",
                read_status(pid).unwrap().state()
            );
        }
    }
}
