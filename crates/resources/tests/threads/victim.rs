//! Small programs to freeze: compiled when first needed, killed when dropped.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Mutex;

/// A running victim that has said "ready".
pub(crate) struct Victim {
    child: Child,
    output: BufReader<ChildStdout>,
}

fn compiled(name: &str) -> PathBuf {
    static COMPILING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = COMPILING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/threads").join(name).with_extension("c");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    if !program.exists() {
        let mut compiler = Command::new("cc");
        compiler.args(["-O1", "-Wall", "-pthread", "-o"]).arg(&program).arg(&source);
        let status = compiler.status().expect("a C compiler is needed: apt-get install gcc");
        assert!(status.success(), "{} does not compile", source.display());
    }
    program
}

impl Victim {
    pub(crate) fn start(name: &str, arguments: &[&str]) -> Self {
        let mut child = Command::new(compiled(name)).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut victim = Self { child, output };
        assert_eq!(victim.line(), "ready");
        // It says so just before it waits.
        std::thread::sleep(std::time::Duration::from_millis(50));
        victim
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Waits for its end.
    pub(crate) fn reap(&mut self) {
        let _ = self.child.wait();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
