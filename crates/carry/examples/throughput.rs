//! Prints what a link carries: raw frames of 1 MiB, then the round trip of a fault's size.
//!
//! ```text
//! throughput [MIB [ADDRESS]]        both sides here, over loopback or another of this host's addresses
//! throughput serve ADDRESS:PORT     one side, for one caller
//! throughput call ADDRESS:PORT MIB  the other, of pages only
//! ```
//! To be built with `--release`. Both sides here run on threads of their own, each with a `current_thread` runtime, as
//! two hosts would. The token is in the source: this is for measuring, not for anything worth protecting.

use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use godwit_carry::{CODE_DONE, Error, Link, Listener, Profile, Result, Token, connect};
use godwit_stream::{FrameHeader, PAGE_SIZE};

/// Pages in a frame: 1 MiB.
const PAGES: u32 = 256;
const FRAME: usize = PAGES as usize * PAGE_SIZE;
/// Frames of different memory, more than any cache holds, before the first comes again.
const DISTINCT: usize = 256;
const PATIENCE: Duration = Duration::from_secs(5);
const ROUND_TRIPS: usize = 5000;

type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let token = Token::from_bytes(b"only for measuring, known to all of us")?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (tell, _told) = mpsc::channel();
    match arguments[..] {
        ["serve", address] => Ok(alone(serve(address.parse()?, token, Profile::Bulk, tell))?),
        ["call", address, mib] => Ok(alone(send_pages(address.parse()?, &token, mib.parse()?))?),
        [] => both([127, 0, 0, 1].into(), &token, 2048),
        [mib] => both([127, 0, 0, 1].into(), &token, mib.parse()?),
        [mib, address] => both(address.parse()?, &token, mib.parse()?),
        _ => Err("see the top of the source for the arguments".into()),
    }
}

fn both(address: IpAddr, token: &Token, mib: u64) -> Outcome {
    for profile in [Profile::Bulk, Profile::Faults] {
        let (tell, told) = mpsc::channel();
        let serving = thread::spawn({
            let token = token.clone();
            move || alone(serve((address, 0).into(), token, profile, tell))
        });
        let target = told.recv()?;
        match profile {
            Profile::Bulk => alone(send_pages(target, token, mib))?,
            Profile::Faults => alone(ask(target, token))?,
        }
        serving.join().map_err(|_| "the serving side panicked")??;
    }
    Ok(())
}

fn alone<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|_| Error::NoRuntime)?.block_on(future)
}

/// Takes frames until the peer has finished, and tells it then how many bytes of pages came. A message is answered by a
/// page.
async fn serve(address: SocketAddr, token: Token, profile: Profile, tell: mpsc::Sender<SocketAddr>) -> Result<()> {
    let listener = Listener::bind(address, &token, profile)?;
    let _ = tell.send(listener.local_addr());
    let Some(incoming) = listener.accept().await else {
        return Ok(());
    };
    let (_link, channel) = incoming.authenticate().await?;
    let (mut sender, mut receiver) = channel.split();
    let page = Bytes::from(vec![5; PAGE_SIZE]);
    let mut taken = 0;
    while let Some(frame) = receiver.receive().await? {
        if frame.message_type().is_some() {
            sender.send_pages(FrameHeader::raw_pages(0, 0, 1, frame.header.id), Some(page.clone())).await?;
        }
        taken += frame.payload.len() as u64;
    }
    sender.send_message(0, taken, Bytes::new()).await?;
    sender.finish().await
}

async fn send_pages(target: SocketAddr, token: &Token, mib: u64) -> Result<()> {
    let (link, channel) = connect(target, token, Profile::Bulk, PATIENCE).await?;
    let (mut sender, mut receiver) = channel.split();
    let memory = Bytes::from(vec![3; DISTINCT * FRAME]);
    let frames: Vec<Bytes> = (0..DISTINCT).map(|frame| memory.slice(frame * FRAME..(frame + 1) * FRAME)).collect();
    let start = Instant::now();
    let mut jumbo = None;
    for (frame, payload) in (0..mib).zip(frames.iter().cycle()) {
        let header = FrameHeader::raw_pages(0, frame * FRAME as u64, PAGES, 0);
        sender.send_pages(header, Some(payload.clone())).await?;
        if jumbo.is_none() && link.path_payload() > 8900 {
            jumbo = Some((start.elapsed(), frame));
        }
    }
    sender.finish().await?;
    // The peer says how much it has taken when there is no more.
    let taken = receiver.receive().await?.map_or(0, |frame| frame.header.id);
    let seconds = start.elapsed().as_secs_f64();
    assert_eq!(taken, mib * FRAME as u64, "every byte arrives");
    let megabytes = taken as f64 / 1e6;
    println!("bulk: {:.0} MB/s, {mib} frames of 1 MiB in {seconds:.2} s", megabytes / seconds);
    if let Some((after, frame)) = jumbo {
        println!("      jumbo packets after {:.1} ms, {frame} frames", after.as_secs_f64() * 1e3);
    }
    report(&link).await;
    Ok(())
}

async fn ask(target: SocketAddr, token: &Token) -> Result<()> {
    let (link, channel) = connect(target, token, Profile::Faults, PATIENCE).await?;
    let (mut sender, mut receiver) = channel.split();
    let request = Bytes::from_static(&[1; 24]);
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for id in 0..ROUND_TRIPS as u64 {
        let start = Instant::now();
        sender.send_message(1, id, request.clone()).await?;
        receiver.receive().await?;
        times.push(start.elapsed());
    }
    sender.finish().await?;
    while receiver.receive().await?.is_some() {}
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 1000].as_secs_f64() * 1e6;
    println!("faults: p50 {:.0} µs, p99 {:.0} µs, p99.9 {:.0} µs for one page", at(500), at(990), at(999));
    report(&link).await;
    Ok(())
}

async fn report(link: &Link) {
    println!(
        "      packets of {} bytes, {} lost, {} bytes on the wire, round trip {:?}",
        link.path_payload(),
        link.packets_lost(),
        link.bytes_sent(),
        link.rtt()
    );
    link.close(CODE_DONE, "measured");
    link.settle(PATIENCE).await;
}
