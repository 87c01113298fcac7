//! A batch of remote system calls, and what came of it.

use crate::{Error, Result};
use godwit_kernel::Errno;
use godwit_kernel::blob::{LINKED, Record, STOP_ON_ERROR};
use std::borrow::Cow;

/// Alignment of buffers in the scratch mapping.
const ALIGNMENT: usize = 16;
const RECORD: usize = size_of::<Record>();

/// A piece of the tracee's scratch memory that belongs to one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    offset: usize,
    length: usize,
}

/// A call of a batch; names its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call(usize);

/// An argument of a remote system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// A plain number or an address in the tracee.
    Value(u64),
    /// The address of a buffer of this batch, plus an offset.
    Address(Buffer, usize),
    /// The result of an earlier call of this batch; at most one of a call's arguments.
    ResultOf(Call),
}

impl From<Buffer> for Arg {
    fn from(buffer: Buffer) -> Self {
        Self::Address(buffer, 0)
    }
}

impl From<Call> for Arg {
    fn from(call: Call) -> Self {
        Self::ResultOf(call)
    }
}

macro_rules! arg_from_number {
    ($($number:ty),*) => {$(
        impl From<$number> for Arg {
            fn from(value: $number) -> Self {
                Self::Value(value as u64)
            }
        }
    )*};
}
arg_from_number!(u64, i64, usize, u32, i32);

#[derive(Debug)]
struct PlannedCall {
    what: Cow<'static, str>,
    number: i64,
    arguments: [Arg; 6],
    may_fail: bool,
}

/// System calls that a tracee shall run one after the other.
///
/// A call added with [`Batch::call`] must succeed: the batch ends at the first that does not, and running it returns the
/// error. One added with [`Batch::attempt`] may fail; its outcome is looked at afterwards.
#[derive(Debug, Default)]
pub struct Batch {
    calls: Vec<PlannedCall>,
    data: Vec<u8>,
    /// Offsets in `data`: (where an address goes, whose address it is).
    pointers: Vec<(usize, usize)>,
}

impl Batch {
    /// Creates an empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether it has no calls.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Number of calls.
    #[must_use]
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Reserves `length` zeroed bytes that calls can write to.
    pub fn buffer(&mut self, length: usize) -> Buffer {
        let offset = self.data.len().next_multiple_of(ALIGNMENT);
        self.data.resize(offset + length, 0);
        Buffer { offset, length }
    }

    /// Places bytes that calls can read.
    pub fn data(&mut self, bytes: &[u8]) -> Buffer {
        let buffer = self.buffer(bytes.len());
        self.data[buffer.offset..].copy_from_slice(bytes);
        buffer
    }

    /// Places a NUL-terminated string.
    pub fn string(&mut self, bytes: &[u8]) -> Buffer {
        let buffer = self.buffer(bytes.len() + 1);
        self.data[buffer.offset..buffer.offset + bytes.len()].copy_from_slice(bytes);
        buffer
    }

    /// Has eight bytes of `holder` at `offset` hold the address that `target` will have in the tracee.
    pub fn pointer(&mut self, holder: Buffer, offset: usize, target: Buffer) {
        assert!(offset + 8 <= holder.length, "the pointer lies inside its buffer");
        self.pointers.push((holder.offset + offset, target.offset));
    }

    /// Adds a call that must succeed; `what` names it in errors.
    pub fn call(&mut self, what: impl Into<Cow<'static, str>>, number: i64, arguments: &[Arg]) -> Call {
        self.push(what.into(), number, arguments, false)
    }

    /// Adds a call that may fail.
    pub fn attempt(&mut self, what: impl Into<Cow<'static, str>>, number: i64, arguments: &[Arg]) -> Call {
        self.push(what.into(), number, arguments, true)
    }

