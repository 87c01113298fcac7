//! The thread that fetches what nobody has touched yet.

use std::sync::PoisonError;
use std::time::Duration;

use godwit_carry::{CODE_DONE, Incoming, Listener, Sender};
use godwit_proto::wire::Role;
use tokio::sync::watch;

use crate::arrival;
use crate::error::Result;
use crate::fault_side::{over, replaced, send_requests};
use crate::greeting::{self, CODE_REPLACED};
use crate::migration::{Drain, LaneName, Stage};
use crate::service::{self, Registry};

/// Time between two looks whether second holders are there.
const LOOK_AFTER_HOLDERS: Duration = Duration::from_millis(500);

/// Runs until told to stop.
pub(crate) async fn run(listener: Listener, registry: Registry, mut stop: watch::Receiver<bool>) {
    let mut look = tokio::time::interval(LOOK_AFTER_HOLDERS);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = look.tick() => see_to_holders(&registry),
            incoming = listener.accept() => match incoming {
                Some(incoming) => drop(tokio::spawn(answer(incoming, registry.clone()))),
                None => break,
            },
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    listener.close(CODE_DONE, "the fault service ends", Duration::from_millis(200)).await;
}

/// Where a second holder was killed there is to be another one: this program may be next.
fn see_to_holders(registry: &Registry) {
    let drains: Vec<_> = registry.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
    drains.iter().filter(|drain| *drain.stage.borrow() == Stage::Draining).for_each(|drain| drain.see_to_holder());
}

async fn answer(incoming: Incoming, registry: Registry) {
    let address = incoming.remote_address();
    let accepted = match incoming.authenticate().await {
        Ok(accepted) => accepted,
        Err(error) => return greeting::tell_turned_away(address, error.into()),
    };
    let served = async {
        let caller = accepted.0.party();
        let find = |id| service::find(&registry, id, caller);
        let (drain, link, sender, receiver) = greeting::receive(accepted, Role::Drain, find).await?;
        tracing::info!(migration = %drain.id, %address, "the source is linked for the drain");
        let number = drain.drain_link_up();
        let mut receiver = receiver;
        tokio::select! {
            biased;
            () = replaced(&drain.drain_link, number) => {
                link.close(CODE_REPLACED, "a newer link took over");
                Ok(())
            }
            ended = arrival::take_in(&drain, LaneName::Background, &link, &mut receiver) => ended,
            ended = fetch(&drain, sender, number) => ended.inspect(|()| link.close(CODE_DONE, "drained")),
        }
    };
    let served: Result<()> = served.await;
    if let Err(error) = served {
        greeting::tell_end("link for the drain", address, &error);
    }
}

/// Asks for pages as long as any are missing.
async fn fetch(drain: &Drain, mut sender: Sender, number: u64) -> Result<()> {
    let mut stage = drain.stage.subscribe();
    loop {
        // Whoever is replaced is ended.
        let Some((requests, look_again)) = drain.take_background(number) else { return std::future::pending().await };
        let idle = requests.is_empty();
        send_requests(&mut sender, requests).await?;
        if !idle {
            continue;
        }
        let later = async {
            match look_again {
                Some(then) => tokio::time::sleep_until(then.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = drain.proceed.notified() => {}
            () = later => {}
            // Whether the source acknowledges comes on the other link.
            () = over(&mut stage) => return Ok(()),
        }
    }
}
