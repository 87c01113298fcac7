//! How much room the receivers of datagrams have. What was held back comes all at once, and may be far more than their buffers take,
//! though they read as fast as it was sent: it is given to them as they read.

use std::collections::HashMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use godwit_kernel::Errno;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use crate::attribute;
use crate::error::Result;
use crate::flow::Flow;
use crate::netlink;
use crate::tcp_table::{SOCK_DIAG_BY_FAMILY, question_about};

/// Of a `struct inet_diag_msg`.
const MESSAGE: usize = 72;
/// Where in it the kernel's name of the socket lies.
const COOKIE: usize = 44;
/// What a socket's buffers take and have: `INET_DIAG_SKMEMINFO`.
const MEMORY: u16 = 7;

/// Longest wait for a receiver that does not read.
const FOR_ONE: Duration = Duration::from_millis(100);
/// Longest wait for all receivers together: behind them others wait.
const FOR_ALL: Duration = Duration::from_millis(500);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(1);

/// What is known of a receiver's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fit {
    /// There is room.
    Roomy,
    /// It does not read, or not fast enough.
    Full,
    /// Nobody says: there is none, or it is bound to a device.
    Unknown,
}

/// Asks for the receivers of one network namespace, that of the thread which made it.
#[derive(Debug)]
pub(crate) struct Rooms {
    socket: Socket,
    /// By what the kernel calls a socket; and which one takes a flow's datagrams.
    receivers: HashMap<u64, Room>,
    of: HashMap<Flow, u64>,
    /// How much longer receivers are waited for, all together.
    patience: Duration,
}

#[derive(Debug)]
struct Room {
    /// Bytes that it takes before it is asked for again.
    left: u32,
    /// What waited in it then.
    waiting: u32,
    /// When it was last seen to read, or to have room.
    read: Instant,
}

/// Bytes in a socket's buffer, and the most that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Memory {
    /// Whose it is.
    cookie: u64,
    waiting: u32,
    most: u32,
}

impl Rooms {
    /// # Errors
    /// Without sock_diag(7).
    pub(crate) fn new() -> Result<Self> {
        let socket = netlink::open(NETLINK_SOCK_DIAG)?;
        Ok(Self { socket, receivers: HashMap::new(), of: HashMap::new(), patience: Duration::ZERO })
    }

    /// From now on waits for receivers: they run.
    pub(crate) fn be_patient(&mut self) {
        self.patience = FOR_ALL;
    }

    /// Waits, if it is patient, until the receiver of a datagram has room for one that takes so many `bytes` of its buffer.
    pub(crate) fn wait(&mut self, flow: &Flow, bytes: u32) -> Fit {
        loop {
            if let Some(room) = self.of.get(flow).and_then(|cookie| self.receivers.get_mut(cookie))
                && let Some(left) = room.left.checked_sub(bytes)
            {
                (room.left, room.read) = (left, Instant::now());
                return Fit::Roomy;
            }
            let memory = match ask(&self.socket, flow) {
                Ok(Some(memory)) => memory,
                Ok(None) => return Fit::Unknown,
                Err(errno) => {
                    tracing::debug!(%errno, ?flow, "how much room a receiver has");
                    return Fit::Unknown;
                }
            };
            self.of.insert(*flow, memory.cookie);
            let room = self.receivers.entry(memory.cookie);
            let room = room.or_insert_with(|| Room { left: 0, waiting: u32::MAX, read: Instant::now() });
            // Others send to it, too.
            room.left = memory.most.saturating_sub(memory.waiting) / 2;
            // The kernel gives an empty one whatever comes.
            if memory.waiting == 0 {
                room.left = room.left.max(bytes);
            }
            if memory.waiting < room.waiting {
                room.read = Instant::now();
            }
            room.waiting = memory.waiting;
            if room.left >= bytes {
                continue;
            }
            let Some(patience) = self.patience.checked_sub(LOOK_AGAIN_AFTER) else { return Fit::Full };
            if room.read.elapsed() > FOR_ONE {
                return Fit::Full;
            }
            sleep(LOOK_AGAIN_AFTER);
            self.patience = patience;
        }
    }
}

/// Asks for the socket that takes a datagram; `None` where there is none.
fn ask(socket: &Socket, flow: &Flow) -> Result<Option<Memory>, Errno> {
    // N.B. source and destination are those of the datagram.
    let question = question_about(libc::IPPROTO_UDP, 1 << (MEMORY - 1), (flow.remote, flow.local));
    match netlink::ask_one(socket, SOCK_DIAG_BY_FAMILY, &question) {
        Ok(told) => Ok(memory(&told.content)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Reads what is said of a socket's buffers.
fn memory(message: &[u8]) -> Option<Memory> {
    let cookie = u64::from_ne_bytes(message.get(COOKIE..COOKIE + 8)?.try_into().ok()?);
    let value = attribute::find(message.get(MESSAGE..)?, MEMORY)?.value;
    let number = |at: usize| Some(u32::from_ne_bytes(value.get(at..at + 4)?.try_into().ok()?));
    Some(Memory { cookie, waiting: number(0)?, most: number(4)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn a_receiver_is_waited_for_as_long_as_it_reads() {
        for ip in ["127.0.0.1", "::1"] {
            let receiver = UdpSocket::bind((ip, 0)).unwrap();
            let sender = UdpSocket::bind((ip, 0)).unwrap();
            let flow = Flow { local: receiver.local_addr().unwrap(), remote: sender.local_addr().unwrap() };
            let mut rooms = Rooms::new().unwrap();
            rooms.be_patient();
            let memory = ask(&rooms.socket, &flow).unwrap().unwrap();
            assert!(memory.waiting == 0 && memory.most > 0, "{memory:?}");
            assert_eq!(rooms.wait(&flow, 1 << 30), Fit::Roomy, "nothing is too much for an empty buffer");

            let payload = [7; 1000];
            let mut sent = 0;
            while rooms.wait(&flow, 2048) == Fit::Roomy {
                sender.send_to(&payload, flow.local).unwrap();
                sent += 1;
            }
            assert!(sent > 10, "{sent}");
            let reading = std::thread::spawn(move || {
                let mut buffer = [0; 2000];
                for _ in 0..3 * sent {
                    assert_eq!(receiver.recv(&mut buffer).unwrap(), payload.len());
                    sleep(Duration::from_micros(200));
                }
                receiver
            });
            // The kernel counts what was read a quarter of the buffer at a time.
            sleep(Duration::from_millis(50));
            for _ in 0..2 * sent {
                assert_eq!(rooms.wait(&flow, 2048), Fit::Roomy);
                sender.send_to(&payload, flow.local).unwrap();
            }
            drop(reading.join().unwrap());
            let mut rooms = Rooms::new().unwrap();
            assert_eq!(rooms.wait(&flow, 1), Fit::Unknown);
        }
    }

    #[test]
    fn a_short_message_says_nothing() {
        let mut message = vec![0; MESSAGE];
        message.extend([8, 0, 3, 0, 1, 2, 3, 4]);
        message.extend([12, 0, 7, 0, 5, 0, 0, 0, 6, 0, 0, 0]);
        assert_eq!(memory(&message), Some(Memory { cookie: 0, waiting: 5, most: 6 }));
        for end in 0..message.len() {
            assert_eq!(memory(&message[..end]), None);
        }
        assert_eq!(memory(&[0xff; 200]), None);
        assert_eq!(memory(&[0; 200]), None);
    }
}
