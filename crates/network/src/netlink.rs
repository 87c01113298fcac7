//! Questions to the kernel over netlink(7): one at a time, each waits for its answer.

use netlink_packet_core::{NetlinkBuffer, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr};

use crate::error::{Error, Result};
use godwit_kernel::Errno;

/// What acknowledges a message, or refuses it: `NLMSG_ERROR`, with the negated errno behind the header.
const ERROR: u16 = 2;
const HEADER: usize = 16;

/// Opens a netlink socket of a protocol and connects it to the kernel.
pub(crate) fn open(protocol: isize) -> Result<Socket> {
    let failed = |what| move |source: std::io::Error| Error::io("netlink", what, &source);
    let mut socket = Socket::new(protocol).map_err(failed("opening a socket"))?;
    socket.bind_auto().map_err(failed("binding"))?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(failed("connecting"))?;
    Ok(socket)
}

/// Sends messages that are encoded already, and waits for an acknowledgement of each of `sequences`.
pub(crate) fn transact(socket: &Socket, bytes: &[u8], sequences: &[u32]) -> Result<(), Errno> {
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    socket.send(bytes, 0).map_err(errno)?;
    let mut waiting = sequences.len();
    while waiting > 0 {
        let (answer, _) = socket.recv_from_full().map_err(errno)?;
        let mut rest = answer.as_slice();
        while rest.len() >= HEADER {
            let Ok(message) = NetlinkBuffer::new_checked(rest) else { return Err(Errno::EBADMSG) };
            let length = (message.length() as usize).max(HEADER);
            if message.message_type() == ERROR {
                let code = rest.get(HEADER..HEADER + 4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
                match code {
                    Some(0) if sequences.contains(&message.sequence_number()) => waiting -= 1,
                    Some(0) => {}
                    Some(code) => return Err(Errno::from_raw(-code)),
                    None => return Err(Errno::EBADMSG),
                }
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
    Ok(())
}

/// Asks routing netlink (rtnetlink(7)) something and collects the answers.
pub(crate) fn ask(
    socket: &Socket,
    message: RouteNetlinkMessage,
    flags: u16,
) -> Result<Vec<RouteNetlinkMessage>, Errno> {
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    let mut request = NetlinkMessage::from(message);
    request.header.flags = netlink_packet_core::NLM_F_REQUEST | flags;
    request.header.sequence_number = 1;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0).map_err(errno)?;
    let mut answers = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full().map_err(errno)?;
        let mut rest = answer.as_slice();
        while rest.len() >= HEADER {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(|_| Errno::EBADMSG)?;
            let length = (message.header.length as usize).max(HEADER);
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(answers),
                NetlinkPayload::Error(error) => {
                    return error.code.map_or(Ok(answers), |code| Err(Errno::from_raw(-code.get())));
                }
                NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                _ => {}
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
