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
    tracee.move_scratch(0x10_0000).unwrap();
    assert_eq!(tracee.scratch_range().unwrap().0, 0x10_0000);
    tracee.end_thread(tid).unwrap();
    assert_eq!(tracee.threads().len(), 1);
    drop(tracee);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "the stub is gone, and reaped");
}