    fn push(&mut self, what: Cow<'static, str>, number: i64, given: &[Arg], may_fail: bool) -> Call {
        assert!(given.len() <= 6, "a system call has at most six arguments");
        let mut arguments = [Arg::Value(0); 6];
        arguments[..given.len()].copy_from_slice(given);
        self.calls.push(PlannedCall { what, number, arguments, may_fail });
        Call(self.calls.len() - 1)
    }

    /// Bytes of scratch memory it needs.
    pub(crate) fn size(&self) -> usize {
        (self.calls.len() * RECORD).next_multiple_of(ALIGNMENT) + self.data.len()
    }

    /// Where buffers begin, relative to the records.
    fn data_start(&self) -> usize {
        (self.calls.len() * RECORD).next_multiple_of(ALIGNMENT)
    }

    /// The bytes to place at `base` in the tracee: the records, then the buffers.
    pub(crate) fn image(&self, base: u64) -> Vec<u8> {
        let data_base = base + self.data_start() as u64;
        let mut image = Vec::with_capacity(self.size());
        for call in &self.calls {
            let mut record = Record { number: call.number as u64, ..Record::default() };
            if !call.may_fail {
                record.flags |= STOP_ON_ERROR;
            }
            for (index, argument) in call.arguments.iter().enumerate() {
                record.arguments[index] = match *argument {
                    Arg::Value(value) => value,
                    Arg::Address(buffer, offset) => data_base + (buffer.offset + offset) as u64,
                    Arg::ResultOf(Call(link)) => {
                        assert_eq!(record.flags & LINKED, 0, "a call takes at most one earlier result");
                        record.flags |= LINKED | (index as u64) << 8;
                        record.link = link as u64;
                        0
                    }
                };
            }
            image.extend_from_slice(&record.to_bytes());
        }
        image.resize(self.data_start(), 0);
        image.extend_from_slice(&self.data);
        for &(at, target) in &self.pointers {
            let at = self.data_start() + at;
            image[at..at + 8].copy_from_slice(&(data_base + target as u64).to_le_bytes());
        }
        image
    }

    /// Interprets the bytes found at the same place afterwards; `left` is the number of calls not completed.
    pub(crate) fn outcome(self, pid: i32, image: Vec<u8>, left: usize) -> Result<Outcome> {
        let done = self.calls.len().saturating_sub(left);
        let result_at = |index: usize| -> i64 {
            let at = index * RECORD + Record::RESULT_OFFSET;
            i64::from_le_bytes(image[at..at + 8].try_into().expect("eight bytes"))
        };
        if let Some(failed) = self.calls.get(done) {
            let source = Errno::from_raw(result_at(done).wrapping_neg() as i32);
            return Err(Error::Remote { what: failed.what.clone().into_owned(), pid, source });
        }
        let results = (0..self.calls.len()).map(result_at).collect();
        let data_start = self.data_start();
        Ok(Outcome { results, image, data_start })
    }
}

/// What a batch that ran to its end left behind.
#[derive(Debug)]
pub struct Outcome {
    results: Vec<i64>,
    image: Vec<u8>,
    data_start: usize,
}

impl Outcome {
    /// What a call returned.
    ///
    /// # Errors
    /// The errno of a call that was allowed to fail and did.
    pub fn result(&self, call: Call) -> Result<u64, Errno> {
        let value = self.results[call.0];
        if (-4095..0).contains(&value) { Err(Errno::from_raw(-value as i32)) } else { Ok(value as u64) }
    }

    /// The bytes of a buffer after the calls.
    #[must_use]
    pub fn bytes(&self, buffer: Buffer) -> &[u8] {
        let start = self.data_start + buffer.offset;
        &self.image[start..start + buffer.length]
    }

    /// Eight bytes of a buffer at `offset` as a number.
    #[must_use]
    pub fn word(&self, buffer: Buffer, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(buffer)[offset..offset + 8].try_into().expect("eight bytes"))
    }

    /// Four bytes of a buffer at `offset` as a number.
    #[must_use]
    pub fn half(&self, buffer: Buffer, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(buffer)[offset..offset + 4].try_into().expect("four bytes"))
    }
}
