//! Frames that a source sends to a fault service, on either link.

use std::sync::Arc;

use godwit_carry::{Frame, Link, Receiver};
use godwit_pages::PageRange;
use godwit_proto::wire::{DrainedAck, Failure};
use godwit_stream::{ENCODING_ZERO, Scratch, decode_pages};

use crate::error::{Error, Result};
use crate::greeting::{decode, shortened};
use crate::migration::{Drain, LaneName};

/// Takes in everything that comes, until the source has acknowledged the end.
///
/// # Errors
/// When the link ends before, or the source says what it may not.
pub(crate) async fn take_in(drain: &Arc<Drain>, lane: LaneName, link: &Link, receiver: &mut Receiver) -> Result<()> {
    let mut scratch = Scratch::new();
    loop {
        let Some(frame) = receiver.receive().await? else {
            let what = "the source left".to_owned();
            return Err(Error::Protocol { address: link.remote_address(), what });
        };
        if frame.is_pages() {
            place(drain, lane, frame, &mut scratch).await?;
        } else if decode::<DrainedAck>(&frame).is_some() {
            drain.acknowledged();
            return Ok(());
        } else if let Some(failure) = decode::<Failure>(&frame) {
            // The request stays open, so that it is not made again on this link; the thread that waits goes on waiting.
            let (resource, text) = (shortened(&failure.resource), shortened(&failure.text));
            tracing::error!(migration = %drain.id, %resource, %text, "the source cannot give pages; the program stalls where it needs them");
        } else {
            let what = format!("message {:?} from a source", frame.message_type());
            return Err(Error::Protocol { address: link.remote_address(), what });
        }
    }
}

async fn place(drain: &Arc<Drain>, lane: LaneName, frame: Frame, scratch: &mut Scratch) -> Result<()> {
    let Frame { header, payload } = frame;
    let pages = decode_pages(&header, payload, scratch)?;
    let Ok(range) = PageRange::from_pages(header.address, u64::from(header.pages)) else { return Ok(()) };
    if header.space != 0 {
        return Ok(());
    }
    let content = (header.encoding != ENCODING_ZERO).then_some(&pages[..]);
    drain.place(lane, header.id, range, content).await
}
