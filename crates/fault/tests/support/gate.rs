//! A page reader that serves only faults until it is opened.

use std::sync::{Arc, Condvar, Mutex};

use godwit_fault::{FrozenProcess, PageReader, Result};

use crate::program::End;

/// Reads pages of the source: lets faults through, and the rest only when the test says so.
pub(crate) struct Gate {
    process: FrozenProcess,
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    pub(crate) fn new(source: &End) -> Arc<Self> {
        let process = FrozenProcess::open(source.pid()).unwrap();
        Arc::new(Self { process, open: Mutex::new(false), opened: Condvar::new() })
    }

    pub(crate) fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

/// Opens a gate when dropped.
pub(crate) struct Opening<'a>(pub(crate) &'a Gate);

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

impl PageReader for Gate {
    fn read(&self, space: u32, address: u64, into: &mut [u8]) -> Result<()> {
        if std::thread::current().name() == Some("godwit-drain") {
            let shut = self.open.lock().unwrap();
            drop(self.opened.wait_while(shut, |open| !*open).unwrap());
        }
        self.process.read(space, address, into)
    }
}
